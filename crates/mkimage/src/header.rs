//! The arm64 Image header (Linux, `Documentation/arch/arm64/booting.rst`), as far as a
//! wrong one would make a boot loader place or size the image wrongly.

use crate::flat::Flat;

/// Length of the header.
pub const LENGTH: usize = 64;
const TEXT_OFFSET: usize = 8;
const IMAGE_SIZE: usize = 16;
const FLAGS: usize = 24;
const MAGIC: usize = 0x38;

/// Why a header is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No header.
    #[error(
        "no arm64 Image header: the bytes at 0x38 are {found:02x?}, not \"ARM\\x64\"; the header's section must be the first thing in the image"
    )]
    NoMagic {
        /// What is there instead, fewer than four if the image is shorter.
        found: Vec<u8>,
    },
    /// Loaded off a page boundary.
    #[error(
        "Image header: text_offset {0:#x} is not a multiple of 4 KiB, so the image would not start on a page"
    )]
    TextOffset(u64),
    /// Memory past `image_size` would be given to something else.
    #[error(
        "Image header: image_size is {declared:#x}, but the image takes {needed:#x} bytes of memory with .bss: \
         a loader would put something else there; the linker script's end symbol must come after everything"
    )]
    ImageSize {
        /// What the header says.
        declared: u64,
        /// What the segments take.
        needed: u64,
    },
    /// Big-endian flag.
    #[error(
        "Image header: flags {0:#x} say big-endian, but the code is little-endian; clear bit 0"
    )]
    BigEndian(u64),
}

/// Checks the header at the start of `image`.
///
/// # Errors
///
/// When there is none or it would mislead a loader.
pub fn check(image: &Flat) -> Result<(), Error> {
    let bytes = image.bytes();
    let magic = bytes
        .get(MAGIC..)
        .map_or(&[][..], |rest| &rest[..rest.len().min(4)]);
    if magic != b"ARM\x64" || bytes.len() < LENGTH {
        return Err(Error::NoMagic {
            found: magic.to_vec(),
        });
    }
    let text_offset = u64_at(bytes, TEXT_OFFSET);
    if !text_offset.is_multiple_of(4096) {
        return Err(Error::TextOffset(text_offset));
    }
    let declared = u64_at(bytes, IMAGE_SIZE);
    if declared < image.memory() {
        return Err(Error::ImageSize {
            declared,
            needed: image.memory(),
        });
    }
    let flags = u64_at(bytes, FLAGS);
    if flags & 1 != 0 {
        return Err(Error::BigEndian(flags));
    }
    Ok(())
}

/// A field of the header; the caller has checked that the header is all there.
fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..offset + 8)
        .and_then(|field| field.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}
