#!/usr/bin/env bash
# What the fast recipe's parts are worth, three seeds of each. First the plain recipe (configs/ablation.py) and the fast
# one on a fifth of its bytes, of packages whose text was not used to choose the recipe. Then, on as many bytes of
# `local`, the fast recipe with each part left out, and the plain one with each change alone. Writes docs/ablation*.md
# and docs/ablation_fifth.svg. Needs matplotlib, pip, and the network for the packages (130 MB).
#
#     bash runs/ablate.sh [OUT]    # three hours on two cores; what is done is kept, so it can be cut short
#
# Environment variables: SEEDS, BYTES of text a run sees, JOBS at once, PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

out="${1:-out/ablation}"
bytes="${BYTES:-1000000}"
jobs="${JOBS:-$(nproc)}"
seeds="${SEEDS:-1 2 3}"
python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
threads=$(( $(nproc) > jobs ? $(nproc) / jobs : 1 ))

if [ ! -d data/raw/packages ] || [ configs/data/packages.txt -nt data/raw/packages ]; then
    rm -rf data/raw/wheels data/raw/packages data/raw/packages.part
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version=3.11 --platform=manylinux_2_28_x86_64 \
        --dest=data/raw/wheels --requirement=configs/data/packages.txt
    for wheel in data/raw/wheels/*.whl; do
        name=${wheel##*/}
        "$python" -m zipfile -e "$wheel" "data/raw/packages.part/${name%%-*}"
    done
    find data/raw/packages.part -type f ! -name '*.py' -delete
    touch data/raw/packages.part
    mv data/raw/packages.part data/raw/packages
    rm -r data/raw/wheels
fi
shards() { "$python" prepare.py "configs/data/$1.py" --name="$1_$2k" --tokenizer="train:$(($2 * 1024))"; }
for size in 16 32; do shards packages $size; done
for size in 8 16 32; do shards ablation $size; done

# experiment NAME SHARDS BYTES FLAGS…: train on that many bytes, $tokens a step or 2,048, unless that is done. $n is
# then the number of steps; flags that use it have that of the run before: of as many tokens a step.
unset tokens
experiment() {
    local name=$1 shards=$2 folder=$out/$1/seed$seed tokens=${tokens:-2048}
    n=$("$python" -c "import json, sys
split = json.load(open(f'data/shards/{sys.argv[1]}/meta.json'))['splits']['train']
print(round(int(sys.argv[2]) * split['tokens'] / split['bytes'] / int(sys.argv[3])))" "$2" "$3" "$tokens")
    shift 3
    if [ -e "$folder/done" ]; then return; fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
    mkdir -p "$folder"
    (
        OMP_NUM_THREADS=$threads "$python" train.py configs/ablation.py --out_dir="$folder" --seed="$seed" \
            --dataset="$shards" --tokens_per_step="$tokens" --batch_size=$((tokens / 256)) --max_steps="$n" \
            --warmup_steps=$((n * 222 / 5912)) "$@" >"$folder/log.txt" 2>&1 || {
            echo "error: $name, seed $seed: $(tail -n 1 "$folder/log.txt"); $folder/log.txt has it all" >&2
            exit 1
        }
        rm "$folder"/*.pt
        touch "$folder/done"
        echo "$name, seed $seed: $(tail -n 1 "$folder/log.txt")"
    ) &
}

modern=(--rope_theta=10000 --rms_norm=True --swiglu=True --qk_norm=True --bias=False)
sizes_16k=(--vocab_size=16384 --n_embd=256 --n_layer=2)  # no more parameters than the plain model
sizes_8k=(--vocab_size=8192 --n_embd=256 --n_layer=4)
fast=("${sizes_16k[@]}" "${modern[@]}" --dropout=0 --optimizer=muon --learning_rate=4e-3 --embedding_rate=2
    --momentum=0.85 --beta2=0.99 --decay=linear --min_lr=0 --weight_decay=0.1)
trap 'for job in $(jobs -rp); do pkill -P "$job"; done; wait; exit 1' INT TERM HUP  # or runs would go on without it

# The fast recipe but for one part. When its parts were weighed it had zero-initialised projections, dropped since.
less() { experiment "less/$1" ablation_16k "$bytes" "${fast[@]}" --zero_init=True "${@:2}"; }
# A change to the plain recipe without dropout.
one() { experiment "each/$1" ablation_32k "$bytes" --dropout=0 "${@:2}"; }

for seed in $seeds; do  # of the default BYTES, four evaluations
    tokens=1024 experiment fifth/plain packages_32k $((8 * bytes)) --eval_interval=458
    experiment fifth/fast packages_16k $((8 * bytes / 5)) "${fast[@]}" --eval_interval=48
done
for seed in $seeds; do
    less all_parts
    less adamw --optimizer=adamw --learning_rate=2e-3
    less learned_positions --rope_theta=None
    less layer_norm --rms_norm=False
    less gelu --swiglu=False
    less no_qk_norm --qk_norm=False
    less no_zero_init --zero_init=False
    less dropout --dropout=0.1
    less cosine --decay=cosine
    less embedding_rate_1 --embedding_rate=1
    less multi_query --n_kv_head=1
    less document_mask --document_end=16383
    less batch_ramp --ramp_doublings=2 --ramp_steps=$((n / 10 * 2)) --max_steps=$((n + n / 10 * 5 / 4))
done
for seed in $seeds; do
    experiment each/plain ablation_32k "$bytes"
    one no_dropout
    one muon --optimizer=muon
    one higher_rate --learning_rate=1.8e-3 --beta2=0.95
    one linear_to_zero --decay=linear --min_lr=0
    one batch_ramp --ramp_doublings=2 --ramp_steps=$((n / 10 * 2)) --max_steps=$((n + n / 10 * 5 / 4))
    tokens=1024 one small_batch
    one all_architecture "${modern[@]}" --zero_init=True
    one rope --rope_theta=10000
    one rms_norm --rms_norm=True
    one swiglu --swiglu=True
    one qk_norm --qk_norm=True
    one zero_init --zero_init=True
    experiment each/vocabulary_16k ablation_16k "$bytes" --dropout=0 "${sizes_16k[@]}"
    experiment each/vocabulary_8k ablation_8k "$bytes" --dropout=0 "${sizes_8k[@]}"
    one document_mask --document_end=32767
    one stable_then_linear --decay=linear --decay_share=0.4 --min_lr=0
    one multi_query --n_kv_head=1
done
while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n || true; done
for folder in "$out"/{fifth,less,each}/*/seed*; do
    if [ ! -e "$folder/done" ]; then exit 1; fi  # it has said why
done

"$python" plot.py --runs="$out/fifth/plain/*;$out/fifth/fast/*" --table=docs/ablation_fifth.md \
    --output=docs/ablation_fifth.svg
"$python" plot.py --runs="$out/less/all_parts/*;$out/less/*/*" --table=docs/ablation_less.md --output="$out/less.svg"
"$python" plot.py --runs="$out/each/no_dropout/*;$out/each/*/*" --table=docs/ablation.md --output="$out/each.svg"
