# Sourced: a second environment over that of the tests, which stays as it is. `$own` is its Python; `$folder`, in which it lies,
# goes when the script ends. PYTHON is another environment's Python.
if [[ -z ${PYTHON:-} ]]; then
    bash scripts/setup.sh test,quality
    PYTHON=.venv/bin/python
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/environment"
own="$folder/environment/bin/python"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
"$PYTHON" -c "$purelib" > "$("$own" -c "$purelib")/base.pth"
install=("$own" -m pip install -q -q --disable-pip-version-check)
