//! What `tidectl` makes of each kind of kernel, whole and malformed.

use super::{Segment, elf, gzip, zboot, zstd};
use tidectl::kernel::{KernelError, Kind, lay_out};
use tidemark_wire::bundle::{Kernel, RAM_BASE};

const MIB: u64 = 1 << 20;
const AARCH64: u16 = 183;

fn image(text_offset: u64, size: u64) -> Vec<u8> {
    let mut image = vec![0x11; 10_000];
    image[8..16].copy_from_slice(&text_offset.to_le_bytes());
    image[16..24].copy_from_slice(&size.to_le_bytes());
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    image
}

fn laid(
    file: Vec<u8>,
    initrd: Option<usize>,
    memory: u64,
) -> Result<(Kind, Kernel<usize>), KernelError> {
    let initrd = initrd.map(|len| vec![1; len]);
    let (kind, kernel) = lay_out(file, initrd, "quiet".into(), memory)?;
    assert_eq!(kernel.cmdline, "quiet");
    Ok((kind, kernel.map(|file| file.len())))
}

/// Where it went: the kernel, its size in memory, its initrd, its devicetree; by their offsets in RAM.
fn places(
    file: Vec<u8>,
    initrd: Option<usize>,
    memory: u64,
) -> (u64, u64, Option<u64>, Option<u64>) {
    let (_, kernel) = laid(file, initrd, memory).expect("it fits");
    let segment = &kernel.segments[0];
    assert_eq!(kernel.segments.len(), 1);
    assert_eq!(kernel.entry, segment.address);
    let offset = |address: u64| address - RAM_BASE;
    (
        offset(segment.address),
        segment.size,
        kernel.initrd.map(|initrd| offset(initrd.address)),
        kernel.devicetree.map(offset),
    )
}

fn refused(file: Vec<u8>) -> KernelError {
    laid(file, None, 64 * MIB).expect_err("refused")
}

/// The figures are those of QEMU 10.0, seen with `-M virt -kernel`; `tests/serial/kernels.rs` asks it.
#[test]
fn images_go_where_qemu_puts_them() {
    let size = 9 * MIB;
    for (file, initrd, memory, wanted) in [
        (
            image(0, size),
            Some(5),
            512 * MIB,
            (2 * MIB, size, Some(128 * MIB), Some(130 * MIB)),
        ),
        (
            image(0, size),
            None,
            512 * MIB,
            (2 * MIB, size, None, Some(128 * MIB)),
        ),
        (
            image(0, size),
            Some(5),
            64 * MIB,
            (2 * MIB, size, Some(32 * MIB), Some(34 * MIB)),
        ),
        (
            image(0x8_0000, size),
            None,
            64 * MIB,
            (MIB / 2, size, None, Some(32 * MIB)),
        ),
        // The kernel is where the initrd would have been.
        (
            image(0, 200 * MIB + 1),
            Some(5),
            512 * MIB,
            (
                2 * MIB,
                200 * MIB + 1,
                Some(202 * MIB + 4096),
                Some(204 * MIB),
            ),
        ),
        // Before Linux 3.17 the header says nothing of its place.
        (
            image(77, 0),
            None,
            64 * MIB,
            (MIB / 2, 10_000, None, Some(32 * MIB)),
        ),
        // A header that promises less than there is.
        (
            image(0, 1),
            None,
            64 * MIB,
            (2 * MIB, 10_000, None, Some(32 * MIB)),
        ),
        (
            vec![0x11; 5000],
            Some(1),
            64 * MIB,
            (MIB / 2, 5000, Some(32 * MIB), Some(34 * MIB)),
        ),
        (
            vec![0x11; 4],
            None,
            4 * MIB,
            (MIB / 2, 4, None, Some(2 * MIB)),
        ),
    ] {
        assert_eq!(places(file, initrd, memory), wanted);
    }
}

#[test]
fn what_does_not_fit() {
    let needs = |file, initrd, memory| match laid(file, initrd, memory) {
        Err(KernelError::Memory { needed, .. }) => needed.div_ceil(MIB),
        other => panic!("{other:?}"),
    };
    assert_eq!(needs(image(0, 63 * MIB), None, 64 * MIB), 65);
    assert_eq!(needs(image(0, MIB), Some(31 << 20), 64 * MIB), 65);
    assert_eq!(needs(vec![0; 4], None, 2 * MIB), 3);
    assert_eq!(
        needs(image(0, u64::MAX), None, 64 * MIB),
        u64::MAX.div_ceil(MIB)
    );
    assert_eq!(needs(image(1 << 40, MIB), None, 64 * MIB), (1 << 20) + 1);
    for text_offset in [4097, u64::MAX, u64::MAX - 4095, 1 << 48] {
        assert_eq!(
            refused(image(text_offset, MIB)),
            KernelError::TextOffset(text_offset)
        );
    }
}

#[test]
fn packed_ones_are_what_is_packed() {
    let plain = image(0, 9 * MIB);
    let len = plain.len() as u32;
    let packed = gzip(&plain).expect("packed");
    let padded = [packed.as_slice(), &[0; 100]].concat();
    let wanted = laid(plain.clone(), None, 64 * MIB).expect("it fits");
    for file in [
        packed.clone(),
        padded,
        zstd(&plain),
        zboot("gzip", &packed, len),
        zboot("zstd", &zstd(&plain), len),
        zboot("zstd22", &zstd(&plain), len),
    ] {
        assert_eq!(laid(file, None, 64 * MIB).expect("it fits"), wanted);
    }
    let flat = laid(gzip(&[7; 99]).expect("packed"), None, 64 * MIB).expect("it fits");
    assert_eq!((flat.0, flat.1.segments[0].size), (Kind::Flat, 99));
}

#[test]
fn broken_packing() {
    let plain = image(0, 9 * MIB);
    let packed = gzip(&plain).expect("packed");
    let damaged = |what: &str, file: Vec<u8>| match refused(file) {
        KernelError::Damaged(kind, _) => assert_eq!(kind, what),
        other => panic!("{other:?}"),
    };
    damaged("gzip", packed[..packed.len() - 9].to_vec());
    damaged("gzip", b"\x1f\x8b".to_vec());
    let mut flipped = packed.clone();
    let at = flipped.len() - 5;
    flipped[at] ^= 1;
    damaged("gzip", flipped);
    damaged("zstd", zstd(&plain)[..20].to_vec());
    damaged("zstd", vec![0x28, 0xb5, 0x2f, 0xfd]);
    damaged("EFI zboot", zboot("gzip", &packed, 0)[..0x420].to_vec());
    let mut far = zboot("gzip", &packed, 0);
    far[8..12].fill(0xff);
    damaged("EFI zboot", far);
    assert_eq!(
        refused(zboot("gzip", &gzip(&[7; 99]).expect("packed"), 0)),
        KernelError::OtherZboot
    );
    for packer in ["xz", "xzkern", "lzma", "lz4", "lzo", "brotli", ""] {
        assert!(matches!(
            refused(zboot(packer, &packed, 0)),
            KernelError::Packed(..)
        ));
    }
    assert_eq!(
        refused(gzip(&packed).expect("packed")),
        KernelError::Packed("gzip", "it was packed twice")
    );
    // 257 MiB of zeros in 260 KiB.
    let bomb = gzip(&vec![0; 257 << 20]).expect("packed");
    assert_eq!(refused(bomb), KernelError::TooLarge);
}

#[test]
fn known_files_that_are_no_kernels() {
    let with = |at: usize, magic: &[u8]| {
        let mut file = vec![0x11; 1024];
        file[at..at + magic.len()].copy_from_slice(magic);
        file
    };
    for (file, wanted) in [
        (with(0, &[0x27, 0x05, 0x19, 0x56]), "uImage"),
        (with(0, &[0xd0, 0x0d, 0xfe, 0xed]), "FIT"),
        (with(0x38, b"RSC\x05"), "RISC-V"),
        (with(0x24, &[0x18, 0x28, 0x6f, 0x01]), "32-bit Arm"),
        (with(0x202, b"HdrS"), "x86"),
        (with(0, b"MZ"), "EFI program"),
        (with(0, b"\xfd7zXZ\0"), "xz -dc"),
        (with(0, &[0x5d, 0, 0]), "lzma -dc"),
        (with(0, b"BZh"), "bzip2 -dc"),
        (with(0, &[0x02, 0x21, 0x4c, 0x18]), "lz4 -dc"),
        (with(0, b"\x89LZO"), "lzop -dc"),
    ] {
        let said = refused(file).to_string();
        assert!(
            said.contains(wanted) && !said.contains('\n'),
            "{wanted}: {said}"
        );
    }
}

fn segment(offset: u64, file: usize, memory: u64) -> Segment {
    let address = RAM_BASE + offset;
    Segment {
        address,
        linked: address,
        file: vec![0x22; file],
        memory,
    }
}

#[test]
fn elf_files_go_to_their_physical_addresses() {
    let moved = Segment {
        linked: 0xffff_0000_0000_0000,
        ..segment(MIB, 100, 200)
    };
    let bss = segment(4 * MIB, 0, 4096);
    let file = elf(AARCH64, 0xffff_0000_0000_0008, &[bss, moved.clone()]);
    let (kind, kernel) = laid(gzip(&file).expect("packed"), None, 64 * MIB).expect("it fits");
    assert_eq!(kind, Kind::Elf);
    assert_eq!(kernel.entry, RAM_BASE + MIB + 8);
    assert_eq!(kernel.devicetree, Some(RAM_BASE));
    let parts: Vec<_> = kernel
        .segments
        .iter()
        .map(|part| (part.address - RAM_BASE, part.size, part.file))
        .collect();
    assert_eq!(parts, [(MIB, 200, Some(100)), (4 * MIB, 4096, None)]);
    // At the start of RAM there is no room for a devicetree.
    let (_, kernel) =
        laid(elf(AARCH64, RAM_BASE, &[segment(0, 8, 8)]), None, 64 * MIB).expect("it fits");
    assert_eq!(kernel.devicetree, None);
    // What would be zero is another segment: it moves its parts itself.
    let close = [
        segment(0x1000, 16, 0x1000),
        segment(0x1010, 16, 16),
        segment(0x1020, 0, 0),
    ];
    let (_, kernel) =
        laid(elf(AARCH64, RAM_BASE + 0x1000, &close), None, 64 * MIB).expect("it fits");
    let sizes: Vec<_> = kernel.segments.iter().map(|part| part.size).collect();
    assert_eq!(sizes, [16, 16]);
}

#[test]
fn malformed_elf_files() {
    let good = elf(AARCH64, RAM_BASE + MIB, &[segment(MIB, 100, 200)]);
    assert!(laid(good.clone(), None, 64 * MIB).is_ok());
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let outside = |offset: u64, memory: u64| {
        elf(
            AARCH64,
            RAM_BASE,
            &[Segment {
                address: offset,
                ..segment(0, 4, memory)
            }],
        )
    };
    let many: Vec<_> = (1..=33).map(|n| segment(n << 12, 4, 4)).collect();
    for (file, wanted) in [
        (changed(4, &[1]), "a 32-bit machine"),
        (changed(5, &[2]), "a big-endian machine"),
        (changed(4, &[9]), "neither 32-bit nor 64-bit"),
        (changed(18, &62u16.to_le_bytes()), "for machine 62"),
        (b"\x7fELF".to_vec(), "cannot be read"),
        (good[..60].to_vec(), "cannot be read"),
        (good[..100].to_vec(), "cannot be read"),
        (good[..130].to_vec(), "reaches past its end"),
        (changed(64, &[2]), "nothing to load"),
        (elf(AARCH64, RAM_BASE, &[]), "nothing to load"),
        // More in the file than in memory.
        (changed(64 + 40, &[99]), "more in the file"),
        (changed(64 + 24, &[0xff; 8]), "wrap around"),
        (outside(0, 4), "not in the guest's 64 MiB"),
        (outside(RAM_BASE - 8, 16), "not in the guest's 64 MiB"),
        (
            outside(RAM_BASE + 64 * MIB - 8, 16),
            "not in the guest's 64 MiB",
        ),
        (
            outside(0xffff_8000_0000_0000, 4),
            "not in the guest's 64 MiB",
        ),
        (
            elf(AARCH64, RAM_BASE, &[segment(0, 16, 16), segment(15, 4, 4)]),
            "overlap",
        ),
        (
            elf(AARCH64, RAM_BASE + 200, &[segment(0, 16, 16)]),
            "in none of its segments",
        ),
        (
            elf(AARCH64, RAM_BASE + 2, &[segment(0, 16, 16)]),
            "in none of its segments",
        ),
        (elf(AARCH64, RAM_BASE + 4096, &many), "33 segments"),
    ] {
        let said = refused(file).to_string();
        assert!(
            said.contains(wanted) && !said.contains('\n'),
            "{wanted}: {said}"
        );
    }
    assert_eq!(
        laid(good, Some(5), 64 * MIB).expect_err("refused"),
        KernelError::Initrd
    );
}
