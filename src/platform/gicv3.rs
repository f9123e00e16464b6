//! The machine's GICv3 distributor and redistributors (IHI 0069). EL2 owns them; guests
//! see emulated ones.

use crate::arch::mmio::Mmio;
use crate::arch::{barrier, cpu, timer};
use core::fmt;
use spin::Once;

const GICD_CTLR: usize = 0x0000;
const GICD_TYPER: usize = 0x0004;
const IGROUPR: usize = 0x0080;
const ISENABLER: usize = 0x0100;
const ICENABLER: usize = 0x0180;
const ICPENDR: usize = 0x0280;
const ISACTIVER: usize = 0x0300;
const ICACTIVER: usize = 0x0380;
const IPRIORITYR: usize = 0x0400;
const GICD_IROUTER: usize = 0x6000;
const GICR_TYPER: usize = 0x0008;
const GICR_WAKER: usize = 0x0014;
const SGI_FRAME: usize = 0x1_0000;
/// A redistributor without virtual LPIs is two 64 KiB frames; with them, four.
const REDISTRIBUTOR: usize = 0x2_0000;
const REDISTRIBUTOR_VLPI: usize = 0x4_0000;

/// How long a redistributor may take to wake, in microseconds.
const WAKE_TIMEOUT: u64 = 1_000_000;

const PRIORITY: u8 = 0xa0;

/// The first shared peripheral interrupt.
const FIRST_SPI: u32 = 32;

/// The machine's interrupt controller.
pub struct Gic {
    distributor: Mmio,
    redistributors: [Once<Mmio>; cpu::MAX_CPUS],
}

impl Gic {
    /// Sets the distributor up: affinity routing, group 1, every SPI off.
    pub fn new(distributor: Mmio) -> Self {
        let gic = Self {
            distributor,
            redistributors: [const { Once::new() }; cpu::MAX_CPUS],
        };
        let d = &gic.distributor;
        d.write32(GICD_CTLR, 0);
        gic.wait_for_writes();
        let words = ((d.read32(GICD_TYPER) & 0x1f) + 1) as usize;
        for word in 1..words {
            d.write32(ICENABLER + 4 * word, !0);
            d.write32(ICPENDR + 4 * word, !0);
            d.write32(ICACTIVER + 4 * word, !0);
            d.write32(IGROUPR + 4 * word, !0);
        }
        for intid in FIRST_SPI as usize..32 * words {
            d.write8(IPRIORITYR + intid, PRIORITY);
        }
        gic.wait_for_writes();
        // ARE, EnableGrp1 (both views: with one security state, and the non-secure one).
        d.write32(GICD_CTLR, 1 << 4);
        gic.wait_for_writes();
        d.write32(GICD_CTLR, 1 << 4 | 1 << 1 | 1);
        gic.wait_for_writes();
        gic
    }

    fn wait_for_writes(&self) {
        while self.distributor.read32(GICD_CTLR) >> 31 != 0 {
            core::hint::spin_loop();
        }
    }

    /// Finds this CPU's redistributor in `regions`, wakes it, and sets its SGIs and PPIs
    /// to group 1, all off but the SGIs.
    pub fn init_cpu(&self, regions: &[Mmio]) -> Result<(), RedistributorError> {
        let wanted = cpu::affinity();
        let wanted = wanted >> 32 << 24 | wanted & 0xff_ffff;
        for region in regions {
            let mut offset = 0;
            while offset + REDISTRIBUTOR <= region.size() {
                let typer = region.read64(offset + GICR_TYPER);
                if typer >> 32 == wanted {
                    // SAFETY: inside `region`, which is mapped for good.
                    let frame = unsafe { Mmio::new(region.base() + offset, REDISTRIBUTOR) };
                    return self.wake(frame);
                }
                if typer >> 4 & 1 != 0 {
                    break;
                }
                offset += if typer >> 1 & 1 != 0 {
                    REDISTRIBUTOR_VLPI
                } else {
                    REDISTRIBUTOR
                };
            }
        }
        Err(RedistributorError::Missing)
    }

    fn wake(&self, frame: Mmio) -> Result<(), RedistributorError> {
        frame.write32(GICR_WAKER, frame.read32(GICR_WAKER) & !0b10);
        let end = timer::now() + timer::ticks(WAKE_TIMEOUT);
        let asleep = || frame.read32(GICR_WAKER) & 0b100 != 0;
        while asleep() {
            // Once more when the time is over: this CPU may have been away.
            if timer::now() > end && asleep() {
                return Err(RedistributorError::Asleep);
            }
            core::hint::spin_loop();
        }
        frame.write32(SGI_FRAME + ICENABLER, !0);
        wait_for_disable(frame);
        frame.write32(SGI_FRAME + ICPENDR, !0);
        frame.write32(SGI_FRAME + ICACTIVER, !0);
        frame.write32(SGI_FRAME + IGROUPR, !0);
        for intid in 0..32 {
            frame.write8(SGI_FRAME + IPRIORITYR + intid, PRIORITY);
        }
        frame.write32(SGI_FRAME + ISENABLER, 0xffff);
        barrier::dsb_sy();
        self.redistributors[cpu::index()].call_once(|| frame);
        Ok(())
    }

    /// Turns on one of this CPU's private interrupts.
    pub fn enable_private(&self, intid: u32) {
        if let Some(frame) = self.redistributors[cpu::index()].get() {
            frame.write32(SGI_FRAME + ISENABLER, 1 << (intid & 31));
            barrier::dsb_sy();
        }
    }

    /// Marks one of this CPU's private interrupts active: it does not fire until a guest's
    /// hardware-linked list register, or EL2, deactivates it.
    pub fn set_private_active(&self, intid: u32) {
        self.write_active(ISACTIVER, intid);
    }

    /// Marks one of this CPU's private interrupts inactive.
    pub fn clear_private_active(&self, intid: u32) {
        self.write_active(ICACTIVER, intid);
    }

    /// Complete when it returns: the guest may end the interrupt by a system register next, which
    /// is not ordered with this. Reading the state back is what waits for it; GICR_CTLR.RWP does
    /// not tell of these registers.
    fn write_active(&self, register: usize, intid: u32) {
        if let Some(frame) = self.redistributors[cpu::index()].get() {
            frame.write32(SGI_FRAME + register, 1 << (intid & 31));
            frame.read32(SGI_FRAME + ISACTIVER);
            barrier::dsb_sy();
        }
    }

    /// Turns on a shared interrupt and routes it to the CPU that calls.
    pub fn enable_shared(&self, intid: u32) {
        let affinity = cpu::affinity();
        self.distributor
            .write64(GICD_IROUTER + 8 * intid as usize, affinity);
        self.distributor
            .write32(ISENABLER + 4 * (intid as usize / 32), 1 << (intid & 31));
        self.wait_for_writes();
    }
}

/// Waits until a redistributor has turned off what ICENABLER was told to (GICR_CTLR.RWP).
fn wait_for_disable(frame: Mmio) {
    const GICR_CTLR: usize = 0;
    barrier::dsb_sy();
    while frame.read32(GICR_CTLR) >> 3 & 1 != 0 {
        core::hint::spin_loop();
    }
}

/// Why a CPU can take no interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedistributorError {
    /// No redistributor has this CPU's affinity.
    Missing,
    /// It does not wake: firmware keeps its power to itself.
    Asleep,
}

impl fmt::Display for RedistributorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "it has no redistributor",
            Self::Asleep => "its redistributor does not wake",
        })
    }
}
