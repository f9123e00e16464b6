//! The virtual counter and timer (Arm ARM D12, the Generic Timer).

use core::arch::asm;

/// The counter, not read ahead of what comes before.
#[inline(always)]
#[must_use]
pub fn now() -> u64 {
    let ticks;
    // SAFETY: reads a counter.
    unsafe {
        asm!("isb", "mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack, preserves_flags))
    };
    ticks
}

/// Ticks a second.
#[must_use]
pub fn frequency() -> u64 {
    let hertz: u64;
    // SAFETY: reads a register that firmware set.
    unsafe { asm!("mrs {}, cntfrq_el0", out(reg) hertz, options(nomem, nostack, preserves_flags)) };
    hertz.max(1)
}

/// Waits until `ready` or until so many seconds have passed; whether it was in time.
pub fn within(seconds: u64, mut ready: impl FnMut() -> bool) -> bool {
    let start = now();
    let limit = frequency().saturating_mul(seconds);
    while !ready() {
        if now().wrapping_sub(start) > limit {
            return false;
        }
        crate::rt::smp::pause();
    }
    true
}

/// Makes the virtual timer's interrupt pending from the counter value `at` on.
pub fn set_timer(at: u64) {
    // SAFETY: the timer's interrupt goes to the GIC, which passes it on only if a payload enabled it.
    unsafe {
        asm!(
            "msr cntv_cval_el0, {}", "msr cntv_ctl_el0, {}", "isb",
            in(reg) at, in(reg) 1_u64, options(nomem, nostack, preserves_flags)
        );
    }
}

/// Turns the virtual timer off.
pub fn stop_timer() {
    // SAFETY: as in `set_timer`.
    unsafe {
        asm!(
            "msr cntv_ctl_el0, xzr",
            "isb",
            options(nomem, nostack, preserves_flags)
        )
    };
}
