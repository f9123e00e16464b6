//! Looking for dirty leaves in a stretch of guest memory.
//!
//! Under DBM every leaf is looked at: a table is 512 loads, ORed together a cache line at a time, and
//! only a line with a writable leaf in it is looked at again. What is found is added to the epoch 64
//! pages at a time; 64 clean pages cost no store. Blocks cost a load of their entry and of their live bits;
//! one found dirty is reported whole and, unless the log is to keep blocks, split for the next round.
//!
//! Under write protection the live bits alone say where to look, in tables and in blocks: a leaf that became
//! dirty has a bit, or a CPU on its way to set one. What nobody wrote costs no walk. An epoch of some pages
//! looks at every leaf of theirs all the same: a dirty block's bit may be that of another page.
//!
//! Each CPU is at stretches of its own, but tables, words of the bitmaps and blocks reach over their ends:
//! every change is one atomic operation.

use crate::control::Stretch;
use crate::dirty::{Bits, Moved, count, low_bits};
use crate::engine::Round;
use crate::hardware::{Hardware, Table};
use crate::protect::arm;
use crate::pte::{CLEAR_WRITE, Kind, Permission, Pte};
use crate::slot::{Layout, LogMode, Scope, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::tlb::Pending;
use crate::types::{Engine, Granularity, Level, PAGE_SHIFT, PAGE_SIZE};
use crate::walk::Place;
use core::ops::{ControlFlow, Range};

/// What a step may cost, in loads of entries.
pub(super) const BUDGET: u64 = 2048;
/// What a walk counts for.
const WALK: u64 = 16;
/// What a dirty page counts for that is found among others.
const DIRTY: u64 = 8;
/// What one counts for that a live bit names.
const NAMED: u64 = 3;
/// What a word of live bits counts for.
const WORD: u64 = 8;
/// What a split counts for.
const SPLIT: u64 = 1024;

/// The first word of a step costs less than what makes a large block wait for a step of its own: steps end.
const _: () = assert!(WORD + 64 * NAMED + WALK < BUDGET / 8);

/// How many pages' live bits may be looked at in one go: 2048 words.
const AT_ONCE: u64 = 2048 * 64;

/// How much of a hole a visit covers: one may be 512 GiB wide, and full of writes by EL2.
const HOLE: u64 = 16 << 20;

/// How a harvest finds dirty level-3 leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Search {
    /// Look at every leaf.
    Leaves,
    /// Look at the pages the live bitmap names.
    Live,
    /// Look at every leaf and bring it over to the engine.
    Convert,
}

/// One harvest step's view of the log.
pub(super) struct Harvest<'a> {
    pub(super) mode: LogMode,
    pub(super) search: Search,
    /// What the epoch is of.
    pub(super) within: Stretch,
    pub(super) pending: &'a mut Pending,
    pub(super) round: Round,
}

impl Moved {
    const fn cost(&self) -> u64 {
        WORD + self.count as u64 * NAMED
    }
}

/// An entry is being changed by another CPU, or wants a step of its own: come back to it.
struct Stall {
    at: u64,
}

impl<H: Hardware> Stage2<H> {
    /// Harvests a stretch as far as a step goes. Returns what is left of it.
    pub(super) fn harvest_stretch(
        &self,
        harvest: &mut Harvest<'_>,
        layout: &Layout,
        scope: Scope,
        stretch: Stretch,
        cost: &mut u64,
    ) -> Option<Stretch> {
        let end = stretch.end;
        // Slot by slot: they may have gone, or others come, since the stretch was given out.
        let slots = layout.from(scope, stretch.from);
        for slot in slots.take_while(|slot| slot.start() < end) {
            let mut from = stretch.from.max(slot.start());
            let stop = end.min(slot.end());
            while from < stop {
                if *cost >= BUDGET {
                    return Some(Stretch { from, end });
                }
                let reached = match harvest.search {
                    Search::Live => self.harvest_marked(harvest, slot, from, stop, cost),
                    Search::Leaves | Search::Convert => {
                        self.harvest_at(harvest, slot, Stretch { from, end: stop }, cost)
                    }
                };
                match reached {
                    Ok(next) => from = next,
                    // Never passed over: whoever holds the entry may be about to publish dirty leaves.
                    Err(Stall { at }) => return Some(Stretch { from: at, end }),
                }
            }
        }
        None
    }

    /// Harvests what live bits name in `slot`, as far as one step goes at most. Returns where to go on, if not
    /// behind it.
    #[inline(always)]
    pub(super) fn harvest_slot(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        cost: &mut u64,
    ) -> Option<u64> {
        match self.harvest_live(harvest, slot, 0..slot.pages.min(AT_ONCE), cost) {
            Ok(page) if page >= slot.pages && *cost < BUDGET => None,
            Ok(page) => Some(slot.address(page)),
            Err(Stall { at }) => Some(at),
        }
    }

    /// Harvests what live bits name of some pages of `slot`, as far as a step goes. Returns the page behind.
    fn harvest_live(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        pages: Range<u64>,
        cost: &mut u64,
    ) -> Result<u64, Stall> {
        let mut stalled = Ok(());
        let looked = slot.dirty.take_live(pages.start, pages.end, |moved| {
            *cost += moved.cost();
            match self.settle(harvest, slot, &moved, cost) {
                Ok(()) if *cost < BUDGET => return ControlFlow::Continue(()),
                Ok(()) => {}
                Err(stall) => stalled = Err(stall),
            }
            ControlFlow::Break(())
        });
        *cost += 1 + looked.words;
        stalled.map(|()| looked.page)
    }

    /// The same between two addresses, where a moment ago there was no level-3 table. Most are writes by EL2.
    fn harvest_marked(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        here: u64,
        end: u64,
        cost: &mut u64,
    ) -> Result<u64, Stall> {
        let pages = slot.page(here)..slot.page(end);
        let reached = self.harvest_live(harvest, slot, pages, cost);
        reached.map(|page| slot.address(page))
    }

    /// Makes clean what maps the pages of a word of live bits.
    ///
    /// Their bits are taken, so what maps them is looked for after that: a fault may have mapped a table
    /// since, or another CPU split the block, and then the page is dirty and its bit set. Who takes the bit
    /// must take the permission too, else nothing would ever note the page again; what cannot be made
    /// clean now gets its bits back.
    fn settle(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        moved: &Moved,
        cost: &mut u64,
    ) -> Result<(), Stall> {
        let ipa = slot.address(moved.first);
        let mut left = moved.pages;
        while left != 0 {
            let first = left.trailing_zeros();
            let at = ipa + (u64::from(first) << PAGE_SHIFT);
            *cost += WALK;
            let place = self.descend(at);
            // Where one walk ends, those of its neighbours in the same table or entry do.
            let reach = match place.level {
                Level::L3 => Level::L2.size(),
                above => above.size(),
            };
            let near = (reach - (at & (reach - 1))) >> PAGE_SHIFT;
            let group = left & low_bits(u64::from(first) + near);
            let settled = match (place.kind, place.level) {
                // A table that may be put back, with the pages in it.
                (Kind::Busy, _) => Err(Stall { at }),
                (_, Level::L3) => {
                    let stale = protect_pages(place.table, Level::L3.index(ipa), group);
                    harvest.round.dirty += u64::from(count(stale));
                    harvest.pending.push_pages(ipa, stale);
                    Ok(())
                }
                (Kind::Leaf, _) => self.harvest_block(harvest, slot, &place, at, cost),
                // Written by EL2 where nothing is mapped.
                _ => Ok(()),
            };
            if settled.is_err() {
                slot.dirty.mark_word(moved.first, left);
                return settled;
            }
            left &= !group;
        }
        Ok(())
    }

    /// Harvests one table, block or hole of `slot` where a stretch begins, as far as it reaches into
    /// the stretch. Returns the address behind it.
    fn harvest_at(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        Stretch { from: here, end }: Stretch,
        cost: &mut u64,
    ) -> Result<u64, Stall> {
        *cost += WALK;
        let place = self.descend(here);
        let within = |size: u64| ((here & !(size - 1)) + size).min(end);
        match (place.kind, place.level) {
            (Kind::Busy, _) => Err(Stall { at: here }),
            (_, Level::L3) => {
                let end = within(Level::L2.size());
                // While this one is looked at the next comes out of memory: at a table's end the hardware's own
                // prefetching stops, and an atomic in this one holds up every load behind it.
                let next = match place.next_above().map(|pte| pte.kind(Level::L2)) {
                    Some(Kind::Table(pa)) => Some(self.table(pa)),
                    _ => None,
                };
                let ahead = |number: usize| {
                    if let Some(group) = next.and_then(|next| next.0.as_chunks().0.get(number)) {
                        self.hw.prefetch(group);
                    }
                };
                harvest.table(slot, &place, Stretch { from: here, end }, ahead, cost);
                Ok(end)
            }
            (Kind::Leaf, level) => {
                if harvest.search != Search::Convert {
                    let clean = harvest.clean_blocks(slot, &place, here, end, cost);
                    if clean > here {
                        return Ok(clean);
                    }
                }
                let end = within(level.size().min(HOLE));
                let end = self.harvest_marked(harvest, slot, here, end, cost)?;
                // Its bits are taken, so what it is is looked at after that.
                let place = self.descend(here);
                match (place.kind, place.level) {
                    (_, Level::L3) => Ok(end),
                    (Kind::Leaf, _) => self
                        .harvest_block(harvest, slot, &place, here, cost)
                        .map(|()| end),
                    _ => Err(Stall { at: here }),
                }
            }
            _ => {
                let end = within(place.level.size().min(HOLE));
                self.harvest_marked(harvest, slot, here, end, cost)
            }
        }
    }

    fn harvest_block(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        place: &Place<'_>,
        here: u64,
        cost: &mut u64,
    ) -> Result<(), Stall> {
        let engine = harvest.mode.engine;
        let level = place.level;
        if harvest.search == Search::Convert && place.pte.is_untracked_writable() {
            return self.arm_block(harvest, place, here);
        }
        if !place.pte.is_tracked() {
            return Ok(());
        }
        if level != Level::L2 && place.pte.is_dirty() && *cost > BUDGET / 8 {
            // Its bits are a step of their own.
            return Err(Stall { at: here });
        }
        let mut old = None;
        if place.pte.is_dirty() && harvest.mode.granularity != Granularity::Block {
            *cost += SPLIT;
            // Out of memory leaves the block tracked and reported whole.
            match self.split(place.entry(), level, here, engine) {
                Ok(block) => old = Some((block, Stale::Invalidated)),
                Err(crate::split::Unsplit::NoTables) => {}
                Err(crate::split::Unsplit::Raced) => return Err(Stall { at: here }),
            }
        }
        if old.is_none() && !place.pte.is_dirty() && harvest.search != Search::Convert {
            return Ok(());
        }
        let (block, stale) = match old {
            Some(old) => old,
            None => (
                clean(place, harvest.search, engine).ok_or(Stall { at: here })?,
                Stale::Yes,
            ),
        };
        if block.is_dirty() {
            harvest.round.dirty += 1;
            // From its beginning: a block may have been mapped around the cursor, over a hole of which
            // the harvest had passed a part.
            let base = here & !(level.size() - 1);
            *cost += level.pages() / 4;
            let end = base + level.size();
            slot.note(Stretch { from: base, end }, harvest.within);
            if stale == Stale::Yes {
                harvest.pending.push(base, level);
            }
        }
        Ok(())
    }

    /// Arms a block that no harvest came to since the log started. Its pages were all noted then, and
    /// those that were not taken yet are still.
    fn arm_block(
        &self,
        harvest: &mut Harvest<'_>,
        place: &Place<'_>,
        here: u64,
    ) -> Result<(), Stall> {
        let (level, engine) = (place.level, harvest.mode.engine);
        if harvest.mode.granularity == Granularity::Page {
            match self.split(place.entry(), level, here, engine) {
                Ok(_) => return Ok(()),
                Err(crate::split::Unsplit::Raced) => return Err(Stall { at: here }),
                Err(crate::split::Unsplit::NoTables) => {}
            }
        }
        // Such a harvest ends with an invalidation of everything.
        arm(place.entry(), level, engine);
        Ok(())
    }
}

/// Is the block's old translation still in some TLB?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stale {
    Yes,
    Invalidated,
}

/// Makes one tracked leaf clean and returns what it was, or `None` if it is no leaf any more.
fn clean(place: &Place<'_>, search: Search, engine: Engine) -> Option<Pte> {
    if search == Search::Convert {
        return convert(place.entry(), place.level, engine);
    }
    let old = Pte(place.entry().fetch_and(CLEAR_WRITE, Ordering::AcqRel));
    (old.kind(place.level) == Kind::Leaf).then_some(old)
}

/// Makes one tracked leaf a clean one of `engine` and returns what it was; `None` if it is no such
/// leaf. One that nobody armed yet is such a leaf too, and counts as dirty. Never gives up, like the
/// change of a leaf when a log starts, and for the same reasons.
fn convert(entry: &AtomicU64, level: Level, engine: Engine) -> Option<Pte> {
    let old = entry.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |seen| {
        let seen = Pte(seen);
        let logged = seen.is_tracked() || seen.is_untracked_writable();
        (seen.kind(level) == Kind::Leaf && logged).then(|| seen.with(Permission::Clean(engine)).0)
    });
    old.ok().map(Pte)
}

impl Harvest<'_> {
    /// Harvests the part of a slot that the level-3 table at `place` maps. `ahead` is called with the number of each
    /// group of 64 entries before it is looked at.
    fn table(
        &mut self,
        slot: &Slot,
        place: &Place<'_>,
        Stretch { from: here, end }: Stretch,
        ahead: impl Fn(usize),
        cost: &mut u64,
    ) {
        let (first, last) = (slot.page(here), slot.page(end));
        let looked = slot.dirty.take_live(first, last, |moved| {
            *cost += moved.cost();
            ControlFlow::Continue(())
        });
        *cost += 4 + looked.words;
        match self.search {
            Search::Convert => {
                let engine = self.mode.engine;
                let found = self.scan(slot, place, here, end, |_, group, wanted| {
                    collect_converting(group, wanted, engine)
                });
                *cost += 4 * ((end - here) >> PAGE_SHIFT) + DIRTY * found;
            }
            Search::Leaves | Search::Live => {
                let found = self.scan(slot, place, here, end, |number, group, wanted| {
                    ahead(number);
                    collect(group, wanted)
                });
                *cost += ((end - here) >> PAGE_SHIFT) + DIRTY * found;
            }
        }
    }

    /// Passes the blocks from `here` on that need nothing, which is most of them: one walk for many, and
    /// for each a look at its entry and at its live bits. Returns the address reached.
    fn clean_blocks(
        &self,
        slot: &Slot,
        place: &Place<'_>,
        here: u64,
        end: u64,
        cost: &mut u64,
    ) -> u64 {
        let (size, an_entry) = (place.level.size(), 2 + place.level.pages() / 64);
        let room = (BUDGET.saturating_sub(*cost) / an_entry).max(1);
        let clean = |entry: &&AtomicU64| {
            let pte = Pte(entry.load(Ordering::Relaxed));
            pte.kind(place.level) == Kind::Leaf && !pte.is_writable()
        };
        let entries = place.table.0.iter().skip(place.index);
        let blocks = entries.take(room as usize).take_while(clean).count() as u64;
        let reach = ((here & !(size - 1)) + blocks * size).clamp(here, end);
        *cost += blocks * an_entry;
        let pages = (reach - here) >> PAGE_SHIFT;
        match slot.dirty.idle(slot.page(here), pages) {
            all if all == pages => reach,
            some => ((here + (some << PAGE_SHIFT)) & !(size - 1)).max(here),
        }
    }

    /// Folds the table's entries into words of 64 pages and adds them to the epoch. Returns how many
    /// were dirty.
    fn scan(
        &mut self,
        slot: &Slot,
        place: &Place<'_>,
        here: u64,
        end: u64,
        collect: impl Fn(usize, &[AtomicU64; 64], u64) -> u64,
    ) -> u64 {
        let (groups, _) = place.table.0.as_chunks::<64>();
        let mut base = here & !(Level::L2.size() - 1);
        let (mut dirty, mut added) = (0, 0);
        for (number, group) in groups.iter().enumerate() {
            let next = base + 64 * PAGE_SIZE;
            if base < end && next > here {
                // Entries before `here` and behind `end` belong to other slots.
                let skip = (here.max(base) - base) >> PAGE_SHIFT;
                let keep = (end.min(next) - base) >> PAGE_SHIFT;
                let wanted = (u64::MAX << skip) & (u64::MAX >> (64 - keep));
                let found = collect(number, group, wanted);
                if found != 0 {
                    let first = slot.page(base + skip * PAGE_SIZE);
                    dirty += u64::from(found.count_ones());
                    added += slot.dirty.add(first, found >> skip);
                    self.pending.push_pages(base, found);
                }
            }
            base = next;
        }
        if dirty != 0 {
            slot.dirty
                .added_run(slot.page(here), (end - here) >> PAGE_SHIFT, added);
        }
        self.round.dirty += dirty;
        self.round.read += (end - here) >> PAGE_SHIFT;
        dirty
    }
}

/// Makes the pages of live bits clean again, whose leaves begin at `base`. Which of them may some TLB still hold as
/// writable?
fn protect_pages(table: &Table, base: usize, pages: u64) -> u64 {
    if pages == u64::MAX
        && let Some(entries) = table.0.get(base..base + 64)
    {
        return gather(entries, protect_page);
    }
    let protect = |page: u32| u64::from(protect_page(table.entry(base + page as usize))) << page;
    Bits(pages).fold(0, |stale, page| stale | protect(page))
}

/// Asks of each entry, and returns the answers as bits. All in a row takes half of what one by one by their bits does.
fn gather(entries: &[AtomicU64], ask: impl Fn(&AtomicU64) -> bool) -> u64 {
    let answers = entries.iter().rev().map(ask);
    answers.fold(0, |bits, answer| bits << 1 | u64::from(answer))
}

/// Makes the page of a live bit clean again. May some TLB still hold it as writable?
fn protect_page(entry: &AtomicU64) -> bool {
    // Memory nobody tracks has live bits too, from writes by EL2; its permission is not ours to take.
    Pte(entry.load(Ordering::Relaxed)).is_tracked()
        && Pte(entry.fetch_and(CLEAR_WRITE, Ordering::AcqRel)).is_dirty()
}

/// Cleans the dirty leaves among 64 and returns which they were.
fn collect(group: &[AtomicU64; 64], wanted: u64) -> u64 {
    let mut found = 0;
    let (lines, _) = group.as_chunks::<8>();
    for (line, entries) in lines.iter().enumerate() {
        // Under a log hardly a leaf is writable, so a cache line is looked at as one.
        let any = entries
            .iter()
            .fold(0, |any, entry| any | entry.load(Ordering::Relaxed));
        if Pte(any).is_writable() {
            found |= collect_line(entries, wanted >> (8 * line)) << (8 * line);
        }
    }
    found
}

/// As [`collect`], of eight. The mask is made without a branch, because nothing foretells which of
/// them are dirty.
fn collect_line(line: &[AtomicU64; 8], wanted: u64) -> u64 {
    let mut dirty = 0;
    for (bit, entry) in line.iter().enumerate() {
        dirty |= Pte(entry.load(Ordering::Relaxed)).dirty_bit() << bit;
    }
    // The load above only said where to look. This value decides.
    let clean = |entry: &AtomicU64| Pte(entry.fetch_and(CLEAR_WRITE, Ordering::AcqRel)).is_dirty();
    let wanted = dirty & wanted;
    if wanted == 0xff {
        return gather(line, clean);
    }
    let mut found = 0;
    for bit in Bits(wanted) {
        if let Some(entry) = line.get(bit as usize) {
            found |= u64::from(clean(entry)) << bit;
        }
    }
    found
}

/// As [`collect`], and brings every leaf over to `engine`.
fn collect_converting(group: &[AtomicU64; 64], wanted: u64, engine: Engine) -> u64 {
    let mut found = 0;
    for bit in Bits(wanted) {
        if let Some(entry) = group.get(bit as usize)
            && let Some(old) = convert(entry, Level::L3, engine)
        {
            found |= u64::from(old.is_writable()) << bit;
        }
    }
    found
}
