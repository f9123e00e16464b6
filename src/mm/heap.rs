//! The heap of EL2's own small objects. Guest memory never comes from here: a buddy heap
//! writes its links into free memory (see `frames`).

use super::Range;
use crate::arch::lock::{Mutex, rank};
use buddy_system_allocator::Heap;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{NonNull, null_mut};

struct LockedHeap(Mutex<Heap<32>, { rank::HEAP }>);

#[global_allocator]
static HEAP: LockedHeap = LockedHeap(Mutex::new(Heap::new()));

// SAFETY: the buddy heap hands out disjoint, aligned blocks of the range given to `init`,
// under a lock. EL2 takes no interrupts, so the lock cannot be taken twice by one CPU.
unsafe impl GlobalAlloc for LockedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .alloc(layout)
            .map_or(null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: the caller vouches that `pointer` came from `alloc` with `layout`.
            unsafe { self.0.lock().dealloc(pointer, layout) };
        }
    }
}

/// Gives the heap its memory.
///
/// # Safety
///
/// `range` is mapped read-write memory that nothing else uses, now or later.
pub unsafe fn init(range: Range) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        HEAP.0
            .lock()
            .init(range.start as usize, range.size() as usize);
    }
}

/// Bytes in use, and in all.
pub fn usage() -> (usize, usize) {
    let heap = HEAP.0.lock();
    (heap.stats_alloc_actual(), heap.stats_total_bytes())
}
