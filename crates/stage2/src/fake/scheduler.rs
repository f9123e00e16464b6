//! Which simulated CPU goes on: decided by a seed, so that a seed repeats a run exactly.
//!
//! Each CPU is a coroutine, all on one thread. A CPU goes on until a point at which the dice say that
//! it is another one's turn: points are in front of every access to a table or a bitmap and in every
//! call of the `Hardware` trait. One that waits for another (a lock, an entry that is busy) hands over
//! at once.

use super::rng::Rng;
use super::traced;
use generator::{Generator, Gn};
use std::boxed::Box;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

/// Stack of a CPU, in words: a panic in it prints a backtrace.
const STACK: usize = 64 << 10;

/// Turns after which a run counts as one that never ends.
const TURNS: u64 = 20_000_000;

/// What a CPU does.
pub(crate) type Program<'a> = Box<dyn FnOnce() + Send + 'a>;

/// The dice.
pub(crate) struct Scheduler {
    state: Mutex<State>,
}

struct State {
    rng: Rng,
    /// Points passed over between two turns, on average; none is taken at `None`.
    every: Option<u32>,
    /// The CPU whose turn it was waits for another.
    waits: bool,
}

impl Scheduler {
    /// Makes one that hands over at every `every`th point on average, or only where a CPU waits.
    pub(crate) fn new(seed: u64, every: Option<u32>) -> Self {
        Self {
            state: Mutex::new(State {
                rng: Rng::new(seed),
                every,
                waits: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over: the running CPU has come to the point that was chosen.
    pub(crate) fn hand_over(&self) {
        if !generator::is_generator() {
            // A CPU that runs alone.
            traced::skip(u32::MAX);
            return;
        }
        // The other way to yield needs its handle brought to every point.
        #[allow(deprecated)]
        generator::yield_with(());
    }

    /// Hands over now and then, unless nothing is left to chance.
    pub(crate) fn milestone(&self) {
        const ONE_IN: u64 = 6;
        let mut state = self.state();
        let hands_over = state.every.is_some() && state.rng.one_in(ONE_IN);
        drop(state);
        if hands_over {
            self.hand_over();
        }
    }

    /// Hands over, to another one if there is any.
    pub(crate) fn wait(&self) {
        self.state().waits = true;
        self.hand_over();
    }

    /// Runs the programs to their ends, calling `enter` with the number of each CPU whose turn it is.
    pub(crate) fn run(&self, programs: Vec<Program<'_>>, enter: impl Fn(usize)) {
        let start = |(number, program)| (number, Gn::new_opt(STACK, program));
        let mut cpus: Vec<(usize, Generator<'_, (), ()>)> =
            programs.into_iter().enumerate().map(start).collect();
        let mut last = None;
        let mut turns = 0;
        while !cpus.is_empty() {
            turns += 1;
            let choice = self.choose(cpus.len(), last);
            let (number, cpu) = &mut cpus[choice];
            enter(*number);
            let end = panic::catch_unwind(AssertUnwindSafe(|| {
                assert!(turns < TURNS, "the CPUs wait for each other");
                cpu.resume()
            }));
            last = Some(choice);
            if let Err(cause) = end {
                // The others' stacks are unwound now: this thread is not panicking any more.
                traced::quietly(|| drop(cpus));
                panic::resume_unwind(cause);
            }
            if cpu.is_done() {
                cpus.remove(choice);
                last = None;
            }
        }
    }

    fn choose(&self, cpus: usize, last: Option<usize>) -> usize {
        let mut state = self.state();
        let points = match state.every {
            Some(every) => state.rng.below(2 * u64::from(every)) as u32,
            None => u32::MAX,
        };
        traced::skip(points);
        let waits = std::mem::replace(&mut state.waits, false);
        match last.filter(|_| waits && cpus > 1) {
            Some(last) => {
                let other = state.rng.below(cpus as u64 - 1) as usize;
                other + usize::from(other >= last)
            }
            None => state.rng.below(cpus as u64) as usize,
        }
    }
}
