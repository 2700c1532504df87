#!/usr/bin/env bash
# From a fresh clone to code written by your own model, on two CPU cores in a few minutes: installs into .venv, prepares
# the Python on this machine, trains configs/tiny.py on it, samples. Run again, it continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet -r requirements.txt -c constraints.txt
.venv/bin/python prepare.py configs/data/local.py
.venv/bin/python train.py configs/tiny.py
.venv/bin/python sample.py --out_dir=out/tiny --prompt="def __init__(self, name):"
