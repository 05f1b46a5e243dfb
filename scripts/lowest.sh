#!/usr/bin/env bash
# Run the tests that stand on the libraries at the lower bounds of pyproject.toml, in an environment of their own, .venv-lowest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

hash=$({ pwd && python3 --version && cat pyproject.toml constraints.txt scripts/bounds.py scripts/lowest.sh; } | sha256sum)
stamp=.venv-lowest/.installed
python=.venv-lowest/bin/python
if [[ ! -f $stamp || $(<"$stamp") != "$hash" ]]; then
    echo "Installing into .venv-lowest ..."
    python3 -m venv --clear .venv-lowest
    "$python" -m pip install -q -q -c constraints.txt "$(grep '^torch==' constraints.txt)" pytest pytest-xdist
    "$python" scripts/bounds.py lowest > .venv-lowest/constraints.txt
    "$python" -m pip install -q -q -c .venv-lowest/constraints.txt -e ".[peft]"
    echo "$hash" > "$stamp"
fi
# The compiler is torch's own and takes as long as all the rest.
"$python" -m pytest -n 2 -k "not test_compiled_decode_equals_eager" \
    tests/transformers_bagel/test_{golden_text,loading,generation,processing}.py \
    tests/diffusers_bagel/test_{golden_images,pipeline}.py
