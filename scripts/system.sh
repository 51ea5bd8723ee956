#!/usr/bin/env bash
# Install what pip cannot: venv, the shared libraries of OpenCV and SAPIEN, a Vulkan driver. Quick when all is there.
set -euo pipefail
source "$(dirname "$0")/common.sh"

missing=()
if ! command -v "${PYTHON:-python3}" > /dev/null && [ -z "${PYTHON:-}" ]; then
    missing+=(python3 python3-venv)
else
    python=$(find_python)
    "$python" -c 'import ensurepip' 2> /dev/null ||
        missing+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
fi

# Without a Python to ask, every library counts as missing; apt leaves those that are there alone.
has() {
    [ -n "${python:-}" ] && "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2> /dev/null
}
has libGL.so.1 || missing+=(libgl1)
has libgthread-2.0.so.0 || missing+=(libglib2.0-0)

if [ ${#missing[@]} -gt 0 ]; then
    may_install || give_up "${missing[*]}" system "${missing[*]} (Debian's names), then run make again"
    echo "Installing ${missing[*]}"
    apt_update
    apt_install "${missing[@]}"
fi
exec "$root/scripts/vulkan.sh"
