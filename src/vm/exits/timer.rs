//! The guest's physical timer (CNTP), emulated: EL2 keeps the hardware's for itself. The
//! virtual timer (CNTV) is the guest's own and does not trap.

use crate::arch::timer;
use crate::vm::vcpu::Vcpu;
use core::sync::atomic::Ordering::Relaxed;
use tidemark_devices::guest_time;
use tidemark_devices::vgic::{Kick, Link};
use tidemark_devices::virt::PHYSICAL_TIMER;
use tidemark_sched::Request;

const ENABLE: u64 = 1;
const MASK: u64 = 2;
const FIRED: u64 = 4;

/// Which of the three registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// CNTP_TVAL_EL0.
    Value,
    /// CNTP_CTL_EL0.
    Control,
    /// CNTP_CVAL_EL0.
    Compare,
}

/// CNTPCT_EL0, which traps after the guest's time stood still.
pub fn physical_counter(vcpu: &Vcpu) -> u64 {
    count(vcpu, timer::now())
}

fn count(vcpu: &Vcpu, now: u64) -> u64 {
    guest_time::counter(now, vcpu.vm.physical_offset.load(Relaxed))
}

/// Reads one.
pub fn read(vcpu: &'static Vcpu, register: Register) -> (u64, Kick) {
    let now = timer::now();
    // What ISTATUS says the controller has been told: EL2's own timer may come a little later.
    let kick = fire_physical(vcpu, now).unwrap_or_default();
    let state = *vcpu.physical_timer.lock();
    let count = count(vcpu, now);
    let value = match register {
        Register::Value => state.compare.wrapping_sub(count) & 0xffff_ffff,
        Register::Control => {
            let fired = state.control & ENABLE != 0 && count >= state.compare;
            state.control | if fired { FIRED } else { 0 }
        }
        Register::Compare => state.compare,
    };
    (value, kick)
}

/// Writes one.
pub fn write(vcpu: &'static Vcpu, register: Register, value: u64) -> Kick {
    let kick = {
        let mut state = vcpu.physical_timer.lock();
        match register {
            Register::Value => {
                let count = count(vcpu, timer::now());
                state.compare = count.wrapping_add(value as i32 as i64 as u64);
            }
            Register::Control => state.control = value & (ENABLE | MASK),
            Register::Compare => state.compare = value,
        }
        state.raised = false;
        state.arm(vcpu.vm.physical_offset.load(Relaxed));
        vcpu.vm.vgic.lower_ppi(vcpu.index, PHYSICAL_TIMER)
    };
    // The timer of EL2 is set anew at the end of this exit.
    vcpu.entity.requests.make(Request::Schedule);
    kick.union(fire_physical(vcpu, timer::now()).unwrap_or_default())
}

/// Raises the interrupt if the time has come, and gives who is to be kicked then. Under the timer's lock to the end, so that the
/// line is told in the order in which it changed.
pub fn fire_physical(vcpu: &Vcpu, now: u64) -> Option<Kick> {
    let mut state = vcpu.physical_timer.lock();
    if state.deadline().is_none_or(|deadline| deadline > now) {
        return None;
    }
    // The line stays high until the guest writes a register; until then there is
    // nothing to wait for.
    state.raised = true;
    state.stop();
    let vgic = &vcpu.vm.vgic;
    Some(vgic.raise_ppi(vcpu.index, PHYSICAL_TIMER, Link::Software))
}
