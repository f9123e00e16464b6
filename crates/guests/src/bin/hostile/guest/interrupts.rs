//! The interrupt controller after anything was done to it, and wild use of its CPU interface.

use core::arch::asm;
use core::ptr;

use tidemark_guests::rt::counter;
use tidemark_guests::rt::gic::{self, Private};

use super::probe::{Register, probe, snippets};
use super::{Case, World, other};

snippets! {
    send: "msr icc_sgi1r_el1, x0";
    send_alias: "msr icc_asgi1r_el1, x0";
    send_group0: "msr icc_sgi0r_el1, x0";
}

const GICD: usize = 0x0800_0000;
const GICR: usize = 0x080a_0000;
/// The interrupt that shows that interrupts work.
const SIGN: Private = Private(5);
/// Nothing is pending.
pub const NONE: Private = Private(1023);

fn store(register: usize, value: u32) {
    let register = ptr::with_exposed_provenance_mut::<u32>(register);
    // SAFETY: a register of the GIC, mapped as device memory.
    unsafe { register.write_volatile(value) };
}

/// Forgets what the CPU interface holds active, and what was set in it.
pub fn reset_interface() {
    // SAFETY: the CPU interface's registers; interrupts are masked.
    unsafe {
        asm!(
            "msr icc_sre_el1, {sre}", "isb",
            "msr icc_igrpen1_el1, xzr", "msr icc_igrpen0_el1, xzr", "msr icc_ctlr_el1, xzr",
            "msr icc_ap0r0_el1, xzr", "msr icc_ap1r0_el1, xzr", "msr icc_bpr0_el1, xzr", "isb",
            sre = in(reg) 7_u64, options(nostack)
        );
    }
}

/// Puts the whole controller into the state that drivers expect to make for themselves.
fn reset() {
    store(GICD, 0);
    for frame in [GICR, GICR + 0x2_0000] {
        store(frame + 0x14, 0);
        for register in [0x180, 0x280, 0x380] {
            store(frame + 0x1_0000 + register, u32::MAX);
        }
        // PPIs are levels.
        store(frame + 0x1_0c04, 0);
    }
    for word in 1..5 {
        for register in [0x180, 0x280, 0x380] {
            store(GICD + register + 4 * word, u32::MAX);
        }
        // Levels, as PPIs.
        store(GICD + 0xc00 + 8 * word, 0);
        store(GICD + 0xc04 + 8 * word, 0);
    }
    reset_interface();
    gic::init_distributor();
}

/// Re-initialises the controller for `interrupts` on vCPU 0.
pub fn begin(interrupts: &[Private]) {
    reset();
    gic::init(interrupts);
    for _ in 0..64 {
        let pending = gic::acknowledge();
        if pending.0 >= 1020 {
            break;
        }
        gic::end(pending);
    }
}

/// Lets a shared interrupt through to vCPU 0.
pub fn enable_shared(interrupt: Private) {
    let (word, bit) = (interrupt.0 as usize / 32, 1 << (interrupt.0 % 32));
    let register = |base: usize, stride: usize| GICD + base + stride * interrupt.0 as usize;
    let router = ptr::with_exposed_provenance_mut::<u64>(register(0x6000, 8));
    let priority = ptr::with_exposed_provenance_mut::<u8>(register(0x400, 1));
    // SAFETY: registers of the GIC, mapped as device memory.
    unsafe {
        router.write_volatile(0);
        priority.write_volatile(0x80);
    }
    store(GICD + 0x80 + 4 * word, u32::MAX);
    store(GICD + 0x100 + 4 * word, bit);
}

/// Lets an interrupt through to vCPU 0, be it private or shared.
pub fn enable_only(interrupt: Private) {
    match interrupt.0 {
        0..32 => gic::init(&[interrupt]),
        _ => enable_shared(interrupt),
    }
}

/// Where an interrupt's bit is: the register of the group at `base` (GICD_ISENABLER is 0x100), and the bit.
fn place(base: usize, interrupt: Private) -> (usize, u32) {
    let register = match interrupt.0 / 32 {
        0 => GICR + 0x1_0000 + base,
        word => GICD + base + 4 * word as usize,
    };
    (register, 1 << (interrupt.0 % 32))
}

/// Reads an interrupt's bit.
pub fn bit(base: usize, interrupt: Private) -> bool {
    let (register, bit) = place(base, interrupt);
    let register = ptr::with_exposed_provenance::<u32>(register);
    // SAFETY: a register of the GIC, mapped as device memory.
    unsafe { register.read_volatile() & bit != 0 }
}

/// Reads the bits of all private interrupts.
pub fn word(base: usize) -> u32 {
    let register = ptr::with_exposed_provenance::<u32>(GICR + 0x1_0000 + base);
    // SAFETY: a register of the GIC, mapped as device memory.
    unsafe { register.read_volatile() }
}

/// Sets the priority of a private interrupt.
pub fn priority(interrupt: Private, priority: u32) {
    let register = GICR + 0x1_0400 + interrupt.0 as usize;
    // SAFETY: a register of the GIC, mapped as device memory.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(register).write_volatile(priority as u8) };
}

/// Writes a one to it.
pub fn write_bit(base: usize, interrupt: Private) {
    let (register, bit) = place(base, interrupt);
    store(register, bit);
}

/// Sets GICD_CTLR's group enables.
pub fn groups(groups: u32) {
    store(GICD, 1 << 4 | groups);
}

/// Sends a shared interrupt to a vCPU, by its number.
pub fn route(interrupt: Private, vcpu: u64) {
    let router = GICD + 0x6000 + 8 * interrupt.0 as usize;
    // SAFETY: a register of the GIC, mapped as device memory.
    unsafe { ptr::with_exposed_provenance_mut::<u64>(router).write_volatile(vcpu) };
}

/// Waits for the next interrupt, without taking it as an exception, and ends it; [`NONE`] if there is none for long.
pub fn next() -> Private {
    let mut got = NONE;
    let _ = counter::within(2, || {
        got = gic::acknowledge();
        got.0 < 1020
    });
    if got.0 < 1020 {
        gic::end(got);
    }
    got
}

fn send_sign(world: &World) {
    gic::send(gic::sgi(SIGN, world.cpus[0]));
}

/// Re-initialises it and checks that an SGI to oneself arrives, once.
pub fn works(case: &mut Case, world: &World) {
    begin(&[SIGN]);
    for turn in 0..3 {
        send_sign(world);
        let got = next();
        case.check(got == SIGN, format_args!("SGI {turn} to itself: {got:?}"));
        let more = gic::acknowledge();
        case.check(more == NONE, format_args!("then {more:?}"));
    }
}

/// Leaves that interrupt pending: something to wake up for.
pub fn leave_pending() {
    gic::send(gic::sgi(SIGN, tidemark_guests::fdt::Mpidr(0)));
}

pub fn sgi_wild(case: &mut Case, world: &mut World) {
    works(case, world);
    const ALL_BUT_SELF: u64 = 1 << 40;
    let fixed = [
        0,
        u64::MAX,
        ALL_BUT_SELF,
        0xffff,
        0xfffc,
        0x8000,
        1 << 44,
        0xf << 44,
        1 << 16,
        1 << 32,
        1 << 48,
    ];
    for form in [send, send_alias, send_group0] {
        for value in fixed {
            let taken = probe(form, [value, 0, 0, 0, 0, 0]);
            case.quiet(&taken, format_args!("SGI by {value:#x}"));
        }
        for _ in 0..1500 {
            let value = world.random.next() & world.random.next();
            let taken = probe(form, [value, 0, 0, 0, 0, 0]);
            case.quiet(&taken, format_args!("SGI by {value:#x}"));
        }
    }
    works(case, world);
    // Targets that are not there, other clusters, and all others: none of them is this vCPU.
    let number = u64::from(SIGN.0) << 24;
    for value in [
        0xfffe,
        0xfffc,
        1 << 16 | 1,
        1 << 32 | 1,
        1 << 48 | 1,
        ALL_BUT_SELF,
        ALL_BUT_SELF | 1,
    ] {
        probe(send, [number | value, 0, 0, 0, 0, 0]);
        let got = gic::acknowledge();
        case.check(
            got == NONE,
            format_args!("SGI by {:#x} arrived here: {got:?}", number | value),
        );
        if got.0 < 1020 {
            gic::end(got);
        }
    }
    works(case, world);
}

/// Everything in the CPU interface, read and written with anything.
pub fn interface_wild(case: &mut Case, world: &mut World) {
    let registers = [
        Register(3, 0, 4, 6, 0),   // ICC_PMR_EL1
        Register(3, 0, 12, 8, 0),  // ICC_IAR0_EL1
        Register(3, 0, 12, 8, 1),  // ICC_EOIR0_EL1
        Register(3, 0, 12, 8, 2),  // ICC_HPPIR0_EL1
        Register(3, 0, 12, 8, 3),  // ICC_BPR0_EL1
        Register(3, 0, 12, 8, 4),  // ICC_AP0R0_EL1
        Register(3, 0, 12, 9, 0),  // ICC_AP1R0_EL1
        Register(3, 0, 12, 9, 1),  // ICC_AP1R1_EL1, if there are so many priorities
        Register(3, 0, 12, 11, 1), // ICC_DIR_EL1
        Register(3, 0, 12, 11, 3), // ICC_RPR_EL1
        Register(3, 0, 12, 12, 0), // ICC_IAR1_EL1
        Register(3, 0, 12, 12, 1), // ICC_EOIR1_EL1
        Register(3, 0, 12, 12, 2), // ICC_HPPIR1_EL1
        Register(3, 0, 12, 12, 3), // ICC_BPR1_EL1
        Register(3, 0, 12, 12, 4), // ICC_CTLR_EL1
        Register(3, 0, 12, 12, 5), // ICC_SRE_EL1
        Register(3, 0, 12, 12, 6), // ICC_IGRPEN0_EL1
        Register(3, 0, 12, 12, 7), // ICC_IGRPEN1_EL1
        Register(3, 0, 12, 11, 5), // ICC_SGI1R_EL1
    ];
    for _ in 0..2500 {
        let random = &mut world.random;
        let register = registers[random.below(registers.len() as u64) as usize];
        let value = match random.next() & 3 {
            0 => random.next(),
            1 => random.below(1024),
            2 => u64::MAX,
            _ => 0,
        };
        let taken = match random.next() & 1 {
            0 => register.read(),
            _ => register.write(value),
        };
        // Some are only read, some only written.
        if taken.count != 0 {
            case.undefined(&taken, format_args!("{register} with {value:#x}"));
        }
    }
    // There are no interrupts without system registers.
    Register(3, 0, 12, 12, 5).write(0);
    let sre = Register(3, 0, 12, 12, 5).read();
    case.check(
        sre.count == 0 && sre.x[0] & 1 == 1,
        format_args!("ICC_SRE_EL1: {sre}"),
    );
    works(case, world);
    // The mask does what it says: priority 0x80 passes below 0x80 only.
    Register(3, 0, 4, 6, 0).write(0x80);
    send_sign(world);
    let masked = gic::acknowledge();
    case.check(
        masked == NONE,
        format_args!("ICC_PMR 0x80 lets {masked:?} through"),
    );
    Register(3, 0, 4, 6, 0).write(0xff);
    let got = next();
    case.check(got == SIGN, format_args!("after ICC_PMR 0xff: {got:?}"));
    // EOImode 1: dropping the priority does not end it.
    Register(3, 0, 12, 12, 4).write(2);
    send_sign(world);
    let got = next();
    send_sign(world);
    let again = gic::acknowledge();
    case.check(
        got == SIGN && again == NONE,
        format_args!("EOImode 1: {got:?}, then {again:?}"),
    );
    Register(3, 0, 12, 11, 1).write(u64::from(SIGN.0));
    let got = next();
    case.check(got == SIGN, format_args!("after ICC_DIR: {got:?}"));
    works(case, world);
}

/// A question to the other vCPU and its answer, after all that.
pub fn ipi(case: &mut Case, world: &mut World) {
    begin(&[other::REPLY]);
    if !other::answer() {
        return case.fail(format_args!("the other vCPU does not come"));
    }
    for turn in 0..50 {
        gic::send(gic::sgi(other::QUESTION, world.cpus[1]));
        let got = next();
        case.check(
            got == other::REPLY,
            format_args!("question {turn}: {got:?}"),
        );
        if got != other::REPLY {
            break;
        }
    }
    let _ = other::calm();
}
