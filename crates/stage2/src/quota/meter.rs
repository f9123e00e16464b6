//! One vCPU's accounts: what it dirtied or ran in this interval, how long it ran and waited in all.

use super::{Count, Duty, Limit, Ticks};
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use core::iter::Sum;

/// May a vCPU dirty a page now?
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Yes.
    Go,
    /// Not before this moment. It has not been let through then either: it is to ask again.
    StallUntil(Count),
}

/// May a vCPU run now?
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// As long as it likes.
    Free,
    /// Up to this moment, and then it asks again.
    Until(Count),
    /// Not before this moment.
    StallUntil(Count),
}

/// What the throttle cost a vCPU, or several added up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stalls {
    /// How often it had to wait.
    pub count: u64,
    /// How long, the wait that may be under way included.
    pub time: Ticks,
    /// The part of its time that it waits at present, in percent; of several vCPUs the largest.
    pub percent: u8,
}

impl Sum for Stalls {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            count: sum.count.saturating_add(one.count),
            time: Ticks(sum.time.0.saturating_add(one.time.0)),
            percent: sum.percent.max(one.percent),
        })
    }
}

/// What an interval is worth: pages or ticks, neither of the two zero.
#[derive(Clone, Copy)]
struct Terms {
    budget: u64,
    interval: u64,
}

impl From<Limit> for Terms {
    fn from(limit: Limit) -> Self {
        Self {
            budget: limit.pages(),
            interval: limit.interval().0,
        }
    }
}

impl From<Duty> for Terms {
    fn from(duty: Duty) -> Self {
        Self {
            budget: duty.run().0,
            interval: duty.interval().0,
        }
    }
}

impl Terms {
    /// The most that is remembered as spent: what the longest wait pays, and one less than a budget,
    /// so that a vCPU that waited has something to spend.
    fn most(self) -> u64 {
        self.budget
            .saturating_mul(Limit::LONGEST_STALL + 1)
            .saturating_sub(1)
    }
}

/// An account that is settled once an interval: each interval that began pays off one budget, and what
/// is not used is lost.
#[derive(Debug, Default)]
struct Account {
    /// The beginning of the interval that `spent` is of. Zero: it has not been in use.
    start: AtomicU64,
    spent: AtomicU64,
    /// The budget when it was settled last.
    budget: AtomicU64,
}

impl Account {
    const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            budget: AtomicU64::new(0),
        }
    }

    fn close(&self) {
        self.start.store(0, Relaxed);
        self.spent.store(0, Relaxed);
    }

    /// How many intervals ended since the account was settled last.
    fn behind(&self, terms: Terms, now: Count) -> u64 {
        now.0.saturating_sub(self.start.load(Relaxed)) / terms.interval
    }

    fn spend(&self, terms: Terms, amount: u64) {
        let spent = self.spent.load(Relaxed).saturating_add(amount);
        self.spent.store(spent.min(terms.most()), Relaxed);
    }

    /// Brings the account to the interval of `now`. Returns the interval's beginning and what is spent.
    ///
    /// The intervals since were lived under the old terms. What was spent within an old budget is not
    /// owed under a smaller one: it uses up the interval, no more.
    fn settle(&self, terms: Terms, now: Count) -> (u64, u64) {
        let mut start = self.start.load(Relaxed);
        let mut spent = self.spent.load(Relaxed);
        let budget = self.budget.load(Relaxed);
        let behind = self.behind(terms, now);
        // A little back is another CPU's clock: the interval is the same. More is a jump.
        if behind > 0 || start.saturating_sub(now.0) > terms.interval {
            start = now.0 - now.0 % terms.interval;
            spent = spent.saturating_sub(behind.saturating_mul(budget));
            self.start.store(start, Relaxed);
            self.spent.store(spent, Relaxed);
        }
        if budget != terms.budget {
            let owed = spent.saturating_sub(budget);
            let used = spent.min(budget).min(terms.budget);
            spent = used.saturating_add(owed);
            self.budget.store(terms.budget, Relaxed);
            self.spent.store(spent, Relaxed);
        }
        (start, spent.min(terms.most()))
    }
}

/// When an interval that began at `start` and of which `spent` is spent lets its vCPU on, if it does
/// not now: the first beginning of an interval with something left.
fn end_of_stall(terms: Terms, start: u64, spent: u64) -> Option<Count> {
    let intervals = spent / terms.budget;
    (intervals > 0).then(|| Count(start.saturating_add(intervals.saturating_mul(terms.interval))))
}

/// Adds up time in one word, so that a reader on another CPU never sees half of a change: with the
/// running bit, the count at which it would have begun to show what it shows now; else the sum.
/// Counts are modulo 2^63 in here. A clock that jumps back takes that much off, down to nothing.
#[derive(Debug, Default)]
struct Stopwatch(AtomicU64);

impl Stopwatch {
    const RUNNING: u64 = 1 << 63;
    const MASK: u64 = Self::RUNNING - 1;

    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn is_running(&self) -> bool {
        self.0.load(Relaxed) & Self::RUNNING != 0
    }

    fn start(&self, now: Count) {
        if !self.is_running() {
            let since = now.0.wrapping_sub(self.0.load(Relaxed)) & Self::MASK;
            self.0.store(Self::RUNNING | since, Relaxed);
        }
    }

    fn stop(&self, now: Count) {
        self.0.store(self.read(now).0, Relaxed);
    }

    fn read(&self, now: Count) -> Ticks {
        let word = self.0.load(Relaxed);
        if word & Self::RUNNING == 0 {
            return Ticks(word);
        }
        let sum = now.0.wrapping_sub(word) & Self::MASK;
        // The upper half is what lies before the beginning.
        Ticks(if sum > Self::MASK / 2 { 0 } else { sum })
    }
}

/// The accounts of one vCPU.
///
/// Its CPU says when it runs ([`entered`](Self::entered), [`left`](Self::left)) and when it waits
/// ([`stall_began`](Self::stall_began), [`stall_ended`](Self::stall_ended)), and asks whether it may.
#[derive(Debug, Default)]
pub struct Meter {
    /// Pages, under write protection.
    pages: Account,
    /// Run time, under DBM, and how much of `run` is in it.
    time: Account,
    paced: AtomicU64,
    run: Stopwatch,
    stall: Stopwatch,
    stalls: AtomicU64,
    /// `stall` when the present wait began.
    stalled_before: AtomicU64,
    /// When the last wait ended, and its part of the time since the one before.
    resumed: AtomicU64,
    percent: AtomicU64,
}

impl Meter {
    /// Makes the meter of a vCPU that neither runs nor waits.
    pub const fn new() -> Self {
        Self {
            pages: Account::new(),
            time: Account::new(),
            paced: AtomicU64::new(0),
            run: Stopwatch::new(),
            stall: Stopwatch::new(),
            stalls: AtomicU64::new(0),
            stalled_before: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            percent: AtomicU64::new(0),
        }
    }

    /// May the vCPU dirty pages? Asked at a write fault, before it is handled. A vCPU that may not waits
    /// and then writes, faults and asks again.
    pub fn admit(&self, limit: Limit, now: Count) -> Verdict {
        let terms = limit.into();
        let (start, spent) = self.pages.settle(terms, now);
        end_of_stall(terms, start, spent).map_or(Verdict::Go, Verdict::StallUntil)
    }

    /// Notes what a fault that was admitted dirtied: 1, or the pages of a block. More than is left is
    /// owed, up to [`Limit::LONGEST_STALL`] intervals.
    pub fn charge(&self, limit: Limit, pages: u64, now: Count) {
        let terms = limit.into();
        self.pages.settle(terms, now);
        self.pages.spend(terms, pages);
    }

    /// May the vCPU run? Asked under DBM when it gets its CPU, at the moment it was told, and when the
    /// [duty](super::Quota::duty) changes.
    pub fn pace(&self, duty: Option<Duty>, now: Count) -> Turn {
        let ran = self.run.read(now).0;
        let fresh = ran.saturating_sub(self.paced.swap(ran, Relaxed));
        let Some(duty) = duty else {
            self.time.close();
            return Turn::Free;
        };
        let terms = duty.into();
        // Whoever is held by its run time asks at least once an interval. What ran before that, ran free.
        if self.time.behind(terms, now) < 2 {
            self.time.spend(terms, fresh);
        }
        let (start, spent) = self.time.settle(terms, now);
        if let Some(end) = end_of_stall(terms, start, spent) {
            return Turn::StallUntil(end);
        }
        let spent_up = now.0.saturating_add(terms.budget.saturating_sub(spent));
        Turn::Until(Count(spent_up.min(start.saturating_add(terms.interval))))
    }

    /// The vCPU got its CPU.
    pub fn entered(&self, now: Count) {
        self.run.start(now);
    }

    /// The vCPU left its CPU, for whatever reason.
    pub fn left(&self, now: Count) {
        self.run.stop(now);
    }

    /// Returns how long it ran in all.
    pub fn ran(&self, now: Count) -> Ticks {
        self.run.read(now)
    }

    /// The vCPU waits because of its quota.
    pub fn stall_began(&self, now: Count) {
        if self.stall.is_running() {
            return;
        }
        self.stalled_before.store(self.stall.read(now).0, Relaxed);
        self.stall.start(now);
        self.stalls
            .store(self.stalls.load(Relaxed).saturating_add(1), Relaxed);
    }

    /// It waits no more: the time has come, the limit was lifted, or its VM is paused or gone.
    pub fn stall_ended(&self, now: Count) {
        if !self.stall.is_running() {
            return;
        }
        self.stall.stop(now);
        let stalled = self
            .stall
            .read(now)
            .0
            .saturating_sub(self.stalled_before.load(Relaxed));
        let cycle = now
            .0
            .saturating_sub(self.resumed.swap(now.0, Relaxed))
            .max(1);
        let percent = (stalled.saturating_mul(100) / cycle).min(100);
        self.percent.store(percent, Relaxed);
    }

    /// Returns what the throttle cost it. By the limit it is known for how long "at present" is.
    pub fn stalls(&self, limit: Option<Limit>, now: Count) -> Stalls {
        let current = limit.is_some_and(|limit| {
            let since = now.0.saturating_sub(self.resumed.load(Relaxed));
            self.stall.is_running() || since <= limit.interval().0
        });
        Stalls {
            count: self.stalls.load(Relaxed),
            time: self.stall.read(now),
            percent: if current {
                self.percent.load(Relaxed).min(100) as u8
            } else {
                0
            },
        }
    }
}
