//! What one CPU has cached: leaves of stage 2 by IPA, combined translations by guest address, stage-1
//! translations by guest address, and pointers to stage-2 tables. Everything is tagged with the VMID
//! and stays until an invalidation that must remove it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
#[cfg(test)]
use std::ops::Range;
#[cfg(test)]
use std::vec::Vec;

pub(super) const VALID: u64 = 1;
pub(super) const WRITE: u64 = 1 << 7;
pub(super) const ACCESSED: u64 = 1 << 10;
pub(super) const DBM: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
const OUTPUT: u64 = 0x0000_ffff_ffff_f000;
/// MemAttr and SH: as the output address, not to be changed without a break.
const MEMORY_TYPE: u64 = 0xf << 2 | 3 << 8;

/// Sizes a cached leaf can have: a level, or sixteen leaves of it.
const SHIFTS: [u32; 6] = [34, 30, 25, 21, 16, 12];

pub(super) const fn shift(level: u32) -> u32 {
    12 + 9 * (3 - level)
}

/// A cached leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaf {
    pub(super) pte: u64,
    pub(super) level: u32,
    /// VTCR_EL2.HD as it was when the leaf was cached: a TLB may keep that, too.
    pub(super) hd: bool,
}

impl Leaf {
    pub(super) const fn is_contiguous(&self) -> bool {
        self.pte & CONTIGUOUS != 0
    }

    /// log2 of the bytes that the entry translates.
    pub(super) const fn shift(&self) -> u32 {
        shift(self.level) + if self.is_contiguous() { 4 } else { 0 }
    }

    /// The page of the machine that the page of `ipa` is.
    pub(super) const fn output(&self, ipa: u64) -> u64 {
        let mask = (1 << self.shift()) - 1;
        self.pte & OUTPUT & !mask | ipa & mask & !0xfff
    }

    /// May both be in one TLB at once, for `ipa`, where sizes must not be mixed?
    pub(super) const fn agrees(&self, other: &Leaf, ipa: u64) -> bool {
        self.shift() == other.shift() && self.is_equivalent(other, ipa)
    }

    /// May both be in one TLB at once, for `ipa`, under FEAT_BBM level 2?
    pub(super) const fn is_equivalent(&self, other: &Leaf, ipa: u64) -> bool {
        self.output(ipa) == other.output(ipa) && (self.pte ^ other.pte) & MEMORY_TYPE == 0
    }
}

/// What an invalidation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum What {
    Ipa {
        ipa: u64,
        ttl: u8,
    },
    Range {
        start: u64,
        end: u64,
        ttl: u8,
    },
    Va {
        va: u64,
    },
    Combined,
    Everything,
    /// Of another regime: nothing of a guest.
    Nothing,
}

/// An invalidation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) what: What,
    pub(super) vmid: u16,
    pub(super) broadcast: bool,
    /// The CPUs, by bits, that have still to act on it.
    pub(super) left: u64,
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Multiply and rotate: the keys are few and nobody chooses them.
#[derive(Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes
            .iter()
            .for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

/// A TLB that never evicts by itself.
#[derive(Default)]
pub(super) struct Tlb {
    /// By size and the number of the piece of that size.
    stage2: Map<(u16, u32, u64), Leaf>,
    /// By the page of the guest's address, with the IPA it stands for.
    combined: Map<(u16, u64), (u64, Leaf)>,
    /// From the page of the guest's address to the IPA.
    stage1: Map<(u16, u64), u64>,
    /// By the level and number of the entry that points to the table: where it is.
    tables: Map<(u16, u32, u64), u64>,
}

impl Tlb {
    /// Returns the entries that translate the address, the one that a worst case uses first: combined,
    /// then the largest, which is the oldest.
    pub(super) fn lookup(
        &self,
        vmid: u16,
        va: Option<u64>,
        ipa: u64,
    ) -> impl Iterator<Item = Leaf> + '_ {
        let combined = va.and_then(|va| self.combined.get(&(vmid, va >> 12)));
        let combined = combined.filter(|(page, _)| *page == ipa >> 12);
        let stage2 = move |shift| self.stage2.get(&(vmid, shift, ipa >> shift)).copied();
        let stage2 = SHIFTS.into_iter().filter_map(stage2);
        combined.map(|(_, leaf)| *leaf).into_iter().chain(stage2)
    }

    pub(super) fn insert(&mut self, vmid: u16, va: Option<u64>, ipa: u64, leaf: Leaf) {
        let shift = leaf.shift();
        self.stage2.insert((vmid, shift, ipa >> shift), leaf);
        self.combine(vmid, va, ipa, leaf);
    }

    /// Makes a combined entry and never a stage-2 one: what an invalidation by IPA took does not come
    /// back from a combined entry that it left.
    pub(super) fn combine(&mut self, vmid: u16, va: Option<u64>, ipa: u64, leaf: Leaf) {
        if let Some(va) = va {
            self.combined.insert((vmid, va >> 12), (ipa >> 12, leaf));
        }
    }

    pub(super) fn forget(&mut self, vmid: u16, va: Option<u64>, ipa: u64, leaf: Leaf) {
        let shift = leaf.shift();
        self.stage2.remove(&(vmid, shift, ipa >> shift));
        self.evict_combined(vmid, va);
    }

    pub(super) fn evict_combined(&mut self, vmid: u16, va: Option<u64>) {
        if let Some(va) = va {
            self.combined.remove(&(vmid, va >> 12));
        }
    }

    pub(super) fn evict_stage2(&mut self, vmid: u16, ipa: u64) {
        for shift in SHIFTS {
            self.stage2.remove(&(vmid, shift, ipa >> shift));
        }
    }

    pub(super) fn stage1(&self, vmid: u16, va: u64) -> Option<u64> {
        self.stage1.get(&(vmid, va >> 12)).copied()
    }

    pub(super) fn insert_stage1(&mut self, vmid: u16, va: u64, ipa: u64) {
        self.stage1.insert((vmid, va >> 12), ipa);
    }

    pub(super) fn table(&self, vmid: u16, level: u32, ipa: u64) -> Option<u64> {
        self.tables
            .get(&(vmid, level, ipa >> shift(level)))
            .copied()
    }

    pub(super) fn insert_table(&mut self, vmid: u16, level: u32, ipa: u64, table: u64) {
        self.tables
            .insert((vmid, level, ipa >> shift(level)), table);
    }

    /// Returns the leaves through which a store goes without asking memory.
    pub(super) fn writable(&self) -> Self {
        let writable = |leaf: &Leaf| leaf.pte & WRITE != 0;
        let stage2 = self.stage2.iter().filter(|(_, leaf)| writable(leaf));
        let combined = self.combined.iter().filter(|(_, (_, leaf))| writable(leaf));
        Self {
            stage2: stage2.map(|(key, leaf)| (*key, *leaf)).collect(),
            combined: combined.map(|(key, entry)| (*key, *entry)).collect(),
            ..Self::default()
        }
    }

    /// Takes away the leaves that `other` has, too.
    pub(super) fn subtract(&mut self, other: &Self) {
        self.stage2
            .retain(|key, leaf| other.stage2.get(key) != Some(leaf));
        self.combined
            .retain(|key, entry| other.combined.get(key) != Some(entry));
    }

    #[cfg(test)]
    pub(super) fn knows_table(&self, pa: u64) -> bool {
        self.tables.values().any(|table| *table == pa)
    }

    #[cfg(test)]
    /// Returns what is cached about `start..end`, with the addresses of it that each is about.
    pub(super) fn overlapping(&self, vmid: u16, start: u64, end: u64) -> Vec<(Range<u64>, Leaf)> {
        let leaves = self.stage2.iter().map(|((tag, shift, number), leaf)| {
            (*tag, number << shift, (number + 1) << shift, *leaf)
        });
        let combined = self
            .combined
            .iter()
            .map(|((tag, _), (page, leaf))| (*tag, page << 12, (page + 1) << 12, *leaf));
        leaves
            .chain(combined)
            .filter(|(tag, from, to, _)| *tag == vmid && *from < end && *to > start)
            .map(|(_, from, to, leaf)| (from.max(start)..to.min(end), leaf))
            .collect()
    }

    pub(super) fn apply(&mut self, op: &Op) {
        let vmid = op.vmid;
        match op.what {
            What::Combined => {
                self.combined.retain(|(tag, _), _| *tag != vmid);
                self.stage1.retain(|(tag, _), _| *tag != vmid);
            }
            What::Everything => {
                self.combined.retain(|(tag, _), _| *tag != vmid);
                self.stage1.retain(|(tag, _), _| *tag != vmid);
                self.stage2.retain(|(tag, ..), _| *tag != vmid);
                self.tables.retain(|(tag, ..), _| *tag != vmid);
            }
            What::Nothing => {}
            What::Va { va } => {
                self.combined.remove(&(vmid, va >> 12));
                self.stage1.remove(&(vmid, va >> 12));
            }
            What::Ipa { ipa, ttl } => {
                for shift in SHIFTS {
                    let key = (vmid, shift, ipa >> shift);
                    if let Some(leaf) = self.stage2.get(&key)
                        && hint_fits(ttl, leaf.level)
                    {
                        self.stage2.remove(&key);
                    }
                }
                if ttl == 0 {
                    for level in 0..3 {
                        self.tables.remove(&(vmid, level, ipa >> shift(level)));
                    }
                }
            }
            What::Range { start, end, ttl } => {
                let touches =
                    |from: u64, shift: u32| from << shift < end && (from + 1) << shift > start;
                self.stage2.retain(|(tag, shift, number), leaf| {
                    *tag != vmid || !touches(*number, *shift) || !hint_fits(ttl, leaf.level)
                });
                self.tables.retain(|(tag, level, number), _| {
                    *tag != vmid || !touches(*number, shift(*level)) || ttl != 0
                });
            }
        }
    }
}

/// A level hint that is wrong removes nothing.
fn hint_fits(ttl: u8, level: u32) -> bool {
    ttl == 0 || u32::from(ttl & 3) == level
}
