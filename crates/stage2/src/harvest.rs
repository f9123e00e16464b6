//! Taking the dirty pages, in two phases.
//!
//! [`take`](Stage2::take) collects one epoch in bounded steps: for each leaf that is dirty one
//! `fetch_and` clears the write permission, and its returned value decides (invariant 2); the page
//! goes into the epoch; when all are done, one invalidation; and only then the epoch is `Done` and
//! may be read (invariant 3). [`commit`](Stage2::commit) forgets it, [`abort`](Stage2::abort) gives it
//! back, whenever the host fails.
//!
//! Under DBM every leaf is looked at: a table is 512 loads, ORed together a cache line at a time, and
//! only a line with a writable leaf in it is looked at again. What is found is added to the epoch 64
//! pages at a time; 64 clean pages cost no store. Under write protection the live bitmap says which
//! pages to look at, 64 at a load. Blocks cost a load of their entry and of their live bits under both;
//! one found dirty is reported whole and, unless the log is to keep blocks, split for the next round.
//!
//! Between clearing a permission and the invalidation the guest may go on writing through a stale TLB
//! entry. Those pages are in this epoch already, and the host reads them after it.

use crate::control::{Control, Fate, Leaves, Part, Phase, Stretch, TakePass, Taking};
use crate::dirty::{Bits, Dirty, low_bits};
use crate::engine::Round;
use crate::error::Error;
use crate::hardware::Hardware;
use crate::protect::{FILL, WORDS, arm, clear_step};
use crate::pte::{CLEAR_WRITE, Kind, Permission, Pte};
use crate::slot::{Layout, LogMode, Scope, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::tlb::Pending;
use crate::types::{
    Engine, Epoch, Gfn, Granularity, Ipa, Level, PAGE_SHIFT, PAGE_SIZE, Progress, SlotId,
};
use crate::walk::Place;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Deref;

/// What a step may cost, in loads of entries.
const BUDGET: u64 = 2048;
/// What a dirty page counts for.
const DIRTY: u64 = 8;
/// What a split counts for.
const SPLIT: u64 = 1024;

/// How much of a hole a visit covers: one may be 512 GiB wide, and full of writes by EL2.
const HOLE: u64 = 16 << 20;

/// How a harvest finds dirty level-3 leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Search {
    /// Look at every leaf.
    Leaves,
    /// Look at the pages the live bitmap names.
    Live,
    /// Look at every leaf and bring it over to the engine.
    Convert,
}

/// One harvest step's view of the log.
struct Harvest<'a> {
    mode: LogMode,
    search: Search,
    /// What the epoch is of.
    within: Stretch,
    pending: &'a mut Pending,
    round: Round,
}

/// An entry is being changed by another CPU: come back to it.
struct Stall;

/// How many pages of a slot an epoch holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotDirty {
    /// The slot.
    pub slot: SlotId,
    /// Its first frame.
    pub base: Gfn,
    /// Its length in pages.
    pub pages: u64,
    /// Dirty pages.
    pub dirty_pages: u64,
}

/// The bitmap of one slot in the outstanding epoch: bit 0 of word 0 is the slot's first page.
///
/// Bits past the end of the slot are never set. It stays readable after the epoch is settled, but
/// means nothing then.
#[derive(Clone)]
pub struct Words {
    dirty: Arc<Dirty>,
    len: usize,
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        let words = self.dirty.in_flight();
        words.get(..self.len).unwrap_or(words)
    }
}

impl<H: Hardware> Stage2<H> {
    /// Takes the pages written since the last epoch that was taken, and those of an aborted one.
    /// Call it until it is done; more calls with the same epoch only say `Done` again.
    ///
    /// The host chooses the number, larger than the last. To trust a *final* harvest, stop the vCPUs
    /// first and have each of their CPUs execute a DSB: the hardware's update of a descriptor is not
    /// ordered with the store that caused it (invariant 13).
    ///
    /// # Errors
    ///
    /// [`Error::NotLogging`], [`Error::Busy`] while a start or stop is under way,
    /// [`Error::EpochOutstanding`] if another epoch is, [`Error::StaleEpoch`] if the number is used up.
    pub fn take(&self, epoch: Epoch) -> Result<Progress, Error> {
        self.take_of(epoch, None)
    }

    /// Takes an epoch of `part`, or of all that is logged.
    pub(crate) fn take_of(&self, epoch: Epoch, part: Option<Part>) -> Result<Progress, Error> {
        if self.is_given_out() {
            // Those who are at the last stretches need the mutex to hand them in.
            return Ok(self.somebody_else_steps());
        }
        let Some(mut guard) = self.control.try_lock() else {
            return Ok(self.somebody_else_steps());
        };
        let control = &mut *guard;
        let mode = match (control.phase, control.mode) {
            (Phase::On, Some(mode)) => mode,
            (Phase::Off, _) => return Err(Error::NotLogging),
            _ => return Err(Error::Busy),
        };
        if control.resizing.is_some() {
            return Ok(self.somebody_else_steps());
        }
        let taking = match &mut control.taking {
            Some(taking) if (taking.epoch, taking.part) == (epoch, part) => taking,
            Some(taking) => return Err(Error::EpochOutstanding(taking.epoch)),
            none => {
                if let Some((last, _)) = control.last
                    && epoch <= last
                {
                    return Err(Error::StaleEpoch { asked: epoch, last });
                }
                none.insert(Taking {
                    epoch,
                    part,
                    // What was committed is forgotten. What was aborted counts for this one, but not for
                    // one of some pages, which is to hold no others.
                    pass: match (control.stale, part) {
                        (None, Some(_)) => TakePass::GiveBack(0),
                        _ => TakePass::Clear,
                    },
                })
            }
        };
        let layout = self.layout();
        let (scope, within) = layout.extent(control.scope, part);
        if part.is_some() && taking.pass != TakePass::Scan && !control.claims.are_idle() {
            // Who is still at a stretch of a harvest that was given up adds pages of that.
            return Ok(match taking.pass {
                TakePass::Taken => Progress::Done,
                _ => self.somebody_else_steps(),
            });
        }
        match taking.pass {
            TakePass::Taken => return Ok(Progress::Done),
            TakePass::Clear => {
                control.stale = control.stale.and_then(|from| {
                    clear_step(&layout, from, WORDS, |slot, first, count| {
                        slot.dirty.clear_in_flight(first, count)
                    })
                });
                let total = layout.progress(scope, u64::MAX).1;
                if control.stale.is_none() {
                    taking.pass = TakePass::Scan;
                    control.round = Round::default();
                    control.claims.begin(within, total, self.hw.cpus());
                }
                return Ok(Progress::More { done: 0, total });
            }
            TakePass::GiveBack(from) => {
                let next = clear_step(&layout, from, FILL, |slot, first, count| {
                    slot.dirty.give_back(first, count)
                });
                taking.pass = next.map_or(TakePass::Clear, TakePass::GiveBack);
                return Ok(self.somebody_else_steps());
            }
            TakePass::Scan => {}
        }
        let search = match (control.leaves, mode.engine) {
            (Leaves::Mixed { .. } | Leaves::Unarmed { .. }, _) => Search::Convert,
            (Leaves::OfTheEngine, Engine::Dbm) => Search::Leaves,
            (Leaves::OfTheEngine, Engine::WriteProtect) => Search::Live,
        };
        drop(layout);
        let mut cost = 0;
        loop {
            let layout = self.layout();
            let Some(stretch) = guard.claims.claim(&layout, scope) else {
                return Ok(self.conclude(&mut guard, &layout));
            };
            drop(guard);
            let mut pending = Pending::new();
            let mut harvest = Harvest {
                mode,
                search,
                within,
                pending: &mut pending,
                round: Round::default(),
            };
            let left = self.harvest_stretch(&mut harvest, &layout, scope, stretch, &mut cost);
            let round = harvest.round;
            if !pending.is_empty() || search == Search::Convert {
                // The invalidation is another CPU's, perhaps, and its barrier is not for our writes.
                self.hw.dsb_ishst();
            }
            // Whoever holds the mutex may be waiting for readers.
            drop(layout);
            guard = self.control.lock();
            guard.pending.append(&pending);
            guard.round.add(round);
            guard.claims.hand_in(left);
            // Given up meanwhile, perhaps, and the next harvest need not look for the same.
            let scanning = guard
                .taking
                .is_some_and(|taking| taking.epoch == epoch && taking.pass == TakePass::Scan);
            if left.is_some() || cost >= BUDGET || !scanning {
                let progress = self.conclude(&mut guard, &self.layout());
                // What is concluded may be the harvest after the one that was asked for.
                return Ok(if scanning {
                    progress
                } else {
                    self.somebody_else_steps()
                });
            }
        }
    }

    /// Is all of a harvest given out to CPUs that are still at it? Then [`take`](Self::take) has nothing
    /// for another one, unless they leave something. Costs one load.
    pub fn is_given_out(&self) -> bool {
        self.drained.load(Ordering::Relaxed)
    }

    /// Ends the harvest if nothing of it is left to do, and says how far it is.
    fn conclude(&self, control: &mut Control, layout: &Layout) -> Progress {
        // Of the harvest that is under way now: the caller's may have been given up meanwhile.
        let part = control.taking.and_then(|taking| taking.part);
        let (scope, within) = layout.extent(control.scope, part);
        let (done, total) = layout.progress(scope, control.claims.reached());
        let more = Progress::More { done, total };
        let drained = control.claims.are_given_out(layout, scope);
        let idle = control.claims.are_idle();
        self.drained.store(drained && !idle, Ordering::Relaxed);
        let Some(taking) = &mut control.taking else {
            return more;
        };
        if taking.pass != TakePass::Scan || !drained || !idle {
            return more;
        }
        if control.leaves != Leaves::OfTheEngine {
            control.leaves = control.leaves.after(within, layout, control.scope);
            control.pending.push_everything();
        }
        self.tlb().pending(&mut control.pending);
        taking.pass = TakePass::Taken;
        control.judged = Some(control.round);
        self.counters.harvests.fetch_add(1, Ordering::Relaxed);
        self.counters
            .leaves_read
            .fetch_add(control.round.read, Ordering::Relaxed);
        Progress::Done
    }

    /// Harvests a stretch as far as a step goes. Returns what is left of it.
    fn harvest_stretch(
        &self,
        harvest: &mut Harvest<'_>,
        layout: &Layout,
        scope: Scope,
        stretch: Stretch,
        cost: &mut u64,
    ) -> Option<Stretch> {
        let Stretch { mut from, end } = stretch;
        // Slot by slot, and looked up each time: they may have gone, or others come, since the stretch
        // was given out.
        while let Some((slot, here)) = layout.next(scope, from)
            && here < end
        {
            let rest = Stretch { from: here, end };
            if *cost >= BUDGET {
                return Some(rest);
            }
            let within = Stretch {
                from: here,
                end: end.min(slot.end()),
            };
            match self.harvest_at(harvest, slot, within, cost) {
                Ok(next) => from = next,
                // Never passed over: whoever holds the entry may be about to publish dirty leaves.
                Err(Stall) => return Some(rest),
            }
        }
        None
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
        let place = self.descend(here);
        let within = |size: u64| ((here & !(size - 1)) + size).min(end);
        match (place.kind, place.level) {
            (Kind::Busy, _) => Err(Stall),
            (_, Level::L3) => {
                let end = within(Level::L2.size());
                harvest.table(slot, &place, here, end, cost);
                Ok(end)
            }
            (Kind::Leaf, level) => {
                let clean = harvest.clean_blocks(slot, &place, here, end, cost);
                if clean > here {
                    return Ok(clean);
                }
                let end = within(level.size().min(HOLE));
                self.take_outside_tables(harvest, slot, here, end, cost);
                self.harvest_block(harvest, slot, &place, here, cost)?;
                Ok(end)
            }
            _ => {
                let end = within(place.level.size().min(HOLE));
                self.take_outside_tables(harvest, slot, here, end, cost);
                Ok(end)
            }
        }
    }

    /// Takes the live bits where a moment ago there was no level-3 table. Most are writes by EL2.
    ///
    /// But a fault may have mapped a table since, or another CPU may have split the block, and now the
    /// page is dirty and its bit set. Who takes that bit must take the permission too, else nothing
    /// would ever note the page again.
    fn take_outside_tables(
        &self,
        harvest: &mut Harvest<'_>,
        slot: &Slot,
        here: u64,
        end: u64,
        cost: &mut u64,
    ) {
        harvest.take_live(slot, here, end, cost, |pending, ipa, mut pages| {
            while pages != 0 {
                let first = pages.trailing_zeros();
                let at = ipa + u64::from(first) * PAGE_SIZE;
                // Where one walk ends, those of its neighbours in the same table or entry do.
                let place = self.descend(at);
                let reach = match place.level {
                    Level::L3 => Level::L2.size(),
                    above => above.size(),
                };
                let left = (reach - (at & (reach - 1))) >> PAGE_SHIFT;
                let group = pages & low_bits(u64::from(first) + left);
                pages &= !group;
                match (place.kind, place.level) {
                    // A table that may be put back, with the pages in it: look again next time.
                    (Kind::Busy, _) => Bits(group).for_each(|page| {
                        slot.dirty.mark(slot.page(ipa) + u64::from(page));
                    }),
                    (_, Level::L3) => {
                        for page in Bits(group) {
                            let ipa = ipa + u64::from(page) * PAGE_SIZE;
                            if protect_page(place.table.entry(Level::L3.index(ipa))) {
                                pending.push(ipa, Level::L3);
                            }
                        }
                    }
                    _ => {}
                }
            }
        });
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
            return Err(Stall);
        }
        let mut old = None;
        if place.pte.is_dirty() && harvest.mode.granularity != Granularity::Block {
            *cost += SPLIT;
            // Out of memory leaves the block tracked and reported whole.
            match self.split(place.entry(), level, here, engine) {
                Ok(block) => old = Some((block, Stale::Invalidated)),
                Err(crate::split::Unsplit::NoTables) => {}
                Err(crate::split::Unsplit::Raced) => return Err(Stall),
            }
        }
        if old.is_none() && !place.pte.is_dirty() && harvest.search != Search::Convert {
            return Ok(());
        }
        let (block, stale) = match old {
            Some(old) => old,
            None => (
                clean(place, harvest.search, engine).ok_or(Stall)?,
                Stale::Yes,
            ),
        };
        if block.is_dirty() {
            harvest.round.dirty += 1;
            // From its beginning: a block may have been mapped around the cursor, over a hole of which
            // the harvest had passed a part.
            let base = here & !(level.size() - 1);
            let (end, within) = (base + level.size(), harvest.within);
            let (from, to) = (base.max(within.from), end.min(within.end));
            *cost += level.pages() / 4;
            slot.dirty
                .add_run(slot.page(from), (to - from) >> PAGE_SHIFT);
            // Of the rest of it a later epoch tells, and no leaf will.
            slot.dirty
                .mark_run(slot.page(base), (from - base) >> PAGE_SHIFT);
            if to < end {
                slot.dirty.mark_run(slot.page(to), (end - to) >> PAGE_SHIFT);
            }
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
                Err(crate::split::Unsplit::Raced) => return Err(Stall),
                Err(crate::split::Unsplit::NoTables) => {}
            }
        }
        // Such a harvest ends with an invalidation of everything.
        arm(place.entry(), level, engine);
        Ok(())
    }

    /// Returns how many pages of each slot the epoch holds; of one slot only, if the epoch is of a part
    /// of it.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchEpoch`] or [`Error::TakeUnfinished`] if the epoch is not with the host.
    pub fn taken(&self, epoch: Epoch) -> Result<Vec<SlotDirty>, Error> {
        let control = self.control.lock();
        let layout = self.layout();
        control.require_nothing_resized()?;
        let scope = match require_taken(control.taking, epoch)?.part {
            None => control.scope,
            Some(part) => Scope::One(part.slot),
        };
        let covered = layout.slots.iter().filter(|slot| scope.covers(slot));
        let dirty = |slot: &Slot| SlotDirty {
            slot: slot.id,
            base: slot.base,
            pages: slot.pages,
            dirty_pages: slot.dirty.in_flight_pages(),
        };
        Ok(covered.map(dirty).collect())
    }

    /// Returns the bitmap of a slot in the epoch.
    ///
    /// # Errors
    ///
    /// As [`taken`](Self::taken), and [`Error::NoSuchSlot`].
    pub fn in_flight(&self, slot: SlotId, epoch: Epoch) -> Result<Words, Error> {
        let control = self.control.lock();
        let layout = self.layout();
        require_taken(control.taking, epoch)?;
        control.require_nothing_resized()?;
        let slot = layout.slot(slot).ok_or(Error::NoSuchSlot(slot))?;
        Ok(Words {
            dirty: Arc::clone(&slot.dirty),
            len: slot.pages.div_ceil(64) as usize,
        })
    }

    /// Ends the epoch: the host has what it needs. Repeating it is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchEpoch`], or [`Error::TakeUnfinished`] if the host cannot have it yet.
    pub fn commit(&self, epoch: Epoch) -> Result<(), Error> {
        let mut control = self.control.lock();
        if control.taking.is_none() && control.last == Some((epoch, Fate::Committed)) {
            return Ok(());
        }
        require_taken(control.taking, epoch)?;
        control.taking = None;
        control.last = Some((epoch, Fate::Committed));
        control.last_committed = Some(epoch);
        control.stale = Some(0);
        Ok(())
    }

    /// Gives the epoch back: whatever it held is reported again by the next one. Possible at any
    /// moment of a take. Repeating it is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchEpoch`] if that epoch is not outstanding.
    pub fn abort(&self, epoch: Epoch) -> Result<(), Error> {
        let mut control = self.control.lock();
        match control.taking {
            Some(taking) if taking.epoch == epoch => {
                self.abort_taking(&mut control);
                Ok(())
            }
            None if control.last == Some((epoch, Fate::Aborted)) => Ok(()),
            other => Err(Error::NoSuchEpoch {
                asked: epoch,
                outstanding: other.map(|taking| taking.epoch),
            }),
        }
    }

    /// The bits stay where they are, and so do the pending invalidations.
    fn abort_taking(&self, control: &mut Control) -> Option<Epoch> {
        let epoch = control.taking.take()?.epoch;
        control.last = Some((epoch, Fate::Aborted));
        self.drained.store(false, Ordering::Relaxed);
        Some(epoch)
    }

    /// Aborts an epoch whether or not it has begun. One that had not never does: no CPU that is on its
    /// way to a step of it can begin it any more.
    pub fn give_up(&self, epoch: Epoch) {
        // Under one lock: between a look and the note the epoch could begin.
        let mut control = self.control.lock();
        match control.taking {
            Some(taking) if taking.epoch == epoch => {
                self.abort_taking(&mut control);
            }
            None if control.last.is_none_or(|(last, _)| last < epoch) => {
                control.last = Some((epoch, Fate::Aborted));
            }
            _ => {}
        }
    }

    /// Aborts whatever epoch is outstanding, as when the host went away, and returns it.
    pub fn abort_outstanding(&self) -> Option<Epoch> {
        self.abort_taking(&mut self.control.lock())
    }

    /// Notes that EL2 wrote to guest memory: emulation, the loader, the host. **Write first, then
    /// call this**: a harvest between the two then reports the page one round late, and the other
    /// way round it would report it one round early and never again (invariant 18).
    ///
    /// # Errors
    ///
    /// [`Error::NotMemory`] names the first address outside the slots; what is inside was noted.
    pub fn mark_dirty(&self, ipa: Ipa, len: u64) -> Result<(), Error> {
        let end = ipa.checked_add(len).ok_or(Error::NotMemory(ipa))?.raw();
        if len == 0 {
            return Ok(());
        }
        let layout = self.layout();
        let mut at = ipa.raw();
        let mut missed = Ok(());
        for slot in layout
            .slots
            .iter()
            .filter(|slot| slot.start() < end && slot.end() > ipa.raw())
        {
            if missed.is_ok() && slot.start() > at {
                missed = Err(Error::NotMemory(Ipa::new(at)));
            }
            let first = slot.page(slot.start().max(ipa.raw()));
            let last = slot.page(slot.end().min(end) - 1);
            if layout.log.is_some_and(|log| log.scope.covers(slot)) {
                slot.dirty.mark_run(first, last - first + 1);
            }
            at = slot.end();
        }
        if missed.is_ok() && at < end {
            missed = Err(Error::NotMemory(Ipa::new(at)));
        }
        missed
    }
}

/// Is the block's old translation still in some TLB?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stale {
    Yes,
    Invalidated,
}

fn require_taken(taking: Option<Taking>, epoch: Epoch) -> Result<Taking, Error> {
    match taking {
        Some(taking) if taking.epoch == epoch => match taking.pass {
            TakePass::Taken => Ok(taking),
            _ => Err(Error::TakeUnfinished(epoch)),
        },
        other => Err(Error::NoSuchEpoch {
            asked: epoch,
            outstanding: other.map(|taking| taking.epoch),
        }),
    }
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
    /// Harvests the level-3 table at `place` from `here` to `end`.
    fn table(&mut self, slot: &Slot, place: &Place<'_>, here: u64, end: u64, cost: &mut u64) {
        self.round.leaves += (end - here) >> PAGE_SHIFT;
        match self.search {
            Search::Live => {
                self.round.dirty += self.take_live(slot, here, end, cost, |pending, ipa, pages| {
                    let mut stale = 0;
                    for page in Bits(pages) {
                        let index = Level::L3.index(ipa) + page as usize;
                        stale |= u64::from(protect_page(place.table.entry(index))) << page;
                    }
                    pending.push_pages(ipa, stale);
                });
            }
            Search::Leaves => {
                self.take_live(slot, here, end, cost, |_, _, _| {});
                let found = self.scan(slot, place, here, end, collect);
                *cost += ((end - here) >> PAGE_SHIFT) + DIRTY * found;
            }
            Search::Convert => {
                let engine = self.mode.engine;
                self.take_live(slot, here, end, cost, |_, _, _| {});
                let found = self.scan(slot, place, here, end, |group, wanted| {
                    collect_converting(group, wanted, engine)
                });
                *cost += 4 * ((end - here) >> PAGE_SHIFT) + DIRTY * found;
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
        if self.search == Search::Convert {
            return here;
        }
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
        collect: impl Fn(&[AtomicU64; 64], u64) -> u64,
    ) -> u64 {
        let (groups, _) = place.table.0.as_chunks::<64>();
        let mut base = here & !(Level::L2.size() - 1);
        let (mut dirty, mut added) = (0, 0);
        for group in groups {
            let next = base + 64 * PAGE_SIZE;
            if base < end && next > here {
                // Entries before `here` and behind `end` belong to other slots.
                let skip = (here.max(base) - base) >> PAGE_SHIFT;
                let keep = (end.min(next) - base) >> PAGE_SHIFT;
                let wanted = (u64::MAX << skip) & (u64::MAX >> (64 - keep));
                let found = collect(group, wanted);
                if found != 0 {
                    let first = slot.page(base + skip * PAGE_SIZE);
                    dirty += u64::from(found.count_ones());
                    added += slot.dirty.add(first, found >> skip);
                    self.pending.push_pages(base, found);
                }
            }
            base = next;
        }
        slot.dirty.count(added);
        self.round.dirty += dirty;
        self.round.read += (end - here) >> PAGE_SHIFT;
        dirty
    }

    /// Moves the live bits of `here..end` to the epoch and returns how many. Hands them to `each`, 64 at
    /// a time: an address and, as bits, the pages from there on.
    fn take_live(
        &mut self,
        slot: &Slot,
        here: u64,
        end: u64,
        cost: &mut u64,
        mut each: impl FnMut(&mut Pending, u64, u64),
    ) -> u64 {
        let pages = (end - here) >> PAGE_SHIFT;
        let pending = &mut *self.pending;
        let mut taken = 0;
        slot.dirty
            .take_live(slot.page(here), pages, |first, pages| {
                taken += u64::from(pages.count_ones());
                each(pending, slot.start() + (first << PAGE_SHIFT), pages);
            });
        *cost += 4 + pages / 64 + DIRTY * taken;
        taken
    }
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
    let mut found = 0;
    for bit in Bits(dirty & wanted) {
        if let Some(entry) = line.get(bit as usize) {
            // The load above only said where to look. This value decides.
            let old = Pte(entry.fetch_and(CLEAR_WRITE, Ordering::AcqRel));
            found |= u64::from(old.is_dirty()) << bit;
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

impl Leaves {
    /// Returns what is left to be looked at leaf by leaf after a harvest that looked at all `within`.
    fn after(self, within: Stretch, layout: &Layout, scope: Scope) -> Self {
        let next = |from| layout.next(scope, from).map(|(_, at)| at);
        match self {
            Leaves::Unarmed { from } => match next(from) {
                Some(at) if at < within.from => self,
                _ if next(within.end).is_none() => Leaves::OfTheEngine,
                _ => Leaves::Unarmed {
                    from: from.max(within.end),
                },
            },
            _ if within == Stretch::ALL => Leaves::OfTheEngine,
            same => same,
        }
    }
}

impl Layout {
    /// Returns which slots and addresses an epoch of `part` is of, or one of all that is logged.
    fn extent(&self, logged: Scope, part: Option<Part>) -> (Scope, Stretch) {
        let Some(part) = part else {
            return (logged, Stretch::ALL);
        };
        let start = self.slot(part.slot).map_or(0, Slot::start);
        let from = start + (part.first << PAGE_SHIFT);
        let end = from + (part.pages << PAGE_SHIFT);
        (Scope::One(part.slot), Stretch { from, end })
    }

    pub(crate) fn live_pages(&self, carried: Carried) -> u64 {
        let of = |slot: &Slot| {
            slot.dirty.live_pages()
                + match carried {
                    Carried::Yes => slot.dirty.in_flight_pages(),
                    Carried::No => 0,
                }
        };
        self.slots.iter().map(of).sum()
    }
}

/// Do the in-flight bitmaps hold an aborted epoch, which is live again?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Carried {
    Yes,
    No,
}
