//! Keeping the walks of EL1's tables off while VTTBR_EL2 is another VM's than the rest of EL1's registers.
//!
//! Cores with [`Defect::SpeculativeWalks`](crate::Defect::SpeculativeWalks) walk for an AT instruction that is only
//! speculated, out of context. What such a walk finds it caches under the number that is in VTTBR_EL2 at that moment,
//! and the other VM would use it. So it must find nothing: TCR_EL1.EPD0 and EPD1 forbid walks, but only while
//! SCTLR_EL1.M is 1; with stage 1 off addresses go to stage 2 as they are. KVM's order (nVHE): the ban, then M, then
//! the other VTTBR_EL2; and back in reverse, each step complete before the next.

/// TCR_EL1.EPD0 and EPD1: no walk by either table.
const NO_WALKS: u64 = 1 << 7 | 1 << 23;
/// SCTLR_EL1.M: stage 1 is on.
const STAGE1: u64 = 1;

/// The registers of one CPU that decide what EL1's walks find. Writes count from the next ISB on.
pub trait Registers {
    /// Reads TCR_EL1.
    fn tcr(&self) -> u64;
    /// Writes it.
    fn set_tcr(&mut self, value: u64);
    /// Reads SCTLR_EL1.
    fn sctlr(&self) -> u64;
    /// Writes it.
    fn set_sctlr(&mut self, value: u64);
    /// Writes VTTBR_EL2.
    fn set_vttbr(&mut self, value: u64);
    /// `ISB`.
    fn isb(&mut self);
}

/// May a CPU walk out of context?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OutOfContext {
    /// It does not, as the architecture demands.
    Never,
    /// It may.
    Possible,
}

/// What the guest has in TCR_EL1 and SCTLR_EL1.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stage1 {
    /// TCR_EL1.
    pub tcr: u64,
    /// SCTLR_EL1.
    pub sctlr: u64,
}

/// Makes another VTTBR_EL2 current while the rest is still that of the VM before. Returns what [`leave`] puts back.
#[inline]
pub fn enter(walks: OutOfContext, registers: &mut impl Registers, vttbr: u64) -> Stage1 {
    let mut before = Stage1::default();
    if walks == OutOfContext::Possible {
        before = Stage1 {
            tcr: registers.tcr(),
            sctlr: registers.sctlr(),
        };
        registers.set_tcr(before.tcr | NO_WALKS);
        registers.isb();
        if before.sctlr & STAGE1 == 0 {
            registers.set_sctlr(before.sctlr | STAGE1);
            registers.isb();
        }
    }
    registers.set_vttbr(vttbr);
    registers.isb();
    before
}

/// Undoes [`enter`], whose answer `before` is: back to the VTTBR_EL2 that was current.
#[inline]
pub fn leave(walks: OutOfContext, registers: &mut impl Registers, vttbr: u64, before: Stage1) {
    registers.set_vttbr(vttbr);
    registers.isb();
    if walks == OutOfContext::Possible {
        registers.set_sctlr(before.sctlr);
        registers.isb();
        registers.set_tcr(before.tcr);
    }
}

/// Ends a switch that [`enter`] began: the other registers, written before this, are of the new VM as well, and these
/// are its last two.
#[inline]
pub fn arrive(walks: OutOfContext, registers: &mut impl Registers, stage1: Stage1) {
    if walks == OutOfContext::Possible {
        registers.isb();
    }
    registers.set_sctlr(stage1.sctlr);
    if walks == OutOfContext::Possible {
        registers.isb();
    }
    registers.set_tcr(stage1.tcr);
}
