//! A target without a machine: the wire protocol over a socket (`line`, which can be made bad), guests that write
//! while they are being asked (`vm`), their memory slots (`slot`) and logs (`dirty`), and here the session and all
//! other requests.

#![allow(dead_code, reason = "each test binary uses a part of it")]

mod dirty;
pub mod line;
mod rng;
mod slot;
pub mod vm;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use sha2::{Digest, Sha256};
use tidemark_wire::checksum::crc32c;
use tidemark_wire::frame::{Frame, Header, Kind, Seq, Session};
use tidemark_wire::message::{
    ConsoleFrom, Cost, ErrorReply, Event, PIECE_OVERHEAD, Request, Response, Task, VmId, VmState,
};
use tidemark_wire::{MEMORY_READ_MAX, PAGE_SIZE, PAGE_SUMS_MAX, pages};

use vm::Vm;

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
    /// How long the session may be silent, if it said so, and how often it did.
    pub patience_ms: Option<u32>,
    pub kept_alive: u64,
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
            patience_ms: None,
            kept_alive: 0,
            events: 0,
            line: Vec::new(),
        }))
    }

    fn close_session(&mut self) {
        self.session = None;
        for vm in &mut self.vms {
            vm.give_back();
            vm.session_over();
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

    /// Changes of state and console output not sent yet, as events.
    pub fn take_events(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut out = Vec::new();
        let Some(session) = self.session else {
            return out;
        };
        for (id, vm) in self.vms.iter_mut().enumerate() {
            if std::mem::replace(&mut vm.told, vm.state) != vm.state {
                let (vm, state) = (VmId(id as u16), vm.state);
                let mut buffer = [0; 512];
                let event = Event::VmState { vm, state };
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
                Ok(Response::Info(vm::info(vm, id)))
            }
            Request::KeepAlive { patience_ms } => {
                self.patience_ms = Some(patience_ms);
                self.kept_alive += 1;
                Ok(Response::Ok)
            }
            Request::Pause { vm, hold } => {
                let vm = self.vm(vm)?;
                if vm.state == VmState::Running && !vm.not_yet() {
                    vm.pause();
                }
                vm.holds.insert(hold as u8);
                Ok(Response::State(vm.state))
            }
            Request::Resume { vm, hold } => {
                let vm = self.vm(vm)?;
                vm.resume(hold).map_err(ErrorReply::BadState)?;
                Ok(Response::State(vm.state))
            }
            Request::Reset { vm, restarts } => {
                let vm = self.vm(vm)?;
                if vm.restarts == restarts && vm.state != VmState::Starting {
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
                if !matches!(vm.state, VmState::Paused | VmState::Stopped) {
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
                    if vm.stops_at.is_some_and(|text| vm.typed.ends_with(text)) {
                        vm.print(b"power down\n");
                        vm.sent = vm.console.len();
                        vm.state = VmState::Stopped;
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
            Request::PageSums {
                vm,
                slot,
                first_page,
                pages,
            } => {
                let vm = self.vm(vm)?;
                let slot = vm
                    .slots
                    .iter()
                    .find(|s| s.id == slot)
                    .ok_or(ErrorReply::NoSuchSlot)?;
                let end = first_page + u64::from(pages);
                if pages == 0 || pages > PAGE_SUMS_MAX || end > slot.pages() {
                    return Err(ErrorReply::OutOfRange);
                }
                let bytes = &slot.memory[(first_page * PAGE_SIZE) as usize..];
                let fits = (pages as usize).min(piece.len() / 4);
                for (page, sum) in bytes
                    .chunks(PAGE_SIZE as usize)
                    .zip(piece.chunks_exact_mut(4))
                    .take(fits)
                {
                    sum.copy_from_slice(&crc32c(page).to_le_bytes());
                }
                Ok(Response::PageSums {
                    first_page,
                    sums: &piece[..fits * 4],
                })
            }
            ref slot @ (Request::SlotAdd { .. } | Request::SlotDelete { .. }) => {
                self.answer_slot(slot)
            }
            ref dirty => self.answer_dirty(dirty, piece),
        }
    }

    fn vm(&mut self, id: VmId) -> Result<&mut Vm, ErrorReply> {
        self.vms
            .get_mut(usize::from(id.0))
            .ok_or(ErrorReply::NoSuchVm)
    }
}

pub fn lock(target: &Mutex<Target>) -> MutexGuard<'_, Target> {
    target.lock().expect("the target's thread did not panic")
}

/// A fresh directory among what the build made.
pub fn temp_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tidectl-{name}"));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
