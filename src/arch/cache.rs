//! Cache maintenance by address (Arm ARM D7.5).

use super::{barrier, regs};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
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

/// Has words fetched that will be used soon, by lines of 64 bytes: no core known has shorter ones.
#[inline(always)]
pub fn prefetch(words: &[AtomicU64; 64]) {
    // SAFETY: hints, of memory that is borrowed; they change no state that the architecture knows of.
    unsafe {
        asm!(
            "prfm pldl1keep, [{at}]", "prfm pldl1keep, [{at}, #64]",
            "prfm pldl1keep, [{at}, #128]", "prfm pldl1keep, [{at}, #192]",
            "prfm pldl1keep, [{at}, #256]", "prfm pldl1keep, [{at}, #320]",
            "prfm pldl1keep, [{at}, #384]", "prfm pldl1keep, [{at}, #448]",
            at = in(reg) words, options(nostack, preserves_flags, readonly)
        );
    }
}

/// Drops every instruction cache line, of all CPUs.
pub fn invalidate_instructions() {
    // SAFETY: instruction caches hold no data of their own.
    unsafe { asm!("ic ialluis", options(nostack, preserves_flags)) };
    barrier::dsb_ish();
    barrier::isb();
}

/// How whole pages are zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// `DC ZVA`: most silicon zeroes a line without reading it.
    Blocks,
    /// Stores of pairs: emulators take several times longer over each `DC ZVA`.
    Stores,
}

static BY_STORES: AtomicBool = AtomicBool::new(false);

impl Zeroing {
    /// What this CPU can do of that.
    pub fn usable(self) -> bool {
        let dczid: u64;
        // SAFETY: reads an identification register.
        unsafe {
            asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags))
        };
        // DZP: DC ZVA is not to be used.
        self == Self::Stores || dczid & 1 << 4 == 0
    }

    /// Has [`zero`] do it so from now on.
    pub fn choose(self) {
        BY_STORES.store(self == Self::Stores, Relaxed);
    }

    /// Zeroes whole pages. Every store is the hardware's, of a byte or more, as an atomic store
    /// of a byte would be: who looks meanwhile sees each byte as it was or zero.
    ///
    /// # Safety
    ///
    /// As for [`zero`]; and it is [usable](Self::usable).
    pub unsafe fn zero(self, start: usize, len: usize) {
        let end = start.saturating_add(len);
        if self == Self::Blocks {
            let dczid: u64;
            // SAFETY: reads an identification register.
            unsafe {
                asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags))
            };
            let block = 4usize << (dczid & 0xf);
            // SAFETY: the caller's promise; a block is 4 bytes to 2 KiB, a divisor of a page.
            unsafe { by_block!("dc zva, {at}", start, end, block) };
        } else if start < end {
            // SAFETY: the caller's promise; a page is a multiple of what a turn stores.
            unsafe {
                asm!(
                    "2:",
                    "stp xzr, xzr, [{at}]", "stp xzr, xzr, [{at}, #16]",
                    "stp xzr, xzr, [{at}, #32]", "stp xzr, xzr, [{at}, #48]",
                    "stp xzr, xzr, [{at}, #64]", "stp xzr, xzr, [{at}, #80]",
                    "stp xzr, xzr, [{at}, #96]", "stp xzr, xzr, [{at}, #112]",
                    "stp xzr, xzr, [{at}, #128]", "stp xzr, xzr, [{at}, #144]",
                    "stp xzr, xzr, [{at}, #160]", "stp xzr, xzr, [{at}, #176]",
                    "stp xzr, xzr, [{at}, #192]", "stp xzr, xzr, [{at}, #208]",
                    "stp xzr, xzr, [{at}, #224]", "stp xzr, xzr, [{at}, #240]",
                    "add {at}, {at}, #256", "cmp {at}, {end}", "b.lo 2b",
                    at = inout(reg) start => _, end = in(reg) end, options(nostack)
                )
            };
        }
    }
}

/// Zeroes whole pages in the way that was chosen: as [`Zeroing::zero`].
///
/// # Safety
///
/// `start..start + len` is mapped read-write normal memory, a multiple of 4 KiB at both
/// ends, to which Rust references exist only as atomics.
pub unsafe fn zero(start: usize, len: usize) {
    let how = if !BY_STORES.load(Relaxed) && Zeroing::Blocks.usable() {
        Zeroing::Blocks
    } else {
        Zeroing::Stores
    };
    // SAFETY: the caller's promise, and what was just asked.
    unsafe { how.zero(start, len) };
}
