//! The other vCPUs: started by PSCI, each with its own stack and the same tables.

use core::arch::asm;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::fdt::Mpidr;
use crate::pattern::Vcpu;
use crate::rt::psci::{self, Refused};

/// What a vCPU runs.
pub type Work = fn(Vcpu) -> !;

static WORK: AtomicUsize = AtomicUsize::new(0);

/// The vCPU this runs on.
#[must_use]
pub fn current() -> Vcpu {
    let number: u64;
    // SAFETY: the entry code put the number there.
    unsafe { asm!("mrs {}, tpidr_el1", out(reg) number, options(nomem, nostack, preserves_flags)) };
    Vcpu(number as u8)
}

/// Starts a vCPU. It runs `work`, as do all others that are started later.
///
/// # Errors
///
/// PSCI's, and a vCPU number there is no stack for is refused as PSCI would (INVALID_PARAMETERS).
pub fn start(vcpu: Vcpu, cpu: Mpidr, work: Work) -> Result<(), Refused> {
    unsafe extern "C" {
        static __secondary_entry: u8;
    }
    if usize::from(vcpu.0) >= Vcpu::MAX {
        return Err(Refused(-2));
    }
    WORK.store(work as usize, Ordering::Release);
    // Its first reads come with the caches on and inner shareable, so coherence is enough; this only orders them.
    barrier();
    // SAFETY: the entry takes the vCPU's number, and gives each its own stack.
    unsafe {
        psci::cpu_on(
            cpu,
            (&raw const __secondary_entry).addr() as u64,
            vcpu.0.into(),
        )
    }
}

/// Where the entry code goes on.
pub extern "C" fn secondary(number: u64) -> ! {
    let work = WORK.load(Ordering::Acquire);
    // SAFETY: `start` stored a `Work` before it turned this vCPU on.
    let work: Work = unsafe { core::mem::transmute(work) };
    work(Vcpu(number as u8))
}

/// DSB SY: everything written before is visible to everyone.
pub fn barrier() {
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}

/// For loops that wait: YIELD. The standard library's hint is an ISB, which an emulator with one thread for all vCPUs
/// does not take as a reason to run another.
#[inline(always)]
pub fn pause() {
    // SAFETY: a hint.
    unsafe { asm!("yield", options(nomem, nostack, preserves_flags)) };
}

/// Waits until `ready`, asleep in between if the machine has a use for that. [`wake`] after making it ready.
pub fn wait(mut ready: impl FnMut() -> bool) {
    while !ready() {
        // SAFETY: waits for an event. A wake-up between the check and this is kept in the event register.
        unsafe { asm!("wfe", options(nomem, nostack, preserves_flags)) };
    }
}

/// Wakes those in [`wait`].
pub fn wake() {
    // SAFETY: sends an event, after the writes that it is about.
    unsafe { asm!("dsb ishst", "sev", options(nostack, preserves_flags)) };
}
