//! Thirty-two interrupts: one word of each register, and the life of one in a list register.
//!
//! # Purpose
//!
//! SGIs and PPIs of a vCPU are one [`Word`], the SPIs four. Everything that is the same for
//! both is here: what registers show, what is deliverable, and what an interrupt's list register means.
//!
//! # Invariants
//!
//! For each interrupt (bit), where *listed* says whether a list register holds it:
//!
//! - Outside a list register its pending state is `latch`, its line being high if it is level-triggered, or `hardware`; its active state is `active`.
//! - In a list register, pending came from `latch` iff `soft`: listing moves the bit from `latch` to `soft`, taking it
//!   back moves it from `soft` to `latch`. So a pending edge or SGI is in exactly one of `latch`, `soft`, or was seen by the guest.
//!   In the same way it came from `hardware` iff `linked`.
//! - The physical interrupt of a linked one is active iff `hardware`, `release`, or listed and `linked`. Its line is the device's, which
//!   nobody tells of: it is looked at before the interrupt is listed, and at each fold ([`Word::fold`]). Low, the interrupt is no longer
//!   pending, and the physical one is deactivated; that comes again when the line rises. Only a linked interrupt that the guest calls
//!   edge-triggered stays.
//! - `latch`, `deactivate` or `active` set while listed is something for the next fold to put into the list register.
//! - `left_out` is within `active` and not `listed`; `taken` and `activate` mean something within `left_out` only. `deactivate` or `activate`
//!   set while left out is carried out by the vCPU that looks for the end, once it has counted the ends that came before ([`Word::carry_out`]).
//! - `soft`, `linked`, `in_pending`, `in_active` and `told` mean something within `listed` only, `in_line` within `listed` and `linked`
//!   or `left_out`, `deactivate` within `listed` and `left_out`; listing or leaving out sets them, and what is left of them afterwards is not cleared.
//! - A hardware-linked list register is never pending and active at once (IHI 0069, `ICH_LR<n>_EL2.HW`).
//!
//! # Concurrency
//!
//! None: a word is behind its owner's lock.

use super::list_register::{Group, Lr};
use crate::Level;

/// A bit register's function, in the order of their offsets: 0x080 each (IHI 0069, 12.8 and 12.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    /// IGROUPR.
    Group,
    /// ISENABLER.
    SetEnable,
    /// ICENABLER.
    ClearEnable,
    /// ISPENDR.
    SetPending,
    /// ICPENDR.
    ClearPending,
    /// ISACTIVER.
    SetActive,
    /// ICACTIVER.
    ClearActive,
}

impl Bits {
    /// Finds the function and the word's number at an offset from 0x080 to 0x3ff.
    pub(super) const fn at(offset: u64) -> Option<(Self, usize)> {
        let bits = match offset >> 7 {
            1 => Self::Group,
            2 => Self::SetEnable,
            3 => Self::ClearEnable,
            4 => Self::SetPending,
            5 => Self::ClearPending,
            6 => Self::SetActive,
            7 => Self::ClearActive,
            _ => return None,
        };
        Some((bits, (offset as usize & 0x7f) >> 2))
    }

    /// Says whether it shows state that a list register may hold.
    pub(super) const fn shows_state(self) -> bool {
        matches!(
            self,
            Self::SetPending | Self::ClearPending | Self::SetActive | Self::ClearActive
        )
    }
}

/// What is to be done about the physical interrupt of a list register just changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Physical {
    /// Nothing: there is none, or the guest deactivates it in time.
    Keep,
    /// Deactivate it: the guest never will.
    Deactivate,
}

/// State and configuration of 32 interrupts.
#[derive(Clone, Debug)]
pub(super) struct Word {
    pub(super) enabled: u32,
    pub(super) group1: u32,
    /// Edge-triggered; the others are level-triggered.
    pub(super) edge: u32,
    pub(super) priority: [u8; 32],
    /// Pending by an edge, an SGI or ISPENDR, and not listed as such.
    pub(super) latch: u32,
    /// Pending by a hardware link, and not listed as such.
    pub(super) hardware: u32,
    /// Lines that are high.
    pub(super) line: u32,
    /// Active outside a list register, or to be made active in one.
    pub(super) active: u32,
    /// Of those active outside: left out for want of list registers, with a vCPU that looks for their end.
    pub(super) left_out: u32,
    /// The priority that each of them was taken with: the guest may have changed `priority` since.
    pub(super) taken: [u8; 32],
    pub(super) listed: u32,
    pub(super) soft: u32,
    /// Listed with a hardware link.
    pub(super) linked: u32,
    /// Pending in a list register when last folded.
    pub(super) in_pending: u32,
    /// Active in a list register when last folded.
    pub(super) in_active: u32,
    /// Listed with a hardware link, or left out of a list register that had one, and the line was high at the last sync.
    pub(super) in_line: u32,
    /// Listed, and its end will be told by a maintenance interrupt.
    pub(super) told: u32,
    /// To be made inactive in its list register, or when the ends are counted.
    pub(super) deactivate: u32,
    /// Left out, and made active by hand: an end that is counted came before that.
    pub(super) activate: u32,
    /// Unlisted, with a physical interrupt to deactivate.
    pub(super) release: u32,
}

/// What a word has to be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Simple {
    /// Nothing.
    Nothing,
    /// An edge alone, for [`Word::list_simple`].
    Edge(u32),
    /// Another one alone, for [`Word::list`].
    One(u32),
    /// Several, or one that is active: [`Word::first`] chooses.
    Several,
}

/// Writable priority bits: five, as QEMU and KVM show. GICv3 asks for at least four with one security state.
pub(super) const PRIORITY_MASK: u8 = 0xf8;

/// Finds the lowest priority among interrupts, and whose it is.
#[inline]
fn first_of(bits: u32, priority: impl Fn(u32) -> u8) -> Option<(u8, u32)> {
    let mut left = bits;
    let mut best: Option<(u8, u32)> = None;
    while left != 0 {
        let index = left.trailing_zeros();
        left &= left - 1;
        let rank = priority(index);
        if best.is_none_or(|(lowest, _)| rank < lowest) {
            best = Some((rank, index));
        }
    }
    best
}

impl Word {
    /// The reset state with all lines low.
    pub(super) const RESET: Self = Self {
        enabled: 0,
        group1: 0,
        edge: 0,
        priority: [0; 32],
        latch: 0,
        hardware: 0,
        line: 0,
        active: 0,
        left_out: 0,
        taken: [0; 32],
        listed: 0,
        soft: 0,
        linked: 0,
        in_pending: 0,
        in_active: 0,
        in_line: 0,
        told: 0,
        deactivate: 0,
        activate: 0,
        release: 0,
    };

    /// Interrupts that may be signalled: enabled, and their group enabled in GICD_CTLR.
    #[inline]
    pub(super) const fn deliverable(&self, groups: u32) -> u32 {
        let mut allowed = 0;
        if groups & super::ENABLE_GROUP0 != 0 {
            allowed |= !self.group1;
        }
        if groups & super::ENABLE_GROUP1 != 0 {
            allowed |= self.group1;
        }
        self.enabled & allowed
    }

    /// Says whether nothing is to be seen to but what is latched: no list register holds one of these, none is active, and no
    /// line or physical interrupt is about.
    #[inline]
    pub(super) const fn has_latched_only(&self) -> bool {
        // What is left out is active, and what is to be released does not outlast the sync that found it.
        self.listed | self.active | self.hardware | self.held() == 0
    }

    /// Interrupts held pending by their line.
    #[inline]
    const fn held(&self) -> u32 {
        self.line & !self.edge
    }

    /// Interrupts to be listed as pending.
    #[inline]
    pub(super) const fn fresh(&self, deliverable: u32) -> u32 {
        (self.latch | self.held() | self.hardware) & deliverable & !self.listed & !self.active
    }

    /// Active interrupts without a list register.
    #[inline]
    pub(super) const fn stranded(&self) -> u32 {
        self.active & !self.listed
    }

    /// Those of them whose end a vCPU looks for.
    #[inline]
    pub(super) const fn awaited(&self) -> u32 {
        self.stranded() & self.left_out
    }

    /// Interrupts a fold or a fill would do something about.
    pub(super) const fn work(&self, deliverable: u32) -> u32 {
        let written = self.left_out & (self.deactivate | self.activate);
        let by_hand = self.stranded() & !self.left_out;
        self.fresh(deliverable) | by_hand | written | self.pressing(deliverable)
    }

    /// Those of them that concern a list register in use, or a physical interrupt.
    #[inline]
    pub(super) const fn pressing(&self, deliverable: u32) -> u32 {
        let unsupported =
            self.in_pending & !(deliverable & (self.soft | self.held() | self.linked));
        // Pending again at their end, of which nobody would tell.
        let untold = (self.latch | self.held() | self.hardware) & !self.told & !self.linked;
        // Its physical interrupt came again: it has ended.
        let again = self.hardware & self.linked;
        let merge = self.latch & deliverable | self.active | self.deactivate | unsupported | untold;
        self.listed & (merge | again) | self.release
    }

    /// Says whether a list register is as the last fold left it.
    #[inline]
    pub(super) const fn is_as_noted(&self, bit: u32, lr: Lr) -> bool {
        lr.is_pending() == (self.in_pending & bit != 0)
            && lr.is_active() == (self.in_active & bit != 0)
    }

    /// Says whether only a sync tells what is pending and active: the guest changes list registers by itself, and ends
    /// what is in none, and a device changes its line.
    pub(super) const fn may_be_stale(&self) -> bool {
        self.listed | self.left_out | self.hardware != 0
    }

    /// Interrupts that are pending in a list register as far as the last fold saw, but for those their line alone makes so.
    pub(super) const fn listed_pending(&self) -> u32 {
        self.listed & self.in_pending & self.soft
    }

    /// Interrupts that are active in a list register as far as the last fold saw.
    const fn listed_active(&self) -> u32 {
        self.listed & self.in_active & !self.deactivate
    }

    /// Interrupts that are active, as far as the last sync saw and with what was written since.
    pub(super) const fn shown_active(&self) -> u32 {
        self.active & !(self.left_out & self.deactivate) | self.listed_active()
    }

    /// Reads a bit register. `mailed` are interrupts latched and not yet in `latch`.
    pub(super) const fn read(&self, bits: Bits, mailed: u32) -> u32 {
        match bits {
            Bits::Group => self.group1,
            Bits::SetEnable | Bits::ClearEnable => self.enabled,
            Bits::SetPending | Bits::ClearPending => {
                let linked = self.listed & self.linked & (self.in_pending | self.in_line);
                let unlisted = self.latch | self.held() | self.hardware | self.line_left_out();
                mailed | unlisted | self.listed_pending() | linked
            }
            Bits::SetActive | Bits::ClearActive => self.shown_active(),
        }
    }

    /// Writes a bit register.
    pub(super) fn write(&mut self, bits: Bits, value: u32) {
        match bits {
            Bits::Group => self.group1 = value,
            Bits::SetEnable => self.enabled |= value,
            Bits::ClearEnable => self.enabled &= !value,
            Bits::SetPending => self.latch |= value,
            Bits::ClearPending => self.clear_pending(value),
            Bits::SetActive => {
                self.deactivate &= !value;
                self.active |= value;
                self.activate |= value & self.left_out;
            }
            Bits::ClearActive => {
                self.active &= !value | self.left_out;
                self.activate &= !value;
                self.deactivate |= value & (self.listed | self.left_out);
            }
        }
    }

    /// Forgets pending states that no line holds.
    pub(super) fn clear_pending(&mut self, mask: u32) {
        self.latch &= !mask;
        self.soft &= !mask;
    }

    /// Hardware-linked interrupts that are pending for as long as their line is high, and whose line nobody has looked at
    /// since the guest ran.
    #[inline]
    pub(super) const fn sampled(&self) -> u32 {
        self.hardware & !self.edge
    }

    /// Hardware-linked interrupts that were left out while their line was high: until their physical interrupt comes again
    /// nothing else says that they are pending.
    #[inline]
    pub(super) const fn line_left_out(&self) -> u32 {
        self.left_out & self.in_line & !self.edge
    }

    /// Gives up hardware links that are not listed: their lines are low, or they are not this vCPU's any more.
    pub(super) fn unlink(&mut self, mask: u32) {
        self.release |= self.hardware & mask;
        self.hardware &= !mask;
    }

    /// Sets the line of one interrupt high.
    pub(super) fn raise(&mut self, bit: u32) {
        if self.line & bit == 0 {
            self.latch |= bit & self.edge;
        }
        self.line |= bit;
    }

    /// Sets the line of one interrupt low.
    pub(super) fn lower(&mut self, bit: u32) {
        self.line &= !bit;
    }

    /// Reads ICFGR: two bits an interrupt, the upper one set for edge. `half` 1 is the upper 16 interrupts.
    pub(super) const fn read_config(&self, half: usize) -> u32 {
        let edges = self.edge >> (16 * (half as u32 & 1)) & 0xffff;
        let mut spread = edges;
        spread = (spread | spread << 8) & 0x00ff_00ff;
        spread = (spread | spread << 4) & 0x0f0f_0f0f;
        spread = (spread | spread << 2) & 0x3333_3333;
        spread = (spread | spread << 1) & 0x5555_5555;
        spread << 1
    }

    /// Writes ICFGR.
    pub(super) fn write_config(&mut self, half: usize, value: u32) {
        let mut edges = value >> 1 & 0x5555_5555;
        edges = (edges | edges >> 1) & 0x3333_3333;
        edges = (edges | edges >> 2) & 0x0f0f_0f0f;
        edges = (edges | edges >> 4) & 0x00ff_00ff;
        edges = (edges | edges >> 8) & 0x0000_ffff;
        let shift = 16 * (half as u32 & 1);
        self.edge = self.edge & !(0xffff << shift) | edges << shift;
    }

    /// Reads the priorities of `count` interrupts from `first` on, the first in the lowest byte.
    pub(super) fn read_priority(&self, first: usize, count: usize) -> u64 {
        let bytes = self.priority.iter().skip(first).take(count.min(8));
        bytes
            .rev()
            .fold(0, |value, priority| value << 8 | u64::from(*priority))
    }

    /// Writes the priorities of `count` interrupts from `first` on. Those listed keep the old one until listed again.
    pub(super) fn write_priority(&mut self, first: usize, count: usize, value: u64) {
        let bytes = self.priority.iter_mut().skip(first).take(count);
        for (priority, byte) in bytes.zip(value.to_le_bytes()) {
            *priority = byte & PRIORITY_MASK;
        }
    }

    /// Says whether nothing in the word is pending, or active without a list register.
    #[inline]
    pub(super) const fn is_quiet(&self) -> bool {
        self.latch | self.line | self.active | self.hardware == 0
    }

    /// Gives the first of `allowed` to be listed as pending, with its priority (lower goes first): by priority, then by number.
    #[inline]
    pub(super) fn first(&self, deliverable: u32, allowed: u32) -> Option<(u8, u32)> {
        first_of(self.fresh(deliverable) & allowed, |index| {
            self.priority_of(index)
        })
    }

    /// Gives the first in `bits`, which are stranded, with the priority it runs at.
    pub(super) fn first_active(&self, bits: u32) -> Option<(u8, u32)> {
        first_of(bits, |index| self.running_priority(index))
    }

    /// The priority that the stranded interrupt `index` was taken with, or would have been if it was made active by hand.
    fn running_priority(&self, index: u32) -> u8 {
        if self.awaited() & 1 << (index & 31) != 0 {
            self.taken.get(index as usize & 31).copied().unwrap_or(0)
        } else {
            self.priority_of(index)
        }
    }

    /// Ends a stranded interrupt, unless it was left out and made active by hand after that end.
    pub(super) fn end(&mut self, bit: u32) {
        self.active &= !bit | self.activate & self.left_out;
        self.left_out &= !bit;
    }

    /// Does what was written to ISACTIVER and ICACTIVER about those left out in `mask`, whose ends were counted. Gives those it ends.
    pub(super) fn carry_out(&mut self, mask: u32) -> u32 {
        let ended = self.left_out & self.deactivate & mask;
        self.active &= !ended;
        self.left_out &= !ended;
        self.activate &= !mask;
        ended
    }

    /// Has the stranded interrupts in `mask` awaited.
    pub(super) fn leave_out(&mut self, mask: u32) {
        let mut left = self.stranded() & mask & !self.left_out;
        while left != 0 {
            let index = left.trailing_zeros();
            left &= left - 1;
            let priority = self.priority_of(index);
            if let Some(taken) = self.taken.get_mut(index as usize) {
                *taken = priority;
            }
            self.await_end(1 << index);
        }
    }

    /// Takes an active interrupt out of its list register to make room: its end will be told otherwise.
    pub(super) fn spill(&mut self, bit: u32, lr: Lr) -> Physical {
        let high = match lr.is_hardware() {
            true => self.in_line & bit,
            false => 0,
        };
        let physical = self.withdraw(bit, lr);
        if let Some(taken) = self.taken.get_mut(bit.trailing_zeros() as usize & 31) {
            *taken = lr.priority();
        }
        self.await_end(bit);
        self.in_line |= high;
        physical
    }

    /// The line of an interrupt of [`Word::line_left_out`] has fallen.
    pub(super) fn fell_left_out(&mut self, bit: u32) {
        self.in_line &= !bit;
    }

    fn await_end(&mut self, bit: u32) {
        self.left_out |= bit;
        self.in_line &= !bit;
        self.deactivate &= !bit;
        self.activate &= !bit;
    }

    /// Keeps the pending state of a pending and active one back until its end: that would bring it before more urgent ones.
    pub(super) fn hold_back(&mut self, bit: u32, lr: Lr) -> Lr {
        self.latch |= self.soft & bit;
        self.soft &= !bit;
        let new = lr.without_pending().with_eoi();
        self.note(bit, new);
        new
    }

    #[inline]
    fn priority_of(&self, index: u32) -> u8 {
        // Masked, so always there.
        self.priority.get(index as usize & 31).copied().unwrap_or(0)
    }

    /// Puts the unlisted interrupt `index` into a list register.
    pub(super) fn list(&mut self, index: u32, intid: u32, pintid: u16, deliverable: u32) -> Lr {
        let bit = 1 << (index & 31);
        let group = if self.group1 & bit != 0 {
            Group::One
        } else {
            Group::Zero
        };
        let active = self.active & bit != 0;
        let priority = if active {
            self.running_priority(index)
        } else {
            self.priority_of(index)
        };
        let mut lr = Lr::new(intid, priority, group);
        self.soft &= !bit;
        if self.latch & deliverable & bit != 0 {
            lr = lr.with_pending();
            self.latch &= !bit;
            self.soft |= bit;
        } else if self.held() & deliverable & bit != 0 && !active {
            lr = lr.with_pending();
        }
        if self.hardware & deliverable & bit != 0 && !active {
            lr = lr.with_pending().with_hardware(pintid);
            self.hardware &= !bit;
        }
        if active {
            lr = lr.with_active();
            self.active &= !bit;
            self.left_out &= !bit;
        }
        if !lr.is_hardware() && (self.latch | self.hardware | !self.edge) & bit != 0 {
            lr = lr.with_eoi();
        }
        self.listed |= bit;
        self.deactivate &= !bit;
        self.note(bit, lr);
        lr
    }

    /// Says what there is to be listed, and whether [`Word::list_simple`] can.
    #[inline]
    pub(super) fn simple(&self, deliverable: u32) -> Simple {
        let fresh = self.fresh(deliverable);
        let stranded = self.stranded();
        if fresh | stranded == 0 {
            return Simple::Nothing;
        }
        if stranded != 0 || fresh & fresh.wrapping_sub(1) != 0 {
            return Simple::Several;
        }
        if fresh & self.latch & self.edge & !self.hardware != 0 {
            return Simple::Edge(fresh.trailing_zeros());
        }
        Simple::One(fresh.trailing_zeros())
    }

    /// Does what [`Word::list`] does for an inactive, latched edge without a hardware link: nearly every SGI.
    #[inline]
    pub(super) fn list_simple(&mut self, index: u32, intid: u32) -> Lr {
        let bit = 1 << (index & 31);
        let group = if self.group1 & bit != 0 {
            Group::One
        } else {
            Group::Zero
        };
        self.latch &= !bit;
        self.listed |= bit;
        self.soft |= bit;
        self.in_pending |= bit;
        self.linked &= !bit;
        self.in_active &= !bit;
        self.told &= !bit;
        self.deactivate &= !bit;
        Lr::new(intid, self.priority_of(index), group).with_pending()
    }

    /// Takes note of what the guest did with the list register of `bit`, and gives what it should hold now. `line` is that of the
    /// physical interrupt of a linked one.
    ///
    /// A level-triggered interrupt whose line is high is not made pending beside active: it would
    /// come twice if the line fell in between. Its EOI bit brings the caller back when it ends.
    pub(super) fn fold(
        &mut self,
        bit: u32,
        lr: Lr,
        deliverable: u32,
        line: Level,
    ) -> (Lr, Physical) {
        if !lr.is_pending() {
            self.soft &= !bit;
        }
        if lr.is_empty() {
            self.unlist(bit);
            return (Lr::EMPTY, Physical::Keep);
        }
        let mut new = lr;
        let mut physical = Physical::Keep;
        if self.outgrows_link(bit, lr, line) {
            // The physical one comes again if its line is high.
            new = new.without_hardware();
            physical = Physical::Deactivate;
        }
        if self.latch & deliverable & bit != 0 {
            self.latch &= !bit;
            self.soft |= bit;
            new = new.with_pending();
        }
        let held = new.is_hardware() || (self.soft | self.held()) & bit != 0;
        if new.is_pending() && !(held && deliverable & bit != 0) {
            self.take_back(bit, new);
            new = new.without_pending().without_hardware();
        }
        if self.active & bit != 0 {
            self.active &= !bit;
            new = new.with_active();
        }
        if self.deactivate & bit != 0 {
            self.deactivate &= !bit;
            if new.is_active() && new.is_hardware() {
                physical = Physical::Deactivate;
            }
            new = new.without_active();
        }
        if new.is_empty() {
            self.unlist(bit);
            return (Lr::EMPTY, physical);
        }
        if new.is_hardware() {
            // Taken once more after the vCPU was switched in: the same line.
            self.hardware &= !bit;
        }
        // What is held back until the end, or may be by then, needs to be told of it.
        if !new.is_hardware() && (self.latch | self.hardware | !self.edge) & bit != 0 {
            new = new.with_eoi();
        }
        self.note(bit, new);
        if line == Level::High {
            self.in_line |= bit;
        }
        (new, physical)
    }

    /// Says whether a linked list register has to become one without a link: its line is low before the guest took it; or
    /// what is to be put into it the hardware could not carry (a linked one is not pending and active at once).
    const fn outgrows_link(&self, bit: u32, lr: Lr, line: Level) -> bool {
        let fell = lr.is_pending() && matches!(line, Level::Low) && self.edge & bit == 0;
        let both = lr.is_active() && self.latch & bit != 0;
        lr.is_hardware() && (fell || both || self.active & bit != 0)
    }

    /// Takes a pending, inactive interrupt out of its list register to make room.
    pub(super) fn evict(&mut self, bit: u32, lr: Lr) {
        self.take_back(bit, lr);
        self.unlist(bit);
    }

    /// Takes any interrupt out of its list register, cutting its hardware link.
    pub(super) fn withdraw(&mut self, bit: u32, lr: Lr) -> Physical {
        if lr.is_active() {
            self.active |= bit;
        }
        self.latch |= self.soft & bit;
        self.unlist(bit);
        match lr.is_hardware() && !lr.is_empty() {
            true => Physical::Deactivate,
            false => Physical::Keep,
        }
    }

    /// Moves the pending state of a list register back to where it came from.
    fn take_back(&mut self, bit: u32, lr: Lr) {
        self.latch |= self.soft & bit;
        self.soft &= !bit;
        if lr.is_hardware() {
            self.hardware |= bit;
        }
    }

    fn note(&mut self, bit: u32, lr: Lr) {
        self.in_pending &= !bit;
        self.in_active &= !bit;
        self.in_line &= !bit;
        self.told &= !bit;
        self.linked &= !bit;
        if lr.asks_maintenance() {
            self.told |= bit;
        }
        if lr.is_hardware() {
            self.linked |= bit;
        }
        if lr.is_pending() {
            self.in_pending |= bit;
        }
        if lr.is_active() {
            self.in_active |= bit;
        }
    }

    /// Forgets that it is listed, and with that all that describes how.
    #[inline]
    pub(super) fn unlist(&mut self, bit: u32) {
        self.listed &= !bit;
    }
}
