# The programs that nobody here wrote: Debian's arm64 kernel, busybox, U-Boot, and EDK2.
#
# Fetched as packages and unpacked, not installed: package lists for arm64 of their own are
# kept in the cache, so the machine's sources and architectures stay as they are and no root
# is needed. What is in the cache is not fetched again; TIDEMARK_KERNEL, TIDEMARK_BUSYBOX,
# TIDEMARK_UBOOT and TIDEMARK_EDK2 name files to take instead.

guests_way="TIDEMARK_KERNEL=<arm64 Image of Linux 6.12>  TIDEMARK_BUSYBOX=<static arm64 busybox>  TIDEMARK_UBOOT=<u-boot.bin for qemu_arm64>  TIDEMARK_EDK2=<QEMU_EFI.fd for aarch64>"

setup_guests() {
    local store=$cache/guests out=$target/guests
    mkdir -p "$out"
    place_guest "${TIDEMARK_KERNEL:-}" "$store" Image
    place_guest "${TIDEMARK_BUSYBOX:-}" "$store" busybox
    place_guest "${TIDEMARK_UBOOT:-}" "$store" u-boot.bin
    place_guest "${TIDEMARK_EDK2:-}" "$store" QEMU_EFI.fd
}

# place_guest OWN STORE NAME: the user's own file or the cached one to target/guests.
place_guest() {
    local from=$1 store=$2 name=$3 to=$target/guests/$3
    if [ -n "$from" ]; then
        [ -r "$from" ] || die "$from (for $name) is not there"
    else
        [ -r "$store/$name" ] || fetch_guests "$store"
        from=$store/$name
    fi
    if ! cmp -s "$from" "$to"; then
        cp "$from" "$to.new"
        mv "$to.new" "$to"
    fi
}

# Newest 6.12 kernel for clouds (its drivers are those of `virt`), else the newest there is.
newest_kernel() {
    local names
    names=$(APT_CONFIG=$1 apt-cache pkgnames linux-image- | grep -E '^linux-image-[0-9.]+[^ ]*-cloud-arm64-unsigned$' | sort -V)
    printf '%s\n' "$names" | grep -E '^linux-image-6\.12\.' | tail -n 1 | grep . ||
        printf '%s\n' "$names" | tail -n 1 | grep .
}

fetch_guests() {
    local store=$1 kernel apt config package file
    is_debian || die "the guests come from Debian's packages, which this machine cannot fetch. Say where they are:
  $guests_way"
    say "fetching Debian's arm64 kernel, busybox, U-Boot and EDK2"
    make_scratch
    apt=$scratch/arm64 config=$scratch/arm64/apt.conf
    private_apt "$apt" arm64 && kernel=$(newest_kernel "$config") ||
        die "no linux-image-*-cloud-arm64-unsigned in Debian's lists for arm64 (see $log). Say where the guests are:
  $guests_way"
    # The machine may prefer a release that these lists leave out, and apt stops at that.
    must "cannot fetch the guests' packages" env -C "$apt" APT_CONFIG="$config" \
        apt-get -q -o APT::Default-Release= download "$kernel" busybox-static u-boot-qemu qemu-efi-aarch64
    for package in "$apt"/*.deb; do
        dpkg-deb -x "$package" "$apt/x"
    done
    mkdir -p "$apt/new" "$store"
    cp "$apt"/x/boot/vmlinuz-* "$apt/new/Image"
    # Merged /usr or not.
    cp "$apt"/x/bin/busybox "$apt/new/busybox" 2>/dev/null || cp "$apt"/x/usr/bin/busybox "$apt/new/busybox"
    cp "$apt"/x/usr/lib/u-boot/qemu_arm64/u-boot.bin "$apt/new/u-boot.bin"
    cp "$apt"/x/usr/share/qemu-efi-aarch64/QEMU_EFI.fd "$apt/new/QEMU_EFI.fd"
    ls "$apt" | sed -n 's/\.deb$//p' >"$apt/new/packages"
    for file in "$apt"/new/*; do
        cp "$file" "$store/${file##*/}.$$"
        mv "$store/${file##*/}.$$" "$store/${file##*/}"
    done
    say "guests: $(tr '\n' ' ' <"$store/packages")"
}
