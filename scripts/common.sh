# Sourced by the other scripts: which Python, and how to install a system package.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The first supported interpreter: $PYTHON if set, else what is on the path.
find_python() {
    local name
    for name in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if command -v "$name" > /dev/null &&
            "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; then
            command -v "$name"
            return
        fi
    done
    echo "rpd_sb3 needs Python 3.10, 3.11 or 3.12 (ManiSkill has no wheels for others); ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2> /dev/null || echo missing)." \
        "Install one and name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

# Sets as_root to the prefix that a command needs to run as root without a question; fails where there is none.
may_install() {
    command -v apt-get > /dev/null || return 1
    if [ "$(id -u)" = 0 ]; then
        as_root=()
    elif sudo -n true 2> /dev/null; then
        as_root=(sudo -n)
    else
        return 1
    fi
}

apt_update() {
    "${as_root[@]}" apt-get update -qq
}

apt_install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get install -y -qq --no-install-recommends "$@" > /dev/null
}

# Says what is missing and the one command that installs it.
# $1: what, $2: make target, $3: what to do on a system without apt
give_up() {
    if command -v apt-get > /dev/null; then
        echo "This machine lacks $1. Run once:  sudo make -C $root $2${PYTHON:+ PYTHON=$PYTHON}" >&2
    else
        echo "This machine lacks $1. Install: $3" >&2
    fi
    exit 1
}
