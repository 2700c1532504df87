#!/usr/bin/env bash
# Measures what each part of the fast recipe is worth, with three seeds. Writes to docs/ablation/ a table and a picture
# of fast_vs_plain, the fast recipe on a fifth of the plain one's bytes, of packages whose text was not used to choose
# it; and tables of fast_without, the fast recipe with each part left out, and of plain_with, the plain recipe
# (configs/ablation.py) with each change alone, both on `local`.
#
#     bash runs/ablate.sh [OUT]    # three hours on two cores; started again, it continues where it stopped
#
# Needs matplotlib, pip and the network, for the packages (130 MB).
# Environment variables: SEEDS, BYTES of text per run, JOBS at once, PYTHON.
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

# experiment NAME SHARDS BYTES FLAGS…: train on that many bytes with $tokens (default 2,048) tokens per step, unless
# that run is done. Sets $n to the number of steps. FLAGS that use $n get that of the run before, which has as many.
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
            echo "error: $name, seed $seed: $(tail -n 1 "$folder/log.txt"); see $folder/log.txt" >&2
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
trap 'for job in $(jobs -rp); do pkill -P "$job"; done; wait; exit 1' INT TERM HUP  # end the runs too

# The fast recipe with one part changed. It had zero_init when this was measured, and has not any more.
without() { experiment "fast_without/$1" ablation_16k "$bytes" "${fast[@]}" --zero_init=True "${@:2}"; }
# The plain recipe without dropout, with one part changed.
with() { experiment "plain_with/$1" ablation_32k "$bytes" --dropout=0 "${@:2}"; }

for seed in $seeds; do  # --eval_interval gives four evaluations with the default BYTES
    tokens=1024 experiment fast_vs_plain/plain packages_32k $((8 * bytes)) --eval_interval=458
    experiment fast_vs_plain/fast packages_16k $((8 * bytes / 5)) "${fast[@]}" --eval_interval=48
done
for seed in $seeds; do
    without all_parts
    without adamw --optimizer=adamw --learning_rate=2e-3
    without learned_positions --rope_theta=None
    without layer_norm --rms_norm=False
    without gelu --swiglu=False
    without no_qk_norm --qk_norm=False
    without no_zero_init --zero_init=False
    without dropout --dropout=0.1
    without cosine --decay=cosine
    without embedding_rate_1 --embedding_rate=1
    without multi_query --n_kv_head=1
    without document_mask --document_end=16383
    without batch_ramp --ramp_doublings=2 --ramp_steps=$((n / 10 * 2)) --max_steps=$((n + n / 10 * 5 / 4))
done
for seed in $seeds; do
    experiment plain_with/plain ablation_32k "$bytes"
    with no_dropout
    with muon --optimizer=muon
    with higher_rate --learning_rate=1.8e-3 --beta2=0.95
    with linear_to_zero --decay=linear --min_lr=0
    with batch_ramp --ramp_doublings=2 --ramp_steps=$((n / 10 * 2)) --max_steps=$((n + n / 10 * 5 / 4))
    tokens=1024 with small_batch
    with all_architecture "${modern[@]}" --zero_init=True
    with rope --rope_theta=10000
    with rms_norm --rms_norm=True
    with swiglu --swiglu=True
    with qk_norm --qk_norm=True
    with zero_init --zero_init=True
    experiment plain_with/vocabulary_16k ablation_16k "$bytes" --dropout=0 "${sizes_16k[@]}"
    experiment plain_with/vocabulary_8k ablation_8k "$bytes" --dropout=0 "${sizes_8k[@]}"
    with document_mask --document_end=32767
    with stable_then_linear --decay=linear --decay_share=0.4 --min_lr=0
    with multi_query --n_kv_head=1
done
wait
for folder in "$out"/{fast_vs_plain,fast_without,plain_with}/*/seed*; do
    if [ ! -e "$folder/done" ]; then exit 1; fi  # its error is printed above
done

# report NAME BASELINE FOLDER: write its table to docs/ablation and its picture to that folder.
report() { "$python" plot.py --runs="$out/$1/$2/*;$out/$1/*/*" --table="docs/ablation/$1.md" --output="$3/$1.svg"; }
report fast_vs_plain plain docs/ablation
report fast_without all_parts "$out"
report plain_with no_dropout "$out"
