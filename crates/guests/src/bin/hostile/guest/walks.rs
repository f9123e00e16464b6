//! Stage-1 tables where tables cannot be, and tables that the hardware writes to.

use super::map::{self, AF, DBM, Kind, Level, READ_ONLY, Table, Window};
use super::probe::{self, IL, Resume, WRITE, probe, snippets};
use super::{Case, World, identity, memory};

snippets! {
    load: "ldr x0, [x2]";
    store: "str x0, [x2]";
    // With x3 as TCR_EL1 and x4 as TTBR1_EL1; x5 is TCR_EL1 as it was.
    load_upper: "msr ttbr1_el1, x4", "msr tcr_el1, x3", "isb", "ldr x0, [x2]", "dsb sy",
        "msr tcr_el1, x5", "isb", "tlbi vmalle1", "dsb nsh", "isb";
    load_with_tcr: "msr tcr_el1, x3", "isb", "ldr x0, [x2]", "dsb sy", "msr tcr_el1, x5", "isb";
    store_with_tcr: "msr tcr_el1, x3", "isb", "str x0, [x2]", "dsb sy", "msr tcr_el1, x5", "isb";
    translate_read: "at s1e1r, x2", "isb", "mrs x0, par_el1";
    translate_write: "at s1e1w, x2", "isb", "mrs x0, par_el1";
    translate_read_el0: "at s1e0r, x2", "isb", "mrs x0, par_el1";
    translate_write_el0: "at s1e0w, x2", "isb", "mrs x0, par_el1";
}

/// TCR_EL1.HA: the hardware sets access flags.
const HA: u64 = 1 << 39;
/// TCR_EL1.HD: the hardware manages dirty state.
const HD: u64 = 1 << 40;

static DATA: Table = Table::new();

/// A data abort from EL1 about an external abort on a walk, at `level`.
fn walk_read(level: u64) -> u64 {
    0x25 << 26 | IL | (0x14 + level)
}

fn tcr() -> u64 {
    let tcr: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mrs {}, tcr_el1", out(reg) tcr, options(nomem, nostack)) };
    tcr
}

/// A page without access flag: the hardware sets it where it can and may, else that is a fault.
pub fn access_flag(case: &mut Case, _world: &mut World) {
    let va = map::page_with(Window(1), DATA.address(), Kind::Normal, 0);
    let fault = 0x25 << 26 | IL | 0x0b;
    let taken = probe(load, [0, 0, va, 0, 0, 0]);
    case.syndrome_at(&taken, &[fault], va, format_args!("without TCR.HA"));
    if identity::field(7, 1, 0) < 1 {
        return case.skip("ID_AA64MMFR1_EL1.HAFDBS is 0");
    }
    let taken = probe(load_with_tcr, [0, 0, va, tcr() | HA, 0, tcr()]);
    case.quiet(&taken, format_args!("with TCR.HA"));
    let entry = map::descriptor(Window(1));
    case.check(
        entry & AF != 0,
        format_args!("descriptor {entry:#x} has no AF"),
    );
}

/// A read-only page with DBM: a write makes it writable where the hardware can and may, else that is a fault.
pub fn dirty_state(case: &mut Case, _world: &mut World) {
    let va = map::page_with(
        Window(2),
        DATA.address(),
        Kind::Normal,
        AF | READ_ONLY | DBM,
    );
    let fault = 0x25 << 26 | IL | 0x0f | WRITE;
    let taken = probe(store, [1, 0, va, 0, 0, 0]);
    case.syndrome_at(&taken, &[fault], va, format_args!("without TCR.HD"));
    if identity::field(7, 1, 0) < 2 {
        return case.skip("ID_AA64MMFR1_EL1.HAFDBS is below 2");
    }
    let taken = probe(load_with_tcr, [0, 0, va, tcr() | HA | HD, 0, tcr()]);
    case.quiet(&taken, format_args!("read with TCR.HD"));
    let entry = map::descriptor(Window(2));
    case.check(
        entry & READ_ONLY != 0,
        format_args!("a read made {entry:#x} writable"),
    );
    let taken = probe(store_with_tcr, [0x77, 0, va, tcr() | HA | HD, 0, tcr()]);
    case.quiet(&taken, format_args!("write with TCR.HD"));
    let entry = map::descriptor(Window(2));
    case.check(
        entry & READ_ONLY == 0,
        format_args!("a write left {entry:#x} read-only"),
    );
    let seen = DATA
        .0
        .first()
        .map_or(0, |word| word.load(core::sync::atomic::Ordering::Relaxed));
    case.check(seen == 0x77, format_args!("the page holds {seen:#x}"));
}

pub fn nowhere(case: &mut Case, world: &mut World) {
    for ipa in memory::nowhere(&world.boot) {
        through(case, ipa);
    }
}

/// Reading a device's registers as descriptors must not happen either: whoever emulates it has no access to emulate.
pub fn in_devices(case: &mut Case, _world: &mut World) {
    for ipa in [
        0x0800_0000,
        0x080a_0000,
        0x080b_0000,
        0x080c_0000,
        0x0900_0000,
        0x0901_0000,
        0x0a00_0000,
        // Erased flash: all ones would be a valid descriptor.
        0x0000_0000,
        0x0400_1000,
    ] {
        through(case, ipa);
    }
}

fn through(case: &mut Case, ipa: u64) {
    for level in [Level::Two, Level::Three] {
        let va = map::walk_through(level, ipa);
        let what = format_args!("level {} table at IPA {ipa:#x}", level.number());
        let abort = walk_read(level.number());
        let taken = probe(load, [0, 0, va, 0, 0, 0]);
        case.syndrome_at(&taken, &[abort], va, what);
        let taken = probe(store, [0, 0, va, 0, 0, 0]);
        case.syndrome_at(&taken, &[abort | WRITE], va, what);
        let taken = probe::run(va, [0; 6], Resume::Caller);
        let fetch = 0x21 << 26 | IL | (0x14 + level.number());
        case.syndrome_at(&taken, &[fetch], va, what);
    }
    map::walk_nothing();
}

/// The upper half's root itself is nowhere.
pub fn root_nowhere(case: &mut Case, world: &mut World) {
    // EPD1 off; 4 KiB, write-back, inner shareable.
    let upper = tcr() & !(1 << 23) | 2 << 30 | 3 << 28 | 1 << 26 | 1 << 24;
    let va = 0xffff_ff80_1234_5678;
    for ipa in memory::nowhere(&world.boot) {
        let root = ipa & !0xfff;
        let taken = probe(load_upper, [0, 0, va, upper, root, tcr()]);
        let what = format_args!("root at IPA {root:#x}");
        case.syndrome_at(&taken, &[walk_read(1)], va, what);
    }
}

/// AT of anything: PAR_EL1 has an answer, or the walk's abort is taken.
pub fn translate(case: &mut Case, world: &mut World) {
    let forms = [
        translate_read as probe::Snippet,
        translate_write,
        translate_read_el0,
        translate_write_el0,
    ];
    let good = map::page(Window(3), DATA.address(), Kind::Normal);
    let taken = probe(translate_read, [0, 0, good, 0, 0, 0]);
    case.quiet(&taken, format_args!("AT of a page"));
    case.check(
        taken.x[0] & 0xffff_ffff_f001 == DATA.address(),
        format_args!("AT gives PAR {:#x}, not {:#x}", taken.x[0], DATA.address()),
    );
    // Stage 1 alone: it does not matter that nothing is there.
    let ipa = memory::nowhere(&world.boot)[5];
    let va = map::page(Window(3), ipa, Kind::Normal);
    let taken = probe(translate_read, [0, 0, va, 0, 0, 0]);
    case.quiet(&taken, format_args!("AT of a page of nothing"));
    let device = memory::nowhere(&world.boot)[0];
    for level in [Level::Two, Level::Three] {
        for table in [ipa, device, 0x0900_0000] {
            let va = map::walk_through(level, table);
            for form in forms {
                let taken = probe(form, [0, 0, va, 0, 0, 0]);
                // AT is cache maintenance to the syndrome (ISS.CM); WnR is for the W forms and may be set for all.
                let abort = walk_read(level.number());
                let allowed = [
                    abort,
                    abort | WRITE,
                    abort | probe::CACHE,
                    abort | WRITE | probe::CACHE,
                ];
                let what = format_args!("AT, level {} table at {table:#x}", level.number());
                match taken.count {
                    0 => case.check(taken.x[0] & 1 == 1, format_args!("{what}: {taken}")),
                    _ => case.syndrome(&taken, &allowed, what),
                }
            }
            map::walk_nothing();
        }
    }
    for _ in 0..500 {
        let va = world.random.next();
        for form in forms {
            let taken = probe(form, [0, 0, va, 0, 0, 0]);
            case.quiet(&taken, format_args!("AT of {va:#x}"));
        }
    }
}
