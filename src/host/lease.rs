//! Whether the session that holds something is still there.
//!
//! Any request renews its lease. Whoever gives it one has it looked at from then on ([`Look`]), once in a while, until it is over.
//!
//! Concurrency: all of it under `SESSION`, which is not held while the session is closed.

use super::{Open, SESSION};
use crate::arch::timer;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tidemark_lease::{Lease, Verdict};
use tidemark_wire::frame::Session;
use tidemark_wire::message::{ErrorReply, Hold};
use tidemark_wire::{PATIENCE_MS, PATIENCE_MS_MAX, PATIENCE_MS_MIN};

/// How late a look may come, in microseconds, and how long is waited for what stands at the line.
const GRACE: u64 = 1_000_000;
/// How long goes by between two looks at most, in microseconds.
const LOOKS: u64 = 1_000_000;

/// Whether somebody looks. Changed under `SESSION`.
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

/// When the lease is to be looked at, as a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "nobody else looks"]
pub struct Look(pub u64);

/// The session takes `hold`: from now on it must be heard of. Gives the first look, if nobody looks yet.
pub fn begin_for(hold: Hold) -> Option<Look> {
    if hold == Hold::Lasting {
        return None;
    }
    let mut open = SESSION.lock();
    let open = open.as_mut().filter(|open| open.lease.is_none())?;
    begin(open, PATIENCE_MS)
}

/// The session says how long it may be silent. Gives the first look, if nobody looks yet.
///
/// # Errors
///
/// Too long, or too short to be told from a busy host.
pub fn set_patience(patience_ms: u32) -> Result<Option<Look>, ErrorReply> {
    if !(PATIENCE_MS_MIN..=PATIENCE_MS_MAX).contains(&patience_ms) {
        return Err(ErrorReply::OutOfRange);
    }
    Ok(SESSION
        .lock()
        .as_mut()
        .and_then(|open| begin(open, patience_ms)))
}

fn begin(open: &mut Open, patience_ms: u32) -> Option<Look> {
    let patience = timer::ticks(u64::from(patience_ms) * 1000);
    open.lease = Some(Lease::new(timer::now(), patience, timer::ticks(GRACE)));
    (!WATCHED.swap(true, Relaxed)).then(|| soon(u64::MAX))
}

/// At this count, and in a while in any case: the patience may be made shorter meanwhile.
fn soon(at: u64) -> Look {
    Look(at.min(timer::now().saturating_add(timer::ticks(LOOKS))))
}

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The session may be silent yet.
    Again(Look),
    /// Nothing was heard for too long.
    Over,
    /// There is no lease, and nobody looks any more.
    Nothing,
}

/// Looks at it.
pub fn look() -> Found {
    let mut open = SESSION.lock();
    let Some(lease) = open.as_mut().and_then(|open| open.lease.as_mut()) else {
        WATCHED.store(false, Relaxed);
        return Found::Nothing;
    };
    match lease.look(timer::now()) {
        Verdict::LookAt(at) => Found::Again(soon(at)),
        Verdict::Over => Found::Over,
    }
}

/// Whether nothing was heard for too long.
pub fn is_over() -> bool {
    let mut open = SESSION.lock();
    let lease = open.as_mut().and_then(|open| open.lease.as_mut());
    lease.is_some_and(|lease| lease.look(timer::now()) == Verdict::Over)
}
