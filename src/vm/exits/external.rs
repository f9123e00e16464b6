//! The abort that a guest gets of an access to nothing.

use super::walk;
use crate::arch::el1;
use crate::arch::exception::Syndrome;
use crate::vm::vcpu::Vcpu;

const S1PTW: u64 = 1 << 7;
const WRITE: u64 = 1 << 6;

/// Nothing is there: a synchronous external abort, as the bus would give it.
pub fn abort(vcpu: &'static Vcpu, syndrome: Syndrome) {
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
}
