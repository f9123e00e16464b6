//! The controller as plain data, for snapshots and migration.
//!
//! # Invariants
//!
//! - A state has no list registers in it: what they hold is folded into pending and active. The caller withdraws them first, so
//!   that nothing is folded from an old view, and hardware links are cut.
//! - Any `VgicState` restores to a controller that keeps its invariants; values the registers could not hold are cut to what they can.

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

use super::private::SGI_EDGE;
use super::shared::Wake;
use super::word::{PRIORITY_MASK, Word};
use super::{ENABLE_GROUP0, ENABLE_GROUP1, Kick, SPI_WORDS, SPIS, Vgic};
use crate::VcpuIndex;

/// Thirty-two interrupts, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WordState {
    /// ISENABLER.
    pub enabled: u32,
    /// IGROUPR.
    pub group1: u32,
    /// Edge-triggered, as ICFGR has it.
    pub edge: u32,
    /// Pending by itself, not by a line.
    pub pending: u32,
    /// Lines that are high.
    pub line: u32,
    /// ISACTIVER.
    pub active: u32,
    /// IPRIORITYR.
    pub priority: [u8; 32],
}

/// All a [`Vgic`] remembers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VgicState {
    /// GICD_CTLR's group enables.
    pub groups: u32,
    /// SGIs and PPIs, one a vCPU.
    pub private: Vec<WordState>,
    /// SPIs from intid 32 on.
    pub shared: Vec<WordState>,
    /// GICD_IROUTER from intid 32 on.
    pub routes: Vec<u64>,
    /// One bit a vCPU: GICR_WAKER.ProcessorSleep is clear.
    pub awake: u32,
}

/// A state that does not fit the controller it is restored to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreError {
    /// Another number of vCPUs.
    Vcpus {
        /// In the state.
        saved: usize,
        /// In the controller.
        have: usize,
    },
    /// Another number of SPIs.
    Spis {
        /// In the state.
        saved: usize,
        /// In the controller.
        have: usize,
    },
}

impl fmt::Display for RestoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus { saved, have } => write!(
                f,
                "saved interrupt controller has {saved} vCPUs, this guest has {have}: give it {saved}"
            ),
            Self::Spis { saved, have } => write!(
                f,
                "saved interrupt controller has {saved} SPIs, this version has {have}: restore it with the version that saved it"
            ),
        }
    }
}

impl core::error::Error for RestoreError {}

impl WordState {
    fn of(word: &Word, mailed: u32) -> Self {
        Self {
            enabled: word.enabled,
            group1: word.group1,
            edge: word.edge,
            // Not `hardware`: that is a physical line, which comes again where the state is restored.
            pending: word.latch | word.listed_pending() | mailed,
            line: word.line,
            active: word.shown_active(),
            priority: word.priority,
        }
    }

    fn to_word(self) -> Word {
        Word {
            enabled: self.enabled,
            group1: self.group1,
            edge: self.edge,
            latch: self.pending,
            line: self.line,
            active: self.active,
            priority: self.priority.map(|priority| priority & PRIORITY_MASK),
            ..Word::RESET
        }
    }
}

impl Vgic {
    /// Gives all it remembers. No vCPU runs meanwhile, and all were withdrawn ([`Vgic::withdraw`]).
    pub fn save(&self) -> VgicState {
        let private = (0..self.vcpus())
            .filter_map(VcpuIndex::new)
            .filter_map(|vcpu| Some((vcpu, self.bank(vcpu)?)))
            .map(|(vcpu, bank)| WordState::of(&bank.private.lock().word, self.mailed(vcpu)))
            .collect();
        let shared = self.shared.lock();
        let awake = |vcpu: &VcpuIndex| shared.is_awake(*vcpu);
        VgicState {
            groups: self.groups(),
            private,
            shared: shared
                .words
                .iter()
                .map(|word| WordState::of(word, 0))
                .collect(),
            routes: (0..SPIS).map(|spi| shared.route(spi)).collect(),
            awake: (self.all().iter().filter(awake))
                .map(Kick::one)
                .fold(Kick::NONE, Kick::union)
                .mask(),
        }
    }

    /// Takes up what [`Vgic::save`] gave. No vCPU runs meanwhile, and none keeps its list registers.
    /// Every vCPU needs a sync after. On an error nothing has changed.
    pub fn restore(&self, state: &VgicState) -> Result<(), RestoreError> {
        if state.private.len() != self.vcpus() {
            return Err(RestoreError::Vcpus {
                saved: state.private.len(),
                have: self.vcpus(),
            });
        }
        for spis in [state.shared.len() * 32, state.routes.len()] {
            if spis != SPIS {
                return Err(RestoreError::Spis {
                    saved: spis,
                    have: SPIS,
                });
            }
        }
        self.reset();
        let groups = state.groups & (ENABLE_GROUP0 | ENABLE_GROUP1);
        self.groups.store(groups, Ordering::SeqCst);
        for (bank, saved) in self.banks.iter().zip(&state.private) {
            let mut private = bank.private.lock();
            private.word = saved.to_word();
            private.word.edge |= SGI_EDGE;
        }
        let mut shared = self.shared.lock();
        for (word, saved) in shared.words.iter_mut().zip(&state.shared).take(SPI_WORDS) {
            *word = saved.to_word();
        }
        // Whom these would kick is everybody, below.
        for (spi, route) in state.routes.iter().enumerate() {
            let _ = shared.set_route(spi, *route, groups);
        }
        for vcpu in self.all().iter() {
            let wake = match state.awake & Kick::one(vcpu).mask() {
                0 => Wake::Asleep,
                _ => Wake::Awake,
            };
            let _ = shared.set_awake(vcpu, wake, groups);
        }
        drop(shared);
        self.post(self.all(), super::MAIL_PRIVATE | super::MAIL_SHARED);
        Ok(())
    }
}
