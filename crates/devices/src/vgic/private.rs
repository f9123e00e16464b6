//! What belongs to one vCPU: its SGIs and PPIs, and what its list registers hold.
//!
//! # Invariants
//!
//! - `used` has the list registers that hold an interrupt as far as the last sync knows, `used_spi` those of them that
//!   hold an SPI, `pending` those that were pending and not active; `held` says which interrupt.
//!
//! # Concurrency
//!
//! Behind the vCPU's private lock.

use super::word::Word;
use super::{Ppi, Shortage};

/// SGIs are edge-triggered for good (GICR_ICFGR0 is read-only).
pub(super) const SGI_EDGE: u32 = 0xffff;

/// The most list registers there can be.
pub(super) const MAX_LIST_REGISTERS: usize = 16;

/// Gives one bit for each of `count` list registers.
#[inline]
pub(super) fn mask_of(count: usize) -> u32 {
    (1 << count.min(MAX_LIST_REGISTERS)) - 1
}

/// A vCPU's private part.
#[derive(Debug)]
pub(super) struct Private {
    pub(super) word: Word,
    /// Physical interrupt of each hardware-linked PPI, by intid - 16.
    pintids: [u16; 16],
    pub(super) used: u32,
    pub(super) used_spi: u32,
    pub(super) pending: u32,
    held: [u8; MAX_LIST_REGISTERS],
    /// What the list registers did not suffice for at the last sync.
    pub(super) shortage: Shortage,
}

impl Private {
    /// Makes the reset state.
    pub(super) const fn new() -> Self {
        Self {
            word: Word {
                edge: SGI_EDGE,
                ..Word::RESET
            },
            pintids: [0; 16],
            used: 0,
            used_spi: 0,
            pending: 0,
            held: [0; MAX_LIST_REGISTERS],
            shortage: Shortage::None,
        }
    }

    /// Back to the reset state; lines stay.
    pub(super) fn reset(&mut self) {
        let line = self.word.line;
        *self = Self::new();
        self.word.line = line;
    }

    /// Latches a hardware-linked PPI.
    pub(super) fn raise_hardware(&mut self, ppi: Ppi, pintid: u16) {
        if let Some(slot) = self.pintids.get_mut(usize::from(ppi.0) & 15) {
            *slot = pintid;
        }
        self.word.hardware |= ppi.bit();
        // Taken again before the last request to deactivate it was carried out: that request is void.
        self.word.release &= !ppi.bit();
    }

    /// Gives the physical interrupt of a private one.
    pub(super) fn pintid(&self, intid: u32) -> u16 {
        self.pintids.get(intid as usize & 15).copied().unwrap_or(0)
    }

    /// Gives the interrupt list register `n` holds.
    pub(super) fn held(&self, n: usize) -> u32 {
        u32::from(self.held.get(n).copied().unwrap_or(0))
    }

    /// Takes note that list register `n` holds `intid`.
    pub(super) fn hold(&mut self, n: usize, intid: u32) {
        self.used |= 1 << n;
        if intid >= 32 {
            self.used_spi |= 1 << n;
        }
        if let Some(held) = self.held.get_mut(n) {
            // Below 160.
            *held = intid as u8;
        }
    }

    /// Takes note that what all list registers in use held has ended, none of them an SPI.
    #[inline]
    pub(super) fn all_ended(&mut self) {
        self.word.listed = 0;
        self.used = 0;
        self.pending = 0;
    }

    /// Takes note that list register `n` is empty.
    pub(super) fn let_go(&mut self, n: usize) {
        self.used &= !(1 << n);
        self.used_spi &= !(1 << n);
        self.pending &= !(1 << n);
    }
}
