//! Addresses where nothing is, and memory by every form of access.

use core::arch::asm;

use tidemark_guests::rt::Boot;

use super::map::{self, Kind, Window};
use super::probe::{
    self, CACHE, EXTERNAL_FETCH, EXTERNAL_READ, EXTERNAL_WRITE, IL, Resume, Snippet, Taken, WRITE,
    probe, snippets,
};
use super::{Case, World};

snippets! {
    load8: "ldrb w0, [x2]";
    load16: "ldrh w0, [x2]";
    load32: "ldr w0, [x2]";
    load64: "ldr x0, [x2]";
    load_signed: "ldrsw x0, [x2]";
    load_pair: "ldp x0, x1, [x2]";
    load_post: "ldr x0, [x2], #8";
    load_acquire: "ldar x0, [x2]";
    load_exclusive: "ldxr x0, [x2]", "clrex";
    load_exclusive_pair: "ldxp x0, x1, [x2]", "clrex";
    // ldr q0, [x2]
    load_vector: ".inst 0x3dc00040";
    store8: "strb w0, [x2]";
    store16: "strh w0, [x2]";
    store32: "str w0, [x2]";
    store64: "str x0, [x2]";
    store_zero: "str xzr, [x2]";
    store_pair: "stp x0, x1, [x2]";
    store_post: "str x0, [x2], #8";
    store_release: "stlr x0, [x2]";
    // str q0, [x2]
    store_vector: ".inst 0x3d800040";
    zero_block: "dc zva, x2";
    prefetch: "prfm pldl1keep, [x2]", "prfm pstl1keep, [x2]", "prfm plil1keep, [x2]";
    clean_invalidate: "dc civac, x2";
    clean: "dc cvac, x2";
    invalidate: "dc ivac, x2";
    invalidate_code: "ic ivau, x2";
    exclusive_add: "2: ldxr x0, [x2]", "add x0, x0, x1", "stxr w3, x0, [x2]", "cbnz w3, 2b";
    // ldadd x0, x1, [x2]
    atomic_add: ".inst 0xf8200041";
    load_mmu_off: "mrs x6, sctlr_el1", "bic x7, x6, #1", "msr sctlr_el1, x7", "isb",
        "ldr x0, [x2]", "dsb sy", "msr sctlr_el1, x6", "isb";
    store_mmu_off: "mrs x6, sctlr_el1", "bic x7, x6, #1", "msr sctlr_el1, x7", "isb",
        "str x0, [x2]", "dsb sy", "msr sctlr_el1, x6", "isb";
}

const LOADS: [(&str, Snippet); 11] = [
    ("ldrb", load8),
    ("ldrh", load16),
    ("ldr w", load32),
    ("ldr x", load64),
    ("ldrsw", load_signed),
    ("ldp", load_pair),
    ("ldr post-index", load_post),
    ("ldar", load_acquire),
    ("ldxr", load_exclusive),
    ("ldxp", load_exclusive_pair),
    ("ldr q", load_vector),
];

const STORES: [(&str, Snippet); 10] = [
    ("strb", store8),
    ("strh", store16),
    ("str w", store32),
    ("str x", store64),
    ("str xzr", store_zero),
    ("stp", store_pair),
    ("str post-index", store_post),
    ("stlr", store_release),
    ("str q", store_vector),
    ("dc zva", zero_block),
];

/// Cache maintenance by address: (name, instruction).
pub const MAINTENANCE: [(&str, Snippet); 4] = [
    ("dc civac", clean_invalidate),
    ("dc cvac", clean),
    ("dc ivac", invalidate),
    ("ic ivau", invalidate_code),
];

/// What x0-x5 hold for an access to `address`.
fn access(address: u64) -> [u64; 6] {
    [0x5a5a_0001, 0x5a5a_0002, address, 3, 4, 5]
}

/// The width that this guest gave stage 1's output addresses (TCR_EL1.IPS).
fn output_bits() -> u32 {
    let tcr: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, tcr_el1", out(reg) tcr, options(nomem, nostack)) };
    [32, 36, 40, 42, 44, 48, 52, 56][(tcr >> 32 & 7) as usize]
}

/// Just past the end of RAM.
fn end_of_ram(boot: &Boot) -> u64 {
    boot.machine.ram.base + boot.machine.ram.size
}

/// Nothing is there, and stage 1 can say so: between the devices, past RAM, at the top.
pub fn nowhere(boot: &Boot) -> [u64; 6] {
    [
        0x0900_1000,
        0x0a00_4000,
        0x0c00_0ff0,
        end_of_ram(boot),
        0x80_0000_0ff0,
        0xff_ffff_fff0,
    ]
}

pub fn unmapped(case: &mut Case, world: &mut World) {
    for ipa in nowhere(&world.boot) {
        if ipa >> output_bits() != 0 {
            continue;
        }
        let va = map::page(Window(0), ipa, Kind::Normal);
        every_form(case, va, ipa);
    }
}

fn every_form(case: &mut Case, va: u64, ipa: u64) {
    for (name, load) in LOADS {
        let taken = probe(load, access(va));
        let what = format_args!("{name} from IPA {ipa:#x}");
        case.syndrome_at(&taken, &[EXTERNAL_READ], va, what);
        case.check(
            taken.x == access(va),
            format_args!("{what} changed registers: {:x?}", taken.x),
        );
    }
    for (name, store) in STORES {
        let taken = probe(store, access(va));
        let what = format_args!("{name} to IPA {ipa:#x}");
        let zva = name == "dc zva";
        case.syndrome(&taken, &[EXTERNAL_WRITE], what);
        // DC ZVA may give any address of its block.
        let far = taken.far == va || zva && taken.far >> 11 == va >> 11;
        case.check(far, format_args!("{what}: FAR is not {va:#x}: {taken}"));
        case.check(
            taken.x == access(va),
            format_args!("{what} changed registers: {:x?}", taken.x),
        );
    }
    let taken = probe(prefetch, access(va));
    case.quiet(&taken, format_args!("prfm of IPA {ipa:#x}"));
    for (name, instruction) in MAINTENANCE {
        maintained(case, &probe(instruction, access(va)), name, ipa);
    }
}

/// Maintenance of an address with nothing behind it: nothing happens, or an external abort says whose it is.
pub fn maintained(case: &mut Case, taken: &Taken, name: &str, ipa: u64) {
    let abort = [
        EXTERNAL_READ | CACHE,
        EXTERNAL_WRITE | CACHE,
        EXTERNAL_READ,
        EXTERNAL_WRITE,
    ];
    let what = format_args!("{name} of IPA {ipa:#x}");
    match taken.count {
        0 => case.quiet(taken, what),
        _ => case.syndrome(taken, &abort, what),
    }
}

/// Past what stage 2 translates: stage 1 refuses it by its own output size, or nothing is there.
pub fn beyond(case: &mut Case, world: &mut World) {
    let tcr: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, tcr_el1", out(reg) tcr, options(nomem, nostack)) };
    let size_read = 0x25 << 26 | IL | 0x03;
    let narrow = output_bits();
    for ips in [tcr >> 32 & 7, 2, 5, 6] {
        let wanted = tcr & !(7 << 32) | ips << 32;
        set_tcr(wanted);
        let mut addresses = [0; 24];
        for (bit, address) in (32..48).zip(addresses.iter_mut()) {
            *address = 1 << bit;
        }
        for address in addresses.iter_mut().skip(16) {
            *address = world.random.next() >> 16 & !7 | 1 << 47;
        }
        for ipa in addresses {
            let va = map::page(Window(0), ipa, Kind::Normal);
            let what = format_args!("IPA {ipa:#x}, TCR.IPS {ips}");
            let refused = wanted == tcr && ipa >> narrow != 0;
            let reads: &[u64] = if refused {
                &[size_read]
            } else {
                &[size_read, EXTERNAL_READ]
            };
            case.syndrome_at(&probe(load64, access(va)), reads, va, what);
            let writes = [size_read | WRITE, EXTERNAL_WRITE];
            case.syndrome_at(&probe(store_pair, access(va)), &writes, va, what);
            let fetch = probe::run(va & !3, [0; 6], Resume::Caller);
            let fetches = [0x21 << 26 | IL | 0x03, EXTERNAL_FETCH];
            case.syndrome_at(&fetch, &fetches, va & !3, what);
        }
    }
    set_tcr(tcr);
}

fn set_tcr(value: u64) {
    // SAFETY: only the output size changes, to one that all that is in use fits in.
    unsafe { asm!("msr tcr_el1, {}", "isb", in(reg) value, options(nostack)) };
    map::flush();
}

/// Without stage 1 an address goes to stage 2 as it is.
pub fn mmu_off(case: &mut Case, world: &mut World) {
    let mut addresses = [0; 20];
    let [a, b, c, d, e, f] = nowhere(&world.boot);
    let fixed = [
        a,
        b,
        c,
        d,
        e,
        f,
        1 << 40,
        1 << 41,
        1 << 43,
        1 << 47,
        1 << 48,
    ];
    for (slot, address) in addresses.iter_mut().zip(fixed) {
        *slot = address;
    }
    for slot in addresses.iter_mut().skip(fixed.len()) {
        *slot = world.random.next() >> 14 & !7 | 1 << 41;
    }
    for ipa in addresses {
        let what = format_args!("MMU off, IPA {ipa:#x}");
        // Past the CPU's own physical size: address size fault, level 0.
        let size = 0x25 << 26 | IL;
        let reads: &[u64] = if ipa < 1 << 40 {
            &[EXTERNAL_READ]
        } else {
            &[EXTERNAL_READ, size]
        };
        case.syndrome_at(&probe(load_mmu_off, access(ipa)), reads, ipa, what);
        let writes = [EXTERNAL_WRITE, size | WRITE];
        case.syndrome_at(&probe(store_mmu_off, access(ipa)), &writes, ipa, what);
    }
}

pub fn execute(case: &mut Case, world: &mut World) {
    let devices = [0x0800_0000, 0x080a_0000, 0x0900_0000, 0x0a00_0000];
    for ipa in nowhere(&world.boot).into_iter().chain(devices) {
        if ipa >> output_bits() != 0 {
            continue;
        }
        let va = map::page(Window(0), ipa, Kind::Normal) & !3;
        let taken = probe::run(va, [0; 6], Resume::Caller);
        let what = format_args!("fetch from IPA {ipa:#x}");
        case.syndrome_at(&taken, &[EXTERNAL_FETCH], va, what);
        case.check(
            taken.elr == va,
            format_args!("{what}: ELR is not {va:#x}: {taken}"),
        );
    }
}

/// Flash with no firmware in it reads as erased, and writes are lost on it.
pub fn flash(case: &mut Case, _world: &mut World) {
    for ipa in [0, 0x1000, 0x03ff_fff0, 0x0400_0000, 0x07ff_fff0] {
        let va = map::page(Window(0), ipa, Kind::Normal);
        for (name, load, wanted) in [
            ("ldrb", load8 as Snippet, 0xff),
            ("ldrh", load16, 0xffff),
            ("ldr w", load32, 0xffff_ffff),
            ("ldr x", load64, u64::MAX),
            ("ldrsw", load_signed, u64::MAX),
            ("ldar", load_acquire, u64::MAX),
        ] {
            let what = format_args!("{name} from flash at {ipa:#x}");
            for (writer, store) in STORES.into_iter().take(5) {
                case.quiet(
                    &probe(store, access(va)),
                    format_args!("{writer}, then {what}"),
                );
            }
            let taken = probe(load, access(va));
            case.quiet(&taken, what);
            case.check(
                taken.x[0] == wanted,
                format_args!("{what} gives {:#x}", taken.x[0]),
            );
        }
        // What no syndrome tells of is done too.
        for (name, form, [x0, x1, moved]) in [
            ("ldp", load_pair as Snippet, [u64::MAX, u64::MAX, 0]),
            ("ldr post-index", load_post, [u64::MAX, access(va)[1], 8]),
            ("stp", store_pair, [access(va)[0], access(va)[1], 0]),
            (
                "str post-index",
                store_post,
                [access(va)[0], access(va)[1], 8],
            ),
            ("ldr q", load_vector, [access(va)[0], access(va)[1], 0]),
            ("str q", store_vector, [access(va)[0], access(va)[1], 0]),
            ("ldp after it all", load_pair, [u64::MAX, u64::MAX, 0]),
        ] {
            let taken = probe(form, access(va));
            let what = format_args!("{name}, flash at {ipa:#x}");
            case.quiet(&taken, what);
            case.check(
                taken.x[..3] == [x0, x1, va + moved],
                format_args!("{what}: {:x?}", taken.x),
            );
        }
        // But for exclusives and DC ZVA: an abort, or they are done.
        let taken = probe(load_exclusive, access(va));
        let what = format_args!("ldxr from flash at {ipa:#x}");
        match taken.count {
            0 => case.check(taken.x[0] == u64::MAX, what),
            _ => case.syndrome_at(&taken, &[EXTERNAL_READ], va, what),
        }
        let taken = probe(zero_block, access(va));
        if taken.count != 0 {
            let what = format_args!("dc zva to flash at {ipa:#x}");
            case.syndrome(&taken, &[EXTERNAL_WRITE], what);
        }
        let code = va & !3;
        let taken = probe::run(code, [0; 6], Resume::Caller);
        // Erased flash holds no instruction: it cannot be fetched, or what it holds is undefined.
        let what = format_args!("fetch from flash at {ipa:#x}");
        case.syndrome(&taken, &[EXTERNAL_FETCH, probe::UNDEFINED], what);
    }
}

/// The forms without a syndrome do to RAM what they say, tracked or not, across pages too.
pub fn ram(case: &mut Case, world: &mut World) {
    // The last 2 MiB of RAM that are whole, unless the devicetree is there.
    let mut base = world.boot.ram.end().ipa() - (4 << 20);
    let tree = world.boot.devicetree.first.ipa();
    if (base..base + (2 << 20)).contains(&tree) {
        base -= 4 << 20;
    }
    let read = |at| probe(load64, access(at)).x[0];
    for page in 0..64 {
        let at = base + page * 0x3000;
        case.quiet(
            &probe(store_pair, access(at)),
            format_args!("stp to {at:#x}"),
        );
        let pair = probe(load_pair, access(at)).x;
        case.check(
            pair[..2] == [0x5a5a_0001, 0x5a5a_0002],
            format_args!("ldp from {at:#x}: {pair:x?}"),
        );
        let post = probe(store_post, access(at + 0x100));
        case.check(
            post.count == 0 && post.x[2] == at + 0x108 && read(at + 0x100) == 0x5a5a_0001,
            format_args!("post-index at {at:#x}: {post}"),
        );
        // Across two pages, the second of them not touched before.
        let across = at + 0xffd;
        case.quiet(
            &probe(store64, access(across)),
            format_args!("str across {across:#x}"),
        );
        case.check(
            read(across) == 0x5a5a_0001,
            format_args!("ldr across {across:#x}: {:#x}", read(across)),
        );
        let vector = probe(load_vector, access(at));
        let stored = probe(store_vector, access(at + 0x2008));
        case.check(
            vector.count + stored.count == 0 && read(at + 0x2008) == 0x5a5a_0001,
            format_args!("q0 from {at:#x} to {:#x}: {vector}, {stored}", at + 0x2008),
        );
        let added = probe(exclusive_add, access(at));
        case.check(
            added.count == 0 && read(at) == 0x5a5a_0001 + 0x5a5a_0002,
            format_args!("ldxr/stxr at {at:#x}: {added}"),
        );
        if super::identity::field(6, 0, 20) >= 2 {
            let added = probe(atomic_add, access(at));
            case.check(
                added.count == 0 && read(at) == 0x5a5a_0001 * 2 + 0x5a5a_0002,
                format_args!("ldadd at {at:#x}: {added}"),
            );
        }
        let zeroed = probe(zero_block, access(at));
        case.check(
            zeroed.count == 0 && read(at) == 0 && read(at + 8) == 0,
            format_args!("dc zva at {at:#x}: {zeroed}"),
        );
    }
}
