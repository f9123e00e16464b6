//! Stage-2 aborts: memory that is not mapped yet, a write that is tracked, a device.

use super::{Answer, Effects, Failure, Next, device, external, instruction};
use crate::arch::el1;
use crate::arch::exception::Syndrome;
use crate::arch::timer;
use crate::vm::count;
use crate::vm::flash::FLASH_END;
use crate::vm::vcpu::Vcpu;
use alloc::boxed::Box;
use tidemark_devices::virt;
use tidemark_stage2::{
    Count, Fault, FaultAccess, FaultKind, GuestVa, Ipa, Level, Outcome, Verdict,
};

const S1PTW: u64 = 1 << 7;
const WRITE: u64 = 1 << 6;
const FAR_NOT_VALID: u64 = 1 << 10;
const VALID_SYNDROME: u64 = 1 << 24;
/// Where SCTLR_EL1's endianness is put beside a syndrome, of which bits 63:56 are RES0.
const BESIDE: u32 = 32;

/// A data abort from a guest.
#[inline]
pub fn data(vcpu: &'static Vcpu, syndrome: Syndrome) -> Answer {
    let page = el1::faulting_ipa();
    if el1::may_report_stage2_first() && is_stage1s(vcpu, syndrome) {
        return Ok(Effects::NONE);
    }
    // One comparison for all of it: a translation fault with a syndrome, by a little-endian guest. A big-endian
    // one's are done as if they had no syndrome, so that the others pay for no more than this.
    let both = syndrome.0 | el1::sctlr() << BESIDE;
    let asked = S1PTW | VALID_SYNDROME | 0x3c | el1::ENDIANNESS << BESIDE;
    if both & asked == VALID_SYNDROME | 0x04
        && let Some(device) = virt::decode(page | el1::far() & 0xfff)
    {
        return Ok(device::access(vcpu, syndrome, device));
    }
    let access = if syndrome.0 & WRITE != 0 {
        FaultAccess::Write
    } else {
        FaultAccess::Read
    };
    memory(vcpu, syndrome, page, access)
}

/// Whether the translation fault of a load is stage 1's in truth (Cortex-A57 834220, across the end of a page). Sent
/// back, the guest takes that one.
#[cold]
#[inline(never)]
fn is_stage1s(vcpu: &'static Vcpu, syndrome: Syndrome) -> bool {
    let of_a_load = syndrome.0 & (S1PTW | WRITE) == 0 && syndrome.0 & 0x3c == 0x04;
    let by = match vcpu.context.pstate() & 0xf {
        0 => el1::Loader::El0,
        _ => el1::Loader::El1,
    };
    of_a_load && el1::stage1_forbids(el1::far(), by)
}

/// An instruction abort from a guest.
pub fn instruction(vcpu: &'static Vcpu, syndrome: Syndrome) -> Answer {
    memory(vcpu, syndrome, el1::faulting_ipa(), FaultAccess::Execute)
}

fn memory(vcpu: &'static Vcpu, syndrome: Syndrome, page: u64, access: FaultAccess) -> Answer {
    let kind = match syndrome.0 & 0x3c {
        0x04 => FaultKind::Translation,
        0x08 => FaultKind::AccessFlag,
        0x0c => FaultKind::Permission,
        _ => {
            other(vcpu, syndrome);
            return Ok(Effects::NONE);
        }
    };
    let walk = syndrome.0 & S1PTW != 0;
    let page = if kind == FaultKind::Permission && !walk {
        // HPFAR_EL2 says nothing then.
        let Some(page) = el1::translate(el1::far()) else {
            return Ok(Effects::NONE);
        };
        page
    } else {
        page
    };
    // A walk that may not do what it wants wants to write: stage 2 never forbids reading
    // (the guest's hardware updates its own descriptors, invariant 12).
    let access = if walk && kind == FaultKind::Permission {
        FaultAccess::Write
    } else {
        access
    };
    let fault = Fault {
        ipa: Ipa::new(page),
        access,
        kind,
        va: (!walk && syndrome.0 & FAR_NOT_VALID == 0).then(|| GuestVa::new(el1::far())),
    };
    count(&vcpu.vm.counters.faults);
    if vcpu.vm.quota.is_set() && !may_dirty(vcpu, page, access) {
        return Ok(Effects::next(Next::Stall));
    }
    let effects = match vcpu.vm.memory.stage2().handle_fault(fault) {
        Outcome::Resume | Outcome::Retry => Effects::NONE,
        Outcome::Dirtied(level) => {
            // Looked up anew, so that nothing is kept over the call.
            if vcpu.vm.quota.is_set() {
                charge(vcpu, level);
            }
            Effects::NONE
        }
        Outcome::NotMemory | Outcome::ReadOnly if is_maintenance(syndrome) && !walk => {
            // There is nothing cached of what is not memory, and nothing dirty of a ROM. (AT has
            // ISS.CM too, but its aborts are about a walk.)
            vcpu.context.skip_instruction();
            Effects::NONE
        }
        Outcome::NotMemory | Outcome::ReadOnly if page < FLASH_END => {
            device::flash(vcpu, syndrome, page, access)
                .map_err(|error| Box::new(Failure::Flash(error)))?;
            Effects::NONE
        }
        Outcome::NotMemory
            if access != FaultAccess::Execute
                && !walk
                && let Some(device) = device::at(vcpu.vm, page | el1::far() & 0xfff) =>
        {
            let mut effects = match access {
                FaultAccess::Read => device::prepare_load(vcpu, device),
                _ => Effects::NONE,
            };
            instruction::access(vcpu, syndrome, page, |ipa, size, value| {
                let (value, more) = device::bus(vcpu, ipa, size, value);
                effects = effects.and(more);
                value
            });
            effects
        }
        Outcome::NotMemory | Outcome::ReadOnly => {
            external::abort(vcpu, syndrome);
            Effects::NONE
        }
        Outcome::OutOfTables => return Err(Box::new(Failure::OutOfTables)),
    };
    Ok(effects)
}

/// Whether a vCPU with a quota may do what it faulted on: what it writes becomes dirty by it. Below RAM are flash and
/// devices, where no fault makes anything dirty.
#[cold]
#[inline(never)]
fn may_dirty(vcpu: &'static Vcpu, page: u64, access: FaultAccess) -> bool {
    let write = access == FaultAccess::Write && page >= virt::RAM_BASE;
    let limit = vcpu.vm.quota.limit().filter(|_| write);
    limit.is_none_or(|limit| vcpu.meter.admit(limit, Count(timer::now())) == Verdict::Go)
}

/// Notes what a fault dirtied that was let through.
#[cold]
#[inline(never)]
fn charge(vcpu: &'static Vcpu, level: Level) {
    if let Some(limit) = vcpu.vm.quota.limit() {
        vcpu.meter.charge(limit, level.pages(), Count(timer::now()));
    }
}

/// A data abort of cache maintenance (ISS.CM).
fn is_maintenance(syndrome: Syndrome) -> bool {
    matches!(syndrome.class(), 0x24 | 0x25) && syndrome.0 & 1 << 8 != 0
}

/// Aborts that are not faults of stage 2.
fn other(vcpu: &'static Vcpu, syndrome: Syndrome) {
    match syndrome.0 & 0x3f {
        // TLB conflict: drop everything of this VMID (Arm ARM I_JCCRT), and try again. Another CPU's
        // TLB is another matter.
        0x30 => {
            crate::arch::tlb::vmalls12e1();
            crate::arch::barrier::dsb_nsh();
        }
        _ => external::abort(vcpu, syndrome),
    }
}
