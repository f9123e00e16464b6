//! Putting leaves in, on first touch or ahead of it.
//!
//! An entry only ever goes from empty to something by compare-and-swap, so two CPUs that fault on the
//! same page agree without a lock. A table is filled before it is linked, and a table that lost the
//! race was never reachable and goes straight back. Making an empty entry valid needs no TLBI
//! (D8.14.1: invalid entries are not cached), only a DSB so that walkers see it.
//!
//! When a level-3 table is needed it is filled with every page the slot has in those 2 MiB. The table
//! costs the same memory full or with one entry, and 511 faults are saved.

use crate::error::Error;
use crate::hardware::{Hardware, Leaves, Table};
use crate::pte::{Kind, Permission, Pte};
use crate::slot::{Layout, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::Ordering;
use crate::types::{Access, Granularity, Ipa, Level, PAGE_SIZE, Progress, SlotId};

/// Why a leaf is put in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touch {
    /// The guest is about to write this address; a tracked leaf starts dirty.
    Write,
    /// Anything else.
    Other,
}

/// How an attempt to map ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mapped {
    /// By a leaf of this level; everything from the touched page on and below the end is mapped now.
    Leaf { level: Level, end: u64 },
    /// Somebody else put something there first.
    Raced,
    /// No memory for a table.
    NoTables,
}

/// Is a table being filled reachable?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reach {
    Unlinked,
    Live,
}

/// What a call may at most put in, in leaves.
const BUDGET: u64 = 512;
/// What a leaf or a filled table counts for: a table is 512 stores.
const FILLED: u64 = 256;

impl<H: Hardware> Stage2<H> {
    /// Maps a bounded part of a slot, from page `from` on, with the largest leaves that fit. Call it
    /// again with the `done` it returned. What is mapped already stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfTables`] when a table cannot be had: what was mapped stays, the rest is mapped
    /// on first touch if memory is there by then.
    pub fn map_ahead(&self, slot: SlotId, from: u64) -> Result<Progress, Error> {
        let layout = self.layout();
        let slot = layout.slot(slot).ok_or(Error::NoSuchSlot(slot))?;
        slot.require_usable()?;
        if slot.access == Access::None {
            return Ok(Progress::Done);
        }
        let mut at = slot.start() + from.min(slot.pages) * PAGE_SIZE;
        let mut budget = BUDGET;
        while at < slot.end() && budget > 0 {
            let place = self.descend(at);
            let next = match place.kind {
                Kind::Empty => match self.map(&layout, slot, at, Touch::Other) {
                    Mapped::Leaf { end, .. } => {
                        budget =
                            budget.saturating_sub(if end - at > PAGE_SIZE { FILLED } else { 1 });
                        end
                    }
                    Mapped::Raced => break,
                    Mapped::NoTables => return Err(Error::OutOfTables),
                },
                Kind::Busy => break,
                _ => (at & !(place.level.size() - 1)) + place.level.size(),
            };
            budget = budget.saturating_sub(1);
            at = next;
        }
        if at >= slot.end() {
            return Ok(Progress::Done);
        }
        Ok(Progress::More {
            done: slot.page(at),
            total: slot.pages,
        })
    }

    /// Returns the state a fresh leaf of `slot` is born in.
    pub(crate) fn fresh(layout: &Layout, slot: &Slot) -> Permission {
        match (slot.access, layout.tracking(slot)) {
            // Where nothing is allowed none is made.
            (Access::ReadOnly | Access::None, _) => Permission::ReadOnly,
            (Access::ReadWrite, None) => Permission::Untracked,
            (Access::ReadWrite, Some(mode)) => Permission::Clean(mode.engine),
        }
    }

    /// Maps the page at `ipa`, in `slot`, with the largest leaf that alignment, the log and the
    /// tables already there allow.
    pub(crate) fn map(&self, layout: &Layout, slot: &Slot, ipa: u64, touch: Touch) -> Mapped {
        let permission = Self::fresh(layout, slot);
        let touched = match (touch, permission) {
            (Touch::Write, Permission::Clean(engine)) => Permission::Dirty(engine),
            _ => permission,
        };
        // While pages are logged one by one a new block would only be split again.
        let granularity = layout.tracking(slot).map(|mode| mode.granularity);
        let largest = match (self.features.leaves, granularity) {
            (Leaves::Pages, _) | (_, Some(Granularity::Page)) => Level::L3,
            (Leaves::Blocks, _) => Level::L1,
        };
        let mut table = self.root(ipa);
        let mut level = self.shape.start;
        loop {
            let entry = table.entry(level.index(ipa));
            match Pte(entry.load(Ordering::Acquire)).kind(level) {
                Kind::Table(pa) => table = self.table(pa),
                Kind::Leaf | Kind::Busy => return Mapped::Raced,
                Kind::Empty if level == Level::L3 => {
                    return self.fill_live(slot, table, ipa, permission, touched);
                }
                Kind::Empty => {
                    if level >= largest
                        && let Some(pa) = slot.leaf(ipa, level)
                    {
                        let leaf = Pte::leaf(level, pa, self.shape.attr, touched);
                        if entry
                            .compare_exchange(
                                Pte::EMPTY.0,
                                leaf.0,
                                Ordering::AcqRel,
                                Ordering::Acquire,
                            )
                            .is_err()
                        {
                            return Mapped::Raced;
                        }
                        self.hw.dsb_ishst();
                        self.count_leaves(level, 1);
                        Self::note_touch(slot, ipa, touched);
                        let end = (ipa & !(level.size() - 1)) + level.size();
                        return Mapped::Leaf { level, end };
                    }
                    let Some(pa) = self.hw.alloc_tables(1) else {
                        return Mapped::NoTables;
                    };
                    let fresh = self.table(pa);
                    let filled = if level == Level::L2 {
                        self.fill(slot, fresh, ipa, permission, touched, Reach::Unlinked)
                    } else {
                        0
                    };
                    self.hw.dsb_ishst();
                    let link = Pte::table(pa).0;
                    if entry
                        .compare_exchange(Pte::EMPTY.0, link, Ordering::AcqRel, Ordering::Acquire)
                        .is_err()
                    {
                        // Never reachable, so nothing to invalidate. What won may be a table: look again.
                        self.free_tables(pa, 1);
                        continue;
                    }
                    self.count_tables(1);
                    if level == Level::L2 {
                        self.hw.dsb_ishst();
                        self.count_leaves(Level::L3, filled);
                        return self.mapped_pages(slot, ipa, touched);
                    }
                    table = fresh;
                }
            }
            match level.below() {
                Some(below) => level = below,
                None => return Mapped::Raced,
            }
        }
    }

    fn fill_live(
        &self,
        slot: &Slot,
        table: &Table,
        ipa: u64,
        permission: Permission,
        touched: Permission,
    ) -> Mapped {
        let filled = self.fill(slot, table, ipa, permission, touched, Reach::Live);
        if filled == 0 {
            return Mapped::Raced;
        }
        self.hw.dsb_ishst();
        self.count_leaves(Level::L3, filled);
        self.mapped_pages(slot, ipa, touched)
    }

    /// Notes a page whose leaf starts dirty: after it is mapped, like any other write fault.
    fn note_touch(slot: &Slot, ipa: u64, touched: Permission) {
        if matches!(touched, Permission::Dirty(_)) {
            slot.dirty.mark(slot.page(ipa));
        }
    }

    /// Notes the touched page and says how far the table reaches.
    fn mapped_pages(&self, slot: &Slot, ipa: u64, touched: Permission) -> Mapped {
        Self::note_touch(slot, ipa, touched);
        let end = (ipa & !(Level::L2.size() - 1)) + Level::L2.size();
        Mapped::Leaf {
            level: Level::L3,
            end: end.min(slot.end()),
        }
    }

    /// Fills the level-3 `table` around `ipa` with the slot's pages. Returns how many it put in.
    fn fill(
        &self,
        slot: &Slot,
        table: &Table,
        ipa: u64,
        permission: Permission,
        touched: Permission,
        reach: Reach,
    ) -> i64 {
        let region = ipa & !(Level::L2.size() - 1);
        let end = slot.end().min(region + Level::L2.size());
        let mut at = slot.start().max(region);
        let mut filled = 0;
        while at < end {
            let Some((pa, left)) = slot.backing(slot.page(at)) else {
                break;
            };
            let run = left.min((end - at) / PAGE_SIZE);
            for page in 0..run {
                let here = at + page * PAGE_SIZE;
                let state = if here == ipa & !(PAGE_SIZE - 1) {
                    touched
                } else {
                    permission
                };
                let frame = crate::types::Pa::new(pa.raw() + page * PAGE_SIZE);
                let leaf = Pte::leaf(Level::L3, frame, self.shape.attr, state).0;
                let entry = table.entry(Level::L3.index(here));
                match reach {
                    Reach::Unlinked => {
                        entry.store(leaf, Ordering::Relaxed);
                        filled += 1;
                    }
                    Reach::Live => {
                        let put = entry.compare_exchange(
                            Pte::EMPTY.0,
                            leaf,
                            Ordering::AcqRel,
                            Ordering::Acquire,
                        );
                        filled += i64::from(put.is_ok());
                    }
                }
            }
            at += run * PAGE_SIZE;
        }
        filled
    }

    /// Returns where `ipa` lies in the machine, and how far that goes on without a gap.
    pub fn translate(&self, ipa: Ipa) -> Option<Translation> {
        let layout = self.layout();
        let slot = layout.slot_at(ipa)?;
        let (pa, pages) = slot.backing(slot.page(ipa.raw()))?;
        let into = ipa.raw() % PAGE_SIZE;
        let bytes = pages.checked_mul(PAGE_SIZE)?.checked_sub(into)?;
        Some(Translation {
            pa: pa.checked_add(into)?,
            bytes,
            access: slot.access,
        })
    }
}

/// Where a guest address lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The machine address.
    pub pa: crate::types::Pa,
    /// Bytes from there on that are contiguous in both address spaces; at least one.
    pub bytes: u64,
    /// What the guest may do there.
    pub access: Access,
}
