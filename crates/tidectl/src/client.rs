//! A session with a target.
//!
//! Purpose: requests with retries and several in flight (`exchange`), the console and
//! the log pulled out of the same line, and typed calls for everything a target can do.
//!
//! Invariants:
//! - A request is sent again, unchanged, after a silence of [`Options::retry`], or at once when
//!   the answer to a later one shows that its own was lost. All requests are idempotent.
//! - Nothing waits for ever: a target that answers nothing for [`Options::timeout`] is
//!   [`Error::NoAnswer`], a closed line [`Error::Closed`], Ctrl-C [`Error::Interrupted`].
//! - Dropping a client says goodbye, which aborts an epoch in flight and gives back what the session
//!   holds; if that is lost, the next session's `Hello` does it, or the target once it has heard nothing
//!   for [`Options::patience`].
//! - While it holds something, the target hears of it all the time, whatever its owner is busy with.
//!
//! Concurrency: a reader thread decodes, a writer thread writes (so that a target that does
//! not read cannot block the clock), the client itself belongs to one thread.

mod console;
mod exchange;
mod threads;
mod vm;

pub use threads::{After, ClientGone, Injector};
pub use vm::Ending;

use crate::link::{Closer, Link, Pace};
use crate::{Error, Result};
use console::Consoles;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;
use threads::{Incoming, Outgoing};
use tidemark_wire::PROTOCOL;
use tidemark_wire::frame::{BadReason, Seq, Session};
use tidemark_wire::message::{Request, Response, VmId, VmState};

/// How long a target that has stopped answering is waited for from then on.
const SILENT_PATIENCE: Duration = Duration::from_millis(500);

/// How a session is held.
#[derive(Clone, Debug)]
pub struct Options {
    /// Silence after which the target counts as gone.
    pub timeout: Duration,
    /// Silence after which this end counts as gone for the target, which then takes back what the session holds.
    pub patience: Duration,
    /// Silence after which a request is sent again.
    pub retry: Duration,
    /// Requests in flight.
    pub window: usize,
    /// Longest payload to ask for.
    pub max_payload: u16,
    /// Set from outside to end whatever is being done.
    pub interrupt: Arc<AtomicBool>,
}

impl Options {
    /// What suits a line.
    #[must_use]
    pub fn for_pace(pace: Pace) -> Self {
        Self {
            timeout: Duration::from_secs(10),
            patience: Duration::from_millis(u64::from(tidemark_wire::PATIENCE_MS)),
            retry: pace.retry(),
            window: pace.window(),
            max_payload: pace.max_payload(),
            interrupt: Arc::default(),
        }
    }
}

/// What the target says beside answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output<'a> {
    /// Text outside frames, a piece of it, and what stood before that.
    Text(After, &'a [u8]),
    /// What is readable of a broken frame: a crash that was written into the middle of one, or what the frame carried.
    Wreck(&'a [u8]),
    /// Console output of an attached VM, in order and without gaps.
    Console {
        /// Whose.
        vm: VmId,
        /// Offset of the first byte in all it has ever printed.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Console output that the target no longer has.
    Missed {
        /// Whose.
        vm: VmId,
        /// How much.
        bytes: u64,
    },
    /// The hypervisor's log.
    Log(&'a [u8]),
    /// A VM changed its state.
    VmState {
        /// Whose.
        vm: VmId,
        /// The new one.
        state: VmState,
    },
    /// A frame that was refused.
    BadFrame(BadReason),
    /// What [`Injector::send`] was given.
    Injected(&'a [u8]),
    /// [`Injector::end`] was called.
    InjectedEnd,
}

/// Where a client's outputs go.
pub type Sink = Box<dyn FnMut(Output<'_>) + Send>;

/// What a session has cost so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Answers and events that arrived whole.
    pub frames: u64,
    /// Frames that did not.
    pub bad_frames: u64,
    /// Requests sent again.
    pub retransmits: u64,
    /// Payload bytes received.
    pub payload_bytes: u64,
}

/// A session with a target.
pub struct Client {
    incoming: Receiver<Incoming>,
    injector: Injector,
    outgoing: Option<Sender<Outgoing>>,
    beat: Beat,
    session: Session,
    seq: Seq,
    options: Options,
    heed: Heed,
    max_payload: usize,
    image: String,
    consoles: Consoles,
    sink: Sink,
    stats: Stats,
    line: Line,
    // Last, so that the line ends only after the goodbye has been handed over.
    _closer: Closer,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    /// No session yet.
    Fresh,
    Open,
    /// The target stopped answering: it is still asked to put things back, but not waited
    /// for as long each time.
    Silent,
    Closed,
}

/// Whether the target is told all the time that this end is there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beat {
    /// The session holds nothing.
    None,
    Going,
}

/// Whether the interrupt flag ends what is being done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Heed {
    Interrupt,
    /// While something is being put back.
    Nothing,
}

impl Client {
    /// Opens a session over `link`, with outputs dropped.
    ///
    /// # Errors
    /// When nobody answers, or somebody of another version does.
    pub fn open(link: Link, options: Options) -> Result<Self> {
        Self::open_with(link, options, Box::new(|_| {}))
    }

    /// Opens a session over `link`, with outputs given to `sink`.
    ///
    /// # Errors
    /// When nobody answers, or somebody of another version does.
    pub fn open_with(link: Link, options: Options, sink: Sink) -> Result<Self> {
        let Link {
            reader,
            writer,
            closer,
            pace: _,
        } = link;
        let threads = threads::start(reader, writer).map_err(|source| Error::Local {
            what: "starting a thread",
            source,
        })?;
        let mut client = Self {
            incoming: threads.incoming,
            injector: threads.injector,
            outgoing: Some(threads.outgoing),
            beat: Beat::None,
            session: random_session(),
            seq: Seq(0),
            max_payload: tidemark_wire::RESPONSE_PAYLOAD_MIN,
            options,
            heed: Heed::Interrupt,
            image: String::new(),
            consoles: Consoles::default(),
            sink,
            stats: Stats::default(),
            line: Line::Fresh,
            _closer: closer,
        };
        client.hello()?;
        Ok(client)
    }

    fn hello(&mut self) -> Result<()> {
        let max_payload = self.options.max_payload;
        let request = Request::Hello {
            protocol: PROTOCOL,
            max_payload,
        };
        let (protocol, max_payload, image) =
            self.call("opening a session", &request, |response| match response {
                Response::Hello {
                    protocol,
                    max_payload,
                    image,
                } => Some((protocol, max_payload, image.to_string())),
                _ => None,
            })?;
        if protocol != PROTOCOL {
            return Err(Error::Version { target: protocol });
        }
        self.max_payload = usize::from(max_payload);
        self.image = image;
        self.line = Line::Open;
        Ok(())
    }

    /// Name and version of the image at the other end.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// This session's number.
    #[must_use]
    pub fn session(&self) -> Session {
        self.session
    }

    /// What this session has cost so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Gives outputs to `sink` from here on.
    pub fn set_sink(&mut self, sink: Sink) {
        self.sink = sink;
    }

    /// A handle by which other threads put input into [`Client::poll`]'s stream of outputs.
    #[must_use]
    pub fn injector(&self) -> Injector {
        self.injector.clone()
    }

    /// Ends the session, waiting briefly for the target to confirm.
    pub fn close(mut self) {
        self.goodbye(Duration::from_secs(2));
    }

    /// Silence after which the target counts as gone.
    fn patience(&self) -> Duration {
        match self.line {
            Line::Silent => self.options.timeout.min(SILENT_PATIENCE),
            _ => self.options.timeout,
        }
    }

    fn goodbye(&mut self, patience: Duration) {
        if self.line != Line::Open {
            return;
        }
        self.heed = Heed::Nothing;
        self.options.timeout = patience;
        self.options.retry = self.options.retry.min(patience / 2);
        // After the goodbye it would be a frame on a line of text.
        let _ = self.outgoing.as_ref().map(|out| out.send(Outgoing::NoBeat));
        // Best effort: the next session's hello has the same effect.
        let _ = self.call(
            "closing the session",
            &Request::Goodbye,
            |response| match response {
                Response::Ok => Some(()),
                _ => None,
            },
        );
        self.line = Line::Closed;
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.goodbye(Duration::from_millis(500));
        self.outgoing = None;
    }
}

/// Any number but 0; the hasher's seed is the standard library's source of randomness.
fn random_session() -> Session {
    let bits = RandomState::new().build_hasher().finish();
    Session((bits ^ bits >> 16 ^ bits >> 32 ^ bits >> 48) as u16 | 1)
}
