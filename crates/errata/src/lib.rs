//! What cores do otherwise than the Arm ARM says, as far as EL2 cares: from MIDR_EL1 to what must be done about it.
//!
//! The list is in `table.rs`, one row for each erratum of each part, with its number. A part that is not known
//! by name is taken to have every defect: nobody looked.
//!
//! Read once a CPU at its start; no state.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod table;
#[cfg(test)]
mod tests;
pub mod walks;

use core::fmt;

/// MIDR_EL1: which core this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Midr(u64);

impl Midr {
    /// Takes the register's value.
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns the register's value.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns who made it: 0x41 is Arm; 0 is software.
    pub const fn implementer(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// Returns the implementer's number of the part, 12 bits.
    pub const fn part(self) -> u16 {
        (self.0 >> 4 & 0xfff) as u16
    }

    /// Returns the revision.
    pub const fn revision(self) -> Revision {
        Revision::new((self.0 >> 20 & 0xf) as u8, (self.0 & 0xf) as u8)
    }

    /// Returns what the part is called, if it is one that somebody looked at.
    pub fn name(self) -> Option<&'static str> {
        let known = table::KNOWN
            .iter()
            .find(|known| known.implementer == self.implementer() && known.part == self.part());
        known.map(|known| known.name)
    }
}

/// Variant (major) and revision (minor) of a part: `r1p2` is 1 and 2.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Revision(u8);

impl Revision {
    /// Makes `r<variant>p<revision>`, of which four bits each count.
    pub const fn new(variant: u8, revision: u8) -> Self {
        Self(variant << 4 | revision & 0xf)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}p{}", self.0 >> 4, self.0 & 0xf)
    }
}

/// What a core may do otherwise than the Arm ARM says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Defect {
    /// A broadcast TLBI and its DSB complete before the accesses do that other CPUs made through what it dropped
    /// (D8.16.5). One more broadcast TLBI, whichever, with its DSB completes them.
    BroadcastTlbi,
    /// The hardware's update of a descriptor's dirty state is lost, comes late, or comes although it is off
    /// (D8.5.3).
    DirtyState,
    /// EL1's tables are walked at EL2, for an AT instruction that is speculated. [`walks`] is what to do.
    SpeculativeWalks,
    /// A read of PAR_EL1 hangs the core, unless it stands between two DMB SY. A guest that does not see to that
    /// hangs it, too.
    ParReads,
    /// A load across the end of a page is reported as stage 2's translation fault where stage 1 forbids it.
    Stage2First,
}

/// Whether a CPU has a defect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// No: the part is known, and nothing of the kind is.
    Sound,
    /// Nobody looked, so it is taken for granted.
    Unknown,
    /// Yes: the part and the number its maker gave to the erratum.
    Erratum(&'static str),
}

impl Verdict {
    fn of(midr: Midr, defect: Defect) -> Self {
        let row = table::ERRATA
            .iter()
            .find(|row| row.defect == defect && row.matches(midr));
        match (row, midr.name()) {
            (Some(row), _) => Self::Erratum(row.erratum),
            (None, Some(_)) => Self::Sound,
            (None, None) => Self::Unknown,
        }
    }

    fn worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Erratum(_), _) => self,
            (_, Self::Erratum(_)) => other,
            (Self::Unknown, _) => self,
            _ => other,
        }
    }

    /// Is there nothing to be done?
    pub const fn is_sound(self) -> bool {
        matches!(self, Self::Sound)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sound => f.write_str("no erratum"),
            Self::Unknown => f.write_str("unknown part"),
            Self::Erratum(erratum) => write!(f, "erratum {erratum}"),
        }
    }
}

/// What EL2 needs to know of a CPU, or of all of them: the worst.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errata {
    /// [`Defect::BroadcastTlbi`].
    pub broadcast_tlbi: Verdict,
    /// [`Defect::DirtyState`].
    pub dirty_state: Verdict,
    /// [`Defect::SpeculativeWalks`].
    pub speculative_walks: Verdict,
    /// [`Defect::ParReads`].
    pub par_reads: Verdict,
    /// [`Defect::Stage2First`].
    pub stage2_first: Verdict,
}

impl Errata {
    /// Returns those of one CPU.
    pub fn of(midr: Midr) -> Self {
        Self {
            broadcast_tlbi: Verdict::of(midr, Defect::BroadcastTlbi),
            dirty_state: Verdict::of(midr, Defect::DirtyState),
            speculative_walks: Verdict::of(midr, Defect::SpeculativeWalks),
            par_reads: Verdict::of(midr, Defect::ParReads),
            stage2_first: Verdict::of(midr, Defect::Stage2First),
        }
    }

    /// Returns those of two CPUs together.
    pub fn worse(self, other: Self) -> Self {
        Self {
            broadcast_tlbi: self.broadcast_tlbi.worse(other.broadcast_tlbi),
            dirty_state: self.dirty_state.worse(other.dirty_state),
            speculative_walks: self.speculative_walks.worse(other.speculative_walks),
            par_reads: self.par_reads.worse(other.par_reads),
            stage2_first: self.stage2_first.worse(other.stage2_first),
        }
    }
}
