#!/usr/bin/env bash
# Install the clients of docs/clients.md beside the project's environment, and drive each: `scripts/clients.sh [NAME...]`.
# Each file of examples/clients is one, which ends in an error if an answer is not as it should be.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# A second environment over the first, which stays as it is.
"$python" -m venv "$folder/environment"
client="$folder/environment/bin/python"
base=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
packages=$("$client" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$base" "$PWD/src" > "$packages/base.pth"

start=$SECONDS
# One file of requirements for each group of clients.
for requirements in examples/clients/requirements*.txt; do
    "$client" -m pip install -q -q --disable-pip-version-check -c constraints.txt -r "$requirements"
done
echo "installed in $((SECONDS - start)) s"

names=("$@")
if [ ${#names[@]} = 0 ]; then
    for file in examples/clients/*.py; do names+=("$(basename "$file" .py)"); done
fi
for name in "${names[@]}"; do
    echo "== $name"
    start=$SECONDS
    if ! PYTHONWARNINGS=ignore "$client" "examples/clients/$name.py" 2> "$folder/errors"; then
        tail -n 40 "$folder/errors" >&2
        exit 1
    fi
    echo "   ($((SECONDS - start)) s)"
done
