#![doc = include_str!("../README.md")]
//!
//! # The way of a dirty page
//!
//! A tracked leaf is *clean* (WC, no write permission) or *dirty* (WD). A guest's first write makes it
//! dirty: under [`Engine::Dbm`] the hardware does, under [`Engine::WriteProtect`] the fault handler
//! does and sets a bit in `live`. [`Stage2::take`] makes dirty leaves clean again, moves what it found
//! to the epoch's bitmap `in_flight`, invalidates TLBs once, and only then says the epoch may be read.
//! [`Stage2::commit`] forgets the epoch, [`Stage2::abort`] gives it back. Both engines report the same
//! pages; which one tracks a leaf is said by the leaf.
//!
//! # What holds at any moment
//!
//! * A page whose content changed since the host last had it is WD, or its bit is set, or a CPU that
//!   holds the old value WD is about to set it.
//! * Every change of a reachable descriptor is one atomic read-modify-write, and the value it returns
//!   decides dirtiness, never an earlier load.
//! * A read-only leaf is told from a clean one by the descriptor alone, so nothing here can make it
//!   writable.
//! * Every call is bounded; what takes longer returns [`Progress`] and is called again.
//!
//! # Concurrency
//!
//! Any CPU may call anything at any time. Faults, splits and harvests run in parallel: each CPU looks at
//! the slots and the log in a copy of its own, and all change entries by compare-and-swap; a
//! break-before-make leaves a busy marker, and who meets it retries. Changes of slots, collapses and the
//! switch of a log hold the control mutex, change the copies one by one, and stop nobody. A table is
//! freed after its invalidation and after every CPU that may have found it has left. A harvest's memory
//! is given out in stretches, so that as many CPUs harvest as call. The lock order is: control mutex, a
//! CPU's copy.
//!
//! # Where things are
//!
//! | file | state it owns |
//! |---|---|
//! | `types`, `error`, `hardware` | addresses and names; refusals; the machine |
//! | `pte`, `tlb`, `config` | one descriptor; the invalidation sequences; VTCR and VTTBR |
//! | `walk`, `map`, `split`, `collapse`, `unmap` | the tables |
//! | `slot`, `dirty`, `readers` | slots, their two bitmaps, each CPU's copy of the list |
//! | `memslots` | adding and deleting slots, changing their access |
//! | `fault` | the fault path |
//! | `control`, `protect`, `harvest` | a log: where it is, starting and stopping it, taking from it |
//! | `age` | the access flags |
//! | `clear` | epochs of a range, and a log that begins with every page dirty |
//! | `engine` | which engine is best for the next round, and the change |
//! | `quota` | the throttle: limits, and what each vCPU spent |
//! | `stage2` | the VM: all of the above |
//! | `vmid` | the machine: which number tags which VM's translations |
//!
//! Architecture: Arm ARM DDI 0487, D8.2 (walks), D8.3 (descriptors), D8.5 (hardware dirty state), D8.14
//! (TLB maintenance, break-before-make).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "fake", loom))]
extern crate std;

mod age;
mod clear;
mod coherence;
mod collapse;
mod config;
mod control;
mod dirty;
mod engine;
mod error;
#[cfg(all(any(test, feature = "fake"), not(loom)))]
pub mod fake;
mod fault;
mod hardware;
mod harvest;
#[cfg(loom)]
mod looms;
mod map;
mod memslots;
mod protect;
mod pte;
mod quota;
mod readers;
mod slot;
mod split;
mod stage2;
mod sync;
#[cfg(all(test, not(loom)))]
mod tests;
mod tlb;
mod types;
mod unmap;
mod vmid;
mod walk;

pub use config::vtcr_el2 as vtcr;
pub use control::{LogStage, LogStatus};
pub use error::Error;
pub use fault::{Fault, FaultAccess, FaultKind, Outcome};
pub use hardware::{Features, Hardware, Leaves, Support, Table, TableAt, TablePages, Tlbi};
pub use harvest::{SlotDirty, Words};
pub use map::Translation;
pub use quota::{Count, Duty, Limit, Meter, Quota, Stalls, Ticks, Turn, Verdict};
pub use slot::{LogMode, SlotInfo};
pub use stage2::{Counters, Mappings, Stage2};
pub use tlb::{IpaOperand, RangeOperand};
pub use types::{
    Access, Engine, Epoch, Extent, Gfn, Granularity, GuestVa, Ipa, Level, PAGE_SIZE, Pa, Progress,
    SlotId, Vmid, VmidWidth,
};
pub use vmid::{Flush, Loaded, VmVmid, Vmids};
