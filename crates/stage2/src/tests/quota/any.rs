//! Arbitrary callers: any limits, at any times.

use super::dbm::Runner;
use super::*;

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
