//! A guest's memory: the frames behind its slots, and stage 2 over them.
//!
//! Every write by EL2 into guest memory goes through [`GuestMemory::write`] or
//! [`GuestMemory::clear`], which tell the dirty log; every look goes through [`GuestMemory::read`] and sees what the
//! guest sees at that moment, word by word, past the caches or through them.
//!
//! Slots come and go while the VM runs (`slots`). Whoever looks at memory holds the list meanwhile, so that
//! frames are not given back under a reader; it is held for less than a step, and stage 2 comes after it.

use super::stage2::{Hw, features, vmids};
use crate::arch::lock::{RwLock, RwLockReadGuard, rank};
use crate::mm::PAGE;
use crate::mm::frames::{self, Run};
use alloc::vec::Vec;
use core::fmt;
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tidemark_devices::virt::{FLASH_BASE, FLASH_SIZE, RAM_BASE};
use tidemark_ownership::Generation;
use tidemark_stage2::{Access, Error, Extent, Gfn, Ipa, Pa, SlotId, Stage2, Support};
use tidemark_wire::bundle::Boot;

/// The guest's RAM.
pub const RAM: SlotId = SlotId(0);
/// The first flash bank, at address 0: the firmware, read-only.
pub const FLASH: SlotId = SlotId(1);
/// The second flash bank, where firmware keeps its variables, erased at first. Read-only to stage 2: writes are
/// commands to the chips (`flash`). So much of it has frames; the rest of both banks reads as erased, more slowly,
/// and is locked.
pub const VARIABLES: SlotId = SlotId(2);
/// Bytes of frames in the banks of a guest's flash, whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlashSize {
    /// For firmware.
    pub code: u64,
    /// For its variables. A block is the least: EDK2 uses 768 KiB, U-Boot a sector.
    pub variables: u64,
}

impl FlashSize {
    /// What a guest needs; `None` without firmware.
    pub fn of(boot: &Boot) -> Option<Self> {
        let Boot::Firmware(firmware) = boot else {
            return None;
        };
        let blocks = |bytes: u64| {
            let block = (SMALLEST_RUN * PAGE) as u64;
            bytes.clamp(1, FLASH_SIZE).next_multiple_of(block)
        };
        Some(Self {
            code: blocks(firmware.image.len),
            variables: blocks(firmware.variables.map_or(0, |file| file.len)),
        })
    }
}

/// What erased flash reads as.
pub const ERASED: u64 = !0;

/// Words of a page.
const WORDS: usize = PAGE / size_of::<u64>();
/// The largest run taken at once: 1 GiB, the largest block.
const LARGEST_RUN: usize = 1 << 18;
/// The smallest: 2 MiB, so that all of it can be mapped by blocks.
const SMALLEST_RUN: usize = 1 << 9;

/// A guest's memory.
pub struct GuestMemory {
    vm: u16,
    stage2: Stage2<Hw>,
    slots: RwLock<Slots, { rank::SLOTS }>,
}

/// The slots of a guest, in the order of their numbers.
#[derive(Debug)]
pub struct Slots(Vec<Slot>);

/// One range of it.
#[derive(Debug)]
pub struct Slot {
    /// Its number.
    pub id: SlotId,
    /// Where the guest sees it.
    pub base: u64,
    /// Its size in pages.
    pub pages: u64,
    /// What the guest may do there.
    pub access: Access,
    /// The frames, in order, each with the address that the guest sees it at.
    pub runs: Vec<(u64, Run)>,
}

/// Memory for a guest could not be had.
#[derive(Debug, Clone, Copy)]
pub enum MemoryError {
    /// So many bytes are not free.
    NotEnough(u64),
    /// Stage 2 refused.
    Stage2(Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEnough(bytes) => write!(
                f,
                "{} MiB are not free in blocks of 2 MiB, {} MiB are in all; give the machine more memory or the guests less",
                bytes >> 20,
                frames::free_pages() >> 8
            ),
            Self::Stage2(error) => write!(f, "stage 2: {error}"),
        }
    }
}

/// An address that is not in the guest's memory, or a range that leaves it.
#[derive(Debug, Clone, Copy)]
pub struct OutOfMemoryRange;

impl GuestMemory {
    /// Memory with `ram` bytes at the board's RAM address, and flash if there is some.
    ///
    /// The frames belong to the VM's first life, generation 0.
    ///
    /// # Errors
    ///
    /// There is not enough memory.
    pub fn new(vm: u16, ram: u64, flash: Option<FlashSize>) -> Result<Self, MemoryError> {
        let of_flash = flash.map_or(0, |flash| flash.code.saturating_add(flash.variables));
        if (ram.saturating_add(of_flash)) >> 12 > frames::free_pages() {
            return Err(MemoryError::NotEnough(ram));
        }
        let mut memory = Self::none(vm)?;
        memory.add(RAM, RAM_BASE, ram, Access::ReadWrite)?;
        if let Some(FlashSize { code, variables }) = flash {
            memory.add(FLASH, FLASH_BASE, code, Access::ReadOnly)?;
            let base = FLASH_BASE + FLASH_SIZE;
            memory.add(VARIABLES, base, variables, Access::ReadOnly)?;
        }
        Ok(memory)
    }

    /// No memory, for a VM that cannot start: it is in the table all the same, with the reason.
    ///
    /// # Errors
    ///
    /// What stage 2 says.
    pub fn none(vm: u16) -> Result<Self, MemoryError> {
        let (features, ipa_bits) = features();
        let stage2 = vmids()
            .and_then(|vmids| Stage2::with_vmids(Hw { vm }, ipa_bits, vmids, features))
            .map_err(MemoryError::Stage2)?;
        Ok(Self {
            vm,
            stage2,
            slots: RwLock::new(Slots(Vec::new())),
        })
    }

    /// Whether there is memory to start with.
    pub fn is_there(&self) -> bool {
        self.slots().by_id(RAM.0).is_some()
    }

    fn add(
        &mut self,
        id: SlotId,
        base: u64,
        bytes: u64,
        access: Access,
    ) -> Result<(), MemoryError> {
        let block = (SMALLEST_RUN * PAGE) as u64;
        let pages = bytes.div_ceil(block) * SMALLEST_RUN as u64;
        let mut runs = Vec::new();
        let mut left = pages as usize;
        let mut size = LARGEST_RUN;
        while left > 0 {
            if size > left {
                size /= 2;
                continue;
            }
            let at = base + (pages as usize - left) as u64 * PAGE as u64;
            let owner = frames::guest(self.vm, Generation::FIRST, at / PAGE as u64)
                .ok_or(MemoryError::NotEnough(bytes))?;
            match Run::take(size, owner) {
                Some(run) => {
                    runs.push((at, run));
                    left -= size;
                }
                None if size > SMALLEST_RUN => size /= 2,
                None => return Err(MemoryError::NotEnough(bytes)),
            }
        }
        let slot = Slot {
            id,
            base,
            pages,
            access,
            runs,
        };
        self.attach(slot)
            .map_err(|(_, error)| MemoryError::Stage2(error))
    }

    /// Makes a slot the guest's.
    ///
    /// # Errors
    ///
    /// What stage 2 says, or there is no room for it in a list. The slot comes back.
    pub fn attach(&self, slot: Slot) -> Result<(), (Slot, Error)> {
        // Held over both, so that nobody finds the slot in the one list and not in the other.
        let mut slots = self.slots.write();
        let mut extents = Vec::new();
        let room = extents.try_reserve_exact(slot.runs.len());
        if room.and(slots.0.try_reserve(1)).is_err() {
            return Err((slot, Error::OutOfMemory));
        }
        extents.extend(slot.runs.iter().map(|(_, run)| Extent {
            pa: Pa::new(run.address()),
            pages: run.pages() as u64,
        }));
        let Some(first) = Gfn::new(slot.base >> 12) else {
            return Err((slot, Error::OutOfMemory));
        };
        let (id, pages, access) = (slot.id, slot.pages, slot.access);
        if let Err(error) = self.stage2.add_slot(id, first, pages, access, &extents) {
            return Err((slot, error));
        }
        let place = slots.0.partition_point(|other| other.id < id);
        slots.0.insert(place, slot);
        Ok(())
    }

    /// Takes a slot that stage 2 has no more out of the list, and nobody who looked at it is left.
    pub fn detach(&self, id: SlotId) -> Option<Slot> {
        // Upgraded, so that readers who come again and again do not keep it waiting.
        let mut slots = self.slots.write();
        let place = slots.0.iter().position(|slot| slot.id == id)?;
        Some(slots.0.remove(place))
    }

    /// Stage 2 over it.
    #[inline]
    pub fn stage2(&self) -> &Stage2<Hw> {
        &self.stage2
    }

    /// Its slots, which stay as long as this is held.
    pub fn slots(&self) -> RwLockReadGuard<'_, Slots, { rank::SLOTS }> {
        self.slots.read()
    }

    /// At most `most` words from `ipa` (a multiple of 8) on, and not past the end of their run, to be loaded now: a
    /// guest whose caches are off may store past what EL2 looked at before.
    pub fn read<'s>(&self, slots: &'s Slots, ipa: u64, most: usize) -> Option<&'s [AtomicU64]> {
        let words = slots.words(ipa)?;
        let words = words.get(..words.len().min(most))?;
        Some(self.stage2.coherent(words))
    }

    /// The word at `ipa` (a multiple of 8).
    pub fn word(&self, ipa: u64) -> Option<u64> {
        let slots = self.slots();
        let words = self.read(&slots, ipa, 1)?;
        words.first().map(|word| word.load(Relaxed))
    }

    /// Writes `bytes` at `ipa`, and says so to the dirty log.
    pub fn write(&self, ipa: u64, bytes: &[u8]) -> Result<(), OutOfMemoryRange> {
        let slots = self.slots();
        let mut at = ipa;
        let mut left = bytes;
        while !left.is_empty() {
            let words = slots.words(at & !7).ok_or(OutOfMemoryRange)?;
            // Run by run: what was written stays told if the next one is not memory.
            let stored = self
                .stage2
                .store(Ipa::new(at), words, left)
                .map_err(|_| OutOfMemoryRange)?;
            at += stored as u64;
            left = left.get(stored..).unwrap_or_default();
        }
        Ok(())
    }

    /// Writes `len` bytes at `ipa` back to memory and out of the caches, as far as they are
    /// the guest's.
    pub fn clean(&self, ipa: u64, len: u64) {
        let first = ipa & !(PAGE as u64 - 1);
        let end = ipa.saturating_add(len);
        let slots = self.slots();
        let meets = |slot: &&Slot| slot.base < end && first < slot.base + slot.pages * PAGE as u64;
        for (base, run) in slots.iter().filter(meets).flat_map(|slot| &slot.runs) {
            let run_end = base + (run.pages() * PAGE) as u64;
            let (start, end) = (first.max(*base), end.min(run_end));
            if start < end {
                let pages = (end - start).div_ceil(PAGE as u64) as usize;
                run.clean((start - base) as usize / PAGE, pages);
            }
        }
    }

    /// Puts frames of a slot into the state of a new board: RAM is zero, flash is erased.
    /// `base` is where the guest sees the run; the dirty log is told.
    ///
    /// # Errors
    ///
    /// The frames are in no slot.
    pub fn clear(
        &self,
        slot: &Slot,
        base: u64,
        run: &Run,
        first: usize,
        pages: usize,
    ) -> Result<(), OutOfMemoryRange> {
        let first = first.min(run.pages());
        let pages = pages.min(run.pages() - first);
        let words = run.words().get(first * WORDS..(first + pages) * WORDS);
        let ipa = Ipa::new(base + (first * PAGE) as u64);
        self.stage2
            .overwrite(ipa, words.unwrap_or_default(), || {
                slot.clear(run, first, pages);
            })
            .map_err(|_| OutOfMemoryRange)
    }

    /// Zeroes frames that are in no slot yet.
    pub fn zero(&self, run: &Run, first: usize, pages: usize) {
        run.zero(first, pages);
        self.clean_run(run, first, pages);
    }

    /// Sees to it that a guest whose caches are off finds what EL2 wrote.
    pub fn clean_run(&self, run: &Run, first: usize, pages: usize) {
        // With FEAT_S2FWB all that a guest does to its memory is cacheable, whatever it says itself.
        if self.stage2.features().fwb != Support::Present {
            run.clean(first, pages);
        }
    }

    /// Whether `ipa` is in RAM.
    pub fn contains(&self, ipa: u64) -> bool {
        self.slots().words(ipa & !7).is_some()
    }
}

impl Slots {
    /// The slot with this number.
    pub fn by_id(&self, id: u16) -> Option<&Slot> {
        self.iter().find(|slot| slot.id.0 == id)
    }

    /// How many words there are from `ipa` (a multiple of 8) to the end of its run.
    pub fn left(&self, ipa: u64) -> usize {
        self.words(ipa).map_or(0, <[_]>::len)
    }

    /// The words themselves.
    fn words(&self, ipa: u64) -> Option<&[AtomicU64]> {
        self.iter().find_map(|slot| slot.words(ipa))
    }
}

impl Deref for Slots {
    type Target = [Slot];

    fn deref(&self) -> &[Slot] {
        &self.0
    }
}

impl Slot {
    fn clear(&self, run: &Run, first: usize, pages: usize) {
        match self.access {
            Access::ReadWrite => run.zero(first, pages),
            Access::ReadOnly | Access::None => {
                for word in run.words().iter().skip(first * WORDS).take(pages * WORDS) {
                    word.store(ERASED, Relaxed);
                }
            }
        }
    }

    /// The words from `ipa` (a multiple of 8) to the end of its run.
    fn words(&self, ipa: u64) -> Option<&[AtomicU64]> {
        let after = self.runs.partition_point(|(base, _)| *base <= ipa);
        let (base, run) = self.runs.get(after.checked_sub(1)?)?;
        run.words()
            .get((ipa - base) as usize / 8..)
            .filter(|words| !words.is_empty())
    }

    /// Where it lies in the machine: runs that touch are one.
    pub fn extents(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let mut runs = self.runs.iter().peekable();
        core::iter::from_fn(move || {
            let (base, run) = runs.next()?;
            let mut pages = run.pages() as u64;
            let end = |pages: u64| run.address() + pages * PAGE as u64;
            while let Some((_, next)) = runs.next_if(|(_, next)| next.address() == end(pages)) {
                pages += next.pages() as u64;
            }
            Some((*base, run.address(), pages))
        })
    }
}
