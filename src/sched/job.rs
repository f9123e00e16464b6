//! Long work, in bounded steps.
//!
//! A job is a step function that says whether it wants another turn. Any CPU may take the
//! next step of any job; one job is never stepped by two CPUs at once.

use super::meter;
use crate::arch::{gic, timer};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use core::sync::atomic::{AtomicUsize, Ordering::*};
use spin::Mutex;
use tidemark_wire::message::Task;

/// What a step says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do.
    Again,
    /// There is more to do, but not for this CPU at the moment.
    Later,
    /// The job is over.
    Done,
}

/// Whether there was a job to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// At least one step was taken.
    Work,
    /// There was none.
    Nothing,
}

/// A job: each call is one bounded step.
pub type Job = Box<dyn FnMut() -> Step + Send>;

static JOBS: Mutex<VecDeque<Job>> = Mutex::new(VecDeque::new());
/// Jobs that are queued or being stepped.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Gives the CPUs a job.
pub fn submit(job: Job) {
    enqueue(job);
    super::call_for_work();
}

/// Gives each CPU a job, for work that is divided among them.
pub fn submit_to_all(job: impl Fn() -> Job) {
    (0..super::cpus()).for_each(|_| enqueue(job()));
    super::call_for_work();
}

/// Gives this CPU a small job, for its next tick at the latest, and calls no other: for what
/// guests cause all the time.
pub fn submit_here(job: Job) {
    enqueue(job);
    super::call(crate::arch::cpu::index());
}

fn enqueue(job: Job) {
    WAITING.fetch_add(1, Relaxed);
    JOBS.lock().push_back(job);
}

/// Whether there are jobs.
pub fn waiting() -> bool {
    WAITING.load(Relaxed) != 0
}

/// Takes steps until the time is up, an interrupt waits, or nothing is left to do. The CPU looked for
/// an interrupt last at `begun`.
pub fn run_for(begun: u64, ticks: u64) -> Found {
    let Some(mut job) = JOBS.lock().pop_front() else {
        return Found::Nothing;
    };
    let end = begun + ticks;
    let mut looked = begun;
    loop {
        let step = job();
        let now = timer::now();
        meter::note(Task::Stretch, looked, now);
        if step == Step::Done {
            WAITING.fetch_sub(1, Relaxed);
            return Found::Work;
        }
        if step == Step::Later || now >= end || gic::interrupt_pending() {
            JOBS.lock().push_back(job);
            return Found::Work;
        }
        looked = now;
    }
}
