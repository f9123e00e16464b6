//! The SPIs: their words, and which vCPU each goes to.
//!
//! # Invariants
//!
//! - `routed[v]` has exactly the bits of the SPIs whose target is vCPU `v`; an SPI routed to an affinity that no vCPU has is in none.
//! - A listed SPI's `owner` is the vCPU whose list register holds it, or that looks for its end; only that vCPU's sync changes it.
//!
//! # Concurrency
//!
//! Behind the controller's one lock for SPIs, which is taken after a vCPU's own and held for a bounded time (see the parent).

use super::word::Word;
use super::{Kick, SPI_WORDS, SPIS};
use crate::{MAX_VCPUS, VcpuIndex};

/// IROUTER's Interrupt_Routing_Mode: any participating vCPU.
const ANY: u64 = 1 << 31;
/// IROUTER bits that are kept: Aff3, IRM, Aff2 to Aff0.
const ROUTE_MASK: u64 = 0x0000_00ff_80ff_ffff;

/// All SPIs.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) words: [Word; SPI_WORDS],
    /// IROUTER values.
    routes: [u64; SPIS],
    routed: [[u32; SPI_WORDS]; MAX_VCPUS],
    owners: [u8; SPIS],
    /// vCPUs whose GICR_WAKER.ProcessorSleep is clear.
    awake: u32,
    vcpus: usize,
}

impl Shared {
    /// Makes the reset state for this many vCPUs.
    pub(super) fn new(vcpus: usize) -> Self {
        let mut shared = Self {
            words: [const { Word::RESET }; SPI_WORDS],
            routes: [0; SPIS],
            routed: [[0; SPI_WORDS]; MAX_VCPUS],
            owners: [0; SPIS],
            awake: 0,
            vcpus,
        };
        // All routes are 0: vCPU 0.
        shared.routed[0] = [u32::MAX; SPI_WORDS];
        shared
    }

    /// Back to the reset state; lines stay.
    pub(super) fn reset(&mut self) {
        let lines = self.words.each_ref().map(|word| word.line);
        *self = Self::new(self.vcpus);
        for (word, line) in self.words.iter_mut().zip(lines) {
            word.line = line;
        }
    }

    /// Gives the bits of one word that go to `vcpu`.
    pub(super) fn routed(&self, vcpu: VcpuIndex, word: usize) -> u32 {
        let words = self.routed.get(vcpu.index());
        words
            .and_then(|words| words.get(word))
            .copied()
            .unwrap_or(0)
    }

    /// Reads IROUTER of SPI number `spi`.
    pub(super) fn route(&self, spi: usize) -> u64 {
        self.routes.get(spi).copied().unwrap_or(0)
    }

    /// Writes IROUTER of SPI number `spi`. Gives whom it concerns: the owner, to hand it over, or the new target.
    pub(super) fn set_route(&mut self, spi: usize, value: u64, groups: u32) -> Kick {
        let Some(route) = self.routes.get_mut(spi) else {
            return Kick::NONE;
        };
        *route = value & ROUTE_MASK;
        self.reroute(spi, groups)
    }

    /// Says whether a vCPU's redistributor is awake.
    pub(super) fn is_awake(&self, vcpu: VcpuIndex) -> bool {
        self.awake & Kick::one(vcpu).mask() != 0
    }

    /// Takes note of GICR_WAKER; SPIs for any vCPU may go elsewhere by it.
    pub(super) fn set_awake(&mut self, vcpu: VcpuIndex, wake: Wake, groups: u32) -> Kick {
        match wake {
            Wake::Awake => self.awake |= Kick::one(vcpu).mask(),
            Wake::Asleep => self.awake &= !Kick::one(vcpu).mask(),
        }
        let mut kick = Kick::NONE;
        for spi in 0..SPIS {
            if self.route(spi) & ANY != 0 {
                kick = kick.union(self.reroute(spi, groups));
            }
        }
        kick
    }

    /// Gives the vCPU an unlisted SPI goes to.
    pub(super) fn target(&self, spi: usize) -> Option<VcpuIndex> {
        let route = self.route(spi);
        let target = match route & ANY {
            0 => VcpuIndex::from_affinity(route)?,
            // The lowest that is awake. No vCPU has to be: guests that never write WAKER get their SPIs too.
            _ => VcpuIndex::new(self.awake.trailing_zeros() as usize).unwrap_or(VcpuIndex::ZERO),
        };
        (target.index() < self.vcpus).then_some(target)
    }

    /// Gives the active SPIs of one word that are in no list register and are `vcpu`'s to end: it took them, or they go to it.
    pub(super) fn stranded(&self, vcpu: VcpuIndex, word: usize) -> u32 {
        let Some(state) = self.words.get(word) else {
            return 0;
        };
        state.stranded() & !state.left_out & self.routed(vcpu, word) | self.awaited(vcpu, word)
    }

    /// Gives those of them whose end `vcpu` looks for.
    pub(super) fn awaited(&self, vcpu: VcpuIndex, word: usize) -> u32 {
        let mut here = 0;
        let mut left = self.words.get(word).map_or(0, Word::awaited);
        while left != 0 {
            let index = left.trailing_zeros();
            left &= left - 1;
            if self.owner(word * 32 + index as usize) == Some(vcpu) {
                here |= 1 << index;
            }
        }
        here
    }

    /// Gives the vCPU whose list register holds a listed SPI, or that looks for its end.
    fn owner(&self, spi: usize) -> Option<VcpuIndex> {
        VcpuIndex::new(usize::from(*self.owners.get(spi)?))
    }

    /// Takes note that `vcpu` lists an SPI.
    pub(super) fn set_owner(&mut self, spi: usize, vcpu: VcpuIndex) {
        if let Some(owner) = self.owners.get_mut(spi) {
            // Below 16.
            *owner = vcpu.index() as u8;
        }
    }

    /// Gives the vCPUs that have something to do about SPIs of `word` within `mask`.
    pub(super) fn kicks(&self, word: usize, mask: u32, groups: u32) -> Kick {
        let Some(state) = self.words.get(word) else {
            return Kick::NONE;
        };
        let work = state.work(state.deliverable(groups)) & mask;
        self.holders(word, work)
    }

    /// Gives the vCPUs whose list registers hold SPIs of `word`, or that look for their ends.
    pub(super) fn listers(&self, word: usize) -> Kick {
        self.holders(word, self.owned(word))
    }

    /// Gives the SPIs of `word` that have an owner.
    fn owned(&self, word: usize) -> u32 {
        let state = self.words.get(word);
        state.map_or(0, |state| state.listed | state.awaited())
    }

    /// Gives the vCPUs that hold or would hold the SPIs in `bits`.
    fn holders(&self, word: usize, bits: u32) -> Kick {
        let owned = self.owned(word);
        let mut kick = Kick::NONE;
        let mut left = bits;
        while left != 0 {
            let index = left.trailing_zeros();
            left &= left - 1;
            let spi = word * 32 + index as usize;
            let holder = match owned >> index & 1 {
                0 => self.target(spi),
                _ => self.owner(spi),
            };
            if let Some(vcpu) = holder {
                kick = kick.union(Kick::one(vcpu));
            }
        }
        kick
    }

    fn reroute(&mut self, spi: usize, groups: u32) -> Kick {
        let (word, bit) = (spi / 32, 1 << (spi % 32));
        let target = self.target(spi);
        let mut moved = false;
        for (index, words) in self.routed.iter_mut().enumerate() {
            let Some(routed) = words.get_mut(word) else {
                continue;
            };
            let before = *routed;
            *routed &= !bit;
            if target.is_some_and(|target| target.index() == index) {
                *routed |= bit;
            }
            moved |= *routed != before;
        }
        let Some(state) = self.words.get(word) else {
            return Kick::NONE;
        };
        if !moved {
            return Kick::NONE;
        }
        // A pending one is handed over by its owner; an active one stays until the guest ends it.
        let handed_over = state.listed & state.in_pending & bit;
        self.holders(word, handed_over)
            .union(self.kicks(word, bit, groups))
    }
}

/// What a redistributor's GICR_WAKER asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// ProcessorSleep clear.
    Awake,
    /// ProcessorSleep set.
    Asleep,
}
