//! From firmware to Rust (boot/head.S), and the start of further CPUs.

use super::stage1::{EnableMmu, SCTLR_OFF};
use super::{cache, smc};
use core::arch::global_asm;

global_asm!(
    include_str!("../../boot/head.S"),
    SCTLR_OFF = const SCTLR_OFF,
    EARLY_UART = const EARLY_UART,
);

/// The PL011 of QEMU's `virt`, and the one address that is not read from the devicetree:
/// the console for what goes wrong before there is one to read.
pub const EARLY_UART: usize = 0x0900_0000;

unsafe extern "C" {
    fn secondary_entry();
}

/// What a further CPU loads before it runs Rust, as boot/head.S reads it.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct SecondaryBoot {
    /// Translation, the same as the boot CPU's.
    pub mmu: EnableMmu,
    /// Top of its stack.
    pub stack_top: usize,
    /// Its `Cpu`.
    pub cpu: &'static super::cpu::Cpu,
}

/// Starts the CPU `mpidr`; it runs `secondary_main`.
pub fn start_cpu(mpidr: u64, boot: &'static SecondaryBoot) -> Result<(), smc::PsciError> {
    let address = core::ptr::from_ref(boot) as usize;
    // It reads this, and the image, with its caches off.
    cache::clean_invalidate(address, size_of::<SecondaryBoot>());
    smc::cpu_on(mpidr, secondary_entry as *const () as u64, address as u64)
}
