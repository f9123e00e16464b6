//! Kernels in the forms they come in: ELF files made of given segments, and packed Images.

use std::io::Write;

use anyhow::Result;
use flate2::Compression;
use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// A segment of an ELF file.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its physical address.
    pub address: u64,
    /// Its virtual address.
    pub linked: u64,
    /// Its part in the file.
    pub file: Vec<u8>,
    /// What it takes of memory.
    pub memory: u64,
}

/// A little-endian 64-bit ELF program for `machine` (183 is aarch64).
#[must_use]
pub fn elf(machine: u16, entry: u64, segments: &[Segment]) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend(2u16.to_le_bytes());
    out.extend(machine.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    out.extend(entry.to_le_bytes());
    out.extend((HEADER as u64).to_le_bytes());
    out.extend([0; 12]);
    let count = segments.len() as u16;
    for half in [HEADER as u16, PROGRAM_HEADER as u16, count, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    let mut offset = HEADER + PROGRAM_HEADER * segments.len();
    for segment in segments {
        const LOAD: u32 = 1;
        const READ_WRITE_EXECUTE: u32 = 7;
        out.extend(LOAD.to_le_bytes());
        out.extend(READ_WRITE_EXECUTE.to_le_bytes());
        for word in [
            offset as u64,
            segment.linked,
            segment.address,
            segment.file.len() as u64,
            segment.memory,
            8,
        ] {
            out.extend(word.to_le_bytes());
        }
        offset += segment.file.len();
    }
    for segment in segments {
        out.extend(&segment.file);
    }
    out
}

/// Packed by gzip.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Packed by zstd.
#[must_use]
pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

/// An EFI zboot image around what was packed by `packer`, as Linux's build makes it: the
/// unpacked length follows the packed part.
#[must_use]
pub fn zboot(packer: &str, packed: &[u8], unpacked: u32) -> Vec<u8> {
    const PAYLOAD: u32 = 0x400;
    let mut out = b"MZ\0\0zimg".to_vec();
    out.extend(PAYLOAD.to_le_bytes());
    out.extend((packed.len() as u32).to_le_bytes());
    out.extend([0; 8]);
    out.extend(packer.as_bytes());
    out.resize(0x38, 0);
    out.extend([0xcd, 0x23, 0x82, 0x81]);
    out.resize(PAYLOAD as usize, 0x5a);
    out.extend(packed);
    out.extend(unpacked.to_le_bytes());
    out
}

#[cfg(test)]
mod tests;
