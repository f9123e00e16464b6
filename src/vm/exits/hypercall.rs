//! HVC and SMC: PSCI and the SMC calling convention, by either instruction.

use super::Next;
use crate::sched;
use crate::vm::lifecycle;
use crate::vm::vcpu::{Run, Vcpu};
use crate::vm::{Wish, count, random};
use tidemark_devices::psci::{self, Call, EntryPoint, Status};
use tidemark_devices::trng;

/// HVC: the return address is past the instruction already.
#[inline(always)]
pub fn hvc(vcpu: &'static Vcpu) -> Next {
    count(&vcpu.vm.counters.hypercalls);
    let context = &vcpu.context;
    let call = psci::decode([context.x(0), context.x(1), context.x(2), context.x(3)]);
    if let Call::Answer(value) = call {
        context.set_x(0, value);
        return Next::GoOn;
    }
    power(vcpu, call)
}

/// SMC: trapped, so the return address is the instruction's own.
#[inline(never)]
pub fn smc(vcpu: &'static Vcpu) -> Next {
    vcpu.context.skip_instruction();
    hvc(vcpu)
}

#[inline(never)]
fn power(vcpu: &'static Vcpu, call: Call) -> Next {
    let answer = |status: Status| vcpu.context.set_x(0, status.register());
    let vm = vcpu.vm;
    match call {
        Call::Answer(value) => vcpu.context.set_x(0, value),
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
            let Some(target) = target else {
                answer(psci::cpu_on(None, place));
                return Next::GoOn;
            };
            // Under the target's lock: two callers cannot both start it.
            let mut run = target.run.lock();
            let state = match *run {
                Run::Off => psci::PowerState::Off,
                Run::Starting => psci::PowerState::OnPending,
                _ => psci::PowerState::On,
            };
            let status = psci::cpu_on(Some(state), place);
            if status == Status::Success {
                target.reset(entry, context);
                sched::make_ready(target, &mut run);
            }
            drop(run);
            answer(status);
        }
        Call::CpuOff => return Next::Off,
        Call::Standby | Call::PowerDown { .. } => {
            answer(Status::Success);
            return Next::Block;
        }
        Call::AffinityInfo { target, level } => {
            let states = vm.vcpus().iter().map(Vcpu::power);
            vcpu.context
                .set_x(0, psci::affinity_info(target, level, states));
        }
        Call::Trng(_) if !random::is_entropy() => answer(Status::NotSupported),
        Call::Trng(call) => {
            let values = match call {
                trng::Call::Answer(values) => values,
                trng::Call::Random(request) => request.answer(vm.random.lock().bytes()),
            };
            for (register, value) in values.into_iter().enumerate() {
                vcpu.context.set_x(register, value);
            }
        }
        Call::SystemOff => {
            // It runs, so it can be stopped.
            let _ = lifecycle::wish(vm, Wish::Stop, "it turned itself off");
        }
        Call::SystemReset => {
            let _ = lifecycle::wish(vm, Wish::Reset, "it restarted itself");
        }
    }
    Next::GoOn
}
