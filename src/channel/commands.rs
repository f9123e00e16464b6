//! Requests of the host, carried out. Each is idempotent; long ones are jobs, and asking
//! again tells how far they are.

use super::{Open, SESSION, send};
use crate::arch::timer;
use crate::console;
use crate::sched::{self, meter};
use crate::vm::work::{self, Work};
use crate::vm::{self, Vm, Wish, lifecycle, stage2, throttle};
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use log::info;
use spin::Mutex;
use tidemark_stage2 as s2;
use tidemark_wire::bitmap;
use tidemark_wire::frame::{Header, Kind, Session};
use tidemark_wire::message::*;
use tidemark_wire::pages;
use tidemark_wire::{BITMAP_READ_PAGES_MAX, MEMORY_READ_MAX, PROTOCOL, RESPONSE_PAYLOAD_MIN};

/// The version that HELLO is answered with.
const IMAGE: &str = concat!("tidemark ", env!("CARGO_PKG_VERSION"));

/// Longest payload of an answer. A byte of it may cost some thirty instructions, and nothing is looked at meanwhile;
/// so this bounds a request, and whoever wants more asks again.
const ANSWER_MAX: usize = RESPONSE_PAYLOAD_MIN;
/// Most of a guest's memory that an answer covers, in words: a run of zeros is two bytes long, and is read.
const ANSWER_WORDS: usize = 4096;
/// Most bytes of an encoding in an answer: they are made, and then framed.
const PIECE_MAX: usize = 640;
/// Most pages of a bitmap that an answer covers.
const ANSWER_PAGES: u32 = 16384;

/// Room for an answer: the piece of a bulk answer, and the message around it.
struct Scratch {
    piece: [u8; ANSWER_MAX],
    payload: [u8; ANSWER_MAX],
}

static SCRATCH: Mutex<Scratch> = Mutex::new(Scratch {
    piece: [0; ANSWER_MAX],
    payload: [0; ANSWER_MAX],
});

/// Carries out one request and answers it.
pub fn request(header: Header, payload: &[u8]) {
    let scratch = &mut *SCRATCH.lock();
    let mut after = After::Nothing;
    let response = answer(header.session, payload, &mut scratch.piece, &mut after);
    let max_payload = SESSION
        .lock()
        .map_or(RESPONSE_PAYLOAD_MIN, |open| open.max_payload);
    let room = &mut scratch.payload[..max_payload];
    let encoded = match response.encode(room) {
        Ok(len) => len.len(),
        // An answer that outgrows the frame: a VM list of hundreds, say.
        Err(_) => Response::Error(ErrorReply::OutOfRange)
            .encode(room)
            .map_or(0, <[u8]>::len),
    };
    let header = Header {
        kind: Kind::Response,
        ..header
    };
    send(&header, &scratch.payload[..encoded]);
    if let After::PowerOff = after {
        lifecycle::power_off();
    }
}

/// What follows once the answer is out.
enum After {
    Nothing,
    PowerOff,
}

fn answer<'a>(
    session: Session,
    payload: &[u8],
    piece: &'a mut [u8],
    after: &mut After,
) -> Response<'a> {
    let Ok(request) = Request::decode(payload) else {
        return Response::Error(ErrorReply::Malformed);
    };
    if let Request::Hello {
        protocol,
        max_payload,
    } = request
    {
        return hello(session, protocol, max_payload);
    }
    let room = match *SESSION.lock() {
        Some(open) if open.session == session => open.max_payload,
        _ => return Response::Error(ErrorReply::StaleSession),
    };
    match carry_out(&request, piece, room, after) {
        Ok(response) => response,
        Err(error) => Response::Error(error),
    }
}

fn hello(session: Session, protocol: u16, max_payload: u16) -> Response<'static> {
    if protocol != PROTOCOL {
        return Response::Error(ErrorReply::VersionMismatch { target: PROTOCOL });
    }
    if session.0 == 0 {
        return Response::Error(ErrorReply::StaleSession);
    }
    let max_payload = usize::from(max_payload).clamp(RESPONSE_PAYLOAD_MIN, ANSWER_MAX);
    let again = SESSION.lock().is_some_and(|open| open.session == session);
    if !again {
        close();
        *SESSION.lock() = Some(Open {
            session,
            max_payload,
            next_event: tidemark_wire::frame::Seq(0),
        });
    }
    Response::Hello {
        protocol: PROTOCOL,
        max_payload: max_payload as u16,
        image: IMAGE,
    }
}

/// Ends the session: what was taken and not committed is dirty again.
fn close() {
    if SESSION.lock().take().is_none() {
        return;
    }
    for vm in vm::all() {
        vm.console.attached.store(false, Relaxed);
        vm.console.restart_input();
        if let Some(epoch) = work::abandon(vm) {
            info!(
                "{}: epoch {epoch} was not committed; its pages are dirty again",
                vm.name()
            );
        }
    }
}

fn find(vm: VmId) -> Result<&'static Vm, ErrorReply> {
    vm::by_id(vm).ok_or(ErrorReply::NoSuchVm)
}

fn carry_out<'a>(
    request: &Request<'_>,
    piece: &'a mut [u8],
    max_payload: usize,
    after: &mut After,
) -> Result<Response<'a>, ErrorReply> {
    let state = |vm: &Vm| Response::State(vm.status.lock().state);
    Ok(match *request {
        // Seen to before there is a session.
        Request::Hello { .. } => return Err(ErrorReply::Malformed),
        Request::Goodbye => {
            close();
            Response::Ok
        }
        Request::List => Response::Vms(vm::all().iter().map(|vm| summary(vm)).collect()),
        Request::Info { vm } => Response::Info(info_of(find(vm)?)),
        Request::Pause { vm } => {
            let vm = find(vm)?;
            lifecycle::wish(vm, Wish::Pause, "").map_err(ErrorReply::BadState)?;
            state(vm)
        }
        Request::Resume { vm } => {
            let vm = find(vm)?;
            lifecycle::resume(vm).map_err(ErrorReply::BadState)?;
            state(vm)
        }
        Request::Reset { vm, restarts } => {
            let vm = find(vm)?;
            if vm.status.lock().restarts == restarts {
                restart(vm).map_err(ErrorReply::BadState)?;
            }
            state(vm)
        }
        Request::Stop { vm } => {
            let vm = find(vm)?;
            let over = matches!(vm.status.lock().state, VmState::Stopped | VmState::Failed);
            if !over {
                lifecycle::wish(vm, Wish::Stop, "the host stopped it")
                    .map_err(ErrorReply::BadState)?;
            }
            state(vm)
        }
        Request::PowerOff => {
            *after = After::PowerOff;
            Response::Ok
        }
        Request::Hash { vm, slot } => match work::hash(find(vm)?, slot)? {
            Work::Going { done, total } => Response::Progress { done, total },
            Work::Done((sha256, pages)) => Response::HashDone { sha256, pages },
        },
        Request::DirtyStart {
            vm,
            engine,
            granularity,
        } => progress(work::start_log(find(vm)?, engine, granularity)?),
        Request::DirtyEngine { vm, engine } => progress(work::set_engine(find(vm)?, engine)?),
        Request::DirtyStop { vm } => progress(work::stop_log(find(vm)?)?),
        Request::DirtyStatus { vm } => Response::DirtyStatus(work::status(find(vm)?)),
        Request::DirtyQuota { vm, quota } => {
            throttle::set(find(vm)?, quota)?;
            Response::Ok
        }
        Request::SlotAdd {
            vm,
            slot,
            base_ipa,
            bytes,
        } => progress(work::add_slot(find(vm)?, slot, base_ipa, bytes)?),
        Request::SlotDelete { vm, slot } => progress(work::delete_slot(find(vm)?, slot)?),
        Request::DirtyTake { vm, epoch } => match work::take(find(vm)?, epoch)? {
            Work::Going { done, total } => Response::Progress { done, total },
            Work::Done(report) => Response::TakeDone(report),
        },
        Request::BitmapRead {
            vm,
            slot,
            epoch,
            first_page,
            pages,
        } => {
            let room = room_in(piece, max_payload);
            meter::metered(Task::BitmapRead, || {
                bitmap_piece(find(vm)?, slot, epoch, first_page, pages, room)
            })?
        }
        Request::DirtyCommit { vm, epoch } => {
            work::commit(find(vm)?, epoch)?;
            Response::Ok
        }
        Request::DirtyAbort { vm, epoch } => {
            work::abort(find(vm)?, epoch)?;
            Response::Ok
        }
        Request::ReadMemory { vm, ipa, len } => {
            let room = room_in(piece, max_payload);
            meter::metered(Task::MemoryRead, || memory_piece(find(vm)?, ipa, len, room))?
        }
        Request::ConsoleAttach { vm, from } => {
            let vm = find(vm)?;
            let mut history = vm.console.history();
            history.sent = match from {
                ConsoleFrom::Now => history.end,
                ConsoleFrom::Oldest => history.oldest(),
            };
            vm.console.attached.store(true, Relaxed);
            let (offset, oldest) = (history.sent, history.oldest());
            drop(history);
            super::send_text_soon();
            Response::ConsoleData {
                offset,
                oldest,
                data: &[],
            }
        }
        Request::ConsoleDetach { vm } => {
            find(vm)?.console.attached.store(false, Relaxed);
            Response::Ok
        }
        Request::ConsoleRead { vm, offset } => {
            let history = find(vm)?.console.history();
            let room = max_payload.saturating_sub(CONSOLE_OVERHEAD);
            let (offset, len) = history.read(offset, piece.get_mut(..room).unwrap_or_default());
            let oldest = history.oldest();
            drop(history);
            Response::ConsoleData {
                offset,
                oldest,
                data: piece.get(..len).unwrap_or_default(),
            }
        }
        Request::ConsoleWrite { vm, offset, data } => {
            let vm = find(vm)?;
            let next_offset = vm.console.type_at(offset, data);
            vm::exits::device::input_arrived(vm);
            Response::ConsoleAccepted { next_offset }
        }
        Request::Costs => Response::Costs {
            frequency: timer::frequency(),
            costs: meter::costs().collect(),
        },
    })
}

fn room_in(piece: &mut [u8], max_payload: usize) -> &mut [u8] {
    let room = max_payload.saturating_sub(PIECE_OVERHEAD).min(PIECE_MAX);
    piece.get_mut(..room).unwrap_or_default()
}

/// Restarts a guest that runs, or starts one that does not.
pub fn restart(vm: &'static Vm) -> Result<(), VmState> {
    let state = vm.status.lock().state;
    if matches!(state, VmState::Stopped | VmState::Failed) {
        vm.status.lock().restarts += 1;
        lifecycle::start(vm);
        return Ok(());
    }
    lifecycle::wish(vm, Wish::Reset, "the host restarted it")
}

fn progress(work: Work<()>) -> Response<'static> {
    match work {
        Work::Going { done, total } => Response::Progress { done, total },
        Work::Done(()) => Response::Ok,
    }
}

fn summary(vm: &Vm) -> VmSummary {
    VmSummary {
        id: vm.id,
        name: vm.name().into(),
        state: vm.status.lock().state,
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory_bytes,
    }
}

fn info_of(vm: &Vm) -> VmInfo {
    // Of all slots together, so that the answer fits.
    const EXTENTS: usize = 16;
    let mut room = EXTENTS;
    let status = vm.status.lock().clone();
    let stage2 = vm.memory.stage2();
    let mappings = stage2.mappings();
    let s2_counters = stage2.counters();
    let c = &vm.counters;
    let (hypercalls, mmio, wfi) = (
        c.hypercalls.load(Relaxed),
        c.mmio.load(Relaxed),
        c.wfi.load(Relaxed),
    );
    let irqs = c.interrupts.load(Relaxed);
    let others = c.others.load(Relaxed) + c.faults.load(Relaxed);
    VmInfo {
        summary: summary(vm),
        reason: status.reason.chars().take(120).collect::<String>(),
        restarts: status.restarts,
        slots: vm
            .memory
            .slots()
            .iter()
            .map(|slot| {
                let all = || slot.extents();
                let extents: Vec<_> = all()
                    .take(room)
                    .map(|(ipa, pa, pages)| Extent { ipa, pa, pages })
                    .collect();
                room -= extents.len();
                SlotInfo {
                    id: SlotId(slot.id.0),
                    base_ipa: slot.base,
                    pages: slot.pages,
                    access: match slot.access {
                        s2::Access::ReadWrite => SlotAccess::ReadWrite,
                        s2::Access::ReadOnly => SlotAccess::ReadOnly,
                    },
                    more_extents: (all().count() - extents.len()) as u32,
                    extents,
                }
            })
            .collect(),
        features: machine_features(),
        mappings: Mappings {
            blocks_1g: mappings.blocks_1g,
            blocks_2m: mappings.blocks_2m,
            pages_4k: mappings.pages_4k,
        },
        counters: Counters {
            exits: hypercalls + mmio + wfi + irqs + others,
            hypercalls,
            mmio,
            wfi,
            irqs,
            translation_faults: s2_counters.translation_faults,
            write_faults: s2_counters.write_faults,
            splits: s2_counters.splits,
            collapses: s2_counters.collapses,
            tlbis: s2_counters.tlbis,
        },
    }
}

/// What the CPUs have in common, for the host.
fn machine_features() -> Features {
    let cpus = crate::features();
    Features {
        hafdbs: cpus.hafdbs,
        dbm_usable: cpus.dbm_usable(),
        bbm2: cpus.bbm >= 2,
        fwb: cpus.fwb >= 1,
        tlb_range: cpus.tlb >= 2,
        ttl: cpus.ttl >= 1,
        lse: cpus.lse >= 2,
        vmid16: cpus.vmid_bits == 16,
        ipa_bits: stage2::features().1,
        cpus: sched::cpus() as u16,
    }
}

fn bitmap_piece<'a>(
    vm: &Vm,
    slot: SlotId,
    epoch: Epoch,
    first_page: u64,
    pages: u32,
    room: &'a mut [u8],
) -> Result<Response<'a>, ErrorReply> {
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
        .map_err(work::refusal)?;
    let words = words.get((first_page / 64) as usize..).unwrap_or_default();
    let encoded = bitmap::encode(
        words,
        |word| word.load(Relaxed),
        pages.min(ANSWER_PAGES),
        room,
    )
    .ok_or(ErrorReply::OutOfRange)?;
    Ok(Response::Bitmap {
        first_page,
        pages: encoded.pages,
        encoding: room.get(..encoded.len).unwrap_or_default(),
    })
}

fn memory_piece<'a>(
    vm: &Vm,
    ipa: u64,
    len: u32,
    room: &'a mut [u8],
) -> Result<Response<'a>, ErrorReply> {
    if !ipa.is_multiple_of(8) || !len.is_multiple_of(8) {
        return Err(ErrorReply::NeedsAlignment);
    }
    if len == 0 || len > MEMORY_READ_MAX {
        return Err(ErrorReply::OutOfRange);
    }
    work::require_cleared(vm)?;
    let slots = vm.memory.slots();
    let words = slots.words(ipa).ok_or(ErrorReply::OutOfRange)?;
    let most = (len as usize / 8).min(ANSWER_WORDS);
    let wanted = words.get(..most).unwrap_or(words);
    let encoded = pages::encode(wanted, |word| word.load(Relaxed), room);
    Ok(Response::Memory {
        ipa,
        covered: (encoded.words * 8) as u32,
        encoding: room.get(..encoded.len).unwrap_or_default(),
    })
}

/// All about a VM, for a person.
pub fn describe(vm: &Vm) {
    let info = info_of(vm);
    let (summary, c, m) = (&info.summary, &info.counters, &info.mappings);
    console::print(format_args!(
        "{}: {}{}{}, {} vCPUs, {} MiB, restarted {} times\n",
        summary.name,
        summary.state,
        if info.reason.is_empty() { "" } else { ": " },
        info.reason,
        summary.vcpus,
        summary.memory_bytes >> 20,
        info.restarts
    ));
    for slot in &info.slots {
        let access = match slot.access {
            SlotAccess::ReadWrite => "read and write",
            SlotAccess::ReadOnly => "read only",
        };
        console::print(format_args!(
            "  slot {}: {:#x}, {} MiB, {access}\n",
            slot.id,
            slot.base_ipa,
            slot.pages >> 8
        ));
        for extent in &slot.extents {
            console::print(format_args!(
                "    {:#x} is at {:#x}, {} MiB\n",
                extent.ipa,
                extent.pa,
                extent.pages >> 8
            ));
        }
    }
    console::print(format_args!(
        "  mapped by {} x 1 GiB, {} x 2 MiB, {} x 4 KiB\n",
        m.blocks_1g, m.blocks_2m, m.pages_4k
    ));
    console::print(format_args!(
        "  {} exits: {} hypercalls, {} device accesses, {} WFI, {} interrupts\n",
        c.exits, c.hypercalls, c.mmio, c.wfi, c.irqs
    ));
    console::print(format_args!(
        "  stage 2: {} translation faults, {} write faults, {} splits, {} collapses, {} TLBIs\n",
        c.translation_faults, c.write_faults, c.splits, c.collapses, c.tlbis
    ));
}
