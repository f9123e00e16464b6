//! Accesses to devices whose abort has no syndrome (ISS.ISV 0), so that whoever emulates the device must read the
//! instruction: every form, from every place, and while another vCPU changes the tables or the code.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use tidemark_guests::pattern::Random;
use tidemark_guests::rt::{console, counter};

use super::map::{self, AF, Kind, Table, USER, Window};
use super::modes::{Code, at_el0_in};
use super::probe::{
    self, ALIGNMENT_READ, ALIGNMENT_WRITE, EXTERNAL_READ, EXTERNAL_WRITE, IL, Resume, Snippet,
    Taken, probe, snippets,
};
use super::{Case, World, identity, other};

snippets! {
    load_pair: "ldp w0, w1, [x2]";
    load_wide_pair: "ldp x0, x1, [x2]";
    load_signed_pair: "ldpsw x0, x1, [x2]";
    load_post: "ldr w0, [x2], #4";
    load_pre: "ldr w0, [x2, #4]!";
    load_byte_post: "ldrsb x0, [x2], #4";
    // ldr w2, [x2], #4
    load_own_base: ".inst 0xb8404442";
    load_stack: "mov x7, sp", "mov sp, x2", "ldr w0, [sp], #16", "mov x1, sp", "mov sp, x7";
    load_exclusive: "ldxr w0, [x2]", "clrex";
    // ldr s0, [x2]; fmov w0, s0
    load_single: ".inst 0xbd400040", ".inst 0x1e260000";
    // ldr q0, [x2]; umov x0, v0.d[0]; umov x1, v0.d[1]
    load_quad: ".inst 0x3dc00040", ".inst 0x4e083c00", ".inst 0x4e183c01";
    // ldr q31, [x2], #16; umov x0, v31.d[0]; umov x1, v31.d[1]
    load_quad_post: ".inst 0x3cc1045f", ".inst 0x4e083fe0", ".inst 0x4e183fe1";
    // ld1 {v0.4s}, [x2], #16; umov x0, v0.d[0]; umov x1, v0.d[1]
    load_structure: ".inst 0x4cdf7840", ".inst 0x4e083c00", ".inst 0x4e183c01";
    store_pair: "stp w0, w1, [x2]";
    store_wide_pair: "stp x0, x1, [x2]";
    store_post: "str w0, [x2], #4";
    store_byte_post: "strb w0, [x2], #4";
    // fmov d0, x0; ins v0.d[1], x1; str q0, [x2]
    store_quad: ".inst 0x9e670000", ".inst 0x4e181c20", ".inst 0x3d800040";
    store_exclusive: "ldxr w6, [x2]", "stxr w7, w0, [x2]";
    zero_block: "dc zva, x2";
    // ldadd w0, w1, [x2]
    atomic_add: ".inst 0xb8200041";
    // cas w0, w1, [x2]
    compare_swap: ".inst 0x88a07c41";
    post_mmu_off: "mrs x6, sctlr_el1", "bic x7, x6, #1", "msr sctlr_el1, x7", "isb",
        "ldr w0, [x2], #4", "dsb sy", "msr sctlr_el1, x6", "isb";
    pair_mmu_off: "mrs x6, sctlr_el1", "bic x7, x6, #1", "msr sctlr_el1, x7", "isb",
        "ldp w0, w1, [x2]", "dsb sy", "msr sctlr_el1, x6", "isb";
    // ldr q0, [x2]
    quad_mmu_off: "mrs x6, sctlr_el1", "bic x7, x6, #1", "msr sctlr_el1, x7", "isb",
        ".inst 0x3dc00040", "dsb sy", "msr sctlr_el1, x6", "isb", ".inst 0x4e083c00", ".inst 0x4e183c01";
    // SCTLR_EL1.EE, which would turn the tables round too.
    pair_big_endian: "mrs x6, sctlr_el1", "bic x7, x6, #1", "orr x7, x7, #0x2000000", "msr sctlr_el1, x7", "isb",
        "ldp w0, w1, [x2]", "dsb sy", "msr sctlr_el1, x6", "isb";
    word_big_endian: "mrs x6, sctlr_el1", "bic x7, x6, #1", "orr x7, x7, #0x2000000", "msr sctlr_el1, x7", "isb",
        "ldr w0, [x2]", "dsb sy", "msr sctlr_el1, x6", "isb";
    quad_big_endian: "mrs x6, sctlr_el1", "bic x7, x6, #1", "orr x7, x7, #0x2000000", "msr sctlr_el1, x7", "isb",
        ".inst 0x3dc00040", "dsb sy", "msr sctlr_el1, x6", "isb", ".inst 0x4e083c00", ".inst 0x4e183c01";
}

const GICD: u64 = 0x0800_0000;
const UART: u64 = 0x0900_0000;
const RTC: u64 = 0x0901_0000;
/// A window where nothing is.
const NOTHING: u64 = 0x0900_1000;

/// Component identification, the same in each: four registers with a byte, the last of them negative as a byte.
const IDENTIFICATION: u64 = 0xff0;
const IDS: [u64; 4] = [0x0d, 0xf0, 0x05, 0xb1];
/// Two of them.
const LOW: u64 = IDS[0] | IDS[1] << 32;
const HIGH: u64 = IDS[2] | IDS[3] << 32;

/// Where the windows for devices begin; the code's come after.
const WINDOW: u64 = 16;
const CODE_WINDOW: u64 = 24;

/// Loads, and what they leave in x0, x1 and beyond the address that x2 held.
const LOADS: [(&str, Snippet, [u64; 2], u64); 11] = [
    ("ldp", load_pair, [IDS[0], IDS[1]], 0),
    ("ldp x", load_wide_pair, [LOW, HIGH], 0),
    ("ldpsw", load_signed_pair, [IDS[0], IDS[1]], 0),
    ("ldr post-index", load_post, [IDS[0], 0x2222], 4),
    ("ldr pre-index", load_pre, [IDS[1], 0x2222], 4),
    ("ldrsb post-index", load_byte_post, [IDS[0], 0x2222], 4),
    ("ldr s", load_single, [IDS[0], 0x2222], 0),
    ("ldr q", load_quad, [LOW, HIGH], 0),
    ("ldr q post-index", load_quad_post, [LOW, HIGH], 16),
    ("ld1", load_structure, [LOW, HIGH], 16),
    ("ldp mmu off", pair_mmu_off, [IDS[0], IDS[1]], 0),
];

fn registers(address: u64) -> [u64; 6] {
    [0x1111, 0x2222, address, 3, 4, 5]
}

/// Every form of load gives what the registers hold, one after the other, and moves its base.
pub fn loads(case: &mut Case, _world: &mut World) {
    for (device, at) in [("UART", UART), ("RTC", RTC)] {
        let at = at + IDENTIFICATION;
        for kind in [Kind::Device, Kind::Normal] {
            let va = map::page(Window(WINDOW), at, kind);
            for (form, snippet, [x0, x1], moved) in LOADS {
                let off = form == "ldp mmu off";
                let va = if off { at } else { va };
                let taken = probe(snippet, registers(va));
                let what = format_args!("{form} of {device} as {kind:?}");
                done(case, &taken, [x0, x1, va + moved, 3, 4, 5], what);
            }
            let taken = probe(load_stack, registers(va));
            let what = format_args!("ldr by SP of {device} as {kind:?}");
            done(case, &taken, [IDS[0], va + 16, va, 3, 4, 5], what);
            // CONSTRAINED UNPREDICTABLE: the base is anything, and nothing else changes.
            let taken = probe(load_own_base, registers(va));
            case.check(
                taken.count == 0 && (taken.x[0], taken.x[1]) == (0x1111, 0x2222),
                format_args!("ldr of its own base: {taken}"),
            );
        }
    }
    // Registers of 32 and of 64 bits of the interrupt controller, by what is as wide.
    let taken = probe(load_post, registers(GICD + 0xfff0));
    let after = [IDS[0], 0x2222, GICD + 0xfff4, 3, 4, 5];
    done(case, &taken, after, format_args!("ldr post-index of GICD"));
}

fn done(case: &mut Case, taken: &Taken, wanted: [u64; 6], what: core::fmt::Arguments<'_>) {
    case.quiet(taken, what);
    case.check(
        taken.x == wanted,
        format_args!("{what}: {:x?}, not {wanted:x?}", taken.x),
    );
}

/// Every form of store writes each register once.
pub fn stores(case: &mut Case, _world: &mut World) {
    // GICD_IROUTER of SPI 40 and 41: 64 bits each.
    let router = GICD + 0x6000 + 8 * 72;
    for kind in [Kind::Device, Kind::Normal] {
        let va = map::page(Window(WINDOW), router, kind);
        for (form, snippet, value) in [
            ("stp x", store_wide_pair as Snippet, [1, 0]),
            ("str q", store_quad, [0, 1]),
        ] {
            let x = [value[0], value[1], va, 3, 4, 5];
            done(
                case,
                &probe(snippet, x),
                x,
                format_args!("{form} as {kind:?}"),
            );
            for (form, snippet) in [("ldp x", load_wide_pair as Snippet), ("ldr q", load_quad)] {
                let taken = probe(snippet, registers(va));
                done(case, &taken, x, format_args!("{form} as {kind:?}"));
            }
        }
        let x = [0, 0, va, 3, 4, 5];
        case.quiet(&probe(store_wide_pair, x), format_args!("stp x of zeros"));
    }
    // RTCMR, which nobody else uses.
    let va = map::page(Window(WINDOW), RTC + 4, Kind::Device);
    let taken = probe(store_post, [0x1234_5678, 0, va, 3, 4, 5]);
    let after = [0x1234_5678, 0, va + 4, 3, 4, 5];
    done(case, &taken, after, format_args!("str post-index of RTCMR"));
    let taken = probe(load_post, registers(va));
    let after = [0x1234_5678, 0x2222, va + 4, 3, 4, 5];
    done(case, &taken, after, format_args!("ldr post-index of RTCMR"));
    looped(case);
}

/// The UART's own line, looped back: what is written to UARTDR comes back there, once.
fn looped(case: &mut Case) {
    let control = UART + 0x30;
    // UARTEN, LBE, TXE, RXE.
    write32(control, 1 | 1 << 7 | 1 << 8 | 1 << 9);
    let va = map::page(Window(WINDOW), UART, Kind::Device);
    for (form, snippet, [x0, x1], after) in [
        (
            "strb post-index",
            store_byte_post as Snippet,
            [0x41, 0],
            va + 4,
        ),
        ("stp", store_pair, [0x42, 0], va),
        ("stp x", store_wide_pair, [0x43, 0], va),
        ("str q", store_quad, [0x44, 0], va),
    ] {
        let taken = probe(snippet, [x0, x1, va, 3, 4, 5]);
        let wanted = [x0, x1, after, 3, 4, 5];
        let back = (read32(UART) & 0xff, read32(UART + 0x18) >> 4 & 1);
        case.quiet(&taken, format_args!("{form} of UARTDR"));
        case.check(
            taken.x == wanted && back == (x0 as u32, 1),
            format_args!("{form} of UARTDR: {:x?}, back came {back:x?}", taken.x),
        );
    }
    console::init();
}

fn read32(at: u64) -> u32 {
    let value: u32;
    // SAFETY: a device's register.
    unsafe { asm!("ldr {:w}, [{}]", out(reg) value, in(reg) at, options(nostack)) };
    value
}

fn write32(at: u64, value: u32) {
    // SAFETY: a device's register.
    unsafe { asm!("str {:w}, [{}]", in(reg) value, in(reg) at, options(nostack)) };
}

/// Without stage 1, and as a big-endian CPU.
pub fn without_mmu(case: &mut Case, _world: &mut World) {
    let at = UART + IDENTIFICATION;
    let x = registers(at);
    for (form, snippet, [x0, x1], moved) in [
        (
            "ldr post-index",
            post_mmu_off as Snippet,
            [IDS[0], 0x2222],
            4,
        ),
        ("ldp", pair_mmu_off, [IDS[0], IDS[1]], 0),
        ("ldr q", quad_mmu_off, [LOW, HIGH], 0),
    ] {
        let what = format_args!("{form}, MMU off");
        done(
            case,
            &probe(snippet, x),
            [x0, x1, at + moved, 3, 4, 5],
            what,
        );
    }
    // ID_AA64MMFR0_EL1.BigEnd
    if identity::field(7, 0, 8) == 0 {
        return;
    }
    let swapped = |value: u64| u64::from((value as u32).swap_bytes());
    for (form, snippet, [x0, x1]) in [
        (
            "ldp",
            pair_big_endian as Snippet,
            [swapped(IDS[0]), swapped(IDS[1])],
        ),
        // With a syndrome.
        ("ldr", word_big_endian, [swapped(IDS[0]), 0x2222]),
        (
            "ldr q",
            quad_big_endian,
            [HIGH.swap_bytes(), LOW.swap_bytes()],
        ),
    ] {
        let what = format_args!("{form}, big-endian");
        done(case, &probe(snippet, x), [x0, x1, at, 3, 4, 5], what);
    }
}

/// From EL0: from a page that EL0 can read, from one that it can only execute, big-endian.
pub fn from_el0(case: &mut Case, _world: &mut World) {
    // svc #0x77
    let over = 0x15 << 26 | IL | 0x77;
    let uart = map::page_with(Window(WINDOW), UART, Kind::Device, AF | USER) + IDENTIFICATION;
    let mut judge = |what: &str, taken: Taken, [x0, x1, x2]: [u64; 3]| {
        case.check(
            taken.count == 1 && taken.syndrome() == over && taken.x[..3] == [x0, x1, x2],
            format_args!("{what} at EL0: {taken} {:x?}", taken.x),
        );
    };
    let x = registers(uart);
    // ldp w0, w1, [x2]; ldr w0, [x2], #4
    let (pair, post) = (0x2940_0440, 0xb840_4440);
    for code in [Code::Readable, Code::ExecuteOnly] {
        judge("ldp", at_el0_in(code, pair, x), [IDS[0], IDS[1], uart]);
        judge(
            "ldr post-index",
            at_el0_in(code, post, x),
            [IDS[0], 0x2222, uart + 4],
        );
    }
    // ID_AA64MMFR0_EL1.BigEnd, BigEndEL0
    if identity::field(7, 0, 8) != 0 || identity::field(7, 0, 16) != 0 {
        let swapped = |value: u64| u64::from((value as u32).swap_bytes());
        let old = sctlr();
        // E0E
        set_sctlr(old | 1 << 24);
        let taken = at_el0_in(Code::Readable, pair, x);
        // ldr w0, [x2]; ldrh w0, [x2]: with a syndrome.
        let word = at_el0_in(Code::Readable, 0xb940_0040, x);
        let half = at_el0_in(Code::Readable, 0x7940_0040, x);
        set_sctlr(old);
        let [first, second, ..] = IDS;
        judge(
            "big-endian ldp",
            taken,
            [swapped(first), swapped(second), uart],
        );
        judge("big-endian ldr", word, [swapped(first), 0x2222, uart]);
        judge("big-endian ldrh", half, [first << 8, 0x2222, uart]);
    }
}

fn sctlr() -> u64 {
    let value: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, sctlr_el1", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_sctlr(value: u64) {
    // SAFETY: the caller changes what is EL0's alone.
    unsafe { asm!("msr sctlr_el1, {}", "isb", in(reg) value, options(nostack)) };
}

/// What has no syndrome and is refused by a bus, too: an external abort that has changed nothing, or done.
pub fn refused(case: &mut Case, _world: &mut World) {
    let va = map::page(Window(WINDOW), UART + IDENTIFICATION, Kind::Normal);
    let x = registers(va);
    let taken = probe(load_exclusive, x);
    match taken.count {
        0 => case.check(taken.x[0] == IDS[0], format_args!("ldxr: {taken}")),
        _ => case.syndrome_at(&taken, &[EXTERNAL_READ], va, format_args!("ldxr")),
    }
    let taken = probe(zero_block, x);
    if taken.count != 0 {
        let allowed = [EXTERNAL_WRITE, ALIGNMENT_WRITE];
        case.syndrome(&taken, &allowed, format_args!("dc zva"));
    }
    atomics(case, x);
    // ldp of the last register of the UART's page and of nothing.
    map::page(Window(WINDOW + 1), NOTHING, Kind::Normal);
    let end = va + 8;
    let taken = probe(load_wide_pair, registers(end));
    let what = format_args!("ldp into nothing");
    case.syndrome(&taken, &[EXTERNAL_READ], what);
    case.check(
        (taken.far == end || taken.far == end + 8) && taken.x[1..] == registers(end)[1..],
        format_args!("{what}: {taken} {:x?}", taken.x),
    );
    // Of RAM and of the UART's first registers: done, or an external abort.
    map::page(Window(WINDOW + 1), UART, Kind::Normal);
    let ram = map::page(Window(WINDOW), CODE[0].address(), Kind::Normal) + 0xff8;
    let taken = probe(load_wide_pair, registers(ram));
    if taken.count != 0 {
        let what = format_args!("ldp out of RAM");
        case.syndrome_at(&taken, &[EXTERNAL_READ], ram + 8, what);
        let changed = taken.x[1..] != registers(ram)[1..];
        case.check(!changed, format_args!("{what}: {:x?}", taken.x));
    }
}

/// Exclusives and atomics; the syndrome may call them reads or writes.
fn atomics(case: &mut Case, x: [u64; 6]) {
    let forms = [
        ("ldxr, stxr", store_exclusive as Snippet),
        ("ldadd", atomic_add),
        ("cas", compare_swap),
    ];
    let atomics = identity::field(6, 0, 20) >= 2;
    for (form, snippet) in forms.into_iter().take(if atomics { 3 } else { 1 }) {
        let taken = probe(snippet, x);
        if taken.count != 0 {
            // DFSC 0x35: an atomic that this memory has not.
            let allowed = [
                EXTERNAL_READ,
                EXTERNAL_WRITE,
                ALIGNMENT_READ,
                ALIGNMENT_WRITE,
                EXTERNAL_READ & !0x3f | 0x35,
                EXTERNAL_WRITE & !0x3f | 0x35,
            ];
            let fits = allowed.contains(&taken.syndrome()) && taken.count <= 2;
            case.check(fits, format_args!("{form}: {taken}"));
        }
    }
}

/// Code for [`at_the_end`], [`tables_change`] and [`code_changes`].
static CODE: [Table; 3] = [const { Table::new() }; 3];

// ldr w0, [x2], #4; ldr w0, [x3], #8; nop; ret
const FIRST: u32 = 0xb840_4440;
const SECOND: u32 = 0xb840_8460;
const NOP: u32 = 0xd503_201f;
const RET: u32 = 0xd65f_03c0;

/// Writes two instructions.
fn put(table: &Table, at: usize, [first, second]: [u32; 2]) {
    if let Some(slot) = table.0.get(at / 8) {
        slot.store(
            u64::from(first) | u64::from(second) << 32,
            Ordering::Relaxed,
        );
    }
    probe::publish(table.address() + at as u64);
}

/// The last instruction of a page, with nothing behind: it is done, and the next one is what aborts.
pub fn at_the_end(case: &mut Case, _world: &mut World) {
    let [code, ..] = &CODE;
    put(code, 0xff8, [NOP, FIRST]);
    map::forget(Window(CODE_WINDOW + 1));
    let page = map::page(Window(CODE_WINDOW), code.address(), Kind::Normal);
    let uart = map::page(Window(WINDOW), UART + IDENTIFICATION, Kind::Device);
    let taken = probe::run(page + 0xff8, registers(uart), Resume::Caller);
    // Instruction abort, translation fault, level 3.
    let what = format_args!("at the end of a page");
    case.syndrome_at(&taken, &[0x21 << 26 | IL | 0x07], page + 0x1000, what);
    case.check(
        taken.elr == page + 0x1000 && taken.x == [IDS[0], 0x2222, uart + 4, 3, 4, 5],
        format_args!("{what}: {taken} {:x?}", taken.x),
    );
}

/// Which of them the other vCPU has put in place last.
static TURN: AtomicU32 = AtomicU32::new(0);

fn turn() -> usize {
    (TURN.fetch_add(1, Ordering::Relaxed) % 3) as usize
}

/// What the other vCPU does in [`tables_change`]: break before make, with invalidation.
pub fn change_tables(_random: &mut Random) -> bool {
    if let Some(code) = CODE.get(turn()) {
        map::page(Window(CODE_WINDOW), code.address(), Kind::Normal);
    }
    false
}

/// What it does in [`code_changes`].
pub fn change_code(_random: &mut Random) -> bool {
    let [code, ..] = &CODE;
    if let Some(word) = [FIRST, SECOND, NOP].get(turn()) {
        put(code, 0, [*word, RET]);
    }
    false
}

/// Another vCPU moves the code's page about, over three that hold different instructions: one of them is done, as a whole, or
/// the page is not there.
pub fn tables_change(case: &mut Case, _world: &mut World) {
    for (code, word) in CODE.iter().zip([FIRST, SECOND, NOP]) {
        put(code, 0, [word, RET]);
    }
    meanwhile(case, other::Storm::Tables, CODE_WINDOW);
}

/// Another vCPU writes the code anew: what is done is one of the instructions, as a whole.
pub fn code_changes(case: &mut Case, _world: &mut World) {
    let [code, ..] = &CODE;
    put(code, 0, [FIRST, RET]);
    map::page(Window(CODE_WINDOW + 2), code.address(), Kind::Normal);
    meanwhile(case, other::Storm::Code, CODE_WINDOW + 2);
}

/// How often each instruction is to be seen.
const EACH: u32 = 1000;

fn meanwhile(case: &mut Case, storm: other::Storm, window: u64) {
    let uart = map::page(Window(WINDOW), UART + IDENTIFICATION, Kind::Device);
    let rtc = map::page(Window(WINDOW + 1), RTC + IDENTIFICATION + 8, Kind::Device);
    let code = map::address(Window(window));
    other::storm(storm, 0);
    let mut seen = [0_u32; 4];
    // Long enough for the two to have run side by side, whatever the machine does besides.
    let enough = counter::within(120, || {
        let x = [0x1111, 0x2222, uart, rtc, 4, 5];
        let taken = probe::run(code, x, Resume::Caller);
        let gone = taken.count == 1 && taken.syndrome() == 0x21 << 26 | IL | 0x07;
        let outcomes = [
            [IDS[0], 0x2222, uart + 4, rtc, 4, 5],
            [IDS[2], 0x2222, uart, rtc + 8, 4, 5],
            x,
        ];
        match outcomes.iter().position(|outcome| taken.x == *outcome) {
            Some(outcome) if taken.count == 0 => seen[outcome] += 1,
            // RET may be what is not there, after any of them.
            Some(_) if gone && taken.far & !0xfff == code => seen[3] += 1,
            _ => case.check(false, format_args!("{taken} {:x?}", taken.x)),
        }
        seen.iter().take(3).all(|seen| *seen >= EACH)
    });
    let (turns, _) = other::calm();
    case.check(
        enough && turns > 0,
        format_args!("{turns} turns of the other vCPU, outcomes {seen:?}"),
    );
}
