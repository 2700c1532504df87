#!/usr/bin/env bash
# Tests and measures what needs a GPU, in about ten minutes, without data: runs tests/test_gpu.py, times
# configs/70m.py (beside nanoGPT if .peers/nanoGPT is there), and profiles a training step. Writes to one folder and
# installs nothing: bash runs/gpu_report.sh [FOLDER]. PYTHON names an interpreter other than .venv's or python3.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="${1:-out/gpu_report}"
python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
mkdir -p "$folder"
: >"$folder/report.txt"
failed=0

step() {  # run a command and append its output to the report; the script goes on after a failure and ends with an error
    echo "== $*" | tee -a "$folder/report.txt"
    "$@" 2>&1 | tee -a "$folder/report.txt" || failed=1
}

peer=()
if [ -f .peers/nanoGPT/model.py ]; then peer=(--peer=.peers/nanoGPT); fi
hf=()
if "$python" -c "import transformers" 2>/dev/null; then hf=(--hf); fi

if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "error: $python has no torch that sees a CUDA device; name another interpreter with PYTHON=" >&2
    exit 2
fi
step "$python" -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())"
step timeout 200 "$python" -m pytest -q -rs -p no:cacheprovider tests/test_gpu.py
step timeout 200 "$python" bench.py configs/70m.py --parts=train,eval,loader --rounds=4 --profile \
    "${peer[@]}" --output="$folder/70m.json"
step timeout 90 "$python" bench.py configs/70m.py --parts=train --batch_size=32 --rounds=3 --output="$folder/70m_32.json"
step timeout 90 "$python" bench.py configs/70m.py --parts=decode --decode_rounds=2 \
    "${peer[@]}" "${hf[@]}" --output="$folder/70m_decode.json"
step timeout 50 "$python" bench.py configs/70m.py --parts=decode --decode_rounds=2 --decode_dtype=bfloat16 \
    --output="$folder/70m_decode_bf16.json"
if [ "$failed" = 1 ]; then
    echo "error: a step failed; $folder/report.txt has its output" >&2
    exit 1
fi
echo "the report is in $folder"
