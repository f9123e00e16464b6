//! The generic timer (Arm ARM D12) as EL2 uses it: the physical count, and EL2's own
//! physical timer (CNTHP), which wakes a CPU for time slices and sleeping vCPUs.

use super::cpu::PerCpu;
use super::{barrier, regs};
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTPCT_EL0, CNTV_CTL_EL0};
use tock_registers::interfaces::{Readable, Writeable};

/// A deadline that never comes.
pub const NEVER: u64 = u64::MAX;

/// The physical count.
#[inline]
pub fn now() -> u64 {
    barrier::isb();
    CNTPCT_EL0.get()
}

/// Ticks in a second.
pub fn frequency() -> u64 {
    // Firmware may leave CNTFRQ zero; dividing by it must not stop EL2.
    CNTFRQ_EL0.get().max(1)
}

/// Ticks in `microseconds`.
pub fn ticks(microseconds: u64) -> u64 {
    (frequency() * microseconds).div_ceil(1_000_000)
}

/// Whole microseconds in `ticks`.
pub fn in_microseconds(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(frequency())) as u64
}

/// Whole nanoseconds in `ticks`.
pub fn in_nanoseconds(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(frequency())) as u64
}

/// Whole seconds since the counter started.
pub fn seconds() -> u64 {
    now() / frequency()
}

/// The count at which [`seconds`] becomes `seconds`.
pub fn count_at(seconds: u64) -> u64 {
    frequency().saturating_mul(seconds)
}

/// The count in microseconds since the counter started.
pub fn microseconds() -> u64 {
    in_microseconds(now())
}

/// What this CPU's timer was set to last, and nothing before that: firmware may have left it running. Only
/// [`set_deadline`] writes those registers.
static DEADLINE: PerCpu<Option<Option<u64>>> = PerCpu::new(None);

/// Fires EL2's timer interrupt when the count reaches `deadline`; `None` stops it.
///
/// What is set already is not written again: under an emulator, and in a virtual machine, each write is slow.
pub fn set_deadline(deadline: Option<u64>) {
    if DEADLINE.get() == Some(deadline) {
        return;
    }
    DEADLINE.set(Some(deadline));
    match deadline {
        Some(deadline) => {
            regs::CNTHP_CVAL_EL2.set(deadline);
            regs::CNTHP_CTL.set(1);
        }
        None => regs::CNTHP_CTL.set(0),
    }
    barrier::isb();
}

/// The line of the virtual timer, which is that of the vCPU loaded here: ENABLE, not IMASK, ISTATUS.
#[inline]
pub fn virtual_line_is_high() -> bool {
    CNTV_CTL_EL0.get() & 0b111 == 0b101
}
