//! What can be started as a guest's kernel, and where it goes in the guest's RAM.
//!
//! The kinds are those that QEMU's `-kernel` takes on `virt`, and each goes where QEMU (10.0,
//! `hw/arm/boot.c`) would put it, with its initial RAM disk and its devicetree: programs find
//! what they look for. All of this is decided here, so that the image has only to copy.
//!
//! | kind | where | entered at | devicetree |
//! |---|---|---|---|
//! | arm64 `Image` | `text_offset`, 2 MiB further if that is below 4 KiB | its start | above all |
//! | flat binary | 512 KiB into RAM | its start | above all |
//! | ELF | its physical addresses | its entry point | at the start of RAM, if it leaves that free |
//!
//! "Above all" is the first 2 MiB boundary behind the initial RAM disk, whose place is 128 MiB
//! into RAM, or half of it, or behind the kernel, whichever is the furthest. Compressed ones
//! (gzip, zstd, EFI zboot) are unpacked first.

mod elf;
mod unpack;

pub use unpack::unpack_for_firmware;

use tidemark_wire::bundle::{Initrd, Kernel, RAM_BASE, Segment};

/// What a file turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An arm64 `Image`.
    Image,
    /// An ELF file.
    Elf,
    /// None that is known: code from its first byte on.
    Flat,
}

impl Kind {
    /// Its name, for people and programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Elf => "elf",
            Self::Flat => "flat",
        }
    }
}

/// Why a file cannot be a guest's kernel, in one line that says what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Packed by something that is not unpacked here.
    #[error("it is packed with {0}; unpack it first: {1}")]
    Packed(&'static str, &'static str),
    /// Packed, and the packing is broken.
    #[error("its {0} data cannot be unpacked ({1}); is the file whole?")]
    Damaged(&'static str, String),
    /// Packed, and too large.
    #[error("unpacked it is over {} MiB, the most that is taken", unpack::LARGEST >> 20)]
    TooLarge,
    /// An EFI zboot image of something else.
    #[error("what is packed in this EFI zboot image is no arm64 Image; take one built for arm64")]
    OtherZboot,
    /// Something known that is no program for this machine.
    #[error("it is {0}; {1}")]
    Other(&'static str, &'static str),
    /// An ELF file that does not follow its own format.
    #[error("it is an ELF file that cannot be read ({0}); is it whole?")]
    BadElf(String),
    /// An ELF file for another machine.
    #[error("it is an ELF file for {0}; build it for aarch64, 64-bit and little-endian")]
    OtherElf(String),
    /// Nothing in it is loaded.
    #[error("it is an ELF file with nothing to load; link it as a program (objects are not)")]
    EmptyElf,
    /// It cannot be where it is linked to be.
    #[error(
        "its segment at {address:#x}+{size:#x} is not in the guest's {} MiB of memory at {RAM_BASE:#x}; link it \
         there, or raise `memory` (of Linux take the Image, not vmlinux; of firmware that starts at 0 \
         say firmware = the flat file)", memory >> 20
    )]
    Outside {
        /// First address.
        address: u64,
        /// Its size.
        size: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// Two of its parts are in one place.
    #[error("its segments at {0:#x} and {1:#x} overlap; link it so that each has a place")]
    Overlap(u64, u64),
    /// Too many parts.
    #[error("it has {0} segments; {max} are the most: link it with fewer", max = tidemark_wire::bundle::SEGMENTS_MAX)]
    Segments(usize),
    /// The entry point leads nowhere.
    #[error("its entry point {0:#x} is in none of its segments; name one when linking (-e)")]
    Entry(u64),
    /// A program of its own does not look for one.
    #[error("an ELF file is started without an initial RAM disk, as QEMU does; leave `initrd` out")]
    Initrd,
    /// An Image header that cannot be followed.
    #[error(
        "its text_offset {0:#x} is no multiple of 4 KiB, or out of range; is the header whole?"
    )]
    TextOffset(u64),
    /// Not all of it fits.
    #[error(
        "it, its initrd and its devicetree need {} MiB, more than its {} MiB of memory: raise `memory`",
        needed.div_ceil(1 << 20), memory >> 20
    )]
    Memory {
        /// Bytes needed, from the start of RAM.
        needed: u64,
        /// Bytes of memory.
        memory: u64,
    },
}

/// A flat binary goes here, and an Image whose header says nothing of its place.
const FLAT_OFFSET: u64 = 0x8_0000;
/// Below this QEMU has a few instructions of its own.
const BOOT_LOADER: u64 = 4096;
const BLOCK: u64 = 2 << 20;
const PAGE: u64 = 4096;
/// An initial RAM disk is put no further up than this if the kernel is not in the way.
const INITRD_OFFSET: u64 = 128 << 20;
/// What a devicetree may take: no more than Linux maps of one.
const DEVICETREE: u64 = 64 << 10;

/// Lays a kernel out in a guest's memory.
///
/// # Errors
/// Says what the file is or what does not fit, and what to do about it.
pub fn lay_out(
    file: Vec<u8>,
    initrd: Option<Vec<u8>>,
    cmdline: String,
    memory: u64,
) -> Result<(Kind, Kernel<Vec<u8>>), KernelError> {
    let bytes = unpack::unpack(file)?;
    if bytes.starts_with(b"\x7fELF") {
        if initrd.is_some() {
            return Err(KernelError::Initrd);
        }
        let program = elf::read(&bytes, memory)?;
        return Ok((Kind::Elf, Kernel { cmdline, ..program }));
    }
    let (kind, offset, size) = place(&bytes)?;
    let fits = |end: Option<u64>| match end {
        Some(end) if end <= memory => Ok(end),
        end => Err(KernelError::Memory {
            needed: end.unwrap_or(u64::MAX),
            memory,
        }),
    };
    let end = fits(offset.checked_add(size))?;
    let disk = (memory / 2)
        .min(INITRD_OFFSET)
        .max(end)
        .next_multiple_of(PAGE);
    let len = initrd.as_ref().map_or(0, |bytes| bytes.len() as u64);
    let devicetree = disk
        .checked_add(len)
        .and_then(|end| end.checked_next_multiple_of(BLOCK));
    fits(devicetree.and_then(|start| start.checked_add(DEVICETREE)))?;
    let kernel = Kernel {
        entry: RAM_BASE + offset,
        segments: vec![Segment {
            address: RAM_BASE + offset,
            size,
            file: Some(bytes),
        }],
        initrd: initrd.map(|file| Initrd {
            address: RAM_BASE + disk,
            file,
        }),
        devicetree: devicetree.map(|offset| RAM_BASE + offset),
        cmdline,
    };
    Ok((kind, kernel))
}

/// What a file that is no ELF is, how far into RAM it goes, and how much memory it takes.
fn place(bytes: &[u8]) -> Result<(Kind, u64, u64), KernelError> {
    let len = bytes.len() as u64;
    if bytes.get(0x38..0x3c) != Some(b"ARM\x64") {
        refuse_known(bytes)?;
        return Ok((Kind::Flat, FLAT_OFFSET, len));
    }
    let word = |at: usize| {
        let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let (text_offset, image_size) = (word(8), word(16));
    if image_size == 0 {
        // Before Linux 3.17: neither field counts.
        return Ok((Kind::Image, FLAT_OFFSET, len));
    }
    let offset = match text_offset {
        below if below < BOOT_LOADER => below.checked_add(BLOCK),
        other => Some(other),
    };
    let offset = offset.filter(|offset| offset.is_multiple_of(PAGE) && *offset < 1 << 48);
    let offset = offset.ok_or(KernelError::TextOffset(text_offset))?;
    Ok((Kind::Image, offset, image_size.max(len)))
}

/// Refuses what is known to be no program for this machine: as a flat binary it would run into
/// its own header and be silent.
fn refuse_known(bytes: &[u8]) -> Result<(), KernelError> {
    let at = |offset: usize, magic: &[u8]| bytes.get(offset..offset + magic.len()) == Some(magic);
    let other = |what, help| Err(KernelError::Other(what, help));
    if at(0, &[0x27, 0x05, 0x19, 0x56]) {
        other(
            "a U-Boot uImage",
            "take the file that was packed into it (dumpimage -p 0 -o Image FILE)",
        )
    } else if at(0, &[0xd0, 0x0d, 0xfe, 0xed]) {
        other(
            "a devicetree or FIT image",
            "take the kernel that it describes (dumpimage -l FILE lists what is in it)",
        )
    } else if at(0x38, b"RSC\x05") || at(0x30, b"RISCV") {
        other("a kernel for RISC-V", "take one built for arm64")
    } else if at(0x24, &[0x18, 0x28, 0x6f, 0x01]) {
        other("a kernel for 32-bit Arm", "take one built for arm64")
    } else if at(0x202, b"HdrS") {
        other("a kernel for x86", "take one built for arm64")
    } else if at(0, b"MZ") {
        other(
            "an EFI program",
            "start EFI firmware as the guest's firmware, and the program from there",
        )
    } else {
        Ok(())
    }
}
