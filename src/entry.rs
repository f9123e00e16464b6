//! Exits: why a guest came to EL2, and who answers it.
//!
//! The functions named here are where boot/vectors.S goes. Each ends with the registers to
//! go on with. Nothing a guest does stops EL2: what it may not do becomes the exception
//! that the architecture has for it, or, where there is none, the end of that VM.

mod interrupt;
mod power;
pub mod run;

use crate::arch::el1;
use crate::arch::exception::Syndrome;
use crate::control::lifecycle;
use crate::host;
use crate::sched;
use crate::vm::count;
use crate::vm::exits::{Effects, Next, abort, hypercall, sysreg, undefined, wait};
use crate::vm::vcpu::{Context, Vcpu};
use alloc::format;
use core::fmt;
use tidemark_sched::Transition;

/// Does what a handler asks for.
#[inline]
fn finish(vcpu: &'static Vcpu, effects: Effects) -> &'static Context {
    if effects.is_none() {
        return run::go_on(vcpu);
    }
    sched::kick(vcpu, effects.kicked());
    if effects.is_kick() {
        return run::go_on(vcpu);
    }
    finish_more(vcpu, effects)
}

/// Does what is more than a kick.
#[inline(never)]
fn finish_more(vcpu: &'static Vcpu, effects: Effects) -> &'static Context {
    if effects.has_output() {
        host::guest_output(vcpu.vm);
    }
    if effects.has_alarm() {
        sched::alarm_set(vcpu.vm);
    }
    match effects.how() {
        Next::GoOn => run::go_on(vcpu),
        Next::Block => run::block(vcpu),
        Next::Stall => run::stall(vcpu),
        Next::Call => power::call(vcpu),
    }
}

/// Ends the VM: it did what cannot be answered.
#[cold]
fn fail(vcpu: &'static Vcpu, why: fmt::Arguments<'_>) -> &'static Context {
    let reason = format!(
        "vCPU {} at {:#x}: {why}",
        vcpu.index.index(),
        vcpu.context.pc()
    );
    // It runs, so it can be ended.
    let _ = lifecycle::request(vcpu.vm, Transition::Fail, &reason);
    run::go_on(vcpu)
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
    let answer = match syndrome.class() {
        0x16 => Ok(hypercall::hvc(vcpu)),
        0x24 => abort::data(vcpu, syndrome),
        0x18 => Ok(sysreg::access(vcpu, syndrome)),
        0x01 => Ok(wait(vcpu, syndrome)),
        0x20 => abort::instruction(vcpu, syndrome),
        0x17 => Ok(hypercall::smc(vcpu)),
        _ => Ok(undefined(vcpu, syndrome)),
    };
    match answer {
        Ok(effects) => finish(vcpu, effects),
        Err(failure) => fail(vcpu, format_args!("{failure}")),
    }
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
    run::go_on(vcpu)
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
    fail(vcpu, format_args!("SError, ESR {:#x}", syndrome.0))
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
    fail(
        vcpu,
        format_args!("it ran AArch32 code, which its CPU does not have"),
    )
}
