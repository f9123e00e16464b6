//! The bundle of guests, where the boot loader put it: read at boot, and again at every
//! restart of a guest.

use super::memory::GuestMemory;
use super::{Vm, publish};
use crate::memory::Range;
use alloc::vec::Vec;
use log::{error, info};
use spin::Once;
use tidemark_wire::bundle::{Boot, Bundle, WhenAllStopped};
use tidemark_wire::message::VmId;

static BUNDLE: Once<Bundle<'static>> = Once::new();

/// The bundle, once it was read.
pub fn get() -> Option<&'static Bundle<'static>> {
    BUNDLE.get()
}

/// Reads the bundle and makes its VMs. What is wrong with it is said, and no guest is made.
///
/// Gives what the manifest wants when all guests have ended.
pub fn read(place: Option<Range>) -> WhenAllStopped {
    let Some(place) = place else {
        info!(
            "no bundle of guests was handed over (QEMU: -initrd FILE; `tidectl bundle` makes one)"
        );
        return WhenAllStopped::default();
    };
    // SAFETY: the range is memory that the boot loader filled and the frame allocator never
    // got; it is mapped, and nothing writes it.
    let bytes =
        unsafe { core::slice::from_raw_parts(place.start as *const u8, place.size() as usize) };
    let bundle = match Bundle::parse(bytes) {
        Ok(bundle) => bundle,
        Err(error) => {
            error!("bundle: {error}; no guest is started");
            return WhenAllStopped::default();
        }
    };
    let bundle = BUNDLE.call_once(|| bundle);
    let mut vms = Vec::new();
    for (id, spec) in (0u16..).zip(&bundle.manifest().vms) {
        let flash = match &spec.boot {
            Boot::Firmware { image } => image.len,
            Boot::Kernel { .. } => 0,
        };
        // VMID 0 is the hardware's out of reset; VMs count from 1.
        match GuestMemory::new(id + 1, spec.memory_bytes, flash) {
            Ok(memory) => {
                info!(
                    "{}: {} vCPUs, {} MiB",
                    spec.name,
                    spec.vcpus,
                    spec.memory_bytes >> 20
                );
                vms.push(Vm::new(VmId(id), spec.clone(), memory));
            }
            Err(error) => {
                error!(
                    "{}: {error}; it and the guests after it are left out",
                    spec.name
                );
                break;
            }
        }
    }
    for vm in &vms {
        for vcpu in vm.vcpus() {
            crate::sched::adopt(vcpu);
        }
    }
    publish(vms.into_boxed_slice());
    bundle.manifest().machine.when_all_stopped
}
