//! HVC and SMC: PSCI and the SMC calling convention, by either instruction.

use super::{Effects, Next};
use crate::vm::vcpu::Vcpu;
use crate::vm::{count, random};
use tidemark_devices::psci::{self, Call, Status};
use tidemark_devices::trng;

/// HVC: the return address is past the instruction already.
#[inline(always)]
pub fn hvc(vcpu: &'static Vcpu) -> Effects {
    count(&vcpu.vm.counters.hypercalls);
    if let Call::Answer(value) = call(vcpu) {
        vcpu.context.set_x(0, value);
        return Effects::NONE;
    }
    other(vcpu)
}

/// SMC: trapped, so the return address is the instruction's own.
#[inline(never)]
pub fn smc(vcpu: &'static Vcpu) -> Effects {
    vcpu.context.skip_instruction();
    hvc(vcpu)
}

/// What its registers ask for.
#[inline(always)]
pub fn call(vcpu: &Vcpu) -> Call {
    let context = &vcpu.context;
    psci::decode([context.x(0), context.x(1), context.x(2), context.x(3)])
}

/// Calls that are not answered by their number alone.
#[inline(never)]
fn other(vcpu: &'static Vcpu) -> Effects {
    let answer = |status: Status| vcpu.context.set_x(0, status.register());
    let vm = vcpu.vm;
    match call(vcpu) {
        Call::Answer(value) => vcpu.context.set_x(0, value),
        Call::Standby | Call::PowerDown { .. } => {
            answer(Status::Success);
            return Effects::next(Next::Block);
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
        Call::CpuOn { .. } | Call::CpuOff | Call::SystemOff | Call::SystemReset => {
            return Effects::next(Next::Call);
        }
    }
    Effects::NONE
}
