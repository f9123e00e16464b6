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

/// Zeroes memory that no one else uses: whole pages.
///
/// # Safety
///
/// `start..start + len` is mapped read-write normal memory, a multiple of 4 KiB at both
/// ends, that belongs to the caller alone.
pub unsafe fn zero(start: usize, len: usize) {
    let dczid: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags)) };
    if dczid & 1 << 4 != 0 {
        // SAFETY: the caller's promise.
        unsafe { core::ptr::write_bytes(start as *mut u8, 0, len) };
        return;
    }
    let block = 4 << (dczid & 0xf);
    let mut address = start;
    while address < start + len {
        // SAFETY: the caller's promise; blocks are at most 2 KiB, a divisor of a page.
        unsafe { asm!("dc zva, {}", in(reg) address, options(nostack, preserves_flags)) };
        address += block;
    }
}
