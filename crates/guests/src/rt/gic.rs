//! GICv3 as a payload needs it: its own SGIs and PPIs, all of group 1 and one priority.
//!
//! Registers of the distributor and the redistributors are memory; the CPU interface is system registers.
//! Arm IHI 0069 (GICv3), chapter 12.

use core::arch::asm;
use core::ptr;

use crate::fdt::Mpidr;
use crate::rt::{counter, exceptions};

const DISTRIBUTOR: usize = 0x0800_0000;
const DISTRIBUTOR_TYPER: usize = DISTRIBUTOR + 0x4;
const DISTRIBUTOR_IIDR: usize = DISTRIBUTOR + 0x8;
const REDISTRIBUTORS: usize = 0x080a_0000;
const REDISTRIBUTOR_BYTES: usize = 0x2_0000;
/// From a redistributor's frame to its frame for SGIs and PPIs.
const PRIVATE: usize = 0x1_0000;

/// GICD_CTLR: affinity routing, and group 1 on. The same bits with one security state and with two.
const ROUTE_AND_ENABLE: u32 = 1 << 4 | 1 << 1;
/// GICD_CTLR: a write has not taken effect yet.
const WRITE_PENDING: u32 = 1 << 31;

/// An interrupt that belongs to a vCPU: SGI 0 to 15 or PPI 16 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Private(pub u32);

impl Private {
    /// The virtual timer's, on every machine there is.
    pub const VIRTUAL_TIMER: Self = Self(27);
}

fn read(register: usize) -> u32 {
    // SAFETY: a 32-bit register of the GIC, mapped as device memory; reading has no effect on memory.
    unsafe { ptr::with_exposed_provenance::<u32>(register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as in `read`.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(register).write_volatile(value) }
}

/// Bytes of the distributor's frame and of the first redistributor's two.
pub const BYTES: u64 = 0x1_0000 + REDISTRIBUTOR_BYTES as u64;

/// Stores `value` to the word at `offset` in those frames, or loads it. Whatever that does to this vCPU's interrupts
/// is the caller's affair.
pub fn access(offset: u64, value: Option<u32>) {
    let offset = (offset % BYTES) as usize & !3;
    let register = match offset.checked_sub(0x1_0000) {
        None => DISTRIBUTOR + offset,
        Some(offset) => REDISTRIBUTORS + offset,
    };
    match value {
        None => drop(read(register)),
        Some(value) => write(register, value),
    }
}

/// The address of GICD_TYPER, for its cost.
#[must_use]
pub const fn typer() -> usize {
    DISTRIBUTOR_TYPER
}

/// The address of GICD_IIDR, for its cost.
#[must_use]
pub const fn iidr() -> usize {
    DISTRIBUTOR_IIDR
}

/// Turns the distributor on. Once, before any [`init`].
///
/// # Panics
///
/// It does not come on.
pub fn init_distributor() {
    write(DISTRIBUTOR, ROUTE_AND_ENABLE);
    let on = counter::within(1, || read(DISTRIBUTOR) & WRITE_PENDING == 0);
    assert!(
        on && read(DISTRIBUTOR) & ROUTE_AND_ENABLE == ROUTE_AND_ENABLE,
        "the GIC's distributor does not come on"
    );
}

/// Enables `interrupts` for the vCPU this runs on, and its CPU interface.
///
/// # Panics
///
/// There is no redistributor for it, or it stays asleep.
pub fn init(interrupts: &[Private]) {
    let frame = redistributor();
    let waker = frame + 0x14;
    write(waker, read(waker) & !(1 << 1));
    assert!(
        counter::within(1, || read(waker) & 1 << 2 == 0),
        "the redistributor at {frame:#x} does not wake up"
    );
    let private = frame + PRIVATE;
    write(private + 0x80, u32::MAX);
    let mut enable = 0;
    for Private(number) in interrupts {
        enable |= 1 << (number & 31);
        let register = private + 0x400 + (number & 28) as usize;
        let shift = 8 * (number & 3);
        write(register, read(register) & !(0xff << shift) | 0x80 << shift);
    }
    write(private + 0x100, enable);
    // SAFETY: the CPU interface's registers; interrupts stay masked until a payload unmasks them.
    unsafe {
        asm!(
            "msr icc_sre_el1, {sre}", "isb",
            "msr icc_pmr_el1, {pmr}", "msr icc_bpr1_el1, xzr", "msr icc_ctlr_el1, xzr", "msr icc_igrpen1_el1, {on}", "isb",
            sre = in(reg) 7_u64, pmr = in(reg) 0xff_u64, on = in(reg) 1_u64, options(nostack, preserves_flags)
        );
    }
}

fn redistributor() -> usize {
    let mpidr: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, mpidr_el1", out(reg) mpidr, options(nomem, nostack, preserves_flags)) };
    let affinity = (mpidr >> 32 & 0xff) << 24 | mpidr & 0xff_ffff;
    let mut frame = REDISTRIBUTORS;
    for _ in 0..crate::pattern::Vcpu::MAX {
        // GICR_TYPER: affinity in the upper half, `Last` in bit 4 of the lower.
        if u64::from(read(frame + 0xc)) == affinity {
            return frame;
        }
        if read(frame + 0x8) & 1 << 4 != 0 {
            break;
        }
        frame += REDISTRIBUTOR_BYTES;
    }
    panic!("no redistributor has the affinity {affinity:#x}");
}

/// The value of ICC_SGI1R_EL1 that sends SGI `interrupt` to one vCPU.
#[must_use]
pub const fn sgi(interrupt: Private, target: Mpidr) -> u64 {
    let Mpidr(mpidr) = target;
    let (aff0, aff1, aff2, aff3) = (
        mpidr & 0xff,
        mpidr >> 8 & 0xff,
        mpidr >> 16 & 0xff,
        mpidr >> 32 & 0xff,
    );
    aff3 << 48
        | (aff0 >> 4) << 44
        | aff2 << 32
        | (interrupt.0 as u64 & 15) << 24
        | aff1 << 16
        | 1 << (aff0 & 15)
}

/// Sends what [`sgi`] gave.
#[inline(always)]
pub fn send(sgi: u64) {
    // SAFETY: sends an interrupt, after the writes that it is about.
    unsafe {
        asm!("dsb ishst", "msr icc_sgi1r_el1, {}", "isb", in(reg) sgi, options(nostack, preserves_flags))
    };
}

/// Takes the pending interrupt of highest priority; 1020 and above are none.
#[inline(always)]
#[must_use]
pub fn acknowledge() -> Private {
    let number: u64;
    // SAFETY: acknowledges; `end` follows.
    unsafe {
        asm!("mrs {}, icc_iar1_el1", "dsb sy", out(reg) number, options(nostack, preserves_flags))
    };
    Private(number as u32)
}

/// Ends what [`acknowledge`] gave.
#[inline(always)]
pub fn end(interrupt: Private) {
    // SAFETY: ends an interrupt that was acknowledged.
    unsafe {
        asm!("msr icc_eoir1_el1, {}", "isb", in(reg) u64::from(interrupt.0), options(nostack, preserves_flags))
    };
}

/// Sleeps for 5 milliseconds, or less. The virtual timer's interrupt must be enabled, and all must be masked.
pub fn nap() {
    counter::set_timer(counter::now().wrapping_add(counter::frequency() / 200));
    exceptions::wait_for_interrupt();
    counter::stop_timer();
    // Else it would still be pending the next time.
    let interrupt = acknowledge();
    if interrupt == Private::VIRTUAL_TIMER {
        end(interrupt);
    }
}
