//! Where a vCPU stands, and what is asked of it.

use crate::NEVER;
use crate::sync::{AtomicU8, AtomicU64, AtomicUsize, Mutex, MutexGuard};
use core::sync::atomic::Ordering::*;

/// Where a vCPU stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Turned off (PSCI), or its VM has no run.
    Off,
    /// Turned on, and not run yet: in its CPU's queue.
    Starting,
    /// Waits for an interrupt.
    Blocked,
    /// In its CPU's queue.
    Queued,
    /// On its CPU.
    Running,
    /// Would run, but its VM is held.
    Paused,
    /// Would run, but its quota is used up. An interrupt does not end this; it is taken afterwards.
    Stalled,
}

/// What may be asked of a vCPU, by any CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Request {
    /// The vGIC has something new for its list registers.
    Sync = 1,
    /// It may have to leave its CPU, or the CPU's timer to be set anew.
    Schedule = 2,
}

/// What was asked of a vCPU and is not done yet.
#[derive(Debug)]
pub struct Requests(AtomicU8);

/// What was taken of [`Requests`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// A sync, or nothing.
    SyncAtMost,
    /// All there is.
    Schedule,
}

impl Requests {
    const fn none() -> Self {
        Self(AtomicU8::new(0))
    }

    /// Asks for it. Who then finds the vCPU running, under its run state's lock, has its CPU kicked: requests are taken
    /// before it is made to run, and before each return to its guest.
    #[inline]
    pub fn make(&self, request: Request) {
        self.0.fetch_or(request as u8, SeqCst);
    }

    /// Whether anything is asked for.
    #[inline]
    pub fn any(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// Takes all there are, and tells whether more is asked for than [`Request::Sync`].
    #[inline]
    pub fn take(&self) -> Taken {
        match self.0.swap(0, SeqCst) & Request::Schedule as u8 {
            0 => Taken::SyncAtMost,
            _ => Taken::Schedule,
        }
    }
}

/// What the scheduler keeps of a vCPU.
#[derive(Debug)]
pub struct Entity {
    /// What is to be done before it goes back to its guest.
    pub requests: Requests,
    run: Mutex<RunState>,
    /// The CPU that it runs on, by index.
    home: AtomicUsize,
    /// When it no longer waits for its quota, as a count.
    stall_end: AtomicU64,
}

impl Entity {
    /// Off, and at home on CPU 0.
    pub const fn new() -> Self {
        Self {
            requests: Requests::none(),
            run: Mutex::new(RunState::Off),
            home: AtomicUsize::new(0),
            stall_end: AtomicU64::new(NEVER),
        }
    }

    /// Where it stands. Held, so that nobody changes it meanwhile.
    pub fn run(&self) -> MutexGuard<'_, RunState> {
        self.run.lock()
    }

    /// The CPU that it runs on, by index.
    pub fn home(&self) -> usize {
        self.home.load(Relaxed)
    }

    /// Gives it its CPU, before it runs for the first time.
    pub fn set_home(&self, cpu: usize) {
        self.home.store(cpu, Relaxed);
    }

    /// When it no longer waits for its quota, as a count.
    pub fn stall_end(&self) -> u64 {
        self.stall_end.load(Relaxed)
    }

    /// It waits for its quota, until `end`. Its run state's lock is held.
    pub(crate) fn begin_stall(&self, run: &mut RunState, end: u64) {
        *run = RunState::Stalled;
        self.stall_end.store(end, Relaxed);
    }

    /// If it waits for its quota it waits no more, and is paused until somebody decides what comes next.
    #[must_use]
    pub(crate) fn end_stall(&self, run: &mut RunState) -> bool {
        let waits = *run == RunState::Stalled;
        if waits {
            *run = RunState::Paused;
            self.stall_end.store(NEVER, Relaxed);
        }
        waits
    }
}

impl Default for Entity {
    fn default() -> Self {
        Self::new()
    }
}
