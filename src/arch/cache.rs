//! Cache maintenance by address (Arm ARM D7.5).

use super::{barrier, regs};
use core::arch::asm;
use tock_registers::interfaces::Readable;

/// The smallest data cache line, in bytes.
fn line() -> usize {
    4 << ((regs::CTR_EL0.get() >> 16) & 0xf)
}

/// Writes the lines of `start..start + len` back to memory and drops them, so that a
/// guest whose caches are still off reads what EL2 wrote.
pub fn clean_invalidate(start: usize, len: usize) {
    let line = line();
    let mut address = start & !(line - 1);
    while address < start + len {
        // SAFETY: clean and invalidate by address loses no data.
        unsafe { asm!("dc civac, {}", in(reg) address, options(nostack, preserves_flags)) };
        address += line;
    }
    barrier::dsb_sy();
}

/// Drops every instruction cache line, of all CPUs.
pub fn invalidate_instructions() {
    // SAFETY: instruction caches hold no data of their own.
    unsafe { asm!("ic ialluis", options(nostack, preserves_flags)) };
    barrier::dsb_ish();
    barrier::isb();
}

/// Zeroes whole pages. Every store is the hardware's, of a byte or more, as an atomic store
/// of a byte would be: who looks meanwhile sees each byte as it was or zero.
///
/// # Safety
///
/// `start..start + len` is mapped read-write normal memory, a multiple of 4 KiB at both
/// ends, to which Rust references exist only as atomics.
pub unsafe fn zero(start: usize, len: usize) {
    let dczid: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags)) };
    // DZP: DC ZVA is not to be used.
    let with_zva = dczid & 1 << 4 == 0;
    let block = if with_zva { 4 << (dczid & 0xf) } else { 16 };
    let mut address = start;
    while address < start + len {
        // SAFETY: the caller's promise; a block is 4 bytes to 2 KiB, a divisor of a page.
        unsafe {
            if with_zva {
                asm!("dc zva, {}", in(reg) address, options(nostack, preserves_flags));
            } else {
                asm!("stp xzr, xzr, [{}]", in(reg) address, options(nostack, preserves_flags));
            }
        }
        address += block;
    }
}
