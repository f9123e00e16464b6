//! The ID registers as a guest sees them: what its CPU may use, nothing else.
//!
//! Each field is allowed by name or reads as zero; a feature that EL2 does not save,
//! switch or know cannot slip in with a newer CPU (Arm ARM D24.2, ID_AA64*).

use crate::arch::el1;

/// Reads ID register (op0 3, op1 0, CRn 0, `crm`, `op2`) for a guest with `ipa_bits`.
/// Registers of AArch32, and what is not known, read as zero.
pub fn read(crm: u8, op2: u8, pa_range: u64) -> u64 {
    let real = || el1::id_register(crm, op2);
    match (crm, op2) {
        // PFR0: EL0 and EL1 in AArch64 only; FP, AdvSIMD, DIT, CSV3; GIC and CSV2 to 1: no
        // GICv4, and SCXTNUM (CSV2 2) is neither switched nor enabled.
        (4, 0) => {
            let value = real();
            let capped = |shift: u32| (value >> shift & 0xf).min(1) << shift;
            0x11 | value & (field(16) | field(20) | field(48) | field(60)) | capped(24) | capped(56)
        }
        // PFR1: BT, SSBS.
        (4, 1) => real() & (field(0) | field(4)),
        // DFR0: Armv8 debug with two breakpoints, two watchpoints, all of it trapped; no
        // PMU, no trace.
        (5, 0) => 6 | 1 << 12 | 1 << 20,
        // ISAR0: all but TME (27:24).
        (6, 0) => real() & !field(24),
        // ISAR1: DPB, JSCVT, FCMA, LRCPC, FRINTTS, SB, SPECRES, BF16, DGH, I8MM; no PAuth, LS64, XS.
        (6, 1) => {
            real()
                & (field(0)
                    | field(12)
                    | field(16)
                    | field(20)
                    | field(32)
                    | field(36)
                    | field(40)
                    | field(44)
                    | field(48)
                    | field(52))
        }
        // ISAR2: RPRES, BC, CLRBHB, CSSC; no WFxT, MOPS, PAuth.
        (6, 2) => real() & (field(4) | field(20) | field(28) | field(52)),
        // MMFR0: PARange as wide as the guest's space, ASID bits, granules, mixed endianness.
        (7, 0) => {
            let value = real();
            let granule4 = if value >> 28 & 0xf == 0xf {
                field(28)
            } else {
                0
            };
            let granule16 = if value >> 20 & 0xf == 0 { 0 } else { 1 << 20 };
            (value & 0xf).min(pa_range)
                | value & (field(4) | field(8) | field(12) | field(16) | field(24))
                | granule4
                | granule16
        }
        // MMFR1: HAFDBS to 2, HPDS, PAN, ETS, AFP, ECBHB; no VHE, VMIDs, LORegions.
        (7, 1) => {
            let value = real();
            (value & 0xf).min(2)
                | value & (field(12) | field(20) | field(36) | field(44) | field(60))
        }
        // MMFR2: CnP, UAO, LSM, VARange, CCIDX, ST, AT, TTL, BBM, E0PD; no NV, FWB, IDS.
        (7, 2) => {
            real()
                & (field(0)
                    | field(4)
                    | field(8)
                    | field(16)
                    | field(20)
                    | field(28)
                    | field(32)
                    | field(48)
                    | field(52)
                    | field(60))
        }
        _ => 0,
    }
}

const fn field(shift: u32) -> u64 {
    0xf << shift
}
