//! Which level of a guest's stage 1 an abort on a walk is about: the syndrome that EL2 gets has stage 2's level.
//!
//! The guest's tables are walked as its CPU would (Arm ARM D8.2), reading what they hold now. A guest that changes them
//! meanwhile gets a wrong level, or none; nothing else comes of it. At most four reads.

use crate::arch::el1;
use crate::vm::memory::GuestMemory;

const ADDRESS: u64 = 0xffff_ffff_f000;
const TABLE: u64 = 0b11;

/// The level whose table is in the page at `page`, on the walk for `va`.
pub fn level(memory: &GuestMemory, va: u64, page: u64) -> Option<u64> {
    let (tcr, table) = el1::translation(va);
    let upper = va & 1 << 55 != 0;
    let (size, granule) = match upper {
        false => (tcr & 0x3f, [12, 16, 14, 0][(tcr >> 14 & 3) as usize]),
        true => (tcr >> 16 & 0x3f, [0, 14, 12, 16][(tcr >> 30 & 3) as usize]),
    };
    let bits = 64_u64.checked_sub(size)?;
    // 48 bits are what guests are shown.
    if granule == 0 || !(granule + 1..=48).contains(&bits) {
        return None;
    }
    let step = granule - 3;
    let mut level = 4 - (bits - granule).div_ceil(step);
    let mut table = table & ADDRESS & !1;
    loop {
        let shift = granule + (3 - level) * step;
        let width = step.min(bits - shift);
        let index = va >> shift & ((1 << width) - 1);
        let descriptor = table + index * 8;
        if descriptor & !0xfff == page {
            return Some(level);
        }
        let entry = memory.word(descriptor)?;
        if level == 3 || entry & 0b11 != TABLE {
            return None;
        }
        table = entry & ADDRESS & !((1 << granule) - 1);
        level += 1;
    }
}
