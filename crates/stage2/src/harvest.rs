//! Taking the dirty pages, in two phases.
//!
//! [`take`](Stage2::take) collects one epoch in bounded steps: for each leaf that is dirty one
//! `fetch_and` clears the write permission, and its returned value decides (invariant 2); the page
//! goes into the epoch; when all are done, one invalidation; and only then the epoch is `Done` and
//! may be read (invariant 3). [`commit`](Stage2::commit) forgets it, [`abort`](Stage2::abort) gives it
//! back, whenever the host fails.
//!
//! Between clearing a permission and the invalidation the guest may go on writing through a stale TLB
//! entry. Those pages are in this epoch already, and the host reads them after it.

mod scan;

use crate::control::{Control, Fate, Ground, Leaves, Part, Phase, Stretch, TakePass, Taking};
use crate::dirty::Dirty;
use crate::engine::Round;
use crate::error::Error;
use crate::hardware::Hardware;
use crate::protect::{FILL, WORDS, words_step};
use crate::slot::{Layout, LogMode, Scope, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::tlb::Pending;
use crate::types::{Engine, Epoch, Gfn, Ipa, PAGE_SHIFT, Progress, SlotId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::{Deref, Range};
use scan::{BUDGET, Harvest, Search};

/// Words of the last epoch that a step forgets: half of it, for the harvest begins in the same step.
const FORGET: usize = WORDS / 2;

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
}

impl Words {
    /// Returns the first run of words from `word` on in which there may be pages; those in front of it hold
    /// none, and need not be looked at. Behind the last such run it is empty, and behind all words.
    #[must_use]
    pub fn marked(&self, word: usize) -> Range<usize> {
        self.dirty.in_flight_marked(word)
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        self.dirty.in_flight()
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
                    pass: match (control.last, control.stale, part) {
                        (Some((_, Fate::Aborted)), None, Some(_)) => TakePass::GiveBack(0),
                        _ => TakePass::Clear,
                    },
                })
            }
        };
        let layout = self.layout();
        let (scope, within) = layout.extent(control.scope, part);
        if taking.pass != TakePass::Scan && !control.claims.are_idle() {
            // Who is still at a stretch of a harvest that was given up adds pages of that.
            return Ok(match taking.pass {
                TakePass::Taken => Progress::Done,
                _ => self.somebody_else_steps(),
            });
        }
        let search = match (control.leaves, mode.engine) {
            (Leaves::Mixed { .. } | Leaves::Unarmed { .. }, _) => Search::Convert,
            (Leaves::OfTheEngine, Engine::Dbm) => Search::Leaves,
            // The bit of a dirty block may be another page's: an epoch of some pages looks at all of them.
            (Leaves::OfTheEngine, Engine::WriteProtect) if part.is_some() => Search::Leaves,
            (Leaves::OfTheEngine, Engine::WriteProtect) => Search::Live,
        };
        match taking.pass {
            TakePass::Taken => return Ok(Progress::Done),
            TakePass::Clear => {
                control.stale = control.stale.and_then(|from| forget(&layout, from));
                if control.stale.is_some() {
                    let (_, total) = layout.progress(scope, 0);
                    return Ok(Progress::More { done: 0, total });
                }
                taking.pass = TakePass::Scan;
                return Ok(self.begin(control, &layout, (mode, search)));
            }
            TakePass::GiveBack(from) => {
                let next = words_step(&layout, from, FILL, |slot, first, count| {
                    slot.dirty.give_back(first, count);
                    first + count
                });
                taking.pass = next.map_or(TakePass::Clear, TakePass::GiveBack);
                return Ok(self.somebody_else_steps());
            }
            TakePass::Scan => {}
        }
        let (mut layout, mut cost) = (layout, 0);
        loop {
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
            layout = self.layout();
            guard.pending.append(&pending);
            guard.round.add(round);
            guard.claims.hand_in(left);
            // Given up meanwhile, perhaps, and the next harvest need not look for the same.
            let scanning = guard
                .taking
                .is_some_and(|taking| taking.epoch == epoch && taking.pass == TakePass::Scan);
            if left.is_some() || cost >= BUDGET || !scanning {
                let progress = self.conclude(&mut guard, &layout);
                // What is concluded may be the harvest after the one that was asked for.
                return Ok(if scanning {
                    progress
                } else {
                    self.somebody_else_steps()
                });
            }
        }
    }

    /// Begins to collect.
    ///
    /// Where live bits say where to look, by a first step: most of the time that is all, and there is nothing
    /// to give out. A look at leaves is for all CPUs.
    #[inline(always)]
    fn begin(
        &self,
        control: &mut Control,
        layout: &Layout,
        (mode, search): (LogMode, Search),
    ) -> Progress {
        let part = control.taking.and_then(|taking| taking.part);
        let (scope, within) = layout.extent(control.scope, part);
        let mut harvest = Harvest {
            mode,
            search,
            within,
            pending: &mut control.pending,
            round: Round::default(),
        };
        // Half a step, because others may be waiting for the mutex, and an epoch may have been forgotten in it.
        let mut cost = BUDGET / 2;
        let (mut total, mut left) = (0, None);
        for slot in layout.covered(scope) {
            slot.dirty.begin_harvest();
            total += slot.pages;
            if search == Search::Live && left.is_none() {
                left = self.harvest_slot(&mut harvest, slot, &mut cost);
            }
        }
        control.round = harvest.round;
        let pages = part.map_or(total, |part| part.pages);
        let claims = &mut control.claims;
        match (search, left) {
            (Search::Live, None) => self.finish(control, layout, pages),
            (Search::Live, Some(from)) => {
                let left = Stretch { from, ..within };
                claims.begin(Ground::Live, left, pages, self.hw.cpus());
                // The invalidation is another CPU's, perhaps, and its barrier is not for our writes.
                self.hw.dsb_ishst();
                self.conclude(control, layout)
            }
            (Search::Leaves | Search::Convert, _) => {
                claims.begin(Ground::All, within, pages, self.hw.cpus());
                Progress::More { done: 0, total }
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
        let (scope, _) = layout.extent(control.scope, part);
        let drained = control.claims.are_given_out(layout, scope);
        let idle = control.claims.are_idle();
        self.drained.store(drained && !idle, Ordering::Relaxed);
        let collecting = |taking: &Taking| taking.pass == TakePass::Scan;
        if !control.taking.as_ref().is_some_and(collecting) || !drained || !idle {
            let (done, total) = layout.progress(scope, control.claims.reached());
            return Progress::More { done, total };
        }
        self.finish(control, layout, control.claims.pages())
    }

    /// Ends the harvest of `pages` pages, of which all were looked at: what it found is the host's.
    fn finish(&self, control: &mut Control, layout: &Layout, pages: u64) -> Progress {
        let part = control.taking.and_then(|taking| taking.part);
        let (scope, within) = layout.extent(control.scope, part);
        if control.leaves != Leaves::OfTheEngine {
            control.leaves = control.leaves.after(within, layout, control.scope);
            control.pending.push_everything();
        }
        self.tlb().pending(&mut control.pending);
        if let Some(taking) = &mut control.taking {
            taking.pass = TakePass::Taken;
        }
        if part.is_none() {
            let ended = layout.covered(scope);
            ended.for_each(|slot| slot.dirty.end_harvest());
        }
        // No matter which of them this harvest looked at.
        let leaves = self.mappings().pages_4k;
        control.round.leaves = leaves.min(pages);
        if part.is_none() {
            control.judged = Some(control.round);
        }
        self.counters.harvests.fetch_add(1, Ordering::Relaxed);
        self.counters
            .leaves_read
            .fetch_add(control.round.read, Ordering::Relaxed);
        Progress::Done
    }

    /// Returns which addresses of `slot` a harvest collects at the moment, if any.
    pub(crate) fn harvested(&self, control: &Control, slot: &Slot) -> Option<Stretch> {
        let taking = control.taking?;
        let (scope, within) = self.layout().extent(control.scope, taking.part);
        (taking.pass == TakePass::Scan && scope.covers(slot)).then_some(within)
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
        let scope = match require_taken(control.taking, epoch)?.part {
            None => control.scope,
            Some(part) => Scope::One(part.slot),
        };
        let dirty = |slot: &Slot| SlotDirty {
            slot: slot.id,
            base: slot.base,
            pages: slot.pages,
            dirty_pages: slot.dirty.in_flight_pages(),
        };
        Ok(layout.covered(scope).map(dirty).collect())
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
        let slot = layout.slot(slot).ok_or(Error::NoSuchSlot(slot))?;
        Ok(Words {
            dirty: Arc::clone(&slot.dirty),
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
        // Most of the time all is forgotten at once; else the next take does it.
        control.stale = match forget_all(&self.layout()) {
            true => None,
            false => Some(0),
        };
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

/// Forgets a committed epoch from an address on, as far as a step goes. Returns where to go on.
fn forget(layout: &Layout, from: u64) -> Option<u64> {
    words_step(layout, from, FORGET, |slot, first, count| {
        slot.dirty.clear_in_flight(first, count)
    })
}

/// Forgets a committed epoch, if that is no more than a step. Was it?
fn forget_all(layout: &Layout) -> bool {
    let words = |slot: &Slot| slot.dirty.in_flight_words();
    let all = layout.covered(Scope::All).map(words).sum::<usize>();
    if all > FORGET {
        return false;
    }
    for slot in layout.covered(Scope::All) {
        slot.dirty.clear_in_flight(0, FORGET);
    }
    true
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

impl Slot {
    /// Adds what of `dirty` lies in `within` to the epoch. Of the rest a later epoch tells, and perhaps no leaf.
    pub(crate) fn note(&self, dirty: Stretch, within: Stretch) {
        let Stretch { from, end } = dirty;
        let first = within.from.clamp(from, end);
        let last = within.end.clamp(first, end);
        let pages = |from: u64, end: u64| (end - from) >> PAGE_SHIFT;
        self.dirty.add_run(self.page(first), pages(first, last));
        self.dirty.mark_run(self.page(from), pages(from, first));
        if last < end {
            self.dirty.mark_run(self.page(last), pages(last, end));
        }
    }
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
    #[inline(always)]
    fn extent(&self, logged: Scope, part: Option<Part>) -> (Scope, Stretch) {
        let Some(part) = part else {
            return (logged, Stretch::ALL);
        };
        // It may have gone since the epoch was begun, and a smaller one of its name have come.
        let Some(slot) = self.slot(part.slot) else {
            return (Scope::One(part.slot), Stretch { from: 0, end: 0 });
        };
        let page = |page: u64| slot.address(page.min(slot.pages));
        let (from, end) = (page(part.first), page(part.first + part.pages));
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
        // What a host is told may be wrong by a moment's changes, and must not end the machine.
        self.slots.iter().map(of).fold(0, u64::saturating_add)
    }
}

/// Do the in-flight bitmaps hold an aborted epoch, which is live again?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Carried {
    Yes,
    No,
}
