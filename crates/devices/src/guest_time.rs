//! A guest's counters against the machine's.
//!
//! # Purpose
//!
//! What a guest reads as CNTVCT and CNTPCT runs with the machine's count, at a distance from it. The distances grow by every stretch in
//! which its time stands still, so that it sees no gap. A pause is such a stretch; a vCPU that waits for its turn or its quota is not.
//!
//! # Invariants
//!
//! Neither counter ever goes back, and both stand still for the same time.
//!
//! # Concurrency
//!
//! None: plain values, behind their owner's lock.
//!
//! Specification: Arm ARM D12.1 and D12.2 (CNTVOFF_EL2; CNTPOFF_EL2 does in hardware what [`GuestTime::physical_offset`] is for).

/// Where a guest's counters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestTime {
    virtual_offset: u64,
    physical_offset: u64,
    stopped_at: Option<u64>,
}

impl GuestTime {
    /// The virtual counter begins at zero, the physical one is the machine's.
    #[must_use]
    pub const fn new(now: u64) -> Self {
        Self {
            virtual_offset: now,
            physical_offset: 0,
            stopped_at: None,
        }
    }

    /// Stands still from `now` on, or from an earlier stop on.
    pub fn stop(&mut self, now: u64) {
        self.stopped_at.get_or_insert(now);
    }

    /// Goes on. Says whether it stood still.
    #[must_use]
    pub fn go_on(&mut self, now: u64) -> bool {
        let Some(stopped_at) = self.stopped_at.take() else {
            return false;
        };
        // Nothing is lost if another CPU's count is a little behind.
        let lost = now.saturating_sub(stopped_at);
        self.virtual_offset = self.virtual_offset.wrapping_add(lost);
        self.physical_offset = self.physical_offset.wrapping_add(lost);
        true
    }

    /// What the machine's count is ahead of the virtual counter: CNTVOFF_EL2.
    #[must_use]
    pub const fn virtual_offset(&self) -> u64 {
        self.virtual_offset
    }

    /// What it is ahead of the physical counter.
    #[must_use]
    pub const fn physical_offset(&self) -> u64 {
        self.physical_offset
    }
}

/// Gives a counter with this offset when the machine's count is `now`.
#[inline]
#[must_use]
pub const fn counter(now: u64, offset: u64) -> u64 {
    now.wrapping_sub(offset)
}

/// Gives the machine's count at which a counter with this offset reaches `compare`; `u64::MAX` if it does not within the machine's count.
#[inline]
#[must_use]
pub const fn deadline(compare: u64, offset: u64) -> u64 {
    compare.saturating_add(offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn time_stands_still_while_it_is_stopped_and_only_then() {
        let mut time = GuestTime::new(1000);
        let read = |time: &GuestTime, now| {
            (
                counter(now, time.virtual_offset()),
                counter(now, time.physical_offset()),
            )
        };
        assert_eq!(read(&time, 1100), (100, 1100));
        assert!(!time.go_on(1150), "it was not stopped");
        time.stop(1200);
        time.stop(5000);
        assert!(time.go_on(9200));
        assert_eq!(read(&time, 9200), (200, 1200), "as at the first stop");
        assert_eq!(read(&time, 9300), (300, 1300));
        assert!(!time.go_on(9400));
        time.stop(9400);
        assert!(
            time.go_on(9390),
            "a count that is behind gives nothing back"
        );
        assert_eq!(read(&time, 9500), (500, 1500));
    }

    #[test]
    fn a_deadline_out_of_reach_is_never() {
        assert_eq!(deadline(100, 7), 107);
        for far in [u64::MAX, u64::MAX - 6, u64::MAX - 7] {
            assert_eq!(deadline(far, 7), u64::MAX);
        }
        assert_eq!(deadline(u64::MAX, 0), u64::MAX);
    }

    proptest! {
        #[test]
        fn counters_never_go_back_and_fire_at_their_deadlines(
            start in 0u64..1 << 60,
            steps in proptest::collection::vec((any::<bool>(), 0u64..1 << 40), 1..40),
            compare in any::<u64>(),
        ) {
            let mut time = GuestTime::new(start);
            let (mut now, mut ran, mut stopped) = (start, 0u64, false);
            for (stop, forward) in steps {
                if stop {
                    time.stop(now);
                } else {
                    let moved = time.go_on(now);
                    prop_assert!(stopped || !moved);
                }
                stopped = stop;
                now += forward;
                if !stopped {
                    ran += forward;
                    let virtual_count = counter(now, time.virtual_offset());
                    prop_assert_eq!(virtual_count, ran);
                    prop_assert_eq!(counter(now, time.physical_offset()), start + ran);
                    prop_assert_eq!(
                        virtual_count >= compare,
                        deadline(compare, time.virtual_offset()) <= now
                    );
                }
            }
        }
    }
}
