//! Words into accesses: the encodings of loads and stores (DDI 0487, C4.1.94).

use crate::{Access, Addressing, Data, Direction, Extend, Extension, Register, Size, VectorSize};

/// Bits `high` to `low` of a word.
const fn field(word: u32, high: u32, low: u32) -> u32 {
    word >> low & (u32::MAX >> (31 - (high - low)))
}

const fn bit(word: u32, at: u32) -> bool {
    word >> at & 1 != 0
}

/// A signed field.
const fn signed(word: u32, high: u32, low: u32) -> i64 {
    let unused = 63 - (high - low);
    (field(word, high, low) as i64) << unused >> unused
}

const fn register(word: u32, low: u32) -> Register {
    Register::new(word >> low)
}

const fn direction(load: bool) -> Direction {
    if load {
        Direction::Load
    } else {
        Direction::Store
    }
}

impl Access {
    /// Says what a word is, if it is a load or a store that can be done here.
    pub fn decode(word: u32) -> Option<Self> {
        // Bits 29:23, less bit 26, which chooses the registers in most classes.
        match (field(word, 29, 27), field(word, 25, 24)) {
            (0b001, 0b00) if bit(word, 26) => structures(word),
            (0b001, 0b01) if bit(word, 26) => single_structure(word),
            (0b001, 0b00) => ordered(word),
            (0b011, 0b01) if !bit(word, 26) => ordered_unscaled(word),
            (0b101, _) if !bit(word, 25) => pair(word),
            (0b111, 0b01) => single(word, Addressing::Offset, |scale| {
                i64::from(field(word, 21, 10)) << scale
            }),
            (0b111, 0b00) if !bit(word, 21) => {
                let offset = |_| signed(word, 20, 12);
                match field(word, 11, 10) {
                    0b00 => single(word, Addressing::Offset, offset),
                    0b01 => single(word, Addressing::PostIndex, offset),
                    // LDTR and STTR: general registers only.
                    0b10 if !bit(word, 26) => single(word, Addressing::Offset, offset),
                    0b11 => single(word, Addressing::PreIndex, offset),
                    _ => None,
                }
            }
            (0b111, 0b00) if field(word, 11, 10) == 0b10 => indexed(word),
            (0b111, 0b00) => load_acquire_pc(word),
            _ => None,
        }
    }
}

/// The data of LDR and STR of all kinds, and log2 of its size: `size`, `V` and `opc`.
fn single_data(word: u32) -> Option<(Direction, Data, u32)> {
    let (size, opc) = (field(word, 31, 30), field(word, 23, 22));
    let first = register(word, 0);
    if bit(word, 26) {
        let (scale, vector) = match (opc >> 1, size) {
            (0, _) => (size, VectorSize::Scalar(Size::from_log2(size))),
            (_, 0) => (4, VectorSize::Quad),
            _ => return None,
        };
        let data = Data::Vector {
            first,
            second: None,
            size: vector,
        };
        return Some((direction(opc & 1 != 0), data, scale));
    }
    let (direction, extension) = match (opc, size) {
        (0, _) => (Direction::Store, Extension::Zero),
        (1, _) => (Direction::Load, Extension::Zero),
        // Size 3 is PRFM.
        (2, 0..=2) => (Direction::Load, Extension::SignTo64),
        (3, 0..=1) => (Direction::Load, Extension::SignTo32),
        _ => return None,
    };
    let data = Data::General {
        first,
        second: None,
        size: Size::from_log2(size),
        extension,
    };
    Some((direction, data, size))
}

/// LDR, STR, LDUR, STUR, LDTR, STTR, by an immediate that `offset` makes, given the scale.
fn single(
    word: u32,
    addressing: fn(i64) -> Addressing,
    offset: impl Fn(u32) -> i64,
) -> Option<Access> {
    let (direction, data, scale) = single_data(word)?;
    Some(Access {
        direction,
        base: register(word, 5),
        addressing: addressing(offset(scale)),
        data,
    })
}

/// LDR and STR by a register.
fn indexed(word: u32) -> Option<Access> {
    let (direction, data, scale) = single_data(word)?;
    let extend = match field(word, 15, 13) {
        0b010 => Extend::Unsigned,
        0b011 | 0b111 => Extend::Whole,
        0b110 => Extend::Signed,
        _ => return None,
    };
    let shift = if bit(word, 12) { scale as u8 } else { 0 };
    Some(Access {
        direction,
        base: register(word, 5),
        addressing: Addressing::Index(register(word, 16), extend, shift),
        data,
    })
}

/// LDAPR, which stands among the atomics.
fn load_acquire_pc(word: u32) -> Option<Access> {
    if word & 0x3fff_fc00 != 0x38bf_c000 {
        return None;
    }
    Some(Access {
        direction: Direction::Load,
        base: register(word, 5),
        addressing: Addressing::Offset(0),
        data: Data::General {
            first: register(word, 0),
            second: None,
            size: Size::from_log2(field(word, 31, 30)),
            extension: Extension::Zero,
        },
    })
}

/// LDAR, STLR, LDLAR, STLLR. The exclusives and CAS of this class are refused; so is what has other than
/// ones where there should be ones (Rs, Rt2).
fn ordered(word: u32) -> Option<Access> {
    if !bit(word, 23) || bit(word, 21) || field(word, 20, 16) != 31 || field(word, 14, 10) != 31 {
        return None;
    }
    Some(Access {
        direction: direction(bit(word, 22)),
        base: register(word, 5),
        addressing: Addressing::Offset(0),
        data: Data::General {
            first: register(word, 0),
            second: None,
            size: Size::from_log2(field(word, 31, 30)),
            extension: Extension::Zero,
        },
    })
}

/// LDAPUR and STLUR. Bits 21 and 11:10 are other instructions (MTE, MOPS).
fn ordered_unscaled(word: u32) -> Option<Access> {
    if bit(word, 21) || field(word, 11, 10) != 0 {
        return None;
    }
    single(word, Addressing::Offset, |_| signed(word, 20, 12))
}

/// LDP, STP, LDPSW, LDNP, STNP.
fn pair(word: u32) -> Option<Access> {
    let (opc, load) = (field(word, 31, 30), bit(word, 22));
    let (first, second) = (register(word, 0), Some(register(word, 10)));
    let kind = field(word, 24, 23);
    let (scale, data) = if bit(word, 26) {
        let size = match opc {
            0 => VectorSize::Scalar(Size::Word),
            1 => VectorSize::Scalar(Size::Double),
            2 => VectorSize::Quad,
            _ => return None,
        };
        let data = Data::Vector {
            first,
            second,
            size,
        };
        (2 + opc, data)
    } else {
        let (size, extension) = match (opc, load) {
            (0, _) => (Size::Word, Extension::Zero),
            // There is no LDNPSW; the store's place is STGP's.
            (1, true) if kind != 0 => (Size::Word, Extension::SignTo64),
            (2, _) => (Size::Double, Extension::Zero),
            _ => return None,
        };
        let data = Data::General {
            first,
            second,
            size,
            extension,
        };
        (2 + (opc >> 1), data)
    };
    let offset = signed(word, 21, 15) << scale;
    Some(Access {
        direction: direction(load),
        base: register(word, 5),
        addressing: match kind {
            0 | 2 => Addressing::Offset(offset),
            1 => Addressing::PostIndex(offset),
            _ => Addressing::PreIndex(offset),
        },
        data,
    })
}

/// How a structure's base moves on: bit 23 and Rm, where 31 stands for the size.
fn structure_access(word: u32, data: Data) -> Option<Access> {
    let moved = field(word, 20, 16);
    let mut access = Access {
        direction: direction(bit(word, 22)),
        base: register(word, 5),
        addressing: Addressing::Offset(0),
        data,
    };
    access.addressing = match (bit(word, 23), moved) {
        (false, 0) => Addressing::Offset(0),
        // LDAP1, STL1, or nothing.
        (false, _) => return None,
        (true, 31) => Addressing::PostIndex(i64::from(access.bytes())),
        (true, _) => Addressing::PostIndexRegister(Register::new(moved)),
    };
    Some(access)
}

/// LD1 to LD4 and ST1 to ST4, multiple structures.
fn structures(word: u32) -> Option<Access> {
    if bit(word, 31) || bit(word, 21) {
        return None;
    }
    let (count, structure) = match field(word, 15, 12) {
        0b0000 => (4, 4),
        0b0010 => (4, 1),
        0b0100 => (3, 3),
        0b0110 => (3, 1),
        0b0111 => (1, 1),
        0b1000 => (2, 2),
        0b1010 => (2, 1),
        _ => return None,
    };
    let (log2, wide) = (field(word, 11, 10), bit(word, 30));
    // A structure of vectors with one element each (1D) is reserved.
    if log2 == 3 && !wide && structure != 1 {
        return None;
    }
    let data = Data::Structures {
        first: register(word, 0),
        count,
        structure,
        size: Size::from_log2(log2),
        lanes: (if wide { 16 } else { 8 }) >> log2,
    };
    structure_access(word, data)
}

/// LD1 to LD4 and ST1 to ST4, single structure, and LD1R to LD4R.
fn single_structure(word: u32) -> Option<Access> {
    if bit(word, 31) {
        return None;
    }
    let (opcode, size) = (field(word, 15, 13), field(word, 11, 10));
    let count = ((opcode & 1) << 1 | field(word, 21, 21)) as u8 + 1;
    let first = register(word, 0);
    let (wide, high) = (field(word, 30, 30), field(word, 12, 12));
    let (log2, lane) = match (opcode >> 1, size) {
        (0, _) => (0, wide << 3 | high << 2 | size),
        (1, 0 | 2) => (1, wide << 2 | high << 1 | size >> 1),
        (2, 0) => (2, wide << 1 | high),
        (2, 1) if high == 0 => (3, wide),
        (3, _) if bit(word, 22) && high == 0 => {
            let data = Data::Replicate {
                first,
                count,
                size: Size::from_log2(size),
                lanes: (8 << wide) >> size,
            };
            return structure_access(word, data);
        }
        _ => return None,
    };
    let data = Data::Lane {
        first,
        count,
        size: Size::from_log2(log2),
        lane: lane as u8,
    };
    structure_access(word, data)
}
