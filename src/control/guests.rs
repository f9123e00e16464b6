//! Making the guests that the bundle tells of.

use super::{keep, lifecycle, loader};
use crate::sched;
use crate::vm::memory::{FlashSize, GuestMemory};
use crate::vm::{Vm, publish};
use alloc::string::ToString;
use alloc::vec::Vec;
use log::{error, info};
use tidemark_devices::fw_cfg::Kernel;
use tidemark_wire::bundle::{Blob, Boot, Bundle, Payload};
use tidemark_wire::message::VmId;

/// What firmware is given to start. The files stay in the bundle; whether they are intact the loader says.
fn payload(
    bundle: &'static Bundle<'static>,
    payload: &'static Payload<Blob>,
) -> Option<Kernel<'static>> {
    let file = |blob| bundle.unchecked_blob(blob);
    Some(Kernel {
        kernel: file(payload.kernel)?,
        initrd: payload.initrd.and_then(file),
        command_line: &payload.cmdline,
    })
}

/// Makes the bundle's VMs and makes them known. Once.
pub fn make(bundle: &'static Bundle<'static>) {
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
        let files = match &spec.boot {
            Boot::Firmware(firmware) => firmware
                .kernel
                .as_ref()
                .and_then(|files| payload(bundle, files)),
            Boot::Kernel(_) => None,
        };
        let vm = Vm::new(VmId(id), spec.clone(), memory, files);
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
    keep(vms.len());
    for vm in &vms {
        for vcpu in vm.vcpus() {
            sched::adopt(vcpu);
        }
        loader::make_tree(vm);
    }
    publish(vms.into_boxed_slice());
}
