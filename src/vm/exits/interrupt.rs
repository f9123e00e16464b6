//! Physical interrupts, taken from a guest or while idle.

use crate::arch::gic;
use crate::board;
use crate::channel;
use crate::sched::{self, meter};
use log::warn;
use tidemark_devices::vgic::Link;
use tidemark_devices::virt;
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
    let interrupts = board::interrupts();
    gic::drop_priority(intid);
    if intid == interrupts.virtual_timer {
        // Stays active until the guest ends it, or its vCPU is unloaded.
        virtual_timer(intid);
        return;
    }
    gic::deactivate(intid);
    if intid == sched::KICK {
        sched::called();
    } else if intid == interrupts.hypervisor_timer {
        sched::tick();
    } else if intid == interrupts.maintenance {
        if let Some(vcpu) = sched::current() {
            sched::sync_always(vcpu);
        }
    } else if intid == interrupts.uart {
        meter::metered(Task::Stretch, channel::interrupt);
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
    let kick = vcpu.vm.vgic.raise_ppi(
        vcpu.index,
        virt::VIRTUAL_TIMER,
        Link::Hardware(intid as u16),
    );
    sched::kick(vcpu, kick);
    sched::wake(vcpu);
}
