//! Which engine the next round is best served by, and bringing the leaves over to it.
//!
//! The hardware's dirty state costs the guest nothing and each harvest a look at every leaf; write
//! protection costs the guest a fault for every page it writes and a harvest next to nothing. So the
//! first is for the long rounds and the second for the last ones, when few pages are left: the harvest
//! that the guest stands still for reads the live bits and no table. A host need not know: it takes
//! epochs, and calls [`adapt_engine`](Stage2::adapt_engine) after each, or has EL2 do so.
//!
//! After a change of engine leaves of both are about. That is correct as it is, because a harvest meets
//! every leaf and brings it over; but it may be the last harvest, and that should not. So
//! [`bring_over`](Stage2::bring_over) does it ahead, while the guest runs and the host is busy with what
//! it took. A leaf that is dirty stays so and its page is noted, the leaf first, as a write fault does:
//! what it then is, is what write protection makes of a page that was written.
//!
//! # Concurrency
//!
//! Both hold the control mutex, for one bounded step, and never while a harvest collects. Faults, guests
//! and the hardware change leaves meanwhile; each change here is one compare-and-swap.

use crate::control::{Control, Leaves, Phase, TakePass};
use crate::error::Error;
use crate::hardware::Hardware;
use crate::pte::{Kind, Permission, Pte};
use crate::slot::Slot;
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Engine, Level, Progress};

/// What a write fault costs, in leaves that a harvest looks at: a fault is worth a level-3 table.
///
/// Both are about 1 us on the machines there are figures of: 2.4 ns a leaf were published for a scan, and
/// a microsecond and more for an abort with its local invalidation. In instructions of this program it
/// is some 500 against 1 to 2 a leaf. Which of them is off by two does not matter: rounds shrink by more.
const FAULT: u64 = 512;

/// How much worse than at the change a round must be before the engine is changed back.
///
/// A change there and one back visit every leaf twice and write to it, which is worth about eight scans.
/// At four times the limit the faults of three rounds have paid for that.
const BACK: u64 = 4;

/// What one harvest met.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Round {
    /// Leaves found dirty. Under write protection each was a fault; under the other engine it would
    /// have been.
    pub(crate) dirty: u64,
    /// Level-3 leaves that a harvest under the hardware's dirty state looks at.
    pub(crate) leaves: u64,
    /// Of these, the ones this harvest did look at.
    pub(crate) read: u64,
}

impl Round {
    pub(crate) fn add(&mut self, other: Round) {
        self.dirty += other.dirty;
        self.leaves += other.leaves;
        self.read += other.read;
    }

    /// Returns the engine for the next round, if it is much like this one, which was under `now`.
    ///
    /// Blocks alone cost a scan nothing worth a fault, so without level-3 leaves the hardware does it.
    pub(crate) const fn suits(self, now: Engine) -> Engine {
        let faults = self.dirty.saturating_mul(FAULT);
        match now {
            Engine::Dbm if faults < self.leaves => Engine::WriteProtect,
            Engine::WriteProtect if faults > self.leaves.saturating_mul(BACK) => Engine::Dbm,
            same => same,
        }
    }
}

impl<H: Hardware> Stage2<H> {
    /// Changes the engine of a running log. Both engines log the same pages. The next harvest brings
    /// the leaves over one by one; [`bring_over`](Self::bring_over) spares it that.
    ///
    /// # Errors
    ///
    /// [`Error::NotLogging`], [`Error::EngineUnavailable`], [`Error::Busy`] while a start or stop
    /// or another CPU's step is under way, [`Error::TakeUnfinished`] in the middle of a harvest.
    pub fn set_engine(&self, engine: Engine) -> Result<(), Error> {
        if engine == Engine::Dbm && !self.features.dbm.is_present() {
            return Err(Error::EngineUnavailable);
        }
        let mut control = self.control.lock();
        self.switch(&mut control, |_, _| engine).map(|_| ())
    }

    /// Changes the engine to what the last harvest says is best, if it is another, and returns which it
    /// is now. Call it after a take, and [`bring_over`](Self::bring_over) when it changed.
    ///
    /// Each harvest is judged once, so calling it more often does nothing. On a machine without usable
    /// dirty state it is write protection for ever.
    ///
    /// # Errors
    ///
    /// As [`set_engine`](Self::set_engine); the engine is then as it was.
    pub fn adapt_engine(&self) -> Result<Engine, Error> {
        let mut control = self.control.lock();
        self.switch(&mut control, |now, judged| match judged {
            Some(round) if self.features.dbm.is_present() => round.suits(now),
            _ => now,
        })
    }

    /// Changes the engine to what `choose` says of the one it is and of the last harvest.
    fn switch(
        &self,
        control: &mut Control,
        choose: impl FnOnce(Engine, Option<Round>) -> Engine,
    ) -> Result<Engine, Error> {
        let Some(mode) = &mut control.mode else {
            return Err(Error::NotLogging);
        };
        if control.phase != Phase::On {
            return Err(Error::Busy);
        }
        if let Some(taking) = control.taking
            && taking.pass != TakePass::Taken
        {
            return Err(Error::TakeUnfinished(taking.epoch));
        }
        if !control.claims.are_idle() {
            return Err(Error::Busy);
        }
        let engine = choose(mode.engine, control.judged.take());
        if mode.engine != engine {
            mode.engine = engine;
            // When this is through, no fault that saw the old engine is still on its way to a leaf.
            self.layouts.change(|layout| {
                if let Some(log) = &mut layout.log {
                    log.mode.engine = engine;
                }
            });
            control.leaves = match control.leaves {
                Leaves::Unarmed { .. } => Leaves::Unarmed { from: 0 },
                Leaves::OfTheEngine | Leaves::Mixed { .. } => Leaves::Mixed { from: 0 },
            };
        }
        Ok(engine)
    }

    /// After a change of engine, brings the leaves over in bounded steps; call it until it is done. It
    /// need not be called: a harvest that finds leaves of the other engine does it, for as long as it
    /// takes to change every leaf.
    ///
    /// # Errors
    ///
    /// [`Error::NotLogging`], [`Error::Busy`] while a start or stop is under way.
    pub fn bring_over(&self) -> Result<Progress, Error> {
        let Some(mut control) = self.control.try_lock() else {
            return Ok(self.somebody_else_steps());
        };
        let engine = match (control.phase, control.mode) {
            (Phase::On, Some(mode)) => mode.engine,
            (Phase::Off, _) => return Err(Error::NotLogging),
            _ => return Err(Error::Busy),
        };
        let Leaves::Mixed { from } = control.leaves else {
            return Ok(Progress::Done);
        };
        if control
            .taking
            .is_some_and(|taking| taking.pass != TakePass::Taken)
        {
            // The harvest does it.
            return Ok(Progress::Done);
        }
        if !control.claims.are_idle() {
            return Ok(self.somebody_else_steps());
        }
        let (layout, scope) = (self.layout(), control.scope);
        let each = |slot: &Slot, ipa, entry: &AtomicU64, level| {
            let dirty = bring(entry, level, engine).is_some_and(Pte::is_dirty);
            if dirty {
                slot.dirty.mark(slot.page(ipa));
            }
        };
        let Some(next) = self.leaves_step(&layout, scope, from, each) else {
            control.leaves = Leaves::OfTheEngine;
            // The barrier for other CPUs' writes was theirs. Nothing would be lost without this, but each
            // CPU would find out about each leaf by itself.
            self.tlb().everything();
            return Ok(Progress::Done);
        };
        self.hw.dsb_ishst();
        control.leaves = Leaves::Mixed { from: next };
        let (done, total) = layout.progress(scope, next);
        Ok(Progress::More { done, total })
    }
}

/// Makes a tracked leaf one of `engine`, dirty or clean as it is, and returns what it was. Ends because
/// the hardware changes a leaf once in a round.
fn bring(entry: &AtomicU64, level: Level, engine: Engine) -> Option<Pte> {
    let old = entry.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |seen| {
        let seen = Pte(seen);
        let state = match seen.kind(level) {
            Kind::Leaf if seen.is_dirty() => Permission::Dirty(engine),
            Kind::Leaf if seen.is_clean() => Permission::Clean(engine),
            _ => return None,
        };
        Some(seen.with(state).0)
    });
    old.ok().map(Pte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 GiB in pages.
    const LEAVES: u64 = 16 << 20;

    fn round(dirty: u64, leaves: u64) -> Round {
        Round {
            dirty,
            leaves,
            read: 0,
        }
    }

    #[test]
    fn few_pages_are_for_write_protection_and_many_for_the_hardware() {
        let limit = LEAVES / FAULT;
        assert_eq!(
            round(limit - 1, LEAVES).suits(Engine::Dbm),
            Engine::WriteProtect
        );
        assert_eq!(round(limit, LEAVES).suits(Engine::Dbm), Engine::Dbm);
        assert_eq!(round(0, LEAVES).suits(Engine::Dbm), Engine::WriteProtect);
        let back = BACK * limit;
        assert_eq!(
            round(back, LEAVES).suits(Engine::WriteProtect),
            Engine::WriteProtect
        );
        assert_eq!(
            round(back + 1, LEAVES).suits(Engine::WriteProtect),
            Engine::Dbm
        );
    }

    #[test]
    fn a_rate_between_the_two_limits_changes_nothing() {
        for dirty in LEAVES / FAULT..=BACK * LEAVES / FAULT {
            for engine in [Engine::Dbm, Engine::WriteProtect] {
                assert_eq!(round(dirty, LEAVES).suits(engine), engine, "{dirty}");
            }
        }
    }

    #[test]
    fn blocks_alone_are_for_the_hardware() {
        assert_eq!(round(0, 0).suits(Engine::Dbm), Engine::Dbm);
        assert_eq!(round(1, 0).suits(Engine::WriteProtect), Engine::Dbm);
    }

    #[test]
    fn no_number_is_too_large() {
        assert_eq!(round(u64::MAX, u64::MAX).suits(Engine::Dbm), Engine::Dbm);
        assert_eq!(
            round(0, u64::MAX).suits(Engine::WriteProtect),
            Engine::WriteProtect
        );
    }
}
