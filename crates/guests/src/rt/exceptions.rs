//! The vectors: interrupts go to the payload's handler if it set one, everything else is printed and ends the machine.
//!
//! Reports are made on a stack of their own, because a bad stack pointer may be what there is to report. Handlers run
//! with interrupts masked, so frames do not nest.
//!
//! Arm ARM D1.3 (exceptions), D24.2.37 (ESR_EL1).

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::rt::psci;
use crate::say;

/// What was saved of an interrupted program.
#[repr(C)]
#[derive(Debug)]
pub struct Frame {
    registers: [u64; 20],
    /// The counter as the vector was entered.
    pub entered: u64,
    padding: u64,
}

/// Takes an interrupt; acknowledging and ending it are its business.
pub type Handler = fn(&Frame);

/// The vCPU that reports an exception, plus one.
static REPORTER: AtomicUsize = AtomicUsize::new(0);
static HANDLER: AtomicUsize = AtomicUsize::new(0);

/// Sets the handler of all vCPUs.
pub fn set_handler(handler: Handler) {
    HANDLER.store(handler as usize, Ordering::Release);
}

/// Takes interrupts on this vCPU from now on.
pub fn unmask() {
    // SAFETY: the handler is set, or the interrupt is reported.
    unsafe { asm!("msr daifclr, #2", "isb", options(nostack)) };
}

/// Takes none.
pub fn mask() {
    // SAFETY: masks.
    unsafe { asm!("msr daifset, #2", options(nostack)) };
}

/// Sleeps until an interrupt is pending, masked or not.
pub fn wait_for_interrupt() {
    // SAFETY: waits.
    unsafe { asm!("dsb sy", "wfi", options(nostack, preserves_flags)) };
}

/// The vector table. In the order of the architecture: from EL1 on SP_EL0, from EL1 on SP_EL1, from EL0 in AArch64
/// and AArch32; synchronous, IRQ, FIQ, SError of each.
#[unsafe(naked)]
#[unsafe(link_section = ".text.vectors")]
pub extern "C" fn vectors() {
    naked_asm!(
        ".balign 2048",
        ".irp number, 0, 1, 2, 3, 4",
        ".balign 128",
        "mov x0, #\\number",
        "b {fatal}",
        ".endr",
        ".balign 128",
        "b {interrupt}",
        ".irp number, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        ".balign 128",
        "mov x0, #\\number",
        "b {fatal}",
        ".endr",
        ".balign 128",
        fatal = sym fatal,
        interrupt = sym interrupt,
    )
}

#[unsafe(naked)]
extern "C" fn interrupt() {
    naked_asm!(
        "sub sp, sp, #{size}",
        "stp x0, x1, [sp]",
        // As early as can be: this is the moment that latencies are measured to.
        "mrs x0, cntvct_el0",
        "stp x2, x3, [sp, #16]",
        "stp x4, x5, [sp, #32]",
        "stp x6, x7, [sp, #48]",
        "stp x8, x9, [sp, #64]",
        "stp x10, x11, [sp, #80]",
        "stp x12, x13, [sp, #96]",
        "stp x14, x15, [sp, #112]",
        "stp x16, x17, [sp, #128]",
        "stp x18, x30, [sp, #144]",
        "str x0, [sp, #160]",
        "mov x0, sp",
        "bl {handle}",
        "ldp x18, x30, [sp, #144]",
        "ldp x16, x17, [sp, #128]",
        "ldp x14, x15, [sp, #112]",
        "ldp x12, x13, [sp, #96]",
        "ldp x10, x11, [sp, #80]",
        "ldp x8, x9, [sp, #64]",
        "ldp x6, x7, [sp, #48]",
        "ldp x4, x5, [sp, #32]",
        "ldp x2, x3, [sp, #16]",
        "ldp x0, x1, [sp]",
        "add sp, sp, #{size}",
        "eret",
        size = const size_of::<Frame>(),
        handle = sym handle,
    )
}

extern "C" fn handle(frame: &Frame) {
    let handler = HANDLER.load(Ordering::Acquire);
    if handler == 0 {
        report(5, 0, 0);
    }
    // SAFETY: only `set_handler` stores here, and it stores a `Handler`.
    let handler: Handler = unsafe { core::mem::transmute(handler) };
    handler(frame);
}

/// What a store to an address with nothing behind it raises: a data abort from the same level, a synchronous external
/// abort of a write, not on a walk. ISS.EA is implementation defined.
const NOTHING_THERE: u64 = 0x25 << 26 | 1 << 25 | 1 << 6 | 0x10;

/// How far [`store_each`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// All of it took the stores.
    All,
    /// There is nothing at an address.
    NothingThere,
    /// It raised something else: the syndrome.
    Other(u64),
}

/// Stores `value` at `first` and each `step` bytes further, below `end`, up to the first store that aborts.
/// Interrupts are masked, as they always are without a handler.
///
/// # Safety
///
/// The memory, where there is any, is the caller's.
pub unsafe fn store_each(first: u64, end: u64, step: u64, value: u64) -> Stored {
    let syndrome: u64;
    // SAFETY: the vector goes to label 3 with the syndrome, whatever was raised, and changes nothing else; the
    // usual vectors are back afterwards.
    unsafe {
        asm!(
            "mrs {old}, vbar_el1",
            "msr vbar_el1, {table}",
            "isb",
            "adr x16, 3f",
            "mov x17, #0",
            "2: cmp {at}, {end}",
            "b.hs 3f",
            "str {value}, [{at}]",
            "add {at}, {at}, {step}",
            "b 2b",
            "3: dsb sy",
            "msr vbar_el1, {old}",
            "isb",
            old = out(reg) _, table = in(reg) landing as *const () as u64,
            at = inout(reg) first => _, end = in(reg) end, step = in(reg) step, value = in(reg) value,
            out("x16") _, out("x17") syndrome, options(nostack),
        );
    }
    match syndrome & !(1 << 9) {
        0 => Stored::All,
        NOTHING_THERE => Stored::NothingThere,
        _ => Stored::Other(syndrome),
    }
}

/// Vectors that go on at x16 with the syndrome in x17.
#[unsafe(naked)]
extern "C" fn landing() {
    naked_asm!(
        ".balign 2048",
        ".irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        ".balign 128",
        "mrs x17, esr_el1",
        "msr elr_el1, x16",
        "eret",
        ".endr",
        ".balign 128",
    )
}

#[unsafe(naked)]
extern "C" fn fatal(number: u64) {
    naked_asm!(
        "mov x1, sp",
        "mov x2, x30",
        "adrp x3, __report_stack",
        "add x3, x3, :lo12:__report_stack",
        "mov sp, x3",
        "b {report}",
        report = sym report,
    )
}

extern "C" fn report(number: u64, stack: u64, link: u64) -> ! {
    let vcpu = crate::rt::smp::current();
    let mine = usize::from(vcpu.0) + 1;
    match REPORTER.compare_exchange(0, mine, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => {}
        // The report itself faulted: what there is to see has been seen.
        Err(reporter) if reporter == mine => psci::system_off(),
        // Another vCPU's report is under way and turns the machine off when it is complete.
        Err(_) => loop {
            wait_for_interrupt();
        },
    }
    let (esr, elr, far, spsr): (u64, u64, u64, u64);
    // SAFETY: reads what the exception left.
    unsafe {
        asm!(
            "mrs {}, esr_el1", "mrs {}, elr_el1", "mrs {}, far_el1", "mrs {}, spsr_el1",
            out(reg) esr, out(reg) elr, out(reg) far, out(reg) spsr, options(nomem, nostack, preserves_flags)
        );
    }
    let kind = ["synchronous", "irq", "fiq", "serror"][(number & 3) as usize];
    let from = ["el1t", "el1h", "el0-64", "el0-32"][(number >> 2 & 3) as usize];
    let base = crate::rt::mmu::image()[0];
    say!("exception vcpu={vcpu} {kind} from {from}: {}", class(esr));
    say!(
        "exception esr={esr:#x} elr={elr:#x} far={far:#x} spsr={spsr:#x} sp={stack:#x} lr={link:#x} image={base:#x}"
    );
    psci::system_off()
}

/// ESR_EL1.EC in words, as far as a payload can meet it.
fn class(esr: u64) -> &'static str {
    match esr >> 26 & 0x3f {
        0x00 => "undefined instruction or register",
        0x07 => "SIMD or floating point, which payloads do not use",
        0x0e => "illegal execution state",
        0x15 => "SVC",
        0x16 => "HVC",
        0x17 => "SMC",
        0x18 => "system register access refused",
        0x21 => "instruction abort",
        0x22 => "misaligned PC",
        0x25 => "data abort",
        0x26 => "misaligned SP",
        0x2f => "SError",
        0x3c => "BRK",
        _ => "see the class in esr[31:26]",
    }
}
