#!/usr/bin/env bash
# Serve a noisy teacher from one virtual environment and train against it from another; the service ends with the training.
# $1: Python that trains, $2: Python that serves, then more arguments for training
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$root"
students_python=$1
teachers_python=$2
shift 2
loading=120 # seconds
log=$(mktemp)
server=
training=

# Both run in sessions of their own, so that Ctrl-C reaches this script alone: training ends first and may still ask.
finish() {
    status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [ -n "$training" ] && kill "$training" 2> /dev/null; then wait "$training" || true; fi
    if [ -n "$server" ] && kill "$server" 2> /dev/null; then wait "$server" || true; fi
    rm -f "$log"
    exit $status
}
give_up() {
    echo "error: $1; it said:" >&2
    cat "$log" >&2
    exit 1
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The noise is that of the section noisy-teacher: options of a section are for its own teacher, not for a remote one.
setsid "$teachers_python" -m rpd_sb3.serve --teacher scripted --env PickCube-v1 --teacher-kwargs noise:0.3 --port 0 > "$log" 2>&1 &
server=$!

# Its first line is: teacher scripted at http://127.0.0.1:<port>
is_ready() {
    url=$(sed -n 's/^teacher .* at //p' "$log")
    [ -n "$url" ] && "$students_python" - "$url/v2/health/ready" 2> /dev/null << 'END'
import sys, urllib.request

urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5).close()
END
}
deadline=$((SECONDS + loading))
until is_ready; do
    kill -0 "$server" 2> /dev/null || give_up "the teacher's service ended"
    [ $SECONDS -lt $deadline ] || give_up "the teacher's service is not ready after $loading s"
    sleep 0.2
done

echo "A teacher waits at $url (open it in a browser); a student learns from it."
setsid "$students_python" -m rpd_sb3.train --algo rpd_ppo --env PickCube-v1 --section noisy-teacher --teacher "$url" "$@" &
training=$!
wait "$training" || {
    status=$?
    training=
    kill -0 "$server" 2> /dev/null || give_up "the teacher's service ended"
    exit $status
}
training=
