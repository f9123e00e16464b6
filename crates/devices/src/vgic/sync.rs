//! Moving interrupts between the controller and a vCPU's list registers.
//!
//! # Purpose
//!
//! [`Vgic::sync`] first looks at the lines of hardware-linked interrupts that wait, whose falling nobody tells of. Then it folds: takes
//! note of what the guest did with each list register in use, and corrects what the
//! controller has since decided otherwise. Then it fills: the most urgent pending interrupt into a free list register,
//! or over a less urgent one that the guest has not taken, until none is left or there is no room; and what is active into those still
//! free (`overflow`).
//!
//! # Invariants
//!
//! Work is bounded: the fold visits each list register once; the fill lists in order of urgency, so what it evicts
//! is less urgent than all that follows, and each list register is written at most twice.
//!
//! # Concurrency
//!
//! The vCPU's private lock is held throughout, the SPI lock only if mail, list registers or a shortage say SPIs are concerned.
//! So a lone SGI takes one uncontended lock, one swap, and looks at one word.

use core::sync::atomic::{Ordering, fence};

use spin::MutexGuard;

use super::list_register::Lr;
use super::private::{self, MAX_LIST_REGISTERS, Private};
use super::shared::Shared;
use super::word::{Physical, Simple, Word};
use super::{Kick, ListRegisters, MAIL_SHARED, SPI_WORDS, Shortage, Vgic};
use crate::{Level, VcpuIndex};

/// SPIs that left this vCPU's list registers and may have to go to another.
type Moved = [u32; SPI_WORDS];

/// The next to be listed.
struct Candidate {
    priority: u8,
    intid: u32,
}

/// What a vCPU's sync works on.
pub(super) struct Desk<'a> {
    pub(super) vcpu: VcpuIndex,
    groups: u32,
    pub(super) private: &'a mut Private,
    pub(super) shared: Option<MutexGuard<'a, Shared>>,
    pub(super) moved: Moved,
}

impl Vgic {
    /// Folds what the guest did with its list registers and fills them again. Gives other vCPUs to kick: those that SPIs moved to.
    ///
    /// Only the CPU that has the vCPU's list registers calls it.
    #[inline]
    pub fn sync(&self, vcpu: VcpuIndex, registers: &mut impl ListRegisters) -> Kick {
        let Some(bank) = self.bank(vcpu) else {
            return Kick::NONE;
        };
        let mut private = bank.private.lock();
        let mail = bank.mail.swap(0, Ordering::SeqCst);
        private.word.latch |= mail as u32;
        let about_spis =
            mail & MAIL_SHARED != 0 || private.used_spi != 0 || private.shortage != Shortage::None;
        if !about_spis
            && (sync_latched(&mut private, self.groups(), registers) == Rest::Nothing
                || sync_simple(&mut private, self.groups(), registers) == Rest::Nothing)
        {
            return Kick::NONE;
        }
        let shared = about_spis.then(|| self.shared.lock());
        self.sync_rest(vcpu, private, shared, registers)
    }

    /// Does all that a sync does. Apart, so that the way of a lone SGI stays short.
    #[inline(never)]
    fn sync_rest<'a>(
        &'a self,
        vcpu: VcpuIndex,
        mut private: MutexGuard<'a, Private>,
        shared: Option<MutexGuard<'a, Shared>>,
        registers: &mut impl ListRegisters,
    ) -> Kick {
        let mut desk = Desk {
            vcpu,
            groups: self.groups(),
            private: &mut private,
            shared,
            moved: [0; SPI_WORDS],
        };
        desk.sample(registers);
        desk.release(registers);
        desk.fold(registers);
        desk.end_left_out(registers);
        desk.fill(registers);
        let kick = desk.moved_to();
        drop(desk);
        drop(private);
        self.post(kick, MAIL_SHARED);
        kick
    }

    /// Takes everything out of the list registers, which are all zero after: before [`Vgic::save`], or when the vCPU is turned off.
    ///
    /// Hardware links are cut: physical interrupts are deactivated, and come again if their lines are high.
    pub fn withdraw(&self, vcpu: VcpuIndex, registers: &mut impl ListRegisters) -> Kick {
        let Some(bank) = self.bank(vcpu) else {
            return Kick::NONE;
        };
        let mut private = bank.private.lock();
        let mail = bank.mail.swap(0, Ordering::SeqCst);
        private.word.latch |= mail as u32;
        let mut desk = Desk {
            vcpu,
            groups: self.groups(),
            private: &mut private,
            shared: Some(self.shared.lock()),
            moved: [0; SPI_WORDS],
        };
        desk.fold(registers);
        desk.end_left_out(registers);
        desk.withdraw(registers);
        // After, as this is what cuts the links of those that were only latched.
        desk.release(registers);
        let kick = desk.moved_to();
        drop(desk);
        drop(private);
        self.post(kick, MAIL_SHARED);
        // What was withdrawn waits for this vCPU's own next sync.
        self.post(Kick::one(vcpu), MAIL_SHARED);
        kick
    }

    /// Says whether an interrupt is pending that would end the vCPU's WFI.
    ///
    /// Exact after a [`Vgic::sync`] but for the guest's priority mask and group enables in the CPU interface; otherwise it may
    /// say yes in vain. It never says no in vain to a caller that announced the wait before it asked.
    pub fn has_deliverable(&self, vcpu: VcpuIndex) -> bool {
        // Between the caller's announcement and the loads below; pairs with the senders' mail.
        fence(Ordering::SeqCst);
        let Some(bank) = self.bank(vcpu) else {
            return false;
        };
        let private = bank.private.lock();
        let groups = self.groups();
        let deliverable = private.word.deliverable(groups);
        let mailed = bank.mail.load(Ordering::SeqCst) as u32;
        let mailed = mailed & deliverable & !private.word.listed & !private.word.active;
        if private.pending != 0 || private.word.fresh(deliverable) | mailed != 0 {
            return true;
        }
        let shared = self.shared.lock();
        let mut words = shared.words.iter().enumerate();
        words.any(|(index, word)| {
            word.fresh(word.deliverable(groups)) & shared.routed(vcpu, index) != 0
        })
    }
}

/// What a short way left undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing.
    Nothing,
    /// A longer way.
    All,
}

/// Syncs a vCPU whose private interrupts have all ended in their list registers, which one register says, and of which
/// one edge at most is latched: nearly every SGI.
#[inline]
fn sync_latched(private: &mut Private, groups: u32, registers: &mut impl ListRegisters) -> Rest {
    if private.used != 0 {
        if private.used & !registers.empty() != 0 {
            return Rest::All;
        }
        private.all_ended();
    }
    if !private.word.has_latched_only() {
        return Rest::All;
    }
    let fresh = private.word.latch & private.word.deliverable(groups);
    if fresh == 0 {
        return Rest::Nothing;
    }
    if fresh & fresh.wrapping_sub(1) != 0 || fresh & private.word.edge == 0 {
        return Rest::All;
    }
    let intid = fresh.trailing_zeros();
    let lr = private.word.list_simple(intid, intid);
    registers.write(0, lr.0);
    private.hold(0, intid);
    private.pending = 1;
    Rest::Nothing
}

/// Syncs a vCPU that has only private interrupts about, if each list register in use ended without further ado or
/// is as it was, and at most one interrupt is to be listed. Otherwise what it did so far is what a whole sync begins with.
#[inline(never)]
fn sync_simple(private: &mut Private, groups: u32, registers: &mut impl ListRegisters) -> Rest {
    let mut left = private.used;
    while left != 0 {
        let n = left.trailing_zeros() as usize;
        left &= left - 1;
        let lr = Lr(registers.read(n));
        let bit = 1 << (private.held(n) & 31);
        if lr.is_empty() && !lr.asks_maintenance() {
            private.word.unlist(bit);
            private.let_go(n);
        } else if !private.word.is_as_noted(bit, lr) || lr.is_hardware() && lr.is_pending() {
            // Of a linked one that was not taken yet the line may have fallen.
            return Rest::All;
        }
    }
    let deliverable = private.word.deliverable(groups);
    if private.word.pressing(deliverable) != 0 {
        return Rest::All;
    }
    let simple = private.word.simple(deliverable);
    let intid = match simple {
        // Before this sync nothing was left out, so nothing is to be told.
        Simple::Nothing => return Rest::Nothing,
        Simple::Several => return Rest::All,
        Simple::Edge(intid) | Simple::One(intid) => intid,
    };
    let free = !private.used & private::mask_of(registers.count());
    if free == 0 {
        return Rest::All;
    }
    let pintid = private.pintid(intid);
    let lr = match simple {
        Simple::Edge(_) => private.word.list_simple(intid, intid),
        _ if private.word.sampled() & 1 << (intid & 31) != 0
            && registers.physical_line(pintid) == Level::Low =>
        {
            return Rest::All;
        }
        _ => private.word.list(intid, intid, pintid, deliverable),
    };
    let n = free.trailing_zeros() as usize;
    registers.write(n, lr.0);
    private.hold(n, intid);
    private.pending |= 1 << n;
    Rest::Nothing
}

impl Desk<'_> {
    /// Gives up hardware-linked interrupts that wait and whose line is low, and notes that of those left out.
    #[inline]
    fn sample(&mut self, registers: &mut impl ListRegisters) {
        let word = &self.private.word;
        let mut left = word.sampled() | word.line_left_out();
        while left != 0 {
            let intid = left.trailing_zeros();
            left &= left - 1;
            if registers.physical_line(self.private.pintid(intid)) == Level::Low {
                self.private.word.unlink(1 << intid);
                self.private.word.fell_left_out(1 << intid);
            }
        }
    }

    /// Deactivates physical interrupts of hardware-linked ones that were given up before they were listed.
    #[inline]
    fn release(&mut self, registers: &mut impl ListRegisters) {
        let mut left = self.private.word.release;
        self.private.word.release = 0;
        while left != 0 {
            let intid = left.trailing_zeros();
            left &= left - 1;
            registers.deactivate(self.private.pintid(intid));
        }
    }

    /// Takes note of each list register in use.
    #[inline]
    fn fold(&mut self, registers: &mut impl ListRegisters) {
        let mut left = self.private.used;
        while left != 0 {
            let n = left.trailing_zeros() as usize;
            left &= left - 1;
            let (groups, intid) = (self.groups, self.private.held(n));
            let old = Lr(registers.read(n));
            let line = match old.is_hardware() && !old.is_empty() {
                true => registers.physical_line(old.pintid()),
                false => Level::Low,
            };
            let Some((word, bit, allowed)) = self.word(intid) else {
                continue;
            };
            let (new, physical) = word.fold(bit, old, word.deliverable(groups) & allowed, line);
            if physical == Physical::Deactivate {
                registers.deactivate(old.pintid());
            }
            // One that ended by itself is as good as zero, unless it still asks for maintenance.
            if new != old && (!old.is_empty() || old.asks_maintenance()) {
                registers.write(n, new.0);
            }
            if new.is_empty() {
                self.let_go(n, intid);
            } else {
                self.note_pending(n, new);
            }
        }
    }

    /// Lists what is deliverable, the most urgent first, as far as there is room.
    #[inline]
    fn fill(&mut self, registers: &mut impl ListRegisters) {
        let mut pending_left = false;
        while let Some(candidate) = self.candidate() {
            let Some(n) = self.room(registers, candidate.priority) else {
                pending_left = true;
                break;
            };
            self.put(registers, n, candidate.intid);
        }
        if pending_left {
            self.hold_back(registers);
        }
        let active_left = self.list_active(registers);
        self.set_shortage(
            registers,
            match (pending_left, active_left) {
                (false, false) => Shortage::None,
                (true, false) => Shortage::Pending,
                (false, true) => Shortage::Active,
                (true, true) => Shortage::Both,
            },
        );
    }

    /// Puts an unlisted interrupt into list register `n`.
    #[inline]
    pub(super) fn put(&mut self, registers: &mut impl ListRegisters, n: usize, intid: u32) {
        let (groups, vcpu) = (self.groups, self.vcpu);
        let pintid = self.private.pintid(intid);
        let Some((word, _, allowed)) = self.word(intid) else {
            return;
        };
        // One that is active here may be another's when it is pending again.
        let lr = word.list(
            intid & 31,
            intid,
            pintid,
            word.deliverable(groups) & allowed,
        );
        if let (Some(shared), Some(spi)) = (&mut self.shared, intid.checked_sub(32)) {
            shared.set_owner(spi as usize, vcpu);
        }
        registers.write(n, lr.0);
        self.private.hold(n, intid);
        self.note_pending(n, lr);
    }

    /// Empties all list registers, hardware links cut.
    fn withdraw(&mut self, registers: &mut impl ListRegisters) {
        for n in 0..registers.count().min(MAX_LIST_REGISTERS) {
            if self.private.used & 1 << n != 0 {
                let intid = self.private.held(n);
                let lr = Lr(registers.read(n));
                let physical = self
                    .word(intid)
                    .map(|(word, bit, _)| word.withdraw(bit, lr));
                if physical == Some(Physical::Deactivate) {
                    registers.deactivate(lr.pintid());
                }
                self.let_go(n, intid);
            }
            registers.write(n, Lr::EMPTY.0);
        }
        self.private.word.unlink(u32::MAX);
        self.abandon_left_out();
        self.set_shortage(registers, Shortage::None);
    }

    /// Finds the most urgent interrupt to be listed as pending.
    #[inline]
    fn candidate(&self) -> Option<Candidate> {
        let private = &self.private.word;
        let first = private.first(private.deliverable(self.groups), u32::MAX);
        let mut best = first.map(|(priority, intid)| Candidate { priority, intid });
        if let Some(shared) = &self.shared {
            for (index, word) in shared.words.iter().enumerate() {
                if word.is_quiet() {
                    continue;
                }
                let routed = shared.routed(self.vcpu, index);
                let Some((priority, bit)) = word.first(word.deliverable(self.groups), routed)
                else {
                    continue;
                };
                if best.as_ref().is_none_or(|best| priority < best.priority) {
                    // At most 159.
                    let intid = 32 + 32 * index as u32 + bit;
                    best = Some(Candidate { priority, intid });
                }
            }
        }
        best
    }

    /// Finds a list register for a pending interrupt of this priority: a free one; that of the least urgent interrupt the guest has not
    /// taken, which goes back; or, if all are active, that of the least urgent, which is left out from here on.
    #[inline]
    fn room(&mut self, registers: &mut impl ListRegisters, priority: u8) -> Option<usize> {
        if let Some(n) = self.free(registers) {
            return Some(n);
        }
        let count = registers.count().min(MAX_LIST_REGISTERS);
        let pending = (0..count).filter(|n| self.private.pending & 1 << n != 0);
        let least = pending
            .map(|n| (n, Lr(registers.read(n))))
            .max_by_key(|(_, lr)| lr.priority());
        let Some((n, victim)) = least else {
            return self.spill(registers);
        };
        if priority >= victim.priority() {
            return None;
        }
        let intid = self.private.held(n);
        if let Some((word, bit, _)) = self.word(intid) {
            word.evict(bit, victim);
        }
        self.let_go(n, intid);
        Some(n)
    }

    /// Finds a list register that holds nothing.
    #[inline]
    pub(super) fn free(&self, registers: &impl ListRegisters) -> Option<usize> {
        let free = !self.private.used & private::mask_of(registers.count());
        (free != 0).then(|| free.trailing_zeros() as usize)
    }

    /// Finds the word of an interrupt, its bit, and those of the word's that may be delivered here.
    #[inline]
    pub(super) fn word(&mut self, intid: u32) -> Option<(&mut Word, u32, u32)> {
        let bit = 1 << (intid & 31);
        let Some(spi) = intid.checked_sub(32) else {
            return Some((&mut self.private.word, bit, u32::MAX));
        };
        let index = (spi / 32) as usize;
        let shared = self.shared.as_mut()?;
        let routed = shared.routed(self.vcpu, index);
        Some((shared.words.get_mut(index)?, bit, routed))
    }

    pub(super) fn let_go(&mut self, n: usize, intid: u32) {
        self.private.let_go(n);
        self.note_moved(intid);
    }

    #[inline]
    pub(super) fn note_moved(&mut self, intid: u32) {
        if let Some(spi) = intid.checked_sub(32)
            && let Some(moved) = self.moved.get_mut((spi / 32) as usize)
        {
            *moved |= 1 << (spi % 32);
        }
    }

    fn note_pending(&mut self, n: usize, lr: Lr) {
        let bit = u32::from(lr.is_pending() && !lr.is_active()) << n;
        self.private.pending = self.private.pending & !(1 << n) | bit;
    }

    fn set_shortage(&mut self, registers: &mut impl ListRegisters, shortage: Shortage) {
        if self.private.shortage != shortage {
            self.private.shortage = shortage;
            registers.set_shortage(shortage);
        }
    }

    /// Gives the other vCPUs that SPIs no longer held here now go to.
    fn moved_to(&self) -> Kick {
        let Some(shared) = &self.shared else {
            return Kick::NONE;
        };
        let moved = self
            .moved
            .iter()
            .enumerate()
            .filter(|(_, bits)| **bits != 0);
        moved
            .map(|(index, bits)| {
                shared.kicks(index, bits & !shared.routed(self.vcpu, index), self.groups)
            })
            .fold(Kick::NONE, Kick::union)
            .without(self.vcpu)
    }
}
