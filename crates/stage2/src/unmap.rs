//! Taking a slot's leaves and tables out, for good or to be mapped anew.
//!
//! Runs under the exclusive lock in bounded steps. A step unlinks, invalidates once, and only then
//! frees: tables go back when no TLB and no walker can reach them (invariant 5). The guest may run
//! meanwhile and waits, if it faults, for the lock.
//!
//! The value that the exchange with "empty" returns says whether a leaf was dirty, and it is noted
//! before the lock is released: no harvest can complete in between. A CPU that cached the leaf as clean
//! cannot make it dirty any more, since its update compares with memory; one that cached it as dirty
//! writes on until the invalidation, to a page that is noted.

use crate::hardware::{Hardware, Table};
use crate::pte::{Kind, Pte};
use crate::slot::Slot;
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Level, Pa};

/// Entries visited in a step, at most one table more.
const BUDGET: usize = 2048;
/// Tables unlinked in a step. One address can empty three.
const BATCH: usize = 16;

/// A walk that remembers the way, so that emptied tables can be unlinked.
struct Path<'a> {
    /// (entry that points to the table, the table, its address), from below the root down.
    steps: [Option<(&'a AtomicU64, &'a Table, Pa)>; 3],
    depth: usize,
    table: &'a Table,
    level: Level,
}

struct Unlinked {
    tables: [Option<Pa>; BATCH],
    len: usize,
}

impl Unlinked {
    fn push(&mut self, pa: Pa) {
        if let Some(slot) = self.tables.get_mut(self.len) {
            *slot = Some(pa);
            self.len += 1;
        }
    }

    fn has_room(&self) -> bool {
        self.len + 3 <= BATCH
    }
}

impl<H: Hardware> Stage2<H> {
    /// Unmaps a bounded part of `slot` from address `from` on. Returns the address it reached.
    pub(crate) fn unmap_step(&self, slot: &Slot, from: u64) -> u64 {
        let end = slot.end();
        let mut at = from.max(slot.start());
        let mut visits = 0;
        let mut unlinked = Unlinked {
            tables: [None; BATCH],
            len: 0,
        };
        while at < end && visits < BUDGET && unlinked.has_room() {
            let path = self.path(at);
            let region = path.level.size() * 512;
            let first = path.level.index(at);
            let table_end = (at & !(region - 1)).saturating_add(region);
            let mut reached = at;
            for entry in path.table.0.iter().skip(first) {
                let pte = Pte(entry.load(Ordering::Relaxed));
                if reached >= end || matches!(pte.kind(path.level), Kind::Table(_)) {
                    break;
                }
                if pte.kind(path.level) == Kind::Leaf {
                    let old = Pte(entry.swap(Pte::EMPTY.0, Ordering::AcqRel));
                    self.count_leaves(path.level, -1);
                    if old.is_dirty() {
                        slot.dirty.mark_run(slot.page(reached), path.level.pages());
                    }
                }
                visits += 1;
                reached = (reached & !(path.level.size() - 1)) + path.level.size();
            }
            at = reached;
            if at >= table_end || at >= end {
                visits += self.prune(&path, &mut unlinked);
            }
        }
        self.tlb().everything();
        for pa in unlinked.tables.iter().flatten() {
            self.hw.free_tables(*pa, 1);
        }
        self.count_tables(-(unlinked.len as i64));
        at.min(end)
    }

    fn path(&self, ipa: u64) -> Path<'_> {
        let mut path = Path {
            steps: [None; 3],
            depth: 0,
            table: self.root(ipa),
            level: self.shape.start,
        };
        loop {
            let entry = path.table.entry(path.level.index(ipa));
            let pte = Pte(entry.load(Ordering::Relaxed));
            match (
                pte.kind(path.level),
                path.level.below(),
                path.steps.get_mut(path.depth),
            ) {
                (Kind::Table(pa), Some(below), Some(step)) => {
                    path.table = self.hw.table(pa);
                    *step = Some((entry, path.table, pa));
                    path.depth += 1;
                    path.level = below;
                }
                _ => return path,
            }
        }
    }

    /// Unlinks the tables on the path that became empty, deepest first. Returns entries looked at.
    fn prune(&self, path: &Path<'_>, unlinked: &mut Unlinked) -> usize {
        let mut visits = 0;
        for (entry, table, pa) in path.steps.iter().take(path.depth).rev().flatten() {
            visits += 512;
            if !table.is_empty() {
                break;
            }
            entry.swap(Pte::EMPTY.0, Ordering::AcqRel);
            unlinked.push(*pa);
        }
        visits
    }

    /// Frees every table but the roots. Only for the end of a VM that no CPU runs.
    pub(crate) fn free_tree(&self) {
        self.tlb().everything();
        for root in 0..self.shape.roots {
            let pa = Pa::new(self.root.raw() + (root * size_of::<Table>()) as u64);
            self.free_below(self.hw.table(pa), self.shape.start);
        }
    }

    fn free_below(&self, table: &Table, level: Level) {
        let Some(below) = level.below() else { return };
        for entry in &table.0 {
            if let Kind::Table(pa) = Pte(entry.swap(Pte::EMPTY.0, Ordering::AcqRel)).kind(level) {
                self.free_below(self.hw.table(pa), below);
                self.hw.free_tables(pa, 1);
            }
        }
    }
}
