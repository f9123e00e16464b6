//! The board a guest sees, as pure state machines.
//!
//! # Purpose
//!
//! A Tidemark guest runs on what looks like QEMU's `virt` board: a GICv3 ([`vgic`]), a PL011
//! ([`pl011`]), a PL031 ([`pl031`]) and PSCI firmware behind HVC ([`psci`]), and for guests that bring
//! firmware of their own flash ([`pflash`]) and [`fw_cfg`], at the addresses in [`virt`]. Each is a state machine that is told of accesses and lines and answers with values
//! and levels. Nothing here touches a register, a page or a clock: list registers come through
//! the [`vgic::ListRegisters`] trait and the time is an argument, so all of it is tested on the
//! build machine.
//!
//! # Invariants
//!
//! - No access by a guest panics, allocates or loops longer than one interrupt word (32), the
//!   list registers (16) or a flash's write buffer (64 words). Accesses the architecture does not define read as zero and write nothing.
//! - Everything a device remembers can be had as a plain struct and put back (`save`, `restore`).
//!
//! # Concurrency
//!
//! [`vgic::Vgic`] is shared by all vCPUs and synchronises itself; its module says how. The other
//! devices take `&mut self`: their owner holds them behind its own lock.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod fw_cfg;
pub mod guest_time;
pub mod pflash;
pub mod pl011;
pub mod pl031;
mod primecell;
pub mod psci;
pub mod random;
mod status;
pub mod trng;
pub mod vgic;
pub mod virt;

/// The most vCPUs a guest can have: one affinity-0 range of an SGI target list (IHI 0069, `ICC_SGI1R_EL1`).
pub const MAX_VCPUS: usize = 16;

/// Which vCPU of a guest, below [`MAX_VCPUS`]. It is also `MPIDR_EL1.Aff0`; the other affinities are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuIndex(u8);

impl VcpuIndex {
    /// The boot vCPU, which every guest has.
    pub const ZERO: Self = Self(0);

    /// Makes an index; `None` from [`MAX_VCPUS`] on.
    pub const fn new(index: usize) -> Option<Self> {
        if index < MAX_VCPUS {
            // Below 16, so it fits.
            Some(Self(index as u8))
        } else {
            None
        }
    }

    /// Gives the index for use with slices.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Finds the vCPU with this MPIDR-format affinity (Aff3 in bits 39:32, Aff2..Aff0 in 23:0); other bits are not looked at.
    pub const fn from_affinity(mpidr: u64) -> Option<Self> {
        if mpidr & 0x0000_00ff_00ff_ff00 != 0 {
            return None;
        }
        Self::new((mpidr & 0xff) as usize)
    }

    /// Gives the affinity as in `MPIDR_EL1` bits 39:32 and 23:0.
    pub const fn affinity(self) -> u64 {
        self.0 as u64
    }
}

/// The level of an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Not asserted.
    Low,
    /// Asserted.
    High,
}

/// How wide a guest's MMIO access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessSize {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Half,
    /// 32 bits.
    Word,
    /// 64 bits.
    Double,
}

impl AccessSize {
    /// Reads the SAS field of an ISS (`ESR_EL2` bits 23:22; DDI 0487, data abort ISS); higher bits are ignored.
    pub const fn from_sas(sas: u64) -> Self {
        match sas & 3 {
            0 => Self::Byte,
            1 => Self::Half,
            2 => Self::Word,
            _ => Self::Double,
        }
    }

    /// Gives the number of bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Byte => 1,
            Self::Half => 2,
            Self::Word => 4,
            Self::Double => 8,
        }
    }
}
