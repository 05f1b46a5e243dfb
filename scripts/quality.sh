#!/usr/bin/env bash
# Lint, formatting and types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh test,quality
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
