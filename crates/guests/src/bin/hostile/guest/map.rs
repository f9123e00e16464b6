//! The cases' own stage-1 tables: what the run time mapped, and windows for any address with any attributes.
//!
//! Used by vCPU 0 alone, but for a window that vCPU 1 changes in one case. The windows' entries are changed by break-before-make with everything invalidated (Arm ARM D8.17).

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

const TABLE: u64 = 0b11;
const PAGE: u64 = 0b11;
/// Access flag.
pub const AF: u64 = 1 << 10;
const NOT_GLOBAL: u64 = 1 << 11;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const UXN: u64 = 1 << 54;
/// AP bit 1: EL0 too.
pub const USER: u64 = 1 << 6;
/// AP bit 2: read-only.
pub const READ_ONLY: u64 = 1 << 7;
/// The dirty bit modifier: with hardware dirty state, a write makes it writable.
pub const DBM: u64 = 1 << 51;

/// Where the windows begin: far above any guest's RAM.
const WINDOWS: u64 = 128 << 30;
/// Where level 1's own descriptors point to tables that the cases choose.
const BAD_LEVEL2: u64 = WINDOWS + (1 << 30);
/// Where level 2's do.
const BAD_LEVEL3: u64 = WINDOWS + (1 << 21);

/// What a window's page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Write-back memory.
    Normal,
    /// Device-nGnRE.
    Device,
}

/// Which of the windows; a page each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window(pub u64);

/// A page of tables, or of anything.
#[repr(C, align(4096))]
pub struct Table(pub [AtomicU64; 512]);

impl Table {
    /// Zeros.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        core::ptr::from_ref(self).addr() as u64
    }

    fn set(&self, index: u64, entry: u64) {
        if let Some(slot) = self.0.get(index as usize) {
            slot.store(entry, Ordering::Relaxed);
        }
    }

    fn get(&self, index: u64) -> u64 {
        self.0
            .get(index as usize)
            .map_or(0, |slot| slot.load(Ordering::Relaxed))
    }
}

static ROOT: Table = Table::new();
static LEVEL2: Table = Table::new();
static LEVEL3: Table = Table::new();

/// Switches to tables with windows.
pub fn install() {
    let current: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, ttbr0_el1", out(reg) current, options(nomem, nostack)) };
    let table = (current & 0xffff_ffff_f000) as usize;
    let old = core::ptr::with_exposed_provenance::<Table>(table);
    // SAFETY: the run time's root, identity-mapped and never freed.
    let old = unsafe { &*old };
    for index in 0..512 {
        ROOT.set(index, old.get(index));
    }
    ROOT.set(WINDOWS >> 30, LEVEL2.address() | TABLE);
    LEVEL2.set(0, LEVEL3.address() | TABLE);
    // SAFETY: they map what the old ones did; entries are not global, and the ASID is another.
    unsafe {
        asm!("dsb ishst", "msr ttbr0_el1, {}", "isb", in(reg) ROOT.address() | 2 << 48, options(nostack));
    }
}

fn change(table: &Table, index: u64, entry: u64) {
    table.set(index, 0);
    flush();
    table.set(index, entry);
    // SAFETY: barriers.
    unsafe { asm!("dsb ishst", "isb", options(nostack)) };
}

/// Forgets every translation.
pub fn flush() {
    // SAFETY: invalidation loses nothing.
    unsafe {
        asm!(
            "dsb ishst",
            "tlbi vmalle1is",
            "dsb ish",
            "isb",
            options(nostack)
        )
    };
}

/// Has `window` show the page at `ipa` by a descriptor with `bits` besides what all have, and gives its address.
pub fn page_with(window: Window, ipa: u64, kind: Kind, bits: u64) -> u64 {
    let attributes = match kind {
        Kind::Normal => INNER_SHAREABLE,
        Kind::Device => 1 << 2,
    };
    let user = if bits & USER == 0 { UXN } else { 0 };
    let entry = ipa & 0xffff_ffff_f000 | PAGE | NOT_GLOBAL | attributes | user | bits;
    change(&LEVEL3, window.0, entry);
    address(window)
}

/// The same for a page of code that EL0 can execute and not read.
pub fn execute_only(window: Window, ipa: u64) -> u64 {
    let entry = ipa & 0xffff_ffff_f000 | PAGE | NOT_GLOBAL | INNER_SHAREABLE | AF;
    change(&LEVEL3, window.0, entry);
    address(window)
}

/// Has `window` show nothing.
pub fn forget(window: Window) {
    change(&LEVEL3, window.0, 0);
}

/// Where `window` is.
pub fn address(window: Window) -> u64 {
    WINDOWS + window.0 * 4096
}

/// The same for a page that is used at EL1 without further ado; the address of `ipa` itself.
pub fn page(window: Window, ipa: u64, kind: Kind) -> u64 {
    page_with(window, ipa, kind, AF) | ipa & 0xfff
}

/// A window's descriptor, which the hardware may have changed.
pub fn descriptor(window: Window) -> u64 {
    LEVEL3.get(window.0)
}

/// Which level's tables are elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Level 2.
    Two,
    /// Level 3.
    Three,
}

impl Level {
    /// Its number.
    pub fn number(self) -> u64 {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }
}

/// Puts a level's table at `ipa` and gives an address that is translated through it.
pub fn walk_through(level: Level, ipa: u64) -> u64 {
    let entry = ipa & 0xffff_ffff_f000 | TABLE;
    match level {
        Level::Two => {
            change(&ROOT, BAD_LEVEL2 >> 30, entry);
            BAD_LEVEL2 + 0x12_3458
        }
        Level::Three => {
            change(&LEVEL2, 1, entry);
            BAD_LEVEL3 + 0x12_3458
        }
    }
}

/// Takes such tables away.
pub fn walk_nothing() {
    change(&ROOT, BAD_LEVEL2 >> 30, 0);
    change(&LEVEL2, 1, 0);
}

/// Shows the windows below 4 GiB too, for AArch32, and gives the address of one. RAM must not reach that far.
pub fn below_4_gib(window: Window) -> u64 {
    change(&ROOT, 3, LEVEL2.address() | TABLE);
    (3 << 30) + window.0 * 4096
}
