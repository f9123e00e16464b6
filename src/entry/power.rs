//! PSCI calls that are about other vCPUs or the whole VM.

use super::run;
use crate::control::lifecycle;
use crate::sched::SCHEDULER;
use crate::vm::exits::hypercall;
use crate::vm::vcpu::{self, Context, Vcpu};
use tidemark_devices::psci::{self, Call, EntryPoint, Status};
use tidemark_sched::Transition;

/// Does what the registers of `vcpu` ask for.
#[inline(never)]
pub fn call(vcpu: &'static Vcpu) -> &'static Context {
    let vm = vcpu.vm;
    match hypercall::call(vcpu) {
        Call::CpuOn {
            target,
            entry,
            context,
        } => {
            let target = target.and_then(|index| vm.vcpus().get(index.index()));
            let place = if vm.memory.contains(entry) {
                EntryPoint::Memory
            } else {
                EntryPoint::NotMemory
            };
            let status = match target {
                Some(target) => turn_on(target, place, entry, context),
                None => psci::cpu_on(None, place),
            };
            vcpu.context.set_x(0, status.register());
        }
        Call::CpuOff => return run::turn_off(vcpu),
        Call::SystemOff => {
            // It runs, so it can be stopped.
            let _ = lifecycle::request(vm, Transition::Stop, "it turned itself off");
        }
        Call::SystemReset => {
            let _ = lifecycle::request(vm, Transition::Reset, "it restarted itself");
        }
        // Answered in `hypercall`.
        Call::Answer(_)
        | Call::Standby
        | Call::PowerDown { .. }
        | Call::AffinityInfo { .. }
        | Call::Trng(_) => {}
    }
    run::go_on(vcpu)
}

fn turn_on(target: &'static Vcpu, place: EntryPoint, entry: u64, context: u64) -> Status {
    let mut status = Status::InternalFailure;
    let may = |run| {
        status = psci::cpu_on(Some(vcpu::power(run)), place);
        status == Status::Success
    };
    SCHEDULER.turn_on(target, may, || target.reset(entry, context));
    status
}
