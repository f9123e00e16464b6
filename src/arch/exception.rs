//! Vectors (boot/vectors.S), the first way into a guest, and what a syndrome says in words.

use super::context::Context;
use super::cpu::{self, CPU_CONTEXT, CPU_EMERGENCY};
use core::arch::global_asm;
use core::fmt;

global_asm!(
    include_str!("../../boot/vectors.S"),
    CPU_CONTEXT = const CPU_CONTEXT,
    CPU_EMERGENCY = const CPU_EMERGENCY,
);
global_asm!(include_str!("../../boot/fp.S"));

unsafe extern "C" {
    fn start_guest(context: *const (), stack_top: usize) -> !;
}

/// Leaves EL2 for the first time on this CPU. Later returns to a guest happen at the end
/// of each exit, in the assembly.
pub fn enter_first<O>(context: &'static Context<O>) -> ! {
    let stack_top = cpu::current().map_or(0, cpu::Cpu::stack_top);
    // SAFETY: the stack is this CPU's own and nothing on it is needed again: this
    // function does not return. `context` was filled by `Context::reset` or an exit.
    unsafe { start_guest(core::ptr::from_ref(context).cast(), stack_top) }
}

/// The registers at a fatal exception, as boot/vectors.S stores them.
#[repr(C)]
#[derive(Debug)]
pub struct FatalFrame {
    /// x0-x30.
    pub x: [u64; 31],
    /// Where it happened.
    pub elr: u64,
    /// PSTATE then.
    pub spsr: u64,
    /// The stack pointer then.
    pub sp: u64,
}

const _: () = assert!(core::mem::offset_of!(FatalFrame, elr) == 248);
const _: () = assert!(core::mem::offset_of!(FatalFrame, sp) == 264);

/// An exception syndrome, printed in words (Arm ARM D24.2.40).
#[derive(Clone, Copy)]
pub struct Syndrome(pub u64);

impl Syndrome {
    /// Exception class, ESR bits 31:26.
    pub fn class(self) -> u64 {
        self.0 >> 26 & 0x3f
    }

    /// Whether FAR holds an address for this class.
    pub fn has_address(self) -> bool {
        matches!(self.class(), 0x20..=0x22 | 0x24 | 0x25 | 0x34 | 0x35)
    }
}

impl fmt::Display for Syndrome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = match self.class() {
            0x00 => "unknown reason or undefined instruction",
            0x01 => "WFI or WFE",
            0x07 => "FP or SIMD access",
            0x0e => "illegal execution state",
            0x15 => "SVC",
            0x16 => "HVC",
            0x17 => "SMC",
            0x18 => "system register access",
            0x19 => "SVE access",
            0x20 => "instruction abort from a lower level",
            0x21 => "instruction abort",
            0x22 => "misaligned PC",
            0x24 => "data abort from a lower level",
            0x25 => "data abort",
            0x26 => "misaligned SP",
            0x2f => "SError",
            0x30 | 0x31 => "breakpoint",
            0x3c => "BRK",
            _ => "other class",
        };
        write!(f, "{class} (EC {:#04x})", self.class())?;
        if matches!(self.class(), 0x20 | 0x21 | 0x24 | 0x25) {
            let level = self.0 & 3;
            let fault = match self.0 >> 2 & 0xf {
                0 => "address size fault",
                1 => "translation fault",
                2 => "access flag fault",
                3 => "permission fault",
                4 => "external abort",
                5 => "external abort on a table walk",
                6 => "parity or ECC error",
                8 => "alignment fault",
                12 => "TLB conflict or unsupported atomic update",
                _ => "other fault",
            };
            let way = match (self.class(), self.0 >> 6 & 1) {
                (0x20 | 0x21, _) => "executing",
                (_, 1) => "writing",
                _ => "reading",
            };
            write!(f, ", {fault} at level {level}, {way}")?;
        }
        Ok(())
    }
}

/// The frame record of the function that calls.
#[inline(always)]
pub fn frame_pointer() -> usize {
    let frame;
    // SAFETY: copies a register.
    unsafe {
        core::arch::asm!("mov {}, x29", out(reg) frame, options(nomem, nostack, preserves_flags))
    };
    frame
}
