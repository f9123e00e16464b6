//! The two bitmaps of a slot: pages written and not yet taken, and pages the host has.
//!
//! `live` collects: write faults and every write by EL2 set bits in it at any time. `in_flight` holds
//! what the harvest of one epoch found; only that adds to it, and who takes leaves away meanwhile. It stays
//! until the epoch is committed, so a copy that failed loses nothing (invariant 19).
//!
//! Setting is `fetch_or` with release, taking is an RMW with acquire and release: a bit set while it
//! is being taken lands in this round or the next, never in neither (invariant 4). Setting never
//! looks first and skips, because the look could be older than a take.
//!
//! Bit 0 is the slot's first page, whatever its alignment: KVM's layout.
//!
//! Most of a bitmap is empty most of the time, and reading it is what is left of a harvest under write
//! protection. So one word each tells in which 64ths of the slot bits may be set. Whoever sets a bit sets
//! the word's *after* it and never looks first; a harvest exchanges the word before it reads any bit:
//! either it finds the mark, or the mark comes after and is there for the next harvest, with the bit. One
//! word rather than a level of the bitmap, because that is no memory and as good for all but the largest
//! VMs, whose harvest then reads the parts in which somebody wrote.

use crate::error::Error;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::Level;
use alloc::vec::Vec;
use core::ops::{ControlFlow, Range};

pub(crate) struct Dirty {
    pages: u64,
    /// Pages of a part, as a power of two: a level-3 table's at least.
    part: u32,
    live: Vec<AtomicU64>,
    /// Parts in which bits were set in `live` since a harvest began, which moves them to `due`.
    live_parts: AtomicU64,
    /// Parts in which the harvest under way, or one that was given up, finds the bits that it is to take.
    due: AtomicU64,
    /// Bits set in `live`, modulo 2^64: the one who takes a bit may count it before the one who set it.
    live_pages: AtomicU64,
    in_flight: Vec<AtomicU64>,
    /// Parts in which bits may be set in `in_flight`.
    in_flight_parts: AtomicU64,
    /// Bits set in `in_flight`, kept in step with it by the harvest.
    in_flight_pages: AtomicU64,
}

/// Live bits of a word that went to the epoch.
pub(crate) struct Moved {
    /// The word's first page.
    pub(crate) first: u64,
    /// Bit n is the nth from there on.
    pub(crate) pages: u64,
    /// How many they are.
    pub(crate) count: u32,
}

/// How far a look for live bits came.
pub(crate) struct Looked {
    /// Words of the bitmap that were looked at.
    pub(crate) words: u64,
    /// The page to go on at.
    pub(crate) page: u64,
}

impl Dirty {
    /// Makes empty bitmaps for `pages` pages.
    ///
    /// They live as long as the slot (64 bytes a 1 MiB) rather than as long as a log, so that
    /// starting a log cannot fail for want of memory.
    pub(crate) fn new(pages: u64) -> Result<Self, Error> {
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Error::OutOfMemory)?;
        Ok(Self {
            pages,
            part: part_of(pages),
            live: zeroed(words)?,
            live_parts: AtomicU64::new(0),
            due: AtomicU64::new(0),
            live_pages: AtomicU64::new(0),
            in_flight: zeroed(words)?,
            in_flight_parts: AtomicU64::new(0),
            in_flight_pages: AtomicU64::new(0),
        })
    }

    pub(crate) fn in_flight(&self) -> &[AtomicU64] {
        &self.in_flight
    }

    /// Returns the first run of words from `word` on in which bits may be set in `in_flight`, by parts; an
    /// empty one far behind if there is none.
    pub(crate) fn in_flight_marked(&self, word: usize) -> Range<usize> {
        let parts = self.in_flight_parts.load(Ordering::Relaxed);
        let page = self.next_in(parts, (word as u64).saturating_mul(64));
        let here = page >> self.part;
        let run = parts.checked_shr(here as u32).unwrap_or(0).trailing_ones();
        let end = (here + u64::from(run)) << self.part;
        (page / 64) as usize..(end / 64) as usize
    }

    pub(crate) fn in_flight_pages(&self) -> u64 {
        self.in_flight_pages.load(Ordering::Relaxed)
    }

    /// Returns how many words there are in which bits may be set in `in_flight`.
    pub(crate) fn in_flight_words(&self) -> usize {
        let parts = self.in_flight_parts.load(Ordering::Relaxed);
        (count(parts) as usize) << (self.part - 6)
    }

    /// Returns how many bits are live, exact when nobody marks or takes. Kept rather than counted:
    /// one load per 256 KiB of guest memory is too long for an answer to a host.
    pub(crate) fn live_pages(&self) -> u64 {
        // Below zero for a moment, or above all there are.
        let pages = self.live_pages.load(Ordering::Relaxed) as i64;
        (pages.max(0) as u64).min(self.pages)
    }

    /// Notes one written page.
    #[inline]
    pub(crate) fn mark(&self, page: u64) {
        if page < self.pages {
            self.noting(1 << (page >> self.part & 63), || {
                u64::from(self.set(page / 64, 1 << (page % 64)) != 0)
            });
        }
    }

    /// Notes `pages` written pages from `first`; what is past the end of the slot is dropped.
    pub(crate) fn mark_run(&self, first: u64, pages: u64) {
        self.noting(self.parts(first, pages), || {
            let set = |(index, bits)| u64::from(count(self.set(index as u64, bits)));
            words(first, pages, self.pages).map(set).sum()
        });
    }

    /// Notes those pages of a word that bits of `pages` say, the word's first being `first`.
    pub(crate) fn mark_word(&self, first: u64, pages: u64) {
        let word = first / 64;
        let pages = pages & self.valid(word as usize);
        if pages != 0 {
            self.noting(self.parts(first, 64), || {
                count(self.set(word, pages)).into()
            });
        }
    }

    /// Notes what `set` does to the bits of `parts`, which says how many were not set before. The parts come last: who
    /// finds one there finds its bits.
    #[inline]
    fn noting(&self, parts: u64, set: impl FnOnce() -> u64) {
        let new = set();
        self.live_parts.fetch_or(parts, Ordering::Release);
        if new != 0 {
            self.live_pages.fetch_add(new, Ordering::Relaxed);
        }
    }

    /// Sets live bits of a word, and returns those that were not set.
    #[inline]
    fn set(&self, word: u64, pages: u64) -> u64 {
        self.live
            .get(word as usize)
            .map_or(0, |word| pages & !word.fetch_or(pages, Ordering::Release))
    }

    /// Begins a harvest of all live bits. Those set from now on may be left to the next one.
    ///
    /// Under the control mutex, which whoever reads the bits has held since.
    pub(crate) fn begin_harvest(&self) {
        let parts = self.live_parts.load(Ordering::Relaxed);
        if parts != 0 {
            // At no moment is a part in neither.
            self.due.fetch_or(parts, Ordering::Relaxed);
            self.live_parts.fetch_and(!parts, Ordering::AcqRel);
        }
    }

    /// Ends it: all bits it was to take are taken, and nobody is at it any more.
    pub(crate) fn end_harvest(&self) {
        self.due.store(0, Ordering::Relaxed);
    }

    /// Returns the first page from `page` on that may have a live bit for the harvest that was begun; one
    /// behind the end if there is none.
    pub(crate) fn next_due(&self, page: u64) -> u64 {
        self.next_in(self.due.load(Ordering::Relaxed), page)
            .min(self.pages)
    }

    /// Returns the first page from `at` on in one of `parts`; far behind the slot if there is none.
    fn next_in(&self, parts: u64, at: u64) -> u64 {
        let here = at >> self.part;
        let ahead = parts.checked_shr(here as u32).unwrap_or(0).trailing_zeros();
        match ahead {
            0 => at,
            ahead => (here + u64::from(ahead)) << self.part,
        }
    }

    /// Returns the parts that the pages `first..first + count` are in, a bit for each.
    fn parts(&self, first: u64, count: u64) -> u64 {
        let Some(last) = first.saturating_add(count).min(self.pages).checked_sub(1) else {
            return 0;
        };
        let (from, to) = (first >> self.part, last >> self.part);
        low_bits(to + 1) & !low_bits(from)
    }

    /// Returns how many pages from `first` on, of `count`, have no live bit that the harvest is to take; perhaps too
    /// few, by a cache line of the bitmap, or as far as a live bit of the next harvest.
    pub(crate) fn idle(&self, first: u64, count: u64) -> u64 {
        // As `next_live`: what is in no due part is not this harvest's.
        let passed = self.next_due(first).saturating_sub(first);
        let Some(left) = count.checked_sub(passed).filter(|left| *left != 0) else {
            return count;
        };
        let first = first + passed;
        let words = part(&self.live, first, left);
        let lines = words.chunks(8).take_while(|line| is_clear(line)).count();
        match 8 * lines {
            all if all >= words.len() => count,
            some => passed + (some as u64 * 64).saturating_sub(first % 64),
        }
    }

    /// Moves the live bits of the pages `first..end` that the harvest is to take to the epoch, and calls
    /// `each` for every word of them, until that says to stop.
    pub(crate) fn take_live(
        &self,
        first: u64,
        end: u64,
        mut each: impl FnMut(Moved) -> ControlFlow<()>,
    ) -> Looked {
        let end = end.min(self.pages);
        let (mut at, mut words) = (first, 0);
        loop {
            let (next, more) = self.next_live(at, end);
            (at, words) = (next, words + more);
            if at >= end {
                break;
            }
            let moved = self.take_word(at, end);
            // Even if there was nothing: what is left of the word is not of this run.
            at = (at | 63) + 1;
            if moved.is_some_and(|moved| each(moved).is_break()) {
                break;
            }
        }
        Looked {
            words,
            page: at.min(end),
        }
    }

    /// Returns the first page from `at` on in a word with live bits that the harvest is to take, or one
    /// that is not below `end`, and how many words were looked at. A function of its own, because in its
    /// caller's midst it would find no register for its loop.
    #[inline(never)]
    fn next_live(&self, mut at: u64, end: u64) -> (u64, u64) {
        let due = self.due.load(Ordering::Relaxed);
        let mut looked = 0;
        loop {
            at = self.next_in(due, at);
            if at >= end {
                return (at, looked);
            }
            let stop = end.min(((at >> self.part) + 1) << self.part);
            let first = (at / 64) as usize;
            let words = self.live.get(first..stop.div_ceil(64) as usize);
            let words = words.unwrap_or(&[]);
            let (lines, _) = words.as_chunks::<8>();
            let clear = 8 * lines.iter().take_while(|line| is_clear(*line)).count();
            let mut rest = words.get(clear..).unwrap_or(&[]);
            while let Some((word, behind)) = rest.split_first() {
                if word.load(Ordering::Relaxed) != 0 {
                    let clear = words.len() - rest.len();
                    return (at.max((first + clear) as u64 * 64), looked + clear as u64);
                }
                rest = behind;
            }
            looked += words.len() as u64;
            at = stop;
        }
    }

    /// Moves the live bits of the word that holds `page`, from that on and below `end`, to the epoch.
    #[inline(always)]
    fn take_word(&self, page: u64, end: u64) -> Option<Moved> {
        let index = page / 64;
        // Not a swap: a word may be shared with pages of another stretch.
        let mask = mask(index, page, end);
        let live = self.live.get(index as usize)?;
        let in_flight = self.in_flight.get(index as usize)?;
        let pages = live.fetch_and(!mask, Ordering::AcqRel) & mask;
        if pages == 0 {
            return None;
        }
        let count = count(pages);
        self.live_pages.fetch_sub(count.into(), Ordering::Relaxed);
        // All are new, unless an epoch was given up.
        let new = match pages & !in_flight.fetch_or(pages, Ordering::AcqRel) {
            new if new == pages => count,
            new => self::count(new),
        };
        self.added(1 << (page >> self.part & 63), new.into());
        let first = index * 64;
        Some(Moved {
            first,
            pages,
            count,
        })
    }

    /// Adds pages `page + n` to the epoch for each bit n of `mask`. Returns how many are new, which is
    /// for [`added_run`](Self::added_run).
    #[must_use]
    pub(crate) fn add(&self, page: u64, mask: u64) -> u64 {
        let (index, shift) = ((page / 64) as usize, page % 64);
        let added = u64::from(self.add_word(index, mask << shift).count_ones());
        match shift {
            0 => added,
            shift => {
                let next = self.add_word(index + 1, mask >> (64 - shift));
                added + u64::from(next.count_ones())
            }
        }
    }

    /// Adds `count` pages from `first` to the epoch.
    pub(crate) fn add_run(&self, first: u64, count: u64) {
        // A block of 1 GiB is 4096 words, and all of them whole.
        let end = first.saturating_add(count).min(self.pages);
        let whole = first.div_ceil(64)..end / 64;
        let mut added = 0;
        if let Some(words) = self.in_flight.get(whole.start as usize..whole.end as usize) {
            added += self.add_partly(first, whole.start * 64 - first);
            added += words.iter().map(fill).sum::<u64>();
            added += self.add_partly(whole.end * 64, end - whole.end * 64);
        } else {
            added += self.add_partly(first, count);
        }
        self.added_run(first, count, added);
    }

    fn add_partly(&self, first: u64, count: u64) -> u64 {
        let add = |(index, mask)| u64::from(self.add_word(index, mask).count_ones());
        words(first, count, self.pages).map(add).sum()
    }

    /// Notes that of the pages `first..first + count` so many were added: two writes to a shared line for
    /// many words.
    pub(crate) fn added_run(&self, first: u64, count: u64, added: u64) {
        self.added(self.parts(first, count), added);
    }

    fn added(&self, parts: u64, added: u64) {
        self.in_flight_parts.fetch_or(parts, Ordering::Relaxed);
        if added != 0 {
            self.in_flight_pages.fetch_add(added, Ordering::Relaxed);
        }
    }

    /// Adds the pages of a word to the epoch and returns those that are new.
    fn add_word(&self, index: usize, mask: u64) -> u64 {
        let mask = mask & self.valid(index);
        match self.in_flight.get(index) {
            Some(word) if mask != 0 => mask & !word.fetch_or(mask, Ordering::AcqRel),
            _ => 0,
        }
    }

    /// Returns the bits of word `index` that stand for pages of the slot.
    fn valid(&self, index: usize) -> u64 {
        low_bits(self.pages.saturating_sub(index as u64 * 64))
    }

    /// Gives an aborted epoch's words `first..first + count` back to the live ones, which are set first:
    /// no page is in neither.
    pub(crate) fn give_back(&self, first: usize, count: usize) {
        let rest = self.in_flight.get(first..).unwrap_or(&[]);
        for (index, word) in (first..).zip(rest.iter().take(count)) {
            let pages = word.load(Ordering::Relaxed);
            if pages != 0 {
                self.mark_word(index as u64 * 64, pages);
                word.store(0, Ordering::Relaxed);
                self.in_flight_pages
                    .fetch_sub(u64::from(pages.count_ones()), Ordering::Relaxed);
            }
        }
    }

    /// Forgets a settled epoch from word `first` on, as far as clearing `count` words goes. Returns the word to
    /// go on at.
    pub(crate) fn clear_in_flight(&self, first: usize, count: usize) -> usize {
        let parts = self.in_flight_parts.load(Ordering::Relaxed);
        let next = self.clear(&self.in_flight, parts, first, count);
        if next >= self.in_flight.len() {
            self.in_flight_parts.store(0, Ordering::Relaxed);
            self.in_flight_pages.store(0, Ordering::Relaxed);
        }
        next
    }

    /// Forgets what was noted before a log started. Otherwise as [`clear_in_flight`](Self::clear_in_flight).
    /// Nobody marks while no log is on.
    pub(crate) fn clear_live(&self, first: usize, count: usize) -> usize {
        if first == 0 {
            self.live_pages.store(0, Ordering::Relaxed);
        }
        let parts = self.live_parts.load(Ordering::Relaxed) | self.due.load(Ordering::Relaxed);
        let next = self.clear(&self.live, parts, first, count);
        if next >= self.live.len() {
            self.live_parts.store(0, Ordering::Relaxed);
            self.due.store(0, Ordering::Relaxed);
        }
        next
    }

    /// Clears as many as `count` words of `parts` from `first` on. Returns the word to go on at, which is in
    /// one of them or behind the end.
    ///
    /// What is clear already costs no store: a bitmap of a large VM is hardly ever more than a few lines
    /// of pages.
    fn clear(&self, bitmap: &[AtomicU64], parts: u64, first: usize, count: usize) -> usize {
        let next = |word: usize| (self.next_in(parts, word as u64 * 64) / 64) as usize;
        let a_part = (1 << self.part) / 64;
        let mut at = next(first);
        let mut left = count;
        while left > 0 && at < bitmap.len() {
            let most = left.min(a_part - at % a_part);
            let rest = bitmap.get(at..).unwrap_or(&[]);
            let words = rest.get(..most).unwrap_or(rest);
            for line in words.chunks(8).filter(|line| !is_clear(line)) {
                for word in line {
                    word.store(0, Ordering::Relaxed);
                }
            }
            left -= words.len();
            at = next(at + words.len());
        }
        at
    }
}

/// Returns how many pages of a slot of `pages` are a part, as a power of two: 64 parts are enough.
const fn part_of(pages: u64) -> u32 {
    let part = pages.div_ceil(64).next_power_of_two();
    let table = Level::L2.pages();
    (if part < table { table } else { part }).trailing_zeros()
}

/// Returns how many pages the bits of a word are. Often it is one, and counting is some twenty instructions.
pub(crate) fn count(pages: u64) -> u32 {
    #[inline(never)]
    fn of_many(pages: u64) -> u32 {
        pages.count_ones()
    }
    if pages & pages.wrapping_sub(1) == 0 {
        u32::from(pages != 0)
    } else {
        of_many(pages)
    }
}

/// Sets all bits of a word and returns how many were not set.
fn fill(word: &AtomicU64) -> u64 {
    match word.fetch_or(u64::MAX, Ordering::AcqRel) {
        0 => 64,
        before => u64::from(before.count_zeros()),
    }
}

fn is_clear(words: &[AtomicU64]) -> bool {
    let any = |any, word: &AtomicU64| any | word.load(Ordering::Relaxed);
    words.iter().fold(0, any) == 0
}

/// Returns the words that hold the pages `first..first + count`.
fn part(bitmap: &[AtomicU64], first: u64, count: u64) -> &[AtomicU64] {
    let rest = bitmap.get((first / 64) as usize..).unwrap_or(&[]);
    let words = count.saturating_add(first % 64).div_ceil(64) as usize;
    rest.get(..words).unwrap_or(rest)
}

fn zeroed(words: usize) -> Result<Vec<AtomicU64>, Error> {
    let mut bitmap = Vec::new();
    bitmap
        .try_reserve_exact(words)
        .map_err(|_| Error::OutOfMemory)?;
    bitmap.resize_with(words, || AtomicU64::new(0));
    Ok(bitmap)
}

pub(crate) const fn low_bits(count: u64) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

/// Yields (word, mask) for the pages `first..first + count` below `limit`.
fn words(first: u64, count: u64, limit: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first.saturating_add(count).min(limit);
    let range = if first < end {
        first / 64..end.div_ceil(64)
    } else {
        0..0
    };
    range.map(move |index| (index as usize, mask(index, first, end)))
}

/// Returns the bits of word `index` that stand for pages from `first` to before `end`.
const fn mask(index: u64, first: u64, end: u64) -> u64 {
    let base = index * 64;
    low_bits(end - base) & !low_bits(first.saturating_sub(base))
}

/// Yields the positions of the bits set, lowest first.
pub(crate) struct Bits(pub(crate) u64);

impl Iterator for Bits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
impl Dirty {
    /// The bits noted and not yet taken.
    pub(crate) fn live(&self) -> &[AtomicU64] {
        &self.live
    }

    /// The parts in which bits were set since a harvest began, and those in which it is to look.
    pub(crate) fn marked_parts(&self) -> [&AtomicU64; 2] {
        [&self.live_parts, &self.due]
    }

    /// Is the page in either bitmap, where those look who read it?
    #[cfg(not(loom))]
    pub(crate) fn knows(&self, page: u64) -> bool {
        let has = |bitmap: &[AtomicU64], parts: u64| {
            let word = bitmap.get((page / 64) as usize);
            let set = word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % 64) & 1 == 1);
            set && parts & self.parts(page, 1) != 0
        };
        let of = |parts: &AtomicU64| parts.load(Ordering::SeqCst);
        has(&self.live, of(&self.live_parts) | of(&self.due))
            || has(&self.in_flight, of(&self.in_flight_parts))
    }
}
