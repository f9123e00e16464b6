//! HVC and SMC with anything in the registers (SMCCC DEN 0028, PSCI DEN 0022).

use tidemark_guests::rt::{counter, psci};

use super::probe::{Snippet, Taken, probe, snippets};
use super::{Case, World, interrupts, other};

snippets! {
    hvc: "hvc #0";
    smc: "smc #0";
    hvc_immediate: "hvc #0xffff";
    smc_immediate: "smc #0x8001";
    nothing: "nop";
}

const CPU_SUSPEND: u64 = 0xc400_0001;
const CPU_ON: u64 = 0xc400_0003;
const AFFINITY_INFO: u64 = 0xc400_0004;

const NOT_SUPPORTED: u64 = -1_i64 as u64;
const INVALID_PARAMETERS: u64 = -2_i64 as u64;
const ALREADY_ON: u64 = -4_i64 as u64;
const INVALID_ADDRESS: u64 = -9_i64 as u64;

/// What this guest would not survive, or wait for: CPU_SUSPEND, CPU_OFF, SYSTEM_OFF, the resets, and CPU_ON, which has its own case.
fn spared(function: u64) -> bool {
    let function = function as u32 & !0x4000_0000;
    matches!(function & 0xffff_ffe0, 0x8400_0000)
        && matches!(function & 0x1f, 1 | 2 | 3 | 8 | 9 | 0x12)
}

fn call(x: [u64; 4]) -> Taken {
    probe(hvc, [x[0], x[1], x[2], x[3], 0x4444, 0x5555])
}

/// Results are error codes, as wide as the register, or small; x4 and up are the caller's.
fn plausible(case: &mut Case, taken: &Taken, function: u64) {
    case.quiet(taken, format_args!("call {function:#x}"));
    let result = taken.x[0];
    let fits = result <= 0x0001_0003 || (-9..0).contains(&(result as i64));
    case.check(fits, format_args!("call {function:#x} gives {result:#x}"));
    case.check(
        taken.x[4..] == [0x4444, 0x5555],
        format_args!("call {function:#x} changed x4 or x5: {:x?}", taken.x),
    );
}

pub fn random(case: &mut Case, world: &mut World) {
    let forms: [Snippet; 4] = [hvc, smc, hvc_immediate, smc_immediate];
    for turn in 0..4000_usize {
        let random = &mut world.random;
        let function = match random.next() & 3 {
            // All of PSCI and of the architecture's calls, 32 and 64 bits, fast or not.
            0 => 0x8400_0000 | random.next() & 0x4000_001f,
            1 => 0x8000_0000 | random.next() & 0x4000_ffff,
            2 => random.next() & 0xff00_ffff,
            _ => random.next(),
        };
        if spared(function) {
            continue;
        }
        let x = [
            function,
            random.next(),
            random.next(),
            random.next(),
            0x4444,
            0x5555,
        ];
        let form = forms.get(turn % forms.len()).copied().unwrap_or(nothing);
        plausible(case, &probe(form, x), function);
    }
    // The upper half of x0 is not part of a function's number.
    let version = call([0xdead_beef_8400_0000, 0, 0, 0]).x[0];
    case.check(
        version >> 16 == 1,
        format_args!("PSCI_VERSION is {version:#x}"),
    );
    let unknown = call([0x8600_7fff, 0, 0, 0]).x[0];
    case.check(
        unknown == NOT_SUPPORTED,
        format_args!("an unknown function gives {unknown:#x}"),
    );
}

/// CPU_ON and AFFINITY_INFO of vCPUs that are on or do not exist; nothing is started.
pub fn power_states(case: &mut Case, world: &mut World) {
    let entry = world.boot.image.first.ipa();
    for cpu in world.cpus {
        let result = call([CPU_ON, cpu.0, entry, 0]).x[0];
        case.check(
            result == ALREADY_ON,
            format_args!("CPU_ON of {:#x}, which is on, gives {result:#x}", cpu.0),
        );
    }
    let mut targets = [
        2,
        15,
        16,
        0x100,
        0x1_0000,
        1 << 32,
        1 << 31,
        1 << 24,
        1 << 40,
        1 << 63,
        u64::MAX,
        0,
    ];
    if let Some(last) = targets.last_mut() {
        *last = world.random.next() | 2;
    }
    for target in targets {
        for entry in [entry, 0, u64::MAX, 0x0900_0000] {
            let result = call([CPU_ON, target, entry, 1]).x[0];
            case.check(
                result == INVALID_PARAMETERS,
                format_args!("CPU_ON of {target:#x} at {entry:#x} gives {result:#x}"),
            );
        }
    }
    for _ in 0..500 {
        let target = world.random.next() | 2;
        let x = [CPU_ON, target, world.random.next(), world.random.next()];
        let result = call(x).x[0];
        case.check(
            result == INVALID_PARAMETERS,
            format_args!("CPU_ON of {target:#x} gives {result:#x}"),
        );
    }
}

/// TRNG (DEN 0098): so many bits as were asked for, none beside them, and not the same twice.
pub fn entropy(case: &mut Case, world: &mut World) {
    const VERSION: u64 = 0x8400_0050;
    const RND32: u64 = 0x8400_0053;
    const RND64: u64 = 0xc400_0053;
    let version = call([VERSION, 0, 0, 0]).x[0];
    case.check(
        version == 0x1_0000,
        format_args!("TRNG_VERSION is {version:#x}"),
    );
    for (function, width) in [(RND32, 32), (RND64, 64)] {
        let mut ever = [0; 3];
        for bits in 1..=3 * width {
            let taken = call([function, bits, u64::MAX, u64::MAX]);
            case.quiet(&taken, format_args!("{bits} bits by {function:#x}"));
            let [status, x1, x2, x3, rest @ ..] = taken.x;
            case.check(
                status == 0 && rest == [0x4444, 0x5555],
                format_args!("{bits} bits by {function:#x}: {:x?}", taken.x),
            );
            for (place, word) in [x3, x2, x1].into_iter().enumerate() {
                let here = bits.saturating_sub(place as u64 * width).min(width);
                let allowed = if here == 64 { !0 } else { (1 << here) - 1 };
                case.check(
                    word & !allowed == 0,
                    format_args!("{bits} bits by {function:#x}: {word:#x} in place {place}"),
                );
                if let Some(ever) = ever.get_mut(place) {
                    *ever |= word;
                }
            }
        }
        // The highest bits were asked for but a few times.
        for _ in 0..64 {
            let [_, x1, x2, x3, ..] = call([function, 3 * width, 0, 0]).x;
            for (ever, word) in ever.iter_mut().zip([x3, x2, x1]) {
                *ever |= word;
            }
        }
        let all = !0 >> (64 - width);
        case.check(
            ever == [all; 3],
            format_args!("bits that are never set by {function:#x}: {ever:x?}"),
        );
        let (first, second) = (
            call([function, 3 * width, 0, 0]),
            call([function, 3 * width, 0, 0]),
        );
        case.check(
            first.x[1..4] != second.x[1..4],
            format_args!("the same twice: {:x?}", first.x),
        );
        for bits in [
            0,
            3 * width + 1,
            1 << 31,
            !0 << 32,
            u64::MAX,
            world.random.next() | 0x100,
        ] {
            // By the 32-bit convention only w1 counts.
            let refused = function == RND64 || bits as u32 == 0 || bits as u32 > 96;
            let taken = call([function, bits, 1, 1]);
            case.check(
                !refused || taken.x[..4] == [INVALID_PARAMETERS, 0, 0, 0],
                format_args!("{bits:#x} bits by {function:#x}: {:x?}", taken.x),
            );
        }
    }
    let other = call([0x8400_0051, world.random.next() & 0xffff_ff00, 0, 0]).x[0];
    case.check(
        other == NOT_SUPPORTED,
        format_args!("TRNG_FEATURES of nothing gives {other:#x}"),
    );
}

pub fn affinity_info(case: &mut Case, world: &mut World) {
    for cpu in world.cpus {
        for level in 0..4 {
            let result = call([AFFINITY_INFO, cpu.0, level, 0]).x[0];
            // Levels above 0 may be refused from PSCI 1.0 on.
            let fits = result == 0 || level > 0 && result == INVALID_PARAMETERS;
            case.check(
                fits,
                format_args!(
                    "AFFINITY_INFO of {:#x} at level {level} gives {result:#x}",
                    cpu.0
                ),
            );
        }
    }
    for _ in 0..500 {
        let target = world.random.next();
        let level = match world.random.next() & 1 {
            0 => world.random.below(6),
            _ => world.random.next(),
        };
        let result = call([AFFINITY_INFO, target, level, 0]).x[0];
        let here = level < 4 && target & 0xff_00ff_ffff & (u64::MAX << (8 * level)) == 0;
        case.check(
            result == INVALID_PARAMETERS || here && result <= 2,
            format_args!("AFFINITY_INFO of {target:#x} at level {level:#x} gives {result:#x}"),
        );
    }
}

/// With an interrupt pending: comes back, or says what was wrong.
pub fn suspend(case: &mut Case, world: &mut World) {
    interrupts::works(case, world);
    for turn in 0..200 {
        interrupts::leave_pending();
        let state = match turn & 3 {
            // Standby; power down; what the format has no room for.
            0 => 0,
            1 => 1 << 16,
            2 => 0x0300_ffff,
            _ => world.random.next(),
        };
        let entry = world.random.next();
        let taken = call([CPU_SUSPEND, state, entry, world.random.next()]);
        case.quiet(&taken, format_args!("CPU_SUSPEND {state:#x}"));
        let wrong = state & 0xffff_ffff & !0x0301_ffff != 0;
        // Reserved bits may be ignored (they are "must be zero"); a wild entry may be noticed.
        let fits = match taken.x[0] {
            0 => true,
            INVALID_PARAMETERS => wrong,
            INVALID_ADDRESS => state & 1 << 16 != 0,
            _ => false,
        };
        case.check(
            fits,
            format_args!("CPU_SUSPEND {state:#x} gives {:#x}", taken.x[0]),
        );
    }
    interrupts::works(case, world);
}

/// The other vCPU, off, is started where nothing is; then where no instruction can be. It is lost by that.
pub fn cpu_on_wild(case: &mut Case, world: &mut World) {
    let [_, cpu] = world.cpus;
    if !other::leave(cpu) {
        return case.fail(format_args!("the other vCPU does not go off"));
    }
    let ram = world.boot.machine.ram;
    let end = ram.base + ram.size;
    for entry in [
        0x0900_0000,
        0x2000_0000,
        end,
        1 << 40,
        1 << 63,
        u64::MAX,
        u64::MAX - 3,
    ] {
        let result = call([CPU_ON, cpu.0, entry, 0]).x[0];
        case.check(
            result == INVALID_ADDRESS,
            format_args!("CPU_ON at {entry:#x} gives {result:#x}"),
        );
        case.check(
            psci::is_off(cpu),
            format_args!("it is on after CPU_ON at {entry:#x}"),
        );
    }
    // In RAM, and not aligned: PC alignment fault, to vectors that are at 0 and cannot be fetched, and so on, for ever.
    let result = call([CPU_ON, cpu.0, world.boot.own.first.ipa() + 2, 0]).x[0];
    case.check(
        result == 0 || result == INVALID_ADDRESS,
        format_args!("CPU_ON at an odd place gives {result:#x}"),
    );
    if result == 0 {
        let on = counter::within(5, || call([AFFINITY_INFO, cpu.0, 0, 0]).x[0] == 0);
        case.check(on, format_args!("it is not on"));
        let again = call([CPU_ON, cpu.0, world.boot.image.first.ipa(), 0]).x[0];
        case.check(
            again == ALREADY_ON,
            format_args!("a second CPU_ON gives {again:#x}"),
        );
        // It has a while to do harm.
        let _ = counter::within(1, || false);
    }
}
