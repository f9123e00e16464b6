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

/// Asks for a maintenance interrupt when at most one list register is in use.
pub fn request_underflow_interrupt() {
    ICH_HCR_EL2.set(ICH_HCR_EL2.get() | 0b10);
}

/// Whether it is asked for.
pub fn underflow_interrupt_requested() -> bool {
    ICH_HCR_EL2.get() & 0b10 != 0
}

/// Takes the request back.
pub fn cancel_underflow_interrupt() {
    let hcr = ICH_HCR_EL2.get();
    if hcr & 0b10 != 0 {
        ICH_HCR_EL2.set(hcr & !0b10);
    }
}

/// The virtual interface's state besides the list registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct VirtualInterface {
    vmcr: u64,
    active: [u64; 8],
}

impl VirtualInterface {
    /// Reads it from this CPU and turns the interface off.
    pub fn save() -> Self {
        let mut state = Self {
            vmcr: ICH_VMCR_EL2.get(),
            active: [0; 8],
        };
        // APnR1-3 exist with more than 5, 6 bits of preemption (ICH_VTR_EL2.PREbits).
        let preemption = (ICH_VTR_EL2.get() >> 26 & 7) + 1;
        state.active[0] = ICH_AP0R0_EL2.get();
        state.active[4] = ICH_AP1R0_EL2.get();
        if preemption >= 6 {
            state.active[1] = ICH_AP0R1_EL2.get();
            state.active[5] = ICH_AP1R1_EL2.get();
        }
        if preemption >= 7 {
            state.active[2] = ICH_AP0R2_EL2.get();
            state.active[3] = ICH_AP0R3_EL2.get();
            state.active[6] = ICH_AP1R2_EL2.get();
            state.active[7] = ICH_AP1R3_EL2.get();
        }
        ICH_HCR_EL2.set(0);
        state
    }

    /// Loads it into this CPU and turns the interface on.
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
        ICH_HCR_EL2.set(1);
    }
}
