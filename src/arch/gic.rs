//! The GICv3 system-register interface (IHI 0069): the physical CPU interface that EL2
//! takes interrupts from, and the virtual one (ICH_*) that a guest's run on.
//!
//! EOImode is 1: EL2 drops the priority at once and deactivates apart, so that an
//! interrupt handed to a guest through a hardware-linked list register stays active
//! until the guest ends it.

use super::{barrier, regs};
use aarch64_cpu::registers::*;
use tock_registers::interfaces::{Readable, Writeable};

/// INTIDs 1020 to 1023: nothing to acknowledge.
const FIRST_SPECIAL: u64 = 1020;

/// Turns on this CPU's interface for group 1.
pub fn init_cpu_interface() {
    // System registers, no bypass. Without Enable, EL1's accesses to its own ICC_SRE trap:
    // one guest must not turn the interface off for the next.
    ICC_SRE_EL2.set(7);
    barrier::isb();
    regs::ICC_SRE_EL1.set(7);
    barrier::isb();
    regs::ICC_PMR_EL1.set(0xff);
    regs::ICC_BPR1_EL1.set(0);
    regs::ICC_CTLR.set(1 << 1);
    regs::ICC_IGRPEN1_EL1.set(1);
    ICH_HCR_EL2.set(0);
    for n in 0..list_register_count() {
        write_list_register(n, 0);
    }
    ICH_VMCR_EL2.set(0);
    barrier::isb();
}

/// Takes the highest-priority pending interrupt, if there is one.
pub fn acknowledge() -> Option<u32> {
    let intid = regs::ICC_IAR1_EL1.get() & 0xff_ffff;
    barrier::dsb_nsh();
    (intid < FIRST_SPECIAL).then_some(intid as u32)
}

/// Drops the running priority; the interrupt stays active.
pub fn drop_priority(intid: u32) {
    regs::ICC_EOIR1_EL1.set(u64::from(intid));
}

/// Lets the interrupt fire again.
pub fn deactivate(intid: u32) {
    regs::ICC_DIR_EL1.set(u64::from(intid));
}

/// Whether an interrupt waits for this CPU: the look between bounded steps.
pub fn interrupt_pending() -> bool {
    regs::ISR_EL1.get() & 0b1_1100_0000 != 0
}

/// Sends SGI `intid` to the CPU with this affinity.
pub fn send_sgi(intid: u32, affinity: u64) {
    let (aff0, aff1, aff2, aff3) = (
        affinity & 0xff,
        affinity >> 8 & 0xff,
        affinity >> 16 & 0xff,
        affinity >> 32 & 0xff,
    );
    let value = aff3 << 48
        | (aff0 >> 4) << 44
        | aff2 << 32
        | u64::from(intid) << 24
        | aff1 << 16
        | 1 << (aff0 & 0xf);
    // What the other CPU is to see must be seen before it is called.
    barrier::dsb_ishst();
    regs::ICC_SGI1R_EL1.set(value);
    barrier::isb();
}

/// How many list registers there are.
#[inline]
pub fn list_register_count() -> usize {
    (ICH_VTR_EL2.get() & 0x1f) as usize + 1
}

/// Which of them hold no interrupt and have no maintenance interrupt asserted (ICH_ELRSR_EL2), one bit each.
#[inline]
pub fn empty_list_registers() -> u32 {
    regs::ICH_ELRSR_EL2.get() as u32
}

macro_rules! list_registers {
    ($($n:literal $register:ident),*) => {
        /// Reads list register `n`.
        #[inline]
        pub fn read_list_register(n: usize) -> u64 {
            match n { $($n => $register.get(),)* _ => 0 }
        }

        /// Writes list register `n`.
        #[inline]
        pub fn write_list_register(n: usize, value: u64) {
            match n { $($n => $register.set(value),)* _ => {} }
        }
    };
}

list_registers!(
    0 ICH_LR0_EL2, 1 ICH_LR1_EL2, 2 ICH_LR2_EL2, 3 ICH_LR3_EL2,
    4 ICH_LR4_EL2, 5 ICH_LR5_EL2, 6 ICH_LR6_EL2, 7 ICH_LR7_EL2,
    8 ICH_LR8_EL2, 9 ICH_LR9_EL2, 10 ICH_LR10_EL2, 11 ICH_LR11_EL2,
    12 ICH_LR12_EL2, 13 ICH_LR13_EL2, 14 ICH_LR14_EL2, 15 ICH_LR15_EL2
);

/// ICH_HCR_EL2.En
const ENABLE: u64 = 1;
/// ICH_HCR_EL2.EOIcount
const ENDS: u64 = 0x1f << 27;

/// When a maintenance interrupt is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(u64);

impl Watch {
    /// Only where a list register says so.
    pub const NOTHING: Self = Self(0);
    /// When no list register is pending (ICH_HCR_EL2.NPIE).
    pub const PENDING: Self = Self(1 << 3);

    /// When the guest ends what is in no list register (LRENPIE); its deactivations trap (TDIR).
    ///
    /// Where there is no TDIR (ICH_VTR_EL2.TDS) the registers common to both groups trap all together (TC).
    pub fn ends() -> Self {
        const TDS: u64 = 1 << 19;
        let trap = match ICH_VTR_EL2.get() & TDS {
            0 => 1 << 10,
            _ => 1 << 14,
        };
        Self(1 << 2 | trap)
    }

    /// Both.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Asks for the maintenance interrupt, and counts ends from zero.
pub fn watch(watch: Watch) {
    ICH_HCR_EL2.set(ENABLE | watch.0);
}

/// How often the guest ended what is in no list register, since it was asked last. With EOImode 1 its ends only drop
/// priorities, which some count as well (QEMU).
pub fn take_ended() -> u32 {
    let control = ICH_HCR_EL2.get();
    let count = (control & ENDS) >> 27;
    if count == 0 {
        return 0;
    }
    ICH_HCR_EL2.set(control & !ENDS);
    match splits_ends() {
        true => 0,
        false => count as u32,
    }
}

const VCBPR: u64 = 1 << 4;
const VEOIM: u64 = 1 << 9;

/// Whether the guest runs with EOImode 1 (ICH_VMCR_EL2.VEOIM).
pub fn splits_ends() -> bool {
    ICH_VMCR_EL2.get() & VEOIM != 0
}

/// ICV_CTLR_EL1 as the guest reads it.
pub fn virtual_control() -> u64 {
    let (vtr, vmcr) = (ICH_VTR_EL2.get(), ICH_VMCR_EL2.get());
    let field = |shift: u32, mask: u64, at: u32| (vtr >> shift & mask) << at;
    // A3V, SEIS, IDbits, PRIbits.
    let fixed = field(21, 1, 15) | field(22, 1, 14) | field(23, 7, 11) | field(29, 7, 8);
    fixed | u64::from(vmcr & VEOIM != 0) << 1 | u64::from(vmcr & VCBPR != 0)
}

/// And as it writes it: CBPR and EOImode.
pub fn set_virtual_control(value: u64) {
    let kept = ICH_VMCR_EL2.get() & !(VCBPR | VEOIM);
    ICH_VMCR_EL2.set(kept | ((value & 1) * VCBPR) | ((value >> 1 & 1) * VEOIM));
}

/// ICV_PMR_EL1.
pub fn virtual_mask() -> u64 {
    ICH_VMCR_EL2.get() >> 24 & 0xff
}

/// Sets it, as far as there are priority bits.
pub fn set_virtual_mask(value: u64) {
    let unused = 7 - (ICH_VTR_EL2.get() >> 29 & 7);
    let value = (value & 0xff) >> unused << unused;
    ICH_VMCR_EL2.set(ICH_VMCR_EL2.get() & !(0xff << 24) | value << 24);
}

/// ICV_RPR_EL1: the most urgent of the active priorities.
pub fn virtual_running_priority() -> u64 {
    let bits = (ICH_VTR_EL2.get() >> 26 & 7) + 1;
    let active = active_priorities();
    let both = active.iter().take(4).zip(active.iter().skip(4));
    for (word, (group0, group1)) in (0..).zip(both) {
        let set = (group0 | group1) as u32;
        if set != 0 {
            return (32 * word + u64::from(set.trailing_zeros())) << (8 - bits);
        }
    }
    0xff
}

/// `ICH_AP0R<n>_EL2`, then `ICH_AP1R<n>_EL2`. Those with n above 0 exist with more than 5, 6 bits of preemption (ICH_VTR_EL2.PREbits).
fn active_priorities() -> [u64; 8] {
    let mut active = [0; 8];
    let preemption = (ICH_VTR_EL2.get() >> 26 & 7) + 1;
    active[0] = ICH_AP0R0_EL2.get();
    active[4] = ICH_AP1R0_EL2.get();
    if preemption >= 6 {
        active[1] = ICH_AP0R1_EL2.get();
        active[5] = ICH_AP1R1_EL2.get();
    }
    if preemption >= 7 {
        active[2] = ICH_AP0R2_EL2.get();
        active[3] = ICH_AP0R3_EL2.get();
        active[6] = ICH_AP1R2_EL2.get();
        active[7] = ICH_AP1R3_EL2.get();
    }
    active
}

/// The virtual interface's state besides the list registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct VirtualInterface {
    /// What is watched, and the ends counted since.
    control: u64,
    vmcr: u64,
    active: [u64; 8],
}

impl VirtualInterface {
    /// Reads it from this CPU and turns the interface off.
    pub fn save() -> Self {
        let state = Self {
            control: ICH_HCR_EL2.get(),
            vmcr: ICH_VMCR_EL2.get(),
            active: active_priorities(),
        };
        ICH_HCR_EL2.set(0);
        state
    }

    /// Loads it into this CPU. It stays off until the list registers are loaded as well ([`VirtualInterface::enable`]).
    pub fn load(&self) {
        let preemption = (ICH_VTR_EL2.get() >> 26 & 7) + 1;
        ICH_VMCR_EL2.set(self.vmcr);
        ICH_AP0R0_EL2.set(self.active[0]);
        ICH_AP1R0_EL2.set(self.active[4]);
        if preemption >= 6 {
            ICH_AP0R1_EL2.set(self.active[1]);
            ICH_AP1R1_EL2.set(self.active[5]);
        }
        if preemption >= 7 {
            ICH_AP0R2_EL2.set(self.active[2]);
            ICH_AP0R3_EL2.set(self.active[3]);
            ICH_AP1R2_EL2.set(self.active[6]);
            ICH_AP1R3_EL2.set(self.active[7]);
        }
    }

    /// Turns it on.
    pub fn enable(&self) {
        ICH_HCR_EL2.set(self.control | ENABLE);
    }
}
