//! Long work on a VM that a host asks for: starting and stopping its dirty log, changing its
//! engine, harvests, memory slots, hashes. Each is a job; asking again tells how far it is, and then how it ended.
//!
//! A VM's `work` lock is held from the look at the log's state to what follows from it, so
//! that an operation which ends in between is not begun again. Lock order: `work`, then what
//! stage 2 takes.

use super::kept;
use super::refusal::{refusal, require_cleared};
use super::slots::{self, Change, Place, Wanted};
use super::throttle::{self, Mark};
use crate::arch::lock::{MutexGuard, rank};
use crate::arch::timer;
use crate::mm::PAGE;
use crate::platform::options::DirtyEngine;
use crate::sched;
use crate::task::job::Step;
use crate::task::meter::metered;
use crate::vm::Vm;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};
use sha2::{Digest, Sha256};
use tidemark_sched::State;
use tidemark_stage2::{self as s2, Error, LogStage, Progress};
use tidemark_wire::message::*;

/// Bytes hashed in one step, a divisor of a page: SHA-256 is some forty instructions a byte.
const HASH_STEP: usize = 512;

/// How far a piece of work is.
#[derive(Debug)]
pub enum Work<T> {
    /// Not yet there.
    Going {
        /// Done so far.
        done: u64,
        /// In all.
        total: u64,
    },
    /// There.
    Done(T),
}

/// Who says how writes are noticed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// Stage 2, after each harvest.
    #[default]
    Adaptive,
    /// The host, or the command line.
    Fixed(s2::Engine),
}

impl Policy {
    /// What `Auto` means is the command line's `dirty=`.
    fn of(choice: EngineChoice) -> Self {
        match choice {
            EngineChoice::WriteProtect => Self::Fixed(s2::Engine::WriteProtect),
            EngineChoice::Dbm => Self::Fixed(s2::Engine::Dbm),
            EngineChoice::Auto => match DEFAULT_ENGINE.load(Relaxed) {
                1 => Self::Fixed(s2::Engine::WriteProtect),
                2 => Self::Fixed(s2::Engine::Dbm),
                _ => Self::Adaptive,
            },
        }
    }

    /// What a log begins with.
    fn first(self, vm: &Vm) -> s2::Engine {
        match self {
            Self::Adaptive => vm.memory.stage2().best_engine(),
            Self::Fixed(engine) => engine,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Start(Policy, s2::Granularity),
    Stop,
    Engine(s2::Engine),
    Take(s2::Epoch),
    Slot(Wanted),
}

/// What is being done for a VM.
#[derive(Default)]
pub struct VmWork {
    operation: Option<Operation>,
    progress: (u64, u64),
    failure: Option<(Operation, ErrorReply)>,
    policy: Policy,
    /// Whose the log is, while there is one.
    keeper: Option<Hold>,
    /// Its session is over: it is stopped once what is being done has ended.
    orphaned: bool,
    /// The counters when the log was started.
    since: s2::Counters,
    /// The same of stalls.
    stalls_since: s2::Stalls,
    /// Since when pages gather that the host has not got. `None` before the first harvest of an adaptive
    /// log, which finds blocks as they stood and tells nothing of the pages that were written.
    base: Option<Mark>,
    /// When the epoch that the host has now was taken.
    taken: Option<Mark>,
    last_taken: u64,
    /// The slot that is being added or deleted.
    change: Option<Change>,
    /// The slot that was deleted last, in case the answer was lost.
    last_deleted: Option<s2::SlotId>,
    hash: Option<Hash>,
}

struct Hash {
    slot: u16,
    /// The pause that it is of.
    pause: u32,
    state: Option<Sha256>,
    run: usize,
    /// Where in the run, in bytes.
    at: usize,
    done: u64,
    total: u64,
    digest: Option<[u8; 32]>,
}

static DEFAULT_ENGINE: AtomicU8 = AtomicU8::new(0);

/// Sets what `Auto` means: the command line's `dirty=`.
pub fn set_default_engine(engine: DirtyEngine) {
    DEFAULT_ENGINE.store(engine as u8, Relaxed);
}

/// Has stage 2 choose the engine by the harvest that has just ended, and brings the leaves over while
/// the host reads the bitmap. If the next harvest comes first, it does that.
fn adapt(vm: &'static Vm) {
    let stage2 = vm.memory.stage2();
    let step = || match metered(Task::LogEngine, || stage2.bring_over()) {
        Ok(Progress::More { .. }) => Step::Again,
        Ok(Progress::Done) | Err(_) => Step::Done,
    };
    let before = stage2.log_status().mode.map(|mode| mode.engine);
    let Ok(engine) = stage2.adapt_engine() else {
        return;
    };
    if before != Some(engine) {
        throttle::log_changed(vm);
    }
    if step() == Step::Again {
        sched::submit(Box::new(step));
    }
}

/// Takes one step of what is being done; the lock is the caller's.
fn step(vm: &'static Vm, work: &mut VmWork) -> Step {
    let stage2 = vm.memory.stage2();
    let Some(operation) = work.operation else {
        return Step::Done;
    };
    let result = match operation {
        Operation::Start(policy, granularity) => metered(Task::LogStart, || {
            stage2.start_log(policy.first(vm), granularity)
        }),
        Operation::Stop => metered(Task::LogStop, || stage2.stop_log()),
        Operation::Engine(engine) => match stage2.set_engine(engine) {
            Ok(()) => metered(Task::LogEngine, || stage2.bring_over()),
            // A CPU is still at a harvest that was given up.
            Err(Error::Busy) => Ok(Progress::More { done: 0, total: 0 }),
            Err(error) => Err(error),
        },
        Operation::Take(epoch) => metered(Task::LogTake, || stage2.take(epoch)),
        Operation::Slot(_) => {
            let result = match &mut work.change {
                Some(change) => metered(Task::Slot, || change.step(vm)),
                None => Ok(Progress::Done),
            };
            return note(vm, work, operation, result);
        }
    };
    let result = result.map_err(refusal);
    note(vm, work, operation, result)
}

/// Notes what a step came to.
fn note(
    vm: &'static Vm,
    work: &mut VmWork,
    operation: Operation,
    result: Result<Progress, ErrorReply>,
) -> Step {
    match result {
        Ok(Progress::More { done, total }) => {
            // A total of nothing is another CPU's step.
            if total > 0 {
                work.progress = (done, total);
            }
            return Step::Again;
        }
        Ok(Progress::Done) => {
            tell_throttle(vm, work, operation);
            match operation {
                Operation::Start(policy, _) => work.policy = policy,
                Operation::Engine(engine) => work.policy = Policy::Fixed(engine),
                Operation::Take(_) if work.policy == Policy::Adaptive => adapt(vm),
                Operation::Slot(Wanted::Deleted(id)) => work.last_deleted = Some(id),
                Operation::Stop => work.keeper = None,
                Operation::Take(_) | Operation::Slot(Wanted::Added(_)) => {}
            }
        }
        Err(reply) => {
            // Nobody's log: a start that has not begun leaves none. One that has is its keeper's to stop.
            if matches!(operation, Operation::Start(..))
                && vm.memory.stage2().log_status().stage == LogStage::Off
            {
                work.keeper = None;
            }
            work.failure = Some((operation, reply));
        }
    }
    work.operation = None;
    work.change = None;
    let orphaned = core::mem::take(&mut work.orphaned);
    if orphaned && vm.memory.stage2().log_status().stage != LogStage::Off {
        // Whoever steps goes on with that.
        begin_stop(work);
        return Step::Again;
    }
    Step::Done
}

/// The log is stopped next, though nobody asks how far that is.
fn begin_stop(work: &mut VmWork) {
    work.operation = Some(Operation::Stop);
    work.progress = (0, 0);
    work.keeper = None;
}

/// What the throttle has to know of an operation that is over.
fn tell_throttle(vm: &'static Vm, work: &mut VmWork, operation: Operation) {
    match operation {
        Operation::Start(_, granularity) => {
            work.taken = None;
            work.base = match granularity {
                s2::Granularity::Adaptive => None,
                s2::Granularity::Page | s2::Granularity::Block => Some(throttle::mark(vm)),
            };
            throttle::log_changed(vm);
        }
        Operation::Stop | Operation::Engine(_) => throttle::log_changed(vm),
        // All of the slot is dirty now, and not by the guest.
        Operation::Slot(_) => (work.base, work.taken) = (None, None),
        Operation::Take(epoch) => {
            let stage2 = vm.memory.stage2();
            let engine = stage2.log_status().mode.map(|mode| mode.engine);
            let now = throttle::mark(vm);
            work.taken = Some(now);
            if engine == Some(s2::Engine::Dbm)
                && let Some(base) = work.base
                && let Ok(slots) = stage2.taken(epoch)
            {
                let found = slots.iter().map(|slot| slot.dirty_pages).sum();
                throttle::harvested(vm, found, base, now);
            }
        }
    }
}

/// The guest was loaded anew. What EL2 wrote for that the next harvest finds, and it is not the guest's.
pub fn guest_loaded(vm: &Vm) {
    kept(vm).work.lock().base = None;
}

/// A step of a harvest, on any number of CPUs at once: stage 2 gives each its part. So the lock
/// is held before and after, not meanwhile.
fn harvest_step(vm: &'static Vm, epoch: s2::Epoch) -> Step {
    if vm.memory.stage2().is_given_out() {
        // Those who are at the last stretches need the lock, and this CPU nothing of it.
        return Step::Later;
    }
    let operation = Operation::Take(epoch);
    if kept(vm).work.lock().operation != Some(operation) {
        return Step::Done;
    }
    let result = metered(Task::LogTake, || vm.memory.stage2().take(epoch)).map_err(refusal);
    let mut work = kept(vm).work.lock();
    if work.operation != Some(operation) {
        // Over, or given up. Once given up, an epoch cannot begin again.
        return Step::Done;
    }
    note(vm, &mut work, operation, result)
}

/// Begins an operation, or tells how far it is. `Ok(None)`: it is over. `work` has been held
/// since the caller looked whether the operation is over already.
fn drive(
    vm: &'static Vm,
    mut work: MutexGuard<'static, VmWork, { rank::WORK }>,
    wanted: Operation,
) -> Result<Option<(u64, u64)>, ErrorReply> {
    if let Some((_, failure)) = work.failure.take_if(|(operation, _)| *operation == wanted) {
        return Err(failure);
    }
    match work.operation {
        Some(going) if going == wanted => return Ok(Some(work.progress)),
        Some(_) => return Err(ErrorReply::Busy),
        None => {}
    }
    work.operation = Some(wanted);
    work.progress = (0, 0);
    if let Operation::Take(epoch) = wanted {
        // From the start: an epoch that is given up is never used again either.
        work.last_taken = work.last_taken.max(epoch.0);
    }
    // The first step at once: most work on a small guest is over with it. Not a slot's, whose steps are the longest:
    // this request came in an interrupt, with others perhaps.
    let at_once = !matches!(wanted, Operation::Slot(_));
    if at_once && step(vm, &mut work) == Step::Done {
        return match work.failure.take() {
            Some((_, failure)) => Err(failure),
            None => Ok(None),
        };
    }
    let progress = work.progress;
    drop(work);
    match wanted {
        Operation::Take(epoch) => {
            sched::submit_to_all(|| Box::new(move || harvest_step(vm, epoch)));
        }
        _ => sched::submit(Box::new(move || step(vm, &mut kept(vm).work.lock()))),
    }
    Ok(Some(progress))
}

fn going<T>((done, total): (u64, u64)) -> Work<T> {
    Work::Going { done, total }
}

/// Starts a VM's log.
pub fn start_log(
    vm: &'static Vm,
    choice: EngineChoice,
    granularity: Granularity,
    hold: Hold,
) -> Result<Work<()>, ErrorReply> {
    require_cleared(vm)?;
    let policy = Policy::of(choice);
    let granularity = match granularity {
        Granularity::Page => s2::Granularity::Page,
        Granularity::Adaptive => s2::Granularity::Adaptive,
        Granularity::Block => s2::Granularity::Block,
    };
    let stage2 = vm.memory.stage2();
    let mut work = kept(vm).work.lock();
    let status = stage2.log_status();
    if status.stage == LogStage::On && work.operation.is_none() {
        let same = status
            .mode
            .is_some_and(|mode| mode.granularity == granularity);
        return if same && work.policy == policy {
            if hold == Hold::Lasting {
                work.keeper = Some(hold);
            }
            Ok(Work::Done(()))
        } else {
            Err(ErrorReply::AlreadyLogging)
        };
    }
    let operation = Operation::Start(policy, granularity);
    // Then this is the question how it ended, and begins nothing.
    let failed = work.failure.is_some_and(|(what, _)| what == operation);
    if status.stage == LogStage::Off && work.operation.is_none() && !failed {
        work.keeper = Some(hold);
        work.since = stage2.counters();
        work.stalls_since = throttle::stalls(vm);
    }
    let progress = drive(vm, work, operation)?;
    Ok(progress.map_or(Work::Done(()), going))
}

/// Changes how a log that runs notices writes.
pub fn set_engine(vm: &'static Vm, choice: EngineChoice) -> Result<Work<()>, ErrorReply> {
    let mut work = kept(vm).work.lock();
    if let Policy::Fixed(engine) = Policy::of(choice) {
        let progress = drive(vm, work, Operation::Engine(engine))?;
        return Ok(progress.map_or(Work::Done(()), going));
    }
    match (vm.memory.stage2().log_status().stage, work.operation) {
        (LogStage::On, None | Some(Operation::Take(_))) => {
            work.policy = Policy::Adaptive;
            Ok(Work::Done(()))
        }
        (LogStage::Off, _) => Err(ErrorReply::NotLogging),
        _ => Err(ErrorReply::Busy),
    }
}

/// Stops a VM's log. Refused while the host has an epoch.
pub fn stop_log(vm: &'static Vm) -> Result<Work<()>, ErrorReply> {
    let work = kept(vm).work.lock();
    let stage = vm.memory.stage2().log_status().stage;
    if stage == LogStage::Off && work.operation.is_none() {
        return Ok(Work::Done(()));
    }
    let progress = drive(vm, work, Operation::Stop)?;
    Ok(progress.map_or(Work::Done(()), going))
}

/// By how much the number of an epoch may be greater than the last one's: with any, one request could leave no
/// greater number for the next.
const EPOCH_STEP_MAX: u64 = 1 << 32;

/// Harvests into `epoch`.
pub fn take(vm: &'static Vm, epoch: Epoch) -> Result<Work<TakeReport>, ErrorReply> {
    let stage2 = vm.memory.stage2();
    let wanted = s2::Epoch(epoch.0);
    let work = kept(vm).work.lock();
    if epoch.0 > work.last_taken.saturating_add(EPOCH_STEP_MAX) {
        return Err(ErrorReply::OutOfRange);
    }
    if work.operation.is_none() && stage2.log_status().outstanding == Some(wanted) {
        // Over, or asked for again because the answer was lost.
        match stage2.taken(wanted) {
            Ok(slots) => return Ok(Work::Done(report(epoch, &slots))),
            Err(Error::TakeUnfinished(_)) => {}
            Err(error) => return Err(refusal(error)),
        }
    }
    match drive(vm, work, Operation::Take(wanted))? {
        Some(progress) => Ok(going(progress)),
        None => {
            let slots = stage2.taken(wanted).map_err(refusal)?;
            Ok(Work::Done(report(epoch, &slots)))
        }
    }
}

fn report(epoch: Epoch, slots: &[s2::SlotDirty]) -> TakeReport {
    let slots: Vec<_> = slots
        .iter()
        .map(|slot| SlotDirty {
            slot: SlotId(slot.slot.0),
            base_ipa: slot.base.ipa().raw(),
            pages: slot.pages,
            dirty_pages: slot.dirty_pages,
        })
        .collect();
    TakeReport {
        epoch,
        dirty_pages: slots.iter().map(|slot| slot.dirty_pages).sum(),
        slots,
    }
}

/// The host has what `epoch` took.
pub fn commit(vm: &Vm, epoch: Epoch) -> Result<(), ErrorReply> {
    let mut work = kept(vm).work.lock();
    vm.memory
        .stage2()
        .commit(s2::Epoch(epoch.0))
        .map_err(refusal)?;
    // What was dirtied since it was taken is in the next one.
    work.base = work.taken.take().or(work.base);
    Ok(())
}

/// The host has not got what `epoch` took: it is dirty again.
pub fn abort(vm: &Vm, epoch: Epoch) -> Result<(), ErrorReply> {
    let mut work = kept(vm).work.lock();
    work.taken = None;
    let epoch = s2::Epoch(epoch.0);
    if work.operation == Some(Operation::Take(epoch)) {
        work.operation = None;
        vm.memory.stage2().give_up(epoch);
        return Ok(());
    }
    vm.memory.stage2().abort(epoch).map_err(refusal)
}

/// What is taken back from a host that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abandoned {
    /// What it took and did not commit: it is dirty again.
    pub epoch: Option<u64>,
    /// The log that it started for itself is being stopped.
    pub log: bool,
}

/// The host is gone: takes back what it had.
pub fn abandon(vm: &'static Vm) -> Abandoned {
    let mut work = kept(vm).work.lock();
    let stage2 = vm.memory.stage2();
    let outstanding = stage2.abort_outstanding();
    work.taken = None;
    if let Some(Operation::Take(epoch)) = work.operation {
        work.operation = None;
        // Also if it has not begun: a CPU may be on its way to its first step.
        stage2.give_up(epoch);
    }
    work.failure = None;
    // Another host has asked for no deletion yet.
    work.last_deleted = None;
    let epoch = outstanding.map(|epoch| epoch.0);
    let on = stage2.log_status().stage != LogStage::Off || work.operation.is_some();
    let log = on && work.keeper == Some(Hold::Session);
    match work.operation {
        _ if !log => {}
        Some(Operation::Stop) => {}
        Some(_) => work.orphaned = true,
        None => {
            begin_stop(&mut work);
            drop(work);
            sched::submit(Box::new(move || step(vm, &mut kept(vm).work.lock())));
        }
    }
    Abandoned { epoch, log }
}

/// Adds a slot.
pub fn add_slot(
    vm: &'static Vm,
    slot: SlotId,
    base: u64,
    bytes: u64,
) -> Result<Work<()>, ErrorReply> {
    let place = Place::new(slot, base, bytes);
    change_slot(vm, Wanted::Added(place), |_| slots::is_there(vm, &place))
}

/// Deletes a slot that was added.
pub fn delete_slot(vm: &'static Vm, slot: SlotId) -> Result<Work<()>, ErrorReply> {
    let id = s2::SlotId(slot.0);
    change_slot(vm, Wanted::Deleted(id), |work| {
        work.last_deleted == Some(id) && vm.memory.slots().by_id(slot.0).is_none()
    })
}

fn change_slot(
    vm: &'static Vm,
    wanted: Wanted,
    is_done: impl FnOnce(&VmWork) -> bool,
) -> Result<Work<()>, ErrorReply> {
    let mut work = kept(vm).work.lock();
    let operation = Operation::Slot(wanted);
    let failed = work.failure.is_some_and(|(what, _)| what == operation);
    if work.operation.is_none() && !failed {
        if is_done(&work) {
            return Ok(Work::Done(()));
        }
        let change = Change::begin(vm, wanted)?;
        // A hash of what is not there any more, or was not there yet.
        work.hash = work.hash.take().filter(|hash| hash.slot != change.slot().0);
        work.change = Some(change);
    }
    let progress = drive(vm, work, operation)?;
    Ok(progress.map_or(Work::Done(()), going))
}

/// Is a slot being added or deleted?
pub fn is_changing_slots(vm: &Vm) -> bool {
    kept(vm).work.lock().change.is_some()
}

/// The state of a VM's log.
pub fn status(vm: &Vm) -> DirtyStatus {
    let stage2 = vm.memory.stage2();
    let work = kept(vm).work.lock();
    let log = stage2.log_status();
    let now = stage2.counters();
    let stalls = throttle::stalls(vm);
    let logging = log.mode.map(|mode| Logging {
        engine: match mode.engine {
            s2::Engine::WriteProtect => Engine::WriteProtect,
            s2::Engine::Dbm => Engine::Dbm,
        },
        granularity: match mode.granularity {
            s2::Granularity::Page => Granularity::Page,
            s2::Granularity::Adaptive => Granularity::Adaptive,
            s2::Granularity::Block => Granularity::Block,
        },
    });
    DirtyStatus {
        logging,
        outstanding: log.outstanding.map(|epoch| Epoch(epoch.0)),
        last_taken: Epoch(
            work.last_taken
                .max(log.last_committed.map_or(0, |epoch| epoch.0)),
        ),
        last_committed: Epoch(log.last_committed.map_or(0, |epoch| epoch.0)),
        live_pages_hint: log.live_pages,
        write_faults: now.write_faults - work.since.write_faults,
        splits: now.splits - work.since.splits,
        harvests: now.harvests - work.since.harvests,
        entries_read: now.leaves_read - work.since.leaves_read,
        quota: throttle::quota(vm),
        stalls: Stalls {
            count: stalls.count.saturating_sub(work.stalls_since.count),
            time_us: timer::in_microseconds(stalls.time.0.saturating_sub(work.stalls_since.time.0)),
            percent: stalls.percent,
        },
    }
}

/// Hashes a slot of a paused VM.
pub fn hash(vm: &'static Vm, slot: SlotId) -> Result<Work<([u8; 32], u64)>, ErrorReply> {
    let found = vm.memory.slots().by_id(slot.0).map(|slot| slot.pages);
    let pages = found.ok_or(ErrorReply::NoSuchSlot)?;
    require_cleared(vm)?;
    let pause = {
        let status = vm.status();
        if !matches!(status.state, State::Paused | State::Stopped | State::Failed) {
            return Err(ErrorReply::NotPaused);
        }
        status.pauses
    };
    let mut work = kept(vm).work.lock();
    if let Some(hash) = &work.hash
        && hash.slot == slot.0
        && hash.pause == pause
    {
        return Ok(match hash.digest {
            Some(digest) => Work::Done((digest, pages)),
            None => going((hash.done, hash.total)),
        });
    }
    let busy = work
        .hash
        .as_ref()
        .is_some_and(|hash| hash.digest.is_none() && hash.pause == pause);
    if busy {
        return Err(ErrorReply::Busy);
    }
    work.hash = Some(Hash {
        slot: slot.0,
        pause,
        state: Some(Sha256::new()),
        run: 0,
        at: 0,
        done: 0,
        total: pages,
        digest: None,
    });
    drop(work);
    sched::submit(Box::new(move || {
        metered(Task::Hash, || hash_step(vm, slot.0, pause))
    }));
    Ok(going((0, pages)))
}

fn hash_step(vm: &'static Vm, slot: u16, pause: u32) -> Step {
    let mut work = kept(vm).work.lock();
    let still = {
        let status = vm.status();
        status.pauses == pause
    };
    let Some(hash) = work
        .hash
        .as_mut()
        .filter(|hash| hash.slot == slot && hash.pause == pause)
    else {
        return Step::Done;
    };
    let slots = vm.memory.slots();
    let (Some(of), Some(state), true) = (slots.by_id(slot), hash.state.as_mut(), still) else {
        // Resumed meanwhile: the hash would be of nothing.
        work.hash = None;
        return Step::Done;
    };
    let Some((base, run)) = of.runs.get(hash.run) else {
        let digest = hash.state.take().map(|state| state.finalize().into());
        hash.digest = digest;
        return Step::Done;
    };
    let mut bytes = [0; HASH_STEP];
    let at = base + hash.at as u64;
    let Some(words) = vm.memory.read(&slots, at, HASH_STEP / 8) else {
        work.hash = None;
        return Step::Done;
    };
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.load(Relaxed).to_le_bytes());
    }
    state.update(bytes);
    hash.at += HASH_STEP;
    if hash.at.is_multiple_of(PAGE) {
        hash.done += 1;
    }
    if hash.at == run.pages() * PAGE {
        hash.run += 1;
        hash.at = 0;
    }
    Step::Again
}
