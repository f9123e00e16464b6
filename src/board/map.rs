//! The machine's memory, read before there is a heap.

use crate::memory::Range;
use dtoolkit::Node;
use dtoolkit::fdt::Fdt;

/// A short list without a heap. What does not fit is counted, not kept.
#[derive(Debug, Clone, Copy)]
pub struct Ranges {
    ranges: [Range; Self::CAPACITY],
    len: usize,
    /// Ranges that did not fit.
    pub dropped: usize,
}

impl Ranges {
    const CAPACITY: usize = 64;

    /// An empty list.
    pub const fn new() -> Self {
        Self {
            ranges: [Range { start: 0, end: 0 }; Self::CAPACITY],
            len: 0,
            dropped: 0,
        }
    }

    /// Adds a range; empty ones are left out.
    pub fn push(&mut self, range: Range) {
        if range.size() == 0 {
            return;
        }
        match self.ranges.get_mut(self.len) {
            Some(place) => {
                *place = range;
                self.len += 1;
            }
            None => self.dropped += 1,
        }
    }

    /// The ranges.
    pub fn iter(&self) -> impl Iterator<Item = Range> {
        self.ranges.iter().copied().take(self.len)
    }

    /// What is left of the list without `hole`.
    pub fn without(&self, hole: Range) -> Self {
        let mut left = Self::new();
        left.dropped = self.dropped;
        for range in self.iter() {
            for part in range.without(&hole).into_iter().flatten() {
                left.push(part);
            }
        }
        left
    }
}

/// What memory there is, and what of it is spoken for.
#[derive(Debug)]
pub struct MemoryMap {
    /// All memory.
    pub memory: Ranges,
    /// Reserved by firmware or the devicetree; not to be touched.
    pub reserved: Ranges,
    /// The bundle of guests, handed over as the initrd.
    pub bundle: Option<Range>,
    /// A reservation with `no-map` that the bundle overlaps.
    pub bundle_no_map: Option<Range>,
}

impl MemoryMap {
    /// Reads memory, reservations and the initrd's place.
    pub fn read(fdt: Fdt<'static>) -> Self {
        let mut map = Self {
            memory: Ranges::new(),
            reserved: Ranges::new(),
            bundle: None,
            bundle_no_map: None,
        };
        for node in fdt.root().children() {
            if super::string(node, "device_type") == Some("memory") && super::enabled(node) {
                for range in super::registers(node) {
                    map.memory.push(range);
                }
            }
        }
        for entry in fdt.memory_reservations() {
            if let Some(range) = Range::new(entry.address(), entry.size()) {
                map.reserved.push(range.whole_pages());
            }
        }
        if let Some(chosen) = fdt.find_node("/chosen") {
            let address = |name| super::integer(chosen, name);
            if let (Some(start), Some(end)) =
                (address("linux,initrd-start"), address("linux,initrd-end"))
                && start < end
            {
                map.bundle = Some(Range { start, end });
            }
        }
        let reserved = fdt.find_node("/reserved-memory");
        for node in reserved.into_iter().flat_map(|node| node.children()) {
            for range in super::registers(node) {
                map.reserved.push(range.whole_pages());
                let overlaps = map.bundle.is_some_and(|bundle| range.overlaps(&bundle));
                if overlaps && node.property("no-map").is_some() {
                    map.bundle_no_map = Some(range);
                }
            }
        }
        map
    }
}
