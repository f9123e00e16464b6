//! A64 loads and stores: what an instruction word says, and doing it.
//!
//! # Purpose
//!
//! An access to an emulated device that carries a syndrome (ISS.ISV) says itself what it is. One without (write-back, pairs,
//! SIMD) has to be read from the guest's memory; [`Access::decode`] says what it is, and [`Access::perform`] does it.
//! Nothing here reads memory or touches a register: the CPU's registers are a trait, the bus is a closure.
//!
//! # What is decoded
//!
//! Loads and stores of general registers, single and in pairs, ordered and unprivileged; of SIMD&FP registers, single, in pairs,
//! and as structures (LD1 to LD4, ST1 to ST4, LD1R to LD4R). Not decoded, because they have no access to emulate or none that could
//! be done here: exclusives and atomics (a device has no monitor), prefetches (never abort), literals, and what belongs to
//! extensions that guests do not see (pointer authentication, MTE, LS64, MOPS, SVE).
//!
//! # Invariants
//!
//! - A word that is unallocated or UNDEFINED is not decoded: words that are decoded are what any other decoder says they are (the tests ask one).
//! - [`Access::perform`] makes at most [`MAX_ELEMENTS`] accesses and touches nothing but the registers that the instruction names.
//!
//! Specification: DDI 0487, C4.1.94 (encodings), C6.2 and C7.2 (operation), B2.6 (endianness).
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod decode;
mod perform;
#[cfg(test)]
mod tests;

pub use perform::{Element, Endianness, MAX_ELEMENTS, Registers};

/// The number of a register, 0 to 31.
///
/// What 31 means is the field's affair: the zero register as data, the stack pointer as base, v31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register(u8);

impl Register {
    /// Takes the low five bits.
    pub const fn new(field: u32) -> Self {
        Self((field & 0x1f) as u8)
    }

    /// Gives the number.
    pub const fn number(self) -> usize {
        self.0 as usize
    }

    /// The register `n` further on, v0 after v31.
    const fn after(self, n: u8) -> Self {
        Self(self.0.wrapping_add(n) & 0x1f)
    }
}

/// How wide one access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Half,
    /// 32 bits.
    Word,
    /// 64 bits.
    Double,
}

impl Size {
    /// Takes log2 of the bytes, from the low two bits.
    pub const fn from_log2(log2: u32) -> Self {
        match log2 & 3 {
            0 => Self::Byte,
            1 => Self::Half,
            2 => Self::Word,
            _ => Self::Double,
        }
    }

    /// Gives log2 of the bytes.
    pub const fn log2(self) -> u8 {
        match self {
            Self::Byte => 0,
            Self::Half => 1,
            Self::Word => 2,
            Self::Double => 3,
        }
    }

    /// Gives the number of bytes.
    pub const fn bytes(self) -> u8 {
        1 << self.log2()
    }

    const fn bits(self) -> u32 {
        8 * self.bytes() as u32
    }
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into registers.
    Load,
    /// Into memory.
    Store,
}

/// How the address is made of the base register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// Base and offset.
    Offset(i64),
    /// Base and offset, and the base register becomes that.
    PreIndex(i64),
    /// The base; then it is moved on by the offset.
    PostIndex(i64),
    /// The base; then it is moved on by a register.
    PostIndexRegister(Register),
    /// Base and another register, extended and shifted left.
    Index(Register, Extend, u8),
}

/// How an index register becomes 64 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extend {
    /// It is.
    Whole,
    /// Its low 32 bits, unsigned.
    Unsigned,
    /// Its low 32 bits, signed.
    Signed,
}

/// What a general register gets of a narrower load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Zeros above.
    Zero,
    /// The sign, up to bit 31, and zeros above.
    SignTo32,
    /// The sign.
    SignTo64,
}

/// The size of a SIMD&FP register as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorSize {
    /// B, H, S or D.
    Scalar(Size),
    /// Q.
    Quad,
}

impl VectorSize {
    const fn bytes(self) -> u8 {
        match self {
            Self::Scalar(size) => size.bytes(),
            Self::Quad => 16,
        }
    }
}

/// What is loaded or stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// One or two general registers.
    General {
        /// The first.
        first: Register,
        /// The second of a pair.
        second: Option<Register>,
        /// Of each in memory.
        size: Size,
        /// Of each in the register.
        extension: Extension,
    },
    /// One or two SIMD&FP registers.
    Vector {
        /// The first.
        first: Register,
        /// The second of a pair.
        second: Option<Register>,
        /// Of each.
        size: VectorSize,
    },
    /// All elements of one to four vectors, one vector after the other (`structure` 1) or interleaved.
    Structures {
        /// The first of the vectors.
        first: Register,
        /// How many.
        count: u8,
        /// How many of them make a structure.
        structure: u8,
        /// Of an element.
        size: Size,
        /// How many of each vector.
        lanes: u8,
    },
    /// The same lane of one to four vectors.
    Lane {
        /// The first of the vectors.
        first: Register,
        /// How many.
        count: u8,
        /// Of an element.
        size: Size,
        /// Which lane.
        lane: u8,
    },
    /// One element into all lanes of a vector, of one to four vectors.
    Replicate {
        /// The first of the vectors.
        first: Register,
        /// How many.
        count: u8,
        /// Of an element.
        size: Size,
        /// How many lanes.
        lanes: u8,
    },
}

/// A load or a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Which way.
    pub direction: Direction,
    /// The base register; 31 is the stack pointer.
    pub base: Register,
    /// The address.
    pub addressing: Addressing,
    /// The data.
    pub data: Data,
}

/// Says whether a word can be an instruction that accesses memory: the class of loads and stores, decoded here or not, and
/// SYS, where DC ZVA is (DDI 0487, C4.1).
pub const fn accesses_memory(word: u32) -> bool {
    word & (1 << 27 | 1 << 25) == 1 << 27 || word & 0xfff8_0000 == 0xd508_0000
}

impl Access {
    /// Says how many bytes of memory it is about, 1 to 64, all in one piece.
    pub const fn bytes(&self) -> u8 {
        match self.data {
            Data::General { second, size, .. } => size.bytes() << second.is_some() as u8,
            Data::Vector { second, size, .. } => size.bytes() << second.is_some() as u8,
            Data::Structures {
                count, size, lanes, ..
            } => count * lanes * size.bytes(),
            Data::Lane { count, size, .. } | Data::Replicate { count, size, .. } => {
                count * size.bytes()
            }
        }
    }
}
