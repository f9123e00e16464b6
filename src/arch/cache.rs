//! Cache maintenance by address (Arm ARM D7.5).

use super::{barrier, regs};
use core::arch::asm;
use tock_registers::interfaces::Readable;

/// Does `$what` at `$first` and every `$step` bytes from there to `$end`: eight times a turn as long as that
/// stays below `$end`, because the loop would cost as much as the work.
macro_rules! by_block {
    ($what:literal, $first:expr, $end:expr, $step:expr) => {
        asm!(
            "2:", "add {next}, {at}, {eight}", "cmp {next}, {end}", "b.hi 3f",
            $what, "add {at}, {at}, {step}", $what, "add {at}, {at}, {step}",
            $what, "add {at}, {at}, {step}", $what, "add {at}, {at}, {step}",
            $what, "add {at}, {at}, {step}", $what, "add {at}, {at}, {step}",
            $what, "add {at}, {at}, {step}", $what, "add {at}, {at}, {step}",
            "b 2b",
            "3:", "cmp {at}, {end}", "b.hs 4f", $what, "add {at}, {at}, {step}", "b 3b",
            "4:",
            at = inout(reg) $first => _, next = out(reg) _, end = in(reg) $end, step = in(reg) $step,
            eight = in(reg) 8 * $step, options(nostack)
        )
    };
}

/// The smallest data cache line, in bytes.
fn line() -> usize {
    4 << ((regs::CTR_EL0.get() >> 16) & 0xf)
}

/// Writes the lines of `start..start + len` back to memory and drops them, so that a
/// guest whose caches are still off reads what EL2 wrote.
pub fn clean_invalidate(start: usize, len: usize) {
    let line = line();
    let (first, end) = (start & !(line - 1), start.saturating_add(len));
    // SAFETY: clean and invalidate by address loses no data, and nothing behind the last line is named.
    unsafe { by_block!("dc civac, {at}", first, end, line) };
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
    let end = start.saturating_add(len);
    // SAFETY: the caller's promise; a block is 4 bytes to 2 KiB, a divisor of a page.
    unsafe {
        if with_zva {
            let block = 4usize << (dczid & 0xf);
            by_block!("dc zva, {at}", start, end, block);
        } else {
            by_block!("stp xzr, xzr, [{at}]", start, end, 16usize);
        }
    }
}
