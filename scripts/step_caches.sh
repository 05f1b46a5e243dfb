#!/usr/bin/env bash
# Install cache-dit beside the project's environment, drive it, and measure all step caches: `scripts/step_caches.sh [--num 50]`.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/beside.sh
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore CACHE_DIT_LOG_LEVEL=error

"${install[@]}" -c constraints.txt "$(grep cache-dit examples/clients/requirements_diffusers.txt)"
"$own" examples/clients/step_cache.py
"$own" benchmarks/step_caches.py "$@"
