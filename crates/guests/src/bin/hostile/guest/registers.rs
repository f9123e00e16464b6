//! System registers and instructions that this guest's CPU does not have, and maintenance with wild operands.

use super::map::{self, Kind, Window};
use super::memory::{self, MAINTENANCE};
use super::probe::{self, Register, probe, snippets};
use super::{Case, World, identity, interrupts};

snippets! {
    // ptrue p0.b
    sve: ".inst 0x2518e3e0";
    // ldr z0, [x2]
    sve_load: ".inst 0x85804040";
    // smstart
    sme_start: ".inst 0xd503477f";
    // zero {za}
    sme_zero: ".inst 0xc00800ff";
    // irg x0, x0
    mte_tag: ".inst 0x9adf1000";
    // udf #0
    permanently: ".inst 0x00000000";
    // setp [x0]!, x1!, x2
    copy: ".inst 0x19c20420";
    // ld64b x0, [x2]
    load64b: ".inst 0xf83fd040";
    // dcps2
    debug_state: ".inst 0xd4a00002";
    // hlt #0
    halt: ".inst 0xd4400000";
    // wild: an encoding that nothing has
    nothing: ".inst 0x02000000";
    // pacia x0, x1, with SCTLR_EL1.EnIA
    sign: "mrs x6, sctlr_el1", "orr x7, x6, #0x80000000", "msr sctlr_el1, x7", "isb", ".inst 0xdac10020",
        "msr sctlr_el1, x6", "isb";
}

fn undefined_both(case: &mut Case, register: Register, name: &str) {
    case.undefined(&register.read(), format_args!("read of {name} {register}"));
    case.undefined(
        &register.write(0),
        format_args!("write of {name} {register}"),
    );
}

/// All of EL2's, EL3's and the aliases of EL1's that EL2 has under another name.
pub fn higher_levels(case: &mut Case, world: &mut World) {
    for (register, name) in [
        (Register(3, 4, 1, 1, 0), "HCR_EL2"),
        (Register(3, 4, 1, 0, 0), "SCTLR_EL2"),
        (Register(3, 4, 1, 1, 2), "CPTR_EL2"),
        (Register(3, 4, 1, 2, 2), "HCRX_EL2"),
        (Register(3, 4, 2, 1, 0), "VTTBR_EL2"),
        (Register(3, 4, 2, 1, 2), "VTCR_EL2"),
        (Register(3, 4, 2, 0, 0), "TTBR0_EL2"),
        (Register(3, 4, 12, 0, 0), "VBAR_EL2"),
        (Register(3, 4, 12, 11, 0), "ICH_HCR_EL2"),
        (Register(3, 4, 12, 12, 0), "ICH_LR0_EL2"),
        (Register(3, 4, 13, 0, 2), "TPIDR_EL2"),
        (Register(3, 4, 14, 0, 3), "CNTVOFF_EL2"),
        (Register(3, 4, 14, 1, 0), "CNTHCTL_EL2"),
        (Register(3, 4, 0, 0, 5), "VMPIDR_EL2"),
        (Register(3, 4, 4, 1, 0), "SP_EL1"),
        (Register(3, 4, 12, 9, 5), "ICC_SRE_EL2"),
        (Register(3, 5, 1, 0, 0), "SCTLR_EL12"),
        (Register(3, 6, 1, 1, 0), "SCR_EL3"),
        (Register(3, 7, 14, 2, 1), "CNTPS_CTL_EL1"),
    ] {
        undefined_both(case, register, name);
    }
    for _ in 0..1000 {
        let bits = world.random.next() as u32;
        let op1 = 4 + (bits >> 20) % 3;
        let register = Register(3, op1, bits & 15, bits >> 4 & 15, bits >> 8 & 7);
        undefined_both(case, register, "EL2 or EL3 register");
    }
    // EL2's and EL3's address translation and TLB maintenance.
    for crm in [8, 9] {
        for op2 in 0..8 {
            let at = Register(1, 4 + 2 * (op2 & 1), 7, crm, op2);
            case.undefined(&at.write(0), format_args!("AT {at}"));
        }
    }
    for op1 in [4, 6] {
        for crm in 0..8 {
            for op2 in 0..8 {
                let tlbi = Register(1, op1, 8, crm, op2);
                case.undefined(
                    &tlbi.write(world.random.next()),
                    format_args!("TLBI {tlbi}"),
                );
            }
        }
    }
}

/// Features that the ID registers do not show.
pub fn features(case: &mut Case, _world: &mut World) {
    for (register, name) in [
        (Register(3, 3, 9, 12, 0), "PMCR_EL0"),
        (Register(3, 3, 9, 12, 1), "PMCNTENSET_EL0"),
        (Register(3, 3, 9, 12, 5), "PMSELR_EL0"),
        (Register(3, 3, 9, 13, 0), "PMCCNTR_EL0"),
        (Register(3, 3, 9, 13, 2), "PMXEVCNTR_EL0"),
        (Register(3, 3, 9, 14, 0), "PMUSERENR_EL0"),
        (Register(3, 3, 14, 8, 0), "PMEVCNTR0_EL0"),
        (Register(3, 3, 14, 15, 7), "PMCCFILTR_EL0"),
        (Register(3, 0, 9, 14, 1), "PMINTENSET_EL1"),
        (Register(3, 0, 1, 2, 0), "ZCR_EL1"),
        (Register(3, 0, 1, 2, 4), "SMPRI_EL1"),
        (Register(3, 0, 1, 2, 6), "SMCR_EL1"),
        (Register(3, 3, 4, 2, 2), "SVCR"),
        (Register(3, 3, 13, 0, 5), "TPIDR2_EL0"),
        (Register(3, 0, 2, 1, 0), "APIAKeyLo_EL1"),
        (Register(3, 0, 2, 1, 1), "APIAKeyHi_EL1"),
        (Register(3, 0, 2, 1, 2), "APIBKeyLo_EL1"),
        (Register(3, 0, 2, 2, 0), "APDAKeyLo_EL1"),
        (Register(3, 0, 2, 2, 3), "APDBKeyHi_EL1"),
        (Register(3, 0, 2, 3, 0), "APGAKeyLo_EL1"),
        (Register(3, 0, 1, 0, 6), "GCR_EL1"),
        (Register(3, 0, 1, 0, 5), "RGSR_EL1"),
        (Register(3, 0, 5, 6, 0), "TFSR_EL1"),
        (Register(3, 0, 5, 6, 1), "TFSRE0_EL1"),
        (Register(3, 0, 10, 4, 0), "LORSA_EL1"),
        (Register(3, 0, 10, 4, 1), "LOREA_EL1"),
        (Register(3, 0, 10, 4, 2), "LORN_EL1"),
        (Register(3, 0, 10, 4, 3), "LORC_EL1"),
        (Register(3, 0, 1, 2, 1), "TRFCR_EL1"),
        (Register(3, 3, 13, 2, 0), "AMCR_EL0"),
        (Register(3, 3, 13, 2, 3), "AMUSERENR_EL0"),
        (Register(3, 3, 13, 4, 0), "AMEVCNTR00_EL0"),
        (Register(3, 0, 9, 9, 0), "PMSCR_EL1"),
        (Register(3, 0, 9, 10, 0), "PMBLIMITR_EL1"),
        (Register(3, 0, 9, 11, 0), "TRBLIMITR_EL1"),
        (Register(3, 0, 5, 3, 1), "ERRSELR_EL1"),
        (Register(3, 0, 5, 4, 1), "ERXCTLR_EL1"),
        (Register(3, 0, 5, 4, 2), "ERXSTATUS_EL1"),
        (Register(3, 0, 2, 0, 3), "TCR2_EL1"),
        (Register(3, 0, 1, 0, 3), "SCTLR2_EL1"),
        (Register(3, 0, 10, 2, 3), "PIR_EL1"),
        (Register(3, 0, 10, 2, 2), "PIRE0_EL1"),
        (Register(3, 0, 10, 2, 4), "POR_EL1"),
        (Register(3, 0, 10, 2, 1), "MAIR2_EL1"),
        (Register(3, 0, 2, 5, 0), "GCSCR_EL1"),
        (Register(3, 0, 10, 5, 0), "MPAM1_EL1"),
        (Register(2, 1, 0, 1, 0), "TRCPRGCTLR"),
        (Register(2, 1, 0, 4, 0), "TRCAUXCTLR"),
        (Register(2, 1, 9, 0, 0), "BRBCR_EL1"),
    ] {
        undefined_both(case, register, name);
    }
    for (register, name) in [
        (Register(3, 0, 10, 4, 7), "LORID_EL1"),
        (Register(3, 0, 5, 3, 0), "ERRIDR_EL1"),
        (Register(3, 3, 9, 12, 6), "PMCEID0_EL0"),
        (Register(3, 0, 10, 4, 4), "MPAMIDR_EL1"),
    ] {
        case.undefined(&register.read(), format_args!("read of {name} {register}"));
    }
    // PSTATE.TCO and ALLINT cannot be trapped: a CPU that has them has them, and they do nothing.
    for (register, name) in [
        (Register(3, 3, 4, 2, 7), "TCO"),
        (Register(3, 0, 4, 3, 0), "ALLINT"),
    ] {
        let read = register.read();
        match read.count {
            0 => case.check(read.x[0] == 0, format_args!("{name}: {read}")),
            _ => case.undefined(&read, format_args!("{name}")),
        }
    }
}

pub fn instructions(case: &mut Case, world: &mut World) {
    let place = world.boot.own.first.ipa();
    for (name, snippet) in [
        ("SVE ptrue", sve as probe::Snippet),
        ("SVE ldr", sve_load),
        ("SME smstart", sme_start),
        ("SME zero", sme_zero),
        ("UDF", permanently),
        ("MOPS setp", copy),
        ("LS64", load64b),
        ("DCPS2", debug_state),
        ("HLT", halt),
        ("an unallocated one", nothing),
        ("PACIA with EnIA", sign),
    ] {
        let taken = probe(snippet, [0, 0, place, 0, 0, 0]);
        case.undefined(&taken, format_args!("{name}"));
    }
    // MTE's own instructions cannot be trapped either.
    let taken = probe(mte_tag, [place, 0, 0, 0, 0, 0]);
    if taken.count != 0 {
        case.undefined(&taken, format_args!("MTE irg"));
    }
}

/// CRn 11 and 15 are for the implementation: its own controls, of caches, of power, of errata.
pub fn implementation_defined(case: &mut Case, world: &mut World) {
    for _ in 0..600 {
        let bits = world.random.next() as u32;
        let crn = if bits & 1 == 0 { 11 } else { 15 };
        let register = Register(3, bits >> 4 & 7, crn, bits >> 8 & 15, bits >> 12 & 7);
        undefined_both(case, register, "implementation defined");
        let system = Register(1, bits >> 4 & 7, crn, bits >> 8 & 15, bits >> 12 & 7);
        case.undefined(
            &system.write(world.random.next()),
            format_args!("SYS {system}"),
        );
        case.undefined(&system.read(), format_args!("SYSL {system}"));
    }
    // ACTLR_EL1 is there and does nothing.
    let actlr = Register(3, 0, 1, 0, 1);
    case.quiet(&actlr.write(u64::MAX), format_args!("write of ACTLR_EL1"));
    let read = actlr.read();
    case.check(
        read.count == 0 && read.x[0] == 0,
        format_args!("ACTLR_EL1: {read}"),
    );
}

/// There is a debug architecture, with next to nothing in it.
pub fn debug(case: &mut Case, world: &mut World) {
    let status = Register(2, 0, 1, 1, 4);
    for (register, name) in [
        (Register(2, 0, 1, 0, 4), "OSLAR_EL1"),
        (Register(2, 0, 1, 3, 4), "OSDLR_EL1"),
        (Register(2, 0, 0, 2, 2), "MDSCR_EL1"),
        (Register(2, 0, 0, 0, 4), "DBGBVR0_EL1"),
        (Register(2, 0, 0, 0, 5), "DBGBCR0_EL1"),
        (Register(2, 0, 0, 1, 4), "DBGBVR1_EL1"),
        (Register(2, 0, 0, 0, 6), "DBGWVR0_EL1"),
        (Register(2, 0, 0, 0, 7), "DBGWCR0_EL1"),
        (Register(2, 0, 0, 2, 0), "MDCCINT_EL1"),
    ] {
        for value in [u64::MAX, 1, world.random.next()] {
            case.quiet(&register.write(value), format_args!("write of {name}"));
        }
        if name != "OSLAR_EL1" {
            let read = register.read();
            // MDSCR_EL1 may offer what needs no breakpoint: KDE, TDCC, SS.
            let kept = if name == "MDSCR_EL1" { 0x3001 } else { 0 };
            case.check(
                read.count == 0 && read.x[0] & !kept == 0,
                format_args!("{name}: {read}"),
            );
        }
        // Where they do work, nothing is to be left in them.
        register.write(0);
    }
    let read = status.read();
    case.check(
        read.count == 0 && read.x[0] == 8,
        format_args!("OSLSR_EL1: {read}"),
    );
    for (register, name) in [
        (Register(2, 3, 0, 1, 0), "MDCCSR_EL0"),
        (Register(2, 0, 1, 0, 0), "MDRAR_EL1"),
    ] {
        let read = register.read();
        case.check(
            read.count == 0 && read.x[0] == 0,
            format_args!("{name}: {read}"),
        );
    }
    // QEMU does not have this one.
    let read = Register(2, 0, 7, 14, 6).read();
    match read.count {
        0 => case.check(read.x[0] == 0, format_args!("DBGAUTHSTATUS_EL1: {read}")),
        _ => case.undefined(&read, format_args!("DBGAUTHSTATUS_EL1")),
    }
    for _ in 0..600 {
        let bits = world.random.next() as u32;
        let register = Register(2, bits & 7, bits >> 3 & 15, bits >> 7 & 15, bits >> 11 & 7);
        let value = world.random.next();
        for taken in [register.write(value), register.read()] {
            if taken.count != 0 {
                case.undefined(&taken, format_args!("{register} with {value:#x}"));
            }
        }
    }
    // One of those may have been MDSCR_EL1: single-stepping would go on in the cases that enter EL0.
    case.quiet(
        &Register(2, 0, 0, 2, 2).write(0),
        format_args!("end of single-stepping"),
    );
}

/// Reads of registers of any encoding: a value, undefined, or a trap of EL1's own.
pub fn read_all(case: &mut Case, world: &mut World) {
    for _ in 0..4000 {
        let bits = world.random.next() as u32;
        let register = Register(
            2 + (bits & 1),
            bits >> 1 & 7,
            bits >> 4 & 15,
            bits >> 8 & 15,
            bits >> 12 & 7,
        );
        let taken = register.read();
        let own = [0x00, 0x18, 0x19].contains(&taken.class());
        let fits = taken.count == 0 || taken.count == 1 && own && taken.resumable();
        case.check(fits, format_args!("read of {register}: {taken}"));
    }
    // Some of them acknowledge interrupts.
    interrupts::works(case, world);
}

/// By set and way, any level, set and way: cleans, whatever it is called.
pub fn set_way(case: &mut Case, world: &mut World) {
    for _ in 0..300 {
        for (crm, op2) in [(6, 2), (10, 2), (14, 2)] {
            let value = world.random.next();
            let value = if value & 1 == 0 {
                value
            } else {
                value & 0x3ff_ffff
            };
            let taken = Register(1, 0, 7, crm, op2).write(value);
            // A level, set or way that is not there may be undefined.
            if taken.count == 0 {
                case.quiet(&taken, format_args!("DC by set and way"));
            } else {
                case.undefined(&taken, format_args!("DC by set and way {value:#x}"));
            }
        }
    }
    let memory = world.boot.image.first.ipa() + 0x38;
    let magic = probe::probe(load32, [0, 0, memory, 0, 0, 0]).x[0];
    case.check(
        magic == 0x644d_5241,
        format_args!("the image's magic is {magic:#x}"),
    );
}

snippets! {
    load32: "ldr w0, [x2]";
    // dc cvap, x2
    persist: ".inst 0xd50b7c22";
    all_code: "ic iallu", "dsb nsh", "isb";
    all_code_shared: "ic ialluis", "dsb ish", "isb";
}

/// By address, of devices, of nothing, and of code.
pub fn by_address(case: &mut Case, world: &mut World) {
    let devices = [
        0x0800_0000,
        0x080a_0000,
        0x0900_0000,
        0x0901_0000,
        0x0a00_0000,
    ];
    for ipa in devices.into_iter().chain(memory::nowhere(&world.boot)) {
        for kind in [Kind::Device, Kind::Normal] {
            let va = map::page(Window(6), ipa, kind);
            for (name, instruction) in MAINTENANCE {
                let taken = probe(instruction, [0, 0, va, 0, 0, 0]);
                memory::maintained(case, &taken, name, ipa);
            }
            if identity::field(6, 1, 0) >= 1 {
                let taken = probe(persist, [0, 0, va, 0, 0, 0]);
                memory::maintained(case, &taken, "dc cvap", ipa);
            }
        }
    }
    for snippet in [all_code, all_code_shared] {
        case.quiet(&probe(snippet, [0; 6]), format_args!("IC IALLU"));
    }
}

/// EL1's own TLB maintenance takes any operand.
pub fn tlb(case: &mut Case, world: &mut World) {
    let mut run = |crm: u32, op2s: &[u32]| {
        for op2 in op2s {
            for _ in 0..40 {
                let value = world.random.next();
                let taken = Register(1, 0, 8, crm, *op2).write(value);
                case.quiet(
                    &taken,
                    format_args!("TLBI CRm {crm} op2 {op2} with {value:#x}"),
                );
            }
        }
    };
    for crm in [3, 7] {
        run(crm, &[0, 1, 2, 3, 5, 7]);
    }
    if identity::field(6, 0, 56) >= 1 {
        run(1, &[0, 1, 2, 3, 5, 7]);
    }
    if identity::field(6, 0, 56) >= 2 {
        for crm in [2, 5, 6] {
            run(crm, &[1, 3, 5, 7]);
        }
    }
}
