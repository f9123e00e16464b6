//! Which simulated CPU goes on.
//!
//! Each CPU is a coroutine, all on one thread. A CPU goes on until a point at which it is another one's turn: points are in
//! front of every access to what CPUs share. One that waits for another hands over at once.
//!
//! The turns are a [`Path`], one of all there are: a run is repeated with one choice changed until
//! none is left, which tries every order of a small scenario in which CPUs are interrupted so many
//! times at most.

use generator::{Generator, Gn};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Stack of a CPU, in words: a panic in it prints a backtrace.
const STACK: usize = 64 << 10;

/// Turns after which a run counts as one that never ends.
const TURNS: u64 = 200_000;

/// What a CPU does.
pub type Program<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Gives the turns.
pub struct Scheduler {
    state: Mutex<State>,
}

struct State {
    path: Path,
    /// The CPU whose turn it was waits for another.
    waits: bool,
    /// Which of the other CPUs interrupts the one whose turn it was.
    interrupts: Option<usize>,
    /// CPUs that have not come to their ends.
    running: usize,
    /// The CPU whose turn it is.
    current: usize,
    /// A CPU has failed: the others' stacks are unwound, and nobody waits or hands over any more.
    ended: bool,
}

/// A way through the tree of all orders.
#[derive(Clone, Debug)]
pub struct Path {
    /// What was chosen at each fork, and of how many.
    forks: Vec<(usize, usize)>,
    at: usize,
    interruptions: u32,
    bound: u32,
}

impl Path {
    /// The first one, of those with at most `bound` interruptions.
    pub const fn first(bound: u32) -> Self {
        Self {
            forks: Vec::new(),
            at: 0,
            interruptions: 0,
            bound,
        }
    }

    /// The one after this, which was gone to its end.
    pub fn next(mut self) -> Option<Self> {
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
    /// Makes one that goes a path.
    pub fn of(path: Path) -> Self {
        Self {
            state: Mutex::new(State {
                path,
                waits: false,
                interrupts: None,
                running: 0,
                current: 0,
                ended: false,
            }),
        }
    }

    /// The path that was gone.
    pub fn path(&self) -> Path {
        self.state().path.clone()
    }

    /// The CPU whose turn it is, by its place among the programs.
    pub fn current(&self) -> usize {
        self.state().current
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running CPU has come to a point.
    pub fn point(&self) {
        if !generator::is_generator() {
            return;
        }
        let mut state = self.state();
        if state.ended {
            return;
        }
        let others = state.running - 1;
        let which = state.path.interrupt(others);
        if which.is_none() {
            return;
        }
        state.interrupts = which;
        drop(state);
        hand_over();
    }

    /// The running CPU is between two things: another's turn is no interruption.
    pub fn breathe(&self) {
        if !generator::is_generator() {
            return;
        }
        let mut state = self.state();
        if state.ended {
            return;
        }
        let others = state.running.saturating_sub(1);
        if let Some(other) = state.path.choose(1 + others).checked_sub(1) {
            state.interrupts = Some(other);
            drop(state);
            hand_over();
        }
    }

    /// Hands over, to another one if there is any.
    pub fn wait(&self) {
        let mut state = self.state();
        if state.ended {
            return;
        }
        state.waits = true;
        drop(state);
        hand_over();
    }

    /// Runs the programs to their ends.
    pub fn run(&self, programs: Vec<Program<'_>>) {
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
            self.state().current = *number;
            let end = panic::catch_unwind(AssertUnwindSafe(|| {
                assert!(turns < TURNS, "the CPUs wait for each other");
                cpu.resume()
            }));
            last = Some(choice);
            if let Err(cause) = end {
                self.state().ended = true;
                drop(cpus);
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
        match (last.filter(|_| cpus > 1), interrupts) {
            (Some(last), Some(other)) => but(last, other),
            // In turn, so that two that wait for a third do not wait for ever.
            (Some(last), None) if waits => (last + 1) % cpus,
            (Some(last), None) => last,
            (None, _) => state.path.choose(cpus),
        }
    }
}

fn hand_over() {
    if !generator::is_generator() {
        return;
    }
    // The other way to yield needs its handle brought to every point.
    #[allow(deprecated)]
    generator::yield_with(());
}
