//! The machine's memory, known before there is a heap.

use super::Range;
use tidemark_ownership::without;

/// What memory there is, and what of it is spoken for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryMap {
    /// All memory, as firmware has it. What is there twice counts once.
    pub memory: &'static [Range],
    /// Reserved by firmware, in whole pages; not to be touched.
    pub reserved: &'static [Range],
    /// The bundle of guests, handed over as the initrd.
    pub bundle: Option<Range>,
    /// A reservation with `no-map` that the bundle overlaps.
    pub bundle_no_map: Option<Range>,
}

impl MemoryMap {
    /// All memory.
    pub fn memory(&self) -> impl Iterator<Item = Range> {
        self.memory.iter().copied()
    }

    /// What is reserved.
    pub fn reserved(&self) -> impl Iterator<Item = Range> {
        self.reserved.iter().copied()
    }

    /// What is left of memory without what `taken` goes through.
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
