//! Stage-2 translation tables and the dirty log of one VM.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "fake"))]
extern crate std;

mod collapse;
mod config;
mod control;
mod dirty;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod fault;
mod hardware;
mod harvest;
mod map;
mod protect;
mod pte;
mod slot;
mod split;
mod stage2;
#[cfg(test)]
mod tests;
mod tlb;
mod types;
mod unmap;
mod walk;

pub use control::{LogStage, LogStatus};
pub use error::Error;
pub use fault::{Fault, FaultAccess, FaultKind, Outcome};
pub use hardware::{Features, Hardware, Support, Table};
pub use harvest::{SlotDirty, Words};
pub use map::Translation;
pub use slot::{LogMode, SlotInfo};
pub use stage2::{Counters, Mappings, Stage2};
pub use tlb::{IpaOperand, RangeOperand};
pub use types::{
    Access, Engine, Epoch, Extent, Gfn, Granularity, GuestVa, Ipa, Level, PAGE_SIZE, Pa, Progress,
    SlotId, Vmid, VmidWidth,
};
