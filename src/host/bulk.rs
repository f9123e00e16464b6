//! Answers that carry guest memory, sums of its pages, or a bitmap: as long as the session's frames may be, and made in bounded steps.
//!
//! One is made at a time, in three stages: its piece is read, the message is framed, and the frame goes to the line in
//! one go, as soon as there is room. So one is made while the one before it is being sent.
//!
//! What is read at each step is looked up at each step: between two of them a VM may lose its epoch, and a slot its
//! memory. An answer whose session is over is dropped. They leave in the order in which they were asked for, and
//! answers of other kinds may overtake them.
//!
//! Concurrency: whoever holds `BUILDER` takes a step, the job on any CPU or the UART's interrupt; then what reading
//! takes. `PENDING` is a leaf.

use super::SESSION;
use crate::arch::crc::Crc32c;
use crate::arch::lock::{Mutex, rank};
use crate::control::refusal::{refusal, require_cleared};
use crate::mm::PAGE;
use crate::platform::console;
use crate::sched;
use crate::task::job::Step;
use crate::task::meter;
use crate::vm;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use tidemark_stage2 as s2;
use tidemark_wire::frame::{Encoder, Header, Kind, buffer_len};
use tidemark_wire::message::*;
use tidemark_wire::{BITMAP_READ_PAGES_MAX, MEMORY_READ_MAX, PAGE_SUMS_MAX, bitmap, pages};

/// Words of memory read in a step, most of which are zero in most guests and cost three instructions.
const READ_WORDS: usize = 2048;
/// Bytes summed at a time, a divisor of a page.
const SUM_BYTES: usize = 512;
/// Bytes that they may become: a word that is one of few alike costs some fifty.
const READ_BYTES: usize = 2048;
/// Bytes framed in a step, at seventeen instructions each.
const FRAME_STEP: usize = 1024;
/// Longest payload: its frame is put on the line in one go, at three instructions a byte.
pub const PAYLOAD_MAX: usize = 8192;
/// Longest frame, delimiters included.
const FRAME_MAX: usize = buffer_len(PAYLOAD_MAX) + 2;
/// Answers that may be waited for: twice as many as the host tool has in flight.
const WAITING_MAX: usize = 16;
/// Room on the line that is left to events and text.
const LEFT_TO_OTHERS: usize = 4096;

/// What is wanted.
#[derive(Clone, Copy)]
pub enum BulkRequest {
    /// A piece of a bitmap.
    Bitmap {
        /// Which VM's.
        vm: VmId,
        /// Which slot's.
        slot: SlotId,
        /// Of this epoch.
        epoch: Epoch,
        /// The first page.
        first_page: u64,
        /// How many.
        pages: u32,
    },
    /// A piece of memory.
    Memory {
        /// Which VM's.
        vm: VmId,
        /// Where.
        ipa: u64,
        /// Bytes.
        len: u32,
    },
    /// Checksums of pages.
    Sums {
        /// Which VM's.
        vm: VmId,
        /// Which slot's.
        slot: SlotId,
        /// The first page.
        first_page: u64,
        /// How many.
        pages: u32,
    },
}

impl BulkRequest {
    /// What `request` wants, if its answer is of this kind.
    pub fn of(request: &Request<'_>) -> Option<Self> {
        Some(match *request {
            Request::BitmapRead {
                vm,
                slot,
                epoch,
                first_page,
                pages,
            } => Self::Bitmap {
                vm,
                slot,
                epoch,
                first_page,
                pages,
            },
            Request::ReadMemory { vm, ipa, len } => Self::Memory { vm, ipa, len },
            Request::PageSums {
                vm,
                slot,
                first_page,
                pages,
            } => Self::Sums {
                vm,
                slot,
                first_page,
                pages,
            },
            _ => return None,
        })
    }
}

#[derive(Clone, Copy)]
struct Pending {
    /// Which one: a session that begins anew may have the number of an older one, and so its requests.
    number: u64,
    /// The answer's, which names session and request.
    header: Header,
    wanted: BulkRequest,
}

/// What is still to be answered; the first one is being made.
static PENDING: Mutex<VecDeque<Pending>, { rank::PENDING }> = Mutex::new(VecDeque::new());
/// The number of the next that is asked for.
static NUMBER: AtomicU64 = AtomicU64::new(0);
/// Whether there is a job, or one will be submitted when the line has room.
static AT_WORK: AtomicBool = AtomicBool::new(false);
/// How much room on the line is waited for, if any.
static ROOM_AWAITED: AtomicUsize = AtomicUsize::new(0);

/// How far the answer in the making is.
enum Stage {
    /// So much of what was asked for is read: bytes of memory, or pages for their sums.
    Reading { covered: u32 },
    /// So much of `piece` is framed.
    Framing { framed: usize },
    /// `frame` waits for the line.
    Sending,
}

impl Stage {
    const FIRST: Self = Self::Reading { covered: 0 };
}

struct Builder {
    of: Option<u64>,
    stage: Stage,
    piece: Buffer<PAYLOAD_MAX>,
    encoder: Option<Encoder>,
    frame: Buffer<FRAME_MAX>,
}

static BUILDER: Mutex<Builder, { rank::BUILDER }> = Mutex::new(Builder {
    of: None,
    stage: Stage::FIRST,
    piece: Buffer::NEW,
    encoder: None,
    frame: Buffer::NEW,
});

/// Bytes, and room for more. Aligned behind the tag of a bitmap's encoding, whose words are then copied as words.
#[repr(C, align(8))]
struct Buffer<const N: usize> {
    _before: [u8; 7],
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Buffer<N> {
    const NEW: Self = Self {
        _before: [0; 7],
        bytes: [0; N],
        len: 0,
    };

    fn used(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// What is free, as far as the buffer may be filled.
    fn room(&mut self, most: usize) -> &mut [u8] {
        let end = most.min(N);
        self.bytes.get_mut(self.len..end).unwrap_or_default()
    }

    /// Adds bytes; buffers are as large as what goes into them.
    fn push(&mut self, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            place.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }
}

/// Asks for an answer, which will come. `header` is the request's.
///
/// # Errors
/// Busy, when too many wait already.
pub fn ask(header: Header, wanted: BulkRequest) -> Result<(), ErrorReply> {
    let header = Header {
        kind: Kind::Response,
        ..header
    };
    {
        let mut waiting = PENDING.lock();
        waiting.retain(|asked| asked.header.session == header.session);
        // Asked for again because it took so long: it is on its way.
        if waiting.iter().any(|asked| asked.header == header) {
            return Ok(());
        }
        if waiting.len() == WAITING_MAX {
            return Err(ErrorReply::Busy);
        }
        waiting.push_back(Pending {
            number: NUMBER.fetch_add(1, Relaxed),
            header,
            wanted,
        });
    }
    if !AT_WORK.swap(true, AcqRel) {
        sched::submit(Box::new(step));
    }
    Ok(())
}

/// The session is over: nobody waits for its answers.
pub fn forget() {
    PENDING.lock().clear();
}

/// An interrupt of the UART: takes a step, because a CPU that runs a guest comes to a job at its next tick only.
pub fn advance() {
    if !AT_WORK.load(Acquire) {
        return;
    }
    let room = ROOM_AWAITED.load(SeqCst);
    if room > 0 {
        if !console::has_room(room) || ROOM_AWAITED.swap(0, SeqCst) == 0 {
            return;
        }
        sched::submit(Box::new(step));
    }
    if let Some(mut making) = BUILDER.try_lock() {
        making.step();
    }
}

/// The next to be answered, and the longest payload for it. Those that nobody waits for any more are dropped.
fn next() -> Option<(Pending, usize)> {
    let open = *SESSION.lock();
    let mut waiting = PENDING.lock();
    waiting.retain(|asked| open.is_some_and(|open| open.session == asked.header.session));
    waiting
        .front()
        .copied()
        .zip(open.map(|open| open.max_payload))
}

/// What became of a step.
enum StepResult {
    /// It was taken.
    Step,
    /// The frame waits for so much room.
    NoRoom(usize),
    /// Nothing is asked for.
    Nothing,
}

/// The job's step. Only the job ends itself, so there is one at most.
fn step() -> Step {
    let took = BUILDER.lock().step();
    match took {
        StepResult::Step => Step::Again,
        StepResult::NoRoom(room) => {
            // The UART's interrupts go on till there is.
            ROOM_AWAITED.store(room, SeqCst);
            if !console::has_room(room) || ROOM_AWAITED.swap(0, SeqCst) == 0 {
                return Step::Done;
            }
            Step::Again
        }
        StepResult::Nothing => {
            AT_WORK.store(false, SeqCst);
            // Whoever asked before that has submitted no job.
            let more = !PENDING.lock().is_empty() && !AT_WORK.swap(true, SeqCst);
            if more { Step::Again } else { Step::Done }
        }
    }
}

/// What a step of reading came to: the answer, less the piece; none if there is more, and room for it.
type Read = Option<Response<'static>>;

impl Builder {
    fn step(&mut self) -> StepResult {
        let Some((asked, max_payload)) = next() else {
            self.of = None;
            return StepResult::Nothing;
        };
        if self.of != Some(asked.number) {
            self.begin(asked.number);
        }
        match self.stage {
            Stage::Reading { .. } => self.read(asked, max_payload),
            Stage::Framing { .. } => self.frame_some(),
            Stage::Sending => return self.send(),
        }
        StepResult::Step
    }

    fn begin(&mut self, number: u64) {
        self.of = Some(number);
        self.stage = Stage::FIRST;
        self.piece.len = 0;
    }

    fn read(&mut self, asked: Pending, max_payload: usize) {
        let Stage::Reading { covered } = &mut self.stage else {
            return;
        };
        let room = max_payload.saturating_sub(PIECE_OVERHEAD);
        let piece = &mut self.piece;
        let read = match asked.wanted {
            BulkRequest::Bitmap {
                vm,
                slot,
                epoch,
                first_page,
                pages,
            } => meter::metered(Task::BitmapRead, || {
                read_bitmap(vm, slot, epoch, first_page, pages, piece, room)
            }),
            BulkRequest::Memory { vm, ipa, len } => meter::metered(Task::MemoryRead, || {
                read_memory(vm, ipa, len, covered, piece, room)
            }),
            BulkRequest::Sums {
                vm,
                slot,
                first_page,
                pages,
            } => meter::metered(Task::Hash, || {
                sum_page(vm, slot, first_page, pages, covered, piece, room)
            }),
        };
        let mut buffer = [0; PIECE_OVERHEAD];
        let head = match read {
            Ok(None) => return,
            Ok(Some(without)) => without.head(piece.len, &mut buffer),
            Err(error) => {
                piece.len = 0;
                Response::Error(error).encode(&mut buffer)
            }
        };
        // An error is shorter than a head, and either is within its bounds.
        let head = head.unwrap_or_default();
        self.frame.len = 0;
        let mut sink = |part: &[u8]| self.frame.push(part);
        // It is short enough.
        self.encoder = Encoder::begin(&asked.header, head.len() + piece.len, &mut sink).ok();
        if let Some(encoder) = &mut self.encoder {
            encoder.push(head, &mut sink);
        }
        self.stage = Stage::Framing { framed: 0 };
    }

    fn frame_some(&mut self) {
        let (Stage::Framing { framed }, Some(encoder)) = (&mut self.stage, &mut self.encoder)
        else {
            return;
        };
        let mut sink = |part: &[u8]| self.frame.push(part);
        let left = self.piece.used().get(*framed..).unwrap_or_default();
        let part = left.get(..FRAME_STEP).unwrap_or(left);
        encoder.push(part, &mut sink);
        *framed += part.len();
        if part.len() == left.len() {
            if let Some(encoder) = self.encoder.take() {
                encoder.finish(&mut sink);
            }
            self.stage = Stage::Sending;
        }
    }

    fn send(&mut self) -> StepResult {
        let frame = self.frame.used();
        let room = frame.len() + LEFT_TO_OTHERS;
        // Held till the frame is on the line: none comes after the next session's first answer.
        let session = SESSION.lock();
        let first = PENDING.lock().front().copied();
        let open =
            first.filter(|first| session.is_some_and(|open| open.session == first.header.session));
        if open.map(|first| first.number) != self.of {
            self.of = None;
            return StepResult::Step;
        }
        let sent = console::write_if_room(frame, room);
        drop(session);
        if sent.is_err() {
            return StepResult::NoRoom(room);
        }
        let mut waiting = PENDING.lock();
        if waiting.front().map(|asked| asked.number) == self.of {
            waiting.pop_front();
        }
        self.of = None;
        StepResult::Step
    }
}

fn read_bitmap(
    vm: VmId,
    slot: SlotId,
    epoch: Epoch,
    first_page: u64,
    pages: u32,
    piece: &mut Buffer<PAYLOAD_MAX>,
    room: usize,
) -> Result<Read, ErrorReply> {
    let vm = vm::by_id(vm).ok_or(ErrorReply::NoSuchVm)?;
    let slots = vm.memory.slots();
    let of = slots.by_id(slot.0).ok_or(ErrorReply::NoSuchSlot)?;
    if !first_page.is_multiple_of(64) {
        return Err(ErrorReply::NeedsAlignment);
    }
    let left = of
        .pages
        .checked_sub(first_page)
        .ok_or(ErrorReply::OutOfRange)?;
    if pages == 0 || u64::from(pages) > left || pages > BITMAP_READ_PAGES_MAX {
        return Err(ErrorReply::OutOfRange);
    }
    let words = vm
        .memory
        .stage2()
        .in_flight(of.id, s2::Epoch(epoch.0))
        .map_err(refusal)?;
    let first = (first_page / 64) as usize;
    let marked = |word| {
        let run = words.marked(first + word);
        run.start - first..run.end - first
    };
    let read = |word: &AtomicU64| word.load(Relaxed);
    let from = words.get(first..).unwrap_or_default();
    let encoded = bitmap::encode_marked(from, read, marked, pages, piece.room(room))
        .ok_or(ErrorReply::OutOfRange)?;
    piece.len = encoded.len;
    Ok(Some(Response::Bitmap {
        first_page,
        pages: encoded.pages,
        encoding: &[],
    }))
}

/// Reads the next words, and notes how many bytes are `covered` by then.
fn read_memory(
    vm: VmId,
    ipa: u64,
    len: u32,
    covered: &mut u32,
    piece: &mut Buffer<PAYLOAD_MAX>,
    room: usize,
) -> Result<Read, ErrorReply> {
    let vm = vm::by_id(vm).ok_or(ErrorReply::NoSuchVm)?;
    if !ipa.is_multiple_of(8) || !len.is_multiple_of(8) {
        return Err(ErrorReply::NeedsAlignment);
    }
    if len == 0 || len > MEMORY_READ_MAX {
        return Err(ErrorReply::OutOfRange);
    }
    require_cleared(vm)?;
    let at = ipa
        .checked_add(u64::from(*covered))
        .ok_or(ErrorReply::OutOfRange)?;
    let slots = vm.memory.slots();
    let left = slots.left(at).min(((len - *covered) / 8) as usize);
    let wanted = vm
        .memory
        .read(&slots, at, left.min(READ_WORDS))
        .ok_or(ErrorReply::OutOfRange)?;
    let some = room.min(piece.len + READ_BYTES);
    let encoded = pages::encode(wanted, |word| word.load(Relaxed), piece.room(some));
    piece.len += encoded.len;
    *covered += (encoded.words * 8) as u32;
    // An answer ends where its frame is full, or a run of the slot's frames ends: the next may be another slot's.
    if encoded.words < left && room - piece.len >= pages::ROOM_MIN {
        return Ok(None);
    }
    Ok(Some(Response::Memory {
        ipa,
        covered: *covered,
        encoding: &[],
    }))
}

/// Adds the sum of the next page, and notes how many pages are `covered` by then.
fn sum_page(
    vm: VmId,
    slot: SlotId,
    first_page: u64,
    pages: u32,
    covered: &mut u32,
    piece: &mut Buffer<PAYLOAD_MAX>,
    room: usize,
) -> Result<Read, ErrorReply> {
    let vm = vm::by_id(vm).ok_or(ErrorReply::NoSuchVm)?;
    require_cleared(vm)?;
    let slots = vm.memory.slots();
    let of = slots.by_id(slot.0).ok_or(ErrorReply::NoSuchSlot)?;
    let end = first_page
        .checked_add(u64::from(pages))
        .filter(|&end| end <= of.pages);
    if pages == 0 || pages > PAGE_SUMS_MAX || end.is_none() {
        return Err(ErrorReply::OutOfRange);
    }
    let page = first_page + u64::from(*covered);
    let at = of.base + page * PAGE as u64;
    let words = vm
        .memory
        .read(&slots, at, PAGE / 8)
        .ok_or(ErrorReply::OutOfRange)?;
    let mut sum = Crc32c::new();
    for words in words.chunks(SUM_BYTES / 8) {
        let mut bytes = [0; SUM_BYTES];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.load(Relaxed).to_le_bytes());
        }
        sum.update(&bytes);
    }
    piece.push(&sum.finish().to_le_bytes());
    *covered += 1;
    if *covered < pages && piece.len + size_of::<u32>() <= room {
        return Ok(None);
    }
    Ok(Some(Response::PageSums {
        first_page,
        sums: &[],
    }))
}
