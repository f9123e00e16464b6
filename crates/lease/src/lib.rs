//! What a host's session holds, and until when.
//!
//! A line does not say when the program at its other end dies. So what a session holds, it holds on a [`Lease`]: it is
//! over when nothing was heard of the session for its patience.
//!
//! Values and functions of their arguments; times are counts of one clock, in ticks.
#![no_std]
#![forbid(unsafe_code)]

/// How long a session may be silent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease {
    /// When something of the session was heard last.
    heard: u64,
    patience: u64,
    /// How late a look may be.
    grace: u64,
    /// When the look is due that ends it, if nothing is heard by then.
    last_look: Option<u64>,
}

/// What a look at a lease came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It holds; look again then.
    LookAt(u64),
    /// It is over.
    Over,
}

impl Lease {
    /// Begins one.
    #[must_use]
    pub fn new(now: u64, patience: u64, grace: u64) -> Self {
        Self {
            heard: now,
            patience,
            grace,
            last_look: None,
        }
    }

    /// Something was heard of the session.
    pub fn heard(&mut self, now: u64) {
        self.heard = now;
        self.last_look = None;
    }

    /// Looks whether it is over.
    ///
    /// Never at the first look that finds it so, nor at a late one: if the whole machine stood still, what the session
    /// said meanwhile waits at the line, and the look may come before it.
    pub fn look(&mut self, now: u64) -> Verdict {
        let due = self.heard.saturating_add(self.patience);
        if now < due {
            return Verdict::LookAt(due);
        }
        match self.last_look {
            Some(at) if now < at => Verdict::LookAt(at),
            Some(at) if now - at <= self.grace => Verdict::Over,
            _ => {
                let at = now.saturating_add(self.grace);
                self.last_look = Some(at);
                Verdict::LookAt(at)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{LookAt, Over};

    const LEASE: Lease = Lease {
        heard: 100,
        patience: 40,
        grace: 5,
        last_look: None,
    };

    #[test]
    fn silence_ends_it_at_the_second_look() {
        let mut lease = LEASE;
        assert_eq!(lease.look(100), LookAt(140));
        assert_eq!(lease.look(139), LookAt(140));
        assert_eq!(lease.look(140), LookAt(145));
        assert_eq!(lease.look(144), LookAt(145));
        assert_eq!(lease.look(146), Over);
    }

    #[test]
    fn whatever_is_heard_renews_it() {
        let mut lease = LEASE;
        lease.heard(130);
        assert_eq!(lease.look(140), LookAt(170));
        assert_eq!(lease.look(170), LookAt(175));
        // Between the two looks.
        lease.heard(172);
        assert_eq!(lease.look(175), LookAt(212));
        assert_eq!(lease.look(212), LookAt(217));
        assert_eq!(lease.look(217), Over);
    }

    #[test]
    fn a_machine_that_stood_still_is_looked_at_again() {
        let mut lease = LEASE;
        assert_eq!(lease.look(100), LookAt(140));
        // It stood still for long: what was said meanwhile has not been heard yet.
        assert_eq!(lease.look(10_000), LookAt(10_005));
        assert_eq!(lease.look(20_000), LookAt(20_005));
        assert_eq!(lease.look(20_006), Over);
    }

    #[test]
    fn times_at_the_end_of_the_clock_are_times() {
        let mut lease = Lease::new(u64::MAX - 1, 40, 5);
        assert_eq!(lease.look(u64::MAX - 1), LookAt(u64::MAX));
        assert_eq!(lease.look(u64::MAX), LookAt(u64::MAX));
        assert_eq!(lease.look(u64::MAX), Over);
    }
}
