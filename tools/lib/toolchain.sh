# Rust for the build machine and for the image.
#
# The image needs core and alloc for a bare-metal target. rustup has them ready made; where
# it cannot fetch them, Debian's Rust builds them from its own sources, once, into the cache.
# Both ways end in the same two files, which tools/cargo reads:
#   target/toolchain.env    which cargo for the machine, which for the image
#   target/toolchain.toml   cargo settings for the image (sysroot, linker)
#
# TIDEMARK_TOOLCHAIN=rustup|debian insists on one of them.

# The oldest Rust that builds the tree.
rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1; }

# rust_version RUSTC: its release number, nothing if it does not run.
rust_version() { "$1" --version 2>/dev/null | awk '{ print $2 }' | sed 's/-.*//'; }

new_enough() {
    local version
    version=$(rust_version "$1") && [ -n "$version" ] && version_at_least "$version" "$(rust_wanted)"
}

# Whether a rustc has the target's libraries.
has_target() {
    local lib
    lib=$("$1" --print target-libdir --target "$triple" 2>/dev/null) &&
        ls "$lib"/libcore-*.rlib >/dev/null 2>&1
}

setup_toolchain() {
    local key
    key=$(toolchain_key)
    if [ -r "$target/toolchain.env" ] && grep -qxF "# $key" "$target/toolchain.env" &&
        toolchain_still_there; then
        return
    fi
    mkdir -p "$target"

    # For the machine: the cargo on the PATH if it is new enough, else Debian's.
    local host_path='' image_path=''
    if ! new_enough rustc || ! have cargo; then
        debian_rust "no Rust $(rust_wanted) or newer on this machine"
        new_enough rustc || host_path=/usr/bin
    fi
    if ! have cc; then
        is_debian || die "no C compiler (cc), which Rust needs for linking; install gcc or clang"
        apt_install gcc libc6-dev
    fi

    # For the image.
    case ${TIDEMARK_TOOLCHAIN:-auto} in
        auto | rustup)
            if [ -z "$host_path" ] && { has_target rustc || rustup_target; }; then
                write_toolchain "$host_path" '' ''
                return
            fi
            [ "${TIDEMARK_TOOLCHAIN:-auto}" = auto ] ||
                die "TIDEMARK_TOOLCHAIN=rustup, but rustup has no target $triple and cannot fetch it"
            ;;
        debian) ;;
        *) die "TIDEMARK_TOOLCHAIN=$TIDEMARK_TOOLCHAIN: it must be auto, rustup or debian" ;;
    esac
    debian_rust "rustup cannot fetch the target $triple"
    image_path=/usr/bin
    debian_sysroot
    write_toolchain "$host_path" "$image_path" "$sysroot"
}

# What the choice rests on; when it changes, the choice is made again.
toolchain_key() {
    printf '%s | %s | %s' "${TIDEMARK_TOOLCHAIN:-auto}" "$(rustc --version 2>/dev/null || echo none)" \
        "$(/usr/bin/rustc --version 2>/dev/null || echo none)"
}

toolchain_still_there() {
    local sysroot='' image_path=''
    . "$target/toolchain.env"
    if [ -n "$sysroot" ]; then
        ls "$sysroot/lib/rustlib/$triple/lib"/libcore-*.rlib >/dev/null 2>&1
    else
        has_target rustc
    fi && have cc
}

rustup_target() {
    have rustup || return 1
    say "adding the target $triple with rustup"
    # Where its server cannot be reached rustup may wait for very long.
    logged timeout 180 rustup target add "$triple" && has_target rustc
}

# debian_rust REASON: Debian's Rust with its sources, in whichever packages it comes.
debian_rust() {
    # A bare Debian has no certificates, and its cargo fetches nothing without them.
    if is_debian && ! [ -r /etc/ssl/certs/ca-certificates.crt ]; then
        apt_install ca-certificates
    fi
    if [ -x /usr/bin/cargo ] && new_enough /usr/bin/rustc && [ -n "$(debian_sources)" ]; then
        return
    fi
    is_debian || die "$1. Install Rust with rustup (then: rustup target add $triple),
  or Rust $(rust_wanted) or newer with its library sources (rust-src) in /usr"
    local flavour
    if ! flavour=$(debian_flavour); then
        # Not known, or an old one is: the lists may be missing or old themselves.
        need_root "apt-get install rustc-web cargo-web" rustc-web cargo-web
        must "cannot fetch Debian's package lists" apt_update
        flavour=$(debian_flavour) ||
            die "$1, nor in Debian's packages that apt knows (Debian 12 has it among its security updates:
  bookworm-security must be one of apt's sources); install Rust $(rust_wanted) or newer with rustup"
    fi
    # shellcheck disable=SC2086
    apt_install $flavour
    hash -r
}

# Which of Debian's packages have a Rust that is new enough. The -web ones follow new
# releases within a stable Debian.
debian_flavour() {
    local flavour version
    for flavour in "rustc-web cargo-web rust-web-src rust-web-clippy" "rustc cargo rust-src rust-clippy"; do
        version=$(apt_candidate "${flavour%% *}")
        if [ -n "$version" ] && version_at_least "${version%%[+~-]*}" "$(rust_wanted)"; then
            echo "$flavour"
            return
        fi
    done
    return 1
}

# Where Debian's Rust has the library's sources.
debian_sources() {
    local sources
    sources=$(/usr/bin/rustc --print sysroot 2>/dev/null)/lib/rustlib/src/rust/library
    [ -r "$sources/core/Cargo.toml" ] && echo "$sources"
}

# Builds core and alloc for the target once; sets $sysroot.
debian_sysroot() {
    local name libraries library
    # Bytecode is kept in the libraries, because the image is optimised as a whole.
    name=$(/usr/bin/rustc -vV | awk '/^release:/ { r = $2 } /^commit-hash:/ { h = substr($2, 1, 8) } END { print r "-" h }')
    sysroot=$cache/sysroot/$name
    libraries=$sysroot/lib/rustlib/$triple/lib
    ls "$libraries"/libcore-*.rlib >/dev/null 2>&1 && return
    say "building core and alloc for $triple with Debian's Rust (once, about a minute)"
    make_scratch
    local build=$scratch/sysroot out=$scratch/sysroot/out
    mkdir -p "$build/src" "$out/lib/rustlib/$triple/lib"
    cat >"$build/Cargo.toml" <<'END'
[package]
name = "sysroot"
version = "0.0.0"
edition = "2021"
[profile.release]
panic = "abort"
[workspace]
END
    echo '#![no_std]' >"$build/src/lib.rs"
    must "cannot build core and alloc with Debian's Rust" \
        env -C "$build" -u RUSTC_WRAPPER -u CARGO_ENCODED_RUSTFLAGS PATH="/usr/bin:$PATH" \
        RUSTC_BOOTSTRAP=1 RUSTC=/usr/bin/rustc CARGO_TARGET_DIR="$build/target" \
        RUSTFLAGS="-Cembed-bitcode=yes -Cforce-frame-pointers=yes" \
        /usr/bin/cargo build --release -Zbuild-std=core,alloc --target "$triple"
    for library in core alloc compiler_builtins; do
        set -- "$build/target/$triple/release/deps/lib$library"-*.rlib
        [ $# = 1 ] && [ -r "$1" ] || die "expected one lib$library from Debian's Rust, got $#: $*"
        cp "$1" "$out/lib/rustlib/$triple/lib/"
    done
    # Whole or not at all, also when two clones do this at the same time.
    mkdir -p "${sysroot%/*}"
    cp -r "$out" "$sysroot.$$"
    mv -T "$sysroot.$$" "$sysroot" 2>/dev/null || rm -rf "$sysroot.$$"
}

# A linker for the image: the target asks for rust-lld, which Debian's Rust does not bring.
find_lld() {
    local lld host
    host=$(/usr/bin/rustc -vV | sed -n 's/^host: //p')
    for lld in "$(/usr/bin/rustc --print sysroot)/lib/rustlib/$host/bin/rust-lld" \
        "$(rustc --print sysroot 2>/dev/null)/lib/rustlib/$host/bin/rust-lld" \
        "$(command -v ld.lld)" $(ls -v /usr/bin/ld.lld-* 2>/dev/null | tail -n 1); do
        if [ -x "$lld" ]; then
            echo "$lld"
            return
        fi
    done
    return 1
}

# write_toolchain HOST_PATH IMAGE_PATH SYSROOT: what tools/cargo reads.
write_toolchain() {
    local linker='' how
    if [ -n "$3" ]; then
        linker=$(find_lld) || { apt_install lld; linker=$(find_lld) || die "lld is installed, but there is no ld.lld"; }
        how="Debian's Rust $(rust_version /usr/bin/rustc)"
        cat >"$target/toolchain.toml.new" <<END
[target.$triple]
linker = "$linker"
rustflags = ["--sysroot", "$3"]
rustdocflags = ["--sysroot", "$3", "-Dwarnings"]
END
    else
        how="Rust $(rust_version rustc) with its own $triple"
        printf '[target.%s]\nrustdocflags = ["-Dwarnings"]\n' "$triple" >"$target/toolchain.toml.new"
    fi
    cat >"$target/toolchain.env.new" <<END
# $(toolchain_key)
host_path=$1
image_path=$2
sysroot=$3
END
    mv "$target/toolchain.toml.new" "$target/toolchain.toml"
    mv "$target/toolchain.env.new" "$target/toolchain.env"
    say "the image is built with $how"
}

# rustfmt and clippy, for `make check`.
setup_lint() {
    local tool missing=()
    setup_toolchain
    for tool in fmt clippy; do
        "$root/tools/cargo" host "$tool" --version >/dev/null 2>&1 || missing+=("$tool")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if have rustup && logged timeout 180 rustup component add rustfmt clippy; then
        return
    fi
    if is_debian && installed rustc-web; then
        apt_install rustfmt-web rust-web-clippy
    elif is_debian && installed rustc; then
        apt_install rustfmt rust-clippy
    else
        die "no cargo ${missing[*]}; install them (rustup component add rustfmt clippy)"
    fi
}
