//! The one line to the outside, shared by text and frames.
//!
//! Bytes wait in a ring and leave as the UART takes them: a bounded number with each
//! write, the rest on its interrupts. When the ring is full the writer waits for the UART;
//! nothing is dropped. Text never contains a zero byte, so a frame's delimiters are never
//! text's. One lock, a leaf: nothing is called while it is held.

use crate::arch::lock::{Mutex, rank};
use crate::arch::{cpu, timer};
use crate::platform::pl011::{InterruptFor, Pl011};
use core::fmt::{self, Write};
use core::ops::ControlFlow;

use log::{LevelFilter, Log, Metadata, Record};
use spin::Once;

const RING: usize = 32 * 1024;
/// Bytes handed to the UART in one go.
const STEP: usize = 64;

struct Console {
    uart: Option<Pl011>,
    ring: [u8; RING],
    start: usize,
    len: usize,
    delivery: Delivery,
    /// Bytes that the UART is sure to take yet: nobody else writes to it once this goes by interrupts (firmware is not
    /// called then but to turn the machine off), so it only gets emptier, and is not asked before each.
    room: usize,
    /// What the UART was told last.
    asked_for: Option<InterruptFor>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Delivery {
    /// Each byte waits for the UART: before interrupts work.
    AtOnce,
    /// Through the ring.
    Interrupts,
}

static CONSOLE: Mutex<Console, { rank::CONSOLE }> = Mutex::new(Console {
    uart: None,
    ring: [0; RING],
    start: 0,
    len: 0,
    delivery: Delivery::AtOnce,
    room: 0,
    asked_for: None,
});

/// The UART for the crash console, which takes no lock: the early one, then the one that
/// the devicetree names.
static RAW: [Once<Pl011>; 2] = [const { Once::new() }; 2];

impl Console {
    fn push(&mut self, byte: u8) {
        let Some(uart) = self.uart else { return };
        if self.delivery == Delivery::AtOnce {
            uart.send(byte);
            return;
        }
        if self.len == RING {
            self.send(uart, self.ring[self.start]);
            self.start = (self.start + 1) % RING;
            self.len -= 1;
        }
        self.ring[(self.start + self.len) % RING] = byte;
        self.len += 1;
    }

    /// How many bytes the UART is sure to take now.
    fn room(&mut self, uart: Pl011) -> usize {
        if self.room == 0 {
            self.room = uart.room();
        }
        self.room
    }

    /// Sends a byte, waiting for room.
    fn send(&mut self, uart: Pl011, byte: u8) {
        while self.room(uart) == 0 {
            core::hint::spin_loop();
        }
        uart.put(byte);
        self.room -= 1;
    }

    /// Puts a piece into the ring: what fits before its end and then the rest, or byte by byte where it waits.
    fn push_all(&mut self, bytes: &[u8]) {
        if self.uart.is_none() || self.delivery == Delivery::AtOnce || RING - self.len < bytes.len()
        {
            return bytes.iter().for_each(|&byte| self.push(byte));
        }
        let at = (self.start + self.len) % RING;
        let (before, behind) = bytes.split_at(bytes.len().min(RING - at));
        for (at, piece) in [(at, before), (0, behind)] {
            if let Some(place) = self.ring.get_mut(at..at + piece.len()) {
                place.copy_from_slice(piece);
            }
        }
        self.len += bytes.len();
    }

    /// Hands the UART what it takes, and asks for an interrupt if something is left.
    fn pump(&mut self) {
        let Some(uart) = self.uart else { return };
        if self.delivery == Delivery::AtOnce {
            return;
        }
        let mut left = STEP.min(self.len);
        while left > 0 {
            let now = self.room(uart).min(left);
            if now == 0 {
                break;
            }
            for _ in 0..now {
                uart.put(self.ring[self.start % RING]);
                self.start = (self.start + 1) % RING;
            }
            self.room -= now;
            self.len -= now;
            left -= now;
        }
        self.interrupt_for(match self.len {
            0 => InterruptFor::Input,
            _ => InterruptFor::InputAndRoom,
        });
    }

    /// What is asked for already is not asked for again: most writes are of a byte, which goes out at once.
    fn interrupt_for(&mut self, wanted: InterruptFor) {
        if self.asked_for != Some(wanted)
            && let Some(uart) = self.uart
        {
            uart.interrupt_for(wanted);
            self.asked_for = Some(wanted);
        }
    }
}

/// Gives the console its UART; bytes go out at once until [`use_interrupts`].
pub fn init(uart: Pl011) {
    // The first free place.
    if let Some(place) = RAW.iter().find(|place| place.get().is_none()) {
        place.call_once(|| uart);
    }
    let mut console = CONSOLE.lock();
    console.uart = Some(uart);
    console.room = 0;
    console.asked_for = None;
}

/// The UART, for the crash console.
pub fn raw_uart() -> Option<Pl011> {
    RAW.iter().rev().find_map(Once::get).copied()
}

/// From here on the UART's interrupts move the bytes.
pub fn use_interrupts() {
    let mut console = CONSOLE.lock();
    console.delivery = Delivery::Interrupts;
    console.room = 0;
    console.interrupt_for(InterruptFor::Input);
}

/// Back to waiting for the UART, with all that waits sent first: for the last words.
pub fn flush() {
    let mut console = CONSOLE.lock();
    while console.len > 0 {
        console.pump();
    }
    console.delivery = Delivery::AtOnce;
}

/// The UART's interrupt: gives what was received to `sink` until that has had something long to do, and sends on. Bounded; what is
/// left keeps the interrupt raised.
pub fn interrupt(mut sink: impl FnMut(u8) -> ControlFlow<()>) {
    let Some(uart) = raw_uart() else { return };
    for _ in 0..2 * STEP {
        match uart.receive() {
            Some(byte) if sink(byte).is_continue() => {}
            _ => break,
        }
    }
    uart.clear_send();
    CONSOLE.lock().pump();
}

/// Writes a frame, delimiters included, in one piece: `write` pushes its parts.
pub fn write_pieces(write: impl FnOnce(&mut dyn FnMut(&[u8])) -> bool) {
    let mut console = CONSOLE.lock();
    let whole = write(&mut |bytes: &[u8]| console.push_all(bytes));
    debug_assert!(whole, "frames are made to fit");
    console.pump();
}

/// The ring has not the room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Writes a whole frame if so many bytes can be written without waiting for the UART.
///
/// # Errors
/// They cannot, and nothing was written.
pub fn write_if_room(frame: &[u8], room: usize) -> Result<(), Full> {
    let mut console = CONSOLE.lock();
    if RING - console.len < room {
        return Err(Full);
    }
    console.push_all(frame);
    console.pump();
    Ok(())
}

/// Writes text as it is, zero bytes left out.
pub fn write_text(bytes: &[u8]) {
    let mut console = CONSOLE.lock();
    for &byte in bytes.iter().filter(|&&byte| byte != 0) {
        console.push(byte);
    }
    console.pump();
}

/// Whether so many bytes can be written without waiting for the UART.
pub fn has_room(bytes: usize) -> bool {
    RING - CONSOLE.lock().len >= bytes
}

struct Text<'a>(&'a mut Console);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes().filter(|&byte| byte != 0) {
            if byte == b'\n' {
                self.0.push(b'\r');
            }
            self.0.push(byte);
        }
        Ok(())
    }
}

/// Writes formatted text in one piece, newlines as the terminal wants them.
pub fn print(arguments: fmt::Arguments<'_>) {
    let mut console = CONSOLE.lock();
    // Writing to the ring cannot fail.
    let _ = Text(&mut console).write_fmt(arguments);
    console.pump();
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = timer::microseconds();
        print(format_args!(
            "[{:5}.{:06}] {:<5} cpu{} {}\n",
            now / 1_000_000,
            now % 1_000_000,
            record.level(),
            cpu::index(),
            record.args()
        ));
    }

    fn flush(&self) {}
}

/// Makes the console the log's end.
pub fn init_log(level: Option<LevelFilter>) {
    // It can only fail when a logger is set already, and this is called once.
    let _ = log::set_logger(&Logger);
    log::set_max_level(level.unwrap_or(LevelFilter::Info));
}
