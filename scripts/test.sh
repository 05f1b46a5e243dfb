#!/usr/bin/env bash
# Run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh test,quality
.venv/bin/python -m pytest -n 2 "$@"
