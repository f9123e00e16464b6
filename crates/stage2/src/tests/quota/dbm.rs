//! Guests whose pages the hardware makes dirty: what they wrote is known at a harvest, and paid for by running less.

use super::*;

/// Guests under DBM that share a quota: one vCPU each, on its own CPU.
pub(super) struct Runner {
    quota: Quota,
    meters: Vec<Meter>,
    pub(super) now: u64,
}

impl Runner {
    pub(super) fn new(limit: Limit, vcpus: usize) -> Self {
        let quota = Quota::new();
        quota.set(Some(limit));
        Self {
            quota,
            meters: (0..vcpus).map(|_| Meter::new()).collect(),
            now: 777 * T,
        }
    }

    pub(super) fn ran(&self) -> Vec<u64> {
        let now = Count(self.now);
        self.meters.iter().map(|meter| meter.ran(now).0).collect()
    }

    /// Lets all vCPUs run for `span`, each with timer interrupts that come `late` by so much. Returns
    /// how long each ran.
    pub(super) fn run(&mut self, span: u64, late: u64) -> Vec<u64> {
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
    pub(super) fn round(
        &mut self,
        span: u64,
        late: u64,
        dirty: impl Fn(u64) -> u64,
    ) -> (u64, Vec<u64>) {
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
