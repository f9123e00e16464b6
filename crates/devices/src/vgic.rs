//! The guest's interrupt controller, a GICv3.

use crate::{AccessSize, Level, VcpuIndex};

/// A private peripheral interrupt, 16 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ppi(u8);

impl Ppi {
    /// Makes one from its intid; `None` outside 16 to 31.
    pub const fn new(intid: u32) -> Option<Self> {
        if intid >= 16 && intid < 32 { Some(Self(intid as u8)) } else { None }
    }

    pub(crate) const fn literal(intid: u8) -> Self {
        assert!(intid >= 16 && intid < 32);
        Self(intid)
    }

    /// Gives the intid.
    pub const fn intid(self) -> u32 {
        self.0 as u32
    }
}

/// A shared peripheral interrupt, 32 to [`INTIDS`] - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spi(u8);

impl Spi {
    /// Makes one from its intid (not its SPI number, which is 32 less); `None` outside 32 to 159.
    pub const fn new(intid: u32) -> Option<Self> {
        if intid >= 32 && intid < INTIDS { Some(Self(intid as u8)) } else { None }
    }

    pub(crate) const fn literal(intid: u8) -> Self {
        assert!(intid >= 32 && (intid as u32) < INTIDS);
        Self(intid)
    }

    /// Gives the intid.
    pub const fn intid(self) -> u32 {
        self.0 as u32
    }
}

/// Intids are 0 to 159: 16 SGIs, 16 PPIs, 128 SPIs.
pub const INTIDS: u32 = 160;

/// Which of the controller's register frames an access goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// GICD.
    Distributor,
    /// A vCPU's GICR: RD frame below 0x1_0000, SGI frame from there.
    Redistributor(VcpuIndex),
}

/// vCPUs whose list registers may have to change: each is to be got out of the guest, if it is in it, and synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[must_use = "an interrupt waits until the vCPUs named here are synced"]
pub struct Kick(u32);

impl Kick {
    /// Nobody.
    pub const NONE: Self = Self(0);

    /// One vCPU.
    pub const fn one(vcpu: VcpuIndex) -> Self {
        Self(1 << vcpu.index())
    }

    /// Gives one bit a vCPU.
    pub const fn mask(self) -> u32 {
        self.0
    }

    /// Says whether nobody is to be kicked.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Says whether `vcpu` is among them.
    pub const fn contains(self, vcpu: VcpuIndex) -> bool {
        self.0 & 1 << vcpu.index() != 0
    }

    /// Takes `vcpu` out.
    pub const fn without(self, vcpu: VcpuIndex) -> Self {
        Self(self.0 & !(1 << vcpu.index()))
    }

    /// Gives both.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Goes through them in order.
    pub fn iter(self) -> impl Iterator<Item = VcpuIndex> {
        (0..crate::MAX_VCPUS).filter_map(VcpuIndex::new).filter(move |vcpu| self.contains(*vcpu))
    }
}

/// Whether the underflow maintenance interrupt (`ICH_HCR_EL2.UIE`) is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underflow {
    /// Wanted: more is deliverable than there are list registers.
    On,
    /// Not wanted.
    Off,
}

/// How a PPI raised for a vCPU is tied to a physical interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Not at all: a level the caller raises and lowers.
    Software,
    /// The guest's deactivation deactivates this physical interrupt (`ICH_LR_EL2.HW`).
    Hardware(u16),
}

/// Which system register a guest wrote to send an SGI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SgiRegister {
    /// `ICC_SGI1R_EL1`.
    Group1,
    /// `ICC_ASGI1R_EL1`.
    AliasGroup1,
    /// `ICC_SGI0R_EL1`.
    Group0,
}

/// The list registers of one vCPU, in the CPU or saved.
pub trait ListRegisters {
    /// Gives how many there are (`ICH_VTR_EL2.ListRegs` + 1).
    fn count(&self) -> usize;
    /// Reads `ICH_LR<n>_EL2`.
    fn read(&self, n: usize) -> u64;
    /// Writes `ICH_LR<n>_EL2`.
    fn write(&mut self, n: usize, value: u64);
    /// Sets `ICH_HCR_EL2.UIE`. Only called when it changes.
    fn set_underflow_interrupt(&mut self, underflow: Underflow);
    /// Deactivates a physical interrupt that the guest gave up without deactivating it (`ICC_DIR_EL1`).
    fn deactivate(&mut self, pintid: u16);
}

/// A guest's GICv3.
#[derive(Debug)]
pub struct Vgic {
    vcpus: usize,
}

impl Vgic {
    /// Makes the controller of a guest with this many vCPUs (held to 1 to [`crate::MAX_VCPUS`]), reset.
    pub fn new(vcpus: usize) -> Self {
        Self { vcpus }
    }

    /// Reads a register.
    pub fn mmio_read(&self, vcpu: VcpuIndex, frame: Frame, offset: u64, size: AccessSize) -> u64 {
        let _ = (vcpu, frame, offset, size, self.vcpus);
        0
    }

    /// Writes a register.
    pub fn mmio_write(&self, vcpu: VcpuIndex, frame: Frame, offset: u64, size: AccessSize, value: u64) -> Kick {
        let _ = (vcpu, frame, offset, size, value);
        Kick::NONE
    }

    /// Names the vCPUs whose list registers hold state that a read of this register reports: all
    /// but ISPENDR, ICPENDR, ISACTIVER and ICACTIVER give nobody. Sync the caller's own and kick the others
    /// before [`Vgic::mmio_read`]; without it the read gives what the last sync saw.
    pub fn refresh(&self, frame: Frame, offset: u64) -> Kick {
        let _ = (frame, offset);
        Kick::NONE
    }

    /// Sends the SGI a guest asked for by writing `value` to `register`.
    pub fn sgi(&self, from: VcpuIndex, value: u64, register: SgiRegister) -> Kick {
        let _ = (from, value, register);
        Kick::NONE
    }

    /// Sets the line of a shared interrupt.
    pub fn set_spi_level(&self, spi: Spi, level: Level) -> Kick {
        let _ = (spi, level);
        Kick::NONE
    }

    /// Raises a private interrupt: the line is high.
    pub fn raise_ppi(&self, vcpu: VcpuIndex, ppi: Ppi, link: Link) -> Kick {
        let _ = (vcpu, ppi, link);
        Kick::NONE
    }

    /// Takes a private interrupt back: the line is low. A hardware-linked one that the guest has not taken yet is deactivated in the next sync.
    pub fn lower_ppi(&self, vcpu: VcpuIndex, ppi: Ppi) -> Kick {
        let _ = (vcpu, ppi);
        Kick::NONE
    }

    /// Says whether [`Vgic::sync`] has something new for this vCPU. One load.
    pub fn needs_sync(&self, vcpu: VcpuIndex) -> bool {
        let _ = vcpu;
        false
    }

    /// Folds what the guest did with its list registers and fills them. Only the vCPU's owner calls it. Gives other vCPUs to kick.
    pub fn sync(&self, vcpu: VcpuIndex, registers: &mut impl ListRegisters) -> Kick {
        let _ = (vcpu, registers.count());
        Kick::NONE
    }

    /// Takes everything out of the list registers (all are zero after), as before [`Vgic::save`] or when the vCPU is turned off.
    pub fn withdraw(&self, vcpu: VcpuIndex, registers: &mut impl ListRegisters) -> Kick {
        let _ = (vcpu, registers.count());
        Kick::NONE
    }

    /// Says whether an interrupt is pending that would end the vCPU's WFI. Exact after a [`Vgic::sync`], otherwise it may say yes in vain.
    pub fn has_deliverable(&self, vcpu: VcpuIndex) -> bool {
        let _ = vcpu;
        false
    }

    /// Puts the controller into its reset state. No vCPU runs, and the owner clears all list registers (or withdraws them first).
    pub fn reset(&self) {}
}
