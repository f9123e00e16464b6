//! `fw_cfg` of a guest with firmware: items there are not, reads past the end, writes, and every size of access.

use super::map::{self, Kind, Window};
use super::probe::{
    ALIGNMENT_READ, ALIGNMENT_WRITE, EXTERNAL_READ, EXTERNAL_WRITE, Snippet, probe, snippets,
};
use super::{Case, World};

snippets! {
    load8: "ldrb w0, [x2]";
    load16: "ldrh w0, [x2]";
    load32: "ldr w0, [x2]";
    load64: "ldr x0, [x2]";
    load_pair: "ldp x0, x1, [x2]";
    // ldr q0, [x2]
    load_vector: ".inst 0x3dc00040";
    store8: "strb w0, [x2]";
    store16: "strh w0, [x2]";
    store32: "str w0, [x2]";
    store64: "str x0, [x2]";
    store_pair: "stp x0, x1, [x2]";
}

const LOADS: [Snippet; 4] = [load8, load16, load32, load64];
const STORES: [Snippet; 4] = [store8, store16, store32, store64];

const DATA: u64 = 0x0902_0000;
const SELECTOR: u64 = DATA + 8;
/// Where QEMU's has its address for DMA.
const DMA: u64 = DATA + 0x10;
const END: u64 = DATA + 0x18;

/// `QEMU`, as bytes are read.
const SIGNATURE: [u8; 4] = *b"QEMU";
/// Items that a guest may be given.
const ITEMS: [u16; 11] = [0, 1, 5, 8, 0xb, 0xf, 0x11, 0x12, 0x14, 0x15, 0x19];
/// Of a selector: for writing.
const WRITING: u16 = 1 << 14;

fn select(case: &mut Case, item: u16) {
    let taken = probe(store16, [item.swap_bytes().into(), 0, SELECTOR, 0, 0, 0]);
    case.quiet(&taken, format_args!("selecting {item:#x}"));
}

fn read(case: &mut Case, load: Snippet) -> u64 {
    let taken = probe(load, [7, 0, DATA, 0, 0, 0]);
    case.quiet(&taken, format_args!("reading"));
    taken.x[0]
}

fn has(case: &mut Case, load: Snippet, wanted: u64, what: &str) {
    let got = read(case, load);
    case.check(
        got == wanted,
        format_args!("{what}: {got:#x}, not {wanted:#x}"),
    );
}

/// Each byte once, by whatever size; then zeros for ever.
pub fn ends(case: &mut Case, _world: &mut World) {
    let signature: u64 = u32::from_le_bytes(SIGNATURE).into();
    for (log, load) in LOADS.into_iter().enumerate() {
        select(case, 0);
        let bits = 8 << log;
        let mut left = signature;
        for _ in 0..64 {
            let wanted = if bits == 64 {
                left
            } else {
                left & ((1 << bits) - 1)
            };
            has(case, load, wanted, "the signature, piece by piece");
            left = left.unbounded_shr(bits);
        }
    }
    select(case, 0);
    for _ in 0..4000 {
        read(case, load64);
    }
    has(case, load64, 0, "far past the end");
    select(case, 0);
    has(case, load32, signature, "selected anew");
}

/// Items that are not there are empty, whatever the selector asks for besides.
pub fn nothing(case: &mut Case, world: &mut World) {
    let random = &mut world.random;
    let mut items = [0_u16; 512];
    for (index, item) in items.iter_mut().enumerate() {
        *item = match index {
            0..64 => index as u16,
            64..128 => (index as u16 - 64) | WRITING,
            128..160 => (index as u16 - 128) | 1 << 15,
            160 => u16::MAX,
            _ => random.next() as u16,
        };
    }
    for item in items {
        select(case, item);
        let value = read(case, load64);
        let there = ITEMS.contains(&(item & !WRITING));
        case.check(
            there || value == 0,
            format_args!("item {item:#x} has {value:#x}"),
        );
    }
}

/// What is written to data, to DMA and, in other sizes than its own, to the selector changes nothing; nothing answers behind.
pub fn writes(case: &mut Case, _world: &mut World) {
    select(case, 0);
    has(case, load8, SIGNATURE[0].into(), "the first byte");
    for (log, store) in STORES.into_iter().enumerate() {
        for at in [DATA, DATA + 4, SELECTOR + 2, DMA, DMA + 4] {
            let taken = probe(store, [u64::MAX, 0, at & !((1 << log) - 1), 0, 0, 0]);
            // Rounded down it may be the selector itself.
            case.quiet(&taken, format_args!("a store to {at:#x}"));
        }
        if log != 1 {
            let taken = probe(store, [0, 0, SELECTOR, 0, 0, 0]);
            case.quiet(&taken, format_args!("a selector of {} bytes", 1 << log));
        }
    }
    has(
        case,
        load8,
        SIGNATURE[1].into(),
        "the second byte, after writes",
    );
    for (load, at) in LOADS
        .into_iter()
        .flat_map(|load| [(load, SELECTOR), (load, DMA)])
    {
        let taken = probe(load, [7, 0, at, 0, 0, 0]);
        case.quiet(&taken, format_args!("a load of {at:#x}"));
        case.check(
            taken.x[0] == 0,
            format_args!("{at:#x} has {:#x}", taken.x[0]),
        );
    }
    has(
        case,
        load8,
        SIGNATURE[2].into(),
        "the third byte, after loads beside it",
    );
    // Several registers at once: each element is an access.
    for form in [load_pair, load_vector, store_pair as Snippet] {
        for at in [DATA, SELECTOR, DMA] {
            let taken = probe(form, [0, 0, at, 0, 0, 0]);
            if taken.count != 0 {
                case.syndrome(
                    &taken,
                    &[EXTERNAL_READ, EXTERNAL_WRITE],
                    format_args!("a pair at {at:#x}"),
                );
            }
        }
    }
    for (load, store) in LOADS.into_iter().zip(STORES) {
        let taken = probe(load, [0, 0, END, 0, 0, 0]);
        case.syndrome_at(&taken, &[EXTERNAL_READ], END, format_args!("behind it"));
        let taken = probe(store, [0, 0, END, 0, 0, 0]);
        case.syndrome_at(&taken, &[EXTERNAL_WRITE], END, format_args!("behind it"));
    }
}

/// Everything at random, aligned or not: an abort, or done; and it still has its signature.
pub fn sweep(case: &mut Case, world: &mut World) {
    let random = &mut world.random;
    for turn in 0..4000_u64 {
        let choice = random.next();
        let forms = if choice & 1 == 0 { LOADS } else { STORES };
        let kind = if choice & 2 == 0 {
            Kind::Normal
        } else {
            Kind::Device
        };
        // As a page of a window, so that what is not aligned comes here too.
        let va = map::page(Window(0), DATA, kind) + random.below(0x20);
        let form = forms[(choice >> 2 & 3) as usize];
        let taken = probe(form, [random.next() >> (choice >> 4 & 63), 0, va, 0, 0, 0]);
        if taken.count != 0 {
            let allowed = [
                EXTERNAL_READ,
                EXTERNAL_WRITE,
                ALIGNMENT_READ,
                ALIGNMENT_WRITE,
            ];
            case.syndrome(&taken, &allowed, format_args!("turn {turn} at {va:#x}"));
        }
    }
    select(case, 0);
    has(
        case,
        load32,
        u32::from_le_bytes(SIGNATURE).into(),
        "after it all",
    );
}
