#!/usr/bin/env bash
# What a GPU is asked, within ten minutes and without a network: see docs/gpu_check.md. Arguments go to benchmarks/gpu_check.py.
# PYTHON is the interpreter, by default that of .venv, which is made first if it is not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
    [[ -x .venv/bin/python ]] || bash scripts/setup.sh test
    PYTHON=.venv/bin/python
fi
export HF_HUB_OFFLINE=1
exec "$PYTHON" benchmarks/gpu_check.py "$@"
