//! The machine's frames: who has them, and the only way to their content.
//!
//! The allocator's own bookkeeping lives in the heap, never in the frames: they may belong
//! to a guest, or hold one's secrets. Runs are powers of two and aligned to their size, so
//! that guest memory can be mapped by blocks.
//!
//! A [`Run`] is the proof of having frames. Its content is only ever seen as atomics: a
//! guest may be writing it at the same time.

use super::{PAGE, Range};
use crate::arch::cache;
use buddy_system_allocator::FrameAllocator;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use spin::Mutex;

static FREE: Mutex<FrameAllocator<33>> = Mutex::new(FrameAllocator::new());
static FREE_PAGES: AtomicU64 = AtomicU64::new(0);

/// Hands memory over to the allocator: whole pages of `range`, mapped read-write.
pub fn add(range: Range) {
    let mask = PAGE as u64 - 1;
    let first = range.start.saturating_add(mask) / PAGE as u64;
    let end = range.end / PAGE as u64;
    if first < end {
        FREE.lock().add_frame(first as usize, end as usize);
        FREE_PAGES.fetch_add(end - first, Relaxed);
    }
}

/// How many frames are free.
pub fn free_pages() -> u64 {
    FREE_PAGES.load(Relaxed)
}

/// Contiguous frames, a power of two of them, aligned to their size. Given back when dropped.
#[derive(Debug)]
pub struct Run {
    address: u64,
    pages: usize,
}

impl Run {
    /// Takes frames for `owner`. Their content is whatever their last owner left.
    pub fn take(pages: usize) -> Option<Self> {
        if !pages.is_power_of_two() {
            return None;
        }
        let first = FREE.lock().alloc(pages)?;
        FREE_PAGES.fetch_sub(pages as u64, Relaxed);
        Some(Self {
            address: (first * PAGE) as u64,
            pages,
        })
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
        // SAFETY: the frames are this run's; concurrent accesses of a guest would be other
        // CPUs' plain stores, which the hardware orders by byte.
        unsafe { cache::zero(self.address as usize + first * PAGE, pages * PAGE) };
    }

    /// Writes `pages` frames from `first` on back to memory and out of the caches.
    pub fn clean(&self, first: usize, pages: usize) {
        let first = first.min(self.pages);
        let pages = pages.min(self.pages - first);
        cache::clean_invalidate(self.address as usize + first * PAGE, pages * PAGE);
    }

    /// Keeps the frames for good, as the hypervisor's own.
    pub fn leak(self) -> u64 {
        let address = self.address;
        core::mem::forget(self);
        address
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        FREE.lock()
            .dealloc(self.address as usize / PAGE, self.pages);
        FREE_PAGES.fetch_add(self.pages as u64, Relaxed);
    }
}

/// Gives back what [`Run::leak`] kept: stage-2 tables that nothing reaches any more.
pub fn give_back_tables(address: u64, pages: usize) {
    drop(Run { address, pages });
}
