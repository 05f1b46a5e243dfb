#!/usr/bin/env bash
# Sets up, and shows what BAGEL does: draw, edit, see, think. BAGEL_MODEL=folder-or-Hub-id runs it on other weights.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
mkdir -p demo
export BAGEL_MODEL="${BAGEL_MODEL:-examples/shapes/checkpoint}"
bagel() {
    # With the quotes that a shell needs.
    echo "\$ python -m diffusers_bagel $(.venv/bin/python -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$@")"
    .venv/bin/python -m diffusers_bagel "$@"
}
bagel draw "a large red circle in the middle on a white background" -o demo/drawn.png
bagel edit demo/drawn.png "make the red circle green" -o demo/edited.png
bagel ask demo/edited.png "what colour is the circle?"
bagel draw "something with five points in the colour of a lemon on blue" --think -o demo/thought.png
