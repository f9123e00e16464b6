# The emulator: QEMU 10, for the second UART of `virt` and stage-2 fixes older ones lack.

qemu_wanted=10.0
qemu_way="Install QEMU $qemu_wanted or newer, or name one: TIDEMARK_QEMU=/path/to/qemu-system-aarch64
  (an older one too, if you ask for it so: tests that need a newer one then fail and say why)"

qemu_version() {
    "$1" --version 2>/dev/null | sed -n '1s/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

# qemu_is_there PROGRAM: whether it is new enough; sets $version, to nothing if it does not run.
qemu_is_there() {
    version=$(qemu_version "$1") || version=
    [ -n "$version" ] && version_at_least "$version" "$qemu_wanted"
}

setup_qemu() {
    local version there
    if [ -n "${TIDEMARK_QEMU:-}" ]; then
        qemu_is_there "$TIDEMARK_QEMU" && return
        [ -n "$version" ] || die "TIDEMARK_QEMU=$TIDEMARK_QEMU does not run; it must be a qemu-system-aarch64"
        # Who names one has asked for it.
        warn "TIDEMARK_QEMU=$TIDEMARK_QEMU is QEMU $version, older than $qemu_wanted; tests that need a newer one fail"
        return
    fi
    qemu_is_there qemu-system-aarch64 && return
    if is_debian; then
        install_qemu
        hash -r
        qemu_is_there qemu-system-aarch64 && { say "QEMU $version is installed"; return; }
    fi
    if there=$(command -v qemu-system-aarch64); then
        die "$there is QEMU ${version:-of no known version}, and it must be $qemu_wanted or newer.
  $qemu_way"
    fi
    die "there is no qemu-system-aarch64 (Ubuntu: apt install qemu-system-arm;
  Fedora: dnf install qemu-system-aarch64; Arch: pacman -S qemu-system-aarch64; macOS: brew install qemu).
  $qemu_way"
}

# The machine's own sources if what they would install is new enough, else the release's backports, read through
# lists of their own: the machine's sources stay as they are. An older one that is installed is upgraded.
install_qemu() {
    local candidate suite version removals refusals=
    candidate=$(apt_candidate qemu-system-arm)
    if ! new_enough_qemu "$candidate" && ! is_released; then
        # Without backports it is in the machine's sources or nowhere, and the lists may be old.
        need_root "apt-get update && apt-get install qemu-system-arm" qemu-system-arm
        must "cannot fetch Debian's package lists" apt_update
        candidate=$(apt_candidate qemu-system-arm)
        new_enough_qemu "$candidate" || return 0
    fi
    if new_enough_qemu "$candidate"; then
        apt_upgrade qemu-system-arm
        return
    fi
    suite=$(os VERSION_CODENAME)-backports
    # No apt-get command does it where the machine's lists have no backports.
    need_root "tools/setup qemu" qemu-system-arm
    say "installing QEMU from Debian's backports"
    make_scratch
    private_apt "$scratch/host" "$(dpkg --print-architecture)" || die "no QEMU $qemu_wanted to install.
  $qemu_way"
    local -x APT_CONFIG=$scratch/host/apt.conf
    # The newest first, and an older one if only that fits what is installed.
    for version in $(apt_versions qemu-system-arm); do
        new_enough_qemu "$version" || continue
        removals=$(apt_removals -t "$suite" "qemu-system-arm=$version")
        if [ -n "$removals" ]; then
            refusals+="
  $version would remove $removals"
        elif logged apt_get_install -t "$suite" "qemu-system-arm=$version"; then
            return
        else
            refusals+="
  $version cannot be installed (see $log)"
        fi
    done
    die "Debian has no QEMU $qemu_wanted or newer that can be installed here${refusals:-; its lists know none}
  Nothing was changed. $qemu_way"
}

# new_enough_qemu DEBIAN-VERSION
new_enough_qemu() {
    local upstream=${1#*:}
    [ -n "$upstream" ] && version_at_least "${upstream%%[+~-]*}" "$qemu_wanted"
}
