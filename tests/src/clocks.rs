//! The three clocks of a scripted machine, and how a slow machine stretches them.
//!
//! *Boot* runs from power-on to the first prompt, *silence* from the last byte the
//! machine sent while a script waits for more, *total* over the whole script. One
//! clock alone cannot tell a dead machine from a slow one: silence finds the dead one
//! early, total bounds the one that chatters for ever.
//!
//! `TIDEMARK_TIME_FACTOR` multiplies all three (a loaded builder sets 3 or 5).

use std::time::{Duration, Instant};

/// The lengths of the three clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// Power-on to the first prompt.
    pub boot: Duration,
    /// No byte at all from the machine while something is awaited.
    pub silence: Duration,
    /// The whole script.
    pub total: Duration,
}

impl Clocks {
    /// The usual lengths, stretched by `TIDEMARK_TIME_FACTOR`. They are many times what a quiet machine needs: the
    /// tests run one for each CPU, and a kernel that unpacks itself says nothing.
    #[must_use]
    pub fn usual() -> Self {
        Self {
            boot: scaled(60),
            silence: scaled(30),
            total: scaled(120),
        }
    }

    /// The same clocks with another total, in seconds before stretching.
    #[must_use]
    pub fn with_total(mut self, seconds: u64) -> Self {
        self.total = scaled(seconds);
        self
    }

    /// The same clocks with another silence, in seconds before stretching.
    #[must_use]
    pub fn with_silence(mut self, seconds: u64) -> Self {
        self.silence = scaled(seconds);
        self
    }

    /// The same clocks with another boot, in seconds before stretching.
    #[must_use]
    pub fn with_boot(mut self, seconds: u64) -> Self {
        self.boot = scaled(seconds);
        self
    }
}

/// `seconds`, stretched by `TIDEMARK_TIME_FACTOR`.
#[must_use]
pub fn scaled(seconds: u64) -> Duration {
    Duration::from_secs(seconds).mul_f64(time_factor())
}

/// The factor of `TIDEMARK_TIME_FACTOR`; 1 when unset or not a sensible number.
fn time_factor() -> f64 {
    std::env::var("TIDEMARK_TIME_FACTOR")
        .ok()
        .and_then(|text| text.parse::<f64>().ok())
        .filter(|factor| (0.1..=100.0).contains(factor))
        .unwrap_or(1.0)
}

/// The clocks once started: what may still be waited for, and why waiting must end.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    clocks: Clocks,
    start: Instant,
    booting: bool,
}

impl Running {
    /// Starts all three clocks now.
    #[must_use]
    pub fn start(clocks: Clocks) -> Self {
        Self {
            clocks,
            start: Instant::now(),
            booting: true,
        }
    }

    /// Stops the boot clock: the machine is up.
    pub fn booted(&mut self) {
        self.booting = false;
    }

    /// Since power-on.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// What is left until the first of the clocks runs out, or which one did.
    ///
    /// `heard` is when the machine last sent anything, or when the waiting began if
    /// that is later.
    pub fn left(&self, heard: Instant) -> Result<Duration, RanOut> {
        let now = Instant::now();
        let since_start = now.duration_since(self.start);
        let silent = now.saturating_duration_since(heard);
        let total = self.clocks.total.checked_sub(since_start);
        let total = total.ok_or(RanOut::Total(self.clocks.total))?;
        let mut left = total;
        if self.booting {
            let boot = self.clocks.boot.checked_sub(since_start);
            left = left.min(boot.ok_or(RanOut::Boot(self.clocks.boot))?);
        }
        let silence = self.clocks.silence.checked_sub(silent);
        left = left.min(silence.ok_or(RanOut::Silence(self.clocks.silence))?);
        Ok(left)
    }

    /// What is left of the total clock alone; zero when it ran out.
    #[must_use]
    pub fn left_in_total(&self) -> Duration {
        self.clocks.total.saturating_sub(self.start.elapsed())
    }
}

/// Which clock ran out, and how long it was.
#[derive(Clone, Copy, Debug)]
pub enum RanOut {
    /// No prompt in time.
    Boot(Duration),
    /// The machine went quiet.
    Silence(Duration),
    /// The script took too long.
    Total(Duration),
}

impl std::fmt::Display for RanOut {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Boot(length) => write!(out, "the boot clock of {length:?} ran out"),
            Self::Silence(length) => write!(out, "the machine was silent for {length:?}"),
            Self::Total(length) => write!(out, "the total clock of {length:?} ran out"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clocks(boot: u64, silence: u64, total: u64) -> Clocks {
        Clocks {
            boot: Duration::from_secs(boot),
            silence: Duration::from_secs(silence),
            total: Duration::from_secs(total),
        }
    }

    #[test]
    fn the_nearest_clock_is_the_one_that_counts() {
        let running = Running::start(clocks(5, 2, 60));
        let left = running.left(Instant::now()).expect("time left");
        assert!(left <= Duration::from_secs(2), "{left:?}");
    }

    #[test]
    fn the_boot_clock_stops_once_booted() {
        let mut running = Running::start(clocks(0, 10, 60));
        std::thread::sleep(Duration::from_millis(2));
        assert!(matches!(running.left(Instant::now()), Err(RanOut::Boot(_))));
        running.booted();
        assert!(running.left(Instant::now()).is_ok());
    }

    #[test]
    fn silence_and_total_run_out_by_name() {
        let mut running = Running::start(clocks(5, 0, 60));
        running.booted();
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(matches!(running.left(before), Err(RanOut::Silence(_))));
        let running = Running::start(clocks(5, 5, 0));
        std::thread::sleep(Duration::from_millis(2));
        assert!(matches!(
            running.left(Instant::now()),
            Err(RanOut::Total(_))
        ));
    }
}
