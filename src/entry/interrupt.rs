//! Physical interrupts, taken from a guest or while idle.

use crate::arch::timer::NEVER;
use crate::arch::{gic, timer};
use crate::host;
use crate::platform;
use crate::sched::{self, SCHEDULER};
use crate::task::job;
use crate::task::meter;
use crate::vm::exits;
use crate::vm::exits::device;
use core::sync::atomic::Ordering::Relaxed;
use log::warn;
use tidemark_wire::message::Task;

/// More than this many at once are left to the next exit.
const MOST: usize = 16;

/// Takes and handles what is pending on this CPU.
pub fn take_all() {
    for _ in 0..MOST {
        let Some(intid) = gic::acknowledge() else {
            return;
        };
        handle(intid);
    }
}

fn handle(intid: u32) {
    let interrupts = platform::interrupts();
    gic::drop_priority(intid);
    if intid == interrupts.virtual_timer {
        // Stays active until the guest ends it, or its vCPU is unloaded.
        virtual_timer(intid);
        return;
    }
    gic::deactivate(intid);
    if intid == sched::KICK {
        SCHEDULER.kicked();
    } else if intid == interrupts.hypervisor_timer {
        tick();
        host::tell();
    } else if intid == interrupts.maintenance {
        if let Some(vcpu) = sched::current() {
            sched::sync_always(vcpu);
        }
    } else if intid == interrupts.uart {
        meter::metered(Task::Stretch, || {
            host::interrupt();
            host::tell();
        });
    } else {
        warn!("interrupt {intid} is nobody's");
    }
}

/// The virtual timer of the vCPU that is loaded here, running or waiting.
fn virtual_timer(intid: u32) {
    let Some(vcpu) = sched::current() else {
        gic::deactivate(intid);
        return;
    };
    sched::kick(vcpu, vcpu.virtual_timer_fired(intid));
    SCHEDULER.wake(vcpu);
}

/// EL2's timer fired: time slices, sleepers, emulated timers, jobs.
fn tick() {
    sched::timer_fired();
    let now = timer::now();
    if let Some(loaded) = sched::current()
        && let Some(kick) = exits::timer::fire_physical(loaded, now)
    {
        sched::kick(loaded, kick);
        SCHEDULER.wake(loaded);
    }
    for vcpu in sched::due(now) {
        if vcpu.alarm() <= now {
            let effects = device::alarm(vcpu.vm);
            sched::raise(vcpu.vm, effects.kicked());
            if effects.has_alarm() {
                sched::alarm_set(vcpu.vm);
            }
        }
        if vcpu.deadline.load(Relaxed) <= now {
            vcpu.deadline.store(NEVER, Relaxed);
            if let Some(kick) = exits::timer::fire_physical(vcpu, now) {
                sched::kick(vcpu, kick);
            }
            SCHEDULER.wake(vcpu);
        }
        if vcpu.entity.stall_end() <= now {
            SCHEDULER.ask_again(vcpu);
        }
    }
    job::begin_due(now);
    if job::waiting() {
        let _ = job::visit(now);
    }
}
