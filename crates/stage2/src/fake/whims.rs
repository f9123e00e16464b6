//! What the architecture leaves open, decided by a seed.
//!
//! Without whims the simulated CPUs do the same thing each time, the worst one that has a name: TLBs
//! keep everything, invalidations happen at their barrier and not before, updates of descriptors are
//! visible at once. That makes plain tests exact. With whims, any of the following happens now and
//! then, which is what finds the errors that nobody thought of.

use super::rng::Rng;

/// The dice, and which of the rarer liberties are taken.
#[derive(Debug)]
pub struct Whims {
    rng: Rng,
    speculation: Speculation,
}

/// Does a CPU write to descriptors for accesses that never happen (R_DYCFD, R_QDRWL)? Then more is
/// reported than was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Speculation {
    /// Now and then.
    Sometimes,
    /// Never.
    Never,
}

impl Whims {
    /// Makes the whims of a seed.
    pub const fn new(seed: u64, speculation: Speculation) -> Self {
        Self {
            rng: Rng::new(seed),
            speculation,
        }
    }

    /// An update of a descriptor becomes visible later than the store that caused it (R_RZYCN).
    pub(super) fn updates_late(&mut self) -> bool {
        self.rng.one_in(2)
    }

    /// One that is late becomes visible now.
    pub(super) fn update_arrives(&mut self) -> bool {
        self.rng.one_in(4)
    }

    /// A CPU acts on an invalidation before the barrier that completes it.
    pub(super) fn invalidates_early(&mut self) -> bool {
        self.rng.one_in(2)
    }

    /// A combined entry is made anew between two invalidations that one barrier completes.
    pub(super) fn recombines(&mut self) -> bool {
        self.rng.one_in(2)
    }

    /// An entry leaves the TLB by itself.
    pub(super) fn evicts(&mut self) -> bool {
        self.rng.one_in(8)
    }

    /// A CPU looks ahead, at another page than the program asks for.
    pub(super) fn prefetches(&mut self) -> bool {
        self.rng.one_in(8)
    }

    /// A CPU makes a page dirty that the program does not write.
    pub(super) fn speculates(&mut self) -> bool {
        self.speculation == Speculation::Sometimes && self.rng.one_in(16)
    }

    /// A walker sees a descriptor as it was, because the change has no barrier behind it yet.
    pub(super) fn looks_back(&mut self) -> bool {
        self.rng.one_in(2)
    }

    /// AF and the dirty state are set by two updates, not by one (R_PRHKD).
    pub(super) fn updates_twice(&mut self) -> bool {
        self.rng.one_in(2)
    }

    /// Chooses one of `count`.
    pub(super) fn choose(&mut self, count: usize) -> usize {
        self.rng.below(count as u64) as usize
    }
}
