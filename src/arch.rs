//! The machine's own words: registers, barriers, TLB and cache maintenance, calls to
//! firmware, per-CPU data and the way in and out of a guest.
//!
//! The only home of `asm!` and of system-register writes. Nothing here knows what a VM
//! is; higher rooms call down. EL2 runs with all of DAIF masked from the first
//! instruction to the last: interrupts are taken from a guest (an exit) or polled while
//! idle, never from EL2 itself, so no lock needs to mask them.

pub mod barrier;
pub mod boot;
pub mod cache;
pub mod context;
pub mod cpu;
pub mod crc;
pub mod el1;
pub mod exception;
pub mod features;
pub mod gic;
pub mod lock;
pub mod mmio;
pub mod random;
pub mod regs;
pub mod smc;
pub mod stage1;
pub mod timer;
pub mod tlb;
pub mod vector;
