//! The flash of a guest with firmware: commands cut short, of the wrong size and in the wrong place, code and tables in
//! chips that show their status, and everything at random.
//!
//! What is stored obeys a simple law whatever the chips are told: bits are cleared by programming, set by erasing a
//! sector, and the bank with the code changes never.

use core::cell::Cell;
use core::sync::atomic::{AtomicU64, Ordering};

use tidemark_guests::pattern::{Random, Sum};
use tidemark_guests::rt::{console, say};

use super::map::{self, Kind, Level, Window};
use super::probe::{
    self, ALIGNMENT_READ, ALIGNMENT_WRITE, EXTERNAL_FETCH, EXTERNAL_READ, EXTERNAL_WRITE, IL,
    Resume, Snippet, Taken, probe, snippets,
};
use super::{Case, World, other};

snippets! {
    load8: "ldrb w0, [x2]";
    load16: "ldrh w0, [x2]";
    load32: "ldr w0, [x2]";
    load64: "ldr x0, [x2]";
    load_pair: "ldp x0, x1, [x2]";
    load_post: "ldr x0, [x2], #8";
    load_exclusive: "ldxr x0, [x2]", "clrex";
    // ldr q0, [x2]
    load_vector: ".inst 0x3dc00040";
    store8: "strb w0, [x2]";
    store16: "strh w0, [x2]";
    store32: "str w0, [x2]";
    store64: "str x0, [x2]";
    store_pair: "stp x0, x1, [x2]";
    store_post: "str x0, [x2], #8";
    store_exclusive: "ldxr x6, [x2]", "stxr w7, x0, [x2]";
    // fmov d0, x0; ins v0.d[1], x1; str q0, [x2]
    store_vector: ".inst 0x9e670000", ".inst 0x4e181c20", ".inst 0x3d800040";
    zero_block: "dc zva, x2";
    clean_invalidate: "dc civac, x2";
}

/// By the logarithm of their size.
const STORES: [Snippet; 4] = [store8, store16, store32, store64];
const FORMS: [Snippet; 18] = [
    load8,
    load16,
    load32,
    load64,
    load_pair,
    load_post,
    load_exclusive,
    load_vector,
    store8,
    store16,
    store32,
    store64,
    store_pair,
    store_post,
    store_exclusive,
    store_vector,
    zero_block,
    clean_invalidate,
];

const CODE: u64 = 0;
const VARIABLES: u64 = 0x0400_0000;
const BANK: u64 = 0x0400_0000;
const SECTOR: u64 = 0x4_0000;
/// What both chips' write buffers hold.
const BLOCK: u64 = 0x200;
/// What of each bank has memory, for so little firmware and no variables.
const STORED: u64 = 0x20_0000;

const PROGRAM: u32 = 0x40_0040;
const ERASE: u32 = 0x20_0020;
const CLEAR: u32 = 0x50_0050;
const LOCK: u32 = 0x60_0060;
const STATUS: u32 = 0x70_0070;
const IDENTITY: u32 = 0x90_0090;
const QUERY: u32 = 0x98_0098;
const BUFFERED: u32 = 0xe8_00e8;
const CONFIRM: u32 = 0xd0_00d0;
const ARRAY: u32 = 0xff_00ff;
/// As data it programs nothing, as a command it is [`ARRAY`], as a number it is too great.
const NEUTRAL: u32 = u32::MAX;

/// Both chips' status: ready; locked; an error of programming, of erasing, of the order of commands.
const READY: u32 = 0x80_0080;
const LOCKED: u32 = 0x02_0002;
const PROGRAM_ERROR: u32 = 0x10_0010;
const ERASE_ERROR: u32 = 0x20_0020;
const SEQUENCE_ERROR: u32 = PROGRAM_ERROR | ERASE_ERROR;

fn put(case: &mut Case, at: u64, value: u32) {
    let taken = probe(store32, [value.into(), 0, at, 0, 0, 0]);
    case.quiet(&taken, format_args!("{value:#x} to {at:#x}"));
}

fn get(case: &mut Case, at: u64) -> u64 {
    let taken = probe(load64, [0, 0, at, 0, 0, 0]);
    case.quiet(&taken, format_args!("load of {at:#x}"));
    taken.x[0]
}

/// The bank's status, when it is no longer busy.
fn status(case: &mut Case, bank: u64) -> u32 {
    for _ in 0..2 * SECTOR / 4096 {
        let status = get(case, bank) as u32;
        if status & READY == READY {
            return status;
        }
    }
    case.fail(format_args!("the bank at {bank:#x} stays busy"));
    0
}

/// Ends whatever the chips are at, so that they show what is stored: data in two blocks is the end of any command that
/// takes data, and an erase is over when it was asked often enough.
fn settle(case: &mut Case, bank: u64) {
    for _ in 0..2 * SECTOR / 4096 {
        put(case, bank, NEUTRAL);
        put(case, bank + BLOCK, NEUTRAL);
    }
    put(case, bank, CLEAR);
    put(case, bank, ARRAY);
}

fn erase(case: &mut Case, sector: u64) {
    put(case, sector, ERASE);
    put(case, sector, CONFIRM);
    let status = status(case, sector);
    case.check(
        status == READY,
        format_args!("erasing {sector:#x} ends with status {status:#x}"),
    );
    put(case, sector, ARRAY);
}

fn sum(case: &mut Case, from: u64, bytes: u64) -> Sum {
    let mut sum = Sum::NEW;
    for at in (from..from + bytes).step_by(8) {
        sum.add(get(case, at));
    }
    sum
}

/// A bank, writes to offsets in it that are not what the chips expect, and what their status says then.
type Refused = (&'static str, u64, &'static [(u64, u32)], u32);

/// Commands that are not ended, or not as they should be: the status says so, and what is stored stays.
pub fn cut_short(case: &mut Case, _world: &mut World) {
    settle(case, VARIABLES);
    erase(case, VARIABLES);
    let code = sum(case, CODE, BLOCK);
    let refused: [Refused; 12] = [
        (
            "an erase",
            VARIABLES,
            &[(0, ERASE), (0, STATUS)],
            SEQUENCE_ERROR,
        ),
        (
            "a lock",
            VARIABLES,
            &[(0, LOCK), (0, STATUS)],
            SEQUENCE_ERROR,
        ),
        (
            "too many words",
            VARIABLES,
            &[(0, BUFFERED), (0, 0x100)],
            SEQUENCE_ERROR,
        ),
        (
            "the most there can be",
            VARIABLES,
            &[(0, BUFFERED), (0, 0xffff)],
            SEQUENCE_ERROR,
        ),
        (
            "words of two blocks",
            VARIABLES,
            &[(0, BUFFERED), (0, 1), (BLOCK - 4, 0), (BLOCK, 0)],
            SEQUENCE_ERROR,
        ),
        (
            "words of two sectors",
            VARIABLES,
            &[(0, BUFFERED), (0, 1), (SECTOR - 4, 0), (SECTOR, 0)],
            SEQUENCE_ERROR,
        ),
        (
            "words without the end",
            VARIABLES,
            &[(0, BUFFERED), (0, 0), (0, 0), (0, STATUS)],
            SEQUENCE_ERROR,
        ),
        (
            "a program past memory",
            VARIABLES,
            &[(STORED, PROGRAM), (STORED, 0)],
            PROGRAM_ERROR | LOCKED,
        ),
        (
            "an erase past memory",
            VARIABLES,
            &[(BANK - 4, ERASE), (BANK - 4, CONFIRM)],
            ERASE_ERROR | LOCKED,
        ),
        (
            "a program of code",
            CODE,
            &[(0, PROGRAM), (0, 0)],
            PROGRAM_ERROR | LOCKED,
        ),
        (
            "words of code",
            CODE,
            &[(0, BUFFERED), (0, 0), (0, 0), (0, CONFIRM)],
            PROGRAM_ERROR | LOCKED,
        ),
        (
            "an erase of code",
            CODE,
            &[(0, ERASE), (0, CONFIRM)],
            ERASE_ERROR | LOCKED,
        ),
    ];
    for (what, bank, writes, error) in refused {
        for (offset, value) in writes {
            put(case, bank + offset, *value);
        }
        let said = status(case, bank);
        case.check(
            said == READY | error,
            format_args!("{what}: status {said:#x}"),
        );
        put(case, bank, CLEAR);
        put(case, bank, STATUS);
        let said = status(case, bank);
        case.check(said == READY, format_args!("{what}, cleared: {said:#x}"));
        put(case, bank, ARRAY);
    }
    // Across a block's end in one access; nothing of it is programmed.
    let va = map::page(Window(0), VARIABLES + BLOCK - 4, Kind::Normal);
    put(case, VARIABLES, PROGRAM);
    let taken = probe(store64, [0, 0, va, 0, 0, 0]);
    case.quiet(&taken, format_args!("a program across blocks"));
    let said = status(case, VARIABLES);
    case.check(
        said == READY | SEQUENCE_ERROR,
        format_args!("a program across blocks: status {said:#x}"),
    );
    put(case, VARIABLES, CLEAR);
    // No status asked for: back to what is stored in the middle of everything.
    for cut in [ERASE, LOCK, STATUS, IDENTITY, QUERY] {
        put(case, VARIABLES, cut);
        put(case, VARIABLES, ARRAY);
        let stored = get(case, VARIABLES);
        case.check(
            stored == u64::MAX,
            format_args!("{cut:#x}, then the array: {stored:#x}"),
        );
    }
    // Busy: nothing is heard.
    put(case, VARIABLES, ERASE);
    put(case, VARIABLES, CONFIRM);
    for deaf in [PROGRAM, 0, ARRAY, ERASE, BUFFERED, CONFIRM] {
        put(case, VARIABLES, deaf);
    }
    let said = status(case, VARIABLES);
    case.check(said == READY, format_args!("after an erase: {said:#x}"));
    put(case, VARIABLES, ARRAY);
    for at in (0..2 * BLOCK)
        .chain(SECTOR - BLOCK..SECTOR + BLOCK)
        .step_by(8)
    {
        let stored = get(case, VARIABLES + at);
        case.check(
            stored == u64::MAX,
            format_args!("{stored:#x} is stored at {at:#x} of the variables"),
        );
    }
    let now = sum(case, CODE, BLOCK);
    case.check(now == code, format_args!("the code changed"));
}

/// Programs by every size, at every alignment, word by word and through the buffer: exactly those bytes lose exactly
/// those bits.
pub fn programs(case: &mut Case, world: &mut World) {
    settle(case, VARIABLES);
    erase(case, VARIABLES);
    let mut shadow = [0xff_u8; BLOCK as usize];
    let block = VARIABLES + 3 * 0x1000;
    let window = map::page(Window(0), block, Kind::Normal);
    for round in 0..400_u64 {
        // Neighbours keep theirs too, so each round has few bytes.
        let writes = match round & 3 {
            0 => 1 + world.random.below(6),
            _ => 1,
        };
        if round & 3 == 0 {
            put(case, block, BUFFERED);
            put(case, block, writes as u32 - 1);
        } else {
            put(case, block, PROGRAM);
        }
        // Of two writes to a byte the last counts: they are to the buffer.
        let mut masks = [0xff_u8; BLOCK as usize];
        for _ in 0..writes {
            let log = (world.random.next() & 3) as usize;
            let bytes = 1_u64 << log;
            let offset = world.random.below(BLOCK - bytes + 1);
            // Most bits stay, so that there are some left to clear.
            let value = world.random.next() | world.random.next() | world.random.next();
            let store = STORES.get(log).copied().unwrap_or(store8);
            let taken = probe(store, [value, 0, window + offset, 0, 0, 0]);
            case.quiet(&taken, format_args!("{bytes} bytes at {offset:#x}"));
            let bytes = value.to_le_bytes().into_iter().take(bytes as usize);
            for (mask, byte) in masks.iter_mut().skip(offset as usize).zip(bytes) {
                *mask = byte;
            }
        }
        for (byte, mask) in shadow.iter_mut().zip(masks) {
            *byte &= mask;
        }
        if round & 3 == 0 {
            put(case, block, CONFIRM);
        }
        let said = status(case, block);
        case.check(said == READY, format_args!("round {round}: {said:#x}"));
        put(case, block, ARRAY);
        let (words, _) = shadow.as_chunks::<8>();
        for (word, at) in words.iter().zip((block..).step_by(8)) {
            let stored = get(case, at);
            let wanted = u64::from_le_bytes(*word);
            case.check(
                stored == wanted,
                format_args!("round {round}: {stored:#x} at {at:#x}, not {wanted:#x}"),
            );
        }
    }
}

/// Code in flash runs while the chips show what is stored, and cannot be fetched while they do not; tables likewise.
pub fn execute(case: &mut Case, _world: &mut World) {
    settle(case, VARIABLES);
    erase(case, VARIABLES);
    // mov x0, #42; ret
    let code = VARIABLES + 0x1000;
    for (at, word) in [(code, 0xd280_0540), (code + 4, 0xd65f_03c0)] {
        put(case, VARIABLES, PROGRAM);
        put(case, at, word);
    }
    put(case, VARIABLES, ARRAY);
    let va = map::page(Window(0), code, Kind::Normal);
    for round in 0..8 {
        probe::publish(va);
        let taken = probe::run(va, [0; 6], Resume::Caller);
        case.quiet(&taken, format_args!("code in flash"));
        case.check(taken.x[0] == 42, format_args!("code in flash: {taken}"));
        let command = [STATUS, IDENTITY, QUERY, PROGRAM, ERASE][round % 5];
        put(case, VARIABLES, command);
        for _ in 0..2 {
            let taken = probe::run(va, [0; 6], Resume::Caller);
            let what = format_args!("code behind {command:#x}");
            case.syndrome_at(&taken, &[EXTERNAL_FETCH], va, what);
        }
        // It must be no data for PROGRAM.
        let walked = map::walk_through(Level::Three, VARIABLES + 0x2000);
        let taken = probe(load64, [0, 0, walked, 0, 0, 0]);
        let abort = 0x25 << 26 | IL | 0x17;
        case.syndrome_at(&taken, &[abort], walked, format_args!("tables behind it"));
        map::walk_nothing();
        settle(case, VARIABLES);
    }
}

/// What the other vCPU may see of the word that is programmed bit by bit: what it was between two programs, or registers.
fn may_be(seen: u64) -> bool {
    // The status of chips that are busy erasing is 0.
    let bits = seen == u64::MAX.unbounded_shl(seen.trailing_zeros());
    let registers = u64::from(READY) << 32 | u64::from(READY);
    bits || seen == registers
}

static LAST_ODD: AtomicU64 = AtomicU64::new(0);

/// Reads that word; whether it was something that never was there.
pub fn storm(random: &mut Random) -> bool {
    let taken = probe(load64, [0, 0, VARIABLES, 0, 0, 0]);
    let odd = taken.count != 0 || !may_be(taken.x[0]);
    if odd {
        LAST_ODD.store(taken.x[0], Ordering::Relaxed);
    }
    // The next page is in the same bank, and is never written.
    if random.next() & 3 == 0 {
        probe(load_pair, [0, 0, VARIABLES + 0x1000, 0, 0, 0]);
    }
    odd
}

/// Programs and erases while the other vCPU reads.
pub fn by_two(case: &mut Case, world: &mut World) {
    settle(case, VARIABLES);
    erase(case, VARIABLES);
    other::storm(other::Storm::Flash, world.random.next());
    for _ in 0..6 {
        for bit in 1..64 {
            let value = u64::MAX << bit;
            put(case, VARIABLES, PROGRAM);
            let taken = probe(store64, [value, 0, VARIABLES, 0, 0, 0]);
            case.quiet(&taken, format_args!("a program"));
            put(case, VARIABLES, ARRAY);
            let stored = get(case, VARIABLES);
            case.check(stored == value, format_args!("{stored:#x}, not {value:#x}"));
        }
        erase(case, VARIABLES);
    }
    let (reads, odd) = other::calm();
    case.check(reads > 0, format_args!("the other vCPU read nothing"));
    let last = LAST_ODD.load(Ordering::Relaxed);
    case.check(
        odd == 0,
        format_args!("it saw {odd} odd things, the last {last:#x}"),
    );
}

/// Accesses of all forms and kinds, commands and not, where something begins or ends. An abort, or done.
pub fn sweep(case: &mut Case, world: &mut World) {
    settle(case, CODE);
    let code = sum(case, CODE, SECTOR);
    let random = &mut world.random;
    for turn in 0..6000_u64 {
        let choice = random.next();
        let bank = if choice & 1 == 0 { CODE } else { VARIABLES };
        let near = [0, BLOCK, 0x1000, SECTOR, STORED - SECTOR, STORED, BANK];
        let place = match choice >> 1 & 7 {
            7 => random.below(BANK),
            index => near[index as usize]
                .wrapping_add(random.below(0x40))
                .wrapping_sub(0x20),
        };
        let ipa = (bank + place.min(2 * BANK)).min(2 * BANK - 0x20);
        let commands = [
            PROGRAM, ERASE, CLEAR, LOCK, STATUS, IDENTITY, QUERY, BUFFERED, CONFIRM, CONFIRM,
            ARRAY, 0, 3, 0x1f,
        ];
        let value = match choice >> 8 & 3 {
            0 => random.next(),
            _ => u64::from(commands[random.below(commands.len() as u64) as usize]),
        };
        let form = FORMS[random.below(FORMS.len() as u64) as usize];
        let kind = if choice & 1 << 16 == 0 {
            Kind::Normal
        } else {
            Kind::Device
        };
        map::page(Window(1), ipa.wrapping_add(0x1000) & (2 * BANK - 1), kind);
        let va = map::page(Window(0), ipa, kind);
        let taken = probe(form, [value, value, va, 0, 0, 0]);
        bounded(case, &taken, turn, ipa);
    }
    settle(case, CODE);
    settle(case, VARIABLES);
    let now = sum(case, CODE, SECTOR);
    case.check(now == code, format_args!("the code changed"));
    // The chips are as good as before.
    erase(case, VARIABLES);
    let stored = get(case, VARIABLES);
    case.check(stored == u64::MAX, format_args!("erased: {stored:#x}"));
}

fn bounded(case: &mut Case, taken: &Taken, turn: u64, ipa: u64) {
    let allowed = [
        EXTERNAL_READ,
        EXTERNAL_WRITE,
        ALIGNMENT_READ,
        ALIGNMENT_WRITE,
    ];
    let as_it_should = taken.vector == probe::SYNC_EL1H
        && taken.resumable()
        && allowed.contains(&taken.syndrome());
    case.check(
        taken.count == 0 || as_it_should,
        format_args!("turn {turn} at {ipa:#x}: {taken}"),
    );
}

/// Programs words of the variables at random, and sometimes erases a sector, until a line comes.
pub fn go_on(seed: u64) {
    say!("flash: goes on");
    let state = Cell::new(seed);
    let mut line = [0; 8];
    let _ = console::read_line(&mut line, || {
        let mut random = Random(state.get());
        let at = VARIABLES + random.below(STORED / 4) * 4;
        let (command, value) = match random.below(64) {
            0 => (ERASE, CONFIRM),
            _ => (PROGRAM, random.next() as u32),
        };
        for value in [command, value] {
            probe(store32, [value.into(), 0, at, 0, 0, 0]);
        }
        while probe(load32, [0, 0, at, 0, 0, 0]).x[0] as u32 & READY != READY {}
        probe(store32, [ARRAY.into(), 0, at, 0, 0, 0]);
        state.set(random.0);
    });
    say!("flash: ended");
}

/// Programs a word in every third page of the variables, eight of them, from page `first` on, and says so.
pub fn program_pages(first: u64) {
    for page in (first..).step_by(3).take(8) {
        let at = VARIABLES + page % (STORED / 0x1000) * 0x1000;
        for (at, value) in [(at, PROGRAM), (at + 8, page as u32), (at, ARRAY)] {
            probe(store32, [value.into(), 0, at, 0, 0, 0]);
        }
    }
    say!("flash: programmed");
}

/// Erases the sector of the variables that `page` is in, and says so.
pub fn erase_page(page: u64) {
    let at = VARIABLES + page % (STORED / 0x1000) * 0x1000;
    for command in [ERASE, CONFIRM] {
        probe(store32, [command.into(), 0, at, 0, 0, 0]);
    }
    while probe(load32, [0, 0, at, 0, 0, 0]).x[0] as u32 & READY != READY {}
    probe(store32, [ARRAY.into(), 0, at, 0, 0, 0]);
    say!("flash: erased");
}
