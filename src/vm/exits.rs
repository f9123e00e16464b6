//! What is done about an exit that a VM can answer by itself. One file a class.
//!
//! A handler changes the VM's own state and returns what the rooms above are to do ([`Effects`]).

pub mod abort;
pub mod device;
mod external;
pub mod hypercall;
mod instruction;
pub mod sysreg;
pub mod timer;
mod walk;

use super::count;
use super::flash::FlashError;
use super::vcpu::Vcpu;
use crate::arch::el1;
use crate::arch::exception::Syndrome;
use alloc::boxed::Box;
use core::fmt;
use log::debug;
use tidemark_devices::vgic::Kick;

/// What is to be done after an exit.
///
/// ```text
///  63      48 47  40 39     34   33     32  31             0
/// +----------+------+---------+-------+----+----------------+
/// |    0     | next |    0    | alarm | out|      kick      |
/// +----------+------+---------+-------+----+----------------+
/// ```
///
/// One register, so that an exit that asks for nothing is told by one comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "vCPUs wait for what is named here"]
pub struct Effects(u64);

/// How a vCPU goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Next {
    /// Its guest goes on.
    GoOn,
    /// It waits for an interrupt.
    Block,
    /// It waits for its quota, and then tries again.
    Stall,
    /// It made a call (SMCCC) that is about other vCPUs or the whole VM; its registers say which.
    Call,
}

const OUTPUT: u64 = 1 << 32;
const ALARM: u64 = 1 << 33;
const NEXT_SHIFT: u32 = 40;

impl Effects {
    /// Nothing: the guest goes on.
    pub const NONE: Self = Self(0);

    /// These vCPUs of its VM have something new in the vGIC.
    #[inline]
    pub const fn kick(kick: Kick) -> Self {
        Self(kick.mask() as u64)
    }

    /// It goes on like this.
    pub const fn next(next: Next) -> Self {
        Self((next as u64) << NEXT_SHIFT)
    }

    /// And it wrote to its console.
    pub const fn with_output(self) -> Self {
        Self(self.0 | OUTPUT)
    }

    /// And its VM's alarm was set.
    pub const fn with_alarm(self) -> Self {
        Self(self.0 | ALARM)
    }

    /// These and those of another access of the same instruction.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether nothing is to be done.
    #[inline]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether nothing is to be done but to kick vCPUs.
    #[inline]
    pub const fn is_kick(self) -> bool {
        self.0 >> 32 == 0
    }

    /// Which vCPUs have something new.
    #[inline]
    pub const fn kicked(self) -> Kick {
        Kick::of_mask(self.0 as u32)
    }

    /// Whether there is output.
    pub const fn has_output(self) -> bool {
        self.0 & OUTPUT != 0
    }

    /// Whether the VM's alarm was set.
    pub const fn has_alarm(self) -> bool {
        self.0 & ALARM != 0
    }

    /// How the vCPU goes on.
    #[inline]
    pub const fn how(self) -> Next {
        match (self.0 >> NEXT_SHIFT) as u8 {
            1 => Next::Block,
            2 => Next::Stall,
            3 => Next::Call,
            _ => Next::GoOn,
        }
    }
}

/// Why a VM cannot be carried on.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// No memory is left for its translation tables.
    OutOfTables,
    /// Its flash could not do what it is there for.
    Flash(FlashError),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfTables => f.write_str("no memory is left for its translation tables"),
            Self::Flash(error) => error.fmt(f),
        }
    }
}

/// What is to be done, or why the VM ends. Boxed, so that it comes in two registers.
pub type Answer = Result<Effects, Box<Failure>>;

/// WFI gives the CPU away; WFE does not trap. WFIT (ISS.TI 0b10) is not offered: its timeout would need a timer.
pub fn wait(vcpu: &'static Vcpu, syndrome: Syndrome) -> Effects {
    if syndrome.0 & 0b10 != 0 {
        return undefined(vcpu, syndrome);
    }
    count(&vcpu.vm.counters.wfi);
    vcpu.context.skip_instruction();
    Effects::next(Next::Block)
}

/// What the guest's CPU does not have is undefined to it.
pub fn undefined(vcpu: &'static Vcpu, syndrome: Syndrome) -> Effects {
    count(&vcpu.vm.counters.others);
    debug!(
        "{}: vCPU {}: {syndrome} at {:#x}: undefined",
        vcpu.vm.name(),
        vcpu.index.index(),
        vcpu.context.pc()
    );
    // EC 0, IL.
    el1::inject_sync(&vcpu.context, 1 << 25, None);
    Effects::NONE
}
