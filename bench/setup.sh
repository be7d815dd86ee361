#!/usr/bin/env bash
# Makes bench/.venv with PyTorch 2.11.0, the peer that takuma is measured against.
# Safe to call again: does nothing when the folder already holds the wanted versions.
# The x86_64 wheel of PyPI is the CUDA build: about 3 GB of downloads, used here on the CPU only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
wanted='torch==2.11.0 numpy==2.3.5 safetensors==0.7.0 pillow==12.0.0 packaging==25.0'
stamp="$venv/.takuma-versions"
python=${PYTHON:-python3}

if ! command -v "$python" >/dev/null; then
    echo "error: $python is missing; install it with: sudo apt-get install python3 python3-venv" >&2
    exit 1
fi
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c 'import sys' 2>/dev/null; then
    exit 0
fi
if ! "$python" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 14)))'; then
    echo "error: PyTorch 2.11.0 needs Python 3.11 to 3.14, $python is $("$python" -V); set PYTHON=/path/to/python3" >&2
    exit 1
fi
free_kb=$(df --output=avail -k . | tail -n 1)
if ((free_kb < 12 * 1024 * 1024)); then
    echo "error: PyTorch needs 12 GB free in $PWD, $((free_kb / 1024)) MB are free; free some space" >&2
    exit 1
fi
if ! "$python" -m venv "$venv"; then
    echo "error: cannot make a virtual environment; install it with: sudo apt-get install python3-venv" >&2
    exit 1
fi
echo "installing $wanted into bench/$venv (about 3 GB, once)" >&2
# Word splitting is wanted: one requirement a word.
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check $wanted
printf '%s' "$wanted" >"$stamp"
