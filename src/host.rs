//! The host channel: frames and text over the machine's one UART.
//!
//! Text is EL2's shell, or the console of the guest that the terminal is attached to.
//! Frames are a session with the host tool. Nothing binary is sent before the host has said
//! HELLO, and a session that the host left is over with the next HELLO, or, if it holds something, when
//! nothing is heard of it any more (`lease`): what it took and did not commit is dirty again, what it
//! paused goes on, and a log that it started for itself is stopped.
//!
//! Locks, in order: `RECEIVER`, then `SESSION`; a guest console's are leaves. Neither is
//! held while a request is carried out, because what is noted meanwhile is told under `SESSION`. `bulk` has its own.

mod bulk;
mod commands;
mod lease;
mod shell;

use crate::arch::lock::{Mutex, rank};
use crate::arch::timer;
use crate::control::event::{self, Event};
use crate::control::lifecycle;
use crate::control::refusal::told;
use crate::platform::console;
use crate::platform::options::Terminal;
use crate::sched;
use crate::task::job::Step;
use crate::task::meter::metered;
use crate::vm::exits::device;
use crate::vm::{self, Vm};
use alloc::boxed::Box;
use core::fmt::{self, Write};
use core::ops::ControlFlow;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::*};
use log::warn;
use tidemark_lease::Lease;
use tidemark_wire::frame::{self, BadReason, Decoder, Header, Item, Kind, Seq, Session};
use tidemark_wire::message::{self, CONSOLE_OVERHEAD, Task, VmId};

/// The longest payload that a host may send.
const REQUEST_PAYLOAD: usize = 256;
/// How long a frame may stay open without a byte, in microseconds.
const FRAME_TIMEOUT: u64 = 1_000_000;
/// Bytes of console text in one event.
const EVENT_TEXT: usize = 200;

type Receiver = Decoder<{ frame::buffer_len(REQUEST_PAYLOAD) }>;

static RECEIVER: Mutex<(Receiver, Text), { rank::RECEIVER }> =
    Mutex::new((Decoder::new(), Text::Typed));

/// What bytes outside frames are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Text {
    /// Somebody typed them.
    Typed,
    /// The rest of a frame that was given up, until the next delimiter. The decoder hands
    /// them on as text, which is right for a person's screen and wrong for a shell.
    Resync,
}

static SESSION: Mutex<Option<Open>, { rank::SESSION }> = Mutex::new(None);

/// An open session.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    session: Session,
    max_payload: usize,
    next_event: Seq,
    /// How long it may be silent, once it holds something or said so.
    lease: Option<Lease>,
}

/// Bad frames since the start, for the log's sake.
static BAD_FRAMES: AtomicU64 = AtomicU64::new(0);
/// Whether text waits to be sent as events.
static TEXT_WAITS: AtomicBool = AtomicBool::new(false);
/// Whether it waits for room on the line.
static ROOM_AWAITED: AtomicBool = AtomicBool::new(false);

/// Whom the plain terminal shows and feeds: EL2's shell.
const SHELL: u16 = u16::MAX;
/// The shell, with every guest's lines shown.
const ALL: u16 = u16::MAX - 1;
/// `SHELL`, `ALL`, or the VM with this number.
static TERMINAL: AtomicU16 = AtomicU16::new(SHELL);
/// Ctrl-] leaves a guest's console.
const LEAVE: u8 = 0x1d;

/// Attaches the plain terminal, and lets bytes in.
pub fn start(terminal: &Terminal) {
    match terminal {
        Terminal::Shell => {}
        Terminal::All => attach_terminal_to_all(),
        Terminal::Vm(name) => match vm::by_name(name) {
            Some(vm) => attach_terminal(vm),
            None => warn!("console={name}: no such VM; the terminal is the shell"),
        },
    }
    if matches!(TERMINAL.load(Relaxed), SHELL | ALL) {
        shell::prompt();
    }
}

fn attach_terminal(vm: &Vm) {
    vm.console.history().show_from_now();
    TERMINAL.store(vm.id.0, Relaxed);
    // What came in between.
    show(vm, vm.id.0);
}

/// Every guest's lines are shown from now on.
fn attach_terminal_to_all() {
    let each = |action: fn(&Vm)| vm::all().iter().for_each(|vm| action(vm));
    each(|vm| vm.console.history().show_from_now());
    TERMINAL.store(ALL, Relaxed);
    each(|vm| show(vm, ALL));
}

/// A host no longer has a guest's output as events. The terminal shows what comes from now on, and not all that went there.
fn detach(vm: &Vm) {
    vm.console.history().show_from_now();
    vm.console.attached.store(false, Relaxed);
}

/// Forgets a frame that nobody goes on with: its sender is gone, and whoever comes next
/// must not be taken for the rest of it.
fn forget_open_frame() {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = timer::microseconds();
    if now.saturating_sub(LAST.swap(now, Relaxed)) > FRAME_TIMEOUT {
        RECEIVER.lock().0.reset();
    }
}

/// The UART's interrupt.
pub fn interrupt() {
    forget_open_frame();
    let mut last = ControlFlow::Continue(());
    console::interrupt(|byte| {
        last = receive(byte);
        last
    });
    if ROOM_AWAITED.load(SeqCst)
        && console::has_room(2 * EVENT_TEXT)
        && ROOM_AWAITED.swap(false, SeqCst)
    {
        send_text_soon();
    }
    // A request is enough for one interrupt, and its answer for the next.
    if last.is_continue() {
        bulk::advance();
    }
}

/// Takes one byte. A whole request is copied out, so that the receiver is free while it is
/// carried out; then the next look for an interrupt is due.
fn receive(byte: u8) -> ControlFlow<()> {
    // Zeroed for a frame, not for each of its bytes.
    let mut payload;
    let mut receiver = RECEIVER.lock();
    let (decoder, text) = &mut *receiver;
    if byte == 0 {
        *text = Text::Typed;
    }
    let (header, len) = match decoder.push(byte) {
        None => return ControlFlow::Continue(()),
        Some(Item::Text(_)) if *text == Text::Resync => return ControlFlow::Continue(()),
        Some(Item::Text(byte)) => {
            drop(receiver);
            metered(Task::Typed, || typed(byte));
            return ControlFlow::Break(());
        }
        Some(Item::Frame(frame)) => {
            let len = frame.payload.len().min(REQUEST_PAYLOAD);
            payload = [0; REQUEST_PAYLOAD];
            payload[..len].copy_from_slice(&frame.payload[..len]);
            (frame.header, len)
        }
        Some(Item::Bad(bad)) => {
            if bad.reason == BadReason::TooLong {
                *text = Text::Resync;
            }
            bad_frame(bad.reason);
            return ControlFlow::Continue(());
        }
    };
    drop(receiver);
    if header.kind == Kind::Request {
        metered(Task::Request, || commands::request(header, &payload[..len]));
    }
    ControlFlow::Break(())
}

/// Counts a frame that is none. The host will not get an answer, and asks again.
fn bad_frame(reason: BadReason) {
    let count = BAD_FRAMES.fetch_add(1, Relaxed) + 1;
    // A noisy line must not fill the log.
    if count.is_power_of_two() {
        warn!("link: {reason}; {count} bad frames so far, the host will ask again");
    }
}

/// A byte from a plain terminal.
fn typed(byte: u8) {
    let Some(vm) = vm::by_id(VmId(TERMINAL.load(Relaxed))) else {
        shell::typed(byte);
        return;
    };
    if byte == LEAVE {
        TERMINAL.store(SHELL, Relaxed);
        console::print(format_args!("\n"));
        shell::prompt();
    } else if vm.console.type_in(&[byte]) == 1 {
        sched::raise(vm, device::input_arrived(vm));
    }
}

/// A guest wrote to its console. A line that a shared terminal is too slow for is in the history
/// only: a CPU waits for the UART for the few bytes at most that its vCPUs have written by then.
#[inline]
pub fn guest_output(vm: &Vm) {
    if vm.console.attached.load(Relaxed) {
        send_text_soon();
        return;
    }
    let terminal = TERMINAL.load(Relaxed);
    if terminal == vm.id.0 || terminal == ALL {
        show(vm, terminal);
    }
}

/// Shows what a guest wrote since the last time. Under the history's lock, so that two CPUs that come here for one guest
/// keep its order.
#[inline(never)]
fn show(vm: &Vm, terminal: u16) {
    let mut history = vm.console.history();
    while let Some(byte) = history.next_to_show() {
        if terminal != ALL {
            console::write_text(&[byte]);
            continue;
        }
        vm.console.whole_line(byte, |line| {
            if console::has_room(2 * line.len()) {
                console::print(format_args!("{}| {}\n", vm.name(), Lossy(line)));
            }
        });
    }
}

/// Text that may hold anything, without a copy of it.
struct Lossy<'a>(&'a [u8]);

impl fmt::Display for Lossy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            f.write_str(chunk.valid())?;
            if !chunk.invalid().is_empty() {
                f.write_char(char::REPLACEMENT_CHARACTER)?;
            }
        }
        Ok(())
    }
}

/// Sends what waits, a little later: bytes come singly.
fn send_text_soon() {
    if !TEXT_WAITS.swap(true, AcqRel) {
        sched::submit_here(Box::new(|| metered(Task::Text, send_text_step)));
    }
}

/// At most one event for each attached console, if the line has room for it: a guest that
/// writes without end must not keep a CPU here.
fn send_text_step() -> Step {
    TEXT_WAITS.store(false, Release);
    let mut more = false;
    for vm in vm::all() {
        if !vm.console.attached.load(Relaxed) {
            continue;
        }
        if !console::has_room(2 * EVENT_TEXT) {
            // The UART's interrupts go on till there is.
            ROOM_AWAITED.store(true, SeqCst);
            more |= console::has_room(2 * EVENT_TEXT);
        } else {
            more |= send_text(vm);
        }
    }
    // Whoever set the flag meanwhile has submitted another job.
    if more && !TEXT_WAITS.swap(true, AcqRel) {
        return Step::Again;
    }
    Step::Done
}

/// Sends one event of a console's unsent text; says whether there is more. What is lost on
/// the way can be asked for.
fn send_text(vm: &Vm) -> bool {
    let mut text = [0; EVENT_TEXT];
    let (offset, len, more) = {
        let mut history = vm.console.history();
        let (offset, len) = history.read(history.sent, &mut text);
        history.sent = offset + len as u64;
        (offset, len, history.sent < history.end)
    };
    if len > 0 {
        let event = message::Event::Console {
            vm: vm.id,
            offset,
            data: &text[..len],
        };
        send_event(&mut SESSION.lock(), &event);
    }
    more
}

/// Tells the host what has happened to VMs since the last time.
#[inline]
pub fn tell() {
    if event::waiting() {
        tell_all();
    }
}

/// In the order in which they happened: no other CPU takes one while this one sends what it took, or ends the machine before that.
#[inline(never)]
fn tell_all() {
    let mut session = SESSION.lock();
    while let Some(event) = event::take() {
        match event {
            Event::State(vm, state) => {
                let state = told(state);
                send_event(&mut session, &message::Event::VmState { vm, state });
            }
            Event::Over => lifecycle::power_off(),
        }
    }
}

/// Sends an event, if a session is open.
fn send_event(session: &mut Option<Open>, event: &message::Event<'_>) {
    let Some(open) = session.as_mut() else {
        return;
    };
    let header = Header {
        kind: Kind::Event,
        seq: open.next_event,
        session: open.session,
    };
    open.next_event = open.next_event.next();
    let mut payload = [0; EVENT_TEXT + CONSOLE_OVERHEAD];
    // Events are made to fit.
    if let Ok(payload) = event.encode(&mut payload) {
        send(&header, payload);
    }
}

/// Puts one frame on the line, in one piece.
fn send(header: &Header, payload: &[u8]) {
    console::write_pieces(|mut push| frame::encode(header, payload, &mut push).is_ok());
}
