//! CRC-32C, the one checksum of frames and bundles.
//!
//! The table form of the `crc` crate: portable, and the same code at both ends. The CPU's
//! own CRC32C instructions are optional in Armv8.0, so they are not relied on.

use crc::{CRC_32_ISCSI, Crc, Digest, Table};

static TABLE: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// What the CRC-32C of any bytes followed by their own CRC-32C (little-endian) is.
pub const RESIDUE: u32 = Crc::<u32, Table<1>>::new(&CRC_32_ISCSI).checksum(&[0; 4]);

/// Computes the CRC-32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    TABLE.checksum(bytes)
}

/// A CRC-32C computed piece by piece.
#[derive(Clone)]
pub struct Crc32c(Digest<'static, u32, Table<16>>);

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

impl Crc32c {
    /// Starts with no bytes.
    #[must_use]
    pub fn new() -> Self {
        Self(TABLE.digest())
    }

    /// Adds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the CRC-32C of all bytes added.
    #[must_use]
    pub fn finish(self) -> u32 {
        self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_value_is_the_published_one() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn residue_holds_for_any_message() {
        for message in [&b""[..], b"a", b"tidemark", &[0xFF; 300]] {
            let mut crc = Crc32c::new();
            crc.update(message);
            crc.update(&crc32c(message).to_le_bytes());
            assert_eq!(crc.finish(), RESIDUE);
        }
    }
}
