#!/usr/bin/env bash
# Run the tests; arguments go to pytest: `scripts/test.sh -m "not slow"` is a quick look, without trainings of many seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh test,quality
# Each worker takes files in a row, whose fixtures it makes once, and at the end what the other has left.
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
