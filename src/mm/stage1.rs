//! EL2's page tables: an identity map, W^X, with guard pages, and a window of stacks.
//!
//! Written by the boot CPU alone: first with the MMU off (plain stores, no locks), later
//! before any other CPU runs. Entries are only ever added, never changed, so no
//! break-before-make is needed (Arm ARM D8.14.1). Table memory comes from a fixed pool in
//! the image; to map all memory, around however many reservations, from that memory itself.

use super::{PAGE, Range, layout};
use crate::arch::boot::EARLY_UART;
use crate::arch::features;
use crate::arch::stage1::{self, EnableMmu};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Code: read and executed.
    Execute,
    /// Read only.
    Read,
    /// Read and written.
    ReadWrite,
    /// Device registers: Device-nGnRE, read and written.
    Device,
}

impl Access {
    fn attributes(self) -> u64 {
        const AF: u64 = 1 << 10;
        const INNER_SHAREABLE: u64 = 3 << 8;
        const READ_ONLY: u64 = 1 << 7;
        const RES1: u64 = 1 << 6;
        const XN: u64 = 1 << 54;
        const DEVICE: u64 = 1 << 2;
        AF | RES1
            | match self {
                Self::Execute => INNER_SHAREABLE | READ_ONLY,
                Self::Read => INNER_SHAREABLE | READ_ONLY | XN,
                Self::ReadWrite => INNER_SHAREABLE | XN,
                Self::Device => DEVICE | XN,
            }
    }
}

/// A mapping could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapError {
    /// The pool of tables is used up.
    OutOfTables,
    /// The address is past the 48-bit space.
    OutOfRange,
}

#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

const TABLES: usize = 128;
static POOL: [Table; TABLES] = [const { Table([const { AtomicU64::new(0) }; 512]) }; TABLES];
/// The first one is the top table.
static USED: AtomicUsize = AtomicUsize::new(1);

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 2;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Stacks of CPUs stand here, each in the upper half of its own stretch, with the
/// unmapped lower half as the guard below it.
const STACK_WINDOW: usize = 0xff00_0000_0000;
const STACK_STRIDE: usize = 64 * 1024;
/// Stacks mapped so far: numbers 0 to here.
static MAPPED_STACKS: AtomicUsize = AtomicUsize::new(0);
/// Bytes of a CPU's stack.
pub const STACK_SIZE: usize = 32 * 1024;

/// Memory that tables come from while there is some: where it started, its next table, and its end.
static FED: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

fn table_at(address: u64) -> Option<&'static Table> {
    let [start, next, _] = FED.each_ref().map(|place| place.load(Relaxed));
    if (start..next).contains(&address) {
        // SAFETY: `feed` was promised this memory for good, and `new_table` gave this part of it out: a table of
        // atomics, mapped where it stands, and aligned as addresses in entries are.
        return Some(unsafe { &*(address as *const Table) });
    }
    let offset = (address as usize).checked_sub(POOL.as_ptr() as usize)?;
    POOL.get(offset / size_of::<Table>())
}

/// Has tables made of `range` from now on, as long as it lasts.
///
/// # Safety
///
/// It is zeroed, mapped read-write, in whole pages, and nobody else's for good, but for what [`leftover`] gives back.
pub unsafe fn feed(range: Range) {
    for (place, value) in FED.iter().zip([range.start, range.start, range.end]) {
        place.store(value, Relaxed);
    }
}

/// What no table was made of, and none will be.
pub fn leftover() -> Range {
    let [_, next, end] = FED.each_ref().map(|place| place.load(Relaxed));
    FED[2].store(next, Relaxed);
    Range { start: next, end }
}

fn new_table() -> Result<u64, MapError> {
    let [_, next, end] = FED.each_ref().map(|place| place.load(Relaxed));
    if next < end {
        FED[1].store(next + PAGE as u64, Relaxed);
        return Ok(next);
    }
    let index = USED.load(Relaxed);
    let table = POOL.get(index).ok_or(MapError::OutOfTables)?;
    USED.store(index + 1, Relaxed);
    Ok(core::ptr::from_ref(table) as u64)
}

/// Maps `size` bytes at `va` to `pa` in the largest leaves that fit; both and the size are
/// multiples of a page. What is mapped already stays as it is.
pub fn map(va: usize, pa: u64, size: u64, access: Access) -> Result<(), MapError> {
    let (mut va, mut pa) = (va as u64, pa);
    let end = va.checked_add(size).ok_or(MapError::OutOfRange)?;
    if end > 1 << 48 || pa.saturating_add(size) > 1 << 48 {
        return Err(MapError::OutOfRange);
    }
    while va < end {
        let done = map_leaf(va, pa, end - va, access)?;
        va += done;
        pa += done;
    }
    stage1::publish();
    Ok(())
}

/// Maps one leaf at the start of the range; gives the bytes that are now mapped.
fn map_leaf(va: u64, pa: u64, left: u64, access: Access) -> Result<u64, MapError> {
    let mut table = &POOL[0];
    for level in 0..4 {
        let shift = 39 - 9 * level;
        let size = 1u64 << shift;
        let entry = &table.0[(va >> shift) as usize & 511];
        let old = entry.load(Relaxed);
        let leaf = level == 3 || old & TABLE_OR_PAGE == 0;
        if old & VALID != 0 && leaf {
            return Ok((size - (va & (size - 1))).min(left));
        }
        if old & VALID == 0 {
            if level > 0 && (va | pa) & (size - 1) == 0 && left >= size {
                let kind = if level == 3 { TABLE_OR_PAGE } else { 0 };
                entry.store(pa | access.attributes() | kind | VALID, Relaxed);
                return Ok(size);
            }
            entry.store(new_table()? | TABLE_OR_PAGE | VALID, Relaxed);
        }
        table = table_at(entry.load(Relaxed) & ADDRESS).ok_or(MapError::OutOfTables)?;
    }
    Err(MapError::OutOfRange)
}

/// Maps a range of memory or device registers where it stands, whole pages.
pub fn map_identity(range: Range, access: Access) -> Result<(), MapError> {
    let range = range.whole_pages();
    map(range.start as usize, range.start, range.size(), access)
}

/// Maps stack number `index` of the window onto the frames at `pa`; gives its top.
pub fn map_stack(index: usize, pa: u64) -> Result<usize, MapError> {
    let top = STACK_WINDOW + (index + 1) * STACK_STRIDE;
    map(top - STACK_SIZE, pa, STACK_SIZE as u64, Access::ReadWrite)?;
    MAPPED_STACKS.store(index + 1, Relaxed);
    Ok(top)
}

/// Fills in the registers that turn this translation on.
pub fn fill_registers(registers: &EnableMmu) {
    registers.fill(POOL.as_ptr() as u64, features::pa_range());
}

/// Maps the image part by part, leaving the page below the boot stack out.
fn map_image() -> Result<(), MapError> {
    let parts = [
        (layout::image_start(), layout::text_end(), Access::Execute),
        (layout::text_end(), layout::rodata_end(), Access::Read),
        (
            layout::rodata_end(),
            layout::stack_guard(),
            Access::ReadWrite,
        ),
        (
            layout::boot_stack_bottom(),
            layout::image_end(),
            Access::ReadWrite,
        ),
    ];
    for (start, end, access) in parts {
        map(start, start as u64, (end - start) as u64, access)?;
    }
    Ok(())
}

/// The first tables, with the MMU still off: the image, the devicetree at `dtb` and the
/// early console. Called from boot/head.S, which turns the MMU on with what it gets.
#[unsafe(no_mangle)]
extern "C" fn build_boot_tables(dtb: usize) -> &'static EnableMmu {
    static REGISTERS: EnableMmu = EnableMmu::new();
    let uart = Range {
        start: EARLY_UART as u64,
        end: (EARLY_UART + PAGE) as u64,
    };
    // A failure here cannot be printed any better than by what happens next: what is
    // missing faults, and the vectors are in place.
    let _ = map_image();
    let _ = map_identity(uart, Access::Device);
    if let Some(tree) = find_devicetree(dtb) {
        let _ = map_identity(tree, Access::Read);
        DEVICETREE[0].store(tree.start, Relaxed);
        DEVICETREE[1].store(tree.end, Relaxed);
    }
    fill_registers(&REGISTERS);
    &REGISTERS
}

/// The devicetree that the boot tables map.
static DEVICETREE: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Where the devicetree stands; `None` where the boot loader handed over none.
pub fn devicetree_range() -> Option<Range> {
    let [start, end] = DEVICETREE.each_ref().map(|place| place.load(Relaxed));
    (end != 0).then_some(Range { start, end })
}

/// Reads the devicetree's header, with the MMU off.
fn find_devicetree(dtb: usize) -> Option<Range> {
    const MAGIC: u32 = 0xd00d_feed;
    const LARGEST: u32 = 2 << 20;
    if dtb == 0 || !dtb.is_multiple_of(8) {
        return None;
    }
    let word = |n: usize| {
        // SAFETY: the boot protocol puts a devicetree at x0, in memory; it is only read,
        // and before its length is known only these two words of it.
        u32::from_be(unsafe { (dtb as *const u32).add(n).read_volatile() })
    };
    if word(0) != MAGIC || word(1) > LARGEST {
        return None;
    }
    Range::new(dtb as u64, u64::from(word(1)))
}

/// Reads a frame record from one of EL2's stacks; `None` for any other address.
pub fn read_stack(frame: usize) -> Option<[usize; 2]> {
    let boot = layout::boot_stack_bottom()..layout::boot_stack_top() - 16;
    // The first stretch is never mapped.
    let window =
        STACK_WINDOW + STACK_STRIDE..STACK_WINDOW + STACK_STRIDE * crate::arch::cpu::MAX_CPUS;
    let on_a_stack = boot.contains(&frame)
        || window.contains(&frame)
            && frame % STACK_STRIDE >= STACK_STRIDE - STACK_SIZE
            && frame % STACK_STRIDE <= STACK_STRIDE - 16
            && MAPPED_STACKS.load(Relaxed) > (frame - STACK_WINDOW) / STACK_STRIDE;
    if !on_a_stack || !frame.is_multiple_of(8) {
        return None;
    }
    // SAFETY: inside a mapped stack, aligned; stacks hold plain words.
    Some(unsafe { (frame as *const [usize; 2]).read_volatile() })
}

/// Reads where nothing is mapped: a data abort at EL2, for the tests of the crash console.
pub fn touch_unmapped() {
    let unmapped = layout::stack_guard() as *const u64;
    // SAFETY: the page below the boot stack is never mapped, so nothing is read: it faults.
    unsafe { unmapped.read_volatile() };
}
