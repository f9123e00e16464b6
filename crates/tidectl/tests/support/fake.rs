//! A target without a machine: the wire protocol over a socket, memory and bitmaps in a
//! `Vec`, a guest that writes while it is being asked, and a line that can be made bad.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use sha2::{Digest, Sha256};
use tidemark_wire::frame::{Decoder, Frame, Header, Item, Kind, Seq, Session, buffer_len, encode};
use tidemark_wire::message::{
    ConsoleFrom, Cost, Counters, DirtyStatus, Engine, EngineChoice, Epoch, ErrorReply, Event,
    Extent, Features, Logging, Mappings, PIECE_OVERHEAD, Quota, Request, Response, SlotAccess,
    SlotDirty, SlotId, SlotInfo, Stalls, TakeReport, Task, VmId, VmInfo, VmState, VmSummary,
};
use tidemark_wire::{
    BITMAP_READ_PAGES_MAX, HOT_SLOT_FIRST, MEMORY_READ_MAX, PAGE_SIZE, REQUEST_PAYLOAD_MAX, bitmap,
    pages,
};

const PAGE: usize = PAGE_SIZE as usize;

/// Seeded randomness (xorshift), so that a failing run can be run again.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// How bad the line is, in percent of frames, each way.
#[derive(Clone, Default)]
pub struct Faults {
    pub seed: u64,
    pub drop: u64,
    pub flip: u64,
    pub cut: u64,
    pub double: u64,
    pub text: u64,
    /// Close the line after this many frames sent.
    pub vanish_after: Option<u64>,
    /// Lose just the request of this number.
    pub lose_request: Option<u64>,
    /// Before each answer, send one of a session that is no more.
    pub stale_answers: bool,
}

pub struct Slot {
    pub id: SlotId,
    pub base_ipa: u64,
    pub access: SlotAccess,
    pub memory: Vec<u8>,
    pub live: Vec<u64>,
    pub in_flight: Vec<u64>,
}

impl Slot {
    pub fn new(id: u16, base_ipa: u64, pages: usize, access: SlotAccess) -> Self {
        let words = pages.div_ceil(64);
        let mut memory = vec![0; pages * PAGE];
        // Not all zero, so that a copy that read nothing is seen.
        for (page, chunk) in memory.chunks_mut(PAGE).enumerate().step_by(3) {
            chunk[8] = page as u8 | 1;
        }
        let (live, in_flight) = (vec![0; words], vec![0; words]);
        Self {
            id: SlotId(id),
            base_ipa,
            access,
            memory,
            live,
            in_flight,
        }
    }

    pub fn pages(&self) -> u64 {
        (self.memory.len() / PAGE) as u64
    }
}

pub struct Vm {
    pub name: String,
    pub state: VmState,
    pub slots: Vec<Slot>,
    pub logging: Option<Logging>,
    /// What each vCPU may dirty.
    pub quota: Option<Quota>,
    /// The memory slot that was taken away last.
    pub last_deleted: Option<SlotId>,
    pub outstanding: Option<Epoch>,
    pub last_taken: Epoch,
    pub last_committed: Epoch,
    pub last_aborted: Epoch,
    pub restarts: u32,
    /// Asked to stop, and on its way.
    pub ending: bool,
    pub console: Vec<u8>,
    /// Output before this is no longer kept.
    pub oldest: u64,
    pub attached: bool,
    /// Output already sent as events, or not to be.
    pub sent: usize,
    /// All input ever taken.
    pub typed: Vec<u8>,
    /// Input taken in this session.
    pub input: u64,
    /// Most input taken at once.
    pub takes: usize,
    /// Echo input to the console.
    pub echoes: bool,
    /// Pages written for each request that comes while it runs.
    pub writes: u64,
    /// Every so many writes goes unnoticed: a broken tracker.
    pub misses_every: Option<u64>,
    pub written: u64,
    pub rng: Rng,
    /// Answers of "not yet" before something long is done.
    pub slowness: u64,
    pub slow: u64,
    /// File that is the machine's memory, and the address of its first byte.
    pub ram: Option<(File, u64)>,
}

impl Vm {
    pub fn new(name: &str, slots: Vec<Slot>) -> Self {
        Self {
            name: name.into(),
            state: VmState::Running,
            slots,
            logging: None,
            quota: None,
            last_deleted: None,
            outstanding: None,
            last_taken: Epoch(0),
            last_committed: Epoch(0),
            last_aborted: Epoch(0),
            restarts: 0,
            ending: false,
            console: Vec::new(),
            oldest: 0,
            attached: false,
            sent: 0,
            typed: Vec::new(),
            input: 0,
            takes: 16,
            echoes: true,
            writes: 3,
            misses_every: None,
            written: 0,
            rng: Rng::new(7),
            slowness: 2,
            slow: 0,
            ram: None,
        }
    }

    /// Physical address of a slot, when the machine's memory is a file.
    pub fn pa(&self, slot: &Slot) -> u64 {
        let before: usize = self
            .slots
            .iter()
            .take_while(|s| s.id != slot.id)
            .map(|s| s.memory.len())
            .sum();
        self.ram.as_ref().map_or(0, |(_, base)| *base) + before as u64
    }

    /// Puts all memory into `file`, which is the machine's memory from then on.
    pub fn back_by(&mut self, path: &Path, base: u64) {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .expect("a temporary file");
        self.ram = Some((file, base));
        for slot in &self.slots {
            let (file, base) = self.ram.as_ref().expect("just set");
            file.write_all_at(&slot.memory, self.pa(slot) - base)
                .expect("a temporary file");
        }
    }

    /// The guest writes a page somewhere.
    pub fn write_somewhere(&mut self) {
        let writable: Vec<usize> = (0..self.slots.len())
            .filter(|&i| self.slots[i].access == SlotAccess::ReadWrite)
            .collect();
        let pick = self.rng.below(writable.len() as u64) as usize;
        let Some(&index) = writable.get(pick) else {
            return;
        };
        let page = self.rng.below(self.slots[index].pages());
        // Edges matter most.
        let page = match self.rng.below(8) {
            0 => 0,
            1 => self.slots[index].pages() - 1,
            _ => page,
        };
        let value = self.rng.next();
        self.write(index, page, value);
    }

    /// Writes a word into a page, or, now and then, wipes the page.
    pub fn write(&mut self, slot: usize, page: u64, value: u64) {
        self.written += 1;
        let missed = self
            .misses_every
            .is_some_and(|every| self.written.is_multiple_of(every));
        let slot = &mut self.slots[slot];
        let start = page as usize * PAGE;
        if value.is_multiple_of(4) {
            slot.memory[start..start + PAGE].fill(0);
        } else {
            let at = start + (value % 512) as usize * 8;
            slot.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if self.logging.is_some() && !missed {
            slot.live[page as usize / 64] |= 1 << (page % 64);
        }
        let id = slot.id;
        if let Some((file, base)) = &self.ram {
            let slot = self.slots.iter().find(|s| s.id == id).expect("it is there");
            let place = self.pa(slot) - base + start as u64;
            let content = &slot.memory[start..start + PAGE];
            file.write_all_at(content, place).expect("a temporary file");
        }
    }

    pub fn print(&mut self, text: &[u8]) {
        self.console.extend_from_slice(text);
    }

    fn give_back(&mut self) {
        if let Some(epoch) = self.outstanding.take() {
            self.last_aborted = epoch;
            for slot in &mut self.slots {
                for (live, taken) in slot.live.iter_mut().zip(&mut slot.in_flight) {
                    *live |= std::mem::take(taken);
                }
            }
        }
    }

    pub fn dirty(&self) -> u64 {
        let count = |words: &[u64]| words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        self.slots.iter().map(|s| count(&s.live)).sum()
    }

    fn summary(&self, id: VmId) -> VmSummary {
        let memory_bytes = self.slots.iter().map(|s| s.memory.len() as u64).sum();
        VmSummary {
            id,
            name: self.name.clone(),
            state: self.state,
            vcpus: 2,
            memory_bytes,
        }
    }

    /// Says "not yet" a few times, so that asking again is tested.
    fn not_yet(&mut self) -> bool {
        self.slow += 1;
        if self.slow <= self.slowness {
            return true;
        }
        self.slow = 0;
        false
    }
}

/// A lie told once, to see whether it is believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    WrongCount,
    NoMemory,
    TooMuchMemory,
    WrongPiece,
    WrongKind,
    Garbage,
}

pub struct Target {
    pub vms: Vec<Vm>,
    pub session: Option<Session>,
    pub protocol: u16,
    pub max_payload: u16,
    pub lie: Option<Lie>,
    /// Never answer.
    pub mute: bool,
    /// Requests seen, by name.
    pub requests: Vec<String>,
    pub frames_sent: u64,
    events: u16,
    line: Vec<u8>,
}

impl Target {
    pub fn new(vms: Vec<Vm>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            vms,
            session: None,
            protocol: tidemark_wire::PROTOCOL,
            max_payload: 16384,
            lie: None,
            mute: false,
            requests: Vec::new(),
            frames_sent: 0,
            events: 0,
            line: Vec::new(),
        }))
    }

    fn close_session(&mut self) {
        self.session = None;
        for vm in &mut self.vms {
            vm.give_back();
            vm.attached = false;
            vm.input = 0;
        }
    }

    fn text(&mut self, byte: u8) -> Vec<u8> {
        if byte != b'\n' && byte != b'\r' {
            self.line.push(byte);
            return Vec::new();
        }
        match std::mem::take(&mut self.line).as_slice() {
            b"" => Vec::new(),
            b"help" => b"commands: help, list\r\n> ".to_vec(),
            other => format!("{}?\r\n> ", String::from_utf8_lossy(other)).into_bytes(),
        }
    }

    /// Answers a frame; returns the payloads to send, the answer last.
    fn frame(&mut self, frame: &Frame<'_>) -> Vec<(Header, Vec<u8>)> {
        let mut out = Vec::new();
        if frame.header.kind != Kind::Request || self.mute {
            return out;
        }
        let request = Request::decode(frame.payload);
        let name = format!("{request:?}");
        self.requests.push(
            name.split([' ', '(', '{'])
                .take(2)
                .collect::<Vec<_>>()
                .join(" "),
        );
        for vm in &mut self.vms {
            if vm.state == VmState::Running {
                (0..vm.writes).for_each(|_| vm.write_somewhere());
            }
        }
        let mut buffer = vec![0; 20000];
        let room = usize::from(self.max_payload) - PIECE_OVERHEAD;
        let mut piece = vec![0; room];
        let response = match request {
            Ok(request) => self.answer(frame.header.session, &request, &mut piece),
            Err(_) => Response::Error(ErrorReply::Malformed),
        };
        let garbage = self.lie == Some(Lie::Garbage)
            && matches!(response, Response::Vms(_) | Response::Bitmap { .. });
        let payload = match garbage {
            true => vec![0xFF; 9],
            false => response.encode(&mut buffer).expect("it fits").to_vec(),
        };
        assert!(
            payload.len() <= usize::from(self.max_payload).max(512),
            "{}",
            payload.len()
        );
        out.extend(self.take_events());
        let Header { seq, session, .. } = frame.header;
        out.push((
            Header {
                kind: Kind::Response,
                seq,
                session,
            },
            payload,
        ));
        out
    }

    /// Console output not sent yet, as events.
    pub fn take_events(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut out = Vec::new();
        let Some(session) = self.session else {
            return out;
        };
        for (id, vm) in self.vms.iter_mut().enumerate() {
            let from = vm.sent;
            vm.sent = vm.console.len();
            if !vm.attached {
                continue;
            }
            for (n, data) in vm.console[from..].chunks(200).enumerate() {
                let (vm, offset) = (VmId(id as u16), (from + n * 200) as u64);
                let mut buffer = [0; 512];
                let event = Event::Console { vm, offset, data };
                let payload = event.encode(&mut buffer).expect("it fits").to_vec();
                self.events = self.events.wrapping_add(1);
                out.push((
                    Header {
                        kind: Kind::Event,
                        seq: Seq(self.events),
                        session,
                    },
                    payload,
                ));
            }
        }
        out
    }

    fn answer<'b>(
        &mut self,
        session: Session,
        request: &Request<'_>,
        piece: &'b mut [u8],
    ) -> Response<'b> {
        if let Request::Hello {
            protocol,
            max_payload,
        } = *request
        {
            if protocol != self.protocol {
                return Response::Error(ErrorReply::VersionMismatch {
                    target: self.protocol,
                });
            }
            if self.session != Some(session) {
                self.close_session();
                self.session = Some(session);
            }
            self.max_payload = self.max_payload.min(max_payload);
            let (protocol, max_payload) = (self.protocol, self.max_payload);
            return Response::Hello {
                protocol,
                max_payload,
                image: "fake 1",
            };
        }
        if self.session != Some(session) {
            return Response::Error(ErrorReply::StaleSession);
        }
        match self.answer_in_session(request, piece) {
            Ok(response) => response,
            Err(error) => Response::Error(error),
        }
    }

    fn answer_in_session<'b>(
        &mut self,
        request: &Request<'_>,
        piece: &'b mut [u8],
    ) -> Result<Response<'b>, ErrorReply> {
        let lie = self.lie;
        if lie == Some(Lie::WrongKind) {
            return Ok(Response::ConsoleAccepted { next_offset: 0 });
        }
        match *request {
            Request::Hello { .. } => Err(ErrorReply::Malformed),
            Request::Goodbye => {
                self.close_session();
                Ok(Response::Ok)
            }
            Request::List => {
                let vms = self.vms.iter().enumerate();
                Ok(Response::Vms(
                    vms.map(|(id, vm)| vm.summary(VmId(id as u16))).collect(),
                ))
            }
            Request::PowerOff => Ok(Response::Ok),
            Request::Info { vm: id } => {
                let vm = self.vm(id)?;
                if vm.ending && !vm.not_yet() {
                    vm.state = VmState::Stopped;
                }
                Ok(Response::Info(info(vm, id)))
            }
            Request::Pause { vm } => {
                let vm = self.vm(vm)?;
                if vm.state == VmState::Running && !vm.not_yet() {
                    vm.state = VmState::Paused;
                }
                Ok(Response::State(vm.state))
            }
            Request::Resume { vm } => {
                let vm = self.vm(vm)?;
                match vm.state {
                    VmState::Paused | VmState::Running => vm.state = VmState::Running,
                    state => return Err(ErrorReply::BadState(state)),
                }
                Ok(Response::State(vm.state))
            }
            Request::Reset { vm, restarts } => {
                let vm = self.vm(vm)?;
                if vm.restarts == restarts {
                    vm.restarts += 1;
                    vm.state = VmState::Running;
                }
                Ok(Response::State(vm.state))
            }
            Request::Stop { vm } => {
                let vm = self.vm(vm)?;
                vm.ending = true;
                Ok(Response::State(vm.state))
            }
            Request::Hash { vm, slot } => {
                let vm = self.vm(vm)?;
                if vm.state != VmState::Paused {
                    return Err(ErrorReply::NotPaused);
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                let slot = vm
                    .slots
                    .iter()
                    .find(|s| s.id == slot)
                    .ok_or(ErrorReply::NoSuchSlot)?;
                let sha256 = Sha256::digest(&slot.memory).into();
                Ok(Response::HashDone {
                    sha256,
                    pages: slot.pages(),
                })
            }
            Request::ConsoleAttach { vm, from } => {
                let vm = self.vm(vm)?;
                vm.attached = true;
                vm.sent = vm.console.len();
                let oldest = vm.oldest;
                let offset = match from {
                    ConsoleFrom::Now => vm.console.len() as u64,
                    ConsoleFrom::Oldest => oldest,
                };
                Ok(Response::ConsoleData {
                    offset,
                    oldest,
                    data: &[],
                })
            }
            Request::ConsoleDetach { vm } => {
                self.vm(vm)?.attached = false;
                Ok(Response::Ok)
            }
            Request::ConsoleRead { vm, offset } => {
                let vm = self.vm(vm)?;
                let offset = offset.max(vm.oldest);
                let rest = vm.console.get(offset as usize..).unwrap_or(&[]);
                let len = rest.len().min(100);
                piece[..len].copy_from_slice(&rest[..len]);
                let data = &piece[..len];
                Ok(Response::ConsoleData {
                    offset,
                    oldest: vm.oldest,
                    data,
                })
            }
            Request::Costs => Ok(Response::Costs {
                frequency: 1_000_000_000,
                costs: vec![Cost {
                    task: Task::Stretch,
                    times: 3,
                    ticks: 60_000,
                    longest: 25_500,
                }],
            }),
            Request::ConsoleWrite { vm, offset, data } => {
                let vm = self.vm(vm)?;
                let known = vm.input.checked_sub(offset);
                if let Some(fresh) = known.and_then(|known| data.get(known as usize..)) {
                    let fresh = fresh[..fresh.len().min(vm.takes)].to_vec();
                    vm.input += fresh.len() as u64;
                    vm.typed.extend(&fresh);
                    if vm.echoes {
                        vm.print(&fresh);
                    }
                }
                Ok(Response::ConsoleAccepted {
                    next_offset: vm.input,
                })
            }
            Request::ReadMemory { vm, ipa, len } => {
                if len == 0 || len > MEMORY_READ_MAX || len % 8 != 0 || ipa % 8 != 0 {
                    return Err(ErrorReply::NeedsAlignment);
                }
                let vm = self.vm(vm)?;
                let slot = vm
                    .slots
                    .iter()
                    .find(|s| ipa >= s.base_ipa && ipa < s.base_ipa + s.memory.len() as u64)
                    .ok_or(ErrorReply::OutOfRange)?;
                let start = (ipa - slot.base_ipa) as usize;
                let bytes = slot
                    .memory
                    .get(start..start + len as usize)
                    .ok_or(ErrorReply::OutOfRange)?;
                let words = bytes.as_chunks::<8>().0;
                let done = pages::encode(words, |word| u64::from_le_bytes(*word), piece);
                let covered = match lie {
                    Some(Lie::NoMemory) => 0,
                    Some(Lie::TooMuchMemory) => len + 8,
                    _ => done.words as u32 * 8,
                };
                Ok(Response::Memory {
                    ipa,
                    covered,
                    encoding: &piece[..done.len],
                })
            }
            ref dirty => self.answer_dirty(dirty, piece),
        }
    }

    fn answer_dirty<'b>(
        &mut self,
        request: &Request<'_>,
        piece: &'b mut [u8],
    ) -> Result<Response<'b>, ErrorReply> {
        let lie = self.lie;
        match *request {
            Request::DirtyStart {
                vm,
                engine,
                granularity,
            } => {
                let vm = self.vm(vm)?;
                let engine = match engine {
                    EngineChoice::WriteProtect => Engine::WriteProtect,
                    EngineChoice::Dbm | EngineChoice::Auto => Engine::Dbm,
                };
                let wanted = Logging {
                    engine,
                    granularity,
                };
                match vm.logging {
                    Some(now) if now == wanted => return Ok(Response::Ok),
                    Some(_) => return Err(ErrorReply::AlreadyLogging),
                    None => {}
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                vm.logging = Some(wanted);
                Ok(Response::Ok)
            }
            Request::DirtyEngine { vm, engine } => {
                let vm = self.vm(vm)?;
                let Some(logging) = &mut vm.logging else {
                    return Err(ErrorReply::NotLogging);
                };
                match engine {
                    EngineChoice::WriteProtect => logging.engine = Engine::WriteProtect,
                    EngineChoice::Dbm => logging.engine = Engine::Dbm,
                    EngineChoice::Auto => {}
                }
                Ok(Response::Ok)
            }
            Request::DirtyStop { vm } => {
                let vm = self.vm(vm)?;
                if let Some(epoch) = vm.outstanding {
                    return Err(ErrorReply::EpochOutstanding { epoch });
                }
                if vm.logging.is_some() && vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                vm.logging = None;
                vm.slots.iter_mut().for_each(|s| s.live.fill(0));
                Ok(Response::Ok)
            }
            Request::DirtyStatus { vm } => {
                let vm = self.vm(vm)?;
                Ok(Response::DirtyStatus(DirtyStatus {
                    logging: vm.logging,
                    outstanding: vm.outstanding,
                    last_taken: vm.last_taken,
                    last_committed: vm.last_committed,
                    live_pages_hint: vm.dirty(),
                    write_faults: vm.written,
                    splits: 0,
                    harvests: vm.last_taken.0,
                    entries_read: 0,
                    quota: vm.quota,
                    stalls: vm.quota.map_or(Stalls::default(), |_| Stalls {
                        count: 3,
                        time_us: 270_000,
                        percent: 90,
                    }),
                }))
            }
            Request::DirtyQuota { vm, quota } => {
                let bad =
                    |quota: &Quota| quota.pages == 0 || !(10..=1000).contains(&quota.interval_ms);
                if quota.as_ref().is_some_and(bad) {
                    return Err(ErrorReply::BadQuota);
                }
                self.vm(vm)?.quota = quota;
                Ok(Response::Ok)
            }
            Request::SlotAdd {
                vm,
                slot,
                base_ipa,
                bytes,
            } => {
                let vm = self.vm(vm)?;
                let end = base_ipa + bytes;
                for other in &vm.slots {
                    let same = other.base_ipa == base_ipa && other.pages() * PAGE_SIZE == bytes;
                    match (other.id == slot, same) {
                        (true, true) => return Ok(Response::Ok),
                        (true, false) => return Err(ErrorReply::SlotExists),
                        _ => {}
                    }
                    let other_end = other.base_ipa + other.pages() * PAGE_SIZE;
                    if other.base_ipa < end && base_ipa < other_end {
                        return Err(ErrorReply::SlotOverlap { slot: other.id });
                    }
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                let pages = (bytes / PAGE_SIZE) as usize;
                let mut new = Slot::new(slot.0, base_ipa, pages, SlotAccess::ReadWrite);
                new.memory.fill(0);
                vm.slots.push(new);
                Ok(Response::Ok)
            }
            Request::SlotDelete { vm, slot } => {
                let vm = self.vm(vm)?;
                if slot.0 < HOT_SLOT_FIRST {
                    return Err(ErrorReply::SlotNumber);
                }
                if vm.slots.iter().all(|other| other.id != slot) {
                    return match vm.last_deleted == Some(slot) {
                        true => Ok(Response::Ok),
                        false => Err(ErrorReply::NoSuchSlot),
                    };
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                vm.slots.retain(|other| other.id != slot);
                vm.last_deleted = Some(slot);
                Ok(Response::Ok)
            }
            Request::DirtyTake { vm, epoch } => {
                let vm = self.vm(vm)?;
                if vm.logging.is_none() {
                    return Err(ErrorReply::NotLogging);
                }
                match vm.outstanding {
                    Some(now) if now == epoch => {}
                    Some(now) => return Err(ErrorReply::EpochOutstanding { epoch: now }),
                    None if epoch <= vm.last_taken => {
                        return Err(ErrorReply::NoSuchEpoch { outstanding: None });
                    }
                    None => {
                        vm.outstanding = Some(epoch);
                        vm.last_taken = epoch;
                        vm.slow = 0;
                        for slot in &mut vm.slots {
                            slot.in_flight =
                                std::mem::replace(&mut slot.live, vec![0; slot.in_flight.len()]);
                        }
                    }
                }
                if vm.slow < vm.slowness {
                    vm.slow += 1;
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                let slots: Vec<SlotDirty> = vm
                    .slots
                    .iter()
                    .filter(|s| s.access == SlotAccess::ReadWrite)
                    .map(|s| SlotDirty {
                        slot: s.id,
                        base_ipa: s.base_ipa,
                        pages: s.pages(),
                        dirty_pages: s.in_flight.iter().map(|w| u64::from(w.count_ones())).sum(),
                    })
                    .collect();
                let mut report = TakeReport {
                    epoch,
                    dirty_pages: slots.iter().map(|s| s.dirty_pages).sum(),
                    slots,
                };
                if lie == Some(Lie::WrongCount) {
                    report.slots[0].dirty_pages += 1;
                }
                Ok(Response::TakeDone(report))
            }
            Request::BitmapRead {
                vm,
                slot,
                epoch,
                first_page,
                pages,
            } => {
                let vm = self.vm(vm)?;
                if vm.outstanding != Some(epoch) {
                    return Err(ErrorReply::NoSuchEpoch {
                        outstanding: vm.outstanding,
                    });
                }
                let slot = vm
                    .slots
                    .iter()
                    .find(|s| s.id == slot)
                    .ok_or(ErrorReply::NoSuchSlot)?;
                let end = first_page
                    .checked_add(u64::from(pages))
                    .ok_or(ErrorReply::OutOfRange)?;
                if pages == 0 || pages > BITMAP_READ_PAGES_MAX || end > slot.pages() {
                    return Err(ErrorReply::OutOfRange);
                }
                if first_page % 64 != 0 {
                    return Err(ErrorReply::NeedsAlignment);
                }
                let base = (first_page / 64) as usize;
                let done = bitmap::encode(&slot.in_flight[base..], |word| *word, pages, piece)
                    .expect("a word fits");
                let first_page = match lie {
                    Some(Lie::WrongPiece) => first_page + 64,
                    _ => first_page,
                };
                Ok(Response::Bitmap {
                    first_page,
                    pages: done.pages,
                    encoding: &piece[..done.len],
                })
            }
            Request::DirtyCommit { vm, epoch } => {
                let vm = self.vm(vm)?;
                if vm.outstanding == Some(epoch) {
                    vm.outstanding = None;
                    vm.last_committed = epoch;
                    vm.slots.iter_mut().for_each(|s| s.in_flight.fill(0));
                } else if vm.last_committed != epoch {
                    return Err(ErrorReply::NoSuchEpoch {
                        outstanding: vm.outstanding,
                    });
                }
                Ok(Response::Ok)
            }
            Request::DirtyAbort { vm, epoch } => {
                let vm = self.vm(vm)?;
                if vm.outstanding == Some(epoch) {
                    vm.give_back();
                } else if vm.last_aborted != epoch {
                    return Err(ErrorReply::NoSuchEpoch {
                        outstanding: vm.outstanding,
                    });
                }
                Ok(Response::Ok)
            }
            _ => Err(ErrorReply::Malformed),
        }
    }

    fn vm(&mut self, id: VmId) -> Result<&mut Vm, ErrorReply> {
        self.vms
            .get_mut(usize::from(id.0))
            .ok_or(ErrorReply::NoSuchVm)
    }
}

fn info(vm: &Vm, id: VmId) -> VmInfo {
    let slots = vm
        .slots
        .iter()
        .map(|slot| SlotInfo {
            id: slot.id,
            base_ipa: slot.base_ipa,
            pages: slot.pages(),
            access: slot.access,
            // In two pieces, as memory may be.
            extents: match slot.pages() / 2 {
                0 => vec![Extent {
                    ipa: slot.base_ipa,
                    pa: vm.pa(slot),
                    pages: slot.pages(),
                }],
                half => vec![
                    Extent {
                        ipa: slot.base_ipa,
                        pa: vm.pa(slot),
                        pages: half,
                    },
                    Extent {
                        ipa: slot.base_ipa + half * PAGE_SIZE,
                        pa: vm.pa(slot) + half * PAGE_SIZE,
                        pages: slot.pages() - half,
                    },
                ],
            },
            more_extents: 0,
        })
        .collect();
    VmInfo {
        summary: vm.summary(id),
        reason: String::new(),
        restarts: vm.restarts,
        slots,
        features: Features {
            hafdbs: 2,
            dbm_usable: true,
            cpus: 2,
            ipa_bits: 40,
            ..Features::default()
        },
        mappings: Mappings {
            blocks_1g: 0,
            blocks_2m: 8,
            pages_4k: 512,
        },
        counters: Counters {
            exits: 1000,
            ..Counters::default()
        },
    }
}

/// Serves one connection until it ends.
pub fn serve(target: &Mutex<Target>, mut stream: UnixStream, faults: &Faults) {
    let mut decoder = Decoder::<{ buffer_len(REQUEST_PAYLOAD_MAX) }>::new();
    let mut rng = Rng::new(faults.seed);
    let mut buffer = [0; 4096];
    let (mut sent, mut heard) = (0, 0);
    loop {
        let Ok(got @ 1..) = stream.read(&mut buffer) else {
            return;
        };
        for &byte in &buffer[..got] {
            let replies = match decoder.push(byte) {
                Some(Item::Frame(frame)) => {
                    heard += 1;
                    if faults.lose_request == Some(heard) {
                        continue;
                    }
                    // The way to the target is bad too.
                    if rng.percent(faults.drop + faults.flip) {
                        continue;
                    }
                    let mut replies = lock(target).frame(&frame);
                    if rng.percent(faults.double) {
                        replies.extend(lock(target).frame(&frame));
                    }
                    replies
                }
                Some(Item::Text(byte)) => {
                    let text = lock(target).text(byte);
                    if stream.write_all(&text).is_err() {
                        return;
                    }
                    continue;
                }
                Some(Item::Bad(_)) | None => continue,
            };
            for (header, payload) in replies {
                if faults.vanish_after.is_some_and(|after| sent >= after) {
                    return;
                }
                sent += 1;
                lock(target).frames_sent += 1;
                let mut bytes = Vec::new();
                if faults.stale_answers {
                    let session = Session(!header.session.0);
                    let stale = Header { session, ..header };
                    let refusal = Response::Error(ErrorReply::NoSuchVm);
                    let mut buffer = [0; 8];
                    let payload = refusal.encode(&mut buffer).expect("it fits");
                    encode(&stale, payload, &mut |part: &[u8]| {
                        bytes.extend_from_slice(part)
                    })
                    .expect("it fits");
                }
                encode(&header, &payload, &mut |part: &[u8]| {
                    bytes.extend_from_slice(part)
                })
                .expect("it fits");
                if stream.write_all(&worsen(bytes, &mut rng, faults)).is_err() {
                    return;
                }
            }
        }
    }
}

/// What a bad line makes of a frame.
fn worsen(mut bytes: Vec<u8>, rng: &mut Rng, faults: &Faults) -> Vec<u8> {
    if rng.percent(faults.drop) {
        return Vec::new();
    }
    if rng.percent(faults.flip) {
        let at = rng.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << rng.below(8);
    }
    if rng.percent(faults.cut) {
        bytes.truncate(rng.below(bytes.len() as u64) as usize);
    }
    if rng.percent(faults.text) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        bytes.splice(at..at, b"[   12.3] EL2 says hello\r\n".iter().copied());
    }
    if rng.percent(faults.double) {
        bytes.extend(bytes.clone());
    }
    bytes
}

pub fn lock(target: &Mutex<Target>) -> MutexGuard<'_, Target> {
    target.lock().expect("the target's thread did not panic")
}

/// Connects to a target of its own thread.
pub fn connect(target: &Arc<Mutex<Target>>, faults: Faults) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let target = Arc::clone(target);
    thread::spawn(move || serve(&target, theirs, &faults));
    ours
}

/// Serves one connection after the other at a socket, as QEMU does. The socket's name is
/// short whatever the target directory is, as it must be.
pub fn listen(target: &Arc<Mutex<Target>>, name: &str, faults: Faults) -> Socket {
    let path = std::env::temp_dir().join(format!("tidectl-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let target = Arc::clone(target);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            serve(&target, stream, &faults);
        }
    });
    Socket(path)
}

/// A socket's name, removed with the test that made it.
pub struct Socket(pub PathBuf);

impl Socket {
    pub fn port(&self) -> String {
        format!("unix:{}", self.0.display())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A fresh directory among what the build made.
pub fn temp_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tidectl-{name}"));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
