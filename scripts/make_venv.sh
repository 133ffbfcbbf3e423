#!/bin/sh
# Makes a virtual environment with the first suitable Python (3.12 or newer) it finds:
# $PYTHON, then python3.14 … python3.12 and python3 on the PATH, then pyenv's.
set -eu
venv=$1

suitable() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
    [ -z "${PYTHON:-}" ] || echo "$PYTHON"
    for name in python3.14 python3.13 python3.12 python3; do
        command -v "$name" 2>/dev/null || true
    done
    if command -v pyenv >/dev/null 2>&1; then
        ls -d "$(pyenv root)"/versions/3.1[2-9]*/bin/python3 2>/dev/null || true
    fi
}

for python in $(candidates); do
    if suitable "$python"; then
        echo "using $("$python" -V) at $python"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            echo "error: $python -m venv failed (on Debian: apt install python3-venv)" >&2
            exit 1
        fi
        "$venv/bin/python" -m pip install --quiet --upgrade pip
        exit 0
    fi
done
echo "error: no Python of version 3.12 or newer was found (JAX needs it)." >&2
echo "Looked for \$PYTHON, python3.14 to python3.12, python3 and pyenv's versions." >&2
echo "Install one and run again, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
