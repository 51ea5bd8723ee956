#!/usr/bin/env bash
# Make the virtual environment $1 and install the library into it, with the torch that the other arguments ask pip for.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$root"
venv=$1
shift

[ -x "$venv/bin/pip" ] || "$(find_python)" -m venv "$venv"
# torch first: left to the resolver it comes with gigabytes of CUDA even where a CPU build was asked for.
"$venv/bin/python" -m pip install --quiet "$@"
"$venv/bin/python" -m pip install --quiet -c constraints.txt -e '.[maniskill,dev]'
