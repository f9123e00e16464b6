//! More active interrupts than list registers.
//!
//! # Purpose
//!
//! Guests nest by priority, 32 deep if they like, and with EOImode 1 they may have any number active at once. What is active needs a
//! list register less than what is pending: it is not signalled, and the active priorities are in `ICH_AP0R<n>_EL2` and
//! `ICH_AP1R<n>_EL2` in any case. So it is left out where there are too few.
//!
//! # Invariants
//!
//! - An interrupt is left out by the vCPU that took it, and stays that vCPU's until it ends, wherever it is routed.
//! - The count of ends is of interrupts in no list register, so it is matched to those alone: the awaited ones, and one
//!   that was made active by hand since the last sync if there is no other.
//! - What is written to ISACTIVER and ICACTIVER about an awaited one waits for the ends before it to be counted.
//!
//! # Concurrency
//!
//! Part of a sync: see there. Specification: IHI 0069, `ICH_HCR_EL2` (EOIcount, LRENPIE, NPIE, TDIR).

use super::ListRegisters;
use super::list_register::Lr;
use super::private::MAX_LIST_REGISTERS;
use super::shared::Shared;
use super::sync::Desk;
use super::word::Physical;
use crate::VcpuIndex;

impl Desk<'_> {
    /// Ends what the guest ended of the active interrupts that are in no list register: the most urgent first, as it ran.
    pub(super) fn end_left_out(&mut self, registers: &mut impl ListRegisters) {
        if !self.private.shortage.of_active() {
            return;
        }
        // At most 31.
        for _ in 0..registers.take_ended() {
            let Some(intid) = self.first_awaited().or_else(|| self.first_active()) else {
                break;
            };
            if let Some((word, bit, _)) = self.word(intid) {
                word.end(bit);
            }
            // Its line may be high, and it may be another's by now.
            self.note_moved(intid);
        }
        self.carry_out();
    }

    /// Does what was written about those left out, now that the ends before are counted.
    fn carry_out(&mut self) {
        self.private.word.carry_out(u32::MAX);
        let Some(shared) = &mut self.shared else {
            return;
        };
        for (index, moved) in self.moved.iter_mut().enumerate() {
            let here = shared.awaited(self.vcpu, index);
            if let Some(word) = shared.words.get_mut(index) {
                *moved |= word.carry_out(here);
            }
        }
    }

    /// Makes room where all list registers are active.
    #[cold]
    pub(super) fn spill(&mut self, registers: &mut impl ListRegisters) -> Option<usize> {
        let (n, victim) = (0..registers.count().min(MAX_LIST_REGISTERS))
            .map(|n| (n, Lr(registers.read(n))))
            .max_by_key(|(_, lr)| lr.priority())?;
        let intid = self.private.held(n);
        if let Some((word, bit, _)) = self.word(intid)
            && word.spill(bit, victim) == Physical::Deactivate
        {
            // It comes again if its line is high, and waits.
            registers.deactivate(victim.pintid());
        }
        self.let_go(n, intid);
        Some(n)
    }

    /// Has none that is active come back, when it ends, before a more urgent one that was left out.
    pub(super) fn hold_back(&mut self, registers: &mut impl ListRegisters) {
        for n in 0..registers.count().min(MAX_LIST_REGISTERS) {
            let lr = Lr(registers.read(n));
            if self.private.used & 1 << n == 0 || !lr.is_pending() || !lr.is_active() {
                continue;
            }
            let intid = self.private.held(n);
            if let Some((word, bit, _)) = self.word(intid) {
                let new = word.hold_back(bit, lr);
                registers.write(n, new.0);
            }
        }
    }

    /// Lists what is active, the most urgent first, whose end comes first. Says whether some is left out.
    pub(super) fn list_active(&mut self, registers: &mut impl ListRegisters) -> bool {
        while let Some(intid) = self.first_active() {
            let Some(n) = self.free(registers) else {
                self.leave_out();
                return true;
            };
            self.put(registers, n, intid);
        }
        false
    }

    /// Finds the most urgent active interrupt that is in no list register and this vCPU's to end.
    fn first_active(&self) -> Option<u32> {
        self.first_of(self.private.word.stranded(), Shared::stranded)
    }

    /// Finds the most urgent one whose end this vCPU looks for.
    fn first_awaited(&self) -> Option<u32> {
        self.first_of(self.private.word.awaited(), Shared::awaited)
    }

    fn first_of(
        &self,
        private: u32,
        spis: impl Fn(&Shared, VcpuIndex, usize) -> u32,
    ) -> Option<u32> {
        let mut best = self.private.word.first_active(private);
        if let Some(shared) = &self.shared {
            for (index, word) in shared.words.iter().enumerate() {
                if word.stranded() == 0 {
                    continue;
                }
                let first = word.first_active(spis(shared, self.vcpu, index));
                if let Some((priority, bit)) = first
                    && best.is_none_or(|(lowest, _)| priority < lowest)
                {
                    // At most 159.
                    best = Some((priority, 32 + 32 * index as u32 + bit));
                }
            }
        }
        best.map(|(_, intid)| intid)
    }

    /// Has this vCPU look for the end of all of them.
    fn leave_out(&mut self) {
        self.private.word.leave_out(u32::MAX);
        let Some(shared) = &mut self.shared else {
            return;
        };
        for index in 0..shared.words.len() {
            let here = shared.stranded(self.vcpu, index);
            let mut left = here;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                shared.set_owner(32 * index + bit as usize, self.vcpu);
            }
            if let Some(word) = shared.words.get_mut(index) {
                word.leave_out(here);
            }
        }
    }

    /// Nobody looks for their end any more: shared ones are whose they are routed to.
    pub(super) fn abandon_left_out(&mut self) {
        self.private.word.left_out = 0;
        let Some(shared) = &mut self.shared else {
            return;
        };
        for index in 0..shared.words.len() {
            let here = shared.stranded(self.vcpu, index);
            if let Some(word) = shared.words.get_mut(index) {
                word.left_out &= !here;
            }
        }
    }
}
