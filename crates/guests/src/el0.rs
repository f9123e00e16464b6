//! What an EL0 program stands on: entry, arguments and the few system calls of Linux it makes. No libc.
//!
//! The numbers and structures are those of Linux on arm64 (`include/uapi/asm-generic/unistd.h`), which do not change.

use core::arch::asm;
use core::ffi::{CStr, c_char};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::ptr::{self, NonNull};

const NANOSLEEP: u64 = 101;
const CLOCK_GETTIME: u64 = 113;
const WRITE: u64 = 64;
const EXIT_GROUP: u64 = 94;
const MMAP: u64 = 222;

/// Begins a program: its entry point, its main function (`fn(Arguments) -> ExitStatus`) and its panic handler.
#[macro_export]
macro_rules! el0_main {
    ($main:path) => {
        ::core::arch::global_asm!(
            ".section .text._start",
            ".global _start",
            "_start:",
            "mov x29, #0",
            "mov x30, #0",
            "mov x0, sp",
            "bl {begin}",
            begin = sym begin,
        );

        extern "C" fn begin(stack: *const usize) -> ! {
            // SAFETY: this is the stack pointer that the kernel starts a program with.
            let arguments = unsafe { $crate::el0::Arguments::new(stack) };
            $crate::el0::exit($main(arguments))
        }

        #[panic_handler]
        fn panic(info: &::core::panic::PanicInfo<'_>) -> ! {
            $crate::el0::panic(info)
        }
    };
}

/// What a program ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus(pub u8);

impl ExitStatus {
    /// All went well.
    pub const SUCCESS: Self = Self(0);
    /// The system refused something.
    pub const FAILURE: Self = Self(1);
    /// It was called wrongly.
    pub const USAGE: Self = Self(2);
}

/// An error number of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u64);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error {}", self.0)
    }
}

/// # Safety
///
/// That of the system call.
unsafe fn call(number: u64, arguments: [u64; 6]) -> Result<u64, Errno> {
    let [a, b, c, d, e, f] = arguments;
    let result: u64;
    // SAFETY: the kernel keeps all registers but x0; what it does to memory, the caller answers for.
    unsafe {
        asm!(
            "svc #0",
            in("x8") number, inout("x0") a => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f, options(nostack)
        );
    }
    if result > u64::MAX - 4095 {
        Err(Errno(result.wrapping_neg()))
    } else {
        Ok(result)
    }
}

/// The program's arguments, its name not among them.
#[derive(Clone, Debug)]
pub struct Arguments {
    next: *const *const c_char,
}

impl Arguments {
    /// # Safety
    ///
    /// `stack` is what a program's stack pointer is at its start: the number of arguments, then that many pointers
    /// to strings, then a null pointer.
    #[must_use]
    pub unsafe fn new(stack: *const usize) -> Self {
        // SAFETY: the first word is there; so is the null pointer, with the name before it if there is one.
        let next = unsafe { stack.add(if *stack > 0 { 2 } else { 1 }) };
        Self { next: next.cast() }
    }
}

impl Iterator for Arguments {
    type Item = &'static [u8];

    fn next(&mut self) -> Option<&'static [u8]> {
        // SAFETY: `next` is at an argument or at the null pointer that ends them, and stays there.
        let argument = unsafe { *self.next };
        if argument.is_null() {
            return None;
        }
        // SAFETY: there is at least the null pointer after this one.
        self.next = unsafe { self.next.add(1) };
        // SAFETY: the kernel ends each with a zero and nobody changes them.
        Some(unsafe { CStr::from_ptr(argument) }.to_bytes())
    }
}

/// A stream to write to. A line is written with one call, so that lines of different programs do not mix.
pub struct Stream {
    descriptor: u64,
    buffer: [u8; 256],
    length: usize,
}

impl Stream {
    /// Standard output.
    #[must_use]
    pub const fn output() -> Self {
        Self {
            descriptor: 1,
            buffer: [0; 256],
            length: 0,
        }
    }

    /// Standard error.
    #[must_use]
    pub const fn error() -> Self {
        Self {
            descriptor: 2,
            buffer: [0; 256],
            length: 0,
        }
    }

    fn flush(&mut self) -> fmt::Result {
        let mut rest = self.buffer.get(..self.length).unwrap_or(&[]);
        while !rest.is_empty() {
            let arguments = [
                self.descriptor,
                rest.as_ptr().expose_provenance() as u64,
                rest.len() as u64,
                0,
                0,
                0,
            ];
            // SAFETY: the kernel reads those bytes.
            match unsafe { call(WRITE, arguments) } {
                Ok(written @ 1..) => rest = rest.get(written as usize..).unwrap_or(&[]),
                Ok(0) | Err(_) => return Err(fmt::Error),
            }
        }
        self.length = 0;
        Ok(())
    }
}

impl Write for Stream {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.length == self.buffer.len() {
                self.flush()?;
            }
            if let Some(slot) = self.buffer.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
            if byte == b'\n' {
                self.flush()?;
            }
        }
        Ok(())
    }
}

/// Ends the program.
pub fn exit(status: ExitStatus) -> ! {
    loop {
        // SAFETY: ends the program.
        let _ = unsafe { call(EXIT_GROUP, [status.0.into(), 0, 0, 0, 0, 0]) };
    }
}

/// Says what happened and ends the program.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    // Nothing is left to tell if this fails.
    let _ = writeln!(Stream::error(), "{info}");
    exit(ExitStatus(101))
}

/// Nanoseconds of the monotonic clock.
#[must_use]
pub fn now() -> u64 {
    let mut time = [0_u64; 2];
    let place = (&raw mut time).expose_provenance() as u64;
    // SAFETY: the kernel writes two words there. It cannot refuse the monotonic clock (1).
    let _ = unsafe { call(CLOCK_GETTIME, [1, place, 0, 0, 0, 0]) };
    // The kernel wrote behind the compiler's back.
    let [seconds, nanoseconds] = core::hint::black_box(time);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

/// Sleeps, or less if a signal comes.
pub fn sleep(milliseconds: u64) {
    let time = [milliseconds / 1000, milliseconds % 1000 * 1_000_000];
    let place = (&raw const time).expose_provenance() as u64;
    // SAFETY: the kernel reads two words there.
    let _ = unsafe { call(NANOSLEEP, [place, 0, 0, 0, 0, 0]) };
}

/// Zeroed memory, for the rest of the program's life.
///
/// # Errors
///
/// There is not so much.
pub fn map(bytes: u64) -> Result<NonNull<u64>, Errno> {
    const READ_WRITE: u64 = 0b11;
    const PRIVATE_ANONYMOUS: u64 = 0x22;
    // SAFETY: new memory, at an address that the kernel chooses.
    let place = unsafe { call(MMAP, [0, bytes, READ_WRITE, PRIVATE_ANONYMOUS, u64::MAX, 0]) }?;
    NonNull::new(ptr::with_exposed_provenance_mut(place as usize)).ok_or(Errno(0))
}
