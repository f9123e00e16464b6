//! What can go wrong, as an exit code, a code for programs, a sentence and the way out.
//!
//! | exit | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something on this machine (a file, a manifest) |
//! | 2 | usage |
//! | 3 | link: cannot open it, it closed, nobody answers |
//! | 4 | protocol: another version, or an answer that makes no sense |
//! | 5 | the target refused, or there is no such VM |
//! | 6 | did not finish in time, or did not converge |
//! | 7 | verification mismatch |
//! | 8 | cancelled |
//! | 130 | interrupted (Ctrl-C) |

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error as ThisError;
use tidemark_wire::PROTOCOL;
use tidemark_wire::bundle::BundleError;
use tidemark_wire::message::ErrorReply;

/// A failure.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The command line does not make sense.
    #[error("{0}")]
    Usage(String),
    /// A file on this machine.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Standard output or the terminal.
    #[error("{what}: {source}")]
    Local {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The description of guests, or another input file, is wrong.
    #[error("{}: {problem}", path.display())]
    Input {
        /// Which file.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// The bundle would be refused by the image.
    #[error("{0}")]
    Bundle(#[from] BundleError),
    /// The port cannot be opened.
    #[error("cannot open {port}: {source}")]
    Open {
        /// Which.
        port: String,
        /// Why.
        source: io::Error,
    },
    /// The other end closed the line.
    #[error("the line was closed by the other end while {during}")]
    Closed {
        /// What was being done.
        during: String,
    },
    /// The line is open, but nobody answers.
    #[error("no answer within {} while {during}{}", crate::units::duration(*after), damage(*.damaged))]
    NoAnswer {
        /// How long it was waited for.
        after: Duration,
        /// Frames that came damaged meanwhile.
        damaged: u64,
        /// What was being done.
        during: String,
    },
    /// The target speaks another protocol.
    #[error("the target speaks protocol {target}, this tool {PROTOCOL}")]
    Version {
        /// The target's.
        target: u16,
    },
    /// An answer that makes no sense.
    #[error("unexpected answer while {during}: {problem}")]
    Protocol {
        /// What was being done.
        during: String,
        /// What was wrong.
        problem: String,
    },
    /// The target refused.
    #[error("refused while {during}: {reply}")]
    Target {
        /// What was being done.
        during: String,
        /// Why.
        reply: ErrorReply,
    },
    /// No VM by that name or id.
    #[error("{}", no_such_vm(.asked))]
    NoSuchVm {
        /// What was asked for.
        asked: String,
        /// What there is.
        known: Vec<String>,
    },
    /// A VM that cannot be waited for any more.
    #[error("VM {vm:?} is {state}{}", if reason.is_empty() { String::new() } else { format!(": {reason}") })]
    VmGone {
        /// Which.
        vm: String,
        /// How it is.
        state: String,
        /// Why, as the target says.
        reason: String,
    },
    /// It took too long.
    #[error("not done within {}: {what}", crate::units::duration(*after))]
    TooSlow {
        /// What.
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The copy is not what the guest has.
    #[error("verification failed: {0}")]
    Mismatch(String),
    /// Somebody called it off.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Wraps a failure with `path`.
    pub fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { path, source }
    }

    /// Wraps a failure of standard output.
    pub fn stdout(source: io::Error) -> Self {
        Self::Local {
            what: "standard output",
            source,
        }
    }

    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::File { .. } | Self::Local { .. } | Self::Input { .. } | Self::Bundle(_) => 1,
            Self::Usage(_) => 2,
            Self::Open { .. } | Self::Closed { .. } | Self::NoAnswer { .. } => 3,
            Self::Version { .. } | Self::Protocol { .. } => 4,
            Self::Target { .. } | Self::NoSuchVm { .. } | Self::VmGone { .. } => 5,
            Self::TooSlow { .. } => 6,
            Self::Mismatch(_) => 7,
            Self::Cancelled(_) => 8,
            Self::Interrupted => 130,
        }
    }

    /// A short name for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::File { .. } => "file",
            Self::Local { .. } => "local-io",
            Self::Input { .. } => "bad-input",
            Self::Bundle(_) => "bad-bundle",
            Self::Open { .. } => "cannot-open-port",
            Self::Closed { .. } => "line-closed",
            Self::NoAnswer { .. } => "no-answer",
            Self::Version { .. } => "version-mismatch",
            Self::Protocol { .. } => "protocol",
            Self::Target { reply, .. } => match reply {
                ErrorReply::VersionMismatch { .. } => "version-mismatch",
                ErrorReply::StaleSession => "stale-session",
                ErrorReply::Malformed => "malformed",
                ErrorReply::NoSuchVm => "no-such-vm",
                ErrorReply::NoSuchSlot => "no-such-slot",
                ErrorReply::NotLogging => "not-logging",
                ErrorReply::AlreadyLogging => "already-logging",
                ErrorReply::EpochOutstanding { .. } => "epoch-outstanding",
                ErrorReply::NoSuchEpoch { .. } => "no-such-epoch",
                ErrorReply::NotPaused => "not-paused",
                ErrorReply::BadState(_) => "bad-state",
                ErrorReply::OutOfRange => "out-of-range",
                ErrorReply::OutOfMemory => "out-of-memory",
                ErrorReply::EngineUnavailable => "engine-unavailable",
                ErrorReply::NeedsAlignment => "needs-alignment",
                ErrorReply::Busy => "busy",
                ErrorReply::BadQuota => "bad-quota",
                ErrorReply::SlotNumber => "slot-number",
                ErrorReply::SlotExists => "slot-exists",
                ErrorReply::SlotOverlap { .. } => "slot-overlap",
                ErrorReply::SlotPlace { .. } => "slot-place",
                ErrorReply::SlotSize => "slot-size",
                ErrorReply::NotEnoughMemory { .. } => "not-enough-memory",
            },
            Self::NoSuchVm { .. } => "no-such-vm",
            Self::VmGone { .. } => "vm-gone",
            Self::TooSlow { .. } => "too-slow",
            Self::Mismatch(_) => "mismatch",
            Self::Cancelled(_) => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }

    /// The way out, where the sentence does not say it already.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Usage(_) => "`tidectl help` shows how".into(),
            Self::Open { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "you may not open it; serial ports often belong to the group dialout".into()
            }
            Self::Open { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused => {
                "nobody listens there; is the machine up?".into()
            }
            Self::Open { .. } => {
                "--port takes unix:PATH, tcp:HOST:PORT or a serial device, with @BAUD if you like"
                    .into()
            }
            Self::Closed { .. } => {
                "an epoch in flight is put back when the next session opens; nothing is lost".into()
            }
            Self::NoAnswer { damaged: 1.., .. } => DAMAGED.into(),
            Self::NoAnswer { .. } => "is another program attached to the line, or is the image \
                                      not up yet? `tidectl shell` shows what it prints"
                .into(),
            Self::Version { .. } => "use the tidectl that was built with the image".into(),
            Self::Protocol { .. } => {
                "this should not happen between matching versions; please report it".into()
            }
            Self::NoSuchVm { known, .. } if known.is_empty() => {
                "the target has no VMs; is there a bundle?".into()
            }
            Self::NoSuchVm { known, .. } => format!("there is: {}", known.join(", ")),
            Self::VmGone { .. } => {
                "`tidectl info` tells why it ended, `tidectl reset` starts it again".into()
            }
            Self::TooSlow { .. } => {
                "--timeout, or --deadline where there is one, gives it longer".into()
            }
            Self::Mismatch(_) => {
                "the copy must not be used; this is a bug, please report it".into()
            }
            _ => return None,
        };
        Some(hint)
    }
}

/// The way out of a line that damages what it carries.
pub const DAMAGED: &str = "the line damages what it carries: a slower one (--port DEVICE@BAUD, and the same at the \
    other end), a shorter or better cable, no software flow control on the way";

fn damage(frames: u64) -> String {
    match frames {
        0 => String::new(),
        frames => format!("; {frames} frames came damaged meanwhile"),
    }
}

fn no_such_vm(asked: &str) -> String {
    match asked {
        "" => "there is more than one VM: name one".into(),
        asked => format!("no such VM: {asked:?}"),
    }
}
