//! The distributor's registers (IHI 0069, 12.9).
//!
//! With affinity routing on, the words of intids 0 to 31 read as zero here; they are in the
//! redistributors. Legacy registers (ITARGETSR, SGIR, SPENDSGIR), message-based SPIs
//! and NSACR do not exist with ARE = 1, MBIS = 0 and one security state. STATUSR is optional and not there.

use core::sync::atomic::Ordering;

use super::word::Bits;
use super::{ENABLE_GROUP0, ENABLE_GROUP1, Kick, SPI_WORDS, SPIS, Vgic};
use crate::AccessSize;

const CTLR: u64 = 0x0000;
const TYPER: u64 = 0x0004;
const IIDR: u64 = 0x0008;
const BITS: core::ops::Range<u64> = 0x0080..0x0400;
const IPRIORITYR: core::ops::Range<u64> = 0x0400..0x0800;
const ICFGR: core::ops::Range<u64> = 0x0c00..0x0d00;
const IROUTER: core::ops::Range<u64> = 0x6000..0x8000;

/// GICD_CTLR: ARE and DS, fixed to one.
const CTLR_FIXED: u64 = 1 << 4 | 1 << 6;
/// GICD_TYPER: ITLinesNumber 4 (160 intids), IDbits 9 (ten bits), A3V; one-of-N is supported, RSS is not.
const TYPER_VALUE: u64 = (SPI_WORDS as u64) | 9 << 19 | 1 << 24;
/// Implementer Arm, so that drivers take it as the plain GICv3 it shows; product `T`.
pub(super) const IIDR_VALUE: u64 = 0x5400_043b;

/// Reads an identification register, 0xffd0 to 0xfffc of a frame: PIDR4-7, PIDR0-3, CIDR0-3. `part` is PIDR0.
pub(super) fn read_id(offset: u64, part: u64) -> u64 {
    match offset {
        0xffd0 => 0x44,
        0xffe0 => part,
        0xffe4 => 0xb4,
        // ArchRev 3: GICv3.
        0xffe8 => 0x3b,
        0xfff0 => 0x0d,
        0xfff4 => 0xf0,
        0xfff8 => 0x05,
        0xfffc => 0xb1,
        _ => 0,
    }
}

/// Gives the words of SPIs for the word number of a register, which counts the private word as 0.
fn spi_word(word: usize) -> Option<usize> {
    word.checked_sub(1).filter(|word| *word < SPI_WORDS)
}

/// Gives the SPI number and the half (in bits) that an access to IROUTER means.
fn router(offset: u64, size: AccessSize) -> Option<(usize, Half)> {
    let spi = usize::try_from((offset - IROUTER.start) / 8)
        .ok()?
        .checked_sub(32)?;
    let half = match (size, offset & 4) {
        (AccessSize::Double, _) => Half::Both,
        (AccessSize::Word, 0) => Half::Low,
        (AccessSize::Word, _) => Half::High,
        _ => return None,
    };
    (spi < SPIS).then_some((spi, half))
}

/// Which part of a 64-bit register an access means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    /// All 64 bits.
    Both,
    /// Bits 31:0.
    Low,
    /// Bits 63:32.
    High,
}

impl Half {
    /// Reads this part of `whole`.
    pub(super) const fn of(self, whole: u64) -> u64 {
        match self {
            Self::Both => whole,
            Self::Low => whole & 0xffff_ffff,
            Self::High => whole >> 32,
        }
    }

    /// Replaces this part of `whole`.
    const fn replace(self, whole: u64, value: u64) -> u64 {
        match self {
            Self::Both => value,
            Self::Low => whole & !0xffff_ffff | value & 0xffff_ffff,
            Self::High => whole & 0xffff_ffff | value << 32,
        }
    }
}

/// Gives the number of interrupts an access to IPRIORITYR covers: bytes and words are architected (IHI 0069, 12.1.3).
pub(super) const fn priorities(size: AccessSize) -> Option<usize> {
    match size {
        AccessSize::Byte => Some(1),
        AccessSize::Word => Some(4),
        AccessSize::Half | AccessSize::Double => None,
    }
}

impl Vgic {
    #[inline(always)]
    pub(super) fn read_distributor(&self, offset: u64, size: AccessSize) -> u64 {
        if IROUTER.contains(&offset) {
            let Some((spi, half)) = router(offset, size) else {
                return 0;
            };
            return half.of(self.shared.lock().route(spi));
        }
        if IPRIORITYR.contains(&offset) {
            return self.read_spi_priority(offset, size);
        }
        if size != AccessSize::Word {
            return 0;
        }
        match offset {
            CTLR => CTLR_FIXED | u64::from(self.groups()),
            TYPER => TYPER_VALUE,
            IIDR => IIDR_VALUE,
            _ if BITS.contains(&offset) => self.read_spi_bits(offset),
            _ if ICFGR.contains(&offset) => {
                let register = ((offset - ICFGR.start) / 4) as usize;
                let word = spi_word(register / 2);
                let shared = self.shared.lock();
                let state = word.and_then(|word| shared.words.get(word));
                state.map_or(0, |state| u64::from(state.read_config(register & 1)))
            }
            _ => read_id(offset, 0x92),
        }
    }

    #[inline(always)]
    pub(super) fn write_distributor(&self, offset: u64, size: AccessSize, value: u64) -> Kick {
        let groups = self.groups();
        if IROUTER.contains(&offset) {
            let Some((spi, half)) = router(offset, size) else {
                return Kick::NONE;
            };
            let mut shared = self.shared.lock();
            let route = half.replace(shared.route(spi), value);
            return shared.set_route(spi, route, groups);
        }
        if IPRIORITYR.contains(&offset) {
            self.write_spi_priority(offset, size, value);
            return Kick::NONE;
        }
        if size != AccessSize::Word {
            return Kick::NONE;
        }
        // A word access: the value's upper half is nothing the guest wrote.
        let value = value as u32;
        if offset == CTLR {
            self.groups
                .store(value & (ENABLE_GROUP0 | ENABLE_GROUP1), Ordering::SeqCst);
            // Rare, and it may concern any interrupt of any vCPU.
            return self.all();
        }
        let change = |word: usize, change: &mut dyn FnMut(&mut super::word::Word)| {
            let Some(word) = spi_word(word) else {
                return Kick::NONE;
            };
            let mut shared = self.shared.lock();
            if let Some(state) = shared.words.get_mut(word) {
                change(state);
            }
            shared.kicks(word, u32::MAX, groups)
        };
        if BITS.contains(&offset) {
            let Some((bits, word)) = Bits::at(offset) else {
                return Kick::NONE;
            };
            return change(word, &mut |state| state.write(bits, value));
        }
        if ICFGR.contains(&offset) {
            let register = ((offset - ICFGR.start) / 4) as usize;
            return change(register / 2, &mut |state| {
                state.write_config(register & 1, value);
            });
        }
        Kick::NONE
    }

    #[inline(always)]
    pub(super) fn refresh_distributor(&self, offset: u64) -> Kick {
        let word = Bits::at(offset).filter(|(bits, _)| bits.shows_state());
        match word.and_then(|(_, word)| spi_word(word)) {
            Some(word) => self.shared.lock().listers(word),
            None => Kick::NONE,
        }
    }

    fn read_spi_bits(&self, offset: u64) -> u64 {
        let Some((bits, word)) = Bits::at(offset) else {
            return 0;
        };
        let Some(word) = spi_word(word) else {
            return 0;
        };
        let shared = self.shared.lock();
        let value = shared
            .words
            .get(word)
            .map_or(0, |state| state.read(bits, 0));
        if bits.shows_state() {
            let stale = shared.listers(word);
            drop(shared);
            self.post(stale, super::MAIL_SHARED);
        }
        u64::from(value)
    }

    fn read_spi_priority(&self, offset: u64, size: AccessSize) -> u64 {
        let intid = (offset - IPRIORITYR.start) as usize;
        let (Some(word), Some(count)) = (spi_word(intid / 32), priorities(size)) else {
            return 0;
        };
        let shared = self.shared.lock();
        let state = shared.words.get(word);
        state.map_or(0, |state| state.read_priority(intid % 32, count))
    }

    fn write_spi_priority(&self, offset: u64, size: AccessSize, value: u64) {
        let intid = (offset - IPRIORITYR.start) as usize;
        let (Some(word), Some(count)) = (spi_word(intid / 32), priorities(size)) else {
            return;
        };
        if let Some(state) = self.shared.lock().words.get_mut(word) {
            state.write_priority(intid % 32, count, value);
        }
    }
}
