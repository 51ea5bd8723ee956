#!/usr/bin/env bash
# Distil a teacher into a student that sees one camera, export it, and evaluate what was exported.
# $1: Python, then more arguments for training
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$root"
python=$1
shift

log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$python" -m rpd_sb3.train --algo rpd_ppo --env PickCube-v1 --obs rgb --progress "$@" | tee "$log"
run=$(tail -n 1 "$log")
expert=$run/expert
"$python" -m rpd_sb3.export --run "$run" -o "$expert" --overwrite
"$python" -m rpd_sb3.evaluate --export "$expert"
echo "$expert"
