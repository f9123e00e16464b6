//! What has happened to VMs, for the room above to tell.

use crate::arch::lock::{Mutex, rank};
use alloc::collections::VecDeque;
use core::sync::atomic::{AtomicBool, Ordering::*};
use tidemark_sched::State;
use tidemark_wire::message::VmId;

/// Something that happened.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A VM's state is another.
    State(VmId, State),
    /// No VM is left, and the machine is to go off then.
    Over,
}

/// What nobody has told yet. As long as the changes that are made between two looks of one CPU: it looks after what changes VMs, which
/// is the host's requests, a visit to the jobs, and a vCPU that leaves its CPU.
static EVENTS: Mutex<VecDeque<Event>, { rank::EVENTS }> = Mutex::new(VecDeque::new());
static WAITING: AtomicBool = AtomicBool::new(false);

/// Notes that it happened.
pub(super) fn note(event: Event) {
    EVENTS.lock().push_back(event);
    WAITING.store(true, Release);
}

/// Whether there is any to be told.
#[inline]
pub fn waiting() -> bool {
    WAITING.load(Acquire)
}

/// The first that nobody has told.
pub fn take() -> Option<Event> {
    let mut events = EVENTS.lock();
    let event = events.pop_front();
    if events.is_empty() {
        WAITING.store(false, Release);
    }
    event
}
