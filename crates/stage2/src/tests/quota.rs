//! The throttle against simulated guests, and against arbitrary callers. One tick is a microsecond.

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

/// Guests under DBM that share a quota: one vCPU each, on its own CPU.
struct Runner {
    quota: Quota,
    meters: Vec<Meter>,
    now: u64,
}

impl Runner {
    fn new(limit: Limit, vcpus: usize) -> Self {
        let quota = Quota::new();
        quota.set(Some(limit));
        Self {
            quota,
            meters: (0..vcpus).map(|_| Meter::new()).collect(),
            now: 777 * T,
        }
    }

    fn ran(&self) -> Vec<u64> {
        let now = Count(self.now);
        self.meters.iter().map(|meter| meter.ran(now).0).collect()
    }

    /// Lets all vCPUs run for `span`, each with timer interrupts that come `late` by so much. Returns
    /// how long each ran.
    fn run(&mut self, span: u64, late: u64) -> Vec<u64> {
        let before = self.ran();
        let end = self.now + span;
        for meter in &self.meters {
            let mut now = self.now;
            while now < end {
                let to = match meter.pace(self.quota.duty(), Count(now)) {
                    Turn::Free => end,
                    Turn::Until(at) => {
                        assert!(at.0 > now);
                        (at.0 + late).min(end)
                    }
                    Turn::StallUntil(at) => {
                        assert!(at.0 > now);
                        let to = at.0.min(end);
                        meter.stall_began(Count(now));
                        meter.stall_ended(Count(to));
                        now = to;
                        continue;
                    }
                };
                meter.entered(Count(now));
                meter.left(Count(to));
                now = to;
            }
        }
        self.now = end;
        let ran = self.ran();
        ran.iter()
            .zip(before)
            .map(|(now, before)| now - before)
            .collect()
    }

    /// A span and its harvest. `dirty` says how many pages a vCPU dirtied that ran so long.
    fn round(&mut self, span: u64, late: u64, dirty: impl Fn(u64) -> u64) -> (u64, Vec<u64>) {
        let ran = self.run(span, late);
        let found = ran.iter().map(|ran| dirty(*ran)).sum();
        self.quota
            .harvested(found, Ticks(ran.iter().sum()), Ticks(span));
        (found, ran)
    }
}

/// `part` of `whole` in thousandths.
fn permille(part: u64, whole: u64) -> u64 {
    part * 1000 / whole
}

#[test]
fn a_writer_under_dbm_is_at_its_quota_after_one_harvest_and_stays_there() {
    // 100 pages a millisecond on each of four vCPUs, against 200 in a hundred each.
    let mut guest = Runner::new(limit(200, T), 4);
    let (first, _) = guest.round(10 * T, 0, |ran| ran / 10);
    assert_eq!(first, 4 * 10 * T / 10);
    for n in 0..50 {
        let (found, ran) = guest.round(10 * T, 0, |ran| ran / 10);
        let of_quota = permille(found, 4 * 10 * 200);
        assert!((990..=1010).contains(&of_quota), "{n}: {of_quota}");
        assert!(ran.iter().all(|one| *one == ran[0]), "{n}: {ran:?}");
    }
    let duty = guest.quota.duty().unwrap();
    assert_eq!((duty.run(), duty.interval()), (Ticks(2000), Ticks(T)));
    assert_eq!(duty.throttle_percent(), 98);
    let stalls = guest.meters[0].stalls(guest.quota.limit(), Count(guest.now));
    assert_eq!(stalls.percent, 98);
    assert_eq!(stalls.count, 500);

    // The limit lifted, or the log stopped: full speed at once.
    guest.quota.set(None);
    assert_eq!(guest.run(T, 0), [T; 4]);
    guest.quota.set(Some(limit(200, T)));
    assert!(guest.quota.duty().is_some());
    guest.quota.forget_harvests();
    assert_eq!(guest.run(T, 0), [T; 4]);
}

#[test]
fn a_guest_of_hot_pages_comes_to_its_quota_from_one_side() {
    // 20,000 pages rewritten over and over, at first all in a second: found stays the same while the
    // share falls, and then with it.
    let mut guest = Runner::new(limit(200, T), 1);
    let hot = |ran: u64| 20_000 * ran / (ran + 100 * MS);
    let mut last = u64::MAX;
    for n in 0..40 {
        let (found, ran) = guest.round(10 * T, 0, hot);
        assert!(ran[0] <= last, "{n}: {} after {last}", ran[0]);
        last = ran[0];
        if n >= 12 {
            let of_quota = permille(found, 10 * 200);
            assert!((970..=1050).contains(&of_quota), "{n}: {of_quota}");
        }
    }
}

#[test]
fn a_guest_under_its_quota_runs_all_the_time() {
    let mut guest = Runner::new(limit(200, T), 2);
    for _ in 0..20 {
        // 199 in an interval.
        let (_, ran) = guest.round(10 * T, 0, |ran| ran * 199 / T);
        assert_eq!(ran, [10 * T; 2]);
    }
    assert_eq!(guest.meters[0].stalls(None, Count(guest.now)).count, 0);
}

#[test]
fn a_burst_is_believed_at_once_and_a_pause_by_half_a_harvest() {
    let limit = limit(200, T);
    let quota = quota(limit);
    let span = Ticks(10 * T);
    let share = |found, ran: u64| {
        let duty = quota.harvested(found, Ticks(ran), span);
        duty.map_or(T, |duty| duty.run().0)
    };
    assert_eq!(share(2000, 10 * T), T);
    assert_eq!(share(16_000, 10 * T), T / 8);
    assert_eq!(share(0, 10 * T / 8), T / 4);
    assert_eq!(share(0, 10 * T / 4), T / 2);
    assert_eq!(share(8000, 10 * T / 2), T / 8);
    // However wild a burst, seven harvests later it is forgotten.
    assert_eq!(share(u64::MAX, 1), T / 100);
    let after: Vec<u64> = (0..7).map(|_| share(0, 10 * T / 100)).collect();
    assert_eq!(after, [T / 50, T / 25, 8000, 16_000, 32_000, 64_000, T]);
}

#[test]
fn harvests_within_an_interval_are_judged_together() {
    // 10 pages a millisecond against 100 in a hundred: a tenth. Ten harvests an interval, of which one
    // sees the vCPU run.
    let mut guest = Runner::new(limit(100, T), 1);
    guest.round(T, 0, |ran| ran / 100);
    let mut found = 0;
    for n in 0..200 {
        found += guest.round(T / 10, 0, |ran| ran / 100).0;
        assert_eq!(guest.quota.duty().unwrap().run(), Ticks(T / 10), "{n}");
    }
    assert_eq!(found, 20 * 100);

    // All its pages in the first tenth of an interval are no burst, and none in the others no pause.
    let quota = quota(limit(100, T));
    let piece = |found| quota.harvested(found, Ticks(T / 10), Ticks(T / 10));
    for _ in 0..3 {
        assert_eq!(piece(100), None);
        (1..10).for_each(|_| assert_eq!(piece(0), None));
    }
    // And each interval is judged by itself.
    (1..10).for_each(|_| assert_eq!(piece(200), None));
    assert_eq!(piece(200).unwrap().run(), Ticks(T / 20));
}

#[test]
fn nobody_is_blamed_for_pages_that_were_dirtied_while_nobody_ran() {
    let quota = quota(limit(100, T));
    assert_eq!(quota.harvested(1_000_000, Ticks(0), Ticks(T)), None);
    // Nor is it held against the first that runs.
    assert_eq!(quota.harvested(1, Ticks(T), Ticks(T)), None);
    // And nothing is learnt of a guest that did not run.
    let before = quota.harvested(1000, Ticks(T), Ticks(T));
    assert!(before.is_some());
    assert_eq!(quota.harvested(0, Ticks(0), Ticks(T)), before);
}

#[test]
fn the_floor_keeps_a_guest_alive() {
    // A million times its quota.
    let mut guest = Runner::new(limit(1, T), 1);
    for n in 0..20 {
        let (_, ran) = guest.round(10 * T, 0, |ran| ran * 10);
        if n > 0 {
            assert_eq!(ran, [10 * T / 100], "{n}");
        }
    }
    assert_eq!(guest.quota.duty().unwrap().throttle_percent(), 99);
}

#[test]
fn a_timer_that_comes_late_is_paid_for() {
    // A millisecond late each time: as long again as the share.
    let mut guest = Runner::new(limit(1, T), 1);
    guest.round(10 * T, MS, |ran| ran * 10);
    let ran: u64 = (0..10)
        .map(|_| guest.round(10 * T, MS, |ran| ran * 10).1[0])
        .sum();
    assert!(ran <= 100 * T / 100 + 2 * MS, "{ran}");
    assert!(ran >= 100 * T / 100 - 2 * MS, "{ran}");
}

#[test]
fn time_that_ran_before_there_was_a_duty_is_not_held_against_it() {
    let mut guest = Runner::new(limit(100, T), 1);
    // Ten intervals of running free, and then a tenth from the first interval on.
    guest.round(10 * T, 0, |ran| ran / 100);
    assert_eq!(guest.run(T, 0), [T / 10]);
    // Let go and held again right away.
    guest.quota.set(None);
    assert_eq!(guest.run(T, 0), [T]);
    guest.quota.set(Some(limit(100, T)));
    assert_eq!(guest.run(T, 0), [T / 10]);
    // The same within one interval.
    guest.quota.set(None);
    assert_eq!(guest.run(T / 2, 0), [T / 2]);
    guest.quota.set(Some(limit(100, T)));
    assert_eq!(guest.run(T / 2, 0), [T / 10]);
}

#[test]
fn a_turn_ends_with_its_interval() {
    let quota = quota(limit(100, T));
    quota.harvested(125, Ticks(T), Ticks(T));
    assert_eq!(quota.duty().unwrap().run(), Ticks(T * 4 / 5));
    let meter = Meter::new();
    let half = 50 * T + T / 2;
    assert_eq!(
        meter.pace(quota.duty(), Count(half)),
        Turn::Until(Count(51 * T))
    );
    meter.entered(Count(half));
    // What it ran is of the interval that is over; this one is all its own.
    let turn = meter.pace(quota.duty(), Count(51 * T));
    assert_eq!(turn, Turn::Until(Count(51 * T + T * 4 / 5)));
    let turn = meter.pace(quota.duty(), Count(51 * T + T * 4 / 5));
    assert_eq!(turn, Turn::StallUntil(Count(52 * T)));
}

#[test]
fn vcpus_on_different_cpus_run_at_the_same_time() {
    let quota = quota(limit(100, T));
    quota.harvested(1000, Ticks(T), Ticks(T));
    for (offset, meter) in [(0, Meter::new()), (3, Meter::new()), (T - 1, Meter::new())] {
        meter.entered(Count(50 * T + offset));
        meter.left(Count(52 * T));
        let turn = meter.pace(quota.duty(), Count(60 * T + 5));
        assert_eq!(turn, Turn::Until(Count(60 * T + 5 + T / 10)));
        meter.entered(Count(60 * T + 5));
        meter.left(Count(60 * T + 5 + T / 10));
        let turn = meter.pace(quota.duty(), Count(60 * T + 5 + T / 10));
        assert_eq!(turn, Turn::StallUntil(Count(61 * T)));
    }
}

#[test]
fn a_meter_is_read_and_its_limit_changed_while_it_works() {
    let quota = Quota::new();
    let meter = Meter::new();
    let over = AtomicBool::new(false);
    let limits = [
        Some(limit(3, 10)),
        None,
        Some(limit(1000, 7)),
        Some(limit(1, 100)),
    ];
    thread::scope(|scope| {
        scope.spawn(|| {
            for limit in limits
                .iter()
                .cycle()
                .take_while(|_| !over.load(Ordering::Relaxed))
            {
                quota.set(*limit);
                let seen = quota.limit();
                assert!(limits.contains(&seen), "{seen:?}");
                quota.harvested(1000, Ticks(50), Ticks(200));
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let stalls = meter.stalls(quota.limit(), Count(u64::MAX / 4));
                assert!(stalls.percent <= 100);
                let _ = meter.ran(Count(0));
            }
        });
        let mut stalls = 0;
        for now in 0..200_000 {
            let now = Count(now);
            meter.entered(now);
            if let Some(limit) = quota.limit() {
                assert!(limits.contains(&Some(limit)));
                meter.charge(limit, 1, now);
                if meter.admit(limit, now) != Verdict::Go {
                    meter.stall_began(now);
                    meter.stall_ended(now);
                    stalls += 1;
                }
            }
            let _ = meter.pace(quota.duty(), now);
            meter.left(Count(now.0 + 1));
        }
        over.store(true, Ordering::Relaxed);
        assert_eq!(meter.stalls(None, Count(0)).count, stalls);
        assert_eq!(meter.ran(Count(0)), Ticks(200_000));
    });
}

#[test]
fn a_copy_over_a_slow_link_ends_because_of_the_quota() {
    // A link of 10 pages a millisecond, guests that write 100, half the link as quota: each round is
    // at most half the last one, but for the interval that is begun. 100,000 pages at first.
    let half = || Some(limit(500, T));
    let rounds = |mut dirty: Box<dyn FnMut(u64) -> u64>| -> Vec<u64> {
        let mut left = 100_000;
        let mut rounds = vec![];
        while left > 1000 && left < 1_000_000 && rounds.len() < 12 {
            left = dirty(left * MS / 10);
            rounds.push(left);
        }
        rounds
    };
    for limit in [None, half()] {
        let quota = Quota::new();
        quota.set(limit);
        let (meter, mut guest) = (Meter::new(), Writer::new(10, u64::MAX));
        let write_protected = rounds(Box::new(move |span| {
            let end = guest.now + span;
            guest.run(&quota, &meter, end, u64::MAX / 2)
        }));
        let mut guest = Runner::new(half().unwrap(), 1);
        guest.quota.set(limit);
        // It has 400,000 hot pages: without a limit all of them are dirty in every round.
        let dbm = rounds(Box::new(move |span| {
            guest.round(span, 0, |ran| (ran / 10).min(400_000)).0
        }));
        for left in [write_protected, dbm] {
            match limit {
                None => assert!(left.iter().all(|left| *left >= 100_000), "{left:?}"),
                Some(_) => assert!(left.last() <= Some(&1000), "{left:?}"),
            }
        }
    }
}

/// Any number, the ends and the neighbourhood of one place often.
fn any_count() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        Just(0),
        Just(u64::MAX),
        (0u64..4000).prop_map(|n| n),
        (0u64..4000).prop_map(|n| u64::MAX - n),
        (0u64..4000).prop_map(|n| (1 << 63) - 2000 + n),
    ]
}

fn any_limit() -> impl Strategy<Value = Limit> {
    let pages = prop_oneof![1u64..2000, Just(1), Just(u64::MAX), 1u64..=u64::MAX];
    let interval = prop_oneof![1u64..2000, Just(1), Just(u64::from(u32::MAX))];
    (pages, interval).prop_map(|(pages, interval)| limit(pages, interval))
}

#[derive(Clone, Debug)]
enum Call {
    Admit,
    Charge(u64),
    Pace,
    Enter,
    Leave,
    StallBegins,
    StallEnds,
    Look,
    Set(Option<Limit>),
    Harvest(u64, u64, u64),
    Forget,
}

fn any_call() -> impl Strategy<Value = Call> {
    prop_oneof![
        4 => Just(Call::Admit),
        2 => any_count().prop_map(Call::Charge),
        2 => (0u64..600).prop_map(Call::Charge),
        4 => Just(Call::Pace),
        1 => Just(Call::Enter),
        1 => Just(Call::Leave),
        1 => Just(Call::StallBegins),
        1 => Just(Call::StallEnds),
        1 => Just(Call::Look),
        1 => proptest::option::weighted(0.9, any_limit()).prop_map(Call::Set),
        2 => (any_count(), any_count(), any_count()).prop_map(|(f, r, s)| Call::Harvest(f, r, s)),
        1 => Just(Call::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whoever calls with whatever: no panic, and no wait longer than is stated.
    #[test]
    fn any_calls_at_any_times_wait_no_longer_than_stated(
        first in any_limit(),
        calls in proptest::collection::vec((any_call(), any_count()), 1..80),
    ) {
        let quota = quota(first);
        let meter = Meter::new();
        for (call, now) in calls {
            let now = Count(now);
            let limit = quota.limit();
            let mut end = None;
            match call {
                Call::Admit => if let Some(limit) = limit
                    && let Verdict::StallUntil(at) = meter.admit(limit, now) {
                    end = Some(at);
                },
                Call::Charge(pages) => if let Some(limit) = limit {
                    meter.charge(limit, pages, now);
                },
                Call::Pace => match meter.pace(quota.duty(), now) {
                    Turn::Free => prop_assert_eq!(quota.duty(), None),
                    Turn::StallUntil(at) => end = Some(at),
                    Turn::Until(at) => {
                        let interval = limit.unwrap().interval().0;
                        // A clock that went back may be an interval before the one accounted for.
                        prop_assert!(at.0 > now.0 || now.0 == u64::MAX);
                        prop_assert!(at.0 - now.0 <= 2 * interval);
                    }
                },
                Call::Enter => meter.entered(now),
                Call::Leave => meter.left(now),
                Call::StallBegins => meter.stall_began(now),
                Call::StallEnds => meter.stall_ended(now),
                Call::Look => {
                    let stalls = meter.stalls(limit, now);
                    prop_assert!(stalls.percent <= 100);
                    prop_assert!(meter.ran(now).0 <= u64::MAX / 2);
                }
                Call::Set(limit) => quota.set(limit),
                Call::Harvest(found, ran, span) => {
                    let duty = quota.harvested(found, Ticks(ran), Ticks(span));
                    prop_assert_eq!(duty, quota.duty());
                }
                Call::Forget => {
                    quota.forget_harvests();
                    prop_assert_eq!(quota.duty(), None);
                }
            }
            if let Some(end) = end {
                let most = (Limit::LONGEST_STALL + 1) * limit.unwrap().interval().0;
                prop_assert!(end.0 >= now.0 && end.0 - now.0 <= most, "{:?} at {:?}", end, now);
            }
            if let Some(duty) = quota.duty() {
                let (run, interval) = (duty.run().0, duty.interval().0);
                prop_assert!(run * 100 >= interval && run < interval);
                prop_assert!((1..=99).contains(&duty.throttle_percent()));
            }
        }
    }

    /// Any charges by a guest that waits when told: over every run of intervals the stated bound.
    #[test]
    fn pages_in_any_run_of_intervals_are_bounded_under_write_protection(
        quota in 1u64..600,
        interval in 1u64..5000,
        origin in 0u64..1 << 40,
        most in prop_oneof![Just(1u64), 1u64..600, Just(512)],
        wishes in proptest::collection::vec((0u64..1 << 20, 0u64..1 << 20), 1..400),
    ) {
        let limit = limit(quota, interval);
        let meter = Meter::new();
        let mut now = origin;
        // Pages by interval.
        let mut seen: Vec<(u64, u64)> = vec![];
        for (gap, pages) in wishes {
            // Most gaps are small, a few are several intervals.
            now += if gap % 16 == 0 { gap % (6 * interval) } else { gap % (1 + interval / 64) };
            let pages = 1 + pages % most;
            if let Verdict::StallUntil(end) = meter.admit(limit, Count(now)) {
                prop_assert!(end.0 > now && end.0 - now <= Limit::LONGEST_STALL * interval);
                // Stalls end when an interval begins, and one is enough.
                prop_assert_eq!(end.0 % interval, 0);
                now = end.0;
                prop_assert_eq!(meter.admit(limit, Count(now)), Verdict::Go);
            }
            meter.charge(limit, pages, Count(now));
            seen.push((now / interval, pages));
        }
        for first in 0..seen.len() {
            let mut sum = 0;
            for (at, pages) in &seen[first..] {
                sum += pages;
                let intervals = at - seen[first].0 + 1;
                let exact = intervals * quota + most - 1;
                let forgiven = most.saturating_sub(Limit::LONGEST_STALL * quota);
                let bound = exact + intervals.div_ceil(Limit::LONGEST_STALL) * forgiven;
                prop_assert!(sum <= bound, "{sum} in {intervals} intervals, at most {bound}");
            }
        }
    }

    /// Any charges that keep to the quota in every span of one interval, wherever it begins.
    #[test]
    fn a_vcpu_under_its_quota_never_waits_for_write_faults(
        quota in 1u64..600,
        interval in 1u64..5000,
        origin in 0u64..1 << 40,
        wishes in proptest::collection::vec((0u64..1 << 20, 0u64..1 << 20), 1..400),
    ) {
        let limit = limit(quota, interval);
        let meter = Meter::new();
        let mut now = origin;
        let mut recent: VecDeque<(u64, u64)> = VecDeque::new();
        for (gap, pages) in wishes {
            now += if gap % 8 == 0 { gap % (2 * interval) } else { gap % (1 + interval / 16) };
            while recent.front().is_some_and(|(at, _)| at + interval <= now) {
                recent.pop_front();
            }
            let spent: u64 = recent.iter().map(|(_, pages)| pages).sum();
            if spent == quota {
                continue;
            }
            let pages = 1 + pages % (quota - spent);
            prop_assert_eq!(meter.admit(limit, Count(now)), Verdict::Go);
            meter.charge(limit, pages, Count(now));
            recent.push_back((now, pages));
        }
    }

    /// Any guest under DBM: each harvest is over the quota by at most the factor by which the guest
    /// became faster, or by what the floor lets through; and a vCPU always gets its floor.
    #[test]
    fn a_harvest_exceeds_the_quota_by_no_more_than_the_guest_became_faster(
        quota in 1u64..2000,
        interval in 1000u64..20_000,
        rounds in proptest::collection::vec((1u64..20, 0u64..3000, 0u64..50), 2..30),
        vcpus in 1usize..4,
    ) {
        let mut guest = Runner::new(limit(quota, interval), vcpus);
        guest.now -= guest.now % interval;
        // Pages and run time of the harvest before.
        let mut before = (0, 0);
        for (intervals, speed, late) in rounds {
            let span = intervals * interval;
            // Pages in a thousand ticks.
            let (found, ran) = guest.round(span, late, |ran| ran * speed / 1000);
            if before.0 > 0 {
                let speed = speed as f64 / 1000.0;
                let faster = speed / (before.0 as f64 / before.1 as f64);
                let floor = interval.div_ceil(100) as f64 * speed;
                // The last interval may be paid in the next harvest. A timer that comes later than
                // the longest wait pays for is forgiven the rest, once a wait.
                let each = (intervals + 1) as f64 * (quota as f64).max(floor)
                    + (intervals / Limit::LONGEST_STALL + 1) as f64 * late as f64 * speed;
                let bound = vcpus as f64 * (each * faster.max(1.0) + 1.0);
                prop_assert!(found as f64 <= bound, "{found}, at most {bound}");
            }
            for ran in &ran {
                let least = intervals.saturating_sub(Limit::LONGEST_STALL) * interval / 100;
                prop_assert!(ran + 5 * late >= least, "{ran} of {span}");
            }
            before = (found, ran.iter().sum::<u64>());
        }
    }
}
