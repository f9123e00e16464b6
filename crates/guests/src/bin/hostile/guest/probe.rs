//! Runs instructions that may fault, and tells what they raised.
//!
//! A probe calls a snippet of code with vectors of its own. The vectors touch no memory and no stack — what they find goes to x8-x14
//! — so anything may be broken in a snippet: its stack pointer, its MMU, its exception level. They step over
//! what faulted, or go back to the probe where there is nothing to step to. Outside of a probe the run time's vectors are in force,
//! and any exception is fatal there.
//!
//! Snippets get x0-x5 and leave x0-x5; x6, x7 are theirs. Everything is masked but SError, so that one that is pending shows.

use core::arch::{asm, naked_asm};
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

/// The vector of a synchronous exception from EL1 on SP_EL1.
pub const SYNC_EL1H: u64 = 4;
/// The same on SP_EL0.
pub const SYNC_EL1T: u64 = 0;
/// The same from EL0 in AArch64.
pub const SYNC_EL0: u64 = 8;

/// ESR.IL: a 32-bit instruction.
pub const IL: u64 = 1 << 25;
/// The syndrome of what is undefined: EC 0.
pub const UNDEFINED: u64 = IL;
/// ISS.WnR
pub const WRITE: u64 = 1 << 6;
/// ISS.CM
pub const CACHE: u64 = 1 << 8;
/// Data abort from the same level, synchronous external abort, not on a walk.
pub const EXTERNAL_READ: u64 = 0x25 << 26 | IL | 0x10;
/// The same of a write.
pub const EXTERNAL_WRITE: u64 = EXTERNAL_READ | WRITE;
/// Instruction abort from the same level, synchronous external abort, not on a walk.
pub const EXTERNAL_FETCH: u64 = 0x21 << 26 | IL | 0x10;
/// Data abort from the same level, alignment fault.
pub const ALIGNMENT_READ: u64 = 0x25 << 26 | IL | 0x21;
/// The same of a write.
pub const ALIGNMENT_WRITE: u64 = ALIGNMENT_READ | WRITE;

/// Where a snippet goes on after an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At the next instruction.
    Next,
    /// Not at all: there is no next instruction.
    Caller,
}

/// What a snippet raised and left.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// How many exceptions; what follows is of the last.
    pub count: u64,
    /// The vector's number in the table.
    pub vector: u64,
    esr: u64,
    /// FAR_EL1.
    pub far: u64,
    /// ELR_EL1.
    pub elr: u64,
    /// SPSR_EL1.
    pub spsr: u64,
    /// DAIF at the vector.
    daif: u64,
    /// x0-x5 at the end.
    pub x: [u64; 6],
}

impl Taken {
    /// ESR_EL1 without ISS.EA, which is implementation defined, for aborts.
    pub fn syndrome(&self) -> u64 {
        match self.esr >> 26 & 0x3f {
            0x20 | 0x21 | 0x24 | 0x25 => self.esr & !(1 << 9),
            _ => self.esr,
        }
    }

    /// ESR_EL1.EC
    pub fn class(&self) -> u64 {
        self.esr >> 26 & 0x3f
    }

    /// Whether the exception was entered as exceptions are: from EL1h, all masked then.
    pub fn resumable(&self) -> bool {
        self.spsr & 0x1f == 5 && self.daif == 0x3c0
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            count,
            vector,
            esr,
            far,
            elr,
            spsr,
            daif,
            x,
        } = self;
        if *count == 0 {
            return write!(f, "no exception, x0={:#x} x1={:#x}", x[0], x[1]);
        }
        write!(
            f,
            "{count} exceptions, vector {vector} esr={esr:#x} far={far:#x} elr={elr:#x} spsr={spsr:#x} daif={daif:#x}"
        )
    }
}

/// Lets SErrors in: nothing a probe does may raise one, and the run time reports it if it does.
pub fn init() {
    // SAFETY: unmasks SErrors, and lets FP, SIMD, SVE and SME through as far as they are there.
    unsafe {
        asm!("msr daifclr, #4", "msr cpacr_el1, {}", "isb", in(reg) 3_u64 << 20 | 3 << 16 | 3 << 24, options(nostack));
    }
}

/// Runs the code at `code`.
#[inline(never)]
pub fn run(code: u64, x: [u64; 6], resume: Resume) -> Taken {
    let mut taken = Taken {
        count: 0,
        vector: 0,
        esr: 0,
        far: 0,
        elr: 0,
        spsr: 0,
        daif: 0,
        x,
    };
    let caller = match resume {
        Resume::Next => 0_u64,
        Resume::Caller => 1,
    };
    let table = vectors as *const () as u64;
    let [x0, x1, x2, x3, x4, x5] = &mut taken.x;
    // SAFETY: snippets change x0-x17 and x30 and the memory their caller answers for; the vectors bring control back
    // with the stack pointer as it was.
    unsafe {
        asm!(
            "mrs {old}, vbar_el1", "msr vbar_el1, {table}", "isb",
            "mov x14, #0",
            "blr x16",
            "dsb sy", "isb",
            "msr vbar_el1, {old}", "isb",
            old = out(reg) _, table = in(reg) table,
            inout("x0") *x0, inout("x1") *x1, inout("x2") *x2, inout("x3") *x3, inout("x4") *x4, inout("x5") *x5,
            out("x6") _, out("x7") _,
            out("x8") taken.daif, out("x9") taken.vector, out("x10") taken.esr, out("x11") taken.far,
            out("x12") taken.elr, out("x13") taken.spsr, out("x14") taken.count,
            inout("x15") caller => _, inout("x16") code => _, out("x17") _, out("x30") _,
        );
    }
    taken
}

/// A snippet's address.
pub type Snippet = extern "C" fn();

/// Runs a snippet.
pub fn probe(snippet: Snippet, x: [u64; 6]) -> Taken {
    run(snippet as *const () as u64, x, Resume::Next)
}

/// Makes snippets: functions of the given instructions.
macro_rules! snippets {
    ($($name:ident: $($line:literal),+;)*) => {
        $(
            #[unsafe(naked)]
            extern "C" fn $name() {
                ::core::arch::naked_asm!($($line,)+ "ret")
            }
        )*
    };
}
pub(super) use snippets;

/// A place for instructions that are made up: one, and the way back.
static PLACE: Place = Place([AtomicU32::new(0), AtomicU32::new(0)]);

#[repr(align(64))]
struct Place([AtomicU32; 2]);

/// Runs one instruction, given as its word. For vCPU 0 alone.
pub fn word(word: u32, x: [u64; 6]) -> Taken {
    let [first, second] = &PLACE.0;
    first.store(word, Ordering::Relaxed);
    // RET
    second.store(0xd65f_03c0, Ordering::Relaxed);
    let place = (&raw const PLACE).addr() as u64;
    publish(place);
    run(place, x, Resume::Next)
}

/// Makes instructions that were written at `place` (one cache line) the ones that are executed.
pub fn publish(place: u64) {
    // SAFETY: cache maintenance of an address that is mapped.
    unsafe {
        asm!("dc cvau, {0}", "dsb ish", "ic ivau, {0}", "dsb ish", "isb", in(reg) place, options(nostack));
    }
}

/// A system register, by its encoding: op0, op1, CRn, CRm, op2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register(pub u32, pub u32, pub u32, pub u32, pub u32);

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(op0, op1, crn, crm, op2) = self;
        write!(f, "S{op0}_{op1}_C{crn}_C{crm}_{op2}")
    }
}

impl Register {
    fn word(self) -> u32 {
        let Self(op0, op1, crn, crm, op2) = self;
        0xd500_0000 | op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5
    }

    /// MRS x0. As a SYS instruction (op0 1): SYSL.
    pub fn read(self) -> Taken {
        word(self.word() | 1 << 21, [0; 6])
    }

    /// MSR, x0. As a SYS instruction (op0 1): SYS.
    pub fn write(self, value: u64) -> Taken {
        word(self.word(), [value, 0, 0, 0, 0, 0])
    }
}

/// The vectors: x8 DAIF, x9 the vector's number, x10 ESR, x11 FAR, x12 ELR, x13 SPSR, x14 one more.
#[unsafe(naked)]
extern "C" fn vectors() {
    naked_asm!(
        ".balign 2048",
        ".irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        ".balign 128",
        "mov x9, #\\number",
        "b {common}",
        ".endr",
        ".balign 128",
        common = sym common,
    )
}

#[unsafe(naked)]
extern "C" fn common() {
    naked_asm!(
        "mrs x8, daif",
        "mrs x10, esr_el1",
        "mrs x11, far_el1",
        "mrs x12, elr_el1",
        "mrs x13, spsr_el1",
        "add x14, x14, #1",
        // From a lower level, on request, or when it goes on and on: back to the caller.
        "cmp x9, #8",
        "b.hs 2f",
        "cbnz x15, 2f",
        "cmp x14, #64",
        "b.hs 2f",
        // An asynchronous one has nothing to step over.
        "add x17, x12, #4",
        "tst x9, #3",
        "csel x17, x17, x12, eq",
        // PSTATE.IL would raise the next one.
        "bic x16, x13, #0x100000",
        "b 3f",
        "2: mov x17, x30",
        // EL1h, D, I and F masked.
        "mov x16, #0x2c5",
        "3: msr elr_el1, x17",
        "msr spsr_el1, x16",
        "eret",
    )
}
