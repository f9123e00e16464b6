//! What can go wrong, with what it was about and the way out.
//!
//! Errors are for the caller inside the hypervisor. What a guest sees of its own fault is a different
//! type, [`Outcome`](crate::Outcome).

use crate::types::{Epoch, Extent, Gfn, Ipa, SlotId};
use core::fmt;

/// Why an operation was refused. Nothing was changed unless the text says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// The IPA size is outside 32..=48, or larger than the machine's physical addresses.
    IpaBits {
        /// What was asked for.
        asked: u8,
        /// The most the machine has.
        most: u8,
    },
    /// The physical address size is none the architecture has.
    PaBits(u8),
    /// No memory for translation tables.
    OutOfTables,
    /// No memory for a bitmap or a list.
    OutOfMemory,
    /// No slot of that name.
    NoSuchSlot(SlotId),
    /// The name is taken.
    SlotExists(SlotId),
    /// The slot would share pages with this one.
    SlotOverlap(SlotId),
    /// The slot is empty, or its end is not below the end of the IPA space.
    SlotRange {
        /// First frame.
        base: Gfn,
        /// Pages.
        pages: u64,
    },
    /// An extent is empty, unaligned, or outside the machine's physical addresses.
    ExtentRange(Extent),
    /// The extents do not add up to the slot.
    ExtentTotal {
        /// Pages of the slot.
        slot: u64,
        /// Pages of the extents.
        extents: u64,
    },
    /// The slot is being deleted.
    SlotDying(SlotId),
    /// Pages are asked for by 64, as a word of a bitmap holds them, within the slot.
    PageRange {
        /// The slot.
        slot: SlotId,
        /// The first page asked for.
        first: u64,
        /// How many.
        pages: u64,
    },
    /// The address range touches something that is no slot. What is in slots was marked.
    NotMemory(Ipa),
    /// No log is running.
    NotLogging,
    /// A log is already running, or being started differently.
    AlreadyLogging,
    /// A start or stop is under way; call it until it is done.
    Busy,
    /// The engine needs hardware dirty state and this machine has none to trust.
    EngineUnavailable,
    /// An epoch is with the host. Commit or abort it first.
    EpochOutstanding(Epoch),
    /// That epoch is not the outstanding one.
    NoSuchEpoch {
        /// What was asked for.
        asked: Epoch,
        /// What is outstanding.
        outstanding: Option<Epoch>,
    },
    /// Epochs only grow: this one is not above the last that was settled.
    StaleEpoch {
        /// What was asked for.
        asked: Epoch,
        /// The last one committed or aborted.
        last: Epoch,
    },
    /// The epoch's harvest has not finished; go on calling take.
    TakeUnfinished(Epoch),
    /// The CPUs could hold too many of the VMIDs at once.
    TooManyCpus {
        /// What was asked for.
        asked: usize,
        /// The most that VMIDs of this width are enough for.
        most: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::IpaBits { asked, most } => {
                write!(
                    f,
                    "{asked}-bit guest addresses are not possible; ask for 32 to {most}"
                )
            }
            Error::PaBits(bits) => write!(
                f,
                "no Arm machine has {bits}-bit physical addresses; pass what PARange says (32, 36, 40, 42, 44, 48 or 52)"
            ),
            Error::OutOfTables => f.write_str(
                "no memory left for translation tables; give the hypervisor more or shrink a guest",
            ),
            Error::OutOfMemory => {
                f.write_str("no memory left for a dirty bitmap; give the hypervisor a larger heap")
            }
            Error::NoSuchSlot(slot) => write!(f, "there is no memory slot {slot}; list the slots"),
            Error::SlotExists(slot) => write!(
                f,
                "memory slot {slot} exists; delete it first or take another number"
            ),
            Error::SlotOverlap(slot) => write!(
                f,
                "the range overlaps memory slot {slot}; choose another base"
            ),
            Error::SlotRange { base, pages } => write!(
                f,
                "a slot of {pages} pages at {} is empty or passes the end of the guest's address space",
                base.ipa()
            ),
            Error::ExtentRange(extent) => write!(
                f,
                "an extent of {} pages at {} is empty, not page-aligned, or outside the machine's addresses",
                extent.pages, extent.pa
            ),
            Error::ExtentTotal { slot, extents } => {
                write!(
                    f,
                    "the slot has {slot} pages and its extents have {extents}; they must be equal"
                )
            }
            Error::SlotDying(slot) => {
                write!(f, "memory slot {slot} is being deleted; finish that first")
            }
            Error::PageRange { slot, first, pages } => write!(
                f,
                "{pages} pages from page {first} of slot {slot} cannot be asked for: begin at a multiple of 64 and \
                 ask for a multiple of 64, or to the end of the slot"
            ),
            Error::NotMemory(ipa) => write!(f, "{ipa} is in no memory slot"),
            Error::NotLogging => f.write_str("dirty logging is off; start it first"),
            Error::AlreadyLogging => {
                f.write_str("dirty logging is already on; stop it to change how it works")
            }
            Error::Busy => {
                f.write_str("a start or stop of the log is under way; repeat it until it is done")
            }
            Error::EngineUnavailable => f.write_str(
                "this machine has no hardware dirty state to trust; use the write-protect engine",
            ),
            Error::EpochOutstanding(epoch) => {
                write!(f, "epoch {epoch} is outstanding; commit or abort it first")
            }
            Error::NoSuchEpoch {
                asked,
                outstanding: Some(epoch),
            } => {
                write!(f, "epoch {asked} is not outstanding, epoch {epoch} is")
            }
            Error::NoSuchEpoch {
                asked,
                outstanding: None,
            } => {
                write!(
                    f,
                    "epoch {asked} is not outstanding, none is; take one first"
                )
            }
            Error::StaleEpoch { asked, last } => {
                write!(
                    f,
                    "epoch {asked} is not above {last}, the last one settled; take a larger one"
                )
            }
            Error::TakeUnfinished(epoch) => write!(
                f,
                "the harvest of epoch {epoch} has not finished; repeat the take"
            ),
            Error::TooManyCpus { asked, most } => write!(
                f,
                "this machine's VMIDs are enough for {most} CPUs, not for {asked}; leave the others off"
            ),
        }
    }
}

impl core::error::Error for Error {}
