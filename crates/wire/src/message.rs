//! What is said: requests, responses and events, in postcard.
//!
//! Purpose: the host drives. Every request gets exactly one response, with the same number
//! and session. Every request may be sent again when its response is lost, and answering it
//! twice does no more than answering it once; so the target keeps nothing to retransmit.
//!
//! Long work (start and stop of a log, a harvest, a hash, a memory slot) is asked for and then asked about
//! with the very same request: [`Response::Progress`] means "not yet, ask again", the final
//! answer stays the answer until something else changes the state it tells about.
//!
//! Frozen for all versions: `Request::Hello` is variant 0 and begins with the protocol,
//! `Response::Error` is variant 1, `ErrorReply::VersionMismatch` is its variant 0. Ends of
//! different versions can therefore always tell each other so.
//!
//! Invariants: decoding takes untrusted bytes, never panics, and refuses bytes left over;
//! decoding a request allocates nothing. `tests/golden.rs` holds the bytes of each variant.

mod error;
mod types;

pub use error::ErrorReply;
pub use types::{
    ConsoleFrom, Cost, Counters, DirtyStatus, Engine, EngineChoice, Epoch, Extent, Features,
    Granularity, Hold, Logging, Mappings, Quota, SlotAccess, SlotDirty, SlotId, SlotInfo, Stalls,
    TakeReport, Task, VmId, VmInfo, VmState, VmSummary,
};

use crate::PROTOCOL;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize, Serializer};

/// What the host asks. At most [`crate::REQUEST_PAYLOAD_MAX`] bytes encoded.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request<'a> {
    /// Opens the session named in the header. A new session replaces the old one: its epochs
    /// in flight are aborted, its console attachments dropped. The same session again is
    /// answered again and changes nothing.
    Hello {
        /// The host's [`crate::PROTOCOL`].
        protocol: u16,
        /// Longest payload the host takes; the target answers with what it will use.
        max_payload: u16,
    },
    /// Closes the session, as a new `Hello` would; the line is plain text again.
    Goodbye,
    /// All VMs: [`Response::Vms`].
    List,
    /// One VM: [`Response::Info`].
    Info {
        /// Which.
        vm: VmId,
    },
    /// Asks a VM to pause; [`Response::State`] tells how far it is. Ask until `Paused`.
    Pause {
        /// Which.
        vm: VmId,
        /// For whom.
        hold: Hold,
    },
    /// Takes a pause back: [`Response::State`]. The VM runs when nobody holds it any more.
    Resume {
        /// Which.
        vm: VmId,
        /// Whose.
        hold: Hold,
    },
    /// Restarts a VM from its bundle, unless it has restarted since the host looked:
    /// [`Response::State`].
    Reset {
        /// Which.
        vm: VmId,
        /// [`VmInfo::restarts`] as the host saw it; anything else means "already done".
        restarts: u32,
    },
    /// Stops a VM for good: [`Response::State`].
    Stop {
        /// Which.
        vm: VmId,
    },
    /// Powers the machine off. [`Response::Ok`], then silence.
    PowerOff,
    /// SHA-256 of a slot's memory, of a paused VM: [`Response::Progress`] until
    /// [`Response::HashDone`].
    Hash {
        /// Which VM.
        vm: VmId,
        /// Which slot.
        slot: SlotId,
    },
    /// Starts the dirty log: [`Response::Progress`] until [`Response::Ok`]. A log that runs
    /// with what is asked for is `Ok`, any other is [`ErrorReply::AlreadyLogging`]. With `Auto` the
    /// image chooses, and again after each harvest.
    DirtyStart {
        /// Which.
        vm: VmId,
        /// How writes are noticed.
        engine: EngineChoice,
        /// How finely.
        granularity: Granularity,
        /// Whose it is: a session's is stopped at its end. One that runs already stays whose it
        /// was, but for a lasting one being asked for.
        hold: Hold,
    },
    /// Stops the log and puts blocks back: [`Response::Progress`] until [`Response::Ok`].
    /// `Ok` as well when there is no log.
    DirtyStop {
        /// Which.
        vm: VmId,
    },
    /// [`Response::DirtyStatus`].
    DirtyStatus {
        /// Which.
        vm: VmId,
    },
    /// Moves what is dirty into the epoch's in-flight bitmap: [`Response::Progress`] until
    /// [`Response::TakeDone`]. The host chooses any epoch greater than
    /// [`DirtyStatus::last_taken`]; the one outstanding may be asked about again.
    DirtyTake {
        /// Which.
        vm: VmId,
        /// Name of the harvest.
        epoch: Epoch,
    },
    /// Part of the outstanding epoch's bitmap: [`Response::Bitmap`], which covers a prefix of
    /// what was asked for, as much as fits.
    BitmapRead {
        /// Which VM.
        vm: VmId,
        /// Which slot.
        slot: SlotId,
        /// The outstanding epoch.
        epoch: Epoch,
        /// First page, a multiple of 64.
        first_page: u64,
        /// 1 to [`crate::BITMAP_READ_PAGES_MAX`], within the slot.
        pages: u32,
    },
    /// The host has the bitmap and what it stands for: forget it. [`Response::Ok`], also for
    /// the last epoch committed.
    DirtyCommit {
        /// Which VM.
        vm: VmId,
        /// The outstanding epoch.
        epoch: Epoch,
    },
    /// The host could not use the bitmap: put it back. [`Response::Ok`], also for the last
    /// epoch aborted.
    DirtyAbort {
        /// Which VM.
        vm: VmId,
        /// The outstanding epoch.
        epoch: Epoch,
    },
    /// Guest memory: [`Response::Memory`], which covers a prefix, as much as fits.
    ReadMemory {
        /// Which VM.
        vm: VmId,
        /// Where, a multiple of 8.
        ipa: u64,
        /// 8 to [`crate::MEMORY_READ_MAX`] bytes, a multiple of 8, within one slot.
        len: u32,
    },
    /// Sends what the VM prints from now on as [`Event::Console`]. [`Response::ConsoleData`]
    /// without data tells the offset to begin at; what lies before the first event is there
    /// for `ConsoleRead`.
    ConsoleAttach {
        /// Which.
        vm: VmId,
        /// From where.
        from: ConsoleFrom,
    },
    /// Sends it no longer: [`Response::Ok`].
    ConsoleDetach {
        /// Which.
        vm: VmId,
    },
    /// Console output from `offset`, as much as is kept and fits: [`Response::ConsoleData`].
    ConsoleRead {
        /// Which.
        vm: VmId,
        /// Offset in all the VM has ever printed.
        offset: u64,
    },
    /// Console input: [`Response::ConsoleAccepted`].
    ConsoleWrite {
        /// Which.
        vm: VmId,
        /// Offset in this session's input to the VM; what came already is skipped, and a gap
        /// accepts nothing.
        offset: u64,
        /// At most [`crate::CONSOLE_WRITE_MAX`] bytes.
        #[serde(borrow)]
        data: &'a [u8],
    },
    /// Changes how writes are noticed while the log runs: [`Response::Progress`] until
    /// [`Response::Ok`]. Nothing is lost by it, and `Auto` leaves it to the image from now on.
    DirtyEngine {
        /// Which.
        vm: VmId,
        /// How writes are noticed.
        engine: EngineChoice,
    },
    /// What EL2's own work has cost: [`Response::Costs`].
    Costs,
    /// Limits what each vCPU may dirty while a log is on, or lifts that: [`Response::Ok`]. It holds
    /// until it is changed, whatever becomes of the log, the session and the guest.
    DirtyQuota {
        /// Which.
        vm: VmId,
        /// The limit, or none.
        quota: Option<Quota>,
    },
    /// Gives a VM more memory, all zero: [`Response::Progress`] until [`Response::Ok`]. A slot that is there
    /// as asked for is `Ok`. A log that runs has every page of it for dirty at first, and tracks it from then on.
    SlotAdd {
        /// Which VM.
        vm: VmId,
        /// A number from [`crate::HOT_SLOT_FIRST`] to [`crate::HOT_SLOT_LAST`].
        slot: SlotId,
        /// Where the guest is to see it, a multiple of [`crate::HOT_SLOT_UNIT`].
        base_ipa: u64,
        /// A multiple of the same, at most [`crate::HOT_SLOT_BYTES_MAX`].
        bytes: u64,
    },
    /// Takes such memory away, with all that is known of its dirty pages, the outstanding epoch's included:
    /// [`Response::Progress`] until [`Response::Ok`], and then no vCPU reaches it and its content is gone.
    /// `Ok` as well for the slot that was deleted last.
    SlotDelete {
        /// Which VM.
        vm: VmId,
        /// A slot that was added.
        slot: SlotId,
    },
    /// Says how long this session may be silent from here on, and that it is there: [`Response::Ok`]. Any request
    /// says the latter. A session that asked for this, or holds something, is over after a longer silence.
    KeepAlive {
        /// [`crate::PATIENCE_MS_MIN`] to [`crate::PATIENCE_MS_MAX`].
        patience_ms: u32,
    },
    /// The CRC-32C of each page, whether the VM runs or not: [`Response::PageSums`], which covers a prefix. That of a
    /// page which the guest writes meanwhile is of no use, and the next harvest has it.
    PageSums {
        /// Which VM.
        vm: VmId,
        /// Which slot.
        slot: SlotId,
        /// First page.
        first_page: u64,
        /// 1 to [`crate::PAGE_SUMS_MAX`], within the slot.
        pages: u32,
    },
}

/// What the target answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Response<'a> {
    /// Done.
    Ok,
    /// Not done, and why.
    Error(ErrorReply),
    /// The session is open.
    Hello {
        /// The target's [`crate::PROTOCOL`].
        protocol: u16,
        /// Longest payload the target will send in this session.
        max_payload: u16,
        /// Name and version of the image, for people.
        image: &'a str,
    },
    /// All VMs, by id.
    Vms(Vec<VmSummary>),
    /// One VM.
    Info(VmInfo),
    /// How a VM is now.
    State(VmState),
    /// Not done yet: ask the same again. Pages, or entries of the same worth.
    Progress {
        /// Behind us.
        done: u64,
        /// In all.
        total: u64,
    },
    /// The hash of a slot.
    HashDone {
        /// SHA-256 of its memory in address order.
        sha256: [u8; 32],
        /// Pages hashed.
        pages: u64,
    },
    /// The state of a log.
    DirtyStatus(DirtyStatus),
    /// The harvest is complete and in flight.
    TakeDone(TakeReport),
    /// A piece of the in-flight bitmap.
    Bitmap {
        /// As asked.
        first_page: u64,
        /// Pages covered: a multiple of 64 unless it ends what was asked for.
        pages: u32,
        /// See [`crate::bitmap`].
        #[serde(serialize_with = "in_one_piece")]
        encoding: &'a [u8],
    },
    /// A piece of guest memory.
    Memory {
        /// As asked.
        ipa: u64,
        /// Bytes covered, a multiple of 8 and not 0.
        covered: u32,
        /// See [`crate::pages`].
        #[serde(serialize_with = "in_one_piece")]
        encoding: &'a [u8],
    },
    /// Console output.
    ConsoleData {
        /// Offset of the first byte of `data`: the one asked for, or the oldest kept.
        offset: u64,
        /// Offset of the oldest byte the target still has.
        oldest: u64,
        /// What follows, maybe nothing.
        #[serde(serialize_with = "in_one_piece")]
        data: &'a [u8],
    },
    /// Console input taken.
    ConsoleAccepted {
        /// The next offset the target wants.
        next_offset: u64,
    },
    /// What EL2's own work has cost since the machine started.
    Costs {
        /// Ticks in a second.
        frequency: u64,
        /// Every [`Task`], in its order.
        costs: Vec<Cost>,
    },
    /// Checksums of pages.
    PageSums {
        /// As asked.
        first_page: u64,
        /// CRC-32C, four bytes each, little-endian: as many pages as it covers.
        #[serde(serialize_with = "in_one_piece")]
        sums: &'a [u8],
    },
}

/// What the target says unasked, while a session is open. A lost event is recovered by
/// asking (`ConsoleRead`, `Info`); it is never sent again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Event<'a> {
    /// Console output of an attached VM.
    Console {
        /// Whose.
        vm: VmId,
        /// Offset of the first byte in all the VM has ever printed.
        offset: u64,
        /// The bytes.
        #[serde(borrow, serialize_with = "in_one_piece")]
        data: &'a [u8],
    },
    /// The hypervisor's own log.
    Log {
        /// Text.
        data: &'a [u8],
    },
    /// A VM changed its state.
    VmState {
        /// Whose.
        vm: VmId,
        /// The new one.
        state: VmState,
    },
}

/// Bytes of [`Response::Bitmap`], [`Response::Memory`] and [`Response::PageSums`] beside their encoding, at most:
/// variant, `u64`, `u32` and the length, as varints.
pub const PIECE_OVERHEAD: usize = 1 + 10 + 5 + 3;

/// Bytes of [`Response::ConsoleData`] or [`Event::Console`] beside their data, at most.
pub const CONSOLE_OVERHEAD: usize = 1 + 10 + 10 + 3;

/// A message that does not fit the buffer it was to be encoded into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DoesNotFit;

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("message does not fit its buffer")
    }
}

impl core::error::Error for DoesNotFit {}

/// Bytes that are not a message of this version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotAMessage;

impl fmt::Display for NotAMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("payload is not a message of this protocol version")
    }
}

impl core::error::Error for NotAMessage {}

/// Bytes as bytes. The same on the line as a list of them, which is what they are otherwise, one by one.
fn in_one_piece<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

fn encode<'b>(message: &impl Serialize, buffer: &'b mut [u8]) -> Result<&'b [u8], DoesNotFit> {
    postcard::to_slice(message, buffer)
        .map(|used| &*used)
        .map_err(|_| DoesNotFit)
}

fn decode<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, NotAMessage> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        _ => Err(NotAMessage),
    }
}

impl<'a> Request<'a> {
    /// Encodes into `buffer` and returns the part used.
    ///
    /// # Errors
    /// [`DoesNotFit`].
    pub fn encode<'b>(&self, buffer: &'b mut [u8]) -> Result<&'b [u8], DoesNotFit> {
        encode(self, buffer)
    }

    /// Decodes all of `payload`. A `Hello` of another protocol version may have more fields
    /// than this one knows; they are ignored, so that it can be answered.
    ///
    /// # Errors
    /// [`NotAMessage`].
    pub fn decode(payload: &'a [u8]) -> Result<Self, NotAMessage> {
        match postcard::take_from_bytes(payload) {
            Ok((message, [])) => Ok(message),
            Ok((hello @ Self::Hello { protocol, .. }, _)) if protocol != PROTOCOL => Ok(hello),
            _ => Err(NotAMessage),
        }
    }
}

impl Response<'_> {
    /// What comes before the `len` bytes of a piece, if `self` is its message without them: for a message that is
    /// made in parts.
    ///
    /// # Errors
    /// [`DoesNotFit`], also for other messages: they have no head.
    pub fn head<'b>(
        &self,
        len: usize,
        buffer: &'b mut [u8; PIECE_OVERHEAD],
    ) -> Result<&'b [u8], DoesNotFit> {
        match self {
            Self::Bitmap { encoding: [], .. }
            | Self::Memory { encoding: [], .. }
            | Self::PageSums { sums: [], .. } => {}
            _ => return Err(DoesNotFit),
        }
        // The last byte is the length of no bytes.
        let before = self.encode(buffer)?.len() - 1;
        let place = buffer.get_mut(before..).ok_or(DoesNotFit)?;
        let end = before + encode(&len, place)?.len();
        buffer.get(..end).ok_or(DoesNotFit)
    }
}

impl<'a> Response<'a> {
    /// Encodes into `buffer` and returns the part used.
    ///
    /// # Errors
    /// [`DoesNotFit`].
    pub fn encode<'b>(&self, buffer: &'b mut [u8]) -> Result<&'b [u8], DoesNotFit> {
        encode(self, buffer)
    }

    /// Decodes all of `payload`.
    ///
    /// # Errors
    /// [`NotAMessage`].
    pub fn decode(payload: &'a [u8]) -> Result<Self, NotAMessage> {
        decode(payload)
    }
}

impl<'a> Event<'a> {
    /// Encodes into `buffer` and returns the part used.
    ///
    /// # Errors
    /// [`DoesNotFit`].
    pub fn encode<'b>(&self, buffer: &'b mut [u8]) -> Result<&'b [u8], DoesNotFit> {
        encode(self, buffer)
    }

    /// Decodes all of `payload`.
    ///
    /// # Errors
    /// [`NotAMessage`].
    pub fn decode(payload: &'a [u8]) -> Result<Self, NotAMessage> {
        decode(payload)
    }
}
