//! The bundle: a manifest and the files of all guests, handed over by the boot loader.
//!
//! Layout, little-endian:
//!
//! | offset | what |
//! |---|---|
//! | 0 | `TIDEBNDL` |
//! | 8 | format version `u32` = 2 |
//! | 12 | manifest length `u32` |
//! | 16 | total length `u64`; a boot loader may pad, so more bytes than this are legal |
//! | 24 | CRC-32C of the manifest `u32` |
//! | 28 | 0 `u32` |
//! | 32 | the manifest, postcard |
//! | then | the files, each at a multiple of 4 KiB |
//!
//! Invariants: a [`Bundle`] that parsed has 1..=16 vCPUs, whole 2 MiB of memory and a unique
//! name in every VM, and every [`Blob`] lies inside it, aligned. What a [`Kernel`] puts into RAM is
//! in RAM, each part in a place of its own; what [`Firmware`] has in flash fits its bank.
//! The files' CRCs are checked when asked for ([`Bundle::blob`]): reading 100 MB is not part
//! of parsing. Nothing here trusts a length.

mod build;
mod manifest;

pub use build::{BootFiles, Builder, VmDraft, flash_contents};
pub use manifest::{
    Blob, Boot, Clock, FLASH_MAX, Firmware, Initrd, Kernel, MachineOptions, Manifest, NAME_MAX,
    Payload, RAM_BASE, SEGMENTS_MAX, Segment, VCPUS_MAX, VMS_MAX, VmSpec, WhenAllStopped,
};

use crate::checksum::crc32c;
use alloc::string::String;
use core::fmt;

/// First bytes of a bundle.
pub const MAGIC: [u8; 8] = *b"TIDEBNDL";

/// Version of the format.
pub const FORMAT: u32 = 2;

/// Bytes before the manifest.
pub const HEADER_LEN: usize = 32;

/// Alignment of each file.
pub const BLOB_ALIGN: u64 = 4096;

/// A bundle whose manifest has been checked.
#[derive(Debug)]
pub struct Bundle<'a> {
    bytes: &'a [u8],
    manifest: Manifest,
}

/// Why a bundle was refused, in one line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BundleError {
    /// It does not begin as a bundle does.
    Magic,
    /// Its format is another version.
    Format(u32),
    /// It is shorter than it says.
    Truncated {
        /// Bytes it should have.
        wanted: u64,
        /// Bytes it has.
        got: u64,
    },
    /// The manifest's CRC does not match.
    ManifestCrc,
    /// The manifest's CRC matches, but it cannot be read.
    Manifest,
    /// No VM at all.
    NoVms,
    /// More VMs than a list of them can show.
    TooManyVms(usize),
    /// A name that is empty, too long or not printable.
    Name(String),
    /// Two VMs with one name.
    DuplicateName(String),
    /// vCPUs outside 1..=16.
    Vcpus(String, u8),
    /// Memory that is 0 or not a multiple of 2 MiB.
    Memory(String, u64),
    /// A file that is empty, unaligned or not inside the bundle.
    BlobRange(String, Blob),
    /// A program of no parts or of too many.
    Segments(String, usize),
    /// A part whose file is longer than the memory it takes.
    Segment(String, u64),
    /// Something (its name, address and size) that is not in the VM's memory.
    Place(String, &'static str, u64, u64),
    /// Two things (their names and addresses) in one place.
    Overlap(String, (&'static str, u64), (&'static str, u64)),
    /// An entry point outside all segments, or at no instruction.
    Entry(String, u64),
    /// An image (what it is, and its size) that is larger than a bank of flash.
    Flash(String, &'static str, u64),
    /// A command line with a zero byte or too long.
    CommandLine(String),
    /// A file's CRC does not match.
    BlobCrc(Blob),
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("not a guest bundle; make one with `tidectl bundle`"),
            Self::Format(got) => write!(
                f,
                "bundle format {got}, this image reads {FORMAT}; pack it again with the tidectl built with this image"
            ),
            Self::Truncated { wanted, got } => write!(
                f,
                "bundle cut short: {got} of {wanted} bytes; check how the boot loader loads it"
            ),
            Self::ManifestCrc => f.write_str("bundle manifest damaged (CRC-32C); load it again"),
            Self::Manifest => f.write_str(
                "bundle manifest unreadable; pack it again with the tidectl built with this image",
            ),
            Self::NoVms => f.write_str("bundle without a VM; add a [[vm]] to its vms.toml"),
            Self::TooManyVms(count) => write!(f, "bundle with {count} VMs; {VMS_MAX} is the most"),
            Self::Name(name) => write!(
                f,
                "VM name {name:?}: 1 to {NAME_MAX} characters of A-Z a-z 0-9 . _ - are allowed, \
                 not digits alone"
            ),
            Self::DuplicateName(name) => write!(f, "two VMs are named {name:?}; rename one"),
            Self::Vcpus(name, vcpus) => {
                write!(
                    f,
                    "VM {name:?}: {vcpus} vCPUs; 1 to {VCPUS_MAX} are possible"
                )
            }
            Self::Memory(name, bytes) => {
                write!(
                    f,
                    "VM {name:?}: {bytes} bytes of memory; give a multiple of 2 MiB"
                )
            }
            Self::BlobRange(name, blob) => write!(
                f,
                "VM {name:?}: file at {:#x}+{:#x} is not inside the bundle; pack it again",
                blob.offset, blob.len
            ),
            Self::Segments(name, count) => write!(
                f,
                "VM {name:?}: a program of {count} segments; 1 to {SEGMENTS_MAX} are possible"
            ),
            Self::Segment(name, address) => write!(
                f,
                "VM {name:?}: segment at {address:#x}: its file is longer than its memory; pack it again"
            ),
            Self::Place(name, what, address, size) => write!(
                f,
                "VM {name:?}: {what} at {address:#x}+{size:#x} is not in its memory, which begins at \
                 {RAM_BASE:#x}; raise `memory`, or link it elsewhere"
            ),
            Self::Overlap(name, (what, address), (other, at)) => write!(
                f,
                "VM {name:?}: {what} at {address:#x} overlaps {other} at {at:#x}; link it elsewhere, \
                 or raise `memory`"
            ),
            Self::Entry(name, entry) => write!(
                f,
                "VM {name:?}: entry point {entry:#x} is in no segment; check how it was linked"
            ),
            Self::Flash(name, what, size) => write!(
                f,
                "VM {name:?}: its {what} has {size} bytes; a bank of flash has {FLASH_MAX}: give an image \
                 built for QEMU's virt"
            ),
            Self::CommandLine(name) => {
                write!(
                    f,
                    "VM {name:?}: command line with a zero byte or over 2047 bytes"
                )
            }
            Self::BlobCrc(blob) => write!(
                f,
                "file at {:#x}+{:#x} of the bundle damaged (CRC-32C); load it again",
                blob.offset, blob.len
            ),
        }
    }
}

impl core::error::Error for BundleError {}

impl<'a> Bundle<'a> {
    /// Reads and checks header and manifest.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BundleError> {
        let got = bytes.len() as u64;
        let magic_len = bytes.len().min(MAGIC.len());
        if bytes.get(..magic_len) != MAGIC.get(..magic_len) || bytes.is_empty() {
            return Err(BundleError::Magic);
        }
        let head: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(BundleError::Truncated {
            wanted: HEADER_LEN as u64,
            got,
        })?;
        let format = read_u32(head, 8);
        if format != FORMAT {
            return Err(BundleError::Format(format));
        }
        let manifest_end = HEADER_LEN as u64 + u64::from(read_u32(head, 12));
        let total = u64::from(read_u32(head, 16)) | u64::from(read_u32(head, 20)) << 32;
        let wanted = total.max(manifest_end);
        if got < wanted {
            return Err(BundleError::Truncated { wanted, got });
        }
        let manifest = usize::try_from(manifest_end)
            .ok()
            .and_then(|end| bytes.get(HEADER_LEN..end))
            .ok_or(BundleError::Truncated { wanted, got })?;
        if crc32c(manifest) != read_u32(head, 24) {
            return Err(BundleError::ManifestCrc);
        }
        let manifest = match postcard::take_from_bytes::<Manifest>(manifest) {
            Ok((manifest, [])) => manifest,
            _ => return Err(BundleError::Manifest),
        };
        manifest.check(manifest_end, total)?;
        Ok(Self { bytes, manifest })
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns a file's bytes once its CRC has been checked.
    ///
    /// # Errors
    /// [`BundleError::BlobCrc`]; [`BundleError::BlobRange`] if the blob is another bundle's.
    pub fn blob(&self, blob: Blob) -> Result<&'a [u8], BundleError> {
        let bytes = self
            .unchecked_blob(blob)
            .ok_or_else(|| BundleError::BlobRange(String::new(), blob))?;
        if crc32c(bytes) != blob.crc32c {
            return Err(BundleError::BlobCrc(blob));
        }
        Ok(bytes)
    }

    /// Returns a file's bytes without looking at its CRC; `None` if it is another bundle's.
    #[must_use]
    pub fn unchecked_blob(&self, blob: Blob) -> Option<&'a [u8]> {
        let start = usize::try_from(blob.offset).ok()?;
        let end = start.checked_add(usize::try_from(blob.len).ok()?)?;
        self.bytes.get(start..end)
    }
}

/// Reads a `u32` at a constant offset inside the header.
fn read_u32(head: &[u8; HEADER_LEN], at: usize) -> u32 {
    head.get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
