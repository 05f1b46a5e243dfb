#!/usr/bin/env bash
# Make .venv with the package, what EXTRAS (such as "test,quality") need, and the tested versions; or leave it alone if it is up
# to date: setup.sh [EXTRAS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The path is part of the hash since an editable install points to the directory it was made from.
hash=$({ pwd && python3 --version && cat pyproject.toml constraints.txt scripts/setup.sh; } | sha256sum)
extras=${1:-}
stamp=.venv/.installed-${extras//,/-}
if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
    exit 0
fi

echo "Installing into .venv ..."
[[ -x .venv/bin/python ]] || python3 -m venv .venv
# Other stamps tell of versions that are now replaced.
for other in .venv/.installed-*; do
    [[ ! -f $other || $(<"$other") == "$hash" ]] || rm "$other"
done
# Twice quiet: errors only, without a warning for each index that lacks a package.
pip=(.venv/bin/python -m pip install -q -q -c constraints.txt)
# Exact, as a range would fetch gigabytes of CUDA build although a CPU wheel may be on disk.
"${pip[@]}" "$(grep '^torch==' constraints.txt)"
"${pip[@]}" -e ".${extras:+[$extras]}"
echo "$hash" > "$stamp"
