#!/usr/bin/env bash
# Installs everything into .venv and runs the linter and the whole test suite. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m pytest -n auto --dist loadfile "$@"
