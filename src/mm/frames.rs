//! The machine's frames: who has them, and the only way to their content.
//!
//! Every frame has one entry in the ownership table, from boot on; nothing is handed out
//! or taken back without changing it, and a transition that does not fit is refused. The
//! allocator's own bookkeeping lives in the heap, never in the frames: they may belong to
//! a guest, or hold one's secrets. Runs are powers of two and aligned to their size, so
//! that guest memory can be mapped by blocks.
//!
//! A [`Run`] is the proof of having frames. Its content is only ever seen as atomics: a
//! guest may be writing it at the same time.

use super::{PAGE, Range};
use crate::arch::cache::{self, Zeroing};
use crate::arch::lock::{Mutex, rank};
use crate::arch::timer;
use buddy_system_allocator::FrameAllocator;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use spin::Once;
use tidemark_ownership::{Census, Error, FrameTable, Generation, Guest, Owner, Pa, VmId};

static FREE: Mutex<FrameAllocator<33>, { rank::FRAMES }> = Mutex::new(FrameAllocator::new());
static FREE_PAGES: AtomicU64 = AtomicU64::new(0);
static OWNERS: Once<FrameTable<'static>> = Once::new();

/// Bytes of the ownership table for memory from the start of `span` to its end.
pub fn table_size(span: Range) -> u64 {
    (span.whole_pages().size() / PAGE as u64 * size_of::<u64>() as u64)
        .next_multiple_of(PAGE as u64)
}

/// Makes the ownership table in `place`: all of `span` is reserved until it is released.
///
/// # Safety
///
/// `place` is mapped read-write memory, whole pages, as large as [`table_size`] says, that
/// nothing else uses, now or later.
pub unsafe fn init(span: Range, place: Range) {
    let span = span.whole_pages();
    // SAFETY: the caller's promise.
    unsafe { cache::zero(place.start as usize, place.size() as usize) };
    // SAFETY: the caller's promise; zeroed memory is valid atomics.
    let entries = unsafe {
        core::slice::from_raw_parts(
            place.start as *const AtomicU64,
            (span.size() / PAGE as u64) as usize,
        )
    };
    // The base is a page's, and the span is of physical addresses.
    if let Ok(table) = FrameTable::new(Pa(span.start), entries) {
        OWNERS.call_once(|| table);
    }
}

fn owners() -> &'static FrameTable<'static> {
    OWNERS
        .get()
        .expect("frames are used before memory is set up")
}

/// Says that memory is the hypervisor's own, for good.
pub fn claim(range: Range, owner: Owner) {
    let range = range.whole_pages();
    if let Err(error) = owners().transfer_range(
        Pa(range.start),
        range.size() / PAGE as u64,
        Owner::Reserved,
        owner,
    ) {
        log::warn!("memory {range:x?}: {error}");
    }
}

/// Hands memory over to the allocator: whole pages of `range`, mapped read-write.
pub fn add(range: Range) {
    let mask = PAGE as u64 - 1;
    let first = range.start.saturating_add(mask) / PAGE as u64;
    let end = range.end / PAGE as u64;
    if first < end {
        claim(
            Range {
                start: first * PAGE as u64,
                end: end * PAGE as u64,
            },
            Owner::Free,
        );
        FREE.lock().add_frame(first as usize, end as usize);
        FREE_PAGES.fetch_add(end - first, Relaxed);
    }
}

/// How many frames are free.
pub fn free_pages() -> u64 {
    FREE_PAGES.load(Relaxed)
}

/// Counts the next so many frames, for people; see [`FrameTable::count`].
pub fn count(first: usize, frames: usize, census: &mut Census) -> Option<usize> {
    owners().count(first, frames, census)
}

/// The owner of guest memory from `gfn` on, in a VM's life `generation`. `None` past what
/// an entry can name.
pub fn guest(vm: u16, generation: Generation, gfn: u64) -> Option<Owner> {
    Some(Owner::GuestRam(Guest::new(
        VmId::new(vm)?,
        generation,
        gfn,
    )?))
}

/// The owner of a VM's translation tables.
pub fn table_of(vm: u16) -> Owner {
    VmId::new(vm).map_or(Owner::Hypervisor, Owner::Table)
}

/// How memory is zeroed from now on, and what each way took for [`MEASURED`] pages, in ticks.
#[derive(Debug, Clone, Copy)]
pub struct ZeroingCosts {
    /// The faster one.
    pub chosen: Zeroing,
    /// `DC ZVA`.
    pub blocks: u64,
    /// Stores.
    pub stores: u64,
}

/// Pages in one measurement of [`choose_zeroing`].
pub const MEASURED: usize = 16;
/// Measurements of each way, of which the shortest counts: an emulator has other things to do as well.
const MEASUREMENTS: usize = 8;

/// Measures both ways of zeroing on frames that are free, in turns, and has the faster one used. `None` where
/// there is nothing to choose from.
pub fn choose_zeroing() -> Option<ZeroingCosts> {
    let run = Run::take(MEASURED, Owner::Hypervisor)?;
    if !Zeroing::Blocks.usable() {
        return None;
    }
    let time = |how: Zeroing| {
        let begun = timer::now();
        // SAFETY: the frames are this run's, as in `Run::zero`; both ways can be used.
        unsafe { how.zero(run.address as usize, MEASURED * PAGE) };
        timer::now() - begun
    };
    let (mut blocks, mut stores) = (u64::MAX, u64::MAX);
    for _ in 0..MEASUREMENTS {
        blocks = blocks.min(time(Zeroing::Blocks));
        stores = stores.min(time(Zeroing::Stores));
    }
    let chosen = if stores < blocks {
        Zeroing::Stores
    } else {
        Zeroing::Blocks
    };
    chosen.choose();
    Some(ZeroingCosts {
        chosen,
        blocks,
        stores,
    })
}

/// Contiguous frames, a power of two of them, aligned to their size. Given back when dropped.
pub struct Run {
    address: u64,
    pages: usize,
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Run({:#x}, {} pages)", self.address, self.pages)
    }
}

impl Run {
    /// Takes frames for `owner`. Their content is whatever their last owner left.
    pub fn take(pages: usize, owner: Owner) -> Option<Self> {
        if !pages.is_power_of_two() {
            return None;
        }
        let first = FREE.lock().alloc(pages)?;
        let address = (first * PAGE) as u64;
        if let Err(error) = owners().transfer_range(Pa(address), pages as u64, Owner::Free, owner) {
            // The two books disagree: the frames stay out of use, for good.
            log::error!("{error}");
            return None;
        }
        FREE_PAGES.fetch_sub(pages as u64, Relaxed);
        Some(Self { address, pages })
    }

    /// Gives `pages` frames from `first` on to the next life of the guest that has them.
    ///
    /// # Errors
    ///
    /// Says whose frame stands in the way.
    pub fn next_generation(
        &self,
        first: usize,
        pages: usize,
        vm: u16,
        old: Generation,
        gfn: u64,
    ) -> Result<(), Error> {
        let first = first.min(self.pages);
        let pages = pages.min(self.pages - first) as u64;
        let at = Pa(self.address + (first * PAGE) as u64);
        let gfn = gfn + first as u64;
        let vm = VmId::new(vm).ok_or(Error::NoSuchFrame(at))?;
        let guest = |generation| Guest::new(vm, generation, gfn).ok_or(Error::NoSuchFrame(at));
        let (old, new) = (guest(old)?, guest(old.next())?);
        owners().transfer_range(at, pages, Owner::GuestRam(old), Owner::Dying(old))?;
        owners().transfer_range(at, pages, Owner::Dying(old), Owner::GuestRam(new))
    }

    /// Zeroes `pages` frames from `first` on, of a guest that has no way to them any more, so that giving them
    /// back takes no long step.
    ///
    /// # Errors
    ///
    /// Says whose they are, if not a guest's.
    pub fn scrub(&self, first: usize, pages: usize) -> Result<(), Error> {
        let first = first.min(self.pages);
        let pages = pages.min(self.pages - first);
        let at = Pa(self.address + (first * PAGE) as u64);
        let owner = owners().owner(at)?;
        let Owner::GuestRam(guest) = owner else {
            return Err(Error::Forbidden {
                frame: at,
                from: owner,
                to: Owner::Free,
            });
        };
        owners().transfer_range(at, pages as u64, owner, Owner::Dying(guest))?;
        self.zero(first, pages);
        Ok(())
    }

    /// Where the frames are.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many frames.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The content.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: a run is made of free frames, which are mapped read-write for good, and
        // nothing else has them until it is dropped. A guest's accesses are other CPUs'
        // accesses to the same atomics.
        unsafe {
            core::slice::from_raw_parts(
                self.address as *const AtomicU64,
                self.pages * PAGE / size_of::<u64>(),
            )
        }
    }

    /// Zeroes `pages` frames from frame `first` on, as far as there are so many.
    pub fn zero(&self, first: usize, pages: usize) {
        let first = first.min(self.pages);
        let pages = pages.min(self.pages - first);
        // SAFETY: the frames are this run's, whole pages mapped read-write for good; `words`
        // gives them out as atomics only.
        unsafe { cache::zero(self.address as usize + first * PAGE, pages * PAGE) };
    }

    /// Writes `pages` frames from `first` on back to memory and out of the caches.
    pub fn clean(&self, first: usize, pages: usize) {
        let first = first.min(self.pages);
        let pages = pages.min(self.pages - first);
        cache::clean_invalidate(self.address as usize + first * PAGE, pages * PAGE);
    }

    /// Keeps the frames for good, or until [`from_leaked`](Self::from_leaked).
    pub fn leak(self) -> u64 {
        let address = self.address;
        core::mem::forget(self);
        address
    }

    /// The run again that was leaked.
    ///
    /// # Safety
    ///
    /// [`leak`](Self::leak) gave that address, for a run of so many pages; no other run was made of it since, and
    /// nothing uses the frames any more.
    pub unsafe fn from_leaked(address: u64, pages: usize) -> Self {
        Self { address, pages }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let (at, pages) = (Pa(self.address), self.pages as u64);
        let give_back = || {
            let mut owner = owners().owner(at)?;
            if let Owner::GuestRam(guest) = owner {
                // A guest's memory is scrubbed before anyone else has it.
                owners().transfer_range(at, pages, owner, Owner::Dying(guest))?;
                self.zero(0, self.pages);
                owner = Owner::Dying(guest);
            }
            owners().transfer_range(at, pages, owner, Owner::Free)
        };
        match give_back() {
            Ok(()) => {
                FREE.lock()
                    .dealloc(self.address as usize / PAGE, self.pages);
                FREE_PAGES.fetch_add(pages, Relaxed);
            }
            // Whoever has a frame of it keeps it: better lost than shared.
            Err(error) => log::error!("{error}"),
        }
    }
}
