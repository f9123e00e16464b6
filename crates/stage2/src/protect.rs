//! Starting and stopping a dirty log.
//!
//! Starting makes RW leaves WC, stopping makes WC and WD leaves RW, and neither ever looks at NW: a
//! read-only leaf is not tracked (invariant 8). Both are walks in bounded steps, and the guest faults
//! and runs meanwhile; a leaf mapped meanwhile is born in the new state, because every CPU's copy of
//! the layout has it, and nobody is left who saw another, before the walk begins.
//!
//! What a guest wrote counts from the moment a start says `Done`. Its last act is to invalidate the
//! VM's translations, so no CPU can write through an entry older than that.

use crate::control::{Control, Initially, Leaves, Phase, StartPass, StopPass};
use crate::error::Error;
use crate::hardware::Hardware;
use crate::pte::{Kind, Permission, Pte};
use crate::slot::{Layout, LeavesOf, Log, LogMode, Scope, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Access, Engine, Granularity, Level, PAGE_SIZE, Progress, SlotId};
use crate::walk::Place;

/// Entries visited in a step.
const BUDGET: usize = 768;
/// What an entry counts for that took a walk.
const WALK: usize = 10;
/// What a split counts for.
const SPLIT: usize = 512;
/// Bitmap words cleared in a step.
pub(crate) const WORDS: usize = 2048;
/// Bitmap words filled in a step.
pub(crate) const FILL: usize = 1024;

impl<H: Hardware> Stage2<H> {
    /// Returns the engine this machine does best with.
    pub fn best_engine(&self) -> Engine {
        if self.features.dbm.is_present() {
            Engine::Dbm
        } else {
            Engine::WriteProtect
        }
    }

    /// Starts logging writes to every slot. Call it, with the same arguments, until it is done; then
    /// copy what you want to compare with.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyLogging`] if a log is on or being started differently,
    /// [`Error::EngineUnavailable`] if the engine needs what the machine lacks.
    pub fn start_log(&self, engine: Engine, granularity: Granularity) -> Result<Progress, Error> {
        let mode = LogMode {
            engine,
            granularity,
        };
        self.start(Scope::All, mode, Initially::Clean)
    }

    /// Starts logging writes to one slot. Otherwise as [`start_log`](Self::start_log).
    ///
    /// A VM has one log at a time, of one slot or of all. To log several slots apart, log all and take each
    /// slot's epochs by [`take_range`](Self::take_range): what one epoch does not hold stays for its own. One
    /// epoch is outstanding at a time, and their numbers grow over all slots.
    ///
    /// # Errors
    ///
    /// As [`start_log`](Self::start_log), and [`Error::NoSuchSlot`].
    pub fn start_slot_log(
        &self,
        slot: SlotId,
        engine: Engine,
        granularity: Granularity,
    ) -> Result<Progress, Error> {
        if self.layout().slot(slot).is_none() {
            return Err(Error::NoSuchSlot(slot));
        }
        let mode = LogMode {
            engine,
            granularity,
        };
        self.start(Scope::One(slot), mode, Initially::Clean)
    }

    pub(crate) fn start(
        &self,
        scope: Scope,
        mode: LogMode,
        initially: Initially,
    ) -> Result<Progress, Error> {
        if mode.engine == Engine::Dbm && !self.features.dbm.is_present() {
            return Err(Error::EngineUnavailable);
        }
        let Some(mut control) = self.control.try_lock() else {
            return Ok(self.somebody_else_steps());
        };
        match control.phase {
            Phase::Off => {
                *control = Control {
                    phase: Phase::Starting(StartPass::Clear(0)),
                    mode: Some(mode),
                    scope,
                    // Epochs grow for as long as the VM lives: one that was given up stays so.
                    last: control.last,
                    // What an older log left is none of this one's, from the first step on.
                    stale: Some(0),
                    initially,
                    ..Control::new()
                };
            }
            Phase::Starting(_)
                if (control.mode, control.scope, control.initially)
                    == (Some(mode), scope, initially) => {}
            Phase::Starting(_) | Phase::On => return Err(Error::AlreadyLogging),
            Phase::Stopping(_) => return Err(Error::Busy),
        }
        match control.phase {
            Phase::Starting(StartPass::Clear(from)) => {
                let layout = self.layout();
                let clear = |slot: &Slot, first, count| {
                    let live = slot.dirty.clear_live(first, count);
                    live.min(slot.dirty.clear_in_flight(first, count))
                };
                let next = words_step(&layout, from, WORDS, clear);
                let total = layout.progress(scope, u64::MAX).1;
                drop(layout);
                if let Some(next) = next {
                    control.phase = Phase::Starting(StartPass::Clear(next));
                } else {
                    control.stale = None;
                    self.layouts
                        .change(|layout| layout.log = Some(Log { mode, scope }));
                    control.phase = Phase::Starting(match initially {
                        Initially::Clean => StartPass::Arm(0),
                        Initially::Dirty => StartPass::Fill(0),
                    });
                }
                Ok(Progress::More { done: 0, total })
            }
            Phase::Starting(StartPass::Fill(from)) => {
                // The log is there for everyone: what is mapped from now on is armed, what was before is
                // not and is noted here.
                let layout = self.layout();
                let fill = |slot: &Slot, first: usize, count: usize| {
                    if scope.covers(slot) {
                        let first = first as u64 * 64;
                        let pages = slot.pages.saturating_sub(first).min(count as u64 * 64);
                        slot.dirty.mark_run(first, pages);
                    }
                    first + count
                };
                let Some(next) = words_step(&layout, from, FILL, fill) else {
                    control.leaves = Leaves::Unarmed { from: 0 };
                    control.phase = Phase::On;
                    return Ok(Progress::Done);
                };
                control.phase = Phase::Starting(StartPass::Fill(next));
                let (done, total) = layout.progress(scope, next);
                Ok(Progress::More { done, total })
            }
            Phase::Starting(StartPass::Arm(from)) => {
                let layout = self.layout();
                let Some(next) = self.arm_step(&layout, scope, mode, from) else {
                    self.tlb().everything();
                    control.pending.clear();
                    control.phase = Phase::On;
                    return Ok(Progress::Done);
                };
                // The invalidation at the end is another CPU's, perhaps, and its barrier not for our writes.
                self.hw.dsb_ishst();
                control.phase = Phase::Starting(StartPass::Arm(next));
                let (done, total) = layout.progress(scope, next);
                Ok(Progress::More { done, total })
            }
            _ => Ok(Progress::Done),
        }
    }

    /// Arms leaves from address `from` on. Returns where to go on, or `None` at the end.
    fn arm_step(&self, layout: &Layout, scope: Scope, mode: LogMode, from: u64) -> Option<u64> {
        let mut at = from;
        let mut visits = 0;
        while visits < BUDGET {
            let (slot, here) = layout.next(scope, at)?;
            // A slot that is only becoming read-only still has writable leaves.
            if slot.access != Access::ReadWrite && slot.leaves == LeavesOf::ItsAccess {
                at = slot.end();
                continue;
            }
            let place = self.descend(here);
            let past = (here & !(place.level.size() - 1)) + place.level.size();
            match (place.kind, place.level) {
                (Kind::Busy, _) => return Some(here),
                (Kind::Leaf, level)
                    if level != Level::L3 && mode.granularity == Granularity::Page =>
                {
                    visits += SPLIT;
                    match self.split(place.entry(), level, here, mode.engine) {
                        Ok(block) => {
                            // Written since it was mapped, while the log was starting. It need not be
                            // reported, and it costs nothing to.
                            if block.is_dirty() {
                                slot.dirty
                                    .mark_run(slot.page(past - level.size()), level.pages());
                            }
                            continue;
                        }
                        Err(crate::split::Unsplit::Raced) => return Some(here),
                        // The block stays one, tracked and reported whole.
                        Err(crate::split::Unsplit::NoTables) => {
                            arm(place.entry(), level, mode.engine)
                        }
                    }
                }
                (Kind::Leaf, level) => {
                    let each = |_, entry: &AtomicU64| arm(entry, level, mode.engine);
                    let (next, visited) = along(slot, &place, here, BUDGET - visits, each);
                    at = next;
                    visits += WALK + visited;
                    continue;
                }
                (Kind::Empty | Kind::Table(_), _) => {}
            }
            visits += WALK;
            at = past;
        }
        Some(at)
    }

    /// Stops the log: leaves become plainly writable again and blocks are put back together. Call it
    /// until it is done. The log counts as stopped from the first call.
    ///
    /// # Errors
    ///
    /// [`Error::NotLogging`] if none is on, [`Error::EpochOutstanding`] if the host has one.
    pub fn stop_log(&self) -> Result<Progress, Error> {
        let Some(mut control) = self.control.try_lock() else {
            return Ok(self.somebody_else_steps());
        };
        let pass = match control.phase {
            Phase::Off => return Err(Error::NotLogging),
            Phase::On | Phase::Starting(_) => {
                if let Some(taking) = control.taking {
                    return Err(Error::EpochOutstanding(taking.epoch));
                }
                if !control.claims.are_idle() {
                    // Somebody is still at a stretch of a harvest that was given up.
                    return Ok(self.somebody_else_steps());
                }
                self.layouts.change(|layout| layout.log = None);
                StopPass::Release(0)
            }
            Phase::Stopping(pass) => pass,
        };
        let scope = control.scope;
        let (next, total) = match pass {
            StopPass::Release(from) => {
                let layout = self.layout();
                let each = |_: &Slot, _, entry: &AtomicU64, level| release(entry, level);
                let next = match self.leaves_step(&layout, scope, from, each) {
                    Some(next) => {
                        self.hw.dsb_ishst();
                        StopPass::Release(next)
                    }
                    None => {
                        // Not needed for correctness; without it every CPU would take its spurious
                        // faults one page at a time.
                        self.tlb().everything();
                        StopPass::Collapse(Level::L2, 0)
                    }
                };
                (next, layout.progress(scope, u64::MAX).1)
            }
            StopPass::Collapse(level, from) => {
                let next = match (self.collapse_step(scope, level, from), level) {
                    (Some(next), level) => StopPass::Collapse(level, next),
                    (None, Level::L2) => StopPass::Collapse(Level::L1, 0),
                    (None, _) => {
                        *control = control.without_log();
                        return Ok(Progress::Done);
                    }
                };
                (next, self.layout().progress(scope, u64::MAX).1)
            }
        };
        control.phase = Phase::Stopping(next);
        let done = match next {
            StopPass::Release(at) => self.layout().progress(scope, at).0,
            StopPass::Collapse(..) => total,
        };
        Ok(Progress::More { done, total })
    }

    /// Calls `each` with the slot, address, entry and level of leaves from address `from` on, as many as a
    /// step may. Returns where to go on, or `None` at the end.
    pub(crate) fn leaves_step(
        &self,
        layout: &Layout,
        scope: Scope,
        from: u64,
        each: impl Fn(&Slot, u64, &AtomicU64, Level),
    ) -> Option<u64> {
        let mut at = from;
        let mut visits = 0;
        while visits < BUDGET {
            let (slot, here) = layout.next(scope, at)?;
            let place = self.descend(here);
            visits += WALK;
            match (place.kind, place.level) {
                (Kind::Busy, _) => return Some(here),
                (Kind::Leaf, level) => {
                    let each = |ipa, entry: &AtomicU64| each(slot, ipa, entry, level);
                    let most = BUDGET.saturating_sub(visits).max(1);
                    let (next, visited) = along(slot, &place, here, most, each);
                    at = next;
                    visits += visited;
                }
                (Kind::Empty | Kind::Table(_), _) => {
                    at = (here & !(place.level.size() - 1)) + place.level.size();
                }
            }
        }
        Some(at)
    }
}

/// Changes the leaves of the table at `place` from `here` on, as many as `most` or to the end of the slot:
/// they cost one walk together. Returns the address reached and the entries visited.
fn along(
    slot: &Slot,
    place: &Place<'_>,
    here: u64,
    most: usize,
    each: impl Fn(u64, &AtomicU64),
) -> (u64, usize) {
    let size = place.level.size();
    let mut reached = here;
    let mut visited = 0;
    for entry in place.table.0.iter().skip(place.index).take(most) {
        let kind = || Pte(entry.load(Ordering::Relaxed)).kind(place.level);
        // Among blocks there may be a table, or an entry that somebody is changing: walk again.
        let ends = place.level != Level::L3 && matches!(kind(), Kind::Table(_) | Kind::Busy);
        if reached >= slot.end() || ends {
            break;
        }
        each(reached, entry);
        visited += 1;
        reached = (reached & !(size - 1)) + size;
    }
    (reached, visited)
}

/// RW to WC. Leaves that are tracked already were born so; read-only ones stay.
pub(crate) fn arm(entry: &AtomicU64, level: Level, engine: Engine) {
    change(entry, level, |pte| {
        pte.is_untracked_writable()
            .then(|| pte.with(Permission::Clean(engine)))
    });
}

/// WC and WD to RW.
fn release(entry: &AtomicU64, level: Level) {
    change(entry, level, |pte| {
        pte.is_tracked().then(|| pte.with(Permission::Untracked))
    });
}

/// Changes a leaf to what `wanted` says, if anything.
///
/// Never gives up: a leaf left as it was would be a hole in the log. It ends because a leaf moves at
/// most once beneath us, WC to WD, before it can only be moved by whoever holds the control mutex.
fn change(entry: &AtomicU64, level: Level, wanted: impl Fn(Pte) -> Option<Pte>) {
    // An error means there was nothing to change.
    let _ = entry.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |seen| {
        let seen = Pte(seen);
        let leaf = seen.kind(level) == Kind::Leaf;
        leaf.then(|| wanted(seen)).flatten().map(|wanted| wanted.0)
    });
}

/// Calls `each(slot, first word, words)` for some words of the bitmaps, from address `from` on, which
/// returns the word to go on at. Returns where to go on, or `None` at the end.
pub(crate) fn words_step(
    layout: &Layout,
    from: u64,
    words: usize,
    each: impl Fn(&Slot, usize, usize) -> usize,
) -> Option<u64> {
    let mut slots = layout.from(Scope::All, from);
    let slot = slots.next()?;
    let here = from.max(slot.start());
    // Steps begin on the word that holds the address, so an odd start only clears a word twice.
    let first = slot.page(here) / 64;
    let next = each(slot, first as usize, words) as u64;
    let past = (slot.start() + next.saturating_mul(64 * PAGE_SIZE)).min(slot.end());
    (past < slot.end() || slots.next().is_some()).then_some(past)
}
