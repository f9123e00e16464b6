//! Where the long operations are: starting, harvesting, stopping.
//!
//! One mutex, held for one bounded step. Two CPUs that step at once do not wait for each other: the
//! second is told there is more to do. Cursors are guest addresses, not indices, so slots may come and
//! go between steps.
//!
//! Lock order: this mutex, then the table lock. The fault path takes only the table lock.

use crate::slot::{LogMode, Scope};
use crate::tlb::Pending;
use crate::types::{Epoch, Level};

/// The life of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Off,
    Starting(StartPass),
    On,
    Stopping(StopPass),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StartPass {
    /// Forgetting what an earlier log left; nothing is tracked yet.
    Clear(u64),
    /// Taking the write permission away, or splitting.
    Arm(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StopPass {
    /// Giving the write permission back.
    Release(u64),
    /// Making blocks of the level.
    Collapse(Level, u64),
}

/// A harvest that is not settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taking {
    pub(crate) epoch: Epoch,
    pub(crate) pass: TakePass,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TakePass {
    /// Forgetting the committed epoch before.
    Clear,
    /// Collecting.
    Scan(u64),
    /// With the host.
    Taken,
}

/// How the last epoch ended, kept so that a repeated request gets the same answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    Committed,
    Aborted,
}

/// Which leaves a harvest must look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Leaves {
    /// All are of the log's engine.
    OfTheEngine,
    /// The engine was changed: the next harvest looks at every leaf and brings it over.
    Mixed,
}

pub(crate) struct Control {
    pub(crate) phase: Phase,
    pub(crate) mode: Option<LogMode>,
    pub(crate) scope: Scope,
    pub(crate) taking: Option<Taking>,
    pub(crate) last: Option<(Epoch, Fate)>,
    pub(crate) last_committed: Option<Epoch>,
    /// From this address on, the in-flight bitmaps still hold a committed epoch. The next take
    /// forgets it piece by piece; so commit is quick, however large the VM. An aborted epoch is
    /// simply not forgotten: what it held counts for the next one.
    pub(crate) stale: Option<u64>,
    pub(crate) leaves: Leaves,
    pub(crate) pending: Pending,
}

impl Control {
    pub(crate) const fn new() -> Self {
        Self {
            phase: Phase::Off,
            mode: None,
            scope: Scope::All,
            taking: None,
            last: None,
            last_committed: None,
            stale: None,
            leaves: Leaves::OfTheEngine,
            pending: Pending::new(),
        }
    }
}

/// The stage a log is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogStage {
    /// Off.
    Off,
    /// Being started; not to be relied on yet.
    Starting,
    /// On.
    On,
    /// Being stopped.
    Stopping,
}

/// What a log is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogStatus {
    /// The stage.
    pub stage: LogStage,
    /// How it works, while it is not off.
    pub mode: Option<LogMode>,
    /// The epoch being taken or with the host.
    pub outstanding: Option<Epoch>,
    /// The last epoch committed since the start.
    pub last_committed: Option<Epoch>,
    /// Pages noted and not yet with the host. A lower bound: what the hardware or a dirty block
    /// knows is found by the next take.
    pub live_pages: u64,
}
