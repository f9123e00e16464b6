//! What the fake target answers to requests for memory slots.

use tidemark_wire::message::{ErrorReply, Request, Response, SlotAccess};
use tidemark_wire::{HOT_SLOT_FIRST, PAGE_SIZE};

use super::Target;
use super::vm::Slot;

impl Target {
    pub fn answer_slot<'b>(&mut self, request: &Request<'_>) -> Result<Response<'b>, ErrorReply> {
        match *request {
            Request::SlotAdd {
                vm,
                slot,
                base_ipa,
                bytes,
            } => {
                let vm = self.vm(vm)?;
                let end = base_ipa + bytes;
                for other in &vm.slots {
                    let same = other.base_ipa == base_ipa && other.pages() * PAGE_SIZE == bytes;
                    match (other.id == slot, same) {
                        (true, true) => return Ok(Response::Ok),
                        (true, false) => return Err(ErrorReply::SlotExists),
                        _ => {}
                    }
                    let other_end = other.base_ipa + other.pages() * PAGE_SIZE;
                    if other.base_ipa < end && base_ipa < other_end {
                        return Err(ErrorReply::SlotOverlap { slot: other.id });
                    }
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                let pages = (bytes / PAGE_SIZE) as usize;
                let mut new = Slot::new(slot.0, base_ipa, pages, SlotAccess::ReadWrite);
                new.memory.fill(0);
                vm.slots.push(new);
                Ok(Response::Ok)
            }
            Request::SlotDelete { vm, slot } => {
                let vm = self.vm(vm)?;
                if slot.0 < HOT_SLOT_FIRST {
                    return Err(ErrorReply::SlotNumber);
                }
                if vm.slots.iter().all(|other| other.id != slot) {
                    return match vm.last_deleted == Some(slot) {
                        true => Ok(Response::Ok),
                        false => Err(ErrorReply::NoSuchSlot),
                    };
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                vm.slots.retain(|other| other.id != slot);
                vm.last_deleted = Some(slot);
                Ok(Response::Ok)
            }
            _ => Err(ErrorReply::Malformed),
        }
    }
}
