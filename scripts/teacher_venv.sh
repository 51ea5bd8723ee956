#!/usr/bin/env bash
# Make the virtual environment $1 with what a teacher's service needs and nothing of the students' side: no torch.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$root"
python=$1/bin/python

[ -x "$1/bin/pip" ] || "$(find_python)" -m venv "$1"
# By name: pip has no "only the packages of this extra". --no-deps comes last, because pip complains of what is missing
# whenever it installs something with dependencies afterwards.
packages=$("$python" - << 'END'
import configparser

setup = configparser.RawConfigParser()
setup.read("setup.cfg")
print(setup["options.extras_require"]["teacher-server"])
END
)
"$python" -m pip install --quiet -c constraints.txt $packages
"$python" -m pip install --quiet --no-deps -e .
