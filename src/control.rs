//! What is done to VMs: life cycle, loading, logs, slots, quotas.

pub mod bundle;
pub mod event;
pub mod guests;
pub mod lifecycle;
mod loader;
pub mod refusal;
mod slots;
pub mod throttle;
mod tree;
pub mod work;

use crate::arch::lock::{Mutex, rank};
use crate::vm::Vm;
use alloc::boxed::Box;
use spin::Once;

/// What is kept of each VM here, by its number.
struct Kept {
    /// What is being done for a host.
    work: Mutex<work::VmWork, { rank::WORK }>,
    /// The devicetree that it gets at every start, with other seeds.
    tree: Once<Result<tree::Tree, tree::TreeError>>,
}

static KEPT: Once<Box<[Kept]>> = Once::new();

/// Makes room for so many VMs. Once, before any of them is made known.
fn keep(vms: usize) {
    let new = |_| Kept {
        work: Mutex::new(work::VmWork::default()),
        tree: Once::new(),
    };
    KEPT.call_once(|| (0..vms).map(new).collect());
}

/// What is kept of a VM.
fn kept(vm: &Vm) -> &'static Kept {
    KEPT.get()
        .and_then(|kept| kept.get(usize::from(vm.id.0)))
        .expect("a VM for which there is no room")
}
