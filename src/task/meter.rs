//! What EL2's own work costs, and how long a CPU goes without looking for an interrupt.
//!
//! Work is bounded in steps, not in time; this tells whether the bounds are right. A step costs two
//! reads of the counter and three atomic additions, and nothing here is on the way of an exit.
//!
//! Two kinds of figure. A *task* is a piece of work wherever it is done: in a job's step, or in the
//! request that asked for it. A *stretch* ([`Task::Stretch`]) is what lies between two looks for an
//! interrupt: a job's step with what led to it, or one interrupt of the UART with the requests that
//! came by it. What an exit costs the guest sees itself, and is not counted here.
//!
//! Concurrency: atomics, each for itself. A reader meanwhile may see a step counted and its ticks not.

use crate::arch::timer;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tidemark_wire::message::{Cost, Task};

struct Meter {
    times: AtomicU64,
    ticks: AtomicU64,
    longest: AtomicU64,
}

static METERS: [Meter; Task::ALL.len()] = [const {
    Meter {
        times: AtomicU64::new(0),
        ticks: AtomicU64::new(0),
        longest: AtomicU64::new(0),
    }
}; Task::ALL.len()];

/// Notes that `task` took a CPU from `begun` to `now`.
pub fn note(task: Task, begun: u64, now: u64) {
    // The table has a place for each.
    let Some(meter) = METERS.get(task as usize) else {
        return;
    };
    let ticks = now.saturating_sub(begun);
    meter.times.fetch_add(1, Relaxed);
    meter.ticks.fetch_add(ticks, Relaxed);
    meter.longest.fetch_max(ticks, Relaxed);
}

/// Does a piece of work and notes what it cost.
pub fn metered<T>(task: Task, work: impl FnOnce() -> T) -> T {
    let begun = timer::now();
    let done = work();
    note(task, begun, timer::now());
    done
}

/// What each task has cost since the machine started.
pub fn costs() -> impl Iterator<Item = Cost> {
    let of = |(&task, meter): (&Task, &Meter)| Cost {
        task,
        times: meter.times.load(Relaxed),
        ticks: meter.ticks.load(Relaxed),
        longest: meter.longest.load(Relaxed),
    };
    Task::ALL.iter().zip(&METERS).map(of)
}
