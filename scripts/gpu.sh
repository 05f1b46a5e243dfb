#!/usr/bin/env bash
# The tests that need a GPU, and the golden numbers and the tests of the pipeline with their models on it, for who works on them;
# scripts/gpu_check.sh is for who has a card. Arguments go to pytest. PYTHON is the interpreter, by default that of .venv.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
export BAGEL_TEST_DEVICE=cuda OMP_NUM_THREADS=1
exec "$python" -m pytest -n "${WORKERS:-8}" --dist worksteal -o addopts=--strict-markers -rfE --tb=short "$@" tests/gpu \
    tests/transformers_bagel/test_golden_{text,training}.py tests/diffusers_bagel/test_golden_{images,bfloat16}.py \
    tests/transformers_bagel/test_{attention,cache,generation,modeling,sequence,losses,adapters,compile}.py \
    tests/diffusers_bagel/test_{calls,pipeline,denoising,contexts,schedulers,lora,memory,compiled,after_failures}.py
