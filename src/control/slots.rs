//! Memory that a host adds to a VM and takes away again, slot by slot, while the guest runs.
//!
//! Frames come from the machine's free ones and go back there. A slot is zero when the guest first sees it, and
//! what the guest left in it is zeroed before anybody else can have the frames: they are scrubbed when no translation
//! reaches them any more, and cleared again when somebody gets them.
//!
//! A log follows a slot from its first write on. That its memory appeared is no write of the guest's, and yet
//! what the host has for these addresses is not what is there: so a slot that is added under a log is dirty as a
//! whole, once. A slot that is deleted takes what is known of its dirty pages along.
//!
//! Nothing is told to the guest. One that does not know of a slot does not touch it; one that touches what was
//! deleted gets an external abort. Slots are part of the board: they stay, with their content, when the VM is
//! restarted, and a VM that is starting has none added or deleted.
//!
//! # Concurrency
//!
//! A change is an operation of the VM's `work`, so there is one at a time and none beside a harvest or a start or
//! stop of the log. Each step is bounded. An epoch may be with the host meanwhile.

use super::refusal::{bad_state, refusal, require_cleared};
use crate::mm::frames::{self, Run};
use crate::mm::{PAGE, heap};
use crate::vm::memory::Slot;
use crate::vm::{Vm, stage2};
use alloc::vec::Vec;
use tidemark_devices::virt::RAM_BASE;
use tidemark_sched::State;
use tidemark_stage2::{self as s2, Access, Ipa, Progress, SlotId};
use tidemark_wire::message::{self, ErrorReply};
use tidemark_wire::{HOT_SLOT_BYTES_MAX, HOT_SLOT_FIRST, HOT_SLOT_LAST, HOT_SLOT_UNIT};

/// Frames in a run: a block, and few enough to be taken in one step.
const RUN: usize = HOT_SLOT_UNIT as usize / PAGE;
/// Frames zeroed in a step, a divisor of a run.
const ZERO_STEP: usize = 64;
/// Pages noted as dirty in a step.
const MARK_STEP: u64 = 1 << 14;

/// What a host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A slot more.
    Added(Place),
    /// A slot less.
    Deleted(SlotId),
}

/// Where a slot is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    id: SlotId,
    base: u64,
    bytes: u64,
}

impl Place {
    /// Any place: [`Change::begin`] says what is wrong with it.
    pub fn new(id: message::SlotId, base: u64, bytes: u64) -> Self {
        Self {
            id: SlotId(id.0),
            base,
            bytes,
        }
    }

    fn pages(&self) -> u64 {
        self.bytes / PAGE as u64
    }

    /// Is it possible, whatever else there is?
    fn check(&self) -> Result<(), ErrorReply> {
        require_hot(self.id)?;
        let sizes = HOT_SLOT_UNIT..=HOT_SLOT_BYTES_MAX;
        let whole = |value: u64| value.is_multiple_of(HOT_SLOT_UNIT);
        if !sizes.contains(&self.bytes) || !whole(self.base) || !whole(self.bytes) {
            return Err(ErrorReply::SlotSize);
        }
        let (first, end) = (RAM_BASE, 1 << stage2::features().1);
        let last = self.base.checked_add(self.bytes);
        if self.base < first || last.is_none_or(|last| last > end) {
            return Err(ErrorReply::SlotPlace { first, end });
        }
        Ok(())
    }
}

/// Where a change is.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Frames are taken, and zeroed up to this one.
    Gather(usize),
    /// The slot becomes the guest's.
    Attach,
    /// Its pages are noted as dirty, from this one on.
    Mark(u64),
    /// They are mapped, from this one on.
    Map(u64),
    /// The slot is unmapped, and then in no list any more.
    Detach,
    /// Frames are zeroed and given back; so many of the last run are.
    Scrub(usize),
}

/// A change on its way.
pub struct Change {
    place: Place,
    phase: Phase,
    /// What is the guest's not yet, or no longer.
    runs: Vec<(u64, Run)>,
    /// Why what was begun is being undone.
    failure: Option<ErrorReply>,
}

/// Has it been done already?
pub fn is_there(vm: &Vm, place: &Place) -> bool {
    let slots = vm.memory.slots();
    let slot = slots.by_id(place.id.0);
    slot.is_some_and(|slot| slot.base == place.base && slot.pages == place.pages())
}

fn require_hot(id: SlotId) -> Result<(), ErrorReply> {
    match (HOT_SLOT_FIRST..=HOT_SLOT_LAST).contains(&id.0) {
        true => Ok(()),
        false => Err(ErrorReply::SlotNumber),
    }
}

impl Change {
    /// Looks whether what is wanted is possible, and changes nothing yet.
    ///
    /// # Errors
    ///
    /// Says why not.
    pub fn begin(vm: &Vm, wanted: Wanted) -> Result<Self, ErrorReply> {
        require_cleared(vm)?;
        // The loader goes through the slots, so it finds them as they are, and none comes or goes.
        let state = vm.status().state;
        if state == State::Starting {
            return Err(bad_state(state));
        }
        match wanted {
            Wanted::Added(place) => Self::add(vm, place),
            Wanted::Deleted(id) => Self::delete(vm, id),
        }
    }

    fn add(vm: &Vm, place: Place) -> Result<Self, ErrorReply> {
        place.check()?;
        let (base, end) = (place.base, place.base + place.bytes);
        for slot in vm.memory.slots().iter() {
            if slot.id == place.id {
                return Err(ErrorReply::SlotExists);
            }
            if slot.base < end && base < slot.base + slot.pages * PAGE as u64 {
                let slot = message::SlotId(slot.id.0);
                return Err(ErrorReply::SlotOverlap { slot });
            }
        }
        let pages = place.pages();
        // Page by page it needs a table for each run, and a few above those.
        let tables = pages / RUN as u64 + 4;
        let free = frames::free_pages();
        if free < pages + tables {
            let free_bytes = free * PAGE as u64;
            return Err(ErrorReply::NotEnoughMemory { free_bytes });
        }
        // Bitmaps are 2 bits a page, and the lists of runs and extents an entry a block; the heap rounds up. Half of
        // it is kept for what cannot be refused.
        let (used, all) = heap::usage();
        let needed = pages / 2 + (pages / RUN as u64) * 128;
        if used as u64 + needed > all as u64 / 2 {
            return Err(ErrorReply::OutOfMemory);
        }
        let mut runs = Vec::new();
        runs.try_reserve_exact(pages as usize / RUN)
            .map_err(|_| ErrorReply::OutOfMemory)?;
        Ok(Self {
            place,
            phase: Phase::Gather(0),
            runs,
            failure: None,
        })
    }

    fn delete(vm: &Vm, id: SlotId) -> Result<Self, ErrorReply> {
        require_hot(id)?;
        let slots = vm.memory.slots();
        let slot = slots.by_id(id.0).ok_or(ErrorReply::NoSuchSlot)?;
        Ok(Self {
            place: Place {
                id,
                base: slot.base,
                bytes: slot.pages * PAGE as u64,
            },
            phase: Phase::Detach,
            runs: Vec::new(),
            failure: None,
        })
    }

    /// One bounded step. A change that fails is undone first.
    ///
    /// # Errors
    ///
    /// It could not be made, and all is as it was before.
    pub fn step(&mut self, vm: &Vm) -> Result<Progress, ErrorReply> {
        let memory = &vm.memory;
        let Place { id, base, .. } = self.place;
        match self.phase {
            Phase::Gather(frames) => match self.gather(vm, frames) {
                Ok(phase) => self.phase = phase,
                Err(reply) => self.undo(Phase::Scrub(0), reply),
            },
            Phase::Attach => {
                // Instruction caches may hold lines of what their last owner ran.
                crate::arch::cache::invalidate_instructions();
                let slot = Slot {
                    id,
                    base,
                    pages: self.place.pages(),
                    access: Access::ReadWrite,
                    runs: core::mem::take(&mut self.runs),
                };
                match memory.attach(slot) {
                    Ok(()) => self.phase = Phase::Mark(0),
                    Err((slot, error)) => {
                        self.runs = slot.runs;
                        self.undo(Phase::Scrub(0), refusal(error));
                    }
                }
            }
            Phase::Mark(page) => {
                let pages = MARK_STEP.min(self.place.pages() - page);
                let from = Ipa::new(base + page * PAGE as u64);
                // It is in the slot. Without a log this does nothing.
                let _ = memory.stage2().mark_dirty(from, pages * PAGE as u64);
                self.phase = match page + pages {
                    end if end == self.place.pages() => Phase::Map(0),
                    next => Phase::Mark(next),
                };
            }
            Phase::Map(page) => match memory.stage2().map_ahead(id, page) {
                Ok(Progress::Done) => return Ok(Progress::Done),
                Ok(Progress::More { done, .. }) => self.phase = Phase::Map(done),
                Err(error) => self.undo(Phase::Detach, refusal(error)),
            },
            Phase::Detach => match memory.stage2().delete_slot(id) {
                Ok(Progress::More { .. }) => {}
                Ok(Progress::Done) => {
                    self.runs = memory.detach(id).map_or_else(Vec::new, |slot| slot.runs);
                    self.phase = Phase::Scrub(0);
                }
                Err(error) => return Err(refusal(error)),
            },
            Phase::Scrub(frames) => match self.scrub(vm, frames) {
                Some(phase) => self.phase = phase,
                None => return self.failure.map_or(Ok(Progress::Done), Err),
            },
        }
        Ok(self.progress())
    }

    fn undo(&mut self, phase: Phase, reply: ErrorReply) {
        self.failure = Some(reply);
        self.phase = phase;
    }

    /// Takes a run, or zeroes a part of the last one.
    fn gather(&mut self, vm: &Vm, frames: usize) -> Result<Phase, ErrorReply> {
        let at = frames % RUN;
        if frames == self.runs.len() * RUN {
            if frames as u64 == self.place.pages() {
                return Ok(Phase::Attach);
            }
            let base = self.place.base + (frames * PAGE) as u64;
            let owner = frames::guest(vm.id.0, *vm.life.lock(), base / PAGE as u64);
            let run = owner.and_then(|owner| Run::take(RUN, owner));
            let free_bytes = frames::free_pages() * PAGE as u64;
            let run = run.ok_or(ErrorReply::NotEnoughMemory { free_bytes })?;
            self.runs.push((base, run));
        } else if let Some((_, run)) = self.runs.last() {
            vm.memory.zero(run, at, ZERO_STEP);
            return Ok(Phase::Gather(frames + ZERO_STEP));
        }
        Ok(Phase::Gather(frames))
    }

    /// Zeroes a part of the last run, or gives it back. `None` when there is none left.
    fn scrub(&mut self, vm: &Vm, frames: usize) -> Option<Phase> {
        let (_, run) = self.runs.last()?;
        if frames == RUN {
            self.runs.pop();
            return Some(Phase::Scrub(0));
        }
        if let Err(error) = run.scrub(frames, ZERO_STEP) {
            // Dropping it will find the same, and keep it.
            log::error!("{}: {error}", vm.name());
        }
        vm.memory.clean_run(run, frames, ZERO_STEP);
        Some(Phase::Scrub(frames + ZERO_STEP))
    }

    /// In pages, as far as they are zeroed: that is most of the work.
    fn progress(&self) -> Progress {
        let total = self.place.pages();
        let done = match self.phase {
            Phase::Gather(frames) => frames as u64,
            Phase::Attach | Phase::Mark(_) | Phase::Map(_) => total,
            Phase::Detach => 0,
            Phase::Scrub(frames) => {
                let left = (self.runs.len() * RUN).saturating_sub(frames);
                total.saturating_sub(left as u64)
            }
        };
        Progress::More { done, total }
    }

    /// Which slot it is about.
    pub fn slot(&self) -> s2::SlotId {
        self.place.id
    }
}
