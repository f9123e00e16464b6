//! What calls to firmware (HVC, SMC) answer with.

/// Return codes (DEN 0022, 5.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    /// Done.
    Success = 0,
    /// The function is not known.
    NotSupported = -1,
    /// An argument is wrong.
    InvalidParameters = -2,
    /// The state does not allow it.
    Denied = -3,
    /// The CPU is on.
    AlreadyOn = -4,
    /// The CPU is about to be on.
    OnPending = -5,
    /// It failed inside.
    InternalFailure = -6,
    /// The entry point is not memory the guest can run from.
    InvalidAddress = -9,
}

impl Status {
    /// Gives the value of x0: sign-extended, so that it is right read as w0 and as x0.
    pub const fn register(self) -> u64 {
        self as i32 as i64 as u64
    }
}
