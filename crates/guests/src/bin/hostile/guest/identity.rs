//! ID registers: readable, silent about what EL2 does not offer, and true about what they show.

use super::probe::{Register, Snippet, Taken, probe, snippets};
use super::{Case, World};

snippets! {
    // mrs x0, dit
    dit: ".inst 0xd53b42a0";
    // mrs x0, ssbs
    ssbs: ".inst 0xd53b42c0";
    // mrs x0, uao
    uao: ".inst 0xd5384280";
    // mrs x0, pan
    pan: ".inst 0xd5384260";
    // mrs x0, rndr; x2 random
    random: ".inst 0xd53b2400";
    // sb
    speculation_barrier: ".inst 0xd50330ff";
    // ldaddal x0, x1, [sp - 16]
    atomic: "sub x6, sp, #64", ".inst 0xf8e000c1";
    // crc32x w0, w0, x1
    crc: ".inst 0x9ac14c00";
    // ldapr x0, [sp - 64]
    acquire: "sub x6, sp, #64", ".inst 0xf8bfc0c0";
    // dc cvap, x2
    persist: ".inst 0xd50b7c22";
    // cfp rctx, x0
    predict: "mov x0, #0", ".inst 0xd50b7380";
    // scxtnum_el1, scxtnum_el0
    context_number_el1: ".inst 0xd538d0e0";
    context_number_el0: ".inst 0xd53bd0e0";
    // abs x0, x1
    common_short: ".inst 0xdac02020";
    // clrbhb
    clear_history: ".inst 0xd50322df";
    // tlbi rvae1is, x0
    range: "mov x0, #0", ".inst 0xd5088220";
}

/// ID register (CRm, op2) as this guest sees it.
pub fn register(crm: u32, op2: u32) -> Taken {
    Register(3, 0, 0, crm, op2).read()
}

/// A field of it.
pub fn field(crm: u32, op2: u32, shift: u32) -> u64 {
    register(crm, op2).x[0] >> shift & 0xf
}

/// The whole space of identification is readable; what is not allocated in it reads as zero.
pub fn read(case: &mut Case, _world: &mut World) {
    for crm in 1..8 {
        for op2 in 0..8 {
            case.quiet(
                &register(crm, op2),
                format_args!("ID register CRm {crm} op2 {op2}"),
            );
            let write = Register(3, 0, 0, crm, op2).write(u64::MAX);
            case.undefined(
                &write,
                format_args!("write of ID register CRm {crm} op2 {op2}"),
            );
        }
    }
    // MIDR, MPIDR, REVIDR; what is between them is not allocated and may be undefined.
    for op2 in 0..8 {
        let taken = register(0, op2);
        match op2 {
            0 | 5 | 6 => case.quiet(&taken, format_args!("ID register CRm 0 op2 {op2}")),
            _ if taken.count == 0 => {}
            // FEAT_IDST, which cannot be hidden, has a class for it.
            _ => case.check(
                taken.count == 1 && [0x00, 0x18].contains(&taken.class()),
                format_args!("ID register CRm 0 op2 {op2}: {taken}"),
            ),
        }
    }
    let mpidr = register(0, 5).x[0];
    case.check(
        mpidr & 1 << 31 != 0,
        format_args!("MPIDR_EL1 is {mpidr:#x}"),
    );
}

/// What EL2 neither saves nor offers is not shown: (CRm, op2, shift, name, the most there may be).
const ABSENT: [(u32, u32, u32, &str, u64); 38] = [
    (4, 0, 0, "EL0 in AArch32", 1),
    (4, 0, 4, "EL1 in AArch32", 1),
    (4, 0, 8, "EL2", 0),
    (4, 0, 12, "EL3", 0),
    (4, 0, 28, "RAS", 0),
    (4, 0, 32, "SVE", 0),
    (4, 0, 36, "secure EL2", 0),
    (4, 0, 40, "MPAM", 0),
    (4, 0, 44, "AMU", 0),
    (4, 0, 52, "RME", 0),
    (4, 1, 8, "MTE", 0),
    (4, 1, 12, "RAS_frac", 0),
    (4, 1, 16, "MPAM_frac", 0),
    (4, 1, 24, "SME", 0),
    (4, 1, 28, "RNDR_trap", 0),
    (4, 1, 36, "NMI", 0),
    (4, 1, 40, "MTE_frac", 0),
    (4, 1, 44, "GCS", 0),
    (4, 4, 0, "SVEver", 0),
    (4, 5, 32, "SMEver", 0),
    (5, 0, 4, "trace", 0),
    (5, 0, 8, "PMU", 0),
    (5, 0, 32, "SPE", 0),
    (5, 0, 40, "trace filter", 0),
    (5, 0, 44, "trace buffer", 0),
    (5, 0, 52, "BRBE", 0),
    (6, 1, 4, "PAuth APA", 0),
    (6, 1, 8, "PAuth API", 0),
    (6, 1, 24, "PAuth GPA", 0),
    (6, 1, 28, "PAuth GPI", 0),
    (6, 1, 60, "LS64", 0),
    (6, 2, 0, "WFxT", 0),
    (6, 2, 8, "PAuth GPA3", 0),
    (6, 2, 12, "PAuth APA3", 0),
    (6, 2, 16, "MOPS", 0),
    (7, 1, 8, "VHE", 0),
    (7, 1, 16, "LORegions", 0),
    (7, 2, 24, "nested virtualization", 0),
];

pub fn absent(case: &mut Case, _world: &mut World) {
    for (crm, op2, shift, name, most) in ABSENT {
        let shown = field(crm, op2, shift);
        case.check(shown <= most, format_args!("{name} is {shown}"));
    }
    for op2 in [3, 4] {
        let value = register(7, op2).x[0];
        case.check(
            value == 0,
            format_args!("ID_AA64MMFR{op2}_EL1 is {value:#x}"),
        );
    }
}

/// (CRm, op2, shift, the least there must be, what it has, a use of it).
const SHOWN: [(u32, u32, u32, u64, &str, Snippet); 15] = [
    (4, 0, 48, 1, "DIT", dit),
    (4, 0, 56, 2, "CSV2: SCXTNUM_EL1", context_number_el1),
    (4, 0, 56, 2, "CSV2: SCXTNUM_EL0", context_number_el0),
    (4, 1, 4, 2, "SSBS", ssbs),
    (6, 0, 16, 1, "CRC32", crc),
    (6, 0, 20, 2, "Atomic", atomic),
    (6, 0, 56, 2, "TLB", range),
    (6, 0, 60, 1, "RNDR", random),
    (6, 1, 0, 1, "DPB", persist),
    (6, 1, 20, 1, "LRCPC", acquire),
    (6, 1, 36, 1, "SB", speculation_barrier),
    (6, 1, 40, 1, "SPECRES", predict),
    (6, 2, 28, 1, "CLRBHB", clear_history),
    (6, 2, 52, 1, "CSSC", common_short),
    (7, 2, 4, 1, "UAO", uao),
];

/// What is shown can be used.
pub fn shown_work(case: &mut Case, world: &mut World) {
    let place = world.boot.own.first.ipa();
    for (crm, op2, shift, least, name, snippet) in SHOWN {
        if field(crm, op2, shift) >= least {
            let taken = probe(snippet, [0, 0, place, 0, 0, 0]);
            case.quiet(&taken, format_args!("{name} is shown"));
        }
    }
    if field(7, 1, 20) >= 1 {
        case.quiet(&probe(pan, [0; 6]), format_args!("PAN is shown"));
    }
    case.check(
        field(4, 0, 24) >= 1,
        format_args!("no GIC system registers are shown"),
    );
}
