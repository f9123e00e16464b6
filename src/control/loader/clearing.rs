//! Clearing fresh memory, by as many jobs as there are CPUs.
//!
//! They share nothing but the place from which on nobody has begun; whoever has time takes the next step's worth.

use super::{next_frames, step};
use crate::arch::cpu;
use crate::arch::lock::{Mutex, rank};
use crate::sched;
use crate::task::job::Step;
use crate::task::meter::metered;
use crate::vm::Vm;
use crate::vm::memory::{GuestMemory, OutOfMemoryRange};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use tidemark_wire::message::Task;

/// Fresh memory that is being cleared, a step at a time, by whoever has time.
pub struct Clearing {
    /// Slot, run and page from which on nobody has begun.
    next: Mutex<(usize, usize, usize), { rank::CLEARING }>,
    /// Jobs that are not over.
    jobs: AtomicUsize,
    /// Memory was in no slot.
    failed: AtomicBool,
}

impl Clearing {
    /// Gives each CPU a job that clears `vm`'s memory.
    pub fn begin(vm: &'static Vm) -> Arc<Self> {
        let clearing = Arc::new(Self {
            next: Mutex::new((0, 0, 0)),
            jobs: AtomicUsize::new(cpu::count()),
            failed: AtomicBool::new(false),
        });
        sched::submit_to_all(|| {
            let clearing = clearing.clone();
            Box::new(move || metered(Task::Clear, || clearing.step(&vm.memory)))
        });
        clearing
    }

    /// Whether all of it is done: then what they wrote comes before what happens next.
    pub fn is_over(&self) -> bool {
        self.jobs.load(Acquire) == 0
    }

    /// How it went, once it is over.
    ///
    /// # Errors
    ///
    /// Memory was in no slot.
    pub fn result(&self) -> Result<(), OutOfMemoryRange> {
        match self.failed.load(Relaxed) {
            false => Ok(()),
            true => Err(OutOfMemoryRange),
        }
    }

    fn step(&self, memory: &GuestMemory) -> Step {
        let slots = memory.slots();
        let next = {
            let (slot, run, page) = &mut *self.next.lock();
            next_frames(&slots, slot, run, page)
        };
        let cleared =
            next.map(|(of, base, frames, first)| memory.clear(of, base, frames, first, step(of)));
        match cleared {
            Some(Ok(())) => return Step::Again,
            Some(Err(_)) => self.failed.store(true, Relaxed),
            None => {}
        }
        // Pairs with `is_over`.
        self.jobs.fetch_sub(1, Release);
        Step::Done
    }
}
