//! The redistributors' registers: RD frame and SGI frame (IHI 0069, 12.11).
//!
//! No LPIs: GICR_TYPER.PLPIS is 0, and the registers about them read as zero.

use core::sync::atomic::Ordering;

use super::distributor::{Half, IIDR_VALUE, priorities, read_id};
use super::private::SGI_EDGE;
use super::shared::Wake;
use super::word::Bits;
use super::{Kick, MAIL_PRIVATE, MAIL_SHARED, Vgic};
use crate::{AccessSize, VcpuIndex};

/// Where the SGI frame starts.
const SGI_FRAME: u64 = 0x1_0000;

const IIDR: u64 = 0x0004;
const TYPER: u64 = 0x0008;
const TYPER_HIGH: u64 = 0x000c;
const WAKER: u64 = 0x0014;
const BITS: core::ops::Range<u64> = 0x1_0080..0x1_0400;
const IPRIORITYR: core::ops::Range<u64> = 0x1_0400..0x1_0420;
const ICFGR0: u64 = 0x1_0c00;
const ICFGR1: u64 = 0x1_0c04;

const PROCESSOR_SLEEP: u64 = 1 << 1;
const CHILDREN_ASLEEP: u64 = 1 << 2;
const TYPER_LAST: u64 = 1 << 4;
const PROCESSOR_NUMBER_SHIFT: u32 = 8;

impl Vgic {
    #[inline(always)]
    pub(super) fn read_redistributor(&self, vcpu: VcpuIndex, offset: u64, size: AccessSize) -> u64 {
        let Some(bank) = self.bank(vcpu) else {
            return 0;
        };
        if IPRIORITYR.contains(&offset) {
            let first = (offset - IPRIORITYR.start) as usize;
            return priorities(size).map_or(0, |count| {
                bank.private.lock().word.read_priority(first, count)
            });
        }
        match (offset, size) {
            (TYPER, AccessSize::Double) => self.redistributor_type(vcpu),
            (TYPER, AccessSize::Word) => Half::Low.of(self.redistributor_type(vcpu)),
            (TYPER_HIGH, AccessSize::Word) => Half::High.of(self.redistributor_type(vcpu)),
            (IIDR, AccessSize::Word) => IIDR_VALUE,
            (WAKER, AccessSize::Word) => match self.shared.lock().is_awake(vcpu) {
                true => 0,
                false => PROCESSOR_SLEEP | CHILDREN_ASLEEP,
            },
            (ICFGR0, AccessSize::Word) => u64::from(bank.private.lock().word.read_config(0)),
            (ICFGR1, AccessSize::Word) => u64::from(bank.private.lock().word.read_config(1)),
            (_, AccessSize::Word) if BITS.contains(&offset) => self.read_private_bits(vcpu, offset),
            (_, AccessSize::Word) if offset < SGI_FRAME => read_id(offset, 0x93),
            _ => 0,
        }
    }

    #[inline(always)]
    pub(super) fn write_redistributor(
        &self,
        vcpu: VcpuIndex,
        offset: u64,
        size: AccessSize,
        value: u64,
    ) -> Kick {
        let Some(bank) = self.bank(vcpu) else {
            return Kick::NONE;
        };
        if IPRIORITYR.contains(&offset) {
            let first = (offset - IPRIORITYR.start) as usize;
            if let Some(count) = priorities(size) {
                bank.private.lock().word.write_priority(first, count, value);
            }
            return Kick::NONE;
        }
        if size != AccessSize::Word {
            return Kick::NONE;
        }
        // A word access: the value's upper half is nothing the guest wrote.
        let bits_value = value as u32;
        match offset {
            WAKER => {
                let wake = match value & PROCESSOR_SLEEP {
                    0 => Wake::Awake,
                    _ => Wake::Asleep,
                };
                let groups = self.groups();
                let kick = self.shared.lock().set_awake(vcpu, wake, groups);
                self.post(kick, MAIL_SHARED);
                kick
            }
            // SGIs are edge-triggered for good; GICR_ICFGR0 is read-only.
            ICFGR1 => self.change_private(vcpu, |private| {
                private.word.write_config(1, bits_value);
                private.word.edge |= SGI_EDGE;
            }),
            _ if BITS.contains(&offset) => {
                let Some((bits, 0)) = Bits::at(offset - SGI_FRAME) else {
                    return Kick::NONE;
                };
                self.change_private(vcpu, |private| {
                    if bits == Bits::ClearPending {
                        bank.mail
                            .fetch_and(!u64::from(bits_value), Ordering::SeqCst);
                    }
                    private.word.write(bits, bits_value);
                })
            }
            _ => Kick::NONE,
        }
    }

    pub(super) fn refresh_redistributor(&self, vcpu: VcpuIndex, offset: u64) -> Kick {
        let bits = offset.checked_sub(SGI_FRAME).and_then(Bits::at);
        let shows_state = bits.is_some_and(|(bits, word)| bits.shows_state() && word == 0);
        match self.bank(vcpu) {
            Some(bank) if shows_state && bank.private.lock().word.may_be_stale() => Kick::one(vcpu),
            _ => Kick::NONE,
        }
    }

    /// GICR_TYPER: affinity, number, and whether it is the last.
    fn redistributor_type(&self, vcpu: VcpuIndex) -> u64 {
        let last = match vcpu.index() + 1 == self.banks.len() {
            true => TYPER_LAST,
            false => 0,
        };
        vcpu.affinity() << 32 | (vcpu.index() as u64) << PROCESSOR_NUMBER_SHIFT | last
    }

    fn read_private_bits(&self, vcpu: VcpuIndex, offset: u64) -> u64 {
        let (Some((bits, 0)), Some(bank)) = (Bits::at(offset - SGI_FRAME), self.bank(vcpu)) else {
            return 0;
        };
        let private = bank.private.lock();
        let value = private.word.read(bits, self.mailed(vcpu));
        let stale = bits.shows_state() && private.word.may_be_stale();
        drop(private);
        if stale {
            self.post(Kick::one(vcpu), MAIL_PRIVATE);
        }
        u64::from(value)
    }
}
