//! Doing an access: registers and the bus, element by element.

use crate::{Access, Addressing, Data, Direction, Extend, Extension, Register, Size, VectorSize};

/// The most elements that one instruction has: LD4 of four vectors of 16 bytes.
pub const MAX_ELEMENTS: usize = 64;

/// The registers of the CPU that the instruction is of.
pub trait Registers {
    /// Reads a general register; 31 is zero.
    fn x(&self, register: Register) -> u64;
    /// Writes a general register; 31 is dropped.
    fn set_x(&mut self, register: Register, value: u64);
    /// Reads the stack pointer in use.
    fn sp(&self) -> u64;
    /// Writes it.
    fn set_sp(&mut self, value: u64);
    /// Reads a SIMD&FP register.
    fn v(&self, register: Register) -> u128;
    /// Writes a SIMD&FP register.
    fn set_v(&mut self, register: Register, value: u128);
}

/// How the CPU takes the bytes of data (`SCTLR_EL1.EE`, `E0E`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endianness {
    /// The byte with the lowest address is the least significant.
    Little,
    /// The other way round.
    Big,
}

/// One access on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    /// From the instruction's address.
    pub offset: u8,
    /// How wide.
    pub size: Size,
}

/// Where an element is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    General(Register, Extension),
    /// From a byte on; what is loaded first leaves zeros in all others.
    Vector(Register, u8, Others),
    /// In all of the lanes, of which there are so many, and zeros after them.
    Lanes(Register, u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    Zeros,
    Kept,
}

impl Access {
    /// Gives the address of the first byte.
    pub fn address(&self, registers: &impl Registers) -> u64 {
        let base = self.base(registers);
        match self.addressing {
            Addressing::Offset(offset) | Addressing::PreIndex(offset) => {
                base.wrapping_add_signed(offset)
            }
            Addressing::PostIndex(_) | Addressing::PostIndexRegister(_) => base,
            Addressing::Index(index, extend, shift) => {
                let index = registers.x(index);
                let index = match extend {
                    Extend::Whole => index,
                    Extend::Unsigned => u64::from(index as u32),
                    Extend::Signed => i64::from(index as i32) as u64,
                };
                base.wrapping_add(index << shift)
            }
        }
    }

    /// Does it: each element in turn goes over the `bus`, which takes the value of a store, and gives that of a load as
    /// a little-endian CPU would see it.
    ///
    /// A load into its own base register with write-back is CONSTRAINED UNPREDICTABLE: the new base stays, as on QEMU. So is a
    /// pair into one register: the second stays. A store of its base stores what it was before.
    pub fn perform(
        &self,
        registers: &mut impl Registers,
        endianness: Endianness,
        mut bus: impl FnMut(Element, Option<u64>) -> u64,
    ) {
        let base = self.base(registers);
        let moved = match self.addressing {
            Addressing::PreIndex(offset) | Addressing::PostIndex(offset) => {
                Some(base.wrapping_add_signed(offset))
            }
            Addressing::PostIndexRegister(index) => Some(base.wrapping_add(registers.x(index))),
            Addressing::Offset(_) | Addressing::Index(..) => None,
        };
        self.each(endianness, |element, place| match self.direction {
            Direction::Load => {
                let value = ordered(bus(element, None), element.size, endianness);
                load(registers, place, element.size, value);
            }
            Direction::Store => {
                let value = stored(registers, place, element.size);
                bus(element, Some(ordered(value, element.size, endianness)));
            }
        });
        match moved {
            Some(moved) if self.base.number() == 31 => registers.set_sp(moved),
            Some(moved) => registers.set_x(self.base, moved),
            None => {}
        }
    }

    fn base(&self, registers: &impl Registers) -> u64 {
        match self.base.number() {
            31 => registers.sp(),
            _ => registers.x(self.base),
        }
    }

    /// Goes through the elements in the order of their addresses.
    fn each(&self, endianness: Endianness, mut visit: impl FnMut(Element, Place)) {
        let mut offset = 0;
        let mut next = |size: Size, place| {
            visit(Element { offset, size }, place);
            offset += size.bytes();
        };
        match self.data {
            Data::General {
                first,
                second,
                size,
                extension,
            } => {
                for register in core::iter::once(first).chain(second) {
                    next(size, Place::General(register, extension));
                }
            }
            Data::Vector {
                first,
                second,
                size,
            } => {
                for register in core::iter::once(first).chain(second) {
                    match size {
                        VectorSize::Scalar(size) => {
                            next(size, Place::Vector(register, 0, Others::Zeros));
                        }
                        // One value of 128 bits, in two accesses (B2.2.1): its endianness is that of the whole.
                        VectorSize::Quad => {
                            let halves = match endianness {
                                Endianness::Little => [0, 8],
                                Endianness::Big => [8, 0],
                            };
                            next(
                                Size::Double,
                                Place::Vector(register, halves[0], Others::Zeros),
                            );
                            next(
                                Size::Double,
                                Place::Vector(register, halves[1], Others::Kept),
                            );
                        }
                    }
                }
            }
            Data::Structures {
                first,
                count,
                structure,
                size,
                lanes,
            } => {
                // Vector by vector, or all the vectors of a structure at once.
                for group in (0..count).step_by(usize::from(structure.max(1))) {
                    for lane in 0..lanes {
                        for vector in 0..structure {
                            let others = match lane {
                                0 => Others::Zeros,
                                _ => Others::Kept,
                            };
                            let register = first.after(group + vector);
                            next(size, Place::Vector(register, lane * size.bytes(), others));
                        }
                    }
                }
            }
            Data::Lane {
                first,
                count,
                size,
                lane,
            } => {
                for vector in 0..count {
                    let byte = lane * size.bytes();
                    next(size, Place::Vector(first.after(vector), byte, Others::Kept));
                }
            }
            Data::Replicate {
                first,
                count,
                size,
                lanes,
            } => {
                for vector in 0..count {
                    next(size, Place::Lanes(first.after(vector), lanes));
                }
            }
        }
    }
}

/// A value's own bits.
const fn low(value: u64, size: Size) -> u64 {
    value & (u64::MAX >> (64 - size.bits()))
}

/// A value as the other side of the bus has it.
const fn ordered(value: u64, size: Size, endianness: Endianness) -> u64 {
    match endianness {
        Endianness::Little => low(value, size),
        Endianness::Big => value.swap_bytes() >> (64 - size.bits()),
    }
}

fn load(registers: &mut impl Registers, place: Place, size: Size, value: u64) {
    match place {
        Place::General(register, extension) => {
            let unused = 64 - size.bits();
            let sign = ((value << unused) as i64 >> unused) as u64;
            let value = match extension {
                Extension::Zero => value,
                Extension::SignTo32 => sign & 0xffff_ffff,
                Extension::SignTo64 => sign,
            };
            registers.set_x(register, value);
        }
        Place::Vector(register, byte, others) => {
            let kept = match others {
                Others::Zeros => 0,
                Others::Kept => {
                    let own = u128::from(low(u64::MAX, size)) << (8 * byte);
                    registers.v(register) & !own
                }
            };
            registers.set_v(register, kept | u128::from(value) << (8 * byte));
        }
        Place::Lanes(register, lanes) => {
            let all = (0..lanes).fold(0, |all, lane| {
                all | u128::from(value) << (8 * lane * size.bytes())
            });
            registers.set_v(register, all);
        }
    }
}

fn stored(registers: &impl Registers, place: Place, size: Size) -> u64 {
    let value = match place {
        Place::General(register, _) => registers.x(register),
        Place::Vector(register, byte, _) => (registers.v(register) >> (8 * byte)) as u64,
        // No store is made of all lanes.
        Place::Lanes(register, _) => registers.v(register) as u64,
    };
    low(value, size)
}
