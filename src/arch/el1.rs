//! What a vCPU leaves in EL1's and EL0's registers when a CPU switches to another one,
//! and the controls of EL2 that decide what it may do.

use super::{barrier, regs, tlb};
use aarch64_cpu::registers::*;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tidemark_errata::Errata;
use tidemark_errata::walks::Stage1;
use tock_registers::interfaces::{Readable, Writeable};

unsafe extern "C" {
    /// Stores q0-q31, FPCR, FPSR (boot/fp.S).
    fn fp_save(state: &mut FpState);
    /// Loads them.
    fn fp_load(state: &FpState);
}

/// FP and SIMD registers, as boot/fp.S lays them out.
#[repr(C, align(16))]
#[derive(Clone, Debug)]
pub struct FpState {
    q: [u128; 32],
    fpcr: u64,
    fpsr: u64,
}

macro_rules! el1_registers {
    ($($field:ident $register:ident),* $(,)?) => {
        /// A vCPU's EL1 and EL0 state besides its general registers.
        #[derive(Clone, Debug)]
        pub struct El1State {
            $($field: u64,)*
            par: u64,
            stage1: Stage1,
            fp: FpState,
        }

        impl El1State {
            /// The state of a CPU out of reset, as far as software may rely on it.
            pub fn reset() -> Self {
                Self {
                    $($field: 0,)*
                    par: 0,
                    // RES1 bits; MMU and caches off.
                    stage1: Stage1 { tcr: 0, sctlr: 0x30d0_0800 },
                    fp: FpState { q: [0; 32], fpcr: 0, fpsr: 0 },
                }
            }

            /// Takes the state out of this CPU.
            pub fn save(&mut self) {
                $(self.$field = $register.get();)*
                self.par = par();
                self.stage1 = Stage1 { tcr: TCR_EL1.get(), sctlr: SCTLR_EL1.get() };
                // Its timer must not fire for whoever comes next.
                CNTV_CTL_EL0.set(0);
                barrier::isb();
                // SAFETY: `fp` is laid out as boot/fp.S expects (checked below).
                unsafe { fp_save(&mut self.fp) };
            }

            /// Puts the state into this CPU.
            pub fn load(&self) {
                $($register.set(self.$field);)*
                PAR_EL1.set(self.par);
                tlb::arrive(self.stage1);
                // SAFETY: as for `save`; the image itself has no FP state to lose.
                unsafe { fp_load(&self.fp) };
            }
        }
    };
}

const _: () = assert!(core::mem::offset_of!(FpState, fpcr) == 512);

el1_registers! {
    cpacr CPACR_EL1, ttbr0 TTBR0_EL1, ttbr1 TTBR1_EL1,
    esr ESR_EL1, afsr0 AFSR0_EL1, afsr1 AFSR1_EL1, far FAR_EL1, mair MAIR_EL1,
    amair AMAIR_EL1, vbar VBAR_EL1, contextidr CONTEXTIDR_EL1, tpidr_el0 TPIDR_EL0,
    tpidrro_el0 TPIDRRO_EL0, tpidr_el1 TPIDR_EL1, cntkctl CNTKCTL_EL1,
    sp_el0 SP_EL0, sp_el1 SP_EL1, elr ELR_EL1, spsr SPSR_EL1, csselr CSSELR_EL1,
    mdscr MDSCR_EL1, cntv_ctl CNTV_CTL_EL0, cntv_cval CNTV_CVAL_EL0,
}

impl El1State {
    /// Leaves a state behind that is not wanted any more: its timer must not fire.
    pub fn discard() {
        CNTV_CTL_EL0.set(0);
        barrier::isb();
    }

    /// The virtual timer as saved: (control, compare value).
    pub fn virtual_timer(&self) -> (u64, u64) {
        (self.cntv_ctl, self.cntv_cval)
    }
}

/// Trap SME, SVE, trace and activity monitors; FP and SIMD are the guest's.
const CPTR_GUEST: u64 = 0x33ff | 1 << 20 | 1 << 30;

/// HCR_EL2 while a guest runs, and otherwise too: it is never written on the exit path.
///
/// VM SWIO PTW FMO IMO AMO FB BSU=IS TWI TID3 TSC TIDCP TACR TLOR RW. PAuth keys and
/// MTE stay trapped (API, APK, ATA = 0): the ID registers do not show them.
///
/// Cache operations by set and way are not trapped. SWIO makes each of them write back what it drops, so none loses
/// another VM's lines or EL2's; and what a guest stored by its caches is in those of the CPU that it runs on, because a
/// vCPU never changes its CPU and EL2 leaves no dirty line of its own there or elsewhere (`stage2/coherence.rs`). A
/// scheduler that moves vCPUs would have to trap them (TSW) and clean all of the guest's memory, as KVM does, where
/// there is no FEAT_S2FWB. What they write back was noted when it was stored.
pub const HCR_GUEST: u64 = 1
    | 1 << 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 9
    | 1 << 10
    | 1 << 13
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | 1 << 31
    | 1 << 35;
/// HCR_EL2.FWB: stage 2's attributes win over stage 1's.
pub const HCR_FWB: u64 = 1 << 46;

/// HCR_EL2.TERR: accesses to error records trap. RES0 without RAS.
const HCR_TERR: u64 = 1 << 36;

fn has_ras() -> bool {
    ID_AA64PFR0_EL1.get() >> 28 & 0xf != 0
}

/// The guest's MDSCR_EL1, which traps (MDCR_EL2.TDA): read.
pub fn mdscr() -> u64 {
    MDSCR_EL1.get()
}

/// And written: software step, kernel debug events and the comms channel's trap. There are
/// no breakpoints to enable.
pub fn set_mdscr(value: u64) {
    const SS: u64 = 1;
    const TDCC: u64 = 1 << 12;
    const KDE: u64 = 1 << 13;
    MDSCR_EL1.set(value & (SS | TDCC | KDE));
}

/// Sets this CPU's EL2 controls, once, before its first guest.
pub fn init_controls(hcr: u64, vtcr: u64) {
    // Error records trap where there are any: RAS is not shown.
    let errors = if has_ras() { HCR_TERR } else { 0 };
    // Once, and between barriers: AmpereOne may use a half-changed HCR_EL2 for translations beside it (AC04_CPU_23).
    barrier::dsb_nsh();
    HCR_EL2.set(hcr | errors);
    barrier::isb();
    VTCR_EL2.set(vtcr);
    CNTHCTL_EL2.set(CounterReads::Direct as u64);
    CPTR_EL2.set(CPTR_GUEST);
    regs::HSTR_EL2.set(0);
    regs::HACR_EL2.set(0);
    let dfr0 = ID_AA64DFR0_EL1.get();
    let counters = if matches!(dfr0 >> 8 & 0xf, 0 | 0xf) {
        0
    } else {
        regs::PMCR_EL0.get() >> 11 & 0x1f
    };
    // Locked out of a cold reset, they keep a guest's software step from working (H2.4).
    regs::OSDLR_EL1.set(0);
    regs::OSLAR_EL1.set(0);
    // Debug, OS lock, debug ROM, PMU, SPE, trace: all trap.
    regs::MDCR_EL2.set(counters | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 19);
    // Their reset values are unknown, and zero is "trap nothing more" or "not there".
    let fine_grained = ID_AA64MMFR0_EL1.get() >> 56 & 0xf;
    let pfr0 = ID_AA64PFR0_EL1.get();
    if fine_grained != 0 {
        regs::FG_READ.set(0);
        regs::FG_WRITE.set(0);
        regs::FG_INSTRUCTION.set(0);
        regs::FG_DEBUG_READ.set(0);
        regs::FG_DEBUG_WRITE.set(0);
        if pfr0 >> 44 & 0xf != 0 {
            regs::FG_ACTIVITY.set(0);
        }
    }
    if fine_grained >= 2 {
        regs::FG2_READ.set(0);
        regs::FG2_WRITE.set(0);
        regs::FG2_INSTRUCTION.set(0);
        regs::FG2_DEBUG_READ.set(0);
        regs::FG2_DEBUG_WRITE.set(0);
    }
    if pfr0 >> 40 & 0xf != 0 || ID_AA64PFR1_EL1.get() >> 16 & 0xf != 0 {
        // MPAM0_EL1 and MPAM1_EL1 trap.
        regs::MPAM2_EL2.set(1 << 48 | 1 << 49);
    }
    if has_ras() {
        // ESB defers into zero.
        regs::VDISR_EL2.set(0);
        regs::VSESR_EL2.set(0);
    }
    if ID_AA64MMFR1_EL1.get() >> 40 & 0xf != 0 {
        regs::HCRX_EL2.set(0);
    }
    regs::VPIDR_EL2.set(MIDR_EL1.get());
    barrier::isb();
    // Whatever was loaded before EL2 left translations behind.
    tlb::forget_all();
}

/// Sets what is a VM's or a vCPU's own in EL2's registers; a vCPU switch is the one caller, and
/// [`El1State::load`] ends it.
pub fn set_vm(vttbr: u64, vmpidr: u64, counter_offset: u64, reads: CounterReads) {
    if has_ras() {
        // Where the guest's DISR_EL1 is: not the last one's.
        regs::VDISR_EL2.set(0);
    }
    regs::VMPIDR_EL2.set(vmpidr);
    CNTVOFF_EL2.set(counter_offset);
    if CNTHCTL_EL2.get() != reads as u64 {
        CNTHCTL_EL2.set(reads as u64);
    }
    tlb::depart(vttbr);
}

/// CNTHCTL_EL2 while a guest runs: what becomes of its reads of the physical counter. The physical timer traps (it is emulated).
///
/// Where its counter is not the machine's they trap. CNTPOFF_EL2 (FEAT_ECV) would save that, if firmware lets EL2 use it
/// (SCR_EL3.ECVEn), which EL2 cannot ask; Linux reads the virtual counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CounterReads {
    /// They trap.
    Trap = 0,
    /// They do not: EL1PCTEN.
    Direct = 1,
}

/// PSTATE.M of EL1 on its own stack pointer.
const EL1H: u64 = 0b0101;

/// Makes the guest take an exception to EL1 as the architecture would (Arm ARM D1.3):
/// `esr` is complete, `far` is written when the class has one.
pub fn inject_sync<O: Sync>(context: &super::context::Context<O>, esr: u64, far: Option<u64>) {
    let pstate = context.pstate();
    ESR_EL1.set(esr);
    if let Some(far) = far {
        FAR_EL1.set(far);
    }
    ELR_EL1.set(context.pc());
    SPSR_EL1.set(pstate);
    // From EL0: vector 0x400; from EL1 with SP_EL1: 0x200; with SP_EL0: 0.
    let offset = match pstate & 0xf {
        0b0000 => 0x400,
        EL1H => 0x200,
        _ => 0,
    };
    context.set_pc((VBAR_EL1.get() & !0x7ff).wrapping_add(offset));
    // DAIF set, EL1h; NZCV, DIT kept; PAN as SCTLR_EL1.SPAN says; SSBS from DSSBS; the rest
    // cleared.
    let sctlr = SCTLR_EL1.get();
    let mut new = 0x3c5;
    new |= pstate & (0xf << 28 | 1 << 22 | 1 << 24);
    if sctlr & 1 << 23 == 0 {
        new |= 1 << 22;
    }
    if sctlr & 1 << 44 != 0 {
        new |= 1 << 12;
    }
    context.set_pstate(new);
}

/// The stack pointer in use at `pstate`: SP_EL1 at EL1h, else SP_EL0.
pub fn stack_pointer(pstate: u64) -> u64 {
    if pstate & 0xf == EL1H {
        SP_EL1.get()
    } else {
        SP_EL0.get()
    }
}

/// Sets it.
pub fn set_stack_pointer(pstate: u64, value: u64) {
    if pstate & 0xf == EL1H {
        SP_EL1.set(value);
    } else {
        SP_EL0.set(value);
    }
}

const EE: u64 = 1 << 25;
const E0E: u64 = 1 << 24;
/// SCTLR_EL1's bits that say whether data is big-endian, at EL1 and at EL0.
pub const ENDIANNESS: u64 = EE | E0E;

/// The guest's SCTLR_EL1.
#[inline]
pub fn sctlr() -> u64 {
    SCTLR_EL1.get()
}

/// Whether data is big-endian at `pstate`: SCTLR_EL1.EE at EL1, E0E at EL0.
pub fn is_big_endian(pstate: u64) -> bool {
    let bit = if pstate & 0xf == 0 { E0E } else { EE };
    sctlr() & bit != 0
}

/// The page of the IPA that the last stage-2 abort was about.
pub fn faulting_ipa() -> u64 {
    (HPFAR_EL2.get() & 0x0fff_ffff_fff0) << 8
}

static PAR_BARRIERS: AtomicBool = AtomicBool::new(true);
static STAGE2_FIRST: AtomicBool = AtomicBool::new(true);

/// Says what the CPUs do otherwise than they should. Until then everything is expected of them.
pub fn set_errata(errata: &Errata) {
    PAR_BARRIERS.store(!errata.par_reads.is_sound(), Relaxed);
    STAGE2_FIRST.store(!errata.stage2_first.is_sound(), Relaxed);
}

/// PAR_EL1.
fn par() -> u64 {
    if PAR_BARRIERS.load(Relaxed) {
        return par_between_barriers();
    }
    PAR_EL1.get()
}

/// Cortex-A77 hangs if the read meets a load from Device or Non-cacheable memory and a store-exclusive (1508412).
#[cold]
fn par_between_barriers() -> u64 {
    barrier::dmb_sy();
    let value = PAR_EL1.get();
    barrier::dmb_sy();
    value
}

/// Whether a CPU may report a fault of stage 2 although there is one of stage 1.
#[inline]
pub fn may_report_stage2_first() -> bool {
    STAGE2_FIRST.load(Relaxed)
}

/// Who loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// A program.
    El0,
    /// The guest's kernel.
    El1,
}

/// Whether stage 1 forbids the guest a load from `address`.
pub fn stage1_forbids(address: u64, by: Loader) -> bool {
    let before = par();
    // SAFETY: an address translation only writes PAR_EL1, which is put back below.
    unsafe {
        match by {
            Loader::El0 => {
                core::arch::asm!("at s1e0r, {}", in(reg) address, options(nostack, preserves_flags));
            }
            Loader::El1 => {
                core::arch::asm!("at s1e1r, {}", in(reg) address, options(nostack, preserves_flags));
            }
        }
    }
    barrier::isb();
    let result = par();
    PAR_EL1.set(before);
    result & 1 != 0
}

/// The page that stage 1 gives for `address`, as the guest's own EL1 would read it.
///
/// For stage-2 permission faults, after which HPFAR_EL2 is UNKNOWN unless the fault was on a
/// stage-1 walk (Arm ARM D24.2.76). `None` where it does not translate any more: the guest
/// is then best sent back to fault again.
pub fn translate(address: u64) -> Option<u64> {
    let before = par();
    // SAFETY: an address translation only writes PAR_EL1, which is put back below.
    unsafe { core::arch::asm!("at s1e1r, {}", in(reg) address, options(nostack, preserves_flags)) };
    barrier::isb();
    let result = par();
    PAR_EL1.set(before);
    (result & 1 == 0).then_some(result & 0x000f_ffff_ffff_f000)
}

/// The faulting virtual address of the last abort.
pub fn far() -> u64 {
    FAR_EL2.get()
}

/// TCR_EL1, and the TTBR that translates `va`.
pub fn translation(va: u64) -> (u64, u64) {
    let table = match va & 1 << 55 {
        0 => TTBR0_EL1.get(),
        _ => TTBR1_EL1.get(),
    };
    (TCR_EL1.get(), table)
}

/// The syndrome of the last exception.
#[inline]
pub fn esr() -> u64 {
    ESR_EL2.get()
}

macro_rules! id_registers {
    ($($crm:literal $op2:literal $name:literal),* $(,)?) => {
        /// Reads ID register (op0 3, op1 0, CRn 0, `crm`, `op2`), of those that guests see.
        pub fn id_register(crm: u8, op2: u8) -> u64 {
            match (crm, op2) {
                $(($crm, $op2) => {
                    let value: u64;
                    // SAFETY: reads an identification register.
                    unsafe {
                        core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value,
                            options(nomem, nostack, preserves_flags));
                    }
                    value
                })*
                _ => 0,
            }
        }
    };
}

id_registers!(
    4 0 "id_aa64pfr0_el1", 4 1 "id_aa64pfr1_el1",
    6 0 "id_aa64isar0_el1", 6 1 "id_aa64isar1_el1", 6 2 "s3_0_c0_c6_2",
    7 0 "id_aa64mmfr0_el1", 7 1 "id_aa64mmfr1_el1", 7 2 "id_aa64mmfr2_el1",
);
