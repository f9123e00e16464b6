//! The hostile guest: does what no guest may, and checks that it gets what the architecture has for it.
//!
//! The promise under test is that a guest's undefined or forbidden access becomes the architected exception and never
//! stops EL2. So each case knows the exact outcome of what it does (Arm ARM DDI 0487, GIC IHI 0069, PSCI DEN 0022), and where the
//! architecture allows several, all of them.
//!
//! Console: `run SEED` runs every case, in order, and turns the machine off; `firmware SEED` does so with those about flash and
//! `fw_cfg`, which a guest has that firmware started, and `program PAGE`, `program-on SEED`, `erase PAGE` change what its flash holds; `aarch32` enters AArch32, which the guest's
//! CPU does not have, and is to be this VM's end.
//!
//! ```text
//! hostile: ready ram=... vcpus=2 el=1
//! case <n> <name> ok | skip <why> | FAIL <what>
//! hostile: done <passed> <failed>
//! ```
//!
//! It runs with no hypervisor too (QEMU's `-M virt,gic-version=3`), where the cases that look at what a guest must not see fail.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod guest;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("hostile is a guest: build it for aarch64-unknown-none-softfloat and boot it");
}
