# What every script here starts from: where things are, how to speak, how to fail.
# Sourced by bash, with $0 the script in tools/.

set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# All that is built or unpacked for this tree; the tests know it by the same variable.
target=${TIDEMARK_TARGET:-$root/target}
# What was downloaded or takes long to make, shared by all clones.
cache=${XDG_CACHE_HOME:-${HOME:-$target}/.cache}/tidemark
log=$target/setup.log
triple=aarch64-unknown-none-softfloat

say() { printf 'setup: %s\n' "$*"; }
warn() { printf 'setup: warning: %s\n' "$*" >&2; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command with its output in the log; returns its status.
logged() {
    mkdir -p "$target"
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null
}

# The same, and the end of the log and a message if it fails.
must() {
    local message=$1 mark
    shift
    mkdir -p "$target"
    mark=$(cat -- "$log" 2>/dev/null | wc -l) || mark=0
    logged "$@" && return
    tail -n "+$((mark + 1))" "$log" | tail -n 25 >&2
    die "$message (whole output: $log)"
}

# Runs a command as root, through sudo if need be.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo; then
        # The password prompt must be seen; without a terminal there is nobody to ask.
        if [ -t 1 ] && [ -r /dev/tty ]; then
            sudo -v </dev/tty
        fi
        sudo -n "$@"
    else
        echo "needs root, and there is no sudo: run as root: $*" >&2
        return 1
    fi
}

# version_at_least HAVE WANT: dotted numbers.
version_at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# A scratch directory that goes away with the script.
scratch=
make_scratch() {
    [ -n "$scratch" ] && return
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
}
