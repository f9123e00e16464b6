//! The bundle of guests, where the boot loader put it: read at boot, and again at every
//! restart of a guest.

use super::memory::{FlashSize, GuestMemory};
use super::{Vm, lifecycle, loader, publish};
use crate::board::map::MemoryMap;
use crate::memory;
use alloc::string::ToString;
use alloc::vec::Vec;
use log::{error, info};
use spin::Once;
use tidemark_devices::fw_cfg::Kernel;
use tidemark_wire::bundle::{Blob, Bundle, Payload, WhenAllStopped};
use tidemark_wire::message::VmId;

static BUNDLE: Once<Bundle<'static>> = Once::new();

/// The bundle, once it was read.
pub fn get() -> Option<&'static Bundle<'static>> {
    BUNDLE.get()
}

/// What firmware is given to start. The files stay in the bundle; whether they are intact the loader says.
pub fn payload(payload: &Payload<Blob>) -> Option<Kernel<'_>> {
    let file = |blob| get()?.unchecked_blob(blob);
    Some(Kernel {
        kernel: file(payload.kernel)?,
        initrd: payload.initrd.and_then(file),
        command_line: &payload.cmdline,
    })
}

/// Reads the bundle and makes its VMs. What is wrong with it is said, and no guest is made.
///
/// Gives what the manifest wants when all guests have ended.
pub fn read(map: &MemoryMap) -> WhenAllStopped {
    let bytes = match memory::bundle(map) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            info!(
                "no bundle of guests was handed over (QEMU: -initrd FILE; U-Boot: booti IMAGE BUNDLE:SIZE FDT; `tidectl bundle` makes one)"
            );
            return WhenAllStopped::default();
        }
        Err((place, why)) => {
            error!(
                "bundle: {place}, where the boot loader says the initrd is, {why}; load it elsewhere"
            );
            return WhenAllStopped::default();
        }
    };
    let bundle = match Bundle::parse(bytes) {
        Ok(bundle) => bundle,
        Err(error) => {
            error!("bundle: {error}; no guest is started");
            return WhenAllStopped::default();
        }
    };
    let bundle = BUNDLE.call_once(|| bundle);
    let mut vms = Vec::new();
    for spec in &bundle.manifest().vms {
        // The parser allows far fewer.
        let id = vms.len() as u16;
        let flash = FlashSize::of(&spec.boot);
        let (memory, lack) = match GuestMemory::new(id, spec.memory_bytes, flash) {
            Ok(memory) => (Ok(memory), None),
            // In the table all the same, so that whoever looks for it learns why it does not run.
            Err(error) => (GuestMemory::none(id), Some(error)),
        };
        let memory = match memory {
            Ok(memory) => memory,
            Err(error) => {
                error!("{}: {error}; it is left out", spec.name);
                continue;
            }
        };
        let vm = Vm::new(VmId(id), spec.clone(), memory);
        match lack {
            None => info!(
                "{}: {} vCPUs, {} MiB",
                spec.name,
                spec.vcpus,
                spec.memory_bytes >> 20
            ),
            Some(error) => lifecycle::failed(vm, error.to_string()),
        }
        vms.push(vm);
    }
    for vm in &vms {
        for vcpu in vm.vcpus() {
            crate::sched::adopt(vcpu);
        }
        loader::make_tree(vm);
    }
    publish(vms.into_boxed_slice());
    bundle.manifest().machine.when_all_stopped
}
