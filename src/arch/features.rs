//! What the CPUs can do, as far as EL2 cares: read once on each, the least of all used.

use super::regs;
use aarch64_cpu::registers::{ID_AA64ISAR0_EL1, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1, MIDR_EL1};
use tock_registers::interfaces::Readable;

/// Features of one CPU, or the least of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// ID_AA64MMFR1.HAFDBS: 0 none, 1 access flag, 2 and dirty state, 3 and table AF, 4 HDBSS.
    pub hafdbs: u8,
    /// ID_AA64MMFR2.BBM: level of break-before-make relief.
    pub bbm: u8,
    /// ID_AA64MMFR2.FWB: stage 2 forces write-back.
    pub fwb: u8,
    /// ID_AA64MMFR2.TTL: level hints in TLBI operands.
    pub ttl: u8,
    /// ID_AA64ISAR0.TLB: 2 has range operations.
    pub tlb: u8,
    /// ID_AA64ISAR0.Atomic: 2 has the LSE atomics.
    pub lse: u8,
    /// Bits of a VMID: 8 or 16.
    pub vmid_bits: u8,
    /// Bits of a physical address.
    pub pa_bits: u8,
    /// Whether a broadcast TLBI is complete only after its second time.
    pub tlbi: Tlbi,
    /// Why the dirty bit is not to be used on this CPU although it may be there.
    pub erratum: Option<Erratum>,
}

/// How often a broadcast TLBI with its DSB must be done to be complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tlbi {
    /// Once, as the architecture says.
    Once,
    /// Twice: otherwise another CPU may go on storing through the old entry (Cortex-A76 to
    /// r3p0 1286807, Cortex-A55 2441007, Cortex-A510 to r1p1 2441009, Falkor E1009).
    Twice,
}

impl Tlbi {
    fn of(midr: u64) -> Self {
        let (implementer, part) = (midr >> 24 & 0xff, midr >> 4 & 0xfff);
        let revision = (midr >> 20 & 0xf) << 4 | midr & 0xf;
        match (implementer, part) {
            (0x41, 0xd0b) if revision <= 0x30 => Self::Twice,
            (0x41, 0xd05) | (0x51, 0xc00) => Self::Twice,
            (0x41, 0xd46) if revision <= 0x11 => Self::Twice,
            _ => Self::Once,
        }
    }
}

/// A known defect that decides whether hardware dirty state can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erratum {
    /// Cortex-A55, all revisions, and Kryo 4xx Silver: DBM may be updated wrongly.
    CortexA55Erratum1024718,
    /// Cortex-A510 r0p0 to r0p2: the dirty update's ordering is not respected.
    CortexA510Erratum2051678,
    /// AmpereOne: updates can follow an entry's invalidation; HA and HD must stay 0.
    AmpereOneAc03Cpu38,
}

impl Erratum {
    fn of(midr: u64) -> Option<Self> {
        let (implementer, part) = (midr >> 24 & 0xff, midr >> 4 & 0xfff);
        let revision = (midr >> 20 & 0xf) << 4 | midr & 0xf;
        match (implementer, part) {
            (0x41, 0xd05) | (0x51, 0x805) => Some(Self::CortexA55Erratum1024718),
            (0x41, 0xd46) if revision <= 0x02 => Some(Self::CortexA510Erratum2051678),
            (0xc0, 0xac3 | 0xac4) => Some(Self::AmpereOneAc03Cpu38),
            _ => None,
        }
    }
}

impl Features {
    /// Reads this CPU's.
    pub fn read() -> Self {
        let field = |register: u64, shift: u32| (register >> shift & 0xf) as u8;
        let mmfr0 = ID_AA64MMFR0_EL1.get();
        let mmfr1 = ID_AA64MMFR1_EL1.get();
        let mmfr2 = regs::ID_MMFR2.get();
        let isar0 = ID_AA64ISAR0_EL1.get();
        Self {
            hafdbs: field(mmfr1, 0),
            bbm: field(mmfr2, 52),
            fwb: field(mmfr2, 40),
            ttl: field(mmfr2, 48),
            tlb: field(isar0, 56),
            lse: field(isar0, 20),
            vmid_bits: if field(mmfr1, 4) == 2 { 16 } else { 8 },
            pa_bits: match field(mmfr0, 0) {
                0 => 32,
                1 => 36,
                2 => 40,
                3 => 42,
                4 => 44,
                // 52 bits need FEAT_LPA's descriptors, which EL2 does not use.
                _ => 48,
            },
            tlbi: Tlbi::of(MIDR_EL1.get()),
            erratum: Erratum::of(MIDR_EL1.get()),
        }
    }

    /// What both can do.
    pub fn least(self, other: Self) -> Self {
        Self {
            hafdbs: self.hafdbs.min(other.hafdbs),
            bbm: self.bbm.min(other.bbm),
            fwb: self.fwb.min(other.fwb),
            ttl: self.ttl.min(other.ttl),
            tlb: self.tlb.min(other.tlb),
            lse: self.lse.min(other.lse),
            vmid_bits: self.vmid_bits.min(other.vmid_bits),
            pa_bits: self.pa_bits.min(other.pa_bits),
            tlbi: self.tlbi.max(other.tlbi),
            erratum: self.erratum.or(other.erratum),
        }
    }

    /// Whether stage 2 may rely on the hardware's dirty state.
    pub fn dbm_usable(&self) -> bool {
        self.hafdbs >= 2 && self.erratum.is_none()
    }
}

/// ID_AA64MMFR0.PARange of this CPU, as TCR_EL2.PS takes it.
pub fn pa_range() -> u64 {
    ID_AA64MMFR0_EL1.get() & 0xf
}
