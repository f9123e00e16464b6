//! EL2's own translation: descriptor bits and the registers that turn it on.
//! The tables are laid out by `memory::stage1`.

use super::barrier;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What boot/head.S loads to turn the MMU on: MAIR, TCR, TTBR0 and SCTLR of EL2.
///
/// Atomics, so that a static of it can be filled with plain stores while the MMU is off.
#[repr(C)]
#[derive(Debug)]
pub struct EnableMmu([AtomicU64; 4]);

/// RES1 bits of SCTLR_EL2 (E2H = 0); MMU and caches off.
pub const SCTLR_OFF: u64 = 0x30c5_0830;
/// M, C, SA, I and WXN: what is writable is not executable, whatever a table says.
const SCTLR_ON: u64 = SCTLR_OFF | 1 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 19;

/// Attribute 0: normal memory, write-back, allocating. Attribute 1: Device-nGnRE.
const MAIR: u64 = 0xff | 0x04 << 8;

impl EnableMmu {
    /// Not filled in yet.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 4])
    }

    /// Fills in the registers for a 48-bit space whose top table is at `table`, on a
    /// machine with this PARange.
    pub fn fill(&self, table: u64, pa_range: u64) {
        // T0SZ 16; walks inner-shareable write-back; 4 KiB; PS; RES1 bits 23 and 31.
        let tcr = 16 | 1 << 8 | 1 << 10 | 3 << 12 | pa_range.min(5) << 16 | 1 << 23 | 1 << 31;
        for (register, value) in self.0.iter().zip([MAIR, tcr, table, SCTLR_ON]) {
            register.store(value, Relaxed);
        }
    }
}

/// Makes new entries of live tables seen by this CPU's and the others' walks.
pub fn publish() {
    barrier::dsb_ishst();
    barrier::isb();
}
