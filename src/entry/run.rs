//! What a CPU does between two guests, and when none wants to run.
//!
//! Idling is work: jobs (`task::job`) take bounded steps between looks for an interrupt. Busy
//! CPUs take a step at each tick while there are jobs.

use super::interrupt;
use crate::arch::{barrier, exception, gic, timer};
use crate::control::lifecycle;
use crate::host;
use crate::platform;
use crate::sched::{self, Decision, SCHEDULER};
use crate::task::job::{self, Found};
use crate::vm::vcpu::{Context, Vcpu};

/// The end of every exit: the same vCPU goes on unless something else is to be done.
#[inline]
pub fn go_on(vcpu: &'static Vcpu) -> &'static Context {
    if !vcpu.entity.requests.any() {
        return &vcpu.context;
    }
    attend(vcpu)
}

#[inline(never)]
fn attend(vcpu: &'static Vcpu) -> &'static Context {
    match sched::attend(vcpu) {
        Decision::GoOn | Decision::Rearm => &vcpu.context,
        Decision::Left => left(vcpu),
    }
}

/// The vCPU waits for an interrupt.
pub fn block(vcpu: &'static Vcpu) -> &'static Context {
    sched::block(vcpu);
    left(vcpu)
}

/// The vCPU may dirty no page for now.
#[inline(never)]
pub fn stall(vcpu: &'static Vcpu) -> &'static Context {
    match SCHEDULER.stall(vcpu) {
        Decision::GoOn | Decision::Rearm => go_on(vcpu),
        Decision::Left => left(vcpu),
    }
}

/// The vCPU turned itself off.
pub fn turn_off(vcpu: &'static Vcpu) -> &'static Context {
    sched::turn_off(vcpu);
    left(vcpu)
}

/// A vCPU left its CPU, which takes the next one.
fn left(vcpu: &'static Vcpu) -> &'static Context {
    lifecycle::vcpu_left(vcpu.vm);
    next()
}

/// Finds what to run next, idling until there is something.
fn next() -> &'static Context {
    loop {
        interrupt::take_all();
        // Of whoever left a CPU, and of the jobs.
        host::tell();
        if let Some(vcpu) = sched::pick() {
            return &vcpu.context;
        }
        if job::visit(timer::now()) == Found::Nothing && !gic::interrupt_pending() {
            barrier::wfi();
        }
    }
}

/// The end of a CPU's bring-up: it looks for work for good.
pub fn forever() -> ! {
    let interrupts = platform::interrupts();
    for intid in [
        interrupts.hypervisor_timer,
        interrupts.virtual_timer,
        interrupts.maintenance,
    ] {
        platform::gic().enable_private(intid);
    }
    exception::enter_first(next())
}
