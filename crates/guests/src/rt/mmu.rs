//! Stage 1: an identity map, RAM write-back cacheable in 2 MiB blocks, devices as devices.
//!
//! The entry code turns the MMU on with constant tables that map just enough to read the devicetree; [`map`] then
//! builds the real ones and switches to them. Nothing changes them after that, and no table walk writes to them
//! (the access flag is set beforehand), so they are only written at boot.
//!
//! Arm ARM D8 (VMSAv8-64 translation).

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::fdt::Ram;

/// Bytes in a block.
pub const BLOCK_BYTES: u64 = 1 << 21;
const GIB: u64 = 1 << 30;
/// Where RAM begins on the `virt` board; below it are devices.
const RAM_BASE: u64 = GIB;
/// What 39 bits of virtual address reach.
const REACH: u64 = 512 * GIB;

const VALID_BLOCK: u64 = 0b01;
const VALID_TABLE: u64 = 0b11;
const ACCESS_FLAG: u64 = 1 << 10;
/// All entries are of the ASID in TTBR0_EL1.
const NOT_GLOBAL: u64 = 1 << 11;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const DEVICE: u64 = 1 << 2;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const ASID: u64 = 1 << 48;

#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

impl Table {
    const fn empty() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }

    fn set(&self, index: u64, entry: u64) {
        if let Some(slot) = self.0.get(index as usize) {
            slot.store(entry, Ordering::Relaxed);
        }
    }
}

/// The root, then the one second-level table that is needed: RAM begins at a GiB, so only its last can be partial.
#[repr(C, align(4096))]
pub struct Tables {
    root: Table,
    last: Table,
}

/// The tables of every vCPU.
pub static TABLES: Tables = Tables {
    root: Table::empty(),
    last: Table::empty(),
};

/// Maps RAM (its whole 2 MiB blocks) and the devices below it, and switches to that map.
///
/// # Panics
///
/// RAM does not begin where the board has it, or has not one block.
pub fn map(ram: &Ram) {
    let size = (ram.size - ram.size % BLOCK_BYTES).min(REACH - RAM_BASE);
    assert!(
        ram.base == RAM_BASE && size > 0,
        "RAM at {:#x} with {:#x} bytes; a payload wants it at {RAM_BASE:#x} with at least 2 MiB",
        ram.base,
        ram.size
    );
    TABLES.root.set(
        0,
        VALID_BLOCK | DEVICE | ACCESS_FLAG | NOT_GLOBAL | PXN | UXN,
    );
    let end = RAM_BASE + size;
    let mut gib = RAM_BASE;
    // Whole GiBs of a large guest would need a table each; they are mapped as what they are.
    while end - gib >= GIB {
        TABLES.root.set(gib / GIB, normal(gib));
        gib += GIB;
    }
    if gib < end {
        let last = (&raw const TABLES.last).expose_provenance() as u64;
        TABLES.root.set(gib / GIB, last | VALID_TABLE);
        for pa in (gib..end).step_by(BLOCK_BYTES as usize) {
            TABLES.last.set((pa - gib) / BLOCK_BYTES, normal(pa));
        }
    }
    let root = (&raw const TABLES.root).expose_provenance() as u64;
    // SAFETY: the new tables map all that the old ones did and is in use, at the same addresses and with the same
    // attributes. The entries of both are not global and the ASIDs differ, so no TLB entry of one serves the other.
    unsafe {
        asm!("dsb ishst", "msr ttbr0_el1, {}", "isb", in(reg) root | ASID, options(nostack, preserves_flags));
    }
}

/// Maps memory that was added behind the RAM, as far as the RAM's last table reaches. It stays mapped here, whatever
/// becomes of it. On vCPU 0, before any other is told of it.
///
/// Returns whether the table reaches so far.
pub fn map_behind(first: u64, size: u64) -> bool {
    let end = first.saturating_add(size);
    if first.is_multiple_of(GIB) || first / GIB != (end - 1) / GIB {
        return false;
    }
    for pa in (first..end).step_by(BLOCK_BYTES as usize) {
        TABLES.last.set(pa % GIB / BLOCK_BYTES, normal(pa));
    }
    // Nothing was valid there, so no TLB has it.
    // SAFETY: completes the stores for walks.
    unsafe { asm!("dsb ishst", "isb", options(nostack, preserves_flags)) };
    true
}

fn normal(pa: u64) -> u64 {
    pa | VALID_BLOCK | ACCESS_FLAG | NOT_GLOBAL | INNER_SHAREABLE | UXN
}

/// Where the image begins, where the part of it begins that is written, and where it ends.
#[must_use]
pub fn image() -> [u64; 3] {
    unsafe extern "C" {
        static _start: u8;
        static __own_start: u8;
        static __image_end: u8;
    }
    [
        &raw const _start,
        &raw const __own_start,
        &raw const __image_end,
    ]
    .map(|place| place.addr() as u64)
}
