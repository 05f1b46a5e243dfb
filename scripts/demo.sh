#!/usr/bin/env bash
# Sets up, and shows what BAGEL does: draw, edit, see, think. BAGEL_MODEL=folder-or-Hub-id runs it on other weights.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
mkdir -p pictures
export BAGEL_MODEL="${BAGEL_MODEL:-examples/shapes/checkpoint}"
bagel() {
    # With the quotes that a shell needs.
    echo "\$ python -m diffusers_bagel $(.venv/bin/python -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$@")"
    .venv/bin/python -m diffusers_bagel "$@"
}
bagel draw "a large red circle in the middle on a white background" -o pictures/drawn.png
bagel edit pictures/drawn.png "make the red circle green" -o pictures/edited.png
bagel ask pictures/edited.png "what colour is the circle?"
bagel draw "something with five points in the colour of a lemon on blue" --think -o pictures/thought.png
