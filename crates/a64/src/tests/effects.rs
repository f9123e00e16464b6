//! What instructions do to registers and memory. The words are GNU as's for the text beside them.

use std::vec::Vec;

use crate::{Access, Direction, Element, Endianness, Register, Registers, Size, accesses_memory};

/// A CPU and 256 bytes of memory, byte `n` of which holds `n + 1`, around the address in x2 and SP.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    x: [u64; 31],
    sp: u64,
    v: [u128; 32],
    memory: [u8; 256],
}

/// What x2 and SP hold, in the middle of the memory.
const AT: u64 = 0x9000_0080;

impl Registers for Machine {
    fn x(&self, register: Register) -> u64 {
        self.x.get(register.number()).copied().unwrap_or(0)
    }

    fn set_x(&mut self, register: Register, value: u64) {
        if let Some(x) = self.x.get_mut(register.number()) {
            *x = value;
        }
    }

    fn sp(&self) -> u64 {
        self.sp
    }

    fn set_sp(&mut self, value: u64) {
        self.sp = value;
    }

    fn v(&self, register: Register) -> u128 {
        self.v[register.number()]
    }

    fn set_v(&mut self, register: Register, value: u128) {
        self.v[register.number()] = value;
    }
}

/// Vector `n` before: bytes `n << 4 | byte`, from byte 0 on.
fn vector(n: usize) -> u128 {
    (0..16).fold(0, |value, byte| {
        value | ((n as u128 & 15) << 4 | byte) << (8 * byte)
    })
}

/// A little-endian number of so many bytes of memory, from `offset` past [`AT`] on.
fn bytes(offset: usize, len: usize) -> u128 {
    (0..len).fold(0, |value, byte| {
        value | ((0x81 + offset + byte) as u128 & 0xff) << (8 * byte)
    })
}

impl Machine {
    fn new() -> Self {
        let mut x: [u64; 31] = core::array::from_fn(|n| 0x0101_0101_0101_0100 * n as u64 + 0xf0);
        x[1] = 0xffff_ffff_0000_0008;
        x[2] = AT;
        Self {
            x,
            sp: AT,
            v: core::array::from_fn(vector),
            memory: core::array::from_fn(|at| (at as u8).wrapping_add(1)),
        }
    }

    /// Does an instruction, and gives its accesses: (address, bytes).
    fn run(&mut self, word: u32, endianness: Endianness) -> Vec<(u64, u8)> {
        let access = Access::decode(word).expect("a load or a store");
        let address = access.address(self);
        let mut memory = self.memory;
        let mut accesses = Vec::new();
        let store = access.direction == Direction::Store;
        access.perform(self, endianness, |Element { offset, size }, value| {
            let at = address + u64::from(offset);
            accesses.push((at, size.bytes()));
            assert_eq!(value.is_some(), store, "one way only");
            let len = usize::from(size.bytes());
            let from = (at + 128 - AT) as usize;
            let bytes = &mut memory[from..from + len];
            match value {
                Some(value) => {
                    assert!(
                        size == Size::Double || value >> (8 * len) == 0,
                        "{value:#x}"
                    );
                    bytes.copy_from_slice(&value.to_le_bytes()[..len]);
                    0
                }
                // What is above an element's bits is nobody's.
                None => {
                    let mut whole = [0xa5; 8];
                    whole[..len].copy_from_slice(bytes);
                    u64::from_le_bytes(whole)
                }
            }
        });
        let total: u64 = accesses.iter().map(|(_, len)| u64::from(*len)).sum();
        assert_eq!(total, u64::from(access.bytes()), "{access:?}");
        assert!(accesses.len() <= crate::MAX_ELEMENTS);
        self.memory = memory;
        accesses
    }
}

/// Runs `word` and checks that it makes `accesses` and does nothing else than `effect`.
fn check(
    word: u32,
    endianness: Endianness,
    accesses: &[(u64, u8)],
    effect: impl FnOnce(&mut Machine),
) {
    let (mut ran, mut wanted) = (Machine::new(), Machine::new());
    assert_eq!(ran.run(word, endianness), accesses, "{word:#010x}");
    effect(&mut wanted);
    assert_eq!(ran, wanted, "{word:#010x}");
}

fn little(word: u32, accesses: &[(u64, u8)], effect: impl FnOnce(&mut Machine)) {
    check(word, Endianness::Little, accesses, effect);
}

fn big(word: u32, accesses: &[(u64, u8)], effect: impl FnOnce(&mut Machine)) {
    check(word, Endianness::Big, accesses, effect);
}

fn store(machine: &mut Machine, offset: i64, value: &[u8]) {
    let from = (128 + offset) as usize;
    machine.memory[from..from + value.len()].copy_from_slice(value);
}

#[test]
fn general_registers() {
    // str w0, [x2], #4
    little(0xb800_4440, &[(AT, 4)], |cpu| {
        store(cpu, 0, &(cpu.x[0] as u32).to_le_bytes());
        cpu.x[2] += 4;
    });
    // ldr w0, [x2, #4]!
    little(0xb840_4c40, &[(AT + 4, 4)], |cpu| {
        cpu.x[0] = bytes(4, 4) as u64;
        cpu.x[2] += 4;
    });
    // ldr w0, [x2, w1, sxtw #2]: the upper half of x1 is not looked at.
    little(0xb861_d840, &[(AT + 32, 4)], |cpu| {
        cpu.x[0] = bytes(32, 4) as u64;
    });
    // ldrsb w0, [x2], #1: 0x81.
    little(0x38c0_1440, &[(AT, 1)], |cpu| {
        cpu.x[0] = 0xffff_ff81;
        cpu.x[2] += 1;
    });
    // ldrsh x0, [x2], #-2: 0x8281.
    little(0x789f_e440, &[(AT, 2)], |cpu| {
        cpu.x[0] = 0xffff_ffff_ffff_8281;
        cpu.x[2] -= 2;
    });
    // ldp w0, w1, [x2]
    little(0x2940_0440, &[(AT, 4), (AT + 4, 4)], |cpu| {
        cpu.x[0] = bytes(0, 4) as u64;
        cpu.x[1] = bytes(4, 4) as u64;
    });
    // ldp x0, x1, [x2], #16
    little(0xa8c1_0440, &[(AT, 8), (AT + 8, 8)], |cpu| {
        cpu.x[0] = bytes(0, 8) as u64;
        cpu.x[1] = bytes(8, 8) as u64;
        cpu.x[2] += 16;
    });
    // ldpsw x0, x1, [x2]
    little(0x6940_0440, &[(AT, 4), (AT + 4, 4)], |cpu| {
        cpu.x[0] = bytes(0, 4) as u64 | 0xffff_ffff << 32;
        cpu.x[1] = bytes(4, 4) as u64 | 0xffff_ffff << 32;
    });
    // stp x0, x1, [sp, #-16]!
    little(0xa9bf_07e0, &[(AT - 16, 8), (AT - 8, 8)], |cpu| {
        store(cpu, -16, &cpu.x[0].to_le_bytes());
        store(cpu, -8, &cpu.x[1].to_le_bytes());
        cpu.sp -= 16;
    });
    // ldapr w0, [x2]
    little(0xb8bf_c040, &[(AT, 4)], |cpu| {
        cpu.x[0] = bytes(0, 4) as u64;
    });
    // stlur x0, [x2, #-8]
    little(0xd91f_8040, &[(AT - 8, 8)], |cpu| {
        store(cpu, -8, &cpu.x[0].to_le_bytes());
    });
}

#[test]
fn registers_that_meet() {
    // ldr x2, [x2], #8
    little(0xf840_8442, &[(AT, 8)], |cpu| cpu.x[2] = AT + 8);
    // ldp x0, x0, [x2]
    little(0xa940_0040, &[(AT, 8), (AT + 8, 8)], |cpu| {
        cpu.x[0] = bytes(8, 8) as u64;
    });
    // str x2, [x2], #8
    little(0xf800_8442, &[(AT, 8)], |cpu| {
        store(cpu, 0, &AT.to_le_bytes());
        cpu.x[2] += 8;
    });
    // ldr xzr, [x2], #8
    little(0xf840_845f, &[(AT, 8)], |cpu| cpu.x[2] += 8);
}

#[test]
fn vectors() {
    // ldr b0, [x2]
    little(0x3d40_0040, &[(AT, 1)], |cpu| cpu.v[0] = bytes(0, 1));
    // ldr s0, [x2]
    little(0xbd40_0040, &[(AT, 4)], |cpu| cpu.v[0] = bytes(0, 4));
    // ldr q0, [x2]
    little(0x3dc0_0040, &[(AT, 8), (AT + 8, 8)], |cpu| {
        cpu.v[0] = bytes(0, 16);
    });
    // str q0, [x2, #16]!
    little(0x3c81_0c40, &[(AT + 16, 8), (AT + 24, 8)], |cpu| {
        store(cpu, 16, &vector(0).to_le_bytes());
        cpu.x[2] += 16;
    });
    let quads: Vec<_> = (0..4).map(|n| (AT + 8 * n, 8)).collect();
    // ldp q0, q1, [x2]
    little(0xad40_0440, &quads, |cpu| {
        cpu.v[0] = bytes(0, 16);
        cpu.v[1] = bytes(16, 16);
    });
    // stp d0, d1, [x2]
    little(0x6d00_0440, &quads[..2], |cpu| {
        store(cpu, 0, &vector(0).to_le_bytes()[..8]);
        store(cpu, 8, &vector(1).to_le_bytes()[..8]);
    });
}

fn elements(count: u64, size: u8) -> Vec<(u64, u8)> {
    (0..count)
        .map(|n| (AT + n * u64::from(size), size))
        .collect()
}

#[test]
fn structures() {
    // ld1 {v31.4s, v0.4s}, [x2]
    little(0x4c40_a85f, &elements(8, 4), |cpu| {
        cpu.v[31] = bytes(0, 16);
        cpu.v[0] = bytes(16, 16);
    });
    // ld1 {v0.8b}, [x2], x1
    little(0x0cc1_7040, &elements(8, 1), |cpu| {
        cpu.v[0] = bytes(0, 8);
        cpu.x[2] = AT.wrapping_add(cpu.x[1]);
    });
    let lanes = |vector: usize, of: usize, size: usize, lanes: usize| {
        (0..lanes).fold(0, |value, lane| {
            value | bytes((lane * of + vector) * size, size) << (8 * lane * size)
        })
    };
    // ld2 {v0.8h, v1.8h}, [x2], #32
    little(0x4cdf_8440, &elements(16, 2), |cpu| {
        cpu.v[0] = lanes(0, 2, 2, 8);
        cpu.v[1] = lanes(1, 2, 2, 8);
        cpu.x[2] += 32;
    });
    // st3 {v0.2s, v1.2s, v2.2s}, [x2]
    little(0x0c00_4840, &elements(6, 4), |cpu| {
        for lane in 0..2 {
            for n in 0..3 {
                let element = &vector(n).to_le_bytes()[4 * lane..4 * lane + 4];
                store(cpu, (12 * lane + 4 * n) as i64, element);
            }
        }
    });
    // ld4 {v0.16b, v1.16b, v2.16b, v3.16b}, [x2]
    little(0x4c40_0040, &elements(64, 1), |cpu| {
        for n in 0..4 {
            cpu.v[n] = lanes(n, 4, 1, 16);
        }
    });
    // ld1 {v0.s}[2], [x2]
    little(0x4d40_8040, &elements(1, 4), |cpu| {
        cpu.v[0] = vector(0) & !(0xffff_ffff << 64) | bytes(0, 4) << 64;
    });
    // st2 {v0.h, v1.h}[7], [x2], #4
    little(0x4dbf_5840, &elements(2, 2), |cpu| {
        store(cpu, 0, &vector(0).to_le_bytes()[14..]);
        store(cpu, 2, &vector(1).to_le_bytes()[14..]);
        cpu.x[2] += 4;
    });
    // ld3r {v0.4h, v1.4h, v2.4h}, [x2]
    little(0x0d40_e440, &elements(3, 2), |cpu| {
        for n in 0..3 {
            cpu.v[n] = bytes(2 * n, 2) * 0x0001_0001_0001_0001;
        }
    });
    // ld1r {v0.2d}, [x2], #8
    little(0x4ddf_cc40, &elements(1, 8), |cpu| {
        cpu.v[0] = bytes(0, 8) << 64 | bytes(0, 8);
        cpu.x[2] += 8;
    });
}

#[test]
fn big_endian_data() {
    // str w0, [x2], #4
    big(0xb800_4440, &[(AT, 4)], |cpu| {
        store(cpu, 0, &(cpu.x[0] as u32).to_be_bytes());
        cpu.x[2] += 4;
    });
    // ldrsh x0, [x2], #-2: 0x8182.
    big(0x789f_e440, &[(AT, 2)], |cpu| {
        cpu.x[0] = 0xffff_ffff_ffff_8182;
        cpu.x[2] -= 2;
    });
    // ldp w0, w1, [x2]: each by itself.
    big(0x2940_0440, &elements(2, 4), |cpu| {
        cpu.x[0] = u64::from((bytes(0, 4) as u32).swap_bytes());
        cpu.x[1] = u64::from((bytes(4, 4) as u32).swap_bytes());
    });
    // ldr q0, [x2]: as a whole.
    big(0x3dc0_0040, &elements(2, 8), |cpu| {
        cpu.v[0] = bytes(0, 16).swap_bytes();
    });
    // ld1 {v31.4s, v0.4s}, [x2]: element by element.
    big(0x4c40_a85f, &elements(8, 4), |cpu| {
        let each = |from: usize| {
            (0..4_usize).fold(0, |value, lane| {
                let element = (bytes(from + 4 * lane, 4) as u32).swap_bytes();
                value | u128::from(element) << (32 * lane)
            })
        };
        cpu.v[31] = each(0);
        cpu.v[0] = each(16);
    });
    // str q0, [x2, #16]!
    big(0x3c81_0c40, &[(AT + 16, 8), (AT + 24, 8)], |cpu| {
        store(cpu, 16, &vector(0).to_be_bytes());
        cpu.x[2] += 16;
    });
}

#[test]
fn what_is_refused_and_what_cannot_abort() {
    for (word, text) in [
        (0x885f_7c40, "ldxr w0, [x2]"),
        (0xb820_0041, "ldadd w0, w1, [x2]"),
        (0x88a0_7c41, "cas w0, w1, [x2]"),
        (0x4820_7c82, "casp x0, x1, x2, x3, [x4]"),
        (0xf980_0040, "prfm pldl1keep, [x2]"),
        (0xd50b_7422, "dc zva, x2"),
        (0x1800_0000, "ldr w0, ."),
        (0xf820_0440, "ldraa x0, [x2]"),
        (0xd920_0840, "stg x0, [x2]"),
    ] {
        assert_eq!(Access::decode(word), None, "{text}");
        assert!(accesses_memory(word), "{text}");
    }
    for (word, text) in [
        (0xd503_201f, "nop"),
        (0xd400_0021, "svc #1"),
        (0x9100_0400, "add x0, x0, #1"),
        (0xd61f_0000, "br x0"),
        (0xd53b_0020, "mrs x0, ctr_el0"),
        (0, "udf #0"),
    ] {
        assert_eq!(Access::decode(word), None, "{text}");
        assert!(!accesses_memory(word), "{text}");
    }
}
