#!/usr/bin/env bash
# Install lmms-eval, VLMEvalKit and lm-evaluation-harness beside the project's environment, let each evaluate bagel-shapes, and
# compare with our own evaluation, item by item: `scripts/harnesses.sh [--items N]`. It ends in an error if an item differs.
# docs/harnesses.md shows what it prints.
set -euo pipefail
cd "$(dirname "$0")/.."

items=200
case "${1:-}" in
    --items) items=$2 ;;
    "") ;;
    *) echo "usage: scripts/harnesses.sh [--items N]" >&2; exit 2 ;;
esac
source scripts/beside.sh

start=$SECONDS
"${install[@]}" -c constraints.txt -r examples/shapes/harness_tasks/requirements.txt
# Each harness names all that any of its tasks needs, and other versions of our own libraries.
"${install[@]}" --no-deps -r examples/shapes/harness_tasks/harnesses.txt
# With its entry point, by which lmms-eval finds it.
"${install[@]}" --no-deps --no-build-isolation .
echo "installed in $((SECONDS - start)) s"

export HF_DATASETS_CACHE="$folder/cache" PYTHONWARNINGS=ignore
run() {
    local start=$SECONDS
    if ! "$own" examples/shapes/harness_tasks/run.py "$@" --items "$items" --folder "$folder/runs" > "$folder/log" 2>&1; then
        tail -n 40 "$folder/log" >&2
        exit 1
    fi
    echo "$1 in $((SECONDS - start)) s"
}
run own
run lmms_eval
run vlmevalkit
run lm_eval --tasks ask
"$own" examples/shapes/harness_tasks/table.py "$folder/runs"
