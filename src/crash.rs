//! The end of EL2: what a fatal exception or a panic prints before the machine stops.
//!
//! Takes no lock and allocates nothing: it writes to the UART register by register, after
//! a leading zero byte that ends whatever frame was on the line.

use crate::arch::exception::{FatalFrame, Syndrome};
use crate::arch::{barrier, cpu, el1, smc};
use crate::mm::layout;
use crate::platform::console;
use core::fmt::{self, Write};
use core::sync::atomic::{
    AtomicUsize,
    Ordering::{AcqRel, Acquire},
};

/// Bytes kept for the function names that mkimage writes.
const SYMBOLS: usize = 160 * 1024;

#[used]
#[unsafe(link_section = ".symbols")]
static SYMBOL_SPACE: [u8; SYMBOLS] = [0; SYMBOLS];

/// Writes to the UART without a lock.
struct CrashConsole;

impl Write for CrashConsole {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let Some(uart) = console::raw_uart() else {
            return Ok(());
        };
        for byte in text.bytes() {
            if byte == b'\n' {
                uart.send(b'\r');
            }
            uart.send(byte);
        }
        Ok(())
    }
}

/// Lets the first CPU that fails report; the others wait for the end. A failure of the
/// report itself ends the machine at once.
fn only_one() {
    /// The CPU that reports, plus one.
    static FAILED: AtomicUsize = AtomicUsize::new(0);
    let me = cpu::index() + 1;
    match FAILED.compare_exchange(0, me, AcqRel, Acquire) {
        Ok(_) => {}
        Err(reporter) if reporter == me => stop(),
        Err(_) => loop {
            barrier::wfe();
        },
    }
    if let Some(uart) = console::raw_uart() {
        uart.send(0);
    }
}

/// Stops the machine with the verdict that it failed.
fn stop() -> ! {
    let _ = writeln!(CrashConsole, "\ntidemark: verdict failed");
    smc::system_off()
}

/// A fatal exception at EL2, from boot/vectors.S. `kind` is the vector's number.
#[unsafe(no_mangle)]
extern "C" fn el2_exception(frame: &FatalFrame, kind: u64) -> ! {
    only_one();
    let mut out = CrashConsole;
    let syndrome = Syndrome(el1::esr());
    let name = match kind & 3 {
        0 => "synchronous",
        1 => "IRQ",
        2 => "FIQ",
        _ => "SError",
    };
    let _ = write!(
        out,
        "\n\nEL2 exception: {name} on CPU {}: {syndrome}",
        cpu::index()
    );
    if kind & 3 == 0 && syndrome.has_address() {
        let _ = write!(out, ", address {:#x}", el1::far());
    }
    let _ = writeln!(
        out,
        "\n  ESR {:#010x}  ELR {:#018x}  SPSR {:#010x}  SP {:#018x}",
        syndrome.0, frame.elr, frame.spsr, frame.sp
    );
    for (n, x) in frame.x.iter().enumerate() {
        let end = if n % 4 == 3 { '\n' } else { ' ' };
        let _ = write!(out, "  x{n:<2} {x:#018x}{end}");
    }
    let _ = writeln!(out);
    backtrace(&mut out, frame.elr as usize, frame.x[29] as usize);
    stop()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    only_one();
    let mut out = CrashConsole;
    let _ = writeln!(out, "\n\nEL2 panic: CPU {}: {info}", cpu::index());
    backtrace(&mut out, 0, crate::arch::exception::frame_pointer());
    stop()
}

/// Prints the callers along the chain of frame records (AAPCS64 6.4.6): each record is
/// the caller's x29 and the return address.
fn backtrace(out: &mut CrashConsole, pc: usize, mut frame: usize) {
    const DEEPEST: usize = 32;
    let _ = writeln!(out, "backtrace:");
    if pc != 0 {
        print_address(out, 0, pc);
    }
    for depth in 1..DEEPEST {
        let Some([next, return_address]) = crate::mm::stage1::read_stack(frame) else {
            break;
        };
        if return_address == 0 {
            break;
        }
        // The call stands before the address it returns to.
        print_address(out, depth, return_address.wrapping_sub(4));
        frame = next;
    }
}

fn print_address(out: &mut CrashConsole, depth: usize, address: usize) {
    let offset = address.wrapping_sub(layout::image_start());
    let _ = match symbol(offset) {
        Some((name, inside)) => {
            writeln!(out, "  {depth:2}: {address:#x} {name}+{inside:#x}")
        }
        None => writeln!(out, "  {depth:2}: {address:#x}"),
    };
}

/// The function that image offset `offset` is in, and how far in.
///
/// The table is mkimage's: "TSYM", a count, (offset, name) pairs sorted by offset, names.
fn symbol(offset: usize) -> Option<(&'static str, usize)> {
    let table = symbol_table();
    let word = |at: usize| {
        let bytes = table.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    if offset >= layout::text_end() - layout::image_start() || table.get(..4)? != b"TSYM" {
        return None;
    }
    let (mut low, mut high) = (0, word(4)?);
    while low < high {
        let middle = low.midpoint(high);
        if word(8 + 8 * middle)? <= offset {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let entry = 8 + 8 * low.checked_sub(1)?;
    let name = table.get(word(entry + 4)?..)?;
    let name = name.split(|&byte| byte == 0).next()?;
    Some((core::str::from_utf8(name).ok()?, offset - word(entry)?))
}

fn symbol_table() -> &'static [u8] {
    let start = layout::symbols_start();
    // SAFETY: the section is part of the image's read-only data. Read through the
    // linker's symbols, because the compiler takes the static for the zeros it wrote.
    unsafe { core::slice::from_raw_parts(start as *const u8, layout::symbols_end() - start) }
}

/// Fails on purpose, for the tests of this module: `selftest=` on the command line.
pub fn provoke(name: &str) {
    match name {
        "panic" => panic!("asked for by selftest=panic"),
        "fault" => crate::mm::stage1::touch_unmapped(),
        "overflow" => {
            overflow(0);
        }
        _ => log::warn!("selftest={name}: panic, fault or overflow"),
    }
}

/// Runs into the guard page below the stack.
#[inline(never)]
fn overflow(depth: u64) -> u64 {
    // Through a pointer, so that it stays a call and takes its frame.
    let next: fn(u64) -> u64 = core::hint::black_box(overflow);
    let ballast = core::hint::black_box([depth; 64]);
    next(depth + 1) + core::hint::black_box(ballast)[63]
}
