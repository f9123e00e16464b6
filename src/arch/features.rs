//! What the CPUs can do, as far as EL2 cares: read once on each, the least of all used.

use super::regs;
use aarch64_cpu::registers::{ID_AA64ISAR0_EL1, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1, MIDR_EL1};
use spin::Once;
use tidemark_errata::{Errata, Midr, Verdict};
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
    /// Whether stage 2 has the 4 KiB granule.
    pub stage2_4k: bool,
    /// Which core this is; of several, the one that was read last.
    pub midr: Midr,
    /// What it does otherwise than it should.
    pub errata: Errata,
}

/// What is to be thought of the hardware's dirty state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyState {
    /// There is none.
    Absent,
    /// An erratum forbids it.
    Broken(&'static str),
    /// It is there, on a part whose errata nobody looked at.
    Unknown,
    /// It can be relied on.
    Sound,
}

impl Features {
    /// Reads this CPU's.
    pub fn read() -> Self {
        let field = |register: u64, shift: u32| (register >> shift & 0xf) as u8;
        let mmfr0 = ID_AA64MMFR0_EL1.get();
        let mmfr1 = ID_AA64MMFR1_EL1.get();
        let mmfr2 = regs::ID_MMFR2.get();
        let isar0 = ID_AA64ISAR0_EL1.get();
        let midr = Midr::new(MIDR_EL1.get());
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
            stage2_4k: has_stage2_4k(mmfr0),
            midr,
            errata: Errata::of(midr),
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
            stage2_4k: self.stage2_4k && other.stage2_4k,
            midr: other.midr,
            errata: self.errata.worse(other.errata),
        }
    }

    /// What is to be thought of the hardware's dirty state.
    pub fn dirty_state(&self) -> DirtyState {
        match self.errata.dirty_state {
            _ if self.hafdbs < 2 => DirtyState::Absent,
            Verdict::Erratum(erratum) => DirtyState::Broken(erratum),
            Verdict::Unknown => DirtyState::Unknown,
            Verdict::Sound => DirtyState::Sound,
        }
    }
}

static SYSTEM: Once<Features> = Once::new();

/// Says what all CPUs have in common. Once, when they have come up.
pub fn set_system(features: Features) -> &'static Features {
    SYSTEM.call_once(|| features)
}

/// What all CPUs have in common.
pub fn system() -> &'static Features {
    SYSTEM
        .get()
        .expect("asked for before the CPUs have come up")
}

/// ID_AA64MMFR0.TGran4_2 of a CPU, which may leave it to TGran4.
const fn has_stage2_4k(mmfr0: u64) -> bool {
    let (tgran4, tgran4_2) = (mmfr0 >> 28 & 0xf, mmfr0 >> 40 & 0xf);
    !matches!((tgran4_2, tgran4), (0b0001, _) | (0b0000, 0b1111))
}

// Left to TGran4, with and without 52 bits; said by itself.
const _: () = {
    assert!(has_stage2_4k(0) && has_stage2_4k(1 << 28) && !has_stage2_4k(0xf << 28));
    assert!(has_stage2_4k(2 << 40 | 0xf << 28) && has_stage2_4k(3 << 40));
    assert!(!has_stage2_4k(1 << 40) && !has_stage2_4k(1 << 40 | 1 << 28));
};

/// ID_AA64MMFR0.PARange of this CPU, as TCR_EL2.PS takes it.
pub fn pa_range() -> u64 {
    ID_AA64MMFR0_EL1.get() & 0xf
}
