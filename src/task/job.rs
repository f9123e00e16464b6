//! Long work, in bounded steps.
//!
//! A job is a step function that says whether it wants another turn. Any CPU may take the
//! next step of any job; one job is never stepped by two CPUs at once.

use super::meter;
use crate::arch::lock::{Mutex, rank};
use crate::arch::timer::NEVER;
use crate::arch::{gic, timer};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};
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

/// When a visit to the jobs ends, in microseconds: it begins no further step then. A step
/// itself is bounded in work, not in time.
const BUDGET: u64 = 150;

static JOBS: Mutex<VecDeque<Job>, { rank::JOBS }> = Mutex::new(VecDeque::new());
/// Jobs that are queued or being stepped.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Jobs for later: when each may begin, and which.
static DELAYED: Mutex<Vec<(u64, Job)>, { rank::DELAYED }> = Mutex::new(Vec::new());
/// When the first of them is due; `NEVER` if there is none.
static EARLIEST: AtomicU64 = AtomicU64::new(NEVER);

/// Queues a job. CPUs that idle have to be told (`sched::submit`).
pub fn enqueue(job: Job) {
    WAITING.fetch_add(1, Relaxed);
    JOBS.lock().push_back(job);
}

/// Keeps a job for when the count is `due`. A CPU's timer has to be set for that.
pub fn enqueue_at(due: u64, job: Job) {
    let mut delayed = DELAYED.lock();
    delayed.push((due, job));
    EARLIEST.fetch_min(due, Relaxed);
}

/// When the first delayed job is due.
pub fn earliest() -> u64 {
    EARLIEST.load(Relaxed)
}

/// Puts delayed jobs that are due among the others.
pub fn begin_due(now: u64) {
    if now < earliest() {
        return;
    }
    let mut delayed = DELAYED.lock();
    let due: Vec<_> = delayed.extract_if(.., |(due, _)| *due <= now).collect();
    let first = delayed.iter().map(|(due, _)| *due).min();
    EARLIEST.store(first.unwrap_or(NEVER), Relaxed);
    drop(delayed);
    due.into_iter().for_each(|(_, job)| enqueue(job));
}

/// Whether there are jobs.
pub fn waiting() -> bool {
    WAITING.load(Relaxed) != 0
}

/// Takes steps until the time is up, an interrupt waits, or nothing is left to do. The CPU looked for
/// an interrupt last at `begun`.
pub fn visit(begun: u64) -> Found {
    let Some(mut job) = JOBS.lock().pop_front() else {
        return Found::Nothing;
    };
    let end = begun + timer::ticks(BUDGET);
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
