//! EL2's own memory: its stage 1 (W^X, guard pages), the heap for its small objects,
//! and the frames that guests and tables are made of.

use crate::board::map::{MemoryMap, Ranges};
use core::fmt;
use tidemark_ownership::Owner;

pub mod frames;
pub mod heap;
pub mod layout;
pub mod stage1;

/// A frame, and a page of any table: 4 KiB.
pub const PAGE: usize = 4096;

/// A half-open range of physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address past it.
    pub end: u64,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl Range {
    /// A range by address and size; `None` where it wraps.
    pub fn new(start: u64, size: u64) -> Option<Self> {
        Some(Self {
            start,
            end: start.checked_add(size)?,
        })
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// The range widened to whole pages.
    pub fn whole_pages(&self) -> Self {
        let mask = PAGE as u64 - 1;
        Self {
            start: self.start & !mask,
            end: self.end.saturating_add(mask) & !mask,
        }
    }

    /// Whether the two have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// What is left of it without `hole`: nothing, one range or two.
    pub fn without(&self, hole: &Self) -> [Option<Self>; 2] {
        let part = |start: u64, end: u64| (start < end).then_some(Self { start, end });
        if !self.overlaps(hole) {
            return [part(self.start, self.end), None];
        }
        [
            part(self.start, hole.start.min(self.end)),
            part(hole.end.max(self.start), self.end),
        ]
    }
}

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
    for range in map.memory.iter() {
        // Memory that firmware keeps is not even mapped. The image is mapped already, part
        // by part, and the hole in it is the guard page.
        let mut usable = Ranges::new();
        usable.push(range);
        usable = usable.without(layout::image().whole_pages());
        for reserved in map.reserved.iter() {
            usable = usable.without(reserved);
        }
        for range in usable.iter() {
            stage1::map_identity(range, stage1::Access::ReadWrite)
                .unwrap_or_else(|error| panic!("memory at {range:x?}: {error:?}"));
        }
    }
    let mut free = map.memory;
    for taken in map
        .reserved
        .iter()
        .chain([layout::image()])
        .chain(stage1::devicetree_range())
        .chain(map.bundle)
    {
        free = free.without(taken.whole_pages());
    }
    let span = Range {
        start: map
            .memory
            .iter()
            .map(|range| range.start)
            .min()
            .unwrap_or(0),
        end: map.memory.iter().map(|range| range.end).max().unwrap_or(0),
    };
    let largest = free
        .iter()
        .max_by_key(Range::size)
        .expect("the devicetree describes no free memory");
    let heap_size = (largest.size() / 32)
        .next_power_of_two()
        .clamp(SMALLEST_HEAP, LARGEST_HEAP);
    let table_size = frames::table_size(span);
    assert!(
        largest.size() > heap_size + table_size + SMALLEST_HEAP,
        "not enough free memory: {} KiB in one piece",
        largest.size() >> 10
    );
    // From the end: what guests get is then aligned to large blocks from the start.
    let end = largest.end & !(PAGE as u64 - 1);
    let heap = Range {
        start: end - heap_size,
        end,
    };
    let table = Range {
        start: heap.start - table_size,
        end: heap.start,
    };
    // SAFETY: mapped above, and cut out of what the frame allocator gets.
    unsafe { heap::init(heap) };
    // SAFETY: as for the heap; whole pages, as many as the span needs.
    unsafe { frames::init(span, table) };
    for own in [layout::image(), heap, table] {
        frames::claim(own, Owner::Hypervisor);
    }
    if let Some(bundle) = map.bundle {
        frames::claim(bundle, Owner::Bundle);
    }
    for range in free.without(heap).without(table).iter() {
        frames::add(range);
    }
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
    let mut outside = Ranges::new();
    outside.push(range);
    for memory in map.memory.iter() {
        outside = outside.without(memory);
    }
    if outside.iter().next().is_some() {
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
