//! The shape of the tables: start level, concatenated roots, VTCR_EL2 and VTTBR_EL2.
//!
//! Fewest levels the architecture allows, but never starting below L1, so that 1 GiB blocks exist in
//! every IPA space (Arm ARM D8.2.2, D24.2.224). For 32 to 34 bits a start at L2 would save one load a
//! walk and cost the largest block; rejected.
//!
//! | IPA bits | start | root tables |
//! |---|---|---|
//! | 32..=39 | L1 | 1 |
//! | 40..=43 | L1 | 2, 4, 8, 16 side by side |
//! | 44..=48 | L0 | 1 |

use crate::error::Error;
use crate::hardware::Features;
use crate::pte::MemAttr;
use crate::types::{Level, Pa, Vmid, VmidWidth};

/// What follows from the IPA size and the features, fixed for the life of a VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) ipa_bits: u8,
    pub(crate) start: Level,
    pub(crate) roots: usize,
    pub(crate) vtcr: u64,
    pub(crate) attr: MemAttr,
}

impl Shape {
    pub(crate) fn new(ipa_bits: u8, features: &Features) -> Result<Self, Error> {
        // Output addresses above 48 bits need DS = 1 and another descriptor format.
        let (ps, pa_bits) = match features.pa_bits {
            32 => (0b000, 32),
            36 => (0b001, 36),
            40 => (0b010, 40),
            42 => (0b011, 42),
            44 => (0b100, 44),
            48 | 52 => (0b101, 48),
            other => return Err(Error::PaBits(other)),
        };
        if !(32..=48).contains(&ipa_bits) || ipa_bits > pa_bits {
            return Err(Error::IpaBits {
                asked: ipa_bits,
                most: pa_bits,
            });
        }
        let (start, sl0, roots) = match ipa_bits {
            44.. => (Level::L0, 0b10, 1),
            40.. => (Level::L1, 0b01, 1 << (ipa_bits - 39)),
            _ => (Level::L1, 0b01, 1),
        };
        let attr = if features.fwb.is_present() {
            MemAttr::ForcedWriteBack
        } else {
            MemAttr::WriteBack
        };
        Ok(Self {
            ipa_bits,
            start,
            roots,
            vtcr: vtcr(ipa_bits, sl0, ps, features),
            attr,
        })
    }

    /// Returns the first address past the IPA space.
    pub(crate) const fn limit(&self) -> u64 {
        1 << self.ipa_bits
    }
}

fn vtcr(ipa_bits: u8, sl0: u64, ps: u64, features: &Features) -> u64 {
    const INNER_WRITE_BACK: u64 = 0b01 << 8;
    const OUTER_WRITE_BACK: u64 = 0b01 << 10;
    const INNER_SHAREABLE: u64 = 0b11 << 12;
    const GRANULE_4K: u64 = 0b00 << 14;
    const VMID_16: u64 = 1 << 19;
    const HA: u64 = 1 << 21;
    const HD: u64 = 1 << 22;
    const RES1: u64 = 1 << 31;
    let t0sz = 64 - u64::from(ipa_bits);
    let mut vtcr = RES1
        | ps << 16
        | GRANULE_4K
        | INNER_SHAREABLE
        | OUTER_WRITE_BACK
        | INNER_WRITE_BACK
        | sl0 << 6
        | t0sz;
    if features.vmid == VmidWidth::Sixteen {
        vtcr |= VMID_16;
    }
    // Both or neither: HD without HA does nothing, and HA where HAFDBS is denied by an erratum
    // (AmpereOne AC03_CPU_38) lets the hardware write to descriptors after they were broken.
    if features.dbm.is_present() {
        vtcr |= HA | HD;
    }
    vtcr
}

/// Returns VTCR_EL2 for VMs of `ipa_bits` on a machine with `features`, without making one: it is set
/// once for each CPU, before there is any VM.
///
/// # Errors
///
/// [`Error::IpaBits`] and [`Error::PaBits`], as [`Stage2::new`](crate::Stage2::new).
pub fn vtcr_el2(ipa_bits: u8, features: &Features) -> Result<u64, Error> {
    Ok(Shape::new(ipa_bits, features)?.vtcr)
}

/// Returns VTTBR_EL2 for a root table; CnP stays clear.
pub(crate) const fn vttbr(root: Pa, vmid: Vmid) -> u64 {
    (vmid.raw() as u64) << 48 | root.raw()
}
