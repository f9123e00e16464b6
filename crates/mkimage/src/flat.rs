//! Memory as a boot loader lays it out: one run of bytes from the lowest load address.
//!
//! Memory past the last stored byte (`.bss`, stacks) is not part of the file; the Image
//! header tells the loader to keep it free (`image_size`).

use crate::elf::Elf;

/// The largest image made. Far above any real one: a linker script that puts a section
/// at a wrong address would otherwise become a file of gigabytes.
pub const LIMIT: u64 = 256 << 20;

/// Why segments cannot be laid out flat.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Two segments in the same place.
    #[error(
        "segments overlap: one ends at {end:#x}, the next starts at {start:#x}; check the linker script's addresses"
    )]
    Overlap {
        /// The first one's end.
        end: u64,
        /// The second one's start.
        start: u64,
    },
    /// Too far apart.
    #[error(
        "the segments span {0:#x} bytes, more than an image may have ({LIMIT:#x}); is a section linked at a stray address?"
    )]
    TooLong(u64),
    /// Nothing that the file would hold.
    #[error("no segment has bytes in the file; the image would be empty")]
    NoBytes,
    /// Load and link addresses disagree in different ways.
    #[error(
        "the segment at {address:#x} is linked {found:#x} from where it is loaded, the first one {expected:#x}: \
         one image moves as a whole; link with equal virtual and load addresses"
    )]
    Skewed {
        /// Load address of the odd one.
        address: u64,
        /// Its link address minus its load address.
        found: u64,
        /// The same of the first.
        expected: u64,
    },
}

/// The bytes of a flat image and what they stand for.
#[derive(Debug)]
pub struct Flat {
    bytes: Vec<u8>,
    /// Link address of the first byte.
    base: u64,
    memory: u64,
}

impl Flat {
    /// Lays the segments out.
    ///
    /// # Errors
    ///
    /// When they overlap, are too far apart, or do not move as one.
    pub fn new(elf: &Elf<'_>) -> Result<Self, Error> {
        let first = elf.segments.first().ok_or(Error::NoBytes)?;
        let base = first.paddr;
        let skew = first.vaddr.wrapping_sub(first.paddr);
        let mut bytes = Vec::new();
        let mut memory = 0_u64;
        for segment in &elf.segments {
            let found = segment.vaddr.wrapping_sub(segment.paddr);
            if found != skew {
                return Err(Error::Skewed {
                    address: segment.paddr,
                    found,
                    expected: skew,
                });
            }
            // Sorted by load address, so this cannot go below zero.
            let offset = segment.paddr.wrapping_sub(base);
            if offset < memory {
                return Err(Error::Overlap {
                    end: base.wrapping_add(memory),
                    start: segment.paddr,
                });
            }
            let end = offset.saturating_add(segment.memory);
            if end > LIMIT {
                return Err(Error::TooLong(end));
            }
            memory = end;
            if !segment.data.is_empty() {
                bytes.resize(offset as usize, 0);
                bytes.extend_from_slice(segment.data);
            }
        }
        if bytes.is_empty() {
            return Err(Error::NoBytes);
        }
        Ok(Self {
            bytes,
            base: base.wrapping_add(skew),
            memory,
        })
    }

    /// The bytes so far.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The finished bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// How much memory the segments take once loaded, from the first byte.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// How far a link address is from the image's start, if it is inside its memory.
    #[must_use]
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        address
            .checked_sub(self.base)
            .filter(|offset| *offset < self.memory)
    }

    /// The stored bytes of `size` bytes of memory linked at `address`.
    pub fn stored_mut(&mut self, address: u64, size: u64) -> Option<&mut [u8]> {
        let start = usize::try_from(address.checked_sub(self.base)?).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        self.bytes.get_mut(start..end)
    }
}
