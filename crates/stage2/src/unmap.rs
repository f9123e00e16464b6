//! Taking a slot's leaves and tables out, for good or to be mapped anew.
//!
//! Bounded steps under the control mutex, while other CPUs fault, walk and harvest. A step takes leaves
//! out and invalidates; then the tables it emptied are broken (busy marker), every walker that may have
//! found one is waited for, and those that are empty still are freed: by then no TLB and no walker,
//! software or hardware, can reach them (invariant 5). One that got a new leaf meanwhile, of a slot
//! beside this one, goes back in its place.
//!
//! The value that the exchange returns says whether a leaf was dirty, and it is noted
//! before the mutex is released, which a harvest needs to complete. A harvest that is collecting gets the
//! page in its epoch at once: it looks for bits that were there when it began, and may be past this one's
//! place. A CPU that cached the leaf as clean cannot make it dirty any more, since its update compares
//! with memory; one that cached it as dirty writes on until the invalidation, to a page that is noted.
//!
//! Where the slot stays, a fault may map the address again at once, and by pages what was a block. So a
//! block of such a slot is busy until the invalidation (break-before-make, D8.14). No harvest splits
//! blocks meanwhile, so all that is busy there is busy by this.

use crate::control::Stretch;
use crate::hardware::{Hardware, Table};
use crate::pte::{Kind, Pte};
use crate::slot::{Life, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Level, Pa, Progress};

/// Entries visited in a step, at most one table more.
const BUDGET: usize = 1024;
/// What a dirty leaf counts for, for each word of its pages' bits.
const A_WORD: usize = 16;
/// Level-3 tables taken out in a step: 512 exchanges each.
const BATCH: usize = 1;

/// Addresses whose tables may have become empty.
struct Emptied {
    at: [u64; BATCH],
    len: usize,
}

impl Emptied {
    fn push(&mut self, ipa: u64) {
        if let Some(place) = self.at.get_mut(self.len) {
            *place = ipa;
            self.len += 1;
        }
    }

    fn is_full(&self) -> bool {
        self.len == BATCH
    }

    fn addresses(&self) -> &[u64] {
        self.at.get(..self.len).unwrap_or(&[])
    }
}

/// A table that is broken off: nobody finds it any more, but some may have.
struct Broken<'a> {
    entry: &'a AtomicU64,
    table: &'a Table,
    pa: Pa,
}

impl<H: Hardware> Stage2<H> {
    /// Unmaps a bounded part of `slot`, from where the last step ended. What is dirty in `harvested` goes into
    /// the epoch that is being taken.
    pub(crate) fn unmap_step(&self, slot: &Slot, harvested: Option<Stretch>) -> Progress {
        let from = slot.unmapped().max(slot.start());
        let end = slot.end();
        let mut at = from;
        let mut visits = 0;
        let mut blocks = 0;
        let mut emptied = Emptied {
            at: [0; BATCH],
            len: 0,
        };
        while at < end && visits < BUDGET && !emptied.is_full() {
            let place = self.descend(at);
            if place.kind == Kind::Busy {
                // A harvest is splitting it, and does not need the mutex for that.
                break;
            }
            let first = at;
            let gone = match (slot.life, place.level) {
                (Life::Dying, _) | (_, Level::L3) => Pte::EMPTY,
                (Life::Usable, _) => Pte::BUSY,
            };
            for entry in place.table.0.iter().skip(place.index) {
                // Only while it is a leaf: a split may put a table there between a look and an exchange.
                let taken = entry.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |seen| {
                    (Pte(seen).kind(place.level) == Kind::Leaf).then_some(gone.0)
                });
                let old = Pte(taken.unwrap_or_else(|seen| seen));
                match old.kind(place.level) {
                    Kind::Table(_) | Kind::Busy => break,
                    Kind::Leaf => {
                        self.count_leaves(place.level, -1);
                        blocks += usize::from(gone == Pte::BUSY);
                        if old.is_dirty() {
                            // From its beginning: it may have been mapped around the cursor.
                            let base = at & !(place.level.size() - 1);
                            let (from, end) = (base.max(slot.start()), base + place.level.size());
                            let gone = Stretch { from, end };
                            slot.note(gone, harvested.unwrap_or(Stretch { from, end: from }));
                            visits += A_WORD * place.level.pages().div_ceil(64) as usize;
                        }
                    }
                    Kind::Empty => {}
                }
                visits += 1;
                at = (at & !(place.level.size() - 1)) + place.level.size();
                if at >= end || visits >= BUDGET {
                    break;
                }
            }
            emptied.push(first);
        }
        let at = at.min(end);
        slot.set_unmapped(at);
        for level in [Level::L2, Level::L1, Level::L0] {
            let broken = self.break_empty(level, emptied.addresses());
            // The first time round also for the leaves.
            if level == Level::L2 || broken.iter().any(Option::is_some) {
                self.tlb().everything();
                self.free_broken(broken);
            }
            if level == Level::L2 && blocks != 0 {
                self.empty_busy(from, at);
            }
        }
        if at == end {
            return Progress::Done;
        }
        Progress::More {
            done: slot.page(at),
            total: slot.pages,
        }
    }

    /// Ends the break of the blocks between two addresses. No harvest, split or collapse is under way, so
    /// every marker there is one of this step.
    fn empty_busy(&self, from: u64, end: u64) {
        let mut at = from;
        while at < end {
            let place = self.descend(at);
            for entry in place.table.0.iter().skip(place.index) {
                match Pte(entry.load(Ordering::Relaxed)).kind(place.level) {
                    Kind::Busy => {
                        entry.swap(Pte::EMPTY.0, Ordering::AcqRel);
                    }
                    Kind::Table(_) => break,
                    Kind::Leaf | Kind::Empty => {}
                }
                at = (at & !(place.level.size() - 1)) + place.level.size();
                if at >= end {
                    break;
                }
            }
        }
    }

    /// Breaks the entries of `level` for these addresses that point to empty tables.
    fn break_empty(&self, level: Level, addresses: &[u64]) -> [Option<Broken<'_>>; BATCH] {
        let mut broken = [const { None }; BATCH];
        for (&ipa, place_for) in addresses.iter().zip(&mut broken) {
            let place = self.descend_to(ipa, level);
            if let Kind::Table(pa) = place.kind
                && place.level == level
                && self.table(pa).is_empty()
            {
                let entry = place.entry();
                // Only the holder of the control mutex changes an entry that points to a table.
                entry.swap(Pte::BUSY.0, Ordering::AcqRel);
                let table = self.table(pa);
                *place_for = Some(Broken { entry, table, pa });
            }
        }
        broken
    }

    /// Frees the tables that are still empty when nobody is left who found them before they were
    /// broken off and invalidated.
    fn free_broken(&self, broken: [Option<Broken<'_>>; BATCH]) {
        if broken.iter().all(Option::is_none) {
            return;
        }
        self.layouts.wait_for_readers();
        for Broken { entry, table, pa } in broken.into_iter().flatten() {
            if table.is_empty() {
                entry.swap(Pte::EMPTY.0, Ordering::AcqRel);
                self.free_tables(pa, 1);
                self.count_tables(-1);
            } else {
                // A slot beside this one got a leaf there.
                entry.swap(Pte::table(pa).0, Ordering::AcqRel);
            }
        }
        self.hw.dsb_ishst();
    }

    /// Frees every table but the roots. Only for the end of a VM that no CPU runs.
    pub(crate) fn free_tree(&self) {
        self.tlb().everything();
        for root in 0..self.shape.roots {
            let pa = Pa::new(self.root.raw() + (root * size_of::<Table>()) as u64);
            self.free_below(self.table(pa), self.shape.start);
        }
    }

    fn free_below(&self, table: &Table, level: Level) {
        let Some(below) = level.below() else { return };
        for entry in &table.0 {
            if let Kind::Table(pa) = Pte(entry.swap(Pte::EMPTY.0, Ordering::AcqRel)).kind(level) {
                self.free_below(self.table(pa), below);
                self.free_tables(pa, 1);
            }
        }
    }
}
