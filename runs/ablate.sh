#!/usr/bin/env bash
# What each change to the plain recipe gains. Three seeds each of configs/ablation.py, of that with one change, and of the
# fast recipe, on as many bytes of `local`, scored on the same held-out bytes; then the fast one on a fifth of them.
# Writes docs/ablation.md, docs/ablation_fifth.md and a picture of each. Needs matplotlib.
#
#     bash runs/ablate.sh [OUT]    # two hours on two cores; what is done is kept, so it can be cut short
#
# SEEDS, BYTES of text a run sees, JOBS at once and PYTHON are environment variables.
set -euo pipefail
cd "$(dirname "$0")/.."

out="${1:-out/ablation}"
bytes="${BYTES:-1500000}"
jobs="${JOBS:-$(nproc)}"
seeds="${SEEDS:-1 2 3}"
python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
threads=$(( $(nproc) > jobs ? $(nproc) / jobs : 1 ))

for size in 8:8192 16:16384 32:32768; do
    "$python" -m data.prepare configs/data/ablation.py --name="ablation_${size%:*}k" --tokenizer="train:${size#*:}"
done

# Steps of $3 tokens that hold $2 bytes of the shards $1.
steps() {
    "$python" -c "import json, sys
split = json.load(open(f'data/shards/{sys.argv[1]}/meta.json'))['splits']['train']
print(round(int(sys.argv[2]) * split['tokens'] / split['bytes'] / int(sys.argv[3])))" "$@"
}

# experiment NAME SHARDS BYTES TOKENS_A_STEP FLAGS…: train, unless that is done. $n is the number of steps.
experiment() {
    local folder=$out/$1/seed$seed
    n=$(steps "$2" "$3" "$4")
    if [ -e "$folder/done" ]; then return; fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
    mkdir -p "$folder"
    (
        OMP_NUM_THREADS=$threads "$python" train.py configs/ablation.py --out_dir="$folder" --seed="$seed" \
            --dataset="$2" --tokens_per_step="$4" --max_steps="$n" --warmup_steps=$((n * 222 / 5912)) \
            --eval_interval=$(((n + 3) / 4)) "${@:5}" >"$folder/log.txt" 2>&1 &&
            rm "$folder"/*.pt && touch "$folder/done"
        echo "$1, seed $seed: $(tail -n 1 "$folder/log.txt")"
    ) &
}

modern=(--rope_theta=10000 --rms_norm=True --swiglu=True --qk_norm=True --bias=False --zero_init=True)
sizes_16k=(--vocab_size=16384 --n_embd=192 --n_layer=6 --n_head=6)  # as many parameters as the plain model
sizes_8k=(--vocab_size=8192 --n_embd=256 --n_layer=4 --n_head=4)  # and these fewer
fast=("${sizes_8k[@]}" "${modern[@]}" --dropout=0 --optimizer=muon --learning_rate=4e-3 --embedding_rate=2
    --momentum=0.9 --beta2=0.99 --decay=linear --min_lr=0 --weight_decay=0.1 --batch_size=8)

for seed in $seeds; do
    one() { experiment "$1" ablation_32k "$bytes" 1024 --dropout=0 "${@:2}"; }
    experiment plain ablation_32k "$bytes" 1024
    one no_dropout
    one muon --optimizer=muon
    one higher_rate --learning_rate=1.8e-3 --beta2=0.95
    one linear_to_zero --decay=linear --min_lr=0
    one stable_then_linear --decay=linear --decay_share=0.4 --min_lr=0
    one batch_ramp --ramp_doublings=2 --ramp_steps=$((n / 10 * 2)) --max_steps=$((n + n / 10 * 5 / 4))
    one rope --rope_theta=10000
    one rms_norm --rms_norm=True
    one swiglu --swiglu=True
    one qk_norm --qk_norm=True
    one zero_init --zero_init=True
    one multi_query --n_kv_head=1
    one document_mask --document_end=32767
    one all_architecture "${modern[@]}"
    experiment vocabulary_16k ablation_16k "$bytes" 1024 --dropout=0 "${sizes_16k[@]}"
    experiment vocabulary_8k ablation_8k "$bytes" 1024 --dropout=0 "${sizes_8k[@]}"
    experiment fast ablation_8k "$bytes" 2048 "${fast[@]}"
done
for seed in $seeds; do
    experiment plain_long ablation_32k $((bytes * 8 / 3)) 1024
    experiment fast_fifth ablation_8k $((bytes * 8 / 15)) 2048 "${fast[@]}"
done
wait

"$python" plot.py --runs="$out/plain/*;$out/no_dropout/*;$out/[!fpn]*/*;$out/fast/*" --baseline=no_dropout \
    --table=docs/ablation.md --output=docs/ablation.svg
"$python" plot.py --runs="$out/plain_long/*;$out/fast_fifth/*" --table=docs/ablation_fifth.md \
    --output=docs/ablation_fifth.svg
