//! TLB maintenance (Arm ARM D8.14), and whose tables are walked meanwhile. Every function of the first part only
//! issues the operation: the barriers around it belong to the caller's protocol.

use super::barrier;
use super::cpu::PerCpu;
use aarch64_cpu::registers::{SCTLR_EL1, TCR_EL1, VTTBR_EL2};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tidemark_errata::walks::{self, OutOfContext, Registers, Stage1};
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
    /// EL2's own, last level, by VA, this CPU. Operand: VA >> 12.
    vale2, "vale2", operand);
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

/// The registers of the CPU that runs this.
struct Own;

impl Registers for Own {
    #[inline]
    fn tcr(&self) -> u64 {
        TCR_EL1.get()
    }
    #[inline]
    fn set_tcr(&mut self, value: u64) {
        TCR_EL1.set(value);
    }
    #[inline]
    fn sctlr(&self) -> u64 {
        SCTLR_EL1.get()
    }
    #[inline]
    fn set_sctlr(&mut self, value: u64) {
        SCTLR_EL1.set(value);
    }
    #[inline]
    fn set_vttbr(&mut self, value: u64) {
        VTTBR_EL2.set(value);
    }
    #[inline]
    fn isb(&mut self) {
        barrier::isb();
    }
}

static OUT_OF_CONTEXT: AtomicBool = AtomicBool::new(true);

/// Says whether a CPU may walk EL1's tables while EL2 runs. Until then it may.
pub fn set_out_of_context(walks: OutOfContext) {
    OUT_OF_CONTEXT.store(walks == OutOfContext::Possible, Relaxed);
}

#[inline]
fn out_of_context() -> OutOfContext {
    if OUT_OF_CONTEXT.load(Relaxed) {
        OutOfContext::Possible
    } else {
        OutOfContext::Never
    }
}

/// What the loaded guest had when [`select`] took its stage 2 from this CPU.
static TAKEN: PerCpu<Stage1> = PerCpu::new(Stage1 { tcr: 0, sctlr: 0 });

/// Loads another VM's stage 2 for TLB maintenance by VMID; gives the one before.
///
/// A guest's own walks cannot use it: EL2 does not return to a guest before [`restore`].
#[inline]
pub fn select(vttbr: u64) -> u64 {
    let previous = VTTBR_EL2.get();
    if previous != vttbr {
        TAKEN.set(walks::enter(out_of_context(), &mut Own, vttbr));
    }
    previous
}

/// Loads back what [`select`] gave.
#[inline]
pub fn restore(previous: u64) {
    if VTTBR_EL2.get() != previous {
        walks::leave(out_of_context(), &mut Own, previous, TAKEN.get());
    }
}

/// Begins a switch to another vCPU, whose VM has `vttbr`: its stage 2 first.
pub fn depart(vttbr: u64) {
    walks::enter(out_of_context(), &mut Own, vttbr);
}

/// Ends it, when all other registers of EL1 are the new vCPU's: its stage 1 last.
pub fn arrive(stage1: Stage1) {
    walks::arrive(out_of_context(), &mut Own, stage1);
}
