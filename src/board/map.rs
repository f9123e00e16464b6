//! The machine's memory, read before there is a heap.

use super::BoardError;
use crate::memory::Range;
use dtoolkit::Node;
use dtoolkit::fdt::{Fdt, FdtNode};
use spin::{Mutex, MutexGuard};
use tidemark_ownership::without;

/// What memory there is, and what of it is spoken for.
#[derive(Debug)]
pub struct MemoryMap {
    fdt: Fdt<'static>,
    reserved: &'static [Range],
    /// The bundle of guests, handed over as the initrd.
    pub bundle: Option<Range>,
    /// A reservation with `no-map` that the bundle overlaps.
    pub bundle_no_map: Option<Range>,
}

/// The most reservations that there is room for before there is a heap.
pub const MOST_RESERVATIONS: usize = 1024;

/// Where they are kept.
static RESERVED: Mutex<[Range; MOST_RESERVATIONS]> =
    Mutex::new([Range { start: 0, end: 0 }; MOST_RESERVATIONS]);

impl MemoryMap {
    /// Reads memory, reservations and the initrd's place. Once: the list of reservations is lent for good.
    ///
    /// # Errors
    ///
    /// A reservation that cannot be read, or too many of them: without them memory that firmware keeps would be
    /// given to guests.
    pub fn read(fdt: Fdt<'static>) -> Result<Self, BoardError> {
        let mut map = Self {
            fdt,
            reserved: &[],
            bundle: None,
            bundle_no_map: None,
        };
        if let Some(chosen) = fdt.find_node("/chosen") {
            let address = |name| super::integer(chosen, name);
            if let (Some(start), Some(end)) =
                (address("linux,initrd-start"), address("linux,initrd-end"))
                && start < end
            {
                map.bundle = Some(Range { start, end });
            }
        }
        let places = MutexGuard::leak(RESERVED.lock());
        let mut count = 0;
        let mut reserve = |range: Range| {
            if let Some(place) = places.get_mut(count) {
                *place = range.whole_pages();
            }
            count += 1;
        };
        for entry in fdt.memory_reservations() {
            reserve(Range::up_to(entry.address(), entry.size()));
        }
        let reserved = fdt.find_node("/reserved-memory");
        for node in reserved.into_iter().flat_map(|node| node.children()) {
            let unreadable = BoardError::Reservation(node.name());
            for reg in node.reg().map_err(|_| unreadable)?.into_iter().flatten() {
                let start = reg.address().map_err(|_| unreadable)?;
                let range = Range::up_to(start, reg.size().map_err(|_| unreadable)?);
                reserve(range);
                let overlaps = map.bundle.is_some_and(|bundle| range.overlaps(&bundle));
                if overlaps && node.property("no-map").is_some() {
                    map.bundle_no_map = Some(range);
                }
            }
        }
        map.reserved = places.get(..count).ok_or(BoardError::Reservations(count))?;
        Ok(map)
    }

    /// All memory, as the devicetree has it.
    pub fn memory(&self) -> impl Iterator<Item = Range> {
        let is_memory = |&node: &FdtNode<'_>| {
            super::string(node, "device_type") == Some("memory") && super::enabled(node)
        };
        let nodes = self.fdt.root().children().filter(is_memory);
        nodes.flat_map(super::registers)
    }

    /// Reserved by firmware or the devicetree, in whole pages; not to be touched.
    pub fn reserved(&self) -> impl Iterator<Item = Range> {
        self.reserved.iter().copied()
    }

    /// What is left of memory without what `taken` goes through. Memory that is there twice counts once.
    pub fn left<I: Iterator<Item = Range>>(
        &self,
        taken: impl Fn() -> I + Copy,
    ) -> impl Iterator<Item = Range> {
        let memory = self.memory().enumerate();
        memory.flat_map(move |(n, range)| {
            without(range, move || taken().chain(self.memory().take(n)))
        })
    }
}
