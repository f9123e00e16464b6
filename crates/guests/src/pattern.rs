//! Which pages the oracle writes: a pure function of the seed, the vCPU and the iteration.
//!
//! The guest runs it to write, runs it again to say what it wrote, and the host runs it to check both. So the
//! generator has no state of its own, allocates nothing, and every loop in it is bounded by [`Config::pages`].
//!
//! What it mixes, and why: lone pages (the common case), a small hot set that both vCPUs return to (a page that is
//! cleaned and written again, by two at once), runs, pages on both sides of a 2 MiB edge and whole 2 MiB blocks
//! (splits), the first and last page of RAM (the ends of a slot), and single stores that cross from one page into
//! the next (two faults for one instruction).
//!
//! All numbers of pages are 4 KiB pages, whatever the guest maps them with.

use core::fmt;

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;
/// Pages in a 2 MiB block.
pub const BLOCK_PAGES: u64 = 512;
/// Pages in the hot set.
pub const HOT_PAGES: u64 = 32;
/// Where in a page vCPU 0 stamps the iteration number; vCPU `n` stamps `8 * n` bytes further on.
pub const STAMP_OFFSET: u64 = 64;

/// A guest frame number: a guest physical address divided by 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The frame `pages` further on, at most the last there is.
    #[must_use]
    pub const fn plus(self, pages: u64) -> Self {
        Self(self.0.saturating_add(pages))
    }

    /// The guest physical address of the frame's first byte.
    #[must_use]
    pub const fn ipa(self) -> u64 {
        self.0.saturating_mul(PAGE_BYTES)
    }
}

/// A run of adjacent pages, possibly none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// The first page.
    pub first: Gfn,
    /// How many.
    pub count: u64,
}

impl PageRun {
    /// No pages.
    pub const EMPTY: Self = Self {
        first: Gfn(0),
        count: 0,
    };

    /// `count` pages from `first` on.
    #[must_use]
    pub const fn new(first: Gfn, count: u64) -> Self {
        Self { first, count }
    }

    /// The pages that `bytes` bytes at address `start` touch.
    #[must_use]
    pub const fn covering(start: u64, bytes: u64) -> Self {
        if bytes == 0 {
            return Self::EMPTY;
        }
        let first = start / PAGE_BYTES;
        let last = start.saturating_add(bytes - 1) / PAGE_BYTES;
        Self::new(Gfn(first), last - first + 1)
    }

    /// The first page after the run.
    #[must_use]
    pub const fn end(self) -> Gfn {
        self.first.plus(self.count)
    }

    /// Whether `page` is in the run.
    #[must_use]
    pub fn contains(self, page: Gfn) -> bool {
        self.first <= page && page < self.end()
    }

    /// The part of the run that is in `other` too.
    #[must_use]
    pub fn within(self, other: Self) -> Self {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        Self::new(first, end.0.saturating_sub(first.0))
    }

    /// Every page of the run.
    pub fn pages(self) -> impl Iterator<Item = Gfn> {
        (self.first.0..self.end().0).map(Gfn)
    }
}

/// As the oracle prints it: first page and number of pages, hexadecimal, no prefix.
impl fmt::Display for PageRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}+{:x}", self.first.0, self.count)
    }
}

/// The number of a round of writes; the value written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iteration(pub u64);

impl fmt::Display for Iteration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A vCPU's number, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vcpu(pub u8);

impl Vcpu {
    /// The most vCPUs a guest has.
    pub const MAX: usize = 16;
}

impl fmt::Display for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where all choices come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seed(pub u64);

/// What the host can set (`cfg`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where all choices come from.
    pub seed: Seed,
    /// How many vCPUs write at once.
    pub vcpus: u8,
    /// The most pages a vCPU writes in one iteration, whole blocks not counted.
    pub pages: u32,
    /// A vCPU writes a whole 2 MiB block in one of so many iterations; 0 for never.
    pub blocks: u32,
    /// Pages behind the RAM that are memory as well: a host has added them.
    pub more: u32,
}

impl Config {
    /// The largest [`Config::pages`], so that no iteration is unbounded.
    pub const MAX_PAGES: u32 = 65_536;

    /// The memory there is where the machine was started with `ram`.
    #[must_use]
    pub fn memory(&self, ram: PageRun) -> PageRun {
        PageRun::new(ram.first, ram.count + u64::from(self.more))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: Seed(1),
            vcpus: 1,
            pages: 200,
            blocks: 8,
            more: 0,
        }
    }
}

/// Which pages may be written: RAM less what the guest or its loader needs.
#[derive(Clone, Copy, Debug)]
pub struct Layout<'a> {
    ram: PageRun,
    holes: &'a [PageRun],
}

impl<'a> Layout<'a> {
    /// RAM with holes in it. The holes may be in any order, overlap, be empty, or lie outside.
    #[must_use]
    pub const fn new(ram: PageRun, holes: &'a [PageRun]) -> Self {
        Self { ram, holes }
    }

    /// All of RAM.
    #[must_use]
    pub const fn ram(&self) -> PageRun {
        self.ram
    }

    /// What must not be written.
    #[must_use]
    pub const fn holes(&self) -> &'a [PageRun] {
        self.holes
    }

    /// Whether `page` may be written.
    #[must_use]
    pub fn is_free(&self, page: Gfn) -> bool {
        self.ram.contains(page) && !self.holes.iter().any(|hole| hole.contains(page))
    }

    /// The free runs in `range`, in ascending order.
    #[must_use]
    pub fn free(&self, range: PageRun) -> FreeRuns<'a> {
        FreeRuns {
            holes: self.holes,
            left: range.within(self.ram),
        }
    }
}

/// See [`Layout::free`].
#[derive(Clone, Debug)]
pub struct FreeRuns<'a> {
    holes: &'a [PageRun],
    left: PageRun,
}

impl Iterator for FreeRuns<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let end = self.left.end();
        let mut first = self.left.first;
        // Each turn leaves at least one hole behind for good, so this ends after as many turns as there are holes.
        while let Some(hole) = self
            .holes
            .iter()
            .find(|hole| first < end && hole.contains(first))
        {
            first = hole.end();
        }
        if first >= end {
            self.left = PageRun::EMPTY;
            return None;
        }
        let stop = self
            .holes
            .iter()
            .filter(|hole| hole.count > 0 && hole.first > first)
            .fold(end, |stop, hole| stop.min(hole.first));
        self.left = PageRun::new(stop, end.0 - stop.0);
        Some(PageRun::new(first, stop.0 - first.0))
    }
}

/// How the pages of a [`Write`] are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// One aligned store into each page, at [`STAMP_OFFSET`] and the vCPU's word.
    Stamp,
    /// Two pages written by a single store: its first half ends the first page, its second half begins the second.
    Straddle,
}

/// Some adjacent pages to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// The pages.
    pub run: PageRun,
    /// How.
    pub shape: Shape,
}

impl Write {
    /// The stores that `vcpu` makes, in order.
    pub fn stores(self, vcpu: Vcpu, iteration: Iteration) -> impl Iterator<Item = Store> {
        let (count, offset, value) = match self.shape {
            Shape::Stamp => (
                self.run.count,
                STAMP_OFFSET + 8 * u64::from(vcpu.0),
                iteration.0,
            ),
            // Both halves change from one iteration to the next, so that losing either shows.
            Shape::Straddle => {
                let half = iteration.0 & 0xffff_ffff;
                (1, PAGE_BYTES - 4, half | (half << 32))
            }
        };
        (0..count).map(move |n| Store {
            ipa: self.run.first.plus(n).ipa().saturating_add(offset),
            value,
        })
    }
}

/// One 8-byte little-endian store. In a [`Shape::Straddle`] the address is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Guest physical address.
    pub ipa: u64,
    /// What is stored.
    pub value: u64,
}

/// What `vcpu` writes in `iteration`. Runs may overlap; none touches a hole.
#[must_use]
pub fn writes<'a>(
    layout: &Layout<'a>,
    config: &Config,
    vcpu: Vcpu,
    iteration: Iteration,
) -> Writes<'a> {
    let mut random = Random(config.seed.0);
    let mut random =
        Random(random.next() ^ iteration.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(vcpu.0));
    let block = match config.blocks {
        0 => false,
        n => random.below(u64::from(n)) == 0,
    };
    Writes {
        layout: *layout,
        seed: config.seed,
        random,
        budget: u64::from(config.pages),
        // A pick that falls into a hole writes nothing; this bounds how often that may happen.
        picks: u64::from(config.pages).saturating_mul(4),
        block: if block { Block::Due } else { Block::None },
        clip: Clip::none(layout),
    }
}

#[derive(Clone, Copy, Debug)]
enum Block {
    Due,
    None,
}

#[derive(Clone, Debug)]
struct Clip<'a> {
    runs: FreeRuns<'a>,
    cost: Cost,
}

impl<'a> Clip<'a> {
    fn none(layout: &Layout<'a>) -> Self {
        Self {
            runs: layout.free(PageRun::EMPTY),
            cost: Cost::Free,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Cost {
    Budget,
    Free,
}

/// See [`writes`].
#[derive(Clone, Debug)]
pub struct Writes<'a> {
    layout: Layout<'a>,
    seed: Seed,
    random: Random,
    budget: u64,
    picks: u64,
    block: Block,
    clip: Clip<'a>,
}

impl Writes<'_> {
    /// A random page of RAM, hole or not.
    fn any_page(&mut self) -> Gfn {
        let ram = self.layout.ram;
        ram.first.plus(self.random.below(ram.count))
    }

    /// The first page of a random 2 MiB block that begins after RAM does, if there is one.
    fn any_edge(&mut self) -> Option<Gfn> {
        let ram = self.layout.ram;
        let first = ram.first.0 / BLOCK_PAGES + 1;
        let end = ram.end().0.div_ceil(BLOCK_PAGES);
        let edges = end.checked_sub(first).filter(|edges| *edges > 0)?;
        Some(Gfn((first + self.random.below(edges)) * BLOCK_PAGES))
    }

    /// A block all of whose pages may be written, if a few tries find one.
    fn whole_block(&mut self) -> Option<PageRun> {
        let ram = self.layout.ram;
        let first = ram.first.0.div_ceil(BLOCK_PAGES);
        let blocks = (ram.end().0 / BLOCK_PAGES)
            .checked_sub(first)
            .filter(|blocks| *blocks > 0)?;
        (0..8).find_map(|_| {
            let block = PageRun::new(
                Gfn((first + self.random.below(blocks)) * BLOCK_PAGES),
                BLOCK_PAGES,
            );
            (self.layout.free(block).next() == Some(block)).then_some(block)
        })
    }

    /// What to write next, holes not yet cut out.
    fn pick(&mut self) -> (PageRun, Shape) {
        let one = |page| PageRun::new(page, 1);
        match self.random.below(16) {
            0..=4 => (one(self.any_page()), Shape::Stamp),
            5..=7 => {
                let index = self.random.below(HOT_PAGES);
                let ram = self.layout.ram;
                let mut chosen =
                    Random(self.seed.0 ^ (index + 1).wrapping_mul(0xd6e8_feb8_6659_fd93));
                (one(ram.first.plus(chosen.below(ram.count))), Shape::Stamp)
            }
            8..=10 => {
                let page = self.any_page();
                (PageRun::new(page, 2 + self.random.below(63)), Shape::Stamp)
            }
            11..=12 => match self.any_edge() {
                Some(edge) => {
                    let before = 1 + self.random.below(3);
                    let after = 1 + self.random.below(3);
                    (
                        PageRun::new(Gfn(edge.0 - before), before + after),
                        Shape::Stamp,
                    )
                }
                None => (one(self.any_page()), Shape::Stamp),
            },
            13 => match self.any_edge() {
                Some(edge) => (PageRun::new(Gfn(edge.0 - 1), 2), Shape::Straddle),
                None => (one(self.any_page()), Shape::Stamp),
            },
            14 => {
                let page = self.any_page();
                (PageRun::new(page, 2), Shape::Straddle)
            }
            _ => {
                let ram = self.layout.ram;
                let last = ram.end().0.saturating_sub(1);
                (
                    one(if self.random.below(2) == 0 {
                        ram.first
                    } else {
                        Gfn(last)
                    }),
                    Shape::Stamp,
                )
            }
        }
    }
}

impl Iterator for Writes<'_> {
    type Item = Write;

    fn next(&mut self) -> Option<Write> {
        loop {
            if let Some(mut run) = self.clip.runs.next() {
                if let Cost::Budget = self.clip.cost {
                    run.count = run.count.min(self.budget);
                    self.budget -= run.count;
                    if self.budget == 0 {
                        self.clip = Clip::none(&self.layout);
                    }
                }
                if run.count == 0 {
                    return None;
                }
                return Some(Write {
                    run,
                    shape: Shape::Stamp,
                });
            }
            if let Block::Due = self.block {
                self.block = Block::None;
                if let Some(block) = self.whole_block() {
                    self.clip = Clip {
                        runs: self.layout.free(block),
                        cost: Cost::Free,
                    };
                    continue;
                }
            }
            if self.budget == 0 || self.picks == 0 || self.layout.ram.count == 0 {
                return None;
            }
            self.picks -= 1;
            let (run, shape) = self.pick();
            let whole = self.layout.free(run).next() == Some(run);
            if shape == Shape::Straddle && whole && self.budget >= run.count {
                self.budget -= run.count;
                return Some(Write { run, shape });
            }
            self.clip = Clip {
                runs: self.layout.free(run),
                cost: Cost::Budget,
            };
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seedable at any point, good enough to scatter pages.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    #[expect(
        clippy::should_implement_trait,
        reason = "it never ends, so an Option would only be noise"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`; 0 if `limit` is 0. Biased by less than `limit / 2^64`.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

/// FNV-1a over 64-bit words: what `sum` prints, and what the writer and the reporter compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum(pub u64);

impl Sum {
    /// The sum of nothing.
    pub const NEW: Self = Self(0xcbf2_9ce4_8422_2325);

    /// Adds a word.
    pub fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }
}

#[cfg(test)]
mod tests;
