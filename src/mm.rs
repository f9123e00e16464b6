//! EL2's own memory: its stage 1 (W^X, guard pages), the heap for its small objects,
//! and the frames that guests and tables are made of.

use crate::arch::cache;
use core::fmt;
use map::MemoryMap;
use tidemark_ownership::Owner;
pub use tidemark_ownership::Range;
use tidemark_ownership::without;

pub mod frames;
pub mod heap;
pub mod layout;
pub mod map;
pub mod reach;
pub mod stage1;

/// A frame, and a page of any table: 4 KiB.
pub const PAGE: usize = 4096;

/// The smallest heap that EL2 starts with.
const SMALLEST_HEAP: u64 = 4 << 20;
/// The largest: slots' bitmaps and the frame table are the large objects.
const LARGEST_HEAP: u64 = 64 << 20;

/// Maps all memory, takes the heap from it, and hands the rest to the frame allocator.
///
/// # Panics
///
/// When there is not enough memory to run at all: nothing but EL2 is there yet.
pub fn init(map: &MemoryMap) {
    // First, because what is mapped stays as it is: the bundle is only read, and it is mapped
    // although the boot loader reserved it.
    if let Some(bundle) = map.bundle
        && check_handed_over(map, bundle).is_ok()
    {
        stage1::map_identity(bundle, stage1::Access::Read)
            .unwrap_or_else(|error| panic!("the bundle at {bundle:x?}: {error:?}"));
    }
    // Memory that firmware keeps is not even mapped. The image is mapped already, part by part, and the hole in
    // it is the guard page.
    let image = layout::image().whole_pages();
    let mapped = || map.left(|| map.reserved().chain([image]));
    let taken = || {
        map.reserved()
            .chain([image])
            .chain(stage1::devicetree_range())
            .chain(map.bundle)
            .map(|range| range.whole_pages())
    };
    let span = Range {
        start: map.memory().map(|range| range.start).min().unwrap_or(0),
        end: map.memory().map(|range| range.end).max().unwrap_or(0),
    };
    let largest = map
        .left(taken)
        .max_by_key(Range::size)
        .expect("the devicetree describes no free memory");
    let heap_size = (largest.size() / 32)
        .next_power_of_two()
        .clamp(SMALLEST_HEAP, LARGEST_HEAP);
    let table_size = frames::table_size(span);
    // Each range that is taken out of memory makes one piece more at the most.
    let pieces = map.memory().count() + map.reserved().count() + 1;
    let stage1_size = tables_for(pieces as u64, span);
    assert!(
        largest.size() > heap_size + table_size + stage1_size + SMALLEST_HEAP,
        "not enough free memory: {} KiB in one piece",
        largest.size() >> 10
    );
    // From the end: what guests get is then aligned to large blocks from the start.
    let mut end = largest.end & !(PAGE as u64 - 1);
    let mut cut = |size| {
        end -= size;
        Range {
            start: end,
            end: end + size,
        }
    };
    let [heap, table, stage1] = [heap_size, table_size, stage1_size].map(&mut cut);
    // The piece with the tables in it first, by what the image has for that.
    if let Some(range) = mapped().find(|piece| piece.overlaps(&stage1)) {
        map_all(range);
    }
    // SAFETY: mapped just now, in whole pages, and cut out of what the frame allocator gets.
    unsafe {
        cache::zero(stage1.start as usize, stage1.size() as usize);
        stage1::feed(stage1);
    }
    for range in mapped() {
        map_all(range);
    }
    let stage1 = Range {
        start: stage1.start,
        end: stage1::leftover().start,
    };
    // SAFETY: mapped above, and cut out of what the frame allocator gets.
    unsafe { heap::init(heap) };
    // SAFETY: as for the heap; whole pages, as many as the span needs.
    unsafe { frames::init(span, table) };
    for own in [layout::image(), heap, table, stage1] {
        frames::claim(own, Owner::Hypervisor);
    }
    if let Some(bundle) = map.bundle {
        frames::claim(bundle, Owner::Bundle);
    }
    for range in map.left(|| taken().chain([heap, table, stage1])) {
        frames::add(range);
    }
}

fn map_all(range: Range) {
    stage1::map_identity(range, stage1::Access::ReadWrite)
        .unwrap_or_else(|error| panic!("memory at {range:x?}: {error:?}"));
}

/// Bytes for the tables that map so many pieces of `span`: two of pages at the most for each, and what is above
/// those once for each piece or for each stretch of memory, whichever is less.
fn tables_for(pieces: u64, span: Range) -> u64 {
    let above = (span.size() >> 30) + (span.size() >> 39) + 4;
    (2 * pieces + above.min(4 * pieces)) * PAGE as u64
}

/// Why what the boot loader says it put into memory is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReadable {
    /// The devicetree has no memory at all of this place.
    NotMemory,
    /// A reservation says that nobody may map it.
    NoMap(Range),
    /// It would overwrite, or has overwritten, the hypervisor's image.
    Image(Range),
    /// It overlaps the devicetree.
    Devicetree(Range),
}

impl fmt::Display for NotReadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMemory => f.write_str("is not all memory"),
            Self::NoMap(other) => {
                write!(f, "overlaps {other}, which is reserved with `no-map`")
            }
            Self::Image(other) => write!(f, "overlaps the hypervisor's image at {other}"),
            Self::Devicetree(other) => write!(f, "overlaps the devicetree at {other}"),
        }
    }
}

/// Whether a range can be what the boot loader put there for us.
///
/// A reservation over it is the boot loader's own, made so that we keep it (U-Boot does that to
/// every initrd), and is none against reading it.
fn check_handed_over(map: &MemoryMap, range: Range) -> Result<(), NotReadable> {
    if without(range, || map.memory()).next().is_some() {
        return Err(NotReadable::NotMemory);
    }
    if let Some(other) = map.bundle_no_map {
        return Err(NotReadable::NoMap(other));
    }
    let image = layout::image();
    if image.overlaps(&range) {
        return Err(NotReadable::Image(image));
    }
    match stage1::devicetree_range() {
        Some(tree) if tree.overlaps(&range) => Err(NotReadable::Devicetree(tree)),
        _ => Ok(()),
    }
}

/// The bundle that the boot loader put into memory, as bytes; `None` where it put none.
///
/// # Errors
///
/// Says why the place that it names cannot be read.
pub fn bundle(map: &MemoryMap) -> Result<Option<&'static [u8]>, (Range, NotReadable)> {
    let Some(range) = map.bundle else {
        return Ok(None);
    };
    check_handed_over(map, range).map_err(|why| (range, why))?;
    // SAFETY: `init` mapped it by the same check; the boot loader filled it, the frame allocator
    // never gets it, and nothing writes it.
    Ok(Some(unsafe {
        core::slice::from_raw_parts(range.start as *const u8, range.size() as usize)
    }))
}
