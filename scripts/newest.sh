#!/usr/bin/env bash
# Run the golden tests on the newest release of every library, whatever pyproject.toml allows, and say which bound can be
# raised; fails if a test does. torch stays at its pin, because on Linux the newest is a CUDA build of several gigabytes:
#
#     TORCH=2.14.1 bash scripts/newest.sh
#
# takes another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python=$venv/bin/python
torch=$([[ -n ${TORCH:-} ]] && echo "torch==$TORCH" || grep '^torch==' constraints.txt)

install() {
    "$python" -m pip install -q -q "$@"
}

golden() {
    local passed=0
    COLUMNS=200 "$python" -m pytest -n 2 -o addopts= -rA --tb=no tests/transformers_bagel/test_golden_{text,training}.py \
        tests/diffusers_bagel/test_golden_images.py > "$venv/log" 2>&1 || passed=1
    grep -E '^(PASSED|FAILED|ERROR) |^=.* in [0-9]' "$venv/log" || tail -n 20 "$venv/log"
    return $passed
}

python3 -m venv "$venv"
install "$torch" pytest pytest-xdist
mapfile -t names < <("$python" scripts/bounds.py names)
install --upgrade "$torch" "${names[@]}"
install --no-deps -e .
mapfile -t beyond < <("$python" scripts/bounds.py beyond)

echo "== The newest of everything; beyond our bounds: ${beyond[*]:-nothing}"
if golden; then
    for library in "${beyond[@]}"; do
        [[ -z $library ]] || echo "The bound of $library can be raised."
    done
    exit 0
fi
echo "== The newest within our bounds"
install --upgrade "$torch" -e ".[peft]"
golden || echo "The bounds let something in that breaks."
for library in "${beyond[@]}"; do
    [[ -n $library ]] || continue
    echo "== $library, all others within our bounds"
    install "$library"
    golden && echo "The bound of $library can be raised." || echo "The bound of $library must stay."
    install "$torch" -e ".[peft]"
done
exit 1
