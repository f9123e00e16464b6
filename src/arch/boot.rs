//! From firmware to Rust (boot/head.S), and the start of further CPUs.

use super::stage1::{EnableMmu, SCTLR_OFF};
use super::{cache, smc};
use core::arch::global_asm;
use core::sync::atomic::{AtomicU8, Ordering::*};

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
    /// How it goes.
    pub answer: Answer,
}

/// How the start of a CPU goes. The CPU takes part only if it is first; its index is
/// another's if the boot CPU's patience was at an end before.
#[derive(Debug)]
pub struct Answer(AtomicU8);

/// What the boot CPU sees of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing yet.
    Silent,
    /// It runs, and sets itself up.
    Begun,
    /// It is ready.
    Ready,
    /// It runs but cannot take part.
    Unfit,
}

impl Answer {
    const SILENT: u8 = 0;
    const BEGUN: u8 = 1;
    const READY: u8 = 2;
    const UNFIT: u8 = 3;
    const GIVEN_UP: u8 = 4;

    /// Nothing yet.
    pub const fn silent() -> Self {
        Self(AtomicU8::new(Self::SILENT))
    }

    fn decide(&self, outcome: u8) -> bool {
        self.0
            .compare_exchange(Self::SILENT, outcome, AcqRel, Acquire)
            .is_ok()
    }

    /// The CPU runs. `false`: it is too late, and must not touch anything.
    pub fn begin(&self) -> bool {
        self.decide(Self::BEGUN)
    }

    /// The CPU, which has begun, is ready.
    pub fn ready(&self) {
        self.0.store(Self::READY, Release);
    }

    /// The CPU, which has begun, cannot take part.
    pub fn unfit(&self) {
        self.0.store(Self::UNFIT, Release);
    }

    /// The boot CPU waits no longer. `false`: the CPU has begun after all.
    pub fn give_up(&self) -> bool {
        self.decide(Self::GIVEN_UP)
    }

    /// How far the CPU is.
    pub fn progress(&self) -> Progress {
        match self.0.load(Acquire) {
            Self::BEGUN => Progress::Begun,
            Self::READY => Progress::Ready,
            Self::UNFIT => Progress::Unfit,
            _ => Progress::Silent,
        }
    }
}

/// Starts the CPU `mpidr`; it runs `secondary_main`.
pub fn start_cpu(mpidr: u64, boot: &'static SecondaryBoot) -> Result<(), smc::PsciError> {
    let address = core::ptr::from_ref(boot) as usize;
    // It reads this, and the image, with its caches off.
    cache::clean_invalidate(address, size_of::<SecondaryBoot>());
    smc::cpu_on(mpidr, secondary_entry as *const () as u64, address as u64)
}
