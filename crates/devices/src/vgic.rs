//! The guest's interrupt controller, a GICv3.
//!
//! # Purpose
//!
//! Distributor, redistributors and SGIs of a guest with up to 16 vCPUs, 16 SGIs, 16 PPIs and 128
//! SPIs, delivered through the list registers of the hardware's virtual CPU interface. As on QEMU's
//! `virt`: one security state (GICD_CTLR.DS = 1), affinity routing always on (ARE = 1), no LPIs,
//! no extended ranges, five priority bits. The CPU interface itself (ICC_*) is the hardware's; only SGI writes trap.
//!
//! The caller's part:
//!
//! 1. MMIO goes to [`Vgic::mmio_read`] and [`Vgic::mmio_write`], trapped SGI writes to [`Vgic::sgi`], lines to
//!    [`Vgic::set_spi_level`], [`Vgic::raise_ppi`] and [`Vgic::lower_ppi`].
//! 2. Whoever is in the returned [`Kick`] is made to leave the guest (or made runnable, if it waits).
//! 3. Before a vCPU enters the guest, if [`Vgic::needs_sync`], [`Vgic::sync`] with its list registers. The same after a
//!    maintenance interrupt, once software lines have been sampled.
//!
//! List registers are plain values: a vCPU that is switched out takes them along, and `sync` works on the saved ones
//! just as well, so an interrupt for a vCPU that does not run needs no running vCPU.
//!
//! # Invariants
//!
//! - Whatever the guest writes, nothing panics, and undefined accesses read as zero and write nothing.
//! - An interrupt is in at most one list register of the guest.
//! - After a sync every list register holds something, or nothing more is deliverable to this vCPU; and none holds
//!   a pending interrupt that is less urgent than one left out. If one was left out, at least one list register is pending, and
//!   the hardware tells when none is.
//! - An active interrupt leaves its list register by the guest's doing, by [`Vgic::withdraw`], or because no list register
//!   is pending and a deliverable one has nowhere else to go: the least urgent active one, whose end is furthest away.
//!   Of what is active in no list register the hardware tells how many the guest ended, and those are the most urgent of them
//!   (EOImode 0: ends come in the order of priorities, IHI 0069, 4.8), or the guest's ICC_DIR_EL1 traps, to [`Vgic::deactivate`] (EOImode 1).
//!
//! # Concurrency
//!
//! Every method may be called from any CPU at any time; `sync` and `withdraw` of a vCPU only by the CPU that
//! has its list registers at the time. Lock order, each held for a bounded time, none across a call out but those of
//! [`ListRegisters`]: **a vCPU's private lock, then the SPI lock**; never two private locks.
//!
//! *No interrupt is lost.* A sender (1) makes the state visible: in the target's mail word by one `fetch_or`, which is all
//! an SGI takes, or under a lock and then a flag in the mail word; (2) kicks. The receiver, once kicked, (3) swaps the
//! mail word for zero and (4) looks at the state. Mail operations are sequentially consistent, so (3) either sees the mail of (1), and with it the
//! state, or comes before it; then the kick is still to come, and brings the receiver to (3) again. For this the
//! caller's kick must not overtake (1): DSB ISHST before the physical SGI. A vCPU about to wait says so first
//! and asks [`Vgic::has_deliverable`] second, while a sender mails first and looks for waiters second: one of them sees the other.
//!
//! # Limits
//!
//! - The count of ends names none. One that is left out, made inactive by ICACTIVER and ended by its handler after that is taken for another
//!   that is left out.
//! - Deactivation by ICC_DIR_EL1 on a PE other than the one that took an SPI is not seen.
//! - GICR_WAKER is stored and holds back no interrupt, as on KVM: some guests never write it.
//!
//! Specification: IHI 0069 (GICv3), chapters 4 (interrupt states), 11 (list registers), 12 (registers).

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use alloc::boxed::Box;
use spin::Mutex;

use crate::{AccessSize, Level, VcpuIndex};

mod distributor;
mod list_register;
mod overflow;
mod private;
mod redistributor;
mod sgi;
mod shared;
mod state;
mod sync;
#[cfg(test)]
mod tests;
mod word;

use private::Private;
use shared::Shared;
pub use state::{RestoreError, VgicState, WordState};
use word::Bits;

/// SPIs, in words of 32.
const SPI_WORDS: usize = 4;
/// Number of SPIs.
const SPIS: usize = SPI_WORDS * 32;
/// Intids are 0 to 159: 16 SGIs, 16 PPIs, 128 SPIs.
pub const INTIDS: u32 = 32 + SPIS as u32;

/// GICD_CTLR.EnableGrp0.
const ENABLE_GROUP0: u32 = 1 << 0;
/// GICD_CTLR.EnableGrp1.
const ENABLE_GROUP1: u32 = 1 << 1;

/// Mail: something private changed; the low 32 bits are private interrupts that became pending.
const MAIL_PRIVATE: u64 = 1 << 32;
/// Mail: something about SPIs changed.
const MAIL_SHARED: u64 = 1 << 33;

/// A private peripheral interrupt, 16 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ppi(u8);

impl Ppi {
    /// Makes one from its intid; `None` outside 16 to 31.
    pub const fn new(intid: u32) -> Option<Self> {
        if intid >= 16 && intid < 32 {
            Some(Self(intid as u8))
        } else {
            None
        }
    }

    pub(crate) const fn literal(intid: u8) -> Self {
        assert!(intid >= 16 && intid < 32);
        Self(intid)
    }

    /// Gives the intid.
    pub const fn intid(self) -> u32 {
        self.0 as u32
    }

    const fn bit(self) -> u32 {
        1 << self.0
    }
}

/// A shared peripheral interrupt, 32 to [`INTIDS`] - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spi(u8);

impl Spi {
    /// Makes one from its intid (not its SPI number, which is 32 less); `None` outside 32 to 159.
    pub const fn new(intid: u32) -> Option<Self> {
        if intid >= 32 && intid < INTIDS {
            Some(Self(intid as u8))
        } else {
            None
        }
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
        // Below 16: no check.
        Self(1u32.wrapping_shl(vcpu.index() as u32))
    }

    /// Gives one bit a vCPU.
    pub const fn mask(self) -> u32 {
        self.0
    }

    /// Takes what [`Kick::mask`] gave.
    pub const fn of_mask(mask: u32) -> Self {
        Self(mask)
    }

    /// Says whether nobody is to be kicked.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Says whether `vcpu` is among them.
    pub const fn contains(self, vcpu: VcpuIndex) -> bool {
        self.0 & Self::one(vcpu).0 != 0
    }

    /// Takes `vcpu` out.
    pub const fn without(self, vcpu: VcpuIndex) -> Self {
        Self(self.0 & !Self::one(vcpu).0)
    }

    /// Gives both.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Goes through them in order.
    pub fn iter(self) -> impl Iterator<Item = VcpuIndex> {
        let mut left = self.0;
        core::iter::from_fn(move || {
            // 32, which no vCPU has, when there are no more.
            let vcpu = VcpuIndex::new(left.trailing_zeros() as usize);
            left &= left.wrapping_sub(1);
            vcpu
        })
    }
}

/// What there were too few list registers for, and so what must be told to a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// Nothing.
    None,
    /// Something deliverable: tell when none in a list register is pending (`ICH_HCR_EL2.NPIE`).
    Pending,
    /// Something active: tell when the guest ends what is in no list register (LRENPIE counts ends, TDIR traps deactivations).
    Active,
    /// Both.
    Both,
}

impl Shortage {
    /// Says whether something deliverable was left out.
    pub const fn of_pending(self) -> bool {
        matches!(self, Self::Pending | Self::Both)
    }

    /// Says whether something active was left out.
    pub const fn of_active(self) -> bool {
        matches!(self, Self::Active | Self::Both)
    }
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
    /// Reads `ICH_ELRSR_EL2`: those in no state that raise no maintenance interrupt for it, one bit each; what was written
    /// to a list register before counts.
    fn empty(&self) -> u32;
    /// Reads `ICH_LR<n>_EL2`.
    fn read(&self, n: usize) -> u64;
    /// Writes `ICH_LR<n>_EL2`.
    fn write(&mut self, n: usize, value: u64);
    /// Sets `ICH_HCR_EL2`'s NPIE, LRENPIE and TDIR as this shortage needs, and EOIcount to zero. Only called when it changes.
    fn set_shortage(&mut self, shortage: Shortage);
    /// Reads and clears `ICH_HCR_EL2.EOIcount`: how often the guest ended what is in no list register. With EOImode 1 it ends nothing so:
    /// zero, whatever the count is.
    fn take_ended(&mut self) -> u32;
    /// Deactivates a physical interrupt that the guest gave up without deactivating it (`ICC_DIR_EL1`).
    fn deactivate(&mut self, pintid: u16);
    /// Looks at the line of a linked physical interrupt, as the device of this vCPU drives it now.
    fn physical_line(&self, pintid: u16) -> Level;
}

/// One vCPU's part. On lines of its own: senders write `mail` while the owner works on the rest of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Bank {
    mail: AtomicU64,
    private: Mutex<Private>,
}

/// A guest's GICv3.
#[derive(Debug)]
pub struct Vgic {
    /// One a vCPU.
    banks: Box<[Bank]>,
    everybody: Kick,
    /// GICD_CTLR's group enables.
    groups: AtomicU32,
    shared: Mutex<Shared>,
}

impl Vgic {
    /// Makes the controller of a guest with this many vCPUs (held to 1 to [`crate::MAX_VCPUS`]), reset.
    pub fn new(vcpus: usize) -> Self {
        let vcpus = vcpus.clamp(1, crate::MAX_VCPUS);
        let bank = |_| Bank {
            mail: AtomicU64::new(0),
            private: Mutex::new(Private::new()),
        };
        Self {
            banks: (0..vcpus).map(bank).collect(),
            everybody: Kick((1 << vcpus) - 1),
            groups: AtomicU32::new(0),
            shared: Mutex::new(Shared::new(vcpus)),
        }
    }

    /// Gives the number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.banks.len()
    }

    /// Reads a register.
    ///
    /// ISPENDR and ISACTIVER of interrupts in list registers, left out or with a hardware link show what the last sync saw; whoever holds them is made to
    /// need a sync, so that a guest that reads again gets the truth. [`Vgic::refresh`] gets it at once.
    #[inline(always)]
    pub fn mmio_read(&self, vcpu: VcpuIndex, frame: Frame, offset: u64, size: AccessSize) -> u64 {
        // Which vCPU reads makes no difference: with affinity routing nothing is banked in the distributor.
        let _ = vcpu;
        if offset & (size.bytes() - 1) != 0 {
            return 0;
        }
        match frame {
            Frame::Distributor => self.read_distributor(offset, size),
            Frame::Redistributor(owner) => self.read_redistributor(owner, offset, size),
        }
    }

    /// Writes a register.
    #[inline(always)]
    pub fn mmio_write(
        &self,
        vcpu: VcpuIndex,
        frame: Frame,
        offset: u64,
        size: AccessSize,
        value: u64,
    ) -> Kick {
        let _ = vcpu;
        if offset & (size.bytes() - 1) != 0 {
            return Kick::NONE;
        }
        match frame {
            Frame::Distributor => {
                let kick = self.write_distributor(offset, size, value);
                self.post(kick, MAIL_SHARED);
                kick
            }
            Frame::Redistributor(owner) => self.write_redistributor(owner, offset, size, value),
        }
    }

    /// Names the vCPUs whose list registers or count of ends hold state that a read of this register reports; nobody for
    /// all but ISPENDR, ICPENDR, ISACTIVER and ICACTIVER. For an exact value sync the caller's own and wait for the
    /// others to be synced before [`Vgic::mmio_read`].
    #[inline(always)]
    pub fn refresh(&self, frame: Frame, offset: u64) -> Kick {
        let kick = match frame {
            Frame::Distributor => self.refresh_distributor(offset),
            Frame::Redistributor(owner) => self.refresh_redistributor(owner, offset),
        };
        self.post(kick, MAIL_PRIVATE | MAIL_SHARED);
        kick
    }

    /// Does what the guest's write to ICC_DIR_EL1 asks for, which traps while a vCPU has something active in no list register.
    pub fn deactivate(&self, vcpu: VcpuIndex, intid: u32) -> Kick {
        let kick = match intid.checked_sub(32) {
            None => self.change_private(vcpu, |private| {
                private.word.write(Bits::ClearActive, 1 << intid);
            }),
            Some(spi) => {
                let (index, bit) = ((spi / 32) as usize, 1 << (spi % 32));
                let mut shared = self.shared.lock();
                if let Some(word) = shared.words.get_mut(index) {
                    word.write(Bits::ClearActive, bit);
                }
                shared.kicks(index, bit, self.groups())
            }
        };
        // The vCPU may list others that are active, and watch less.
        let kick = kick.union(Kick::one(vcpu));
        self.post(kick, MAIL_SHARED);
        kick
    }

    /// Sets the line of a shared interrupt.
    pub fn set_spi_level(&self, spi: Spi, level: Level) -> Kick {
        let number = (spi.intid() - 32) as usize;
        let (word, bit) = (number / 32, 1 << (number % 32));
        let groups = self.groups();
        let mut shared = self.shared.lock();
        let Some(state) = shared.words.get_mut(word) else {
            return Kick::NONE;
        };
        match level {
            Level::High => state.raise(bit),
            Level::Low => state.lower(bit),
        }
        let kick = shared.kicks(word, bit, groups);
        drop(shared);
        self.post(kick, MAIL_SHARED);
        kick
    }

    /// Raises a private interrupt: its line is high, or its physical interrupt was taken and not deactivated. The latter is pending
    /// until the guest takes it or a sync finds the physical line low.
    pub fn raise_ppi(&self, vcpu: VcpuIndex, ppi: Ppi, link: Link) -> Kick {
        self.change_private(vcpu, |private| match link {
            Link::Software => private.word.raise(ppi.bit()),
            Link::Hardware(pintid) => private.raise_hardware(ppi, pintid),
        })
    }

    /// Takes a private interrupt back: its line is low. Nobody has to say so of a hardware-linked one: a sync looks at its line.
    pub fn lower_ppi(&self, vcpu: VcpuIndex, ppi: Ppi) -> Kick {
        self.change_private(vcpu, |private| private.word.lower(ppi.bit()))
    }

    /// Says whether [`Vgic::sync`] has something new for this vCPU. One load.
    #[inline]
    pub fn needs_sync(&self, vcpu: VcpuIndex) -> bool {
        self.bank(vcpu)
            .is_some_and(|bank| bank.mail.load(Ordering::SeqCst) != 0)
    }

    /// Puts the controller into its reset state; lines stay as they are, they are the devices'.
    ///
    /// No vCPU runs meanwhile, and none keeps its list registers or its underflow interrupt: the caller
    /// withdraws or clears them first.
    pub fn reset(&self) {
        self.groups.store(0, Ordering::SeqCst);
        for bank in &self.banks {
            let mut private = bank.private.lock();
            bank.mail.store(0, Ordering::SeqCst);
            private.reset();
        }
        self.shared.lock().reset();
    }

    fn bank(&self, vcpu: VcpuIndex) -> Option<&Bank> {
        self.banks.get(vcpu.index())
    }

    fn groups(&self) -> u32 {
        self.groups.load(Ordering::SeqCst)
    }

    /// Everybody.
    fn all(&self) -> Kick {
        self.everybody
    }

    /// Mails `flags` to everybody in `kick`.
    fn post(&self, kick: Kick, flags: u64) {
        let mut left = kick.mask();
        while left != 0 {
            let index = left.trailing_zeros() as usize;
            left &= left - 1;
            if let Some(bank) = self.banks.get(index) {
                bank.mail.fetch_or(flags, Ordering::SeqCst);
            }
        }
    }

    /// Changes a vCPU's private part, and kicks it if that makes something to do.
    fn change_private(&self, vcpu: VcpuIndex, change: impl FnOnce(&mut Private)) -> Kick {
        let Some(bank) = self.bank(vcpu) else {
            return Kick::NONE;
        };
        let mut private = bank.private.lock();
        change(&mut private);
        let work = private.word.work(private.word.deliverable(self.groups()));
        drop(private);
        if work == 0 {
            return Kick::NONE;
        }
        let kick = Kick::one(vcpu);
        self.post(kick, MAIL_PRIVATE);
        kick
    }
}
