//! Requests of the host, carried out. Each is idempotent; long ones are jobs, and asking
//! again tells how far they are, and what carries guest memory or a bitmap is answered later (`bulk`).

use super::bulk::{self, BulkRequest};
use super::lease::Look;
use super::{Open, SESSION, lease, send};
use crate::arch::lock::{Mutex, rank};
use crate::arch::{cpu, features, timer};
use crate::control::refusal::{bad_state, told};
use crate::control::work::{self, Work};
use crate::control::{lifecycle, throttle};
use crate::platform::console;
use crate::sched;
use crate::task::job::Step;
use crate::task::meter;
use crate::vm::exits::device;
use crate::vm::{self, Vm, stage2};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use log::{info, warn};
use tidemark_sched::{State, Transition};
use tidemark_stage2 as s2;
use tidemark_wire::frame::{Header, Kind, Session};
use tidemark_wire::message::*;
use tidemark_wire::{CONSOLE_WRITE_MAX, PROTOCOL, RESPONSE_PAYLOAD_MIN};

/// The version that HELLO is answered with.
const IMAGE: &str = concat!("tidemark ", env!("CARGO_PKG_VERSION"));

/// Longest payload of an answer that is made at once, with nobody looking for an interrupt meanwhile. What may be
/// longer is made in steps.
const ANSWER_MAX: usize = RESPONSE_PAYLOAD_MIN;

/// Room for an answer: console text, and the message around it.
struct Scratch {
    text: [u8; ANSWER_MAX],
    payload: [u8; ANSWER_MAX],
}

static SCRATCH: Mutex<Scratch, { rank::REQUEST }> = Mutex::new(Scratch {
    text: [0; ANSWER_MAX],
    payload: [0; ANSWER_MAX],
});

/// Carries out one request and answers it, or sees to it that it is answered.
pub fn request(header: Header, payload: &[u8]) {
    let scratch = &mut *SCRATCH.lock();
    let mut after = After::Nothing;
    let Some(response) = answer(header, payload, &mut scratch.text, &mut after) else {
        return;
    };
    let encoded = match response.encode(&mut scratch.payload) {
        Ok(len) => len.len(),
        // An answer that outgrows the frame: a VM list of hundreds, say.
        Err(_) => Response::Error(ErrorReply::OutOfRange)
            .encode(&mut scratch.payload)
            .map_or(0, <[u8]>::len),
    };
    let header = Header {
        kind: Kind::Response,
        ..header
    };
    send(&header, scratch.payload.get(..encoded).unwrap_or_default());
    if let After::PowerOff = after {
        super::tell();
        lifecycle::power_off();
    }
}

/// What follows once the answer is out.
enum After {
    Nothing,
    PowerOff,
}

/// The answer to a request; `None` if it comes later.
fn answer<'a>(
    header: Header,
    payload: &[u8],
    text: &'a mut [u8],
    after: &mut After,
) -> Option<Response<'a>> {
    let Ok(request) = Request::decode(payload) else {
        return Some(Response::Error(ErrorReply::Malformed));
    };
    if let Request::Hello {
        protocol,
        max_payload,
    } = request
    {
        return Some(hello(header.session, protocol, max_payload));
    }
    if !lease::heard(header.session) {
        return Some(Response::Error(ErrorReply::StaleSession));
    }
    if let Some(wanted) = BulkRequest::of(&request) {
        return bulk::ask(header, wanted).err().map(Response::Error);
    }
    Some(carry_out(&request, text, after).unwrap_or_else(Response::Error))
}

fn hello(session: Session, protocol: u16, max_payload: u16) -> Response<'static> {
    if protocol != PROTOCOL {
        return Response::Error(ErrorReply::VersionMismatch { target: PROTOCOL });
    }
    if session.0 == 0 {
        return Response::Error(ErrorReply::StaleSession);
    }
    let max_payload = usize::from(max_payload).clamp(RESPONSE_PAYLOAD_MIN, bulk::PAYLOAD_MAX);
    // Asked for again, it gets the answer it got.
    let open = SESSION.lock().filter(|open| open.session == session);
    let max_payload = open.map_or(max_payload, |open| open.max_payload);
    if open.is_none() {
        close();
        // What has happened by now is the session's before, or nobody's.
        super::tell();
        *SESSION.lock() = Some(Open {
            session,
            max_payload,
            next_event: tidemark_wire::frame::Seq(0),
            lease: None,
        });
    } else {
        lease::heard(session);
    }
    Response::Hello {
        protocol: PROTOCOL,
        max_payload: max_payload as u16,
        image: IMAGE,
    }
}

/// Has the session's lease looked at.
fn watch(look: Option<Look>) {
    if let Some(Look(at)) = look {
        sched::submit_at(at, Box::new(look_at_lease));
    }
}

fn look_at_lease() -> Step {
    match lease::look() {
        lease::Found::Again(look) => watch(Some(look)),
        lease::Found::Nothing => {}
        lease::Found::Over => {
            close_if_silent();
            // Heard at the last moment, or there is another session.
            return Step::Again;
        }
    }
    Step::Done
}

/// Ends the session of which nothing is heard any more, if that is still so: no request is carried out meanwhile.
fn close_if_silent() {
    let _one_at_a_time = SCRATCH.lock();
    if lease::is_over() {
        warn!("link: nothing heard of the host's session any more; it is over");
        close();
    }
}

/// Ends the session: what was taken and not committed is dirty again, and what it held is given back.
fn close() {
    if SESSION.lock().take().is_none() {
        return;
    }
    bulk::forget();
    for vm in vm::all() {
        super::detach(vm);
        vm.console.restart_input();
        let had = work::abandon(vm);
        if let Some(epoch) = had.epoch {
            info!(
                "{}: epoch {epoch} was not committed; its pages are dirty again",
                vm.name()
            );
        }
        if had.log {
            info!("{}: the session's dirty log is stopped with it", vm.name());
        }
        if lifecycle::session_over(vm) {
            info!("{}: the session's pause is over with it", vm.name());
        }
    }
}

fn find(vm: VmId) -> Result<&'static Vm, ErrorReply> {
    vm::by_id(vm).ok_or(ErrorReply::NoSuchVm)
}

fn carry_out<'a>(
    request: &Request<'_>,
    text: &'a mut [u8],
    after: &mut After,
) -> Result<Response<'a>, ErrorReply> {
    let state = |vm: &Vm| Response::State(told(vm.status().state));
    Ok(match *request {
        // Seen to before.
        Request::Hello { .. }
        | Request::BitmapRead { .. }
        | Request::ReadMemory { .. }
        | Request::PageSums { .. } => {
            return Err(ErrorReply::Malformed);
        }
        Request::Goodbye => {
            close();
            Response::Ok
        }
        Request::List => Response::Vms(vm::all().iter().map(|vm| summary(vm)).collect()),
        Request::Info { vm } => Response::Info(info_of(find(vm)?)),
        Request::Pause { vm, hold } => {
            let vm = find(vm)?;
            watch(lease::begin_for(hold));
            lifecycle::pause(vm, for_whom(hold)).map_err(bad_state)?;
            state(vm)
        }
        Request::Resume { vm, hold } => {
            let vm = find(vm)?;
            lifecycle::resume(vm, for_whom(hold)).map_err(bad_state)?;
            state(vm)
        }
        Request::KeepAlive { patience_ms } => {
            watch(lease::set_patience(patience_ms)?);
            Response::Ok
        }
        Request::Reset { vm, restarts } => {
            let vm = find(vm)?;
            if vm.status().restarts == restarts {
                lifecycle::restart(vm, "the host restarted it").map_err(bad_state)?;
            }
            state(vm)
        }
        Request::Stop { vm } => {
            let vm = find(vm)?;
            let over = matches!(vm.status().state, State::Stopped | State::Failed);
            if !over {
                lifecycle::request(vm, Transition::Stop, "the host stopped it")
                    .map_err(bad_state)?;
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
            hold,
        } => {
            let vm = find(vm)?;
            watch(lease::begin_for(hold));
            progress(work::start_log(vm, engine, granularity, hold)?)
        }
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
        Request::DirtyCommit { vm, epoch } => {
            work::commit(find(vm)?, epoch)?;
            Response::Ok
        }
        Request::DirtyAbort { vm, epoch } => {
            work::abort(find(vm)?, epoch)?;
            Response::Ok
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
            super::detach(find(vm)?);
            Response::Ok
        }
        Request::ConsoleRead { vm, offset } => {
            let history = find(vm)?.console.history();
            let room = ANSWER_MAX - CONSOLE_OVERHEAD;
            let (offset, len) = history.read(offset, text.get_mut(..room).unwrap_or_default());
            let oldest = history.oldest();
            drop(history);
            Response::ConsoleData {
                offset,
                oldest,
                data: text.get(..len).unwrap_or_default(),
            }
        }
        Request::ConsoleWrite { vm, offset, data } => {
            let vm = find(vm)?;
            if data.len() > CONSOLE_WRITE_MAX {
                return Err(ErrorReply::OutOfRange);
            }
            let next_offset = vm.console.type_at(offset, data);
            sched::raise(vm, device::input_arrived(vm));
            Response::ConsoleAccepted { next_offset }
        }
        Request::Costs => Response::Costs {
            frequency: timer::frequency(),
            costs: meter::costs().collect(),
        },
    })
}

/// Whose pause it is.
fn for_whom(hold: Hold) -> tidemark_sched::Hold {
    match hold {
        Hold::Lasting => tidemark_sched::Hold::Lasting,
        Hold::Session => tidemark_sched::Hold::Session,
    }
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
        state: told(vm.status().state),
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory_bytes,
    }
}

fn info_of(vm: &Vm) -> VmInfo {
    // Of all slots together, so that the answer fits.
    const EXTENTS: usize = 16;
    let mut room = EXTENTS;
    let status = vm.status().clone();
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
                        // What the slot is, not what stage 2 lets through at the moment.
                        s2::Access::ReadOnly | s2::Access::None => SlotAccess::ReadOnly,
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
    let cpus = features::system();
    let (stage2, ipa_bits) = stage2::features();
    Features {
        hafdbs: cpus.hafdbs,
        dbm_usable: stage2.dbm == s2::Support::Present,
        bbm2: cpus.bbm >= 2,
        fwb: cpus.fwb >= 1,
        tlb_range: cpus.tlb >= 2,
        ttl: cpus.ttl >= 1,
        lse: cpus.lse >= 2,
        vmid16: cpus.vmid_bits == 16,
        ipa_bits,
        cpus: cpu::count() as u16,
    }
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
