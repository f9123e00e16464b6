//! Exceptions of the guest's own making, other levels, and AArch32.

use core::arch::asm;

use tidemark_guests::rt::{psci, say};

use super::map::{self, AF, Kind, Table, USER, Window};
use super::probe::{
    self, IL, Resume, SYNC_EL0, SYNC_EL1T, Taken, UNDEFINED, WRITE, probe, snippets,
};
use super::{Case, World};

snippets! {
    stack_load: "mov x7, sp", "sub x6, x7, #8", "mov sp, x6", "ldr x0, [sp]", "mov sp, x7";
    stack_store: "mov x7, sp", "sub x6, x7, #24", "mov sp, x6", "str x0, [sp]", "mov sp, x7";
    stack_nowhere: "mov x7, sp", "mov sp, x2", "ldr x0, [sp]", "mov sp, x7";
    supervisor: "svc #0x123";
    breakpoint: "brk #0x321";
    // To the mode in x3.
    return_to: "msr elr_el1, x4", "msr spsr_el1, x3", "isb", "eret";
    load_sp0: "msr sp_el0, x2", "msr spsel, #0", "ldr x0, [sp]", "msr spsel, #1";
}

static CODE: Table = Table::new();
/// A window where nothing is.
const NOTHING: u64 = 0x0900_1000;

pub fn misaligned(case: &mut Case, world: &mut World) {
    for (name, snippet) in [
        ("load", stack_load as probe::Snippet),
        ("store", stack_store),
    ] {
        let taken = probe(snippet, [0; 6]);
        // Not every emulator looks (QEMU does not); then the access is done.
        if taken.count == 0 {
            case.quiet(&taken, format_args!("{name} by a misaligned SP"));
        } else {
            let what = format_args!("{name} by a misaligned SP");
            case.syndrome(&taken, &[0x26 << 26 | IL], what);
        }
    }
    let nothing = map::page(Window(7), NOTHING, Kind::Normal);
    let taken = probe(stack_nowhere, [0, 0, nothing, 0, 0, 0]);
    case.syndrome_at(
        &taken,
        &[probe::EXTERNAL_READ],
        nothing,
        format_args!("SP nowhere"),
    );
    for offset in 1..4 {
        let place = world.boot.own.first.ipa() + offset;
        let taken = probe::run(place, [0; 6], Resume::Caller);
        case.syndrome_at(
            &taken,
            &[0x22 << 26 | IL],
            place,
            format_args!("PC {place:#x}"),
        );
    }
}

pub fn debug_exceptions(case: &mut Case, _world: &mut World) {
    // SVC's preferred return is the next instruction, so one is stepped over: the snippet's end. Resume at the caller.
    let taken = probe::run(supervisor as *const () as u64, [0; 6], Resume::Caller);
    case.syndrome(&taken, &[0x15 << 26 | IL | 0x123], format_args!("SVC"));
    let taken = probe(breakpoint, [0; 6]);
    case.syndrome(&taken, &[0x3c << 26 | IL | 0x321], format_args!("BRK"));
}

/// ERET to a level that is not below, or to none: PSTATE.IL, and the next instruction says so.
pub fn illegal_return(case: &mut Case, _world: &mut World) {
    let landing = supervisor as *const () as u64;
    // EL2t, EL2h, EL3t, EL3h, reserved ones, EL1 in AArch32, Hyp, Monitor.
    for mode in [8, 9, 12, 13, 1, 2, 3, 7, 15, 0x13, 0x11, 0x1a, 0x16, 0x1f] {
        let x = [0, 0, 0, 0x3c0 | mode, landing, 0];
        let taken = probe::run(return_to as *const () as u64, x, Resume::Caller);
        let what = format_args!("return to mode {mode:#x}");
        case.check(
            taken.count == 1 && taken.class() == 0x0e && taken.spsr & 1 << 20 != 0,
            format_args!("{what}: {taken}"),
        );
    }
}

/// How EL0's page of code is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// EL0 may read it.
    Readable,
    /// It may not.
    ExecuteOnly,
}

/// Runs an instruction at EL0, with an SVC behind it. x3 and x4 are not passed on.
pub fn at_el0_in(code: Code, word: u32, x: [u64; 6]) -> Taken {
    for (slot, word) in CODE.0.iter().zip([u64::from(word) | 0xd400_0ee1 << 32]) {
        slot.store(word, core::sync::atomic::Ordering::Relaxed);
    }
    probe::publish(CODE.address());
    let code = match code {
        Code::Readable => map::page_with(Window(8), CODE.address(), Kind::Normal, AF | USER),
        Code::ExecuteOnly => map::execute_only(Window(8), CODE.address()),
    };
    let [x0, x1, x2, _, _, x5] = x;
    // EL0t, all masked.
    let x = [x0, x1, x2, 0x3c0, code, x5];
    probe::run(return_to as *const () as u64, x, Resume::Caller)
}

fn at_el0(word: u32, x: [u64; 6]) -> Taken {
    at_el0_in(Code::Readable, word, x)
}

pub fn el0(case: &mut Case, world: &mut World) {
    // svc #0x77
    let done = 0x15 << 26 | IL | 0x77;
    let mut judge = |what: &str, taken: Taken, allowed: &[u64]| {
        let fits = taken.count == 1
            && taken.vector == SYNC_EL0
            && taken.spsr & 0x1f == 0
            && allowed.contains(&taken.syndrome());
        case.check(fits, format_args!("{what}: {taken}"));
    };
    let nothing = map::page_with(Window(9), NOTHING, Kind::Normal, AF | USER);
    let uart = map::page_with(Window(10), 0x0900_0000, Kind::Device, AF | USER);
    let at = |address| [0, 0, address, 0, 0, 0];
    judge("nop", at_el0(0xd503_201f, [0; 6]), &[done]);
    // ldr x0, [x2]; str x0, [x2]
    let abort = 0x24 << 26 | IL | 0x10;
    judge(
        "ldr from nothing",
        at_el0(0xf940_0040, at(nothing)),
        &[abort],
    );
    judge(
        "str to nothing",
        at_el0(0xf900_0040, at(nothing)),
        &[abort | WRITE],
    );
    // br x2
    judge(
        "br to nothing",
        at_el0(0xd61f_0040, at(nothing)),
        &[0x20 << 26 | IL | 0x10],
    );
    // ldr w0, [x2]
    let taken = at_el0(0xb940_0040, at(uart + 0xffc));
    judge("ldr from the UART", taken, &[done]);
    let value: &[u64] = if taken.x[0] == 0xb1 { &[done] } else { &[] };
    judge("its value", taken, value);
    // ldp w0, w1, [x2]
    judge(
        "ldp from the UART",
        at_el0(0x2940_0440, at(uart + 0xff0)),
        &[done],
    );
    for (what, word) in [
        ("hvc", 0xd400_0002),
        ("smc", 0xd400_0003),
        ("udf", 0),
        ("mrs hcr_el2", 0xd53c_1100),
        ("mrs sctlr_el1", 0xd538_1000),
        ("msr vbar_el1", 0xd518_c000),
        ("tlbi vmalle1is", 0xd508_831f),
        ("msr icc_sgi1r_el1", 0xd518_cba0),
        ("mrs dbgbvr0_el1", 0xd530_0080),
        ("mrs icc_iar1_el1", 0xd538_cc00),
    ] {
        judge(what, at_el0(word, [0; 6]), &[UNDEFINED]);
    }
    for _ in 0..400 {
        let bits = world.random.next() as u32;
        // MRS or MSR of anything: a value, undefined, or a trap of EL1's.
        let word = 0xd510_0000 | bits & 0x002f_ffe0;
        let taken = at_el0(word, [0; 6]);
        let class = taken.class();
        let fits = taken.vector == SYNC_EL0 && [0x00, 0x15, 0x18, 0x19, 0x1d].contains(&class);
        case.check(
            fits && taken.count == 1,
            format_args!("{word:#x} at EL0: {taken}"),
        );
    }
}

/// An abort on SP_EL0 goes to the vectors for that.
pub fn sp_el0(case: &mut Case, _world: &mut World) {
    let nothing = map::page(Window(7), NOTHING, Kind::Normal);
    let taken = probe(load_sp0, [0, 0, nothing, 0, 0, 0]);
    let fits = taken.count == 1
        && taken.vector == SYNC_EL1T
        && taken.spsr & 0x1f == 4
        && taken.syndrome() == probe::EXTERNAL_READ
        && taken.far == nothing;
    case.check(fits, format_args!("ldr on SP_EL0: {taken}"));
}

/// Runs AArch32 code at EL0, which ID_AA64PFR0_EL1 says there is not. A CPU that has it cannot be kept from it; it waits for
/// an interrupt there, which EL2 sees.
pub fn aarch32() -> ! {
    // wfi; b .-4
    if let Some(slot) = CODE.0.first() {
        slot.store(0xeaff_fffd_e320_f003, core::sync::atomic::Ordering::Relaxed);
    }
    probe::publish(CODE.address());
    map::page_with(Window(8), CODE.address(), Kind::Normal, AF | USER);
    let code = map::below_4_gib(Window(8));
    say!("aarch32: entered");
    // SAFETY: WFI at EL0 goes to EL2, not to EL1 (SCTLR_EL1.nTWI).
    unsafe {
        asm!("mrs {0}, sctlr_el1", "orr {0}, {0}, #0x10000", "msr sctlr_el1, {0}", "isb", out(reg) _, options(nostack));
    }
    let taken = probe::run(
        return_to as *const () as u64,
        [0, 0, 0, 0x1d0, code, 0],
        Resume::Caller,
    );
    say!("aarch32: came back: {taken}");
    psci::system_off()
}
