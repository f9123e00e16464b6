//! VMIDs: which number tags which VM's translations, however many VMs there are.
//!
//! A number is a VM's for one *generation*. When a generation's numbers are used up the next one
//! begins (the rollover): a VM that some CPU runs at that moment keeps its number, every other VM has
//! none until a CPU loads it again. What TLBs hold under a number may then be of its last owner, so a
//! CPU drops all it holds before it runs anything of a new generation.
//!
//! # What holds at any moment
//!
//! * In one generation a number is given to one VM at most. Zero is given to none.
//! * A CPU's *slot* says what it runs: a generation and a number. While the slot is of generation G, what
//!   the CPU's TLB holds was cached since G began, under numbers of G.
//! * A rollover leaves [`OVERTAKEN`] in every slot. What the CPU ran until then is its *kept* number:
//!   nobody else is given it, for as long as the CPU goes on running that.
//! * So what a guest finds in a TLB under its own number was cached for that VM (invariant 17).
//!
//! # Who drops the TLBs
//!
//! At a rollover either the CPU that rolls over invalidates everywhere (ALLE1IS), or each CPU invalidates
//! its own TLB (ALLE1) when it next loads a VM. Neither harms those who go on running: their numbers are
//! kept, and what is dropped under them is walked again. Here each CPU drops its own.
//!
//! * A broadcast would have to be complete before *anybody* is given a number of the new generation:
//!   executed under the lock, or waited for. A CPU's own invalidation concerns that CPU alone.
//! * A broadcast catches what was cached before it. A CPU that is between two VMs, or has another VM's
//!   VTTBR_EL2 selected for an invalidation, still has a number loaded that may be gone; a walk that is
//!   under way, or that the hardware begins on its own (Cortex-A72 1319367, A76 1165522), would be cached
//!   after the broadcast and found by the number's next owner. A CPU's own invalidation comes after
//!   VTTBR_EL2 is written, and so after all that was cached under any number before.
//! * A broadcast empties the TLB under every running guest at once. So does the other way in the end, but
//!   at a switch, where the next guest has little there; and a CPU that never switches keeps its own.
//!
//! The price is one local invalidation a CPU in place of one broadcast, and that stale entries lie in a
//! TLB until its CPU switches. Nothing runs that could use them. It needs TLBs that serve one CPU only,
//! so CnP stays clear (see [`config`](crate::config)), and no other user of VMIDs: an SMMU that listens
//! to broadcasts would need numbers that are never taken back.
//!
//! # TLBI for a VM that has no number
//!
//! [`Vmids::current`] says then that there is nothing to invalidate. No CPU runs the VM (it would have
//! kept its number), each CPU drops its TLB before it runs it again, and then walks what is in memory.
//! A number that is gone is told to nobody, not even to invalidate by it.
//!
//! It has to be asked *after* the change of the descriptors is complete (`DSB ISHST`). If a CPU loads the
//! VM meanwhile, then either that load was first, and the answer is the number that it gave; or it comes
//! after the question, because its CPU takes the lock after the one who asks, or has seen a rollover that
//! the one who asks has not: and then it walks the descriptors as changed.
//!
//! # How far the counter goes
//!
//! A generation is what is above the number in sixty-four bits. A machine's CPUs may keep half of the
//! numbers at most, so that each generation gives out the other half: 2^56 times 2^7 for eight bits,
//! 2^48 times 2^15 for sixteen. That is 2^63 numbers, given one by one under a lock: at ten nanoseconds
//! each, 2900 years. Nothing is done about the end.
//!
//! # Concurrency
//!
//! [`load`](Vmids::load) without news is two loads and one compare-and-swap, on the VM's word and on the
//! CPU's own. It needs neither lock nor barrier: that the slot was not OVERTAKEN decides everything,
//! and of a rollover's swap and that compare-and-swap one comes first. Either the rollover finds, and
//! keeps, what was loaded, or the compare-and-swap fails.
//!
//! The rest is behind a spinning mutex, a leaf in the lock order. There is no bitmap to clear or search:
//! a generation hands its numbers out in order and passes over those that are kept, one a CPU at most.
//! So the lock is held for some CPUs^2 comparisons at worst (both ends of a rollover full of kept numbers)
//! and a swap a CPU, not for the 1024 words that a bitmap of 2^16 numbers would be.

use crate::error::Error;
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst, fence};
use crate::sync::mutex::SpinMutex;
use crate::types::{Vmid, VmidWidth};
use alloc::boxed::Box;
use alloc::vec::Vec;

#[cfg(all(test, not(loom)))]
mod tests;

/// In a slot: there was a rollover since the CPU last loaded a VM. Of the last generation, so that no
/// VM is of the same.
const OVERTAKEN: u64 = u64::MAX;

/// A VM's number, and of which generation it is.
///
/// One for each stage 2, made with it and dropped with it: another root under the same number would be
/// another VM to the TLBs. And for one [`Vmids`] only.
#[derive(Default)]
pub struct VmVmid(AtomicU64);

impl VmVmid {
    /// Makes one without a number: of generation zero, which never was.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }
}

/// Where the number in a VM's VTTBR_EL2 comes from.
pub(crate) enum Tag {
    /// It is the VM's own for ever.
    Own(Vmid),
    /// It is lent for a generation.
    Lent(&'static Vmids, VmVmid),
}

impl Tag {
    /// As [`Vmids::current`].
    #[inline]
    pub(crate) fn current(&self) -> Option<Vmid> {
        match self {
            Tag::Own(vmid) => Some(*vmid),
            Tag::Lent(vmids, vm) => vmids.current(vm),
        }
    }
}

/// What a CPU needs in order to run a VM.
#[must_use = "without its flush a VMID is another VM's"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// What to put into VTTBR_EL2.
    pub vmid: Vmid,
    /// What to do then, before the guest runs.
    pub flush: Flush,
}

/// What a CPU does between [`Vmids::load`] and the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// Nothing.
    None,
    /// `DSB ISHST; TLBI ALLE1; DSB NSH; ISB`, *after* VTTBR_EL2 was written and an `ISB`: until then
    /// the CPU may cache something under the number that it has loaded, and who unloaded has that no
    /// longer. The first barrier has the rollover seen by all before this CPU walks. An instruction
    /// cache tagged with VMIDs (CTR_EL0.L1Ip "VPIPT") would need `IC IALLU` as well.
    Local,
}

/// The VMIDs of a machine.
pub struct Vmids {
    width: VmidWidth,
    /// The bits of the number. Above them is the generation.
    mask: u64,
    /// The largest number.
    last: u64,
    slots: Box<[Slot]>,
    /// The generation, with number zero. Changed under the lock.
    generation: AtomicU64,
    books: SpinMutex<Books>,
}

/// What a CPU runs. In a cache line (or two, where they are prefetched in pairs) of its own: only a
/// rollover touches another CPU's.
#[repr(align(128))]
struct Slot(AtomicU64);

/// In lines of its own, too: who waits for the lock takes nothing from the fast path.
#[repr(align(128))]
struct Books {
    /// The next number to give, unless it is kept.
    next: u64,
    /// What each CPU ran at the rollover. A VM that is found here keeps its number; when it is taken
    /// into the new generation, so is its entry, for the next rollover may find the CPU still at it.
    kept: Box<[u64]>,
}

/// What [`Vmids::load`] decides by, as it was read.
#[derive(Clone, Copy)]
struct Seen {
    slot: u64,
    id: u64,
}

impl Vmids {
    /// Makes the VMIDs for `cpus` CPUs. No VM has a number, and no TLB is trusted.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyCpus`] if they could keep more than half of the numbers. A rollover finds a number
    /// as long as there is one more than CPUs; half makes generations last.
    /// [`Error::OutOfMemory`].
    pub fn new(width: VmidWidth, cpus: usize) -> Result<Self, Error> {
        Self::with_numbers(width, mask(width), cpus)
    }

    /// The same with numbers up to `last` only, so that a few VMs use them up: for tests.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_numbers(width: VmidWidth, last: u64, cpus: usize) -> Result<Self, Error> {
        let last = last.min(mask(width));
        let most = (last / 2) as usize;
        if cpus > most {
            return Err(Error::TooManyCpus { asked: cpus, most });
        }
        let mask = mask(width);
        let nobody = OVERTAKEN & !mask;
        let mut slots = Vec::new();
        let mut kept = Vec::new();
        slots
            .try_reserve_exact(cpus)
            .and_then(|()| kept.try_reserve_exact(cpus))
            .map_err(|_| Error::OutOfMemory)?;
        slots.extend((0..cpus).map(|_| Slot(AtomicU64::new(nobody))));
        kept.extend((0..cpus).map(|_| nobody));
        Ok(Self {
            width,
            mask,
            last,
            slots: slots.into_boxed_slice(),
            generation: AtomicU64::new(mask + 1),
            books: SpinMutex::new(Books {
                next: 1,
                kept: kept.into_boxed_slice(),
            }),
        })
    }

    /// This CPU, which is `cpu`, is about to run `vm`, and nothing else any more. `None` if there is no
    /// such CPU.
    ///
    /// What the VM that it ran until now did is complete (a `DSB`, invariant 13): from here on others
    /// may be told that there is nothing to invalidate for that VM, and will not wait for this CPU. Between
    /// this call and the guest there is an `ISB`, which writing VTTBR_EL2 needs anyway.
    #[inline]
    pub fn load(&self, cpu: usize, vm: &VmVmid) -> Option<Loaded> {
        let slot = self.slots.get(cpu)?;
        let seen = Self::look(slot, vm);
        if !self.take(slot, seen) {
            return self.load_slowly(slot, vm);
        }
        self.loaded(seen.id, Flush::None)
    }

    #[inline]
    fn look(slot: &Slot, vm: &VmVmid) -> Seen {
        Seen {
            slot: slot.0.load(Relaxed),
            id: vm.0.load(Relaxed),
        }
    }

    /// Runs on what was seen, unless that is of two generations or there was a rollover since.
    #[inline]
    fn take(&self, slot: &Slot, seen: Seen) -> bool {
        self.are_of_one_generation(seen.slot, seen.id)
            && slot
                .0
                .compare_exchange(seen.slot, seen.id, Relaxed, Relaxed)
                .is_ok()
    }

    #[cold]
    #[inline(never)]
    fn load_slowly(&self, slot: &Slot, vm: &VmVmid) -> Option<Loaded> {
        let mut books = self.books.lock();
        let id = match self.renewed(&mut books, vm) {
            Some(id) => id,
            None => {
                let id = self.give(&mut books);
                vm.0.store(id, Relaxed);
                id
            }
        };
        // After `give`: its rollover overtakes this CPU too.
        let before = slot.0.swap(id, Relaxed);
        // Whoever asks `current` from here on finds this, or what it changed before is found here.
        fence(SeqCst);
        if self.are_of_one_generation(before, id) {
            self.loaded(id, Flush::None)
        } else {
            self.loaded(id, Flush::Local)
        }
    }

    /// The VM's number in this generation, if it has one or has kept one.
    fn renewed(&self, books: &mut Books, vm: &VmVmid) -> Option<u64> {
        let id = vm.0.load(Relaxed);
        let generation = self.generation.load(Relaxed);
        if self.are_of_one_generation(id, generation) {
            return Some(id);
        }
        if !books.kept.contains(&id) {
            return None;
        }
        let renewed = generation | self.number(id);
        for kept in books.kept.iter_mut().filter(|kept| **kept == id) {
            *kept = renewed;
        }
        vm.0.store(renewed, Relaxed);
        Some(renewed)
    }

    /// A number that nobody has. Ends: after a rollover there are more numbers than CPUs to keep them.
    fn give(&self, books: &mut Books) -> u64 {
        loop {
            while books.next <= self.last {
                let number = books.next;
                books.next += 1;
                let is_kept = books.kept.iter().any(|kept| self.number(*kept) == number);
                if !is_kept {
                    return self.generation.load(Relaxed) | number;
                }
            }
            self.roll_over(books);
        }
    }

    fn roll_over(&self, books: &mut Books) {
        for (slot, kept) in self.slots.iter().zip(&mut books.kept) {
            let ran = slot.0.swap(OVERTAKEN, Relaxed);
            // Overtaken before and not back since: it still runs what it kept then.
            if ran != OVERTAKEN {
                *kept = ran;
            }
        }
        let generation = self.generation.load(Relaxed);
        let next = generation.wrapping_add(self.mask + 1);
        self.generation.store(next, Relaxed);
        books.next = 1;
    }

    /// CPU `cpu` runs no VM any more; its TLB stays as it is. What the VM did is complete, as for
    /// [`load`](Self::load). Not needed between two loads.
    #[inline]
    pub fn unload(&self, cpu: usize) {
        if let Some(slot) = self.slots.get(cpu) {
            // Number zero, of the same generation. Of OVERTAKEN this makes one that is not kept again.
            slot.0.fetch_and(!self.mask, Relaxed);
        }
    }

    /// CPU `cpu` runs no VM any more, and what its TLB holds when it comes back is not known: it is
    /// turned off. Its next load flushes.
    pub fn turn_off(&self, cpu: usize) {
        if let Some(slot) = self.slots.get(cpu) {
            slot.0.store(OVERTAKEN & !self.mask, Relaxed);
        }
    }

    /// What has to be in VTTBR_EL2 for a TLBI to hit all that can be used of `vm`; `None` if there is no
    /// such thing, and the TLBI is to be left out.
    ///
    /// To be asked for each invalidation anew, after the `DSB ISHST` that follows the last change of a
    /// descriptor. If there is a rollover between this and the TLBI, then the TLBI hits the number's
    /// next owner too, which costs it some walks.
    #[inline]
    pub fn current(&self, vm: &VmVmid) -> Option<Vmid> {
        let id = vm.0.load(Relaxed);
        if self.are_of_one_generation(id, self.generation.load(Relaxed)) {
            return self.vmid(id);
        }
        self.current_of_old(vm)
    }

    /// A VM of an old generation may run on what it kept.
    #[cold]
    #[inline(never)]
    fn current_of_old(&self, vm: &VmVmid) -> Option<Vmid> {
        let mut books = self.books.lock();
        let id = self.renewed(&mut books, vm)?;
        self.vmid(id)
    }

    fn loaded(&self, id: u64, flush: Flush) -> Option<Loaded> {
        let vmid = self.vmid(id)?;
        Some(Loaded { vmid, flush })
    }

    /// Zero would be none, and is not given.
    fn vmid(&self, id: u64) -> Option<Vmid> {
        Vmid::new(self.number(id) as u16, self.width)
    }

    const fn number(&self, id: u64) -> u64 {
        id & self.mask
    }

    const fn are_of_one_generation(&self, one: u64, other: u64) -> bool {
        (one ^ other) & !self.mask == 0
    }
}

const fn mask(width: VmidWidth) -> u64 {
    match width {
        VmidWidth::Eight => 0xff,
        VmidWidth::Sixteen => 0xffff,
    }
}
