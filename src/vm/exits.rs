//! Exits: why a guest came to EL2, and what is done about it. One file a class.
//!
//! The functions named here are where boot/vectors.S goes. Each ends with the registers to
//! go on with. Nothing a guest does stops EL2: what it may not do becomes the exception
//! that the architecture has for it, or, where there is none, the end of that VM.

mod abort;
pub mod device;
mod hypercall;
mod instruction;
pub mod interrupt;
mod sysreg;
pub mod timer;
mod walk;

use super::vcpu::{Context, Vcpu};
use super::{Wish, count, lifecycle};
use crate::arch::el1;
use crate::arch::exception::Syndrome;
use crate::sched;
use alloc::format;
use log::debug;

/// What a handler decided.
pub enum Next {
    /// The guest goes on.
    GoOn,
    /// The guest waits for an interrupt.
    Block,
    /// The vCPU is off.
    Off,
    /// The vCPU waits for its quota, and then tries again.
    Stall,
}

fn next(vcpu: &'static Vcpu, next: Next) -> &'static Context {
    match next {
        Next::GoOn => sched::go_on(vcpu),
        Next::Block => sched::block(vcpu),
        Next::Off => sched::turn_off(vcpu),
        Next::Stall => sched::stall(vcpu),
    }
}

/// The vCPU that exited. There is one: it is loaded after it was given a home.
#[inline]
fn owner(context: &Context) -> &'static Vcpu {
    context.owner().expect("an exit of no vCPU")
}

#[unsafe(no_mangle)]
extern "C" fn guest_sync(context: &Context) -> &'static Context {
    let vcpu = owner(context);
    if vcpu.context.pstate() & AARCH32 != 0 {
        return ran_aarch32(vcpu);
    }
    let syndrome = Syndrome(el1::esr());
    let decision = match syndrome.class() {
        0x16 => hypercall::hvc(vcpu),
        0x24 => abort::data(vcpu, syndrome),
        0x18 => sysreg::access(vcpu, syndrome),
        0x01 => wait(vcpu, syndrome),
        0x20 => abort::instruction(vcpu, syndrome),
        0x17 => hypercall::smc(vcpu),
        _ => undefined(vcpu, syndrome),
    };
    next(vcpu, decision)
}

#[unsafe(no_mangle)]
extern "C" fn guest_irq(context: &Context) -> &'static Context {
    let vcpu = owner(context);
    if vcpu.context.pstate() & AARCH32 != 0 {
        return ran_aarch32(vcpu);
    }
    count(&vcpu.vm.counters.interrupts);
    interrupt::take_all();
    sched::sync(vcpu);
    sched::go_on(vcpu)
}

/// Group 0 is the firmware's; should one arrive, there is nothing to take it for.
#[unsafe(no_mangle)]
extern "C" fn guest_fiq(context: &Context) -> &'static Context {
    guest_irq(context)
}

#[unsafe(no_mangle)]
extern "C" fn guest_serror(context: &Context) -> &'static Context {
    let vcpu = owner(context);
    let syndrome = Syndrome(el1::esr());
    // An access of the guest's that went wrong on the bus: its own end, nobody else's.
    fail(vcpu, &format!("SError, ESR {:#x}", syndrome.0));
    sched::go_on(vcpu)
}

/// From EL1 in AArch32 (D1.3.1: these vectors go by the level below EL2), which HCR_EL2.RW excludes.
#[unsafe(no_mangle)]
extern "C" fn guest_aarch32(context: &Context) -> &'static Context {
    ran_aarch32(owner(context))
}

/// SPSR.M bit 4: what was left was in AArch32.
const AARCH32: u64 = 1 << 4;

/// AArch32 is not offered (ID_AA64PFR0_EL1.EL0), but EL0 of a CPU that has it cannot be kept from it. Its
/// instructions and exceptions are others, so it is not carried on.
#[cold]
fn ran_aarch32(vcpu: &'static Vcpu) -> &'static Context {
    interrupt::take_all();
    fail(vcpu, "it ran AArch32 code, which its CPU does not have");
    sched::go_on(vcpu)
}

/// WFI gives the CPU away; WFE does not trap. WFIT (ISS.TI 0b10) is not offered: its timeout would need a timer.
fn wait(vcpu: &'static Vcpu, syndrome: Syndrome) -> Next {
    if syndrome.0 & 0b10 != 0 {
        return undefined(vcpu, syndrome);
    }
    count(&vcpu.vm.counters.wfi);
    vcpu.context.skip_instruction();
    Next::Block
}

/// What the guest's CPU does not have is undefined to it.
fn undefined(vcpu: &'static Vcpu, syndrome: Syndrome) -> Next {
    count(&vcpu.vm.counters.others);
    debug!(
        "{}: vCPU {}: {syndrome} at {:#x}: undefined",
        vcpu.vm.name(),
        vcpu.index.index(),
        vcpu.context.pc()
    );
    // EC 0, IL.
    el1::inject_sync(&vcpu.context, 1 << 25, None);
    Next::GoOn
}

/// Ends the VM: it did what cannot be answered.
fn fail(vcpu: &'static Vcpu, reason: &str) {
    let reason = format!(
        "vCPU {} at {:#x}: {reason}",
        vcpu.index.index(),
        vcpu.context.pc()
    );
    // It runs, so it can be ended.
    let _ = lifecycle::wish(vcpu.vm, Wish::Fail, &reason);
}
