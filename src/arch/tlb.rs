//! TLB maintenance (Arm ARM D8.14). Every function only issues the operation: the
//! barriers around it belong to the caller's protocol.

use super::barrier;
use super::cpu::PerCpu;
use aarch64_cpu::registers::{TCR_EL1, VTTBR_EL2};
use core::arch::asm;
use tock_registers::interfaces::{Readable, Writeable};

macro_rules! tlbi {
    ($(#[$doc:meta])* $name:ident, $op:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() {
            // SAFETY: dropping cached translations never changes what is mapped.
            unsafe { asm!(concat!("tlbi ", $op), options(nostack, preserves_flags)) }
        }
    };
    ($(#[$doc:meta])* $name:ident, $op:literal, operand) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(operand: u64) {
            // SAFETY: as above.
            unsafe { asm!(concat!("tlbi ", $op, ", {}"), in(reg) operand, options(nostack, preserves_flags)) }
        }
    };
}

tlbi!(
    /// Stage 1 and 2 of the current VMID, all CPUs.
    vmalls12e1is, "vmalls12e1is");
tlbi!(
    /// Stage 1 and 2 of the current VMID, this CPU.
    vmalls12e1, "vmalls12e1");
tlbi!(
    /// Stage 1 (and combined) of the current VMID, all CPUs.
    vmalle1is, "vmalle1is");
tlbi!(
    /// Stage 1 (and combined) of the current VMID, this CPU.
    vmalle1, "vmalle1");
tlbi!(
    /// Everything of EL1 and EL0, every VMID, this CPU.
    alle1, "alle1");
tlbi!(
    /// Stage 2 by IPA, current VMID, all CPUs. Operand: IPA >> 12, TTL in 47:44.
    ipas2e1is, "ipas2e1is", operand);
tlbi!(
    /// Stage 2 by IPA, current VMID, this CPU.
    ipas2e1, "ipas2e1", operand);

tlbi!(
    /// EL2's own, last level, by VA, all CPUs.
    vale2is, "vale2is", operand);
tlbi!(
    /// Stage 1 (and combined) by VA, all ASIDs, current VMID, this CPU.
    vaae1, "vaae1", operand);

/// Stage 2 by range (FEAT_TLBIRANGE), current VMID, all CPUs.
#[inline(always)]
pub fn ripas2e1is(operand: u64) {
    // SAFETY: as for the other operations; the encoding (sys #4, c8, c0, #2) is only
    // reached where ID_AA64ISAR0_EL1.TLB says that it exists.
    unsafe { asm!("sys #4, c8, c0, #2, {}", in(reg) operand, options(nostack, preserves_flags)) }
}

/// Has this CPU walk anew for whatever number it loads: the descriptors as others wrote them, once it has
/// seen that they did.
pub fn forget_all() {
    barrier::dsb_ishst();
    alle1();
    barrier::dsb_nsh();
    barrier::isb();
}

/// TCR_EL1.EPD0 and EPD1: no stage-1 walks.
pub const NO_WALKS: u64 = 1 << 7 | 1 << 23;

/// What TCR_EL1 was before [`select`] took a CPU's stage 2 from its guest.
static TCR: PerCpu<u64> = PerCpu::new(0);

/// Loads another VM's stage 2 for TLB maintenance by VMID; gives the one before.
///
/// A guest's own walks cannot use it: EL2 does not return to a guest before [`restore`]. Walks that
/// a core makes speculatively meanwhile (Cortex-A72 1319367, A76 1165522) would cache the loaded
/// guest's stage 1 under the other VM's number: there are none.
#[inline]
pub fn select(vttbr: u64) -> u64 {
    let previous = VTTBR_EL2.get();
    if previous != vttbr {
        let tcr = TCR_EL1.get();
        TCR.set(tcr);
        TCR_EL1.set(tcr | NO_WALKS);
        barrier::isb();
        VTTBR_EL2.set(vttbr);
        barrier::isb();
    }
    previous
}

/// Loads back what [`select`] gave.
#[inline]
pub fn restore(previous: u64) {
    if VTTBR_EL2.get() != previous {
        VTTBR_EL2.set(previous);
        barrier::isb();
        TCR_EL1.set(TCR.get());
    }
}
