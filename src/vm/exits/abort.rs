//! Stage-2 aborts: memory that is not mapped yet, a write that is tracked, a device.

use super::instruction::{self, Emulated};
use super::{Next, device, fail, walk};
use crate::arch::el1;
use crate::arch::exception::Syndrome;
use crate::arch::timer;
use crate::vm::count;
use crate::vm::flash::FLASH_END;
use crate::vm::vcpu::Vcpu;
use tidemark_a64::Direction;
use tidemark_devices::AccessSize;
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
pub fn data(vcpu: &'static Vcpu, syndrome: Syndrome) -> Next {
    let page = el1::faulting_ipa();
    if el1::may_report_stage2_first() && is_stage1s(vcpu, syndrome) {
        return Next::GoOn;
    }
    // One comparison for all of it: a translation fault with a syndrome, by a little-endian guest. A big-endian
    // one's are done as if they had no syndrome, so that the others pay for no more than this.
    let both = syndrome.0 | el1::sctlr() << BESIDE;
    let asked = S1PTW | VALID_SYNDROME | 0x3c | el1::ENDIANNESS << BESIDE;
    if both & asked == VALID_SYNDROME | 0x04
        && let Some(device) = virt::decode(page | el1::far() & 0xfff)
    {
        return device::access(vcpu, syndrome, device);
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
pub fn instruction(vcpu: &'static Vcpu, syndrome: Syndrome) -> Next {
    memory(vcpu, syndrome, el1::faulting_ipa(), FaultAccess::Execute)
}

fn memory(vcpu: &'static Vcpu, syndrome: Syndrome, page: u64, access: FaultAccess) -> Next {
    let kind = match syndrome.0 & 0x3c {
        0x04 => FaultKind::Translation,
        0x08 => FaultKind::AccessFlag,
        0x0c => FaultKind::Permission,
        _ => return other(vcpu, syndrome),
    };
    let walk = syndrome.0 & S1PTW != 0;
    let page = if kind == FaultKind::Permission && !walk {
        // HPFAR_EL2 says nothing then.
        let Some(page) = el1::translate(el1::far()) else {
            return Next::GoOn;
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
        return Next::Stall;
    }
    match vcpu.vm.memory.stage2().handle_fault(fault) {
        Outcome::Resume | Outcome::Retry => Next::GoOn,
        Outcome::Dirtied(level) => {
            // Looked up anew, so that nothing is kept over the call.
            if vcpu.vm.quota.is_set() {
                charge(vcpu, level);
            }
            Next::GoOn
        }
        Outcome::NotMemory | Outcome::ReadOnly if is_maintenance(syndrome) && !walk => {
            // There is nothing cached of what is not memory, and nothing dirty of a ROM. (AT has
            // ISS.CM too, but its aborts are about a walk.)
            vcpu.context.skip_instruction();
            Next::GoOn
        }
        Outcome::NotMemory | Outcome::ReadOnly if page < FLASH_END => {
            device::flash(vcpu, syndrome, page, access).unwrap_or_else(|| external(vcpu, syndrome))
        }
        Outcome::NotMemory
            if access != FaultAccess::Execute
                && !walk
                && let Some(device) = device::at(vcpu.vm, page | el1::far() & 0xfff) =>
        {
            if access == FaultAccess::Read {
                device::prepare_load(vcpu, device);
            }
            without_syndrome(vcpu, syndrome, page, |ipa, size, value| {
                device::bus(vcpu, ipa, size, value)
            })
        }
        Outcome::NotMemory | Outcome::ReadOnly => external(vcpu, syndrome),
        Outcome::OutOfTables => {
            fail(vcpu, "no memory is left for its translation tables");
            Next::GoOn
        }
    }
}

/// An access that the instruction alone tells of: done on `bus`, tried again, or an abort as nothing were there.
#[cold]
#[inline(never)]
pub fn without_syndrome(
    vcpu: &'static Vcpu,
    syndrome: Syndrome,
    page: u64,
    bus: impl FnMut(u64, AccessSize, Option<u64>) -> u64,
) -> Next {
    let direction = if syndrome.0 & WRITE != 0 {
        Direction::Store
    } else {
        Direction::Load
    };
    match instruction::emulate(vcpu, direction, page, bus) {
        Emulated::Done | Emulated::Changed => Next::GoOn,
        Emulated::Refused => external(vcpu, syndrome),
    }
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
fn other(vcpu: &'static Vcpu, syndrome: Syndrome) -> Next {
    match syndrome.0 & 0x3f {
        // TLB conflict: drop everything of this VMID (Arm ARM I_JCCRT), and try again. Another CPU's
        // TLB is another matter.
        0x30 => {
            crate::arch::tlb::vmalls12e1();
            crate::arch::barrier::dsb_nsh();
            Next::GoOn
        }
        _ => external(vcpu, syndrome),
    }
}

/// Nothing is there: a synchronous external abort, as the bus would give it.
pub fn external(vcpu: &'static Vcpu, syndrome: Syndrome) -> Next {
    const EXTERNAL: u64 = 0x10;
    const EXTERNAL_ON_WALK: u64 = 0x14;
    const CACHE: u64 = 1 << 8;
    log::debug!(
        "{}: vCPU {}: {syndrome}, IPA {:#x}, at {:#x}: nothing there",
        vcpu.vm.name(),
        vcpu.index.index(),
        el1::faulting_ipa() | el1::far() & 0xfff,
        vcpu.context.pc()
    );
    let from_el0 = vcpu.context.pstate() & 0xf == 0;
    let class = match (syndrome.class(), from_el0) {
        (0x20, true) => 0x20,
        (0x20, false) => 0x21,
        (_, true) => 0x24,
        (_, false) => 0x25,
    };
    let on_walk = (syndrome.0 & S1PTW != 0)
        .then(|| walk::level(&vcpu.vm.memory, el1::far(), el1::faulting_ipa()))
        .flatten();
    let status = on_walk.map_or(EXTERNAL, |level| EXTERNAL_ON_WALK + level);
    // ISS.CM is a data abort's.
    let kept = if syndrome.class() == 0x20 {
        0
    } else {
        WRITE | CACHE
    };
    let esr = class << 26 | 1 << 25 | syndrome.0 & kept | status;
    el1::inject_sync(&vcpu.context, esr, Some(el1::far()));
    Next::GoOn
}
