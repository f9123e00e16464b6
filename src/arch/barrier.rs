//! Barriers. Each is also a compiler barrier: none of them is `nomem`.

use core::arch::asm;

macro_rules! barrier {
    ($(#[$doc:meta])* $name:ident, $text:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() {
            // SAFETY: a barrier instruction has no operands and changes no state
            // that Rust knows of; it only orders.
            unsafe { asm!($text, options(nostack, preserves_flags)) }
        }
    };
}

barrier!(
    /// Orders and completes everything before it, for the whole system.
    dsb_sy, "dsb sy");
barrier!(
    /// Orders everything before it, for the whole system.
    dmb_sy, "dmb sy");
barrier!(
    /// Completes everything before it, for the inner-shareable domain.
    dsb_ish, "dsb ish");
barrier!(
    /// Completes earlier stores, for the inner-shareable domain.
    dsb_ishst, "dsb ishst");
barrier!(
    /// Completes everything before it, for this CPU only.
    dsb_nsh, "dsb nsh");
barrier!(
    /// Makes earlier context changes (register writes) seen by what follows.
    isb, "isb");
barrier!(
    /// Waits for an interrupt or another wake-up event, masked ones included.
    wfi, "dsb sy\nwfi");
barrier!(
    /// Waits for an event.
    wfe, "wfe");
barrier!(
    /// Wakes CPUs that wait for an event.
    sev, "sev");
