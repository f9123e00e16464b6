//! Accesses without a syndrome (ISS.ISV 0): with write-back, of a pair, of SIMD&FP registers. The instruction is read through
//! the guest's own stage 1, decoded (`crates/a64`) and done.
//!
//! Other vCPUs may change the tables and the code meanwhile, so what is read need not be what faulted. It is believed if it
//! can have caused this abort: it goes the same way (ISS.WnR), and FAR_EL2 lies in the bytes that it is about, with the registers
//! as they are. Otherwise the guest goes back and runs what is there now. The device's address is the one that
//! faulted (HPFAR_EL2), so whatever is read, no other page is accessed than the guest's own translation gave it.
//!
//! Not done, and then an external abort as nothing were there (KVM does so with all of them): exclusives and atomics, DC ZVA, and an
//! access that leaves its page.

use super::external;
use crate::arch::exception::Syndrome;
use crate::arch::{el1, vector};
use crate::vm::count;
use crate::vm::vcpu::Vcpu;
use tidemark_a64::{self as a64, Access, Direction, Endianness, Register, Registers};
use tidemark_devices::AccessSize;

/// ISS.WnR.
const WRITE: u64 = 1 << 6;

/// What became of an access.
enum Emulated {
    /// It is done and the instruction over.
    Done,
    /// The instruction is not there any more: the guest is to go on with what is.
    Changed,
    /// It cannot be done here.
    Refused,
}

/// Does the access that the guest aborted on, in the page at `page`, by its instruction; has it tried again; or aborts it as
/// nothing were there.
///
/// `bus` gets each of its accesses, at most [`a64::MAX_ELEMENTS`]: (IPA, size, a store's value), and gives what is loaded.
#[cold]
#[inline(never)]
pub fn access(
    vcpu: &'static Vcpu,
    syndrome: Syndrome,
    page: u64,
    bus: impl FnMut(u64, AccessSize, Option<u64>) -> u64,
) {
    let direction = if syndrome.0 & WRITE != 0 {
        Direction::Store
    } else {
        Direction::Load
    };
    match emulate(vcpu, direction, page, bus) {
        Emulated::Done | Emulated::Changed => {}
        Emulated::Refused => external::abort(vcpu, syndrome),
    }
}

fn emulate(
    vcpu: &'static Vcpu,
    direction: Direction,
    page: u64,
    mut bus: impl FnMut(u64, AccessSize, Option<u64>) -> u64,
) -> Emulated {
    let Some(word) = fetch(vcpu) else {
        return Emulated::Changed;
    };
    let Some(access) = Access::decode(word) else {
        return match a64::accesses_memory(word) {
            true => Emulated::Refused,
            false => Emulated::Changed,
        };
    };
    let mut registers = Guest(vcpu);
    let address = access.address(&registers);
    let bytes = u64::from(access.bytes());
    // Less what may be a tag (TCR_EL1.TBI), which FAR need not show.
    let reached = el1::far().wrapping_sub(address) << 8 >> 8;
    if access.direction != direction || reached >= bytes {
        return Emulated::Changed;
    }
    let first = address & 0xfff;
    if first + bytes > 0x1000 {
        return Emulated::Refused;
    }
    count(&vcpu.vm.counters.mmio);
    let endianness = match el1::is_big_endian(vcpu.context.pstate()) {
        true => Endianness::Big,
        false => Endianness::Little,
    };
    access.perform(&mut registers, endianness, |element, value| {
        let ipa = page | (first + u64::from(element.offset));
        let size = AccessSize::from_sas(u64::from(element.size.log2()));
        bus(ipa, size, value)
    });
    vcpu.context.skip_instruction();
    Emulated::Done
}

/// The word at the guest's PC, as stage 1 has it now. EL1 may read whatever can be executed: there are no other permissions
/// without FEAT_S1PIE, which guests do not have.
fn fetch(vcpu: &Vcpu) -> Option<u32> {
    let pc = vcpu.context.pc();
    let ipa = el1::translate(pc)? | pc & 0xfff;
    let words = vcpu.vm.memory.word(ipa & !7)?;
    // Instructions are little-endian always.
    Some((words >> (8 * (ipa & 4))) as u32)
}

/// The registers of the guest that just left this CPU.
struct Guest(&'static Vcpu);

impl Registers for Guest {
    fn x(&self, register: Register) -> u64 {
        self.0.context.x(register.number())
    }

    fn set_x(&mut self, register: Register, value: u64) {
        self.0.context.set_x(register.number(), value);
    }

    fn sp(&self) -> u64 {
        el1::stack_pointer(self.0.context.pstate())
    }

    fn set_sp(&mut self, value: u64) {
        el1::set_stack_pointer(self.0.context.pstate(), value);
    }

    fn v(&self, register: Register) -> u128 {
        vector::read(register.number())
    }

    fn set_v(&mut self, register: Register, value: u128) {
        vector::write(register.number(), value);
    }
}
