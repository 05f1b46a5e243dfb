#!/usr/bin/env bash
# Try 10,000 broken files, configurations, adapters, images, messages and arguments, or as many as the first argument says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh test,quality
cases=${1:-10000}
half=$((cases / 2))
export OMP_NUM_THREADS=1 PYTHONPATH=.:src:conversion
.venv/bin/python -m tests.fuzz.run --seed 1000 --cases "$half" &
.venv/bin/python -m tests.fuzz.run --seed $((1000 + half)) --cases $((cases - half)) && second=0 || second=$?
wait $! && exit "$second"
