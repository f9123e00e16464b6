//! What a guest leaves in the general registers at an exit, as the assembly lays it out.

use core::mem::offset_of;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering::*};

/// A vCPU's general registers, where it goes on, and whose they are: an exit has this address in hand, and nothing else
/// of its vCPU `O`.
///
/// Atomics, read and written relaxed (plain loads and stores), so that a debugger's view
/// from another CPU is not undefined; the vCPU's own CPU is the only writer while it runs.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Context<O: 'static> {
    x: [AtomicU64; 31],
    elr: AtomicU64,
    spsr: AtomicU64,
    owner: AtomicPtr<O>,
}

// boot/vectors.S: x30 and ELR are one pair at 240, SPSR stands at 256.
const _: () = assert!(offset_of!(Context<()>, elr) == 248);
const _: () = assert!(offset_of!(Context<()>, spsr) == 256);

impl<O: Sync + 'static> Context<O> {
    /// All zero: EL1h with interrupts masked is set by [`Context::reset`].
    pub const fn new() -> Self {
        Self {
            x: [const { AtomicU64::new(0) }; 31],
            elr: AtomicU64::new(0),
            spsr: AtomicU64::new(0),
            owner: AtomicPtr::new(null_mut()),
        }
    }

    /// Says whose it is, before it runs.
    pub fn set_owner(&self, owner: &'static O) {
        self.owner
            .store(core::ptr::from_ref(owner).cast_mut(), Release);
    }

    /// Whose it is.
    #[inline]
    pub fn owner(&self) -> Option<&'static O> {
        // SAFETY: null, or of the `&'static O` that `set_owner` was given, and never written through. `O` is `Sync`, so
        // the reference may be had by any CPU. Relaxed: an exit is on the CPU that loaded the vCPU, under locks taken
        // since.
        unsafe { self.owner.load(Relaxed).as_ref() }
    }

    /// Register `n` of an instruction's 5-bit field; 31 reads as zero (XZR).
    #[inline]
    pub fn x(&self, n: usize) -> u64 {
        self.x.get(n).map_or(0, |x| x.load(Relaxed))
    }

    /// Writes register `n`; a write to 31 (XZR) is dropped.
    #[inline]
    pub fn set_x(&self, n: usize, value: u64) {
        if let Some(x) = self.x.get(n) {
            x.store(value, Relaxed);
        }
    }

    /// Where the guest goes on.
    #[inline]
    pub fn pc(&self) -> u64 {
        self.elr.load(Relaxed)
    }

    /// Sets where the guest goes on.
    #[inline]
    pub fn set_pc(&self, pc: u64) {
        self.elr.store(pc, Relaxed);
    }

    /// Steps over the trapped instruction (AArch64: four bytes), as if it had been carried
    /// out: BTYPE is what any instruction but a branch leaves, and a software step is over.
    #[inline]
    pub fn skip_instruction(&self) {
        const BTYPE: u64 = 3 << 10;
        const SS: u64 = 1 << 21;
        self.set_pstate(self.pstate() & !(BTYPE | SS));
        self.set_pc(self.pc().wrapping_add(4));
    }

    /// The guest's PSTATE.
    #[inline]
    pub fn pstate(&self) -> u64 {
        self.spsr.load(Relaxed)
    }

    /// Sets the guest's PSTATE.
    #[inline]
    pub fn set_pstate(&self, pstate: u64) {
        self.spsr.store(pstate, Relaxed);
    }

    /// The state of a CPU that PSCI turned on: EL1h, DAIF masked, `context` in x0.
    pub fn reset(&self, entry: u64, context: u64) {
        for x in &self.x {
            x.store(0, Relaxed);
        }
        self.set_x(0, context);
        self.set_pc(entry);
        self.set_pstate(0x3c5);
    }
}
