//! Which simulated CPU goes on: decided by a seed, so that a seed repeats a run exactly.
//!
//! Each CPU is a coroutine, all on one thread. A CPU goes on until a point at which the dice say that
//! it is another one's turn: points are in front of every access to a table or a bitmap and in every
//! call of the `Hardware` trait. One that waits for another (a lock, an entry that is busy) hands over
//! at once.
//!
//! Or decided by a [`Path`], one of all there are: then a run is repeated with one choice changed until
//! none is left, which tries every order of a small scenario in which CPUs are interrupted so many
//! times at most. Choices are made where CPUs meet only: the words that a scenario is about.

use super::rng::Rng;
use super::traced;
use generator::{Generator, Gn};
use std::boxed::Box;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

/// Stack of a CPU, in words: a panic in it prints a backtrace.
const STACK: usize = 64 << 10;

/// Turns after which a run counts as one that never ends. The longest run of a test, or of 10,000 histories, takes
/// eleven thousand. Words may change all the time in one that never ends, so that nothing does is no sign of it.
const TURNS: u64 = 200_000;

/// What a CPU does.
pub(crate) type Program<'a> = Box<dyn FnOnce() + Send + 'a>;

/// The dice.
pub(crate) struct Scheduler {
    state: Mutex<State>,
}

struct State {
    order: Order,
    /// The CPU whose turn it was waits for another.
    waits: bool,
    /// Which of the other CPUs interrupts the one whose turn it was.
    interrupts: Option<usize>,
    /// CPUs that have not come to their ends.
    running: usize,
}

enum Order {
    Dice {
        rng: Rng,
        /// Points passed over between two turns, on average; none is taken at `None`.
        every: Option<u32>,
    },
    Path(Path),
}

/// A way through the tree of all orders.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// What was chosen at each fork, and of how many.
    forks: Vec<(usize, usize)>,
    at: usize,
    interruptions: u32,
    bound: u32,
}

impl Path {
    /// The first one, of those with at most `bound` interruptions.
    pub(crate) const fn first(bound: u32) -> Self {
        Self {
            forks: Vec::new(),
            at: 0,
            interruptions: 0,
            bound,
        }
    }

    /// The one after this, which was gone to its end.
    pub(crate) fn next(mut self) -> Option<Self> {
        while let Some((chosen, of)) = self.forks.pop() {
            if chosen + 1 < of {
                self.forks.push((chosen + 1, of));
                (self.at, self.interruptions) = (0, 0);
                return Some(self);
            }
        }
        None
    }

    fn choose(&mut self, of: usize) -> usize {
        if of < 2 {
            return 0;
        }
        if self.at == self.forks.len() {
            self.forks.push((0, of));
        }
        let (chosen, known) = self.forks[self.at];
        assert_eq!(known, of, "the run is not the same a second time");
        self.at += 1;
        chosen
    }

    /// Which of `others` interrupts here, if any.
    fn interrupt(&mut self, others: usize) -> Option<usize> {
        if self.interruptions == self.bound {
            return None;
        }
        let which = self.choose(1 + others).checked_sub(1)?;
        self.interruptions += 1;
        Some(which)
    }
}

impl Scheduler {
    /// Makes one that hands over at every `every`th point on average, or only where a CPU waits.
    pub(crate) fn new(seed: u64, every: Option<u32>) -> Self {
        let rng = Rng::new(seed);
        Self::with(Order::Dice { rng, every })
    }

    /// Makes one that goes a path.
    pub(crate) fn of(path: Path) -> Self {
        Self::with(Order::Path(path))
    }

    fn with(order: Order) -> Self {
        Self {
            state: Mutex::new(State {
                order,
                waits: false,
                interrupts: None,
                running: 0,
            }),
        }
    }

    /// Returns the path that was gone.
    pub(crate) fn path(&self) -> Option<Path> {
        match &self.state().order {
            Order::Path(path) => Some(path.clone()),
            Order::Dice { .. } => None,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running CPU has come to a point: the one that the dice chose, or any of a path.
    pub(crate) fn point(&self) {
        if !generator::is_generator() {
            // A CPU that runs alone.
            traced::skip(u32::MAX);
            return;
        }
        let mut state = self.state();
        let others = state.running - 1;
        if let Order::Path(path) = &mut state.order {
            let which = path.interrupt(others);
            if which.is_none() {
                return;
            }
            state.interrupts = which;
        }
        drop(state);
        self.hand_over();
    }

    fn hand_over(&self) {
        if !generator::is_generator() {
            return;
        }
        // The other way to yield needs its handle brought to every point.
        #[allow(deprecated)]
        generator::yield_with(());
    }

    /// The running CPU is between two things: another's turn is no interruption.
    pub(crate) fn breathe(&self) {
        let mut state = self.state();
        let others = state.running.saturating_sub(1);
        let Order::Path(path) = &mut state.order else {
            drop(state);
            return self.point();
        };
        if generator::is_generator()
            && let Some(other) = path.choose(1 + others).checked_sub(1)
        {
            state.interrupts = Some(other);
            drop(state);
            self.hand_over();
        }
    }

    /// Hands over now and then, unless nothing is left to chance.
    pub(crate) fn milestone(&self) {
        const ONE_IN: u64 = 6;
        let hands_over = match &mut self.state().order {
            Order::Dice { rng, every } => every.is_some() && rng.one_in(ONE_IN),
            Order::Path(_) => true,
        };
        if hands_over {
            self.point();
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
            self.state().running = cpus.len();
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
        let state = &mut *self.state();
        let waits = std::mem::take(&mut state.waits);
        let interrupts = state.interrupts.take();
        let but = |last: usize, other: usize| other + usize::from(other >= last);
        let last = last.filter(|_| cpus > 1);
        match &mut state.order {
            Order::Dice { rng, every } => {
                let points = match every {
                    Some(every) => rng.below(2 * u64::from(*every)) as u32,
                    None => u32::MAX,
                };
                traced::skip(points);
                match last.filter(|_| waits) {
                    Some(last) => but(last, rng.below(cpus as u64 - 1) as usize),
                    None => rng.below(cpus as u64) as usize,
                }
            }
            Order::Path(path) => {
                traced::skip(0);
                match (last, interrupts) {
                    (Some(last), Some(other)) => but(last, other),
                    // In turn, so that two that wait for a third do not wait for ever.
                    (Some(last), None) => (last + 1) % cpus,
                    (None, _) => path.choose(cpus),
                }
            }
        }
    }
}
