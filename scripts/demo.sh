#!/usr/bin/env bash
# Sets up, and shows the three things that BAGEL does. BAGEL_MODEL=folder-or-Hub-id runs it on other weights.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
mkdir -p demo
if [ -z "${BAGEL_MODEL:-}" ]; then
    export BAGEL_MODEL=demo/model
    .venv/bin/python examples/tiny_checkpoint.py "$BAGEL_MODEL"
fi
bagel() {
    echo "\$ python -m diffusers_bagel $*"
    .venv/bin/python -m diffusers_bagel "$@"
}
bagel draw "a red circle on a white background" -o demo/drawn.png
bagel edit demo/drawn.png "make the circle green" -o demo/edited.png
bagel ask tests/golden/a/inputs/wide.png "how many shapes are there in the picture?" --max-new-tokens 30
