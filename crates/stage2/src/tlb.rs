//! TLB invalidation: operands, and the few sequences this crate uses.
//!
//! Every sequence is here and nowhere else, so that the order can be read in one place and tested
//! against the recording fake (Arm ARM D8.14; the middle DSB of [`Tlb::leaf`] is there because
//! another CPU could otherwise refill a combined entry from the old stage-2 one).
//!
//! On cores with an erratum the DSB behind a broadcast TLBI does not wait for accesses that other CPUs made through
//! what it dropped: their stores would come after the harvest that looked for them. [`Tlb::complete`] is the one
//! place that knows.

use crate::config::vttbr;
use crate::hardware::{Features, Hardware, Tlbi};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{GuestVa, Ipa, Level, PAGE_SHIFT, Pa};
use crate::vmid::Tag;

/// The operand of `TLBI IPAS2E1{IS}`: IPA\[47:12\] in bits 35:0, TTL in 47:44.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IpaOperand(u64);

impl IpaOperand {
    /// Encodes an address and the level of the leaf that maps it, if that is known.
    pub const fn new(ipa: Ipa, level: Option<Level>) -> Self {
        let ttl = match level {
            // 0b01 in the upper two bits names the 4 KiB granule. Level 0 has no leaf and no hint.
            Some(level) if !matches!(level, Level::L0) => 0b0100 | level.number() as u64,
            _ => 0,
        };
        Self(((ipa.raw() >> PAGE_SHIFT) & ((1 << 36) - 1)) | ttl << 44)
    }

    /// Returns the register value.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns the address it was made from, rounded down to a page.
    pub const fn ipa(self) -> Ipa {
        Ipa::new((self.0 & ((1 << 36) - 1)) << PAGE_SHIFT)
    }

    /// Returns the TTL field; zero is "any level".
    pub const fn ttl(self) -> u8 {
        ((self.0 >> 44) & 0xf) as u8
    }
}

/// The operand of `TLBI RIPAS2E1IS`: TG 47:46, SCALE 45:44, NUM 43:39, TTL 38:37, BaseADDR 36:0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RangeOperand(u64);

impl RangeOperand {
    /// Returns the register value.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns the first address.
    pub const fn start(self) -> Ipa {
        Ipa::new((self.0 & ((1 << 37) - 1)) << PAGE_SHIFT)
    }

    /// Returns the pages covered: (NUM + 1) * 2^(5 * SCALE + 1), so never an odd number.
    pub const fn pages(self) -> u64 {
        let num = (self.0 >> 39) & 31;
        let scale = (self.0 >> 44) & 3;
        (num + 1) << (5 * scale + 1)
    }
}

/// Splits `pages` pages from `start` into range operations, and a single one for an odd tail
/// (invariant 16). `None` from [`Iterator::next`] when all is covered.
pub(crate) struct Pieces {
    start: u64,
    pages: u64,
    ttl: u64,
    scale: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Piece {
    Single(Ipa),
    Range(RangeOperand),
}

/// The most pages one pass over the four scales can cover.
const RANGE_LIMIT: u64 = (1 << 21) - 1;

impl Pieces {
    pub(crate) fn new(start: Ipa, pages: u64, level: Option<Level>) -> Self {
        let ttl = level.map_or(0, |level| u64::from(level.number()));
        Self {
            start: start.raw() >> PAGE_SHIFT,
            pages: pages.min(RANGE_LIMIT),
            ttl,
            scale: 0,
        }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.pages == 0 {
            return None;
        }
        if self.pages % 2 == 1 {
            let piece = Piece::Single(Ipa::new(self.start << PAGE_SHIFT));
            self.start += 1;
            self.pages -= 1;
            return Some(piece);
        }
        while self.scale < 4 {
            let unit = 5 * self.scale + 1;
            let count = (self.pages >> unit) & 31;
            let scale = u64::from(self.scale);
            self.scale += 1;
            if count != 0 {
                let bits =
                    0b01 << 46 | scale << 44 | (count - 1) << 39 | self.ttl << 37 | self.start;
                self.start += count << unit;
                self.pages -= count << unit;
                return Some(Piece::Range(RangeOperand(bits)));
            }
        }
        None
    }
}

/// Leaves whose permission was taken away and that some TLB may still hold as writable.
///
/// The list outlives an aborted harvest on purpose: the write permission is gone from memory, the
/// next harvest will find those leaves clean, and only the invalidation stands between a stale
/// entry and writes nobody sees.
#[derive(Debug)]
pub(crate) struct Pending {
    runs: [Run; Pending::RUNS],
    len: usize,
    leaves: u64,
    everything: Everything,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    leaves: u64,
    level: Level,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Everything {
    No,
    Yes,
}

impl Pending {
    const RUNS: usize = 16;
    /// Above this many leaves one VMALLS12E1IS is cheaper than as many broadcasts.
    const LEAVES: u64 = 64;
    /// Above this many pages (128 MiB) in one run, likewise.
    const PAGES: u64 = 1 << 15;

    pub(crate) const fn new() -> Self {
        let none = Run {
            start: 0,
            leaves: 0,
            level: Level::L3,
        };
        Self {
            runs: [none; Self::RUNS],
            len: 0,
            leaves: 0,
            everything: Everything::No,
        }
    }

    pub(crate) fn push(&mut self, ipa: u64, level: Level) {
        self.push_run(ipa, 1, level);
    }

    /// Adds level-3 leaves: bit n of `pages` is the nth from `ipa` on.
    pub(crate) fn push_pages(&mut self, ipa: u64, mut pages: u64) {
        while pages != 0 && self.everything == Everything::No {
            let first = pages.trailing_zeros();
            let run = (pages >> first).trailing_ones();
            self.push_run(
                ipa + (u64::from(first) << PAGE_SHIFT),
                run.into(),
                Level::L3,
            );
            // The carry runs through the lowest run of ones.
            pages &= pages.wrapping_add(1 << first);
        }
    }

    fn push_run(&mut self, ipa: u64, leaves: u64, level: Level) {
        if self.everything == Everything::Yes {
            return;
        }
        self.leaves += leaves;
        if let Some(last) = self
            .len
            .checked_sub(1)
            .and_then(|last| self.runs.get_mut(last))
            && last.level == level
            && last.start + last.leaves * level.size() == ipa
        {
            last.leaves += leaves;
            if last.leaves * level.pages() > Self::PAGES {
                self.everything = Everything::Yes;
            }
            return;
        }
        match self.runs.get_mut(self.len) {
            Some(run) => {
                *run = Run {
                    start: ipa,
                    leaves,
                    level,
                };
                self.len += 1;
            }
            None => self.everything = Everything::Yes,
        }
    }

    /// Adds what another list holds.
    pub(crate) fn append(&mut self, other: &Self) {
        if other.everything == Everything::Yes {
            self.everything = Everything::Yes;
            return;
        }
        for run in other.runs() {
            self.push_run(run.start, run.leaves, run.level);
        }
    }

    /// Is there nothing to invalidate?
    pub(crate) fn is_empty(&self) -> bool {
        self.everything == Everything::No && self.len == 0
    }

    pub(crate) fn push_everything(&mut self) {
        self.everything = Everything::Yes;
    }

    pub(crate) fn clear(&mut self) {
        (self.len, self.leaves, self.everything) = (0, 0, Everything::No);
    }

    fn runs(&self) -> &[Run] {
        self.runs.get(..self.len).unwrap_or(&[])
    }
}

/// The invalidation sequences, for one VM.
pub(crate) struct Tlb<'a, H: ?Sized> {
    pub(crate) hw: &'a H,
    pub(crate) root: Pa,
    pub(crate) tag: &'a Tag,
    pub(crate) features: &'a Features,
    pub(crate) issued: &'a AtomicU64,
}

impl<H: Hardware + ?Sized> Tlb<'_, H> {
    fn hint(&self, level: Level) -> Option<Level> {
        self.features.ttl.is_present().then_some(level)
    }

    fn count(&self, operations: u64) {
        self.issued.fetch_add(operations, Ordering::Relaxed);
    }

    /// Makes the VM's VTTBR_EL2 current, and returns what was. `None` if the VM has no number: then no
    /// TLB holds anything of it that can be used, and there is nothing to invalidate.
    ///
    /// To be asked after the `DSB ISHST` behind the change of the descriptors ([`Vmids::current`]).
    ///
    /// [`Vmids::current`]: crate::vmid::Vmids::current
    fn select(&self) -> Option<u64> {
        let vmid = self.tag.current()?;
        Some(self.hw.select(vttbr(self.root, vmid)))
    }

    /// Drops every translation of the VM on every CPU.
    pub(crate) fn everything(&self) {
        self.hw.dsb_ishst();
        let Some(previous) = self.select() else {
            return;
        };
        self.hw.tlbi_vmalls12e1is();
        self.complete();
        self.hw.restore(previous);
        self.count(1);
    }

    /// Drops one leaf on every CPU: the middle of a break-before-make.
    pub(crate) fn leaf(&self, ipa: u64, level: Level) {
        self.hw.dsb_ishst();
        let Some(previous) = self.select() else {
            return;
        };
        self.hw
            .tlbi_ipas2e1is(IpaOperand::new(Ipa::new(ipa), self.hint(level)));
        self.finish(previous);
        self.count(2);
    }

    /// Drops what is pending, and empties the list.
    pub(crate) fn pending(&self, pending: &mut Pending) {
        let ranges = self.features.tlb_range.is_present();
        if pending.everything == Everything::Yes || (!ranges && pending.leaves > Pending::LEAVES) {
            self.everything();
        } else if pending.len != 0 {
            self.hw.dsb_ishst();
            if let Some(previous) = self.select() {
                for run in pending.runs() {
                    self.run(run);
                }
                self.finish(previous);
                self.count(1);
            }
        }
        pending.clear();
    }

    fn run(&self, run: &Run) {
        let hint = self.hint(run.level);
        let pages = run.leaves * run.level.pages();
        // One operation drops a whole leaf, so a range pays only from two leaves on.
        if self.features.tlb_range.is_present() && run.leaves > 1 {
            for piece in Pieces::new(Ipa::new(run.start), pages, hint) {
                match piece {
                    Piece::Single(ipa) => self.hw.tlbi_ipas2e1is(IpaOperand::new(ipa, hint)),
                    Piece::Range(operand) => self.hw.tlbi_ripas2e1is(operand),
                }
                self.count(1);
            }
        } else {
            for leaf in 0..run.leaves {
                let ipa = Ipa::new(run.start + leaf * run.level.size());
                self.hw.tlbi_ipas2e1is(IpaOperand::new(ipa, hint));
            }
            self.count(run.leaves);
        }
    }

    /// Completes an invalidation by IPA: combined entries carry no IPA and go as a whole.
    fn finish(&self, previous: u64) {
        // Of stage 2 alone: no access is complete by it, and no erratum leaves an entry.
        self.hw.dsb_ish();
        self.hw.tlbi_vmalle1is();
        self.complete();
        self.hw.restore(previous);
    }

    /// Completes broadcast invalidations, and the accesses that were made through what they dropped.
    ///
    /// One more is enough for any number of them, and it may be of anything (Arm's advice for CVE-2025-10263; Linux
    /// a8f78680ee6b for the older errata).
    fn complete(&self) {
        self.hw.dsb_ish();
        if self.features.tlbi == Tlbi::Twice {
            self.hw.tlbi_vale2is();
            self.hw.dsb_ish();
            self.count(1);
        }
        self.hw.isb();
    }

    /// Makes this CPU see a relaxed leaf. Other CPUs that still hold the old entry only take a
    /// spurious fault, so nothing is broadcast.
    ///
    /// With the guest's own address at hand only that one is dropped from the combined entries; an
    /// alias of it takes a spurious fault and comes back here without one. Dropping all of stage 1
    /// for each first write to a page was rejected: the guest would refill its whole TLB each time.
    ///
    /// The VM runs on this CPU. A number that was lent to it is in VTTBR_EL2 then and stays its own as
    /// long, so it is not asked for.
    pub(crate) fn relaxed(&self, ipa: u64, level: Level, va: Option<GuestVa>) {
        self.hw.dsb_nsh();
        let previous = match self.tag {
            Tag::Own(_) => self.select(),
            Tag::Lent(..) => None,
        };
        self.hw
            .tlbi_ipas2e1(IpaOperand::new(Ipa::new(ipa), self.hint(level)));
        self.hw.dsb_nsh();
        match va {
            Some(va) => self.hw.tlbi_vaae1(va),
            None => self.hw.tlbi_vmalle1(),
        }
        self.hw.dsb_nsh();
        self.hw.isb();
        if let Some(previous) = previous {
            self.hw.restore(previous);
        }
        self.count(2);
    }
}
