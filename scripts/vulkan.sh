#!/usr/bin/env bash
# Install a Vulkan driver where none works: ManiSkill needs a device even for state observations. A GPU's will do; otherwise Mesa's
# software renderer, from 23.2 on. Quick when a device is there. Without root it prints the one command to run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
needed=23.2

python=$(find_python)
probe() { "$python" "$root/rpd_sb3/doctor/vulkan.py"; }
if probe > /dev/null 2>&1; then
    exit 0
fi
may_install || give_up "a Vulkan device (Mesa >= $needed)" system \
    "Mesa's Vulkan drivers >= $needed (mesa-vulkan-drivers, vulkan-swrast, ...) and the Vulkan loader"

candidate() { apt-cache policy mesa-vulkan-drivers | sed -n 's/^ *Candidate: //p'; }
recent() { [ -n "$1" ] && [ "$1" != "(none)" ] && dpkg --compare-versions "$1" ge "$needed"; }

echo "Installing Mesa's Vulkan driver"
apt_update
release=()
if ! recent "$(candidate)"; then
    source /etc/os-release
    suite=$VERSION_CODENAME-backports
    # Backports come from the mirror that this machine already uses.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $VERSION_CODENAME" 'Component: main' \
        'Created-By: Packages' | sed -n 1p)
    if [ "$ID" != debian ] || [ -z "$mirror" ]; then
        echo "ManiSkill needs Mesa >= $needed; the sources of this machine offer $(candidate). Add one that has it." >&2
        exit 1
    fi
    if ! apt-cache policy | grep "n=$suite" > /dev/null; then
        keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        [ -f $keyring ] && signed="[signed-by=$keyring] " || signed=""
        echo "deb $signed$mirror $suite main" | "${as_root[@]}" tee "/etc/apt/sources.list.d/$suite.list" > /dev/null
        apt_update
    fi
    release=(-t "$suite")
fi
apt_install "${release[@]}" mesa-vulkan-drivers libvulkan1
probe
