//! Trapped system registers.

use super::timer::{self, Register};
use super::{Effects, undefined};
use crate::arch::exception::Syndrome;
use crate::arch::{el1, gic};
use crate::vm::vcpu::Vcpu;
use crate::vm::{count, id_registers, stage2};
use tidemark_devices::vgic::SgiRegister;

/// Which way a trapped MRS or MSR goes (ISS bit 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

/// Does what a trapped MRS or MSR says (ISS: op0 21:20, op2 19:17, op1 16:14, CRn 13:10,
/// Rt 9:5, CRm 4:1).
pub fn access(vcpu: &'static Vcpu, syndrome: Syndrome) -> Effects {
    count(&vcpu.vm.counters.others);
    let iss = syndrome.0;
    if iss & REGISTER == WRITES_ICC_SGI1R_EL1 {
        // Before the others are told apart: the only register here that guests access all the time.
        vcpu.context.skip_instruction();
        return send_sgi(vcpu, iss, SgiRegister::Group1);
    }
    let bits = |shift: u32, mask: u64| (iss >> shift & mask) as u8;
    let register = (
        bits(20, 3),
        bits(14, 7),
        bits(10, 15),
        bits(1, 15),
        bits(17, 7),
    );
    let rt = (iss >> 5 & 0x1f) as usize;
    let way = if iss & 1 == 1 { Way::Read } else { Way::Write };
    let context = &vcpu.context;
    let value = || context.x(rt);
    let mut effects = Effects::NONE;
    match (register, way) {
        ((3, 0, 12, 11, 6), Way::Write) => {
            effects = send_sgi(vcpu, iss, SgiRegister::AliasGroup1);
        }
        ((3, 0, 12, 11, 7), Way::Write) => {
            effects = send_sgi(vcpu, iss, SgiRegister::Group0);
        }
        ((3, 0, 0, crm @ 1..=7, op2), Way::Read) => {
            let pa_range = pa_range(stage2::features().1);
            context.set_x(rt, id_registers::read(crm, op2, pa_range));
        }
        ((3, 3, 14, 2, op2 @ 0..=2), way) => {
            let which = match op2 {
                0 => Register::Value,
                1 => Register::Control,
                _ => Register::Compare,
            };
            effects = Effects::kick(match way {
                Way::Read => {
                    let (value, kick) = timer::read(vcpu, which);
                    context.set_x(rt, value);
                    kick
                }
                Way::Write => timer::write(vcpu, which, value()),
            });
        }
        // ICC_DIR_EL1: it traps while something is active that is in no list register. With EOImode 0 it does nothing.
        ((3, 0, 12, 11, 1), Way::Write) if gic::splits_ends() => {
            let intid = value() as u32 & 0xff_ffff;
            effects = Effects::kick(vcpu.vm.vgic.deactivate(vcpu.index, intid));
        }
        ((3, 0, 12, 11, 1), Way::Write) => {}
        // ICC_CTLR_EL1, ICC_PMR_EL1, ICC_RPR_EL1 trap with it where it does not alone.
        ((3, 0, 12, 12, 4), Way::Read) => context.set_x(rt, gic::virtual_control()),
        ((3, 0, 12, 12, 4), Way::Write) => gic::set_virtual_control(value()),
        ((3, 0, 4, 6, 0), Way::Read) => context.set_x(rt, gic::virtual_mask()),
        ((3, 0, 4, 6, 0), Way::Write) => gic::set_virtual_mask(value()),
        ((3, 0, 12, 11, 3), Way::Read) => context.set_x(rt, gic::virtual_running_priority()),
        // CNTPCT_EL0, CNTPCTSS_EL0
        ((3, 3, 14, 0, 1 | 5), Way::Read) => context.set_x(rt, timer::physical_counter(vcpu)),
        // ICC_SRE_EL1: system registers, no bypass, for good.
        ((3, 0, 12, 12, 5), Way::Read) => context.set_x(rt, 7),
        ((3, 0, 12, 12, 5), Way::Write) => {}
        // MDSCR_EL1: single-stepping a guest's own programs works.
        ((2, 0, 0, 2, 2), Way::Read) => context.set_x(rt, el1::mdscr()),
        ((2, 0, 0, 2, 2), Way::Write) => el1::set_mdscr(value()),
        // OSLSR_EL1: the OS lock is there (OSLM = 0b10) and not locked.
        ((2, 0, 1, 1, 4), Way::Read) => context.set_x(rt, 1 << 3),
        // Breakpoints, watchpoints, OS lock: they have no effect; and ACTLR_EL1.
        ((2, 0 | 3, ..) | (3, 0, 1, 0, 1), Way::Read) => context.set_x(rt, 0),
        ((2, 0 | 3, ..) | (3, 0, 1, 0, 1), Way::Write) => {}
        _ => return undefined(vcpu, syndrome),
    }
    context.skip_instruction();
    effects
}

/// What of the ISS names the register and the way.
const REGISTER: u64 = 0x3f_fc1f;
/// op0 3, op2 5, op1 0, CRn 12, CRm 11.
const WRITES_ICC_SGI1R_EL1: u64 = 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1;

/// Does what an MSR to an SGI register says.
#[inline]
fn send_sgi(vcpu: &'static Vcpu, iss: u64, register: SgiRegister) -> Effects {
    let value = vcpu.context.x((iss >> 5 & 0x1f) as usize);
    let kick = vcpu.vm.vgic.sgi(vcpu.index, value, register);
    let others = kick.without(vcpu.index);
    Effects::kick(match kick.contains(vcpu.index) {
        // At once: its own interrupt is nearly all there is to be seen to.
        true => others.union(vcpu.sync()),
        false => others,
    })
}

/// ID_AA64MMFR0_EL1.PARange for an address space this wide.
fn pa_range(bits: u8) -> u64 {
    match bits {
        0..36 => 0,
        36..40 => 1,
        40..42 => 2,
        42..44 => 3,
        44..48 => 4,
        _ => 5,
    }
}
