//! Why a request was refused.

use super::types::{Epoch, VmState};
use crate::{PROTOCOL, QUOTA_INTERVAL_MS_MAX, QUOTA_INTERVAL_MS_MIN};
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
    /// The request's session is not the open one.
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
                "another program has opened a session since; close it, then run this again",
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
        }
    }
}

impl core::error::Error for ErrorReply {}
