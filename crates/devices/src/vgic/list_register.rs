//! One list register's value (IHI 0069, `ICH_LR<n>_EL2`).
//!
//! ```text
//! 63:62 State  61 HW  60 Group  55:48 Priority  44:32 pINTID (HW=1)  41 EOI (HW=0)  31:0 vINTID
//! ```
//!
//! State: bit 62 pending, bit 63 active; both zero is an empty register.

const ACTIVE: u64 = 1 << 63;
const PENDING: u64 = 1 << 62;
const HARDWARE: u64 = 1 << 61;
const GROUP1: u64 = 1 << 60;
const PRIORITY_SHIFT: u32 = 48;
const PINTID_SHIFT: u32 = 32;
const PINTID_MASK: u64 = 0x1fff;
const EOI: u64 = 1 << 41;

/// The value of a list register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lr(pub(super) u64);

impl Lr {
    /// No interrupt.
    pub(super) const EMPTY: Self = Self(0);

    /// Makes one with neither state bit set.
    pub(super) const fn new(intid: u32, priority: u8, group: Group) -> Self {
        let group = match group {
            Group::Zero => 0,
            Group::One => GROUP1,
        };
        Self(intid as u64 | (priority as u64) << PRIORITY_SHIFT | group)
    }

    /// Links it to a physical interrupt.
    pub(super) const fn with_hardware(self, pintid: u16) -> Self {
        Self(self.0 | HARDWARE | (pintid as u64 & PINTID_MASK) << PINTID_SHIFT)
    }

    /// Cuts the link to the physical interrupt.
    pub(super) const fn without_hardware(self) -> Self {
        if self.is_hardware() {
            Self(self.0 & !(HARDWARE | PINTID_MASK << PINTID_SHIFT))
        } else {
            self
        }
    }

    /// Asks for a maintenance interrupt at its end. Not for a hardware-linked one, where the bit is part of the pINTID.
    pub(super) const fn with_eoi(self) -> Self {
        Self(self.0 | EOI)
    }

    /// Sets the pending bit.
    pub(super) const fn with_pending(self) -> Self {
        Self(self.0 | PENDING)
    }

    /// Clears the pending bit.
    pub(super) const fn without_pending(self) -> Self {
        Self(self.0 & !PENDING)
    }

    /// Sets the active bit.
    pub(super) const fn with_active(self) -> Self {
        Self(self.0 | ACTIVE)
    }

    /// Clears the active bit.
    pub(super) const fn without_active(self) -> Self {
        Self(self.0 & !ACTIVE)
    }

    /// Says whether the guest is done with it.
    pub(super) const fn is_empty(self) -> bool {
        self.0 & (ACTIVE | PENDING) == 0
    }

    /// Says whether it is pending, active or not.
    pub(super) const fn is_pending(self) -> bool {
        self.0 & PENDING != 0
    }

    /// Says whether it is active, pending or not.
    pub(super) const fn is_active(self) -> bool {
        self.0 & ACTIVE != 0
    }

    /// Says whether it is linked to a physical interrupt.
    pub(super) const fn is_hardware(self) -> bool {
        self.0 & HARDWARE != 0
    }

    /// Says whether its end is a reason for a maintenance interrupt (`ICH_EISR_EL2`) for as long as it is not overwritten.
    pub(super) const fn asks_maintenance(self) -> bool {
        !self.is_hardware() && self.0 & EOI != 0
    }

    /// Gives the physical interrupt of a linked one.
    pub(super) const fn pintid(self) -> u16 {
        (self.0 >> PINTID_SHIFT & PINTID_MASK) as u16
    }

    /// Gives the priority.
    pub(super) const fn priority(self) -> u8 {
        (self.0 >> PRIORITY_SHIFT) as u8
    }
}

/// An interrupt's group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// Signalled as FIQ.
    Zero,
    /// Signalled as IRQ.
    One,
}
