//! The flash of a guest that brings firmware: two banks, one with its code, one for its variables.
//!
//! What the chips make of an access is `tidemark_devices::pflash`; here their content is, in the guest's memory.
//! While a bank shows its content, stage 2 maps it read-only, and only writes come here. While it shows something
//! else, its slot allows nothing (`Access::None`), and every access comes here. It is taken away before the write
//! is heard that makes the chips show something else, so no vCPU reads the one for the other.
//!
//! What is programmed and erased goes through [`GuestMemory::write`], so the dirty log has it. The variables
//! stay when the VM is restarted, or stopped and started, and go with the machine.
//!
//! # Concurrency
//!
//! A bank's lock is held over an instruction, from any vCPU: nobody comes between its accesses, the chips do one step of
//! their own work, and the slot changes at most once. Under it come the list of slots and stage 2's locks.
//! Where stage 2 needs more than a step the instruction is begun again, and the bank is as it was.

use super::memory::{ERASED, FLASH, GuestMemory, OutOfMemoryRange, VARIABLES};
use crate::arch::lock::{Mutex, MutexGuard, rank};
use crate::mm::PAGE;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tidemark_devices::AccessSize;
use tidemark_devices::pflash::{BUFFER, Effect, Pflash, Protection, View};
use tidemark_devices::virt::{FLASH_BANKS, FLASH_BASE, FLASH_SIZE};
use tidemark_stage2::{Access, Error, FaultAccess, Progress, SlotId};

/// First address past both banks.
pub const FLASH_END: u64 = FLASH_BASE + FLASH_BANKS * FLASH_SIZE;

/// The banks.
pub struct Flash {
    code: Mutex<Pflash, { rank::FLASH }>,
    variables: Mutex<Pflash, { rank::FLASH }>,
    /// The variables that came with the bundle are there: from then on they are the guest's.
    laid: AtomicBool,
}

/// What a vCPU wants of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// To load it.
    Load(AccessSize),
    /// To store this.
    Store(AccessSize, u64),
    /// What no syndrome describes: a fetch, a walk, several registers.
    Other(FaultAccess),
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The instruction is to be tried again.
    Again,
    /// It is done; a load gives this.
    Done(u64),
    /// Nothing answers, or the instruction has to say more.
    Nothing,
}

impl Flash {
    /// Flash with so many bytes of memory for variables.
    pub fn new(variables: u64) -> Self {
        Self {
            code: Mutex::new(Pflash::new(FLASH_SIZE, 0, Protection::ReadOnly)),
            variables: Mutex::new(Pflash::new(FLASH_SIZE, variables, Protection::Writable)),
            laid: AtomicBool::new(false),
        }
    }

    /// Whether it holds nothing of the guest's own yet.
    pub fn is_fresh(&self) -> bool {
        !self.laid.load(Relaxed)
    }

    /// Its guest starts, and what it keeps there stays.
    pub fn set_laid(&self) {
        self.laid.store(true, Relaxed);
    }

    /// The bank at `ipa`, below [`FLASH_END`], for one instruction. Its chips do a step of what they are busy with.
    ///
    /// # Errors
    ///
    /// What the guest's memory says; then the VM cannot go on.
    pub fn open<'a>(&'a self, memory: &'a GuestMemory, ipa: u64) -> Result<Bank<'a>, FlashError> {
        let (bank, base, slot) = match ipa.checked_sub(FLASH_BASE) {
            Some(offset) if offset < FLASH_SIZE => (&self.code, FLASH_BASE, FLASH),
            _ => (&self.variables, FLASH_BASE + FLASH_SIZE, VARIABLES),
        };
        let mut chips = bank.lock();
        if let Some(range) = chips.work() {
            erase(memory, base + range.start, base + range.end)?;
        }
        Ok(Bank {
            chips,
            memory,
            base,
            slot,
        })
    }

    /// Puts the chips into the state of a machine that was just switched on. What is stored stays. No vCPU runs;
    /// stage 2 follows when one does.
    pub fn reset(&self) {
        self.code.lock().reset();
        self.variables.lock().reset();
    }
}

/// A bank that a vCPU has to itself.
pub struct Bank<'a> {
    chips: MutexGuard<'a, Pflash, { rank::FLASH }>,
    memory: &'a GuestMemory,
    base: u64,
    slot: SlotId,
}

impl Bank<'_> {
    /// An access that stage 2 did not let through, or one of several that make it up.
    ///
    /// # Errors
    ///
    /// What stage 2 or the guest's memory says; then the VM cannot go on.
    pub fn access(&mut self, ipa: u64, wanted: Wanted) -> Result<Answer, FlashError> {
        let (memory, base, chips) = (self.memory, self.base, &mut self.chips);
        let Some(offset) = ipa.checked_sub(base) else {
            return Ok(Answer::Nothing);
        };
        let allow = |access| memory.stage2().set_access(self.slot, access);
        Ok(match (chips.view(), wanted) {
            (View::Array, Wanted::Store(size, value)) => {
                if chips.leaves_array(value) && allow(Access::None)? != Progress::Done {
                    return Ok(Answer::Again);
                }
                program(memory, base, chips.write(offset, size, value))?;
                Answer::Done(0)
            }
            // The instruction will say what it stores, and that may be a command.
            (View::Array, Wanted::Other(FaultAccess::Write)) => match allow(Access::None)? {
                Progress::Done => Answer::Nothing,
                Progress::More { .. } => Answer::Again,
            },
            (View::Array, wanted) => {
                if memory.contains(ipa) {
                    // It was out of reach until now, and is let back by what reads it: a store that did so would change
                    // the slot as often as an instruction has elements. What is not done yet the next try goes on with.
                    let _ = allow(Access::ReadOnly)?;
                    Answer::Again
                } else if let Wanted::Load(_) = wanted {
                    Answer::Done(ERASED)
                } else {
                    Answer::Nothing
                }
            }
            (View::Registers, Wanted::Store(size, value)) => {
                program(memory, base, chips.write(offset, size, value))?;
                Answer::Done(0)
            }
            (View::Registers, Wanted::Load(size)) => Answer::Done(chips.read(offset, size)),
            (View::Registers, Wanted::Other(_)) => Answer::Nothing,
        })
    }
}

/// Flash could not do what it is there for.
#[derive(Debug, Clone, Copy)]
pub enum FlashError {
    /// Stage 2 refused.
    Stage2(Error),
    /// What the chips change is not in the guest's memory.
    Memory,
}

impl From<Error> for FlashError {
    fn from(error: Error) -> Self {
        Self::Stage2(error)
    }
}

impl From<OutOfMemoryRange> for FlashError {
    fn from(_: OutOfMemoryRange) -> Self {
        Self::Memory
    }
}

impl core::fmt::Display for FlashError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Stage2(error) => write!(f, "its flash: stage 2: {error}"),
            Self::Memory => f.write_str("its flash is not in its memory"),
        }
    }
}

/// Erases whole pages.
fn erase(memory: &GuestMemory, from: u64, end: u64) -> Result<(), OutOfMemoryRange> {
    for page in (from..end).step_by(PAGE) {
        memory.write(page, &[0xff; PAGE])?;
    }
    memory.clean(from, end - from);
    Ok(())
}

fn program(memory: &GuestMemory, base: u64, effect: Effect<'_>) -> Result<(), OutOfMemoryRange> {
    let Effect::Program { offset, masks } = effect else {
        return Ok(());
    };
    let from = base + offset;
    let mut bytes = [0; BUFFER];
    let (words, _) = bytes.as_chunks_mut::<8>();
    for ((word, mask), at) in words.iter_mut().zip(masks).zip((from..).step_by(8)) {
        let old = memory.word(at).ok_or(OutOfMemoryRange)?;
        *word = (old & mask).to_le_bytes();
    }
    let changed = bytes.get(..masks.len() * 8).unwrap_or_default();
    memory.write(from, changed)?;
    memory.clean(from, changed.len() as u64);
    Ok(())
}

const _: () = assert!((tidemark_devices::pflash::ERASE_STEP as usize).is_multiple_of(PAGE));
