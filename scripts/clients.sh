#!/usr/bin/env bash
# Install the clients of docs/clients.md beside the project's environment, and drive each: `scripts/clients.sh [NAME...]`.
# Each file of examples/clients is one, which ends in an error if an answer is not as it should be.
set -euo pipefail
cd "$(dirname "$0")/.."

for name in "$@"; do
    # Before minutes of installing.
    [[ -f examples/clients/$name.py ]] || { echo "scripts/clients.sh: there is no examples/clients/$name.py." >&2; exit 2; }
done
source scripts/beside.sh
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

start=$SECONDS
# One file of requirements for each group of clients.
for requirements in examples/clients/requirements*.txt; do
    "${install[@]}" -c constraints.txt -r "$requirements"
done
echo "installed in $((SECONDS - start)) s"

names=("$@")
if [ ${#names[@]} = 0 ]; then
    for file in examples/clients/*.py; do names+=("$(basename "$file" .py)"); done
fi
for name in "${names[@]}"; do
    echo "== $name"
    start=$SECONDS
    if ! PYTHONWARNINGS=ignore "$own" "examples/clients/$name.py" 2> "$folder/errors"; then
        tail -n 40 "$folder/errors" >&2
        exit 1
    fi
    echo "   ($((SECONDS - start)) s)"
done
