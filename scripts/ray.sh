#!/usr/bin/env bash
# Install Ray beside the project's environment, and run the tests on it, or a script: `scripts/ray.sh [SCRIPT ARGUMENTS...]`.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/beside.sh
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
"${install[@]}" -c constraints.txt "ray[serve,data]>=2.60"

# What a cluster writes goes with the rest; without it a worker would run behind everything else on the machine.
export RAY_TMPDIR="$folder" RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# = 0 ]; then
    "$own" -m pytest tests/ray
else
    "$own" "$@"
fi
