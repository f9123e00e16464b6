//! The PL011 at 0x0900_0000, polled: no interrupt, no buffer of our own, so that what has been said has been sent.
//!
//! Only vCPU 0 speaks, except when a vCPU reports its own end; there is no lock to be stuck on then.
//!
//! Arm PrimeCell UART (PL011), DDI 0183.

use core::fmt::{self, Write};
use core::ptr;

const DATA: usize = 0x0900_0000;
const FLAGS: usize = DATA + 0x18;
const LINE_CONTROL: usize = DATA + 0x2c;
const CONTROL: usize = DATA + 0x30;
const INTERRUPT_MASK: usize = DATA + 0x38;

const FLAG_RECEIVE_EMPTY: u32 = 1 << 4;
const FLAG_TRANSMIT_FULL: u32 = 1 << 5;

/// The console; `write!` to it, or use [`say!`].
pub struct Console;

fn read(register: usize) -> u32 {
    // SAFETY: a 32-bit register of the UART, mapped as device memory; reading has no effect on memory.
    unsafe { ptr::with_exposed_provenance::<u32>(register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as in `read`.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(register).write_volatile(value) }
}

/// Turns it on: 8 bits, FIFOs, no interrupts.
pub fn init() {
    write(INTERRUPT_MASK, 0);
    write(LINE_CONTROL, 0b11 << 5 | 1 << 4);
    write(CONTROL, 1 << 9 | 1 << 8 | 1);
}

/// A byte that has come in, if one has.
#[must_use]
pub fn poll() -> Option<u8> {
    (read(FLAGS) & FLAG_RECEIVE_EMPTY == 0).then(|| read(DATA) as u8)
}

/// The next byte.
#[must_use]
pub fn wait() -> u8 {
    wait_by(pause)
}

/// The next byte; calls `idle` between looks.
fn wait_by(idle: impl Fn()) -> u8 {
    loop {
        if let Some(byte) = poll() {
            return byte;
        }
        idle();
    }
}

/// Lets some time pass, awake. A poll may be an exit to the hypervisor, so they are spaced out.
pub fn pause() {
    for _ in 0..256 {
        crate::rt::smp::pause();
    }
}

/// The address of the flag register, for its cost.
#[must_use]
pub const fn flags() -> usize {
    FLAGS
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                send(b'\r');
            }
            send(byte);
        }
        Ok(())
    }
}

fn send(byte: u8) {
    while read(FLAGS) & FLAG_TRANSMIT_FULL != 0 {
        crate::rt::smp::pause();
    }
    write(DATA, byte.into());
}

/// A line that came in.
pub enum Input<'a> {
    /// Not empty.
    Line(&'a str),
    /// Longer than the buffer, or not UTF-8.
    Unreadable,
}

/// Waits for a line that is not empty, calling `idle` between looks. CR and LF both end one.
#[must_use]
pub fn read_line(buffer: &mut [u8], idle: impl Fn()) -> Input<'_> {
    let mut length = 0_usize;
    loop {
        match wait_by(&idle) {
            b'\r' | b'\n' if length == 0 => {}
            b'\r' | b'\n' => break,
            byte => {
                if let Some(slot) = buffer.get_mut(length) {
                    *slot = byte;
                }
                length = length.saturating_add(1);
            }
        }
    }
    match buffer.get(..length).map(core::str::from_utf8) {
        Some(Ok(line)) => Input::Line(line),
        _ => Input::Unreadable,
    }
}

/// Prints a line.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use ::core::fmt::Write as _;
        // The console takes everything, so there is no error to look at.
        let _ = writeln!($crate::rt::console::Console, $($argument)*);
    }};
}
pub use say;
