//! Another decoder, written by others from the same manual, says the same of words at random, in both directions: what
//! it calls a load or a store of the kinds that are done here is decoded to the same, and nothing else is decoded at all.

use std::string::{String, ToString};

use proptest::prelude::*;
use yaxpeax_arch::{Decoder, U8Reader};
use yaxpeax_arm::armv8::a64::{
    InstDecoder, Instruction, Operand, SIMDSizeCode, ShiftStyle, SizeCode,
};

use crate::{Access, Addressing, Data, Direction, Extend, Extension, Register, Size, VectorSize};

fn reg(n: u16) -> Register {
    Register::new(u32::from(n))
}

fn simd(size: SIMDSizeCode) -> Option<Size> {
    Some(match size {
        SIMDSizeCode::B => Size::Byte,
        SIMDSizeCode::H => Size::Half,
        SIMDSizeCode::S => Size::Word,
        SIMDSizeCode::D => Size::Double,
        SIMDSizeCode::Q => return None,
    })
}

fn instruction(word: u32) -> Option<Instruction> {
    InstDecoder::default()
        .decode(&mut U8Reader::new(&word.to_le_bytes()))
        .ok()
}

/// The size that a mnemonic's last letters give, and the extension.
fn suffix(letters: &str, whole: Size, wide: bool) -> Option<(Size, Extension)> {
    let signed = if wide {
        Extension::SignTo64
    } else {
        Extension::SignTo32
    };
    Some(match letters {
        "" => (whole, Extension::Zero),
        "b" => (Size::Byte, Extension::Zero),
        "h" => (Size::Half, Extension::Zero),
        "sb" => (Size::Byte, signed),
        "sh" => (Size::Half, signed),
        "sw" => (Size::Word, signed),
        _ => return None,
    })
}

/// What the other decoder takes for instructions although the manual does not (GNU objdump calls them undefined, too).
fn unallocated(word: u32) -> bool {
    let bit = |at: u32| word >> at & 1 != 0;
    let structures = word >> 24 & 0x3e == 0x0c;
    let multiple = structures && !bit(24);
    let one_lane = multiple && word & 0x4000_0c00 == 0x0c00;
    let interleaved = matches!(word >> 12 & 0xf, 0 | 4 | 8);
    let ordered = word & 0x3fa0_0000 == 0x0880_0000;
    let acquire_pc = word & 0x3fe0_fc00 == 0x38a0_c000;
    // Bit 31 of structures; bit 21 of multiple ones; 1D where there is more than one vector to a structure.
    structures && bit(31)
        || multiple && bit(21)
        || one_lane && interleaved
        // Rs and Rt2 of LDAR, STLR, LDAPR, which should be ones.
        || ordered && word & 0x001f_7c00 != 0x001f_7c00
        || acquire_pc && word & 0x001f_0000 != 0x001f_0000
}

/// What the other decoder says, in our words; `None` for all that is not done here.
fn theirs(word: u32) -> Option<Access> {
    if unallocated(word) {
        return None;
    }
    let instruction = instruction(word)?;
    let text = instruction.to_string();
    let mnemonic: String = text.split(' ').next()?.into();
    let direction = match mnemonic.get(..2)? {
        "ld" => Direction::Load,
        "st" => Direction::Store,
        _ => return None,
    };
    let operands = instruction.operands;
    let single = [
        "ldapur", "ldapr", "ldlar", "ldar", "ldtr", "ldur", "ldr", "stllr", "stlur", "stlr",
        "sttr", "stur", "str",
    ];
    let pair = ["ldp", "ldnp", "stp", "stnp"];
    let letters = single.iter().find_map(|base| mnemonic.strip_prefix(base));
    let (data, memory) = match operands[0] {
        Operand::Register(width, first) if letters.is_some() => {
            let wide = width == SizeCode::X;
            let whole = if wide { Size::Double } else { Size::Word };
            let (size, extension) = suffix(letters?, whole, wide)?;
            let data = Data::General {
                first: reg(first),
                second: None,
                size,
                extension,
            };
            (data, operands[1])
        }
        Operand::SIMDRegister(size, first) if letters == Some("") => {
            let size = simd(size).map_or(VectorSize::Quad, VectorSize::Scalar);
            let data = Data::Vector {
                first: reg(first),
                second: None,
                size,
            };
            (data, operands[1])
        }
        Operand::Register(width, first) if pair.contains(&&*mnemonic) || mnemonic == "ldpsw" => {
            let Operand::Register(_, second) = operands[1] else {
                return None;
            };
            let (size, extension) = match (&*mnemonic, width) {
                ("ldpsw", _) => (Size::Word, Extension::SignTo64),
                (_, SizeCode::W) => (Size::Word, Extension::Zero),
                (_, SizeCode::X) => (Size::Double, Extension::Zero),
            };
            let data = Data::General {
                first: reg(first),
                second: Some(reg(second)),
                size,
                extension,
            };
            (data, operands[2])
        }
        Operand::SIMDRegister(size, first) if pair.contains(&&*mnemonic) => {
            let Operand::SIMDRegister(_, second) = operands[1] else {
                return None;
            };
            let size = simd(size).map_or(VectorSize::Quad, VectorSize::Scalar);
            let data = Data::Vector {
                first: reg(first),
                second: Some(reg(second)),
                size,
            };
            (data, operands[2])
        }
        Operand::SIMDRegisterGroup(vector, first, lane, count) => {
            let size = simd(lane)?;
            let bytes = if vector == SIMDSizeCode::Q { 16 } else { 8 };
            let lanes = bytes / size.bytes();
            let number = mnemonic.as_bytes()[2] - b'0';
            let data = match mnemonic.get(3..)? {
                "r" => Data::Replicate {
                    first: reg(first),
                    count,
                    size,
                    lanes,
                },
                _ => Data::Structures {
                    first: reg(first),
                    count,
                    structure: number,
                    size,
                    lanes,
                },
            };
            (data, operands[1])
        }
        Operand::SIMDRegisterGroupLane(first, lane_size, count, lane) => {
            let data = Data::Lane {
                first: reg(first),
                count,
                size: simd(lane_size)?,
                lane,
            };
            (data, operands[1])
        }
        _ => return None,
    };
    let (base, addressing) = match memory {
        Operand::RegPreIndex(base, offset, false) => (base, Addressing::Offset(i64::from(offset))),
        Operand::RegPreIndex(base, offset, true) => (base, Addressing::PreIndex(i64::from(offset))),
        Operand::RegPostIndex(base, offset) => (base, Addressing::PostIndex(i64::from(offset))),
        Operand::RegPostIndexReg(base, index) => (base, Addressing::PostIndexRegister(reg(index))),
        Operand::RegRegOffset(base, index, width, style, shift) => {
            let extend = match (style, width) {
                (ShiftStyle::UXTW, _) => Extend::Unsigned,
                (ShiftStyle::SXTW, _) => Extend::Signed,
                (ShiftStyle::LSL | ShiftStyle::UXTX | ShiftStyle::SXTX, _) => Extend::Whole,
                _ => return None,
            };
            (base, Addressing::Index(reg(index), extend, shift))
        }
        _ => return None,
    };
    Some(Access {
        direction,
        base: reg(base),
        addressing,
        data,
    })
}

/// Words of the loads and stores' part of the encodings (bit 27 set, bit 25 clear), and of all of it now and then.
fn words() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => any::<u32>().prop_map(|word| word & !(1 << 25) | 1 << 27),
        // LDAR and its like have ones where there should be; so has LDAPR.
        1 => any::<u32>().prop_map(|word| word & 0xc0c0_83ff | 0x0880_7c00 | 0x001f_0000),
        1 => any::<u32>().prop_map(|word| word & 0xc000_03ff | 0x38bf_c000),
        // Structures with nothing where Rm is.
        2 => any::<u32>().prop_map(|word| word & 0x4140_ffff | 0x0c00_0000),
        1 => any::<u32>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200_000))]

    #[test]
    fn the_other_decoder_says_the_same(word in words()) {
        let (ours, other) = (Access::decode(word), theirs(word));
        let text = instruction(word).map(|known| known.to_string());
        prop_assert_eq!(ours, other, "{:#010x}: {:?}", word, text);
    }
}
