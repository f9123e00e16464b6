# Which of the machine's apt sources are Debian archives of its release, as deb822 stanzas for one
# architecture; the release's backports beside each where `released` is set.
#
#   awk -v codename=bookworm -v arch=arm64 -v released=1 -f sources.awk FILE...
#
# Once released, all of them are of that one release, since what is installed from lists of several could be
# of any, the C library too: other releases stay out, and the aliases are written as the codename (`stable`
# moves on and the machine may not have; Debian's archives have both). Before that nothing is installed from
# these lists, and testing and sid, which go by the same codename, keep the names they have.
#
# Both forms are read: FILE.sources is deb822, anything else has one entry a line (sources.list(5)).
# What an entry says of keys and trust is kept as it stands, since a key may be a path, a fingerprint or a
# block of its own; what it says of architectures and languages is not. Written as deb822 because only that
# form can hold a key block.

function reset() {
    split("", value)
    field = kept = ""
}

# The end of a stanza: each URI with each suite is an entry.
function flush(    u, s, i, j, uris, suites) {
    if (has(value["types"], "deb") && has(value["components"], "main") &&
        tolower(value["enabled"]) !~ /^ *(no|false|without|off|disable|0) *$/) {
        u = split(value["uris"], uris)
        s = split(value["suites"], suites)
        for (i = 1; i <= u; i++)
            for (j = 1; j <= s; j++)
                entry(uris[i], suites[j], kept)
    }
    reset()
}

function has(list, word) { return index(" " list " ", " " word " ") }

function entry(uri, suite, kept,    aliases) {
    sub(/\/+$/, "", uri)
    aliases = released ? "stable|oldstable|oldoldstable" : "testing|unstable|sid"
    if (suite !~ "^(" codename "|" aliases ")(-updates|-security|-backports|/updates)?$")
        return
    if (released)
        sub("^(" aliases ")", codename, suite)
    # A disc cannot be asked for while nobody looks.
    if (uri ~ /^cdrom:/ || (uri " " suite) in seen)
        return
    seen[uri " " suite] = ++entries
    uri_of[entries] = uri
    suite_of[entries] = suite
    kept_of[entries] = kept
}

function stanza(uri, suite, kept) {
    printf "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nArchitectures: %s\n%s\n", uri, suite, arch, kept
}

# Said anew for each entry, or of no use here.
function own(name) { return name ~ /^(types|uris|suites|components|enabled|architectures|languages|targets|pdiffs|x-.*)$/ }

FNR == 1 { flush() }
{ sub(/\r$/, "") }

FILENAME ~ /\.sources$/ {
    if (/^#/)
        next
    if (/^[ \t]*$/) {
        flush()
        next
    }
    text = $0
    if (!/^[ \t]/) {
        field = tolower(substr($0, 1, index($0, ":") - 1))
        text = substr($0, index($0, ":") + 1)
    }
    if (own(field)) {
        gsub(/[ \t]+/, " ", text)
        value[field] = value[field] " " text
    } else
        kept = kept $0 "\n"
    next
}

$1 == "deb" {
    sub(/#.*/, "")
    sub(/^[ \t]*deb[ \t]+/, "")
    kept = ""
    if (/^\[/) {
        options = substr($0, 2, index($0, "]") - 2)
        $0 = substr($0, index($0, "]") + 1)
        count = split(options, option)
        for (i = 1; i <= count; i++) {
            at = index(option[i], "=")
            name = tolower(substr(option[i], 1, at - 1))
            # `+=` and `-=` change the lists of architectures, languages and targets.
            if (name !~ /[+-]$/ && name !~ /^(arch|lang|target|pdiffs)$/)
                kept = kept name ": " substr(option[i], at + 1) "\n"
        }
    }
    for (i = 3; i <= NF; i++)
        if ($i == "main")
            entry($1, $2, kept)
    kept = ""
}

END {
    flush()
    for (i = 1; i <= entries; i++) {
        stanza(uri_of[i], suite_of[i], kept_of[i])
        # Where the machine has its own entry for them, two could disagree on the key, and apt stops at that.
        if (released && suite_of[i] !~ /[-\/]/ && !((uri_of[i] " " suite_of[i] "-backports") in seen))
            stanza(uri_of[i], suite_of[i] "-backports", kept_of[i])
    }
}
