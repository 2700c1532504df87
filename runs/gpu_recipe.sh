#!/usr/bin/env bash
# On a GPU, in about ten minutes: trains the plain 70M recipe and the fast one on all the Python on this machine, and
# the fast one also on a fifth of it. Writes curves, a table, and the fast model's samples and HumanEval to one folder.
#
#     bash runs/gpu_recipe.sh [OUT]    # started again, it continues where it stopped
#
# Environment variables: PYTHON; PLAIN_TOKENIZER (cl100k_base; without a network use train:32768, which makes the plain
# model smaller); HUMANEVAL, a file of its problems if there is no network.
set -euo pipefail
cd "$(dirname "$0")/.."

out="${1:-out/gpu_recipe}"
python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
mkdir -p "$out"

data=(configs/data/local.py --package_bytes=None --val_fraction=0.02)
"$python" prepare.py "${data[@]}" --name=gpu_plain --tokenizer="${PLAIN_TOKENIZER:-cl100k_base}"
"$python" prepare.py "${data[@]}" --name=gpu_fast --tokenizer=train:16384

# run NAME CONFIG SHARDS SHARE FLAGS…: train on that share of the shards' tokens, for one epoch.
run() {
    local settings
    settings=$("$python" - "$3" "$4" "$2" <<'PY'
import json, sys
from fractions import Fraction
from runtime.config import load_config
from train import TrainConfig

meta = json.load(open(f"data/shards/{sys.argv[1]}/meta.json"))
config = load_config(TrainConfig, [sys.argv[3]])
tokens = meta["splits"]["train"]["tokens"] * Fraction(sys.argv[2])
step = min(config.tokens_per_step, 2**17)  # at most this, for a few hundred steps
steps = max(20, int(tokens / step))
vocabulary = -(-meta["vocab_size"] // 128) * 128
warmup = max(1, steps * config.warmup_steps // config.max_steps)
print(f"--vocab_size={vocabulary} --tokens_per_step={step} --max_steps={steps} --warmup_steps={warmup}",
      f"--eval_interval={max(1, steps // 8)}")
PY
    )
    # shellcheck disable=SC2086 # the settings are several words
    "$python" train.py "$2" --dataset="$3" --out_dir="$out/$1" --sample_interval=None --checkpoint_minutes=2 \
        --eval_tokens=1_000_000 $settings "${@:5}"
    "$python" plot.py --runs="$out/plain;$out/fast_fifth;$out/fast" --table="$out/table.md" \
        --output="$out/curves.svg" || true  # without matplotlib, only the table
}

run plain configs/70m.py gpu_plain 1
run fast_fifth configs/70m_fast.py gpu_fast 1/5
run fast configs/70m_fast.py gpu_fast 1

for prompt in 'def fibonacci(n):' 'class Stack:' 'import argparse'; do
    "$python" sample.py --out_dir="$out/fast" --prompt="$prompt" --max_new_tokens=128 --temperature=0.6
done | tee "$out/samples.txt"
"$python" eval_humaneval.py --out_dir="$out/fast" --n_samples=1 --temperature=0.2 --allow_code_execution=True \
    ${HUMANEVAL:+--problems="$HUMANEVAL"} | tee "$out/humaneval.txt"
