# Debian's packages: installing some, and fetching others without touching the machine.

# Where this machine says what it is and where its packages come from; the tests say other places.
os_release=/etc/os-release
apt_etc=/etc/apt

# os FIELD: what os-release(5) says.
os() (. "$os_release" 2>/dev/null && printf '%s' "${!1:-}")

is_debian() {
    have apt-get && [ "$(os ID)" = debian ]
}

# Testing and unstable have no number yet, and no backports.
is_released() { [ -n "$(os VERSION_ID)" ]; }

# debian_sources_for ARCH: those of the machine's sources that are Debian archives of this
# release, and its backports, as deb822 stanzas for one architecture.
debian_sources_for() {
    local file files=() released=
    ! is_released || released=1
    for file in "$apt_etc"/sources.list "$apt_etc"/sources.list.d/*.list "$apt_etc"/sources.list.d/*.sources; do
        [ -r "$file" ] && files+=("$file")
    done
    [ ${#files[@]} -gt 0 ] || return 0
    awk -v codename="$(os VERSION_CODENAME)" -v arch="$1" -v released="$released" \
        -f "$root/tools/lib/sources.awk" "${files[@]}"
}

# private_apt DIR ARCH: package lists of their own in DIR, so that neither the machine's
# sources nor its architectures change. Writes DIR/apt.conf; lists are fetched. One archive
# that does not answer, or has no backports, does not make the others useless: what is to
# be had is seen when a package is asked for.
private_apt() {
    local dir=$1 arch=$2
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    debian_sources_for "$arch" >"$dir/debian.sources"
    if ! [ -s "$dir/debian.sources" ]; then
        warn "no Debian archive of this release, with component main, in $apt_etc/sources.list or $apt_etc/sources.list.d"
        return 1
    fi
    cat >"$dir/apt.conf" <<END
Dir::Etc::SourceList "$dir/debian.sources";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$dir/lists";
Dir::Cache "$dir/cache";
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
END
    if [ "$arch" != "$(dpkg --print-architecture)" ]; then
        # Nothing of the kind is installed here, so the installed packages do not count.
        : >"$dir/status"
        cat >>"$dir/apt.conf" <<END
Dir::State::Status "$dir/status";
APT::Architecture "$arch";
#clear APT::Architectures;
APT::Architectures { "$arch"; };
END
    fi
    logged env APT_CONFIG="$dir/apt.conf" apt-get -q update ||
        warn "not all of Debian's package lists for $arch could be fetched (see $log)"
}

apt_candidate() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# apt_versions PACKAGE: all that the lists have, the newest first.
apt_versions() {
    LC_ALL=C apt-cache madison "$1" 2>/dev/null | awk '{ print $3 }' | uniq
}

# Never at the cost of a package that is there; apt_removals says beforehand which that would be.
apt_get_install() {
    as_root env ${APT_CONFIG:+APT_CONFIG="$APT_CONFIG"} DEBIAN_FRONTEND=noninteractive \
        apt-get -q -y -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root \
        install --no-install-recommends --no-remove "$@"
}

# apt_removals ARGUMENT...: what installing would remove, and nothing if apt cannot install it at all.
apt_removals() {
    LC_ALL=C apt-get -q -s install --no-install-recommends "$@" 2>/dev/null |
        awk '$1 == "Remv" { print $2 }' | sort -u | paste -sd' ' || :
}

apt_update() {
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# apt_install PACKAGE...: those that are not there, from the machine's own sources.
apt_install() {
    local wanted=() package
    for package; do
        installed "$package" || wanted+=("$package")
    done
    [ ${#wanted[@]} = 0 ] || apt_upgrade "${wanted[@]}"
}

# apt_upgrade PACKAGE...: what the machine's own sources have of them, be an older one installed or none. The
# lists are only fetched when they do not know a package or are too old to get it.
apt_upgrade() {
    local package known=yes
    need_root "apt-get install $*" "$@"
    say "installing $*"
    for package; do
        [ -n "$(apt_candidate "$package")" ] || known=no
    done
    if [ "$known" = no ]; then
        must "cannot fetch Debian's package lists" apt_update
    elif must_keep "$@" && logged apt_get_install "$@"; then
        return
    else
        must "cannot fetch Debian's package lists" apt_update
    fi
    must_keep "$@"
    must "cannot install $*" apt_get_install "$@"
}

# must_keep PACKAGE...: stops before an installation that would remove others.
must_keep() {
    local removals
    removals=$(apt_removals "$@")
    [ -z "$removals" ] || die "installing $* would remove $removals, so nothing was changed. If you can do without: apt-get install $*"
}
