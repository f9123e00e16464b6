//! Why a request was refused.

use super::types::{Epoch, SlotId, VmState};
use crate::{
    HOT_SLOT_BYTES_MAX, HOT_SLOT_FIRST, HOT_SLOT_LAST, HOT_SLOT_UNIT, PROTOCOL,
    QUOTA_INTERVAL_MS_MAX, QUOTA_INTERVAL_MS_MIN,
};
use core::fmt;
use serde::{Deserialize, Serialize};

/// Why a request was refused. Its text says what is wrong and the way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ErrorReply {
    /// The host speaks another protocol version.
    VersionMismatch {
        /// The target's.
        target: u16,
    },
    /// The request's session is not the open one: it held something and was silent for too long, or another replaced
    /// it. The target does not remember which.
    StaleSession,
    /// The payload is no request, or one with impossible values.
    Malformed,
    /// No VM has that id.
    NoSuchVm,
    /// The VM has no such slot.
    NoSuchSlot,
    /// The VM's log is not running.
    NotLogging,
    /// The VM's log runs with another engine or granularity.
    AlreadyLogging,
    /// Another epoch is neither committed nor aborted.
    EpochOutstanding {
        /// That one.
        epoch: Epoch,
    },
    /// The epoch is not the outstanding one, or not a new one.
    NoSuchEpoch {
        /// The outstanding one.
        outstanding: Option<Epoch>,
    },
    /// The VM must be paused for this.
    NotPaused,
    /// The VM's state does not allow this.
    BadState(VmState),
    /// Outside the VM's memory or the slot's pages.
    OutOfRange,
    /// EL2 has no memory left for this.
    OutOfMemory,
    /// This machine cannot do what was asked for (DBM on a CPU without it, or with an erratum).
    EngineUnavailable,
    /// An address, length or page number is not a multiple of what it must be.
    NeedsAlignment,
    /// Something else long is being done for this VM.
    Busy,
    /// A quota without a page, or of an interval that is too short or too long.
    BadQuota,
    /// Not a number of a slot that can be added and deleted.
    SlotNumber,
    /// The VM has a slot of that number, and it is another one.
    SlotExists,
    /// The addresses are in part another slot's.
    SlotOverlap {
        /// That one.
        slot: SlotId,
    },
    /// Memory cannot be there.
    SlotPlace {
        /// The first address where it can.
        first: u64,
        /// The first address behind those.
        end: u64,
    },
    /// Base or size is no multiple of [`HOT_SLOT_UNIT`], or the size is 0 or above [`HOT_SLOT_BYTES_MAX`].
    SlotSize,
    /// The machine has not so much memory left for a slot and its tables.
    NotEnoughMemory {
        /// What it has.
        free_bytes: u64,
    },
}

impl fmt::Display for ErrorReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VersionMismatch { target } => write!(
                f,
                "the target speaks protocol {target}, this tool {PROTOCOL}; \
                 use the tool that was built with the image"
            ),
            Self::StaleSession => f.write_str(
                "the session is over: nothing was heard of this program for its --timeout, or another program has \
                 opened one; give it longer or close the other, then run this again",
            ),
            Self::Malformed => f.write_str(
                "the target could not read the request; use the tool that was built with the image",
            ),
            Self::NoSuchVm => f.write_str("no such VM; `tidectl list` names them"),
            Self::NoSuchSlot => {
                f.write_str("the VM has no such memory slot; `tidectl info` names them")
            }
            Self::NotLogging => {
                f.write_str("the VM's dirty log is not running; `tidectl dirty start` starts it")
            }
            Self::AlreadyLogging => {
                f.write_str("the dirty log runs with other settings; `tidectl dirty stop` it first")
            }
            Self::EpochOutstanding { epoch } => {
                write!(f, "epoch {epoch} is outstanding; commit or abort it first")
            }
            Self::NoSuchEpoch {
                outstanding: Some(epoch),
            } => {
                write!(f, "that is not the outstanding epoch, which is {epoch}")
            }
            Self::NoSuchEpoch { outstanding: None } => {
                f.write_str("no epoch is outstanding; take one first, with a greater number")
            }
            Self::NotPaused => f.write_str("the VM must be paused for this; `tidectl pause` it"),
            Self::BadState(state) => {
                write!(
                    f,
                    "the VM is {state}, which does not allow this; `tidectl info` tells why"
                )
            }
            Self::OutOfRange => {
                f.write_str("outside the VM's memory; `tidectl info` shows the slots")
            }
            Self::OutOfMemory => f.write_str(
                "the hypervisor has no memory left for this; stop a VM or leave it more memory",
            ),
            Self::EngineUnavailable => f.write_str(
                "this machine's CPUs cannot do that; `--engine auto` picks what they can",
            ),
            Self::NeedsAlignment => {
                f.write_str("address, length or page number not aligned as the request demands")
            }
            Self::Busy => f.write_str("the VM is busy with something else; try again shortly"),
            Self::BadQuota => write!(
                f,
                "a quota is at least one page, in {QUOTA_INTERVAL_MS_MIN} to {QUOTA_INTERVAL_MS_MAX} ms"
            ),
            Self::SlotNumber => write!(
                f,
                "slots {HOT_SLOT_FIRST} to {HOT_SLOT_LAST} can be added and deleted; those below are what the \
                 VM was started with"
            ),
            Self::SlotExists => f.write_str(
                "the VM has another slot of that number; delete it first, or take another number",
            ),
            Self::SlotOverlap { slot } => write!(
                f,
                "slot {slot} has some of these addresses; `tidectl info` shows which are taken"
            ),
            Self::SlotPlace { first, end } => write!(
                f,
                "memory can be from {first:#x} to below {end:#x}; below are firmware and devices, and above is \
                 nothing that the VM can address"
            ),
            Self::SlotSize => write!(
                f,
                "a slot begins at a multiple of {} MiB and is as large, up to {} MiB; for more, add several",
                HOT_SLOT_UNIT >> 20,
                HOT_SLOT_BYTES_MAX >> 20
            ),
            Self::NotEnoughMemory { free_bytes } => write!(
                f,
                "the machine has {} MiB left, which is not enough for the slot and its tables in pieces of {} MiB; \
                 ask for less, or delete a slot",
                free_bytes >> 20,
                HOT_SLOT_UNIT >> 20
            ),
        }
    }
}

impl core::error::Error for ErrorReply {}
