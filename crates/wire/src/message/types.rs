//! The nouns of the messages.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

/// A VM, in bundle order from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct VmId(pub u16);

/// A memory slot of a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SlotId(pub u16);

/// A harvest. Grows with each one; 0 is "none yet".
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Until when what was asked for holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Hold {
    /// Until it is taken back, whatever becomes of the session.
    Lasting,
    /// Until the session ends, however it does.
    Session,
}

/// How a VM is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum VmState {
    /// Being loaded.
    Starting,
    /// Its vCPUs run, or wait for an interrupt.
    Running,
    /// None of its vCPUs runs until it is resumed.
    Paused,
    /// It has ended, or was stopped.
    Stopped,
    /// It could not be started or go on; [`VmInfo::reason`] tells why.
    Failed,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// One line about a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmSummary {
    /// Its id.
    pub id: VmId,
    /// Its name from the manifest.
    pub name: String,
    /// How it is.
    pub state: VmState,
    /// Its vCPUs.
    pub vcpus: u8,
    /// Its memory.
    pub memory_bytes: u64,
}

/// All about a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// The line about it.
    pub summary: VmSummary,
    /// Why it failed or stopped; empty otherwise.
    pub reason: String,
    /// How often it was restarted.
    pub restarts: u32,
    /// Its memory, by slot id.
    pub slots: Vec<SlotInfo>,
    /// What the machine can do, the least over its CPUs.
    pub features: Features,
    /// How its memory is mapped now.
    pub mappings: Mappings,
    /// What it has cost since it was started.
    pub counters: Counters,
}

/// A memory slot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotInfo {
    /// Its id.
    pub id: SlotId,
    /// Where the guest sees it.
    pub base_ipa: u64,
    /// Its size.
    pub pages: u64,
    /// What the guest may do.
    pub access: SlotAccess,
    /// Where it lies in the machine: the first 16 extents, by address in the guest.
    pub extents: Vec<Extent>,
    /// Extents there are beyond those.
    pub more_extents: u32,
}

/// What the guest may do with a slot's memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum SlotAccess {
    /// Read, write and execute.
    ReadWrite,
    /// Read and execute; only what EL2 writes there is logged.
    ReadOnly,
}

/// Memory that is contiguous both for the guest and in the machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Extent {
    /// Where the guest sees it.
    pub ipa: u64,
    /// Where it is.
    pub pa: u64,
    /// Its size.
    pub pages: u64,
}

/// What the machine can do, the least common denominator of its CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Features {
    /// `ID_AA64MMFR1_EL1.HAFDBS`.
    pub hafdbs: u8,
    /// The hardware dirty bit is there and no erratum forbids it.
    pub dbm_usable: bool,
    /// `FEAT_BBM` level 2.
    pub bbm2: bool,
    /// `FEAT_S2FWB`.
    pub fwb: bool,
    /// `FEAT_TLBIRANGE`.
    pub tlb_range: bool,
    /// `FEAT_TTL`.
    pub ttl: bool,
    /// `FEAT_LSE`.
    pub lse: bool,
    /// 16-bit VMIDs.
    pub vmid16: bool,
    /// Width of the guests' address space.
    pub ipa_bits: u8,
    /// CPUs that came up.
    pub cpus: u16,
}

/// How a VM's memory is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Mappings {
    /// Leaves of 1 GiB.
    pub blocks_1g: u64,
    /// Leaves of 2 MiB.
    pub blocks_2m: u64,
    /// Leaves of 4 KiB.
    pub pages_4k: u64,
}

/// What a VM has cost.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Exits to EL2, of any kind.
    pub exits: u64,
    /// HVC and SMC.
    pub hypercalls: u64,
    /// Device accesses emulated.
    pub mmio: u64,
    /// WFI and WFE.
    pub wfi: u64,
    /// Physical interrupts taken while it ran.
    pub irqs: u64,
    /// Stage-2 translation faults.
    pub translation_faults: u64,
    /// Stage-2 permission faults on a tracked page.
    pub write_faults: u64,
    /// Blocks split.
    pub splits: u64,
    /// Blocks put back.
    pub collapses: u64,
    /// TLB invalidations broadcast.
    pub tlbis: u64,
}

/// How writes are noticed, as asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum EngineChoice {
    /// What the image finds best, after each harvest anew.
    Auto,
    /// By permission faults.
    WriteProtect,
    /// By the hardware's dirty bit.
    Dbm,
}

/// How writes are noticed, as it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Engine {
    /// By permission faults.
    WriteProtect,
    /// By the hardware's dirty bit.
    Dbm,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::WriteProtect => "wp",
            Self::Dbm => "dbm",
        })
    }
}

/// How finely writes are noticed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Granularity {
    /// 4 KiB from the first round.
    Page,
    /// Blocks as they stand; those found dirty are split for the next round.
    Adaptive,
    /// Blocks as they stand, never split.
    Block,
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Page => "page",
            Self::Adaptive => "adaptive",
            Self::Block => "block",
        })
    }
}

/// A running log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Logging {
    /// How writes are noticed at the moment.
    pub engine: Engine,
    /// How finely.
    pub granularity: Granularity,
}

/// The state of a VM's log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct DirtyStatus {
    /// The log, if it runs.
    pub logging: Option<Logging>,
    /// The epoch in flight.
    pub outstanding: Option<Epoch>,
    /// The greatest epoch ever taken, however it ended.
    pub last_taken: Epoch,
    /// The last one committed.
    pub last_committed: Epoch,
    /// Pages known to be dirty now; under DBM the hardware knows of more.
    pub live_pages_hint: u64,
    /// Write faults taken since the log was started.
    pub write_faults: u64,
    /// Blocks split since then.
    pub splits: u64,
    /// Harvests completed since then.
    pub harvests: u64,
    /// Table entries of pages that these harvests looked at.
    pub entries_read: u64,
    /// What each vCPU may dirty, if that is limited.
    pub quota: Option<Quota>,
    /// What the quota has cost since the log was started.
    pub stalls: Stalls,
}

/// What EL2 does itself, and counts the cost of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Whatever lies between two looks for an interrupt, but not in an exit of a guest's.
    Stretch,
    /// Clearing a guest's memory before its first start, or handing it to its next life.
    Clear,
    /// Mapping it.
    Map,
    /// Copying a guest's files into it.
    Load,
    /// Making its devicetree and starting it.
    Start,
    /// A step of starting a dirty log.
    LogStart,
    /// A step of stopping one.
    LogStop,
    /// A step of a harvest.
    LogTake,
    /// A step of bringing pages over to another engine.
    LogEngine,
    /// Encoding a piece of a bitmap.
    BitmapRead,
    /// Encoding a piece of guest memory.
    MemoryRead,
    /// A step of a hash.
    Hash,
    /// A request, from its last byte to its answer's.
    Request,
    /// A byte typed on a plain terminal.
    Typed,
    /// Sending what guests print.
    Text,
    /// A step of adding or deleting a memory slot.
    Slot,
}

impl Task {
    /// All of them, in order.
    pub const ALL: [Self; 16] = [
        Self::Stretch,
        Self::Clear,
        Self::Map,
        Self::Load,
        Self::Start,
        Self::LogStart,
        Self::LogStop,
        Self::LogTake,
        Self::LogEngine,
        Self::BitmapRead,
        Self::MemoryRead,
        Self::Hash,
        Self::Request,
        Self::Typed,
        Self::Text,
        Self::Slot,
    ];
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stretch => "stretch",
            Self::Clear => "clear",
            Self::Map => "map",
            Self::Load => "load",
            Self::Start => "start",
            Self::LogStart => "log start",
            Self::LogStop => "log stop",
            Self::LogTake => "log take",
            Self::LogEngine => "log engine",
            Self::BitmapRead => "bitmap read",
            Self::MemoryRead => "memory read",
            Self::Hash => "hash",
            Self::Request => "request",
            Self::Typed => "typed",
            Self::Text => "text",
            Self::Slot => "slot",
        })
    }
}

/// What a task has cost since the machine started, in ticks of its counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Cost {
    /// What was done.
    pub task: Task,
    /// How often.
    pub times: u64,
    /// How long in all.
    pub ticks: u64,
    /// The longest.
    pub longest: u64,
}

/// What each vCPU of a VM may dirty while a log is on: pages in an interval.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Quota {
    /// Pages of 4 KiB, at least one.
    pub pages: u32,
    /// [`crate::QUOTA_INTERVAL_MS_MIN`] to [`crate::QUOTA_INTERVAL_MS_MAX`].
    pub interval_ms: u32,
}

/// What a quota costs a VM, over all its vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Stalls {
    /// How often a vCPU had to wait.
    pub count: u64,
    /// How long they waited, added up, in microseconds.
    pub time_us: u64,
    /// The part of its time that the slowest waits at present, in percent.
    pub percent: u8,
}

/// A harvest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TakeReport {
    /// Its name.
    pub epoch: Epoch,
    /// Dirty pages in all slots.
    pub dirty_pages: u64,
    /// Each slot that is logged, by id.
    pub slots: Vec<SlotDirty>,
}

/// A slot's part of a harvest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct SlotDirty {
    /// Which.
    pub slot: SlotId,
    /// Where the guest sees it.
    pub base_ipa: u64,
    /// Its size.
    pub pages: u64,
    /// How many are dirty.
    pub dirty_pages: u64,
}

/// Which offset `ConsoleAttach` is answered with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum ConsoleFrom {
    /// That of the next byte to be printed.
    Now,
    /// That of the oldest byte the target still has.
    Oldest,
}
