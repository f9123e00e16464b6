//! The machine's memory, read from the devicetree before there is a heap.

use super::{BoardError, enabled, integer, registers, string};
use crate::mm::Range;
use crate::mm::map::MemoryMap;
use dtoolkit::Node;
use dtoolkit::fdt::{Fdt, FdtNode};
use spin::{Mutex, MutexGuard};

/// The most reservations that there is room for before there is a heap.
pub const MOST_RESERVATIONS: usize = 1024;
/// The most ranges of memory.
pub const MOST_MEMORY: usize = 256;

/// Where they are kept.
static RESERVED: Ranges<MOST_RESERVATIONS> = Ranges::new();
static MEMORY: Ranges<MOST_MEMORY> = Ranges::new();

/// Room for ranges, lent once.
struct Ranges<const MOST: usize>(Mutex<[Range; MOST]>);

impl<const MOST: usize> Ranges<MOST> {
    const fn new() -> Self {
        Self(Mutex::new([Range { start: 0, end: 0 }; MOST]))
    }

    fn lend(&'static self) -> Found {
        Found {
            places: &mut MutexGuard::leak(self.0.lock())[..],
            count: 0,
        }
    }
}

/// Ranges as they are found. Those past the end are only counted.
struct Found {
    places: &'static mut [Range],
    count: usize,
}

impl Found {
    /// All of them.
    ///
    /// # Errors
    ///
    /// How many there are, if that is too many.
    fn all(self) -> Result<&'static [Range], usize> {
        let places: &'static [Range] = self.places;
        places.get(..self.count).ok_or(self.count)
    }

    fn add(&mut self, range: Range) {
        if let Some(place) = self.places.get_mut(self.count) {
            *place = range;
        }
        self.count += 1;
    }
}

/// Reads memory, reservations and the initrd's place. Once: the list of ranges is lent for good.
///
/// # Errors
///
/// A reservation that cannot be read, or too many of them: without them memory that firmware keeps would be
/// given to guests.
pub fn memory_map(fdt: Fdt<'static>) -> Result<MemoryMap, BoardError> {
    let bundle = initrd(fdt);
    let mut bundle_no_map = None;
    let mut memory = MEMORY.lend();
    let mut reserved = RESERVED.lend();
    let is_memory =
        |&node: &FdtNode<'_>| string(node, "device_type") == Some("memory") && enabled(node);
    let nodes = fdt.root().children().filter(is_memory);
    nodes
        .flat_map(registers)
        .for_each(|range| memory.add(range));
    for entry in fdt.memory_reservations() {
        reserved.add(Range::up_to(entry.address(), entry.size()).whole_pages());
    }
    let nodes = fdt.find_node("/reserved-memory");
    for node in nodes.into_iter().flat_map(|node| node.children()) {
        let unreadable = BoardError::Reservation(node.name());
        for reg in node.reg().map_err(|_| unreadable)?.into_iter().flatten() {
            let start = reg.address().map_err(|_| unreadable)?;
            let range = Range::up_to(start, reg.size().map_err(|_| unreadable)?);
            reserved.add(range.whole_pages());
            let overlaps = bundle.is_some_and(|bundle| range.overlaps(&bundle));
            if overlaps && node.property("no-map").is_some() {
                bundle_no_map = Some(range);
            }
        }
    }
    Ok(MemoryMap {
        memory: memory.all().map_err(BoardError::Memory)?,
        reserved: reserved.all().map_err(BoardError::Reservations)?,
        bundle,
        bundle_no_map,
    })
}

/// Where the boot loader says that it put the initrd.
fn initrd(fdt: Fdt<'static>) -> Option<Range> {
    let chosen = fdt.find_node("/chosen")?;
    let start = integer(chosen, "linux,initrd-start")?;
    let end = integer(chosen, "linux,initrd-end")?;
    (start < end).then_some(Range { start, end })
}
