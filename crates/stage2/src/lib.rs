//! Stage-2 translation tables and the dirty log of one VM.
//!
//! This crate owns everything between a memory slot and a bitmap of the pages a guest wrote: the
//! tables, the faults on them, splitting and collapsing blocks, write protection, the hardware's dirty
//! state, and the two-phase harvest. It is pure: no assembly, no `unsafe`; the machine is behind one
//! trait, [`Hardware`]. So all of it is tested on the build machine, against a fake that records every
//! barrier and whose TLBs keep whatever the architecture lets them keep.
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
//!
//! # Example
//!
//! ```
//! use tidemark_stage2::{fake::Machine, *};
//!
//! # fn main() -> Result<(), Error> {
//! let machine = Machine::new(64, 1);
//! let vmid = Vmid::new(1, VmidWidth::Eight).unwrap();
//! let stage2 = Stage2::new(&machine, 40, vmid, Features::BASELINE)?;
//!
//! // 4 MiB at 1 GiB, mapped ahead: two blocks.
//! let ram = Extent { pa: Pa::new(0x8000_0000), pages: 1024 };
//! let base = Ipa::new(0x4000_0000);
//! stage2.add_slot(SlotId(0), base.gfn(), 1024, Access::ReadWrite, &[ram])?;
//! assert_eq!(stage2.map_ahead(SlotId(0), 0)?, Progress::Done);
//! assert_eq!(stage2.mappings().blocks_2m, 2);
//!
//! while stage2.start_log(stage2.best_engine(), Granularity::Page)? != Progress::Done {}
//!
//! // The guest writes its third page: a permission fault, handled.
//! let write = Fault {
//!     ipa: Ipa::new(0x4000_2000),
//!     access: FaultAccess::Write,
//!     kind: FaultKind::Permission,
//!     va: None,
//! };
//! assert_eq!(stage2.handle_fault(write), Outcome::Dirtied(Level::L3));
//!
//! // The host takes an epoch, reads it, and says it has it.
//! let epoch = Epoch(1);
//! while stage2.take(epoch)? != Progress::Done {}
//! let words = stage2.in_flight(SlotId(0), epoch)?;
//! assert_eq!(words[0].load(core::sync::atomic::Ordering::Relaxed), 0b100);
//! stage2.commit(epoch)?;
//!
//! while stage2.stop_log()? != Progress::Done {}
//! assert_eq!(stage2.mappings().blocks_2m, 2);
//! # Ok(())
//! # }
//! ```
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
