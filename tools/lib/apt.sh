# Debian's packages: installing some, and fetching others without touching the machine.

is_debian() {
    have apt-get && [ -r /etc/os-release ] && [ "$(. /etc/os-release && echo "${ID:-}")" = debian ]
}

# The Debian archives this machine already uses, one `URI SUITE KEYRING` a line, from both
# forms of sources file. Only those with component main and a suite of this release count.
debian_entries() {
    local codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    local files=()
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ -r "$file" ] && files+=("$file")
    done
    [ ${#files[@]} -gt 0 ] || return 0
    awk -v codename="$codename" '
        function flush(    u, s, i, j) {
            if (types ~ /(^| )deb( |$)/ && enabled != "no" && (" " components " ") ~ / main /) {
                split(uris, u, " "); split(suites, s, " ")
                for (i in u) for (j in s) entry(u[i], s[j], key)
            }
            types = uris = suites = components = key = enabled = field = ""
        }
        function entry(uri, suite, key) {
            if (suite ~ "^(" codename "|stable|oldstable|testing|unstable|sid)(-updates|-security|-backports|/updates)?$")
                print uri, suite, (key ~ /^\// ? key : "-")
        }
        FNR == 1 { flush() }
        FILENAME ~ /\.sources$/ {
            if ($0 ~ /^#/) next
            if ($0 ~ /^[ \t]*$/) { flush(); next }
            if ($0 ~ /^[ \t]/) {
                sub(/^[ \t]+/, "")
            } else {
                field = tolower($1); sub(/^[^:]*:[ \t]*/, "")
            }
            if (field == "types:") types = types " " $0
            else if (field == "uris:") uris = uris " " $0
            else if (field == "suites:") suites = suites " " $0
            else if (field == "components:") components = components " " $0
            else if (field == "signed-by:" && key == "") key = $1
            else if (field == "enabled:") enabled = tolower($1)
            next
        }
        $1 == "deb" {
            key = ""
            line = $0; sub(/^deb[ \t]+/, "", line)
            if (line ~ /^\[/) {
                options = line; sub(/\].*/, "", options); sub(/^[^]]*\][ \t]*/, "", line)
                if (match(options, /signed-by=[^ \t\]]+/)) key = substr(options, RSTART + 10, RLENGTH - 10)
            }
            n = split(line, part, /[ \t]+/)
            for (i = 3; i <= n; i++) if (part[i] == "main") entry(part[1], part[2], key)
            key = ""
        }
        END { flush() }
    ' "${files[@]}" | sort -u
}

# sources_for ARCH BACKPORTS: a sources.list for one architecture, from the entries that
# are there; BACKPORTS is `with` or `without` this release's backports.
sources_for() {
    local arch=$1 backports=$2 entries
    entries=$(debian_entries)
    if [ "$backports" = with ] && [ -n "$(. /etc/os-release && echo "${VERSION_ID:-}")" ]; then
        entries=$(printf '%s\n' "$entries" |
            awk '{ print } $2 !~ /[-\/]/ { print $1, $2 "-backports", $3 }' | sort -u)
    fi
    printf '%s\n' "$entries" | awk -v arch="$arch" '
        NF { print "deb [arch=" arch ($3 == "-" ? "" : " signed-by=" $3) "] " $1 " " $2 " main" }'
}

# private_apt DIR ARCH BACKPORTS: package lists of their own in DIR, so that neither the
# machine's sources nor its architectures change. Writes DIR/apt.conf; lists are fetched.
private_apt() {
    local dir=$1 arch=$2 backports=$3
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    sources_for "$arch" "$backports" >"$dir/sources.list"
    [ -s "$dir/sources.list" ] || return 1
    cat >"$dir/apt.conf" <<END
Dir::Etc::SourceList "$dir/sources.list";
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
    logged env APT_CONFIG="$dir/apt.conf" apt-get -q update
}

apt_candidate() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

apt_get_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends "$@"
}

apt_update() {
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# apt_install PACKAGE...: those that are not there, from the machine's own sources. The lists
# are only fetched when they do not know a package or are too old to get it.
apt_install() {
    local wanted=() package known=yes
    for package; do
        installed "$package" || wanted+=("$package")
    done
    [ ${#wanted[@]} -gt 0 ] || return 0
    need_root "${wanted[@]}"
    say "installing ${wanted[*]}"
    for package in "${wanted[@]}"; do
        [ -n "$(apt_candidate "$package")" ] || known=no
    done
    if [ "$known" = no ]; then
        must "cannot fetch Debian's package lists" apt_update
    elif logged apt_get_install "${wanted[@]}"; then
        return
    else
        must "cannot fetch Debian's package lists" apt_update
    fi
    must "cannot install ${wanted[*]}" apt_get_install "${wanted[@]}"
}
