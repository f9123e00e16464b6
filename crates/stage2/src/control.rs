//! Where the long operations are: starting, harvesting, stopping.
//!
//! One mutex. Starting and stopping hold it for one bounded step, and a second CPU that steps meanwhile
//! does not wait: it is told there is more to do. A harvest holds it for its first step, and then only to
//! claim a stretch of guest memory and to hand in what it found there, so that as many CPUs harvest as step.
//! Cursors are guest addresses, not indices, so slots may come and go between steps.
//!
//! Lock order: this mutex, then a copy of the layout. The fault path takes only the latter.

use crate::engine::Round;
use crate::slot::{Layout, LogMode, Scope, Slot};
use crate::tlb::Pending;
use crate::types::{Epoch, Level, PAGE_SIZE, SlotId};

/// The life of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Off,
    Starting(StartPass),
    On,
    Stopping(StopPass),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StartPass {
    /// Forgetting what an earlier log left; nothing is tracked yet.
    Clear(u64),
    /// Taking the write permission away, or splitting.
    Arm(u64),
    /// Noting every page, where nothing is armed before it is taken.
    Fill(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StopPass {
    /// Giving the write permission back.
    Release(u64),
    /// Making blocks of the level.
    Collapse(Level, u64),
}

/// A harvest that is not settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taking {
    pub(crate) epoch: Epoch,
    /// What it is of, if not of all that is logged.
    pub(crate) part: Option<Part>,
    pub(crate) pass: TakePass,
}

/// Some pages of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) slot: SlotId,
    pub(crate) first: u64,
    pub(crate) pages: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TakePass {
    /// Forgetting the committed epoch before.
    Clear,
    /// Giving the aborted epoch before back to the live bits, from an address on.
    GiveBack(u64),
    /// Collecting, as [`Claims`] says.
    Scan,
    /// With the host.
    Taken,
}

/// What a log takes a page for when it starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Initially {
    /// For clean: every leaf is armed before the log is on.
    Clean,
    /// For dirty: nothing is armed before it was taken once.
    Dirty,
}

/// How the last epoch ended, kept so that a repeated request gets the same answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    Committed,
    Aborted,
}

/// Which leaves a harvest must look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Leaves {
    /// All are of the log's engine.
    OfTheEngine,
    /// The engine was changed: the next harvest looks at every leaf and brings it over. Those below
    /// `from` were brought over already.
    Mixed { from: u64 },
    /// Nothing was armed when the log started, and leaves that no harvest came to are not yet: whoever
    /// takes a page's bit arms its leaf. Those below `from` are armed, and of the engine.
    Unarmed { from: u64 },
}

/// A stretch of guest memory within one slot, from an address to before another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stretch {
    pub(crate) from: u64,
    pub(crate) end: u64,
}

impl Stretch {
    pub(crate) const ALL: Self = Self {
        from: 0,
        end: u64::MAX,
    };
}

/// Where a harvest looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ground {
    /// Everywhere.
    All,
    /// Where live bits are.
    Live,
}

/// What of a harvest is given out, and what is still to be.
///
/// Whoever asks gets what another one left before anything new, so there are never more stretches
/// about than CPUs that harvest.
pub(crate) struct Claims {
    ground: Ground,
    /// All before was given out: where the harvest ends, once nothing is left to give out.
    next: u64,
    limit: u64,
    /// Pages there were to give out.
    pages: u64,
    /// How long a stretch is, a power of two.
    stretch: u64,
    /// What was left of stretches, as many as `kept`.
    left: [Stretch; Self::MOST],
    kept: usize,
    /// Stretches that somebody is at.
    working: usize,
}

impl Claims {
    const MOST: usize = 64;
    /// The shortest stretch, so that the mutex is taken seldom, and the longest, so that little is left
    /// to one CPU at the end.
    const SHORTEST: u64 = 32 << 20;
    const LONGEST: u64 = 1 << 30;
    /// Stretches for each CPU, where that is between the two.
    const SHARES: u64 = 16;

    const fn new() -> Self {
        Self {
            ground: Ground::All,
            next: 0,
            limit: u64::MAX,
            pages: 0,
            stretch: Self::SHORTEST,
            left: [Stretch::ALL; Self::MOST],
            kept: 0,
            working: 0,
        }
    }

    /// Begins, with the `pages` there are `within` to give out to `cpus`. Nobody is at a stretch of another
    /// harvest any more.
    pub(crate) fn begin(&mut self, ground: Ground, within: Stretch, pages: u64, cpus: usize) {
        let share = pages.saturating_mul(PAGE_SIZE) / (Self::SHARES * cpus.max(1) as u64);
        self.ground = ground;
        self.next = within.from;
        self.limit = within.end;
        self.pages = pages;
        self.stretch = share
            .clamp(Self::SHORTEST, Self::LONGEST)
            .next_power_of_two();
        self.kept = 0;
    }

    /// Gives out a stretch, if any is left.
    pub(crate) fn claim(&mut self, layout: &Layout, scope: Scope) -> Option<Stretch> {
        let last = self.kept.checked_sub(1);
        let stretch = match last.and_then(|last| self.left.get(last)) {
            Some(left) => {
                self.kept -= 1;
                *left
            }
            None => {
                let (slot, from) = self.next(layout, scope)?;
                let end = ((from & !(self.stretch - 1)) + self.stretch)
                    .min(slot.end())
                    .min(self.limit);
                self.next = end;
                Stretch { from, end }
            }
        };
        self.working += 1;
        Some(stretch)
    }

    /// Returns where there is something to give out. A slot that comes after there was nothing is left to
    /// the next harvest, as is one that comes in front of the cursor.
    fn next<'a>(&mut self, layout: &'a Layout, scope: Scope) -> Option<(&'a Slot, u64)> {
        if self.next >= self.limit {
            return None;
        }
        let place = |slot: &'a Slot| {
            let here = self.next.max(slot.start());
            let here = match self.ground {
                Ground::All => here,
                Ground::Live => slot.address(slot.dirty.next_due(slot.page(here))),
            };
            (here < slot.end()).then_some((slot, here))
        };
        let next = layout.from(scope, self.next).find_map(place);
        let next = next.filter(|(_, here)| *here < self.limit);
        if next.is_none() {
            self.next = self.limit;
        }
        next
    }

    /// Takes back what is left of a stretch.
    pub(crate) fn hand_in(&mut self, left: Option<Stretch>) {
        self.working = self.working.saturating_sub(1);
        let Some(left) = left else { return };
        match self.left.get_mut(self.kept) {
            Some(place) => {
                *place = left;
                self.kept += 1;
            }
            // More CPUs than places: a part is looked at twice.
            None => self.next = self.next.min(left.from),
        }
    }

    /// Is nobody at work?
    pub(crate) const fn are_idle(&self) -> bool {
        self.working == 0
    }

    /// Was everything given out?
    pub(crate) fn are_given_out(&mut self, layout: &Layout, scope: Scope) -> bool {
        self.kept == 0 && (self.next >= self.limit || self.next(layout, scope).is_none())
    }

    /// Returns the address up to which everything was given out.
    pub(crate) const fn reached(&self) -> u64 {
        self.next
    }

    /// Returns how many pages there were to give out.
    pub(crate) const fn pages(&self) -> u64 {
        self.pages
    }
}

pub(crate) struct Control {
    pub(crate) phase: Phase,
    pub(crate) mode: Option<LogMode>,
    pub(crate) scope: Scope,
    pub(crate) initially: Initially,
    pub(crate) taking: Option<Taking>,
    pub(crate) claims: Claims,
    pub(crate) last: Option<(Epoch, Fate)>,
    pub(crate) last_committed: Option<Epoch>,
    /// From this address on, the in-flight bitmaps still hold a committed epoch that was too large to be
    /// forgotten by the commit. The next take does it piece by piece, or the one after that if it is given up
    /// meanwhile. An aborted epoch is simply not forgotten: what it held counts for the next one.
    pub(crate) stale: Option<u64>,
    pub(crate) leaves: Leaves,
    /// What the harvest under way has met so far.
    pub(crate) round: Round,
    /// What the last one met that was done, until an engine was chosen by it.
    pub(crate) judged: Option<Round>,
    pub(crate) pending: Pending,
}

impl Control {
    pub(crate) const fn new() -> Self {
        Self {
            phase: Phase::Off,
            mode: None,
            scope: Scope::All,
            initially: Initially::Clean,
            taking: None,
            claims: Claims::new(),
            last: None,
            last_committed: None,
            stale: None,
            leaves: Leaves::OfTheEngine,
            round: Round {
                dirty: 0,
                leaves: 0,
                read: 0,
            },
            judged: None,
            pending: Pending::new(),
        }
    }

    /// Without a log, and else as it is. Epochs grow as long as the VM lives, so that one that was given
    /// up stays so.
    pub(crate) fn without_log(&self) -> Self {
        Self {
            last: self.last,
            stale: self.stale,
            ..Self::new()
        }
    }
}

/// The stage a log is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogStage {
    /// Off.
    Off,
    /// Being started; not to be relied on yet.
    Starting,
    /// On.
    On,
    /// Being stopped.
    Stopping,
}

/// What a log is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogStatus {
    /// The stage.
    pub stage: LogStage,
    /// How it works, while it is not off.
    pub mode: Option<LogMode>,
    /// The epoch being taken or with the host.
    pub outstanding: Option<Epoch>,
    /// The last epoch committed since the start.
    pub last_committed: Option<Epoch>,
    /// Pages noted and not yet with the host. A lower bound: what the hardware or a dirty block
    /// knows is found by the next take.
    pub live_pages: u64,
}
