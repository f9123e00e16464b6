//! Why something cannot be done to a VM.

use crate::vm::Vm;
use core::sync::atomic::Ordering::Acquire;
use tidemark_sched::State;
use tidemark_stage2::Error;
use tidemark_wire::message::{Epoch, ErrorReply, VmState};

/// What the host is told of stage 2's refusals.
pub fn refusal(error: Error) -> ErrorReply {
    match error {
        Error::NotLogging => ErrorReply::NotLogging,
        Error::AlreadyLogging => ErrorReply::AlreadyLogging,
        Error::Busy | Error::TakeUnfinished(_) | Error::SlotDying(_) => ErrorReply::Busy,
        Error::EngineUnavailable => ErrorReply::EngineUnavailable,
        Error::EpochOutstanding(epoch) => ErrorReply::EpochOutstanding {
            epoch: Epoch(epoch.0),
        },
        Error::NoSuchEpoch { outstanding, .. } => ErrorReply::NoSuchEpoch {
            outstanding: outstanding.map(|epoch| Epoch(epoch.0)),
        },
        Error::StaleEpoch { .. } => ErrorReply::NoSuchEpoch { outstanding: None },
        Error::PageRange { .. } => ErrorReply::NeedsAlignment,
        Error::NoSuchSlot(_) => ErrorReply::NoSuchSlot,
        Error::OutOfTables | Error::OutOfMemory => ErrorReply::OutOfMemory,
        _ => ErrorReply::OutOfRange,
    }
}

/// A VM that was never started has no memory to look at yet: what is in its frames is their
/// last owner's.
pub fn require_cleared(vm: &Vm) -> Result<(), ErrorReply> {
    if vm.cleared.load(Acquire) {
        return Ok(());
    }
    Err(bad_state(vm.status().state))
}

/// The state that a VM is in does not allow it.
pub fn bad_state(state: State) -> ErrorReply {
    ErrorReply::BadState(told(state))
}

/// A VM's state, as the host is told it.
pub fn told(state: State) -> VmState {
    match state {
        State::Stopped => VmState::Stopped,
        State::Starting => VmState::Starting,
        State::Running => VmState::Running,
        State::Paused => VmState::Paused,
        State::Failed => VmState::Failed,
    }
}
