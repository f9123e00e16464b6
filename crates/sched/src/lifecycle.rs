//! How a VM is, and what is asked of it.

use crate::sync::{AtomicBool, Mutex, MutexGuard};
use alloc::string::String;
use core::fmt;
use core::sync::atomic::Ordering::SeqCst;

/// How a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has no run.
    Stopped,
    /// It is being loaded.
    Starting,
    /// It runs.
    Running,
    /// It is held until it is resumed.
    Paused,
    /// It has no run, because something went wrong.
    Failed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Failed => "failed",
        })
    }
}

/// A change of a VM that happens when none of its vCPUs runs. A later one in this order wins over an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transition {
    /// To pause.
    Pause,
    /// To start anew.
    Reset,
    /// To end.
    Stop,
    /// To end, because of a failure.
    Fail,
}

/// A transition that is complete: what follows from it is the caller's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "what follows from it is the caller's"]
pub enum Completed {
    /// The VM is paused.
    Paused,
    /// It is to be loaded anew.
    Reset,
    /// It has ended, for this reason.
    Stopped(String),
    /// It has failed, for this reason.
    Failed(String),
}

/// For whose sake a VM is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Until somebody resumes it.
    Lasting,
    /// Until the host's session resumes it or is over.
    Session,
}

/// Who keeps a VM paused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Holds {
    lasting: bool,
    session: bool,
}

impl Holds {
    fn of(&mut self, hold: Hold) -> &mut bool {
        match hold {
            Hold::Lasting => &mut self.lasting,
            Hold::Session => &mut self.session,
        }
    }

    /// `hold` is taken; twice is once.
    pub fn take(&mut self, hold: Hold) {
        *self.of(hold) = true;
    }

    /// `hold` is given back, if it was taken.
    pub fn give_back(&mut self, hold: Hold) {
        *self.of(hold) = false;
    }

    /// Whether `hold` is taken.
    #[must_use]
    pub fn has(mut self, hold: Hold) -> bool {
        *self.of(hold)
    }

    /// Whether any is.
    #[must_use]
    pub fn any(self) -> bool {
        self.lasting || self.session
    }
}

/// How a VM is, and why.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its state.
    pub state: State,
    /// Why it stopped or failed.
    pub reason: String,
    /// What was asked of it and is not complete yet.
    pub pending: Option<Transition>,
    /// How often it was restarted.
    pub restarts: u32,
    /// Who keeps it paused: a restart ends in a pause too.
    pub holds: Holds,
    /// How often it was let go on after a pause: what was true of one pause is not of the next.
    pub pauses: u32,
}

/// A VM's status, and whether its vCPUs are held.
#[derive(Debug)]
pub struct Lifecycle {
    status: Mutex<Status>,
    /// Its vCPUs stay off their CPUs. Changed under `status`, read by all.
    held: AtomicBool,
}

impl Lifecycle {
    /// Of a VM that has no run yet, for this reason.
    pub fn new(reason: String) -> Self {
        Self {
            status: Mutex::new(Status {
                state: State::Stopped,
                reason,
                pending: None,
                restarts: 0,
                holds: Holds::default(),
                pauses: 0,
            }),
            held: AtomicBool::new(true),
        }
    }

    /// How it is. Held, so that nobody changes it meanwhile.
    pub fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock()
    }

    /// Whether its vCPUs must stay off their CPUs for now.
    #[inline]
    pub fn is_held(&self) -> bool {
        self.held.load(SeqCst)
    }

    pub(crate) fn set_held(&self, held: bool) {
        self.held.store(held, SeqCst);
    }
}
