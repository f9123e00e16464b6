//! Tests of the whole controller, by what a guest and the hardware's CPU interface would do with it.

use std::vec::Vec;

use super::*;

mod left_out;
mod life_cycles;
mod list_registers;
mod model;
mod registers;
mod routing;
mod saved;
mod threads;

/// List registers as the hardware's CPU interface uses them: the guest acknowledges and ends interrupts.
#[derive(Clone, Debug)]
pub(super) struct CpuInterface {
    pub(super) lrs: Vec<u64>,
    pub(super) shortage: Shortage,
    /// ICH_HCR_EL2.EOIcount
    pub(super) ends: u32,
    /// EOImode 1: ends drop the priority alone.
    pub(super) split: bool,
    /// Physical interrupts deactivated by the controller.
    pub(super) deactivated: Vec<u16>,
    /// Physical interrupts deactivated by the guest's own doing.
    pub(super) ended: Vec<u16>,
    /// The line of the one physical interrupt that may be linked.
    pub(super) line: Level,
}

const ACTIVE: u64 = 1 << 63;
const PENDING: u64 = 1 << 62;
const HARDWARE: u64 = 1 << 61;
const EOI: u64 = 1 << 41;

impl CpuInterface {
    pub(super) fn new(count: usize) -> Self {
        Self {
            lrs: std::vec![0; count],
            shortage: Shortage::None,
            ends: 0,
            split: false,
            deactivated: Vec::new(),
            ended: Vec::new(),
            line: Level::Low,
        }
    }

    /// What the guest would acknowledge next: the most urgent pending, inactive one.
    pub(super) fn next(&self) -> Option<u32> {
        let pending = self
            .lrs
            .iter()
            .filter(|lr| **lr & (PENDING | ACTIVE) == PENDING);
        pending
            .min_by_key(|lr| **lr >> 48 & 0xff)
            .map(|lr| *lr as u32)
    }

    /// The guest reads ICC_IAR1_EL1.
    pub(super) fn acknowledge(&mut self) -> Option<u32> {
        let intid = self.next()?;
        let lr = self
            .lrs
            .iter_mut()
            .find(|lr| **lr as u32 == intid && **lr & PENDING != 0);
        let lr = lr.expect("found before");
        *lr = *lr & !PENDING | ACTIVE;
        Some(intid)
    }

    /// The guest writes ICC_EOIR1_EL1 with EOImode 0. Says whether a maintenance interrupt follows.
    pub(super) fn end(&mut self, intid: u32) -> bool {
        let lr = self
            .lrs
            .iter_mut()
            .find(|lr| **lr as u32 == intid && **lr & ACTIVE != 0);
        let Some(lr) = lr else {
            assert!(
                self.shortage.of_active(),
                "the guest ends what it acknowledged"
            );
            self.ends += 1;
            return true;
        };
        *lr &= !ACTIVE;
        if *lr & HARDWARE != 0 {
            self.ended.push((*lr >> 32 & 0x1fff) as u16);
            return false;
        }
        *lr & PENDING == 0 && *lr & EOI != 0
    }

    /// The guest writes ICC_EOIR1_EL1 with EOImode 1.
    pub(super) fn drop_priority(&mut self, intid: u32) {
        // As QEMU counts; the architecture does not.
        self.ends += u32::from(self.holding(intid).is_none());
    }

    /// The guest writes ICC_DIR_EL1. Says whether that traps, and does nothing then.
    pub(super) fn deactivation_traps(&mut self, intid: u32) -> bool {
        if self.shortage.of_active() {
            return true;
        }
        self.end(intid);
        false
    }

    /// Says whether the maintenance interrupt is asserted.
    pub(super) fn asks_maintenance(&self) -> bool {
        let ended = |lr: &u64| *lr & (PENDING | ACTIVE | HARDWARE | EOI) == EOI;
        let pending = |lr: &u64| *lr & (PENDING | ACTIVE) == PENDING;
        self.lrs.iter().any(ended)
            || self.shortage.of_pending() && !self.lrs.iter().any(pending)
            || self.shortage.of_active() && self.ends != 0
    }

    /// The list register that holds `intid`.
    pub(super) fn holding(&self, intid: u32) -> Option<u64> {
        let mut held = self
            .lrs
            .iter()
            .filter(|lr| **lr & (PENDING | ACTIVE) != 0 && **lr as u32 == intid);
        let found = held.next().copied();
        assert_eq!(held.next(), None, "intid {intid} is in two list registers");
        found
    }

    /// State bits of `intid`: 0 none, 1 pending, 2 active, 3 both.
    pub(super) fn state(&self, intid: u32) -> u64 {
        self.holding(intid).map_or(0, |lr| lr >> 62)
    }
}

impl ListRegisters for CpuInterface {
    fn count(&self) -> usize {
        self.lrs.len()
    }

    fn empty(&self) -> u32 {
        // IHI 0069, ICH_ELRSR_EL2: State is 0, and HW is 1 or EOI is 0.
        let is_empty =
            |lr: u64| lr & (PENDING | ACTIVE) == 0 && (lr & HARDWARE != 0 || lr & EOI == 0);
        let lrs = self.lrs.iter().enumerate();
        lrs.map(|(n, lr)| u32::from(is_empty(*lr)) << n).sum()
    }

    fn read(&self, n: usize) -> u64 {
        self.lrs[n]
    }

    fn write(&mut self, n: usize, value: u64) {
        let state = value >> 62;
        assert!(
            value & HARDWARE == 0 || state != 3,
            "hardware-linked list register made pending and active: {value:#x}"
        );
        self.lrs[n] = value;
    }

    fn set_shortage(&mut self, shortage: Shortage) {
        assert_ne!(self.shortage, shortage, "set to what it is");
        self.shortage = shortage;
        self.ends = 0;
    }

    fn take_ended(&mut self) -> u32 {
        match (core::mem::take(&mut self.ends), self.split) {
            (ends, false) => ends,
            (_, true) => 0,
        }
    }

    fn deactivate(&mut self, pintid: u16) {
        self.deactivated.push(pintid);
    }

    fn physical_line(&self, _: u16) -> Level {
        self.line
    }
}

pub(super) fn vcpu(index: usize) -> VcpuIndex {
    VcpuIndex::new(index).expect("test vCPU")
}

pub(super) const V0: VcpuIndex = VcpuIndex::ZERO;
pub(super) const GICR_SGI: u64 = 0x1_0000;

/// A controller and one CPU interface a vCPU, four list registers each.
pub(super) struct Board {
    pub(super) vgic: Vgic,
    pub(super) cpus: Vec<CpuInterface>,
}

impl Board {
    pub(super) fn new(vcpus: usize) -> Self {
        Self::with_list_registers(vcpus, 4)
    }

    /// Both groups enabled; all interrupts in group 1, level-triggered if they can, disabled.
    pub(super) fn with_list_registers(vcpus: usize, count: usize) -> Self {
        let mut board = Self {
            vgic: Vgic::new(vcpus),
            cpus: std::vec![CpuInterface::new(count); vcpus],
        };
        board.gicd(0x0000, 3);
        for word in 1..5 {
            board.gicd(0x0080 + 4 * word, u64::from(u32::MAX));
        }
        for index in 0..vcpus {
            board.gicr(index, 0x0080, u64::from(u32::MAX));
        }
        board.sync_all();
        board
    }

    /// Writes a distributor register and does as the kick says.
    pub(super) fn gicd(&mut self, offset: u64, value: u64) {
        let kick = self
            .vgic
            .mmio_write(V0, Frame::Distributor, offset, AccessSize::Word, value);
        self.settle(kick);
    }

    /// Writes a register of a redistributor's SGI frame and does as the kick says.
    pub(super) fn gicr(&mut self, index: usize, offset: u64, value: u64) {
        let frame = Frame::Redistributor(vcpu(index));
        let kick = self
            .vgic
            .mmio_write(V0, frame, GICR_SGI + offset, AccessSize::Word, value);
        self.settle(kick);
    }

    pub(super) fn read_gicd(&self, offset: u64) -> u64 {
        self.vgic
            .mmio_read(V0, Frame::Distributor, offset, AccessSize::Word)
    }

    pub(super) fn read_gicr(&self, index: usize, offset: u64) -> u64 {
        let frame = Frame::Redistributor(vcpu(index));
        self.vgic
            .mmio_read(V0, frame, GICR_SGI + offset, AccessSize::Word)
    }

    /// Enables an interrupt: on vCPU `index` if it is private.
    pub(super) fn enable(&mut self, index: usize, intid: u32) {
        self.bit(index, 0x100, intid);
    }

    pub(super) fn disable(&mut self, index: usize, intid: u32) {
        self.bit(index, 0x180, intid);
    }

    /// Writes an interrupt's bit to the bit register at `base`.
    pub(super) fn bit(&mut self, index: usize, base: u64, intid: u32) {
        let bit = 1 << (intid % 32);
        match intid {
            0..32 => self.gicr(index, base, bit),
            _ => self.gicd(base + u64::from(intid / 32) * 4, bit),
        }
    }

    /// Reads an interrupt's bit from the bit register at `base`.
    pub(super) fn read_bit(&self, index: usize, base: u64, intid: u32) -> u64 {
        let value = match intid {
            0..32 => self.read_gicr(index, base),
            _ => self.read_gicd(base + u64::from(intid / 32) * 4),
        };
        value >> (intid % 32) & 1
    }

    pub(super) fn priority(&mut self, index: usize, intid: u32, priority: u8) {
        let offset = 0x400 + u64::from(intid);
        let (frame, offset) = match intid {
            0..32 => (Frame::Redistributor(vcpu(index)), GICR_SGI + offset),
            _ => (Frame::Distributor, offset),
        };
        let kick = self
            .vgic
            .mmio_write(V0, frame, offset, AccessSize::Byte, u64::from(priority));
        self.settle(kick);
    }

    /// Makes an SPI or PPI edge-triggered.
    pub(super) fn edge(&mut self, index: usize, intid: u32) {
        let offset = 0xc00 + u64::from(intid / 16) * 4;
        let bit = 2 << (intid % 16 * 2);
        match intid {
            0..32 => self.gicr(index, offset, self.read_gicr(index, offset) | bit),
            _ => self.gicd(offset, self.read_gicd(offset) | bit),
        }
    }

    pub(super) fn route(&mut self, intid: u32, route: u64) {
        let offset = 0x6000 + 8 * u64::from(intid);
        let kick = self
            .vgic
            .mmio_write(V0, Frame::Distributor, offset, AccessSize::Double, route);
        self.settle(kick);
    }

    pub(super) fn line(&mut self, intid: u32, level: Level) {
        let kick = self
            .vgic
            .set_spi_level(Spi::new(intid).expect("an SPI"), level);
        self.settle(kick);
    }

    /// Raises a PPI. The line of a linked one is high from here on.
    pub(super) fn raise(&mut self, index: usize, intid: u32, link: Link) {
        if link != Link::Software {
            self.cpus[index].line = Level::High;
        }
        let kick = self
            .vgic
            .raise_ppi(vcpu(index), Ppi::new(intid).expect("a PPI"), link);
        self.settle(kick);
    }

    pub(super) fn lower(&mut self, index: usize, intid: u32) {
        let kick = self
            .vgic
            .lower_ppi(vcpu(index), Ppi::new(intid).expect("a PPI"));
        self.settle(kick);
    }

    pub(super) fn sgi(&mut self, from: usize, value: u64) {
        let kick = self.vgic.sgi(vcpu(from), value, SgiRegister::Group1);
        self.settle(kick);
    }

    /// Syncs one vCPU whether it needs it or not, and whom that kicks.
    pub(super) fn sync(&mut self, index: usize) {
        let kick = self.vgic.sync(vcpu(index), &mut self.cpus[index]);
        assert!(!kick.contains(vcpu(index)), "a sync kicked its own vCPU");
        self.settle(kick);
    }

    pub(super) fn sync_all(&mut self) {
        for index in 0..self.cpus.len() {
            self.sync(index);
        }
    }

    /// Syncs everybody in `kick`: each of them must have been mailed, none may kick without end.
    pub(super) fn settle(&mut self, kick: Kick) {
        let mut left = kick;
        for _ in 0..4 {
            let now = left;
            left = Kick::NONE;
            for target in now.iter() {
                assert!(self.vgic.needs_sync(target), "kicked without mail");
                let kick = self.vgic.sync(target, &mut self.cpus[target.index()]);
                // Whoever kicked it before this sync has been heard in it.
                left = left.without(target).union(kick);
                assert!(!self.vgic.needs_sync(target));
            }
        }
        assert!(left.is_none(), "kicks go round in circles");
    }

    pub(super) fn cpu(&mut self, index: usize) -> &mut CpuInterface {
        &mut self.cpus[index]
    }
}
