# The emulator: QEMU 10, for the second UART of `virt` and stage-2 fixes older ones lack.

qemu_wanted=10.0

qemu_version() {
    "$1" --version 2>/dev/null | sed -n '1s/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

qemu_too_old() {
    warn "QEMU ${1:-of unknown version} is older than $qemu_wanted: some machines in qemu/ may not start; $2"
}

setup_qemu() {
    local version way="install a newer one, or say where one is with TIDEMARK_QEMU=/path/to/qemu-system-aarch64"
    if [ -n "${TIDEMARK_QEMU:-}" ]; then
        version=$(qemu_version "$TIDEMARK_QEMU") ||
            die "TIDEMARK_QEMU=$TIDEMARK_QEMU does not run; it must be a qemu-system-aarch64"
        version_at_least "$version" "$qemu_wanted" || qemu_too_old "$version" "$way"
        return
    fi
    version=$(qemu_version qemu-system-aarch64) || version=
    if [ -n "$version" ] && version_at_least "$version" "$qemu_wanted"; then
        return
    fi
    if ! is_debian; then
        [ -z "$version" ] || { qemu_too_old "$version" "$way"; return; }
        die "no qemu-system-aarch64. Install QEMU $qemu_wanted or newer (Ubuntu: apt install qemu-system-arm;
  Fedora: dnf install qemu-system-aarch64; Arch: pacman -S qemu-system-aarch64; macOS: brew install qemu),
  or say where one is with TIDEMARK_QEMU=/path/to/qemu-system-aarch64"
    fi
    install_qemu
    hash -r
    version=$(qemu_version qemu-system-aarch64) ||
        die "qemu-system-arm is installed, but qemu-system-aarch64 does not run"
    version_at_least "$version" "$qemu_wanted" || qemu_too_old "$version" "$way"
    say "QEMU $version is installed"
}

# Debian's own if it is new enough, else the release's backports, read through lists of
# their own: the machine's sources stay as they are.
install_qemu() {
    local candidate
    candidate=$(apt_candidate qemu-system-arm)
    candidate=${candidate#*:}
    if [ -n "$candidate" ] && version_at_least "${candidate%%[+~-]*}" "$qemu_wanted"; then
        apt_install qemu-system-arm
        return
    fi
    need_root -t "$(. /etc/os-release && echo "$VERSION_CODENAME")-backports" qemu-system-arm
    say "installing QEMU from Debian's backports"
    make_scratch
    if private_apt "$scratch/host" "$(dpkg --print-architecture)" with &&
        logged backports_install qemu-system-arm; then
        return
    fi
    warn "no QEMU in this release's backports (see $log); taking Debian's own, which may be too old"
    apt_install qemu-system-arm
}

backports_install() {
    local suite
    suite=$(awk '$4 ~ /-backports$/ { print $4; exit }' "$scratch/host/sources.list")
    as_root env APT_CONFIG="$scratch/host/apt.conf" DEBIAN_FRONTEND=noninteractive \
        apt-get -q -y -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root \
        install --no-install-recommends -t "$suite" "$@"
}
