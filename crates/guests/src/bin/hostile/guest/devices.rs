//! Devices by every form and size of access, and with random values everywhere.

use tidemark_guests::pattern::Random;
use tidemark_guests::rt::console;

use super::map::{self, Kind, Window};
use super::probe::{
    ALIGNMENT_READ, ALIGNMENT_WRITE, EXTERNAL_READ, EXTERNAL_WRITE, Snippet, Taken, probe, snippets,
};
use super::{Case, World, interrupts, other};

snippets! {
    load8: "ldrb w0, [x2]";
    load16: "ldrh w0, [x2]";
    load32: "ldr w0, [x2]";
    load64: "ldr x0, [x2]";
    store8: "strb w0, [x2]";
    store16: "strh w0, [x2]";
    store32: "str w0, [x2]";
    store64: "str x0, [x2]";
    load_signed8_32: "ldrsb w0, [x2]";
    load_signed8_64: "ldrsb x0, [x2]";
    load_signed16_32: "ldrsh w0, [x2]";
    load_signed32: "ldrsw x0, [x2]";
    load_acquire: "ldar w0, [x2]";
    load_indexed: "ldr w0, [x2, x1]";
    load_zero: "ldr xzr, [x2]";
    store_zero: "str wzr, [x2]";
    store_release: "stlr w0, [x2]";
}

const GICD: u64 = 0x0800_0000;
const GICR: u64 = 0x080a_0000;
const UART: u64 = 0x0900_0000;
const RTC: u64 = 0x0901_0000;
const VIRTIO: u64 = 0x0a00_0000;

/// Loads with a syndrome give the register's value as their form has it.
pub fn values(case: &mut Case, _world: &mut World) {
    // PrimeCell and CoreSight CID3: 0xb1, negative as a byte.
    for (device, at) in [
        ("UART", UART + 0xffc),
        ("RTC", RTC + 0xffc),
        ("GICD", GICD + 0xfffc),
        ("GICR", GICR + 0xfffc),
    ] {
        let bytes = device == "UART" || device == "RTC";
        for (form, snippet, wanted) in [
            ("ldr", load32 as Snippet, 0xb1),
            ("ldar", load_acquire, 0xb1),
            ("ldrsw", load_signed32, 0xb1),
            ("ldr indexed", load_indexed, 0xb1),
        ] {
            let taken = probe(snippet, [7, 0, at, 0, 0, 0]);
            case.quiet(&taken, format_args!("{form} of {device}"));
            case.check(
                taken.x[0] == wanted,
                format_args!("{form} of {device} gives {:#x}", taken.x[0]),
            );
        }
        for (form, snippet, wanted) in [
            ("ldrb", load8 as Snippet, 0xb1),
            ("ldrsb w", load_signed8_32, 0xffff_ffb1),
            ("ldrsb x", load_signed8_64, 0xffff_ffff_ffff_ffb1),
            ("ldrh", load16, 0xb1),
            ("ldrsh w", load_signed16_32, 0xb1),
        ] {
            let taken = probe(snippet, [7, 0, at, 0, 0, 0]);
            case.quiet(&taken, format_args!("{form} of {device}"));
            // The GIC has bytes in its priorities only.
            case.check(
                taken.x[0] == wanted || !bytes && taken.x[0] == 0,
                format_args!("{form} of {device} gives {:#x}", taken.x[0]),
            );
        }
        for (form, snippet) in [
            ("ldr xzr", load_zero as Snippet),
            ("str wzr", store_zero),
            ("stlr", store_release),
        ] {
            let aligned = at & !7;
            let taken = probe(snippet, [7, 0, aligned, 0, 0, 0]);
            case.quiet(&taken, format_args!("{form} of {device}"));
        }
    }
}

/// Not aligned: an alignment fault for what stage 1 calls a device; else as one pleases, but not for long.
pub fn unaligned(case: &mut Case, _world: &mut World) {
    for base in [
        UART + 0xfe0,
        GICD + 0x400,
        GICR + 0x1_0400,
        RTC + 0xfe0,
        VIRTIO,
    ] {
        for offset in 1..8 {
            for (form, snippet, size) in [
                ("ldrh", load16 as Snippet, 2),
                ("ldr w", load32, 4),
                ("ldr x", load64, 8),
                ("str x", store64, 8),
            ] {
                if offset % size == 0 {
                    continue;
                }
                for kind in [Kind::Device, Kind::Normal] {
                    let va = map::page(Window(4), base, kind) + offset;
                    let taken = probe(snippet, [0, 0, va, 0, 0, 0]);
                    if taken.count == 0 {
                        case.quiet(&taken, format_args!("{form}"));
                        continue;
                    }
                    let allowed = [
                        ALIGNMENT_READ,
                        ALIGNMENT_WRITE,
                        EXTERNAL_READ,
                        EXTERNAL_WRITE,
                    ];
                    let what = format_args!("{form} at {:#x} as {kind:?}", base + offset);
                    case.syndrome(&taken, &allowed, what);
                }
            }
        }
    }
    // Across the end of a device's page, into nothing.
    map::page(Window(5), UART + 0x1000, Kind::Normal);
    let va = map::page(Window(4), UART + 0xffc, Kind::Normal);
    let taken = probe(load64, [0, 0, va, 0, 0, 0]);
    if taken.count != 0 {
        case.syndrome(
            &taken,
            &[EXTERNAL_READ, ALIGNMENT_READ],
            format_args!("across pages"),
        );
    }
}

const LOADS: [Snippet; 4] = [load8, load16, load32, load64];
const STORES: [Snippet; 4] = [store8, store16, store32, store64];

/// One random access in `size` bytes from `base`; reads and writes, all sizes. `None` for one that `avoid` forbids.
fn access(random: &mut Random, base: u64, size: u64, avoid: Avoid) -> Option<(u64, Taken)> {
    let choice = random.next();
    let log = choice & 3;
    let offset = match choice >> 2 & 3 {
        // Half of them where there are registers.
        0 => random.below(size.min(0x1000)),
        1 => size - 1 - random.below(size.min(0x100)),
        _ => random.below(size),
    } >> log
        << log;
    let write = choice & 1 << 4 != 0;
    if write && avoid == Avoid::Data && offset < 4 {
        return None;
    }
    let forms = if write { STORES } else { LOADS };
    let snippet = forms.get(log as usize)?;
    // Few bits or many.
    let value = match choice >> 5 & 3 {
        0 => 1 << (choice >> 8 & 63),
        1 => u64::MAX,
        _ => random.next(),
    };
    Some((
        base + offset,
        probe(*snippet, [value, 0, base + offset, 0, 0, 0]),
    ))
}

/// What a sweep leaves alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Avoid {
    /// Nothing.
    Nothing,
    /// Writing the UART's data register, which would be noise in the report.
    Data,
}

fn sweep(case: &mut Case, world: &mut World, base: u64, size: u64, avoid: Avoid) {
    for _ in 0..4000 {
        if let Some((at, taken)) = access(&mut world.random, base, size, avoid) {
            case.quiet(&taken, format_args!("access to {at:#x}"));
        }
    }
}

pub fn distributor(case: &mut Case, world: &mut World) {
    sweep(case, world, GICD, 0x1_0000, Avoid::Nothing);
    interrupts::works(case, world);
}

pub fn redistributor_own(case: &mut Case, world: &mut World) {
    sweep(case, world, GICR, 0x2_0000, Avoid::Nothing);
    interrupts::works(case, world);
}

pub fn redistributor_other(case: &mut Case, world: &mut World) {
    sweep(case, world, GICR + 0x2_0000, 0x2_0000, Avoid::Nothing);
    interrupts::works(case, world);
}

pub fn redistributor_none(case: &mut Case, world: &mut World) {
    // Room for sixteen, with two in it; then nothing.
    let base = GICR + 2 * 0x2_0000;
    sweep(case, world, base, 14 * 0x2_0000, Avoid::Nothing);
    for size in LOADS {
        let va = GICR + 16 * 0x2_0000;
        let taken = probe(size, [0, 0, va, 0, 0, 0]);
        case.syndrome_at(&taken, &[EXTERNAL_READ], va, format_args!("past the last"));
    }
    interrupts::works(case, world);
}

pub fn uart(case: &mut Case, world: &mut World) {
    sweep(case, world, UART, 0x1000, Avoid::Data);
    console::init();
    interrupts::works(case, world);
}

pub fn rtc(case: &mut Case, world: &mut World) {
    sweep(case, world, RTC, 0x1000, Avoid::Nothing);
    interrupts::works(case, world);
}

pub fn virtio(case: &mut Case, world: &mut World) {
    sweep(case, world, VIRTIO, 0x4000, Avoid::Nothing);
    let magic = probe(load32, [0, 0, VIRTIO, 0, 0, 0]).x[0];
    case.check(
        magic == 0x7472_6976,
        format_args!("the magic value is {magic:#x}"),
    );
}

/// Both vCPUs at once, at the same registers.
pub fn by_two(case: &mut Case, world: &mut World) {
    other::storm(other::Storm::Devices, world.random.next());
    for turn in 0..6000 {
        let (base, size) = if turn & 1 == 0 {
            (GICD, 0x1_0000)
        } else {
            (GICR, 0x4_0000)
        };
        if let Some((at, taken)) = access(&mut world.random, base, size, Avoid::Nothing) {
            case.quiet(&taken, format_args!("access to {at:#x}"));
        }
    }
    let (accesses, exceptions) = other::calm();
    case.check(accesses > 0, format_args!("the other vCPU did nothing"));
    case.check(
        exceptions == 0,
        format_args!("{exceptions} exceptions on the other vCPU"),
    );
    interrupts::works(case, world);
}

/// One access of the other vCPU's storm; whether it raised something.
pub fn storm(random: &mut Random) -> bool {
    let places = [
        (GICD, 0x1_0000),
        (GICR, 0x4_0000),
        (RTC, 0x1000),
        (VIRTIO, 0x4000),
    ];
    let (base, size) = places[(random.next() & 3) as usize];
    access(random, base, size, Avoid::Nothing).is_some_and(|(_, taken)| taken.count != 0)
}
