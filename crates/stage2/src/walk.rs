//! Finding the descriptor that decides about an address.
//!
//! A walk holds its CPU's copy of the layout, or the control mutex. Entries change beneath it by
//! compare-and-swap, but no table that was ever reachable is freed while somebody holds a copy who may
//! have found it, or by anyone but the holder of the mutex. So a reference found here stays good.

use crate::hardware::{Hardware, Table, TableAt, TablePages};
use crate::pte::{Kind, Pte};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Level, Pa};

/// The end of a walk: the deepest table on the way to an address, and the entry in it.
pub(crate) struct Place<'a> {
    pub(crate) table: &'a Table,
    pub(crate) level: Level,
    pub(crate) index: usize,
    /// The table above, and the entry in it that led here; none above the top.
    above: Option<(&'a Table, usize)>,
    /// What the entry was when the walk came by.
    pub(crate) pte: Pte,
    pub(crate) kind: Kind,
}

impl<'a> Place<'a> {
    pub(crate) fn entry(&self) -> &'a AtomicU64 {
        self.table.entry(self.index)
    }

    /// The entry behind the one that led to this table, if that is in the table above.
    pub(crate) fn next_above(&self) -> Option<Pte> {
        let (table, index) = self.above?;
        let entry = table.0.get(index + 1)?;
        Some(Pte(entry.load(Ordering::Acquire)))
    }
}

impl Table {
    /// Returns the entry at `index` modulo 512.
    pub(crate) fn entry(&self, index: usize) -> &AtomicU64 {
        &self.0[index & 511]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0
            .iter()
            .all(|entry| entry.load(Ordering::Relaxed) == Pte::EMPTY.0)
    }
}

impl<H: Hardware> Stage2<H> {
    /// Returns the root table for `ipa`; roots of a concatenated start level lie side by side.
    pub(crate) fn root(&self, ipa: u64) -> &Table {
        self.table(Pa::new(self.root.raw() + self.root_offset(ipa)))
    }

    /// Returns the table at `pa`, which the machine allocated for this VM or a descriptor of it leads to.
    #[inline]
    pub(crate) fn table(&self, pa: Pa) -> &Table {
        self.hw.table(TableAt::new(pa))
    }

    /// Gives back tables that neither software nor any TLB can reach any more.
    pub(crate) fn free_tables(&self, pa: Pa, count: usize) {
        self.hw.free_tables(TablePages::new(pa, count));
    }

    fn root_offset(&self, ipa: u64) -> u64 {
        let which = ipa >> (self.shape.start.shift() + 9);
        which.min(self.shape.roots as u64 - 1) * size_of::<Table>() as u64
    }

    /// Walks to the entry that decides about `ipa`: empty, busy or a leaf, never a table.
    pub(crate) fn descend(&self, ipa: u64) -> Place<'_> {
        self.descend_to(ipa, Level::L3)
    }

    /// Walks to the entry of exactly `level` for `ipa`, or to what ends the walk above it.
    #[inline]
    pub(crate) fn descend_to(&self, ipa: u64, target: Level) -> Place<'_> {
        let mut table = self.root(ipa);
        let mut level = self.shape.start;
        let mut above = None;
        loop {
            let index = level.index(ipa);
            let pte = Pte(table.entry(index).load(Ordering::Acquire));
            let kind = pte.kind(level);
            match (kind, level.below()) {
                (Kind::Table(pa), Some(below)) if level < target => {
                    above = Some((table, index));
                    table = self.table(pa);
                    level = below;
                }
                _ => {
                    return Place {
                        table,
                        level,
                        index,
                        above,
                        pte,
                        kind,
                    };
                }
            }
        }
    }
}
