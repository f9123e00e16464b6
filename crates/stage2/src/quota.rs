//! The throttle: how many pages a vCPU may dirty in an interval while a log is on.
//!
//! A log that only watches converges when the guest happens to be slow. Here a VM has at most one
//! [`Limit`], the same for each of its vCPUs, and each vCPU a [`Meter`] that says when it must wait. This
//! is policy alone: it is told the time and answers until when; who makes a vCPU wait is the caller.
//!
//! * **Write protection**: a write fault asks [`Meter::admit`] *before* it is handled and tells
//!   [`Meter::charge`] after. So the vCPU that writes waits, one that reads or writes what is dirty
//!   already does not, and a store that was let through is through. Stalling after the fault instead
//!   was rejected: harvests that come faster than stalls end would protect the page again each time,
//!   and the store would never happen.
//! * **DBM**: nothing faults. [`Quota::harvested`] turns what a harvest found into pages per tick of
//!   run time, and [`Meter::pace`] lets each vCPU run as much of each interval as that rate allows. The
//!   hardware does not say who wrote, so all vCPUs of the VM get the same share.
//!
//! # Run time, not wall time
//!
//! The rate is per tick that vCPUs *ran*. Per tick of wall time, a throttled guest would look like a
//! slow one, be let go, look fast, and be throttled again. Found pages grow with run time, but ever more
//! slowly (a page counts once an epoch): then `share * quota / found` approaches its aim from one side
//! and does not swing. A higher rate is believed at once, a lower one by half a harvest: a guest that
//! works in bursts is not let go in each pause, and the pages of a harvest exceed the quota by no more
//! than the factor by which the guest became faster since the one before.
//!
//! # What holds
//!
//! * A vCPU that dirties no more than its quota in any span of one interval never waits.
//! * No wait is longer than [`Limit::LONGEST_STALL`] intervals, and one more if the clock went back.
//! * Under write protection, of charges of at most `c` pages and a quota of `q`, `n` intervals see at
//!   most `n * q + c - 1`; with `c` beyond `4 * q`, at most one charge in four intervals.
//!   A vCPU that waited may dirty at least one page then.
//! * Under DBM each vCPU that wants to runs at least a hundredth of each interval, on average.
//! * All arithmetic saturates; no value of any argument panics or divides by zero.
//!
//! # Concurrency
//!
//! A [`Quota`] may be changed at any time by anyone; a vCPU sees it at its next fault or turn. A meter's
//! accounts are written by the CPU its vCPU is on, handed over with the vCPU itself. Everybody may read.
//! Nothing here orders anything else, so all is relaxed. Intervals begin at multiples of their length on
//! the counter, so that vCPUs on different CPUs run and wait together: one that waits with a guest's
//! lock held costs the others their turn.

mod meter;

pub use meter::{Meter, Stalls, Turn, Verdict};

use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use core::num::{NonZeroU32, NonZeroU64};

/// A reading of the counter (CNTPCT_EL0 and its like).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Count(pub u64);

/// A span of the counter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Ticks(pub u64);

/// What each vCPU of a VM may dirty: pages in an interval.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Limit {
    pages: NonZeroU32,
    interval: NonZeroU32,
}

impl Limit {
    /// How many intervals a wait lasts at most. What a vCPU owes beyond that is forgiven: a first write
    /// to each of a few 2 MiB blocks must not stop a guest for minutes.
    pub const LONGEST_STALL: u64 = 4;

    /// Checks a limit, or `None` if it is none: no page at all, or an interval that is zero or does not
    /// fit 32 bits (four seconds at 1 GHz). Pages beyond 32 bits are as good as any such number.
    pub fn new(pages: u64, interval: Ticks) -> Option<Self> {
        Some(Self {
            pages: NonZeroU32::new(u32::try_from(pages).unwrap_or(u32::MAX))?,
            interval: NonZeroU32::new(u32::try_from(interval.0).ok()?)?,
        })
    }

    /// Returns the pages a vCPU may dirty in an interval.
    pub fn pages(self) -> u64 {
        self.pages.get().into()
    }

    /// Returns the length of an interval.
    pub fn interval(self) -> Ticks {
        Ticks(self.interval.get().into())
    }

    /// One word, so that nobody sees the pages of one limit with the interval of another. Zero is none.
    fn pack(self) -> u64 {
        self.pages() << 32 | self.interval().0
    }

    fn unpack(word: u64) -> Option<Self> {
        Some(Self {
            pages: NonZeroU32::new((word >> 32) as u32)?,
            interval: NonZeroU32::new(word as u32)?,
        })
    }
}

/// How much of each interval a vCPU may run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Duty {
    run: u64,
    interval: NonZeroU32,
}

impl Duty {
    /// The least share, one in so many: the guest stays alive, and goes on being measured.
    const FLOOR: u64 = 100;

    /// Returns the part of the interval to run: at least a hundredth, less than all of it.
    pub fn run(self) -> Ticks {
        Ticks(self.run)
    }

    /// Returns the length of an interval.
    pub fn interval(self) -> Ticks {
        Ticks(self.interval.get().into())
    }

    /// Returns the part to wait, in percent: 1 to 99.
    pub fn throttle_percent(self) -> u8 {
        let percent = 100 - self.run * 100 / self.interval().0;
        percent.clamp(1, 99) as u8
    }
}

/// Pages in 2^40 ticks of run time: fine enough for one page in the longest interval.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Rate(u64);

impl Rate {
    const SHIFT: u32 = 40;

    fn of(found: u64, ran: NonZeroU64) -> Self {
        let rate = (u128::from(found) << Self::SHIFT) / u128::from(ran.get());
        Self(u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// The rate at which a limit is down to its floor: beyond it, no rate makes a difference.
    fn of_floor(limit: Limit) -> Self {
        let interval = NonZeroU64::from(limit.interval);
        Self::of(limit.pages() * Duty::FLOOR, interval)
    }

    /// How long it takes to dirty so many pages.
    fn time_for(self, pages: u64) -> Option<u64> {
        let time = (u128::from(pages) << Self::SHIFT).checked_div(self.0.into())?;
        Some(u64::try_from(time).unwrap_or(u64::MAX))
    }
}

/// The limit of a VM, if it has one, and how fast its vCPUs dirty pages by the last harvest.
#[derive(Debug, Default)]
pub struct Quota {
    limit: AtomicU64,
    rate: AtomicU64,
    /// Of harvests that together are shorter than an interval: pages, run time, length.
    found: AtomicU64,
    ran: AtomicU64,
    span: AtomicU64,
}

impl Quota {
    /// Makes a quota without a limit.
    pub const fn new() -> Self {
        Self {
            limit: AtomicU64::new(0),
            rate: AtomicU64::new(0),
            found: AtomicU64::new(0),
            ran: AtomicU64::new(0),
            span: AtomicU64::new(0),
        }
    }

    /// Returns whether there is a limit. One load and a comparison: all that a fault costs if there is none.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.limit.load(Relaxed) != 0
    }

    /// Returns the limit in force.
    pub fn limit(&self) -> Option<Limit> {
        Limit::unpack(self.limit.load(Relaxed))
    }

    /// Puts a limit in force, changes it, or lifts it with `None`. The caller then wakes the vCPUs that
    /// wait: those that still have to say so when they ask again.
    pub fn set(&self, limit: Option<Limit>) {
        self.limit.store(limit.map_or(0, Limit::pack), Relaxed);
    }

    /// Takes in a harvest under DBM: `found` pages dirty, after vCPUs `ran` so many ticks, all of them
    /// added up ([`Meter::ran`]), in a `span` of wall time since the harvest before. If run times are
    /// not known, the span times the vCPUs, less what they stalled, is the next best.
    ///
    /// Harvests that follow each other faster than the interval are judged together: in a piece of an
    /// interval, everybody ran or everybody waited. What was found while nobody ran no vCPU wrote.
    ///
    /// One harvest at a time calls this. Returns what [`duty`](Self::duty) says from now on; the caller
    /// has the vCPUs take a new turn ([`Meter::pace`]) if it changed.
    pub fn harvested(&self, found: u64, ran: Ticks, span: Ticks) -> Option<Duty> {
        let found = found.saturating_add(self.found.load(Relaxed));
        let ran = ran.0.saturating_add(self.ran.load(Relaxed));
        let span = span.0.saturating_add(self.span.load(Relaxed));
        let limit = self.limit();
        if limit.is_some_and(|limit| span < limit.interval().0) {
            self.found.store(found, Relaxed);
            self.ran.store(ran, Relaxed);
            self.span.store(span, Relaxed);
            return self.duty();
        }
        self.forget_pieces();
        if let Some(ran) = NonZeroU64::new(ran) {
            let before = Rate(self.rate.load(Relaxed));
            let held = limit.map_or(Rate(0), |limit| before.min(Rate::of_floor(limit)));
            let rate = Rate::of(found, ran).max(Rate(held.0 / 2));
            self.rate.store(rate.0, Relaxed);
        }
        self.duty()
    }

    /// Forgets what harvests told: the log was started, was stopped, or goes on without DBM. Nobody is
    /// held by run time any more; the limit stays, for the next log or for write faults.
    pub fn forget_harvests(&self) {
        self.rate.store(0, Relaxed);
        self.forget_pieces();
    }

    fn forget_pieces(&self) {
        self.found.store(0, Relaxed);
        self.ran.store(0, Relaxed);
        self.span.store(0, Relaxed);
    }

    /// Returns how much of each interval a vCPU may run, or `None` if all of it: without a limit,
    /// without a harvest under DBM, or with a guest slow enough.
    pub fn duty(&self) -> Option<Duty> {
        let limit = self.limit()?;
        let interval = limit.interval().0;
        let run = Rate(self.rate.load(Relaxed)).time_for(limit.pages())?;
        let run = run.max(interval.div_ceil(Duty::FLOOR));
        (run < interval).then_some(Duty {
            run,
            interval: limit.interval,
        })
    }
}
