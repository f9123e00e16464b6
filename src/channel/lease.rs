//! Whether the session that holds something is still there.
//!
//! Any request renews its lease. One delayed job looks once in a while whether it is over, as long as there is one.
//!
//! Concurrency: all of it under `SESSION`, which is not held while the session is closed.

use super::{Open, SESSION, commands};
use crate::arch::timer;
use crate::sched::job::{self, Step};
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tidemark_lease::{Lease, Verdict};
use tidemark_wire::frame::Session;
use tidemark_wire::message::{ErrorReply, Hold};
use tidemark_wire::{PATIENCE_MS, PATIENCE_MS_MAX, PATIENCE_MS_MIN};

/// How late a look may come, in microseconds, and how long is waited for what stands at the line.
const GRACE: u64 = 1_000_000;
/// How long goes by between two looks at most, in microseconds.
const LOOKS: u64 = 1_000_000;

/// Whether the job is there. Changed under `SESSION`.
static WATCHED: AtomicBool = AtomicBool::new(false);

/// A request of `session` came. False if that is not the open one.
pub fn heard(session: Session) -> bool {
    let mut open = SESSION.lock();
    let Some(open) = open.as_mut().filter(|open| open.session == session) else {
        return false;
    };
    if let Some(lease) = &mut open.lease {
        lease.heard(timer::now());
    }
    true
}

/// The session takes `hold`: from now on it must be heard of.
pub fn begin_for(hold: Hold) {
    if hold == Hold::Lasting {
        return;
    }
    if let Some(open) = SESSION.lock().as_mut().filter(|open| open.lease.is_none()) {
        begin(open, PATIENCE_MS);
    }
}

/// The session says how long it may be silent.
///
/// # Errors
///
/// Too long, or too short to be told from a busy host.
pub fn set_patience(patience_ms: u32) -> Result<(), ErrorReply> {
    if !(PATIENCE_MS_MIN..=PATIENCE_MS_MAX).contains(&patience_ms) {
        return Err(ErrorReply::OutOfRange);
    }
    if let Some(open) = SESSION.lock().as_mut() {
        begin(open, patience_ms);
    }
    Ok(())
}

fn begin(open: &mut Open, patience_ms: u32) {
    let patience = timer::ticks(u64::from(patience_ms) * 1000);
    open.lease = Some(Lease::new(timer::now(), patience, timer::ticks(GRACE)));
    if !WATCHED.swap(true, Relaxed) {
        look_at(u64::MAX);
    }
}

/// Has it looked at, and in a while in any case: the patience may be made shorter meanwhile.
fn look_at(at: u64) {
    let soon = timer::now().saturating_add(timer::ticks(LOOKS));
    job::submit_at(at.min(soon), Box::new(look));
}

fn look() -> Step {
    let verdict = {
        let mut open = SESSION.lock();
        let Some(lease) = open.as_mut().and_then(|open| open.lease.as_mut()) else {
            WATCHED.store(false, Relaxed);
            return Step::Done;
        };
        lease.look(timer::now())
    };
    match verdict {
        Verdict::LookAt(at) => look_at(at),
        Verdict::Over => {
            commands::close_if_silent();
            // Heard at the last moment, or there is another session.
            return Step::Again;
        }
    }
    Step::Done
}

/// Whether nothing was heard for too long.
pub fn is_over() -> bool {
    let mut open = SESSION.lock();
    let lease = open.as_mut().and_then(|open| open.lease.as_mut());
    lease.is_some_and(|lease| lease.look(timer::now()) == Verdict::Over)
}
