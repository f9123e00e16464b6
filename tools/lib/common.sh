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

me=${0##*/}
say() { printf '%s: %s\n' "$me" "$*"; }
warn() { printf '%s: warning: %s\n' "$me" "$*" >&2; }
die() {
    printf '%s: %s\n' "$me" "$*" >&2
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

# need_root WAY PACKAGE...: checks, before anything is tried, that packages can be installed; WAY is the
# command that root can give instead.
need_root() {
    local way="run as root: $1"
    shift
    [ "$(id -u)" = 0 ] && return
    # Root may be the next to write the log, and would own a new one.
    mkdir -p "$target" && : >>"$log"
    have sudo || die "there is no sudo; $way"
    # The password prompt must be seen; without a terminal there is nobody to ask.
    if [ -t 1 ] && [ -r /dev/tty ]; then
        say "sudo, to install $*"
        sudo -v </dev/tty || die "no root; $way"
    else
        sudo -n true 2>/dev/null || die "sudo asks for a password, and there is no terminal; $way"
    fi
}

# Runs a command as root; need_root has been called.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
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
