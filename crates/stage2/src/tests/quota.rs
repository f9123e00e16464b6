//! The throttle against simulated guests, and against arbitrary callers. One tick is a microsecond.

mod any;
mod dbm;

use super::world::{P2M, RAM, World, fault};
use crate::quota::*;
use crate::types::{Access, Engine, Granularity, Level, PAGE_SIZE};
use crate::{FaultAccess, FaultKind, Features, Outcome};
use proptest::prelude::*;
use std::boxed::Box;
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::vec::Vec;
use std::{thread, vec};

const MS: u64 = 1000;
/// The interval of the tests with one.
const T: u64 = 100 * MS;

fn limit(pages: u64, interval: u64) -> Limit {
    Limit::new(pages, Ticks(interval)).unwrap()
}

fn quota(limit: Limit) -> Quota {
    let quota = Quota::new();
    quota.set(Some(limit));
    quota
}

/// Dirties pages one by one until the meter says to wait; says how many, and until when.
fn burst(meter: &Meter, limit: Limit, now: u64) -> (u64, u64) {
    for pages in 0.. {
        match meter.admit(limit, Count(now)) {
            Verdict::Go => meter.charge(limit, 1, Count(now)),
            Verdict::StallUntil(end) => return (pages, end.0),
        }
    }
    unreachable!()
}

#[test]
fn a_limit_is_pages_in_an_interval_or_it_is_none() {
    for (pages, interval, is) in [
        (0, 1, None),
        (1, 0, None),
        (0, 0, None),
        (1, 1, Some((1, 1))),
        (7, u64::from(u32::MAX), Some((7, u64::from(u32::MAX)))),
        (7, 1 << 32, None),
        (7, u64::MAX, None),
        (u64::MAX, 5, Some((u64::from(u32::MAX), 5))),
    ] {
        let limit = Limit::new(pages, Ticks(interval));
        assert_eq!(limit.map(|l| (l.pages(), l.interval().0)), is);
        // And so it comes back out of a quota.
        let quota = Quota::new();
        quota.set(limit);
        assert_eq!(quota.limit(), limit);
        quota.set(None);
        assert_eq!(quota.limit(), None);
    }
}

#[test]
fn a_fault_says_what_is_charged_for_it() {
    const IPA: u64 = 0x4000_0000;
    let world = World::new(Features::BASELINE);
    world.slot(0, IPA, 2 * P2M, Access::ReadWrite, RAM);
    let page = |page: u64, access, kind| {
        let abort = fault(IPA + page * PAGE_SIZE, access, kind);
        world.stage2.handle_fault(abort)
    };
    use FaultAccess::{Read, Write};
    use FaultKind::{Permission, Translation};
    // Without a log nothing is.
    assert_eq!(page(0, Write, Translation), Outcome::Resume);
    world.start(Engine::WriteProtect, Granularity::Adaptive);
    // A block that is put in by a write, and one that was there: all of it.
    assert_eq!(page(P2M, Write, Translation), Outcome::Dirtied(Level::L2));
    assert_eq!(page(1, Write, Permission), Outcome::Dirtied(Level::L2));
    // Whoever comes second pays nothing, nor does a reader.
    assert_eq!(page(2, Write, Permission), Outcome::Resume);
    assert_eq!(page(3, Read, Permission), Outcome::Resume);
    world.harvest();
    // What was dirty is split by now.
    assert_eq!(page(1, Write, Permission), Outcome::Dirtied(Level::L3));
    assert_eq!(page(1, Write, Permission), Outcome::Resume);
    world.stop();
    assert_eq!(page(4, Write, Permission), Outcome::Resume);
}

#[test]
fn without_a_limit_nobody_waits() {
    let quota = Quota::new();
    assert_eq!(quota.limit(), None);
    assert_eq!(quota.harvested(u64::MAX, Ticks(1), Ticks(1)), None);
    assert_eq!(quota.duty(), None);
    let meter = Meter::new();
    assert_eq!(meter.pace(quota.duty(), Count(5)), Turn::Free);
    assert_eq!(meter.stalls(None, Count(5)), Stalls::default());
}

#[test]
fn the_page_after_the_last_of_the_quota_waits_for_the_next_interval() {
    let meter = Meter::new();
    let limit = limit(10, T);
    let start = 7 * T;
    assert_eq!(burst(&meter, limit, start + 3), (10, start + T));
    // Whoever asks too early is told the same.
    let early = meter.admit(limit, Count(start + T - 1));
    assert_eq!(early, Verdict::StallUntil(Count(start + T)));
    assert_eq!(burst(&meter, limit, start + T), (10, start + 2 * T));
}

#[test]
fn idle_intervals_are_no_credit() {
    let meter = Meter::new();
    let limit = limit(10, T);
    meter.charge(limit, 1, Count(T));
    assert_eq!(burst(&meter, limit, 1000 * T).0, 10);
    assert_eq!(burst(&meter, limit, 2000 * T).0, 10);
}

#[test]
fn what_was_too_much_is_paid_by_the_intervals_that_follow() {
    for (pages, quota, stall, left) in [
        (512, 512, 1, 512),
        (512, 500, 1, 488),
        (512, 200, 2, 88),
        (512, 128, 4, 128),
        // Forgiven from here on, but for what the longest wait pays.
        (512, 100, 4, 1),
        (512, 10, 4, 1),
        (512, 1, 4, 1),
        (u64::MAX, 10, 4, 1),
        (u64::MAX, u64::from(u32::MAX), 4, 1),
    ] {
        let meter = Meter::new();
        let limit = limit(quota, T);
        meter.charge(limit, pages, Count(3 * T + 1));
        let end = (3 + stall) * T;
        assert_eq!(
            meter.admit(limit, Count(3 * T + 2)),
            Verdict::StallUntil(Count(end)),
            "{pages} of {quota}"
        );
        if quota < 1000 {
            assert_eq!(burst(&meter, limit, end).0, left, "{pages} of {quota}");
        }
    }
}

#[test]
fn a_limit_may_change_while_a_vcpu_waits() {
    let meter = Meter::new();
    let tight = limit(10, T);
    assert_eq!(burst(&meter, tight, T), (10, 2 * T));
    // More pages: what it has is counted against them.
    assert_eq!(burst(&meter, limit(30, T), T + 1), (20, 2 * T));
    // Shorter intervals: those that are over by now have paid.
    assert_eq!(burst(&meter, limit(30, 10), T + 25), (30, T + 30));
    // Fewer pages: those spent were allowed, so the interval is used up and nothing is owed.
    assert_eq!(burst(&meter, limit(30, T), 3 * T), (30, 4 * T));
    assert_eq!(burst(&meter, limit(1, T), 3 * T + 1), (0, 4 * T));
    assert_eq!(burst(&meter, limit(1, T), 4 * T), (1, 5 * T));
    // What was owed before still is.
    meter.charge(limit(10, T), 25, Count(6 * T));
    assert_eq!(burst(&meter, limit(5, T), 6 * T), (0, 10 * T));
}

#[test]
fn a_clock_that_goes_back_a_little_is_in_the_same_interval() {
    let meter = Meter::new();
    let limit = limit(10, T);
    assert_eq!(burst(&meter, limit, 5 * T + 1), (10, 6 * T));
    assert_eq!(burst(&meter, limit, 5 * T - 1), (0, 6 * T));
    assert_eq!(burst(&meter, limit, 6 * T), (10, 7 * T));
}

#[test]
fn a_clock_that_jumps_holds_nobody() {
    let meter = Meter::new();
    let limit = limit(10, T);
    let late = u64::MAX - T;
    assert_eq!(burst(&meter, limit, late).0, 10);
    // Back to the beginning: what was spent is spent in this interval.
    assert_eq!(burst(&meter, limit, 5), (0, T));
    assert_eq!(burst(&meter, limit, T), (10, 2 * T));
    // And to the end of time, where an end that cannot be told is the last moment.
    let last = meter.admit(limit, Count(u64::MAX));
    assert_eq!(last, Verdict::Go);
    assert_eq!(burst(&meter, limit, u64::MAX), (10, u64::MAX));
}

#[test]
fn stalls_are_counted_and_shown_while_they_last() {
    let meter = Meter::new();
    let held = Some(limit(10, T));
    meter.stall_began(Count(T));
    meter.stall_began(Count(T + 5));
    let stalls = meter.stalls(held, Count(T + 50));
    assert_eq!((stalls.count, stalls.time), (1, Ticks(50)));
    meter.stall_ended(Count(2 * T));
    meter.stall_ended(Count(3 * T));
    assert_eq!(meter.stalls(held, Count(5 * T)).time, Ticks(T));
    // Nine tenths of each interval from here on.
    for n in 3..6 {
        meter.stall_began(Count(n * T + T / 10));
        meter.stall_ended(Count(n * T + T));
    }
    let stalls = meter.stalls(held, Count(6 * T + 1));
    assert_eq!(stalls.count, 4);
    assert_eq!(stalls.time, Ticks(T + 3 * (T - T / 10)));
    assert_eq!(stalls.percent, 90);
    // Not lifted, but not needed any more; or lifted.
    assert_eq!(meter.stalls(held, Count(7 * T + 1)).percent, 0);
    assert_eq!(meter.stalls(None, Count(6 * T + 1)).percent, 0);

    let other = Stalls {
        count: 3,
        time: Ticks(u64::MAX),
        percent: 12,
    };
    let sum: Stalls = [stalls, other].into_iter().sum();
    assert_eq!((sum.count, sum.time.0, sum.percent), (7, u64::MAX, 90));
}

#[test]
fn run_time_is_read_while_it_passes_and_survives_clocks_that_disagree() {
    let meter = Meter::new();
    meter.entered(Count(1000));
    assert_eq!(meter.ran(Count(1300)), Ticks(300));
    meter.left(Count(1500));
    meter.left(Count(1700));
    assert_eq!(meter.ran(Count(9999)), Ticks(500));
    meter.entered(Count(2000));
    meter.entered(Count(2100));
    // A reader whose clock is behind sees a little less, not 2^63 more.
    assert_eq!(meter.ran(Count(1990)), Ticks(490));
    assert_eq!(meter.ran(Count(0)), Ticks(0));
    meter.left(Count(2500));
    assert_eq!(meter.ran(Count(0)), Ticks(1000));
    meter.entered(Count(u64::MAX - 10));
    assert_eq!(meter.ran(Count(9)), Ticks(1020));
}

/// A guest under write protection: stores over `hot` pages in turn, `step` ticks of running each.
struct Writer {
    now: u64,
    step: u64,
    hot: u64,
    next: u64,
    dirty: BTreeSet<u64>,
    stores: u64,
}

impl Writer {
    fn new(step: u64, hot: u64) -> Self {
        Self {
            now: 12345,
            step,
            hot,
            next: 0,
            dirty: BTreeSet::new(),
            stores: 0,
        }
    }

    /// Runs to `end`, with a harvest each `harvest` ticks, as the caller is to use a meter. Returns the
    /// pages dirtied.
    fn run(&mut self, quota: &Quota, meter: &Meter, end: u64, harvest: u64) -> u64 {
        let mut dirtied = 0;
        let mut harvest_at = self.now + harvest;
        while self.now < end {
            if self.now >= harvest_at {
                self.dirty.clear();
                harvest_at += harvest;
            }
            let page = self.next % self.hot;
            if !self.dirty.contains(&page)
                && let Some(limit) = quota.limit()
            {
                if let Verdict::StallUntil(at) = meter.admit(limit, Count(self.now)) {
                    // It stays until the time has come or the limit is changed; `end` is when.
                    let at = at.0.min(end);
                    meter.stall_began(Count(self.now));
                    meter.stall_ended(Count(at));
                    self.now = at;
                    continue;
                }
                meter.charge(limit, 1, Count(self.now));
            }
            dirtied += u64::from(self.dirty.insert(page));
            self.stores += 1;
            self.next += 1;
            self.now += self.step;
        }
        dirtied
    }
}

#[test]
fn a_writer_under_write_protection_keeps_to_its_quota_from_the_first_interval() {
    // 100 pages a millisecond against 200 in a hundred.
    let quota = quota(limit(200, T));
    let meter = Meter::new();
    let mut guest = Writer::new(10, u64::MAX);
    guest.now = 5 * T;
    let mut each = vec![];
    for n in 6..26 {
        each.push(guest.run(&quota, &meter, n * T, u64::MAX / 2));
    }
    assert!(each.iter().all(|pages| *pages == 200), "{each:?}");
    let stalls = meter.stalls(quota.limit(), Count(guest.now));
    assert_eq!(stalls.count, 20);
    assert_eq!(stalls.percent, 98);
    assert_eq!(stalls.time, Ticks(20 * (T - 200 * 10)));
    // Lifted in the middle of an interval: full speed at once.
    let half = guest.now + T / 2;
    guest.run(&quota, &meter, half, u64::MAX / 2);
    quota.set(None);
    assert_eq!(guest.run(&quota, &meter, half + T, u64::MAX / 2), T / 10);
}

#[test]
fn whoever_writes_what_is_dirty_already_does_not_wait() {
    // 50 hot pages, quota 50 an interval, a harvest each interval: 10,000 stores in each of them.
    let quota = quota(limit(50, T));
    let meter = Meter::new();
    let mut guest = Writer::new(10, 50);
    guest.now = T;
    guest.run(&quota, &meter, 11 * T, T);
    assert_eq!(meter.stalls(quota.limit(), Count(guest.now)).count, 0);
    assert_eq!(guest.stores, 10 * T / 10);
}

#[test]
fn a_store_that_was_admitted_happens_however_often_harvests_protect_its_page() {
    // One page an interval, and fifty harvests in it.
    let quota = quota(limit(1, T));
    let meter = Meter::new();
    let mut guest = Writer::new(10, 3);
    guest.now = T;
    guest.run(&quota, &meter, 101 * T, T / 50);
    assert!(guest.stores >= 100, "{} stores", guest.stores);
}
