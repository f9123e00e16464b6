//! CRC-32C by the CPU's own instructions (FEAT_CRC32), eight bytes at a time, where they
//! are there; by `wire`'s table otherwise. For the guests' files, which are long.

use aarch64_cpu::registers::ID_AA64ISAR0_EL1;
use core::arch::asm;
use tidemark_wire::checksum;
use tock_registers::interfaces::Readable;

/// A CRC-32C computed piece by piece.
pub enum Crc32c {
    /// The register, inverted as the algorithm has it.
    Instructions(u32),
    /// The portable one.
    Table(checksum::Crc32c),
}

impl Crc32c {
    /// Starts with no bytes.
    pub fn new() -> Self {
        if ID_AA64ISAR0_EL1.get() >> 16 & 0xf != 0 {
            Self::Instructions(!0)
        } else {
            Self::Table(checksum::Crc32c::new())
        }
    }

    /// Adds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Table(table) => table.update(bytes),
            Self::Instructions(crc) => {
                let mut words = bytes.chunks_exact(8);
                for word in words.by_ref() {
                    // Chunks of exactly eight.
                    let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
                    // SAFETY: FEAT_CRC32 is there (`new`); the instruction only computes.
                    unsafe {
                        asm!(".arch_extension crc", "crc32cx {0:w}, {0:w}, {1}",
                            inout(reg) *crc, in(reg) word,
                            options(pure, nomem, nostack, preserves_flags));
                    }
                }
                for &byte in words.remainder() {
                    // SAFETY: as above.
                    unsafe {
                        asm!(".arch_extension crc", "crc32cb {0:w}, {0:w}, {1:w}",
                            inout(reg) *crc, in(reg) u32::from(byte),
                            options(pure, nomem, nostack, preserves_flags));
                    }
                }
            }
        }
    }

    /// The CRC-32C of all bytes added.
    pub fn finish(self) -> u32 {
        match self {
            Self::Instructions(crc) => !crc,
            Self::Table(table) => table.finish(),
        }
    }
}
