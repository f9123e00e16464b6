//! Memory slots: which machine memory stands behind which guest addresses.
//!
//! A slot is a run of guest frames and the extents of machine memory behind it, in order. Slots are
//! kept sorted by address and never overlap. Every CPU has a copy of the list, changed under the control
//! mutex; the copies of a slot share its bitmaps.

use crate::config::Shape;
use crate::dirty::Dirty;
use crate::error::Error;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{
    Access, Engine, Extent, Gfn, Granularity, Ipa, Level, PAGE_SHIFT, PAGE_SIZE, Pa, SlotId,
};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// An extent and where in the slot it begins.
#[derive(Clone, Copy, Debug)]
struct Piece {
    first: u64,
    pa: u64,
    pages: u64,
}

/// Where a slot is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Life {
    /// Mapped on demand.
    Usable,
    /// Being deleted.
    Dying,
}

/// What leaves a slot may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LeavesOf {
    /// Only such as its access says.
    ItsAccess,
    /// Also such as its access was before it was changed.
    Older,
}

#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(crate) base: Gfn,
    pub(crate) pages: u64,
    pub(crate) access: Access,
    pub(crate) life: Life,
    pub(crate) leaves: LeavesOf,
    ground: Arc<Ground>,
    pub(crate) dirty: Arc<Dirty>,
}

/// What all copies of a slot share, beside the bitmaps.
struct Ground {
    pieces: Vec<Piece>,
    /// The address that a deletion or a change of access has reached. Only whoever holds the control mutex uses it.
    unmapped: AtomicU64,
}

/// What a caller may know about a slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotInfo {
    /// Its name.
    pub id: SlotId,
    /// Its first frame.
    pub base: Gfn,
    /// Its length in pages.
    pub pages: u64,
    /// What the guest may do.
    pub access: Access,
    /// The machine memory behind it, in order; neighbours that touch are one.
    pub extents: Vec<Extent>,
}

impl Slot {
    pub(crate) fn new(
        id: SlotId,
        base: Gfn,
        pages: u64,
        access: Access,
        extents: &[Extent],
        shape: &Shape,
        pa_bits: u8,
    ) -> Result<Self, Error> {
        let range = Error::SlotRange { base, pages };
        let end = base.raw().checked_add(pages).ok_or(range)?;
        if pages == 0 || end > shape.limit() >> PAGE_SHIFT {
            return Err(range);
        }
        let pa_limit = 1u64 << pa_bits.min(48);
        let mut pieces: Vec<Piece> = Vec::new();
        pieces
            .try_reserve_exact(extents.len())
            .map_err(|_| Error::OutOfMemory)?;
        let mut first = 0u64;
        for extent in extents {
            let bytes = extent.pages.checked_mul(PAGE_SIZE);
            let end = bytes.and_then(|bytes| extent.pa.raw().checked_add(bytes));
            if extent.pages == 0
                || !extent.pa.is_aligned(PAGE_SIZE)
                || end.is_none_or(|end| end > pa_limit)
            {
                return Err(Error::ExtentRange(*extent));
            }
            match pieces.last_mut() {
                Some(last) if last.pa + last.pages * PAGE_SIZE == extent.pa.raw() => {
                    last.pages += extent.pages
                }
                _ => pieces.push(Piece {
                    first,
                    pa: extent.pa.raw(),
                    pages: extent.pages,
                }),
            }
            first = first
                .checked_add(extent.pages)
                .ok_or(Error::ExtentRange(*extent))?;
        }
        if first != pages {
            return Err(Error::ExtentTotal {
                slot: pages,
                extents: first,
            });
        }
        let dirty = Arc::new(Dirty::new(pages)?);
        Ok(Self {
            id,
            base,
            pages,
            access,
            life: Life::Usable,
            leaves: LeavesOf::ItsAccess,
            ground: Arc::new(Ground {
                pieces,
                unmapped: AtomicU64::new(0),
            }),
            dirty,
        })
    }

    /// Returns the address that a deletion or a change of access has reached.
    pub(crate) fn unmapped(&self) -> u64 {
        self.ground.unmapped.load(Ordering::Relaxed)
    }

    /// Notes it.
    pub(crate) fn set_unmapped(&self, reached: u64) {
        self.ground.unmapped.store(reached, Ordering::Relaxed);
    }

    /// Returns the first address.
    pub(crate) const fn start(&self) -> u64 {
        self.base.ipa().raw()
    }

    /// Returns the first address past the slot. It fits: the slot was checked against the IPA size.
    pub(crate) const fn end(&self) -> u64 {
        (self.base.raw() + self.pages) << PAGE_SHIFT
    }

    /// Is it not being deleted?
    ///
    /// # Errors
    ///
    /// [`Error::SlotDying`].
    pub(crate) const fn require_usable(&self) -> Result<(), Error> {
        match self.life {
            Life::Usable => Ok(()),
            Life::Dying => Err(Error::SlotDying(self.id)),
        }
    }

    /// Returns the page of the slot that holds `ipa`, an address inside it.
    pub(crate) const fn page(&self, ipa: u64) -> u64 {
        (ipa - self.start()) >> PAGE_SHIFT
    }

    /// Returns the address of `page`.
    pub(crate) const fn address(&self, page: u64) -> u64 {
        self.start() + (page << PAGE_SHIFT)
    }

    /// Returns where `page` lies and how many pages follow it there without a gap, itself included.
    pub(crate) fn backing(&self, page: u64) -> Option<(Pa, u64)> {
        let after = self
            .ground
            .pieces
            .partition_point(|piece| piece.first <= page);
        let piece = self.ground.pieces.get(after.checked_sub(1)?)?;
        let into = page - piece.first;
        let left = piece.pages.checked_sub(into).filter(|left| *left != 0)?;
        Some((Pa::new(piece.pa + into * PAGE_SIZE), left))
    }

    /// Returns the machine address of the leaf of `level` around `ipa`, if the slot holds all of it
    /// and the memory behind it is contiguous and aligned alike.
    pub(crate) fn leaf(&self, ipa: u64, level: Level) -> Option<Pa> {
        if level == Level::L0 {
            return None;
        }
        let start = ipa & !(level.size() - 1);
        if start < self.start() || start.checked_add(level.size())? > self.end() {
            return None;
        }
        let (pa, left) = self.backing(self.page(start))?;
        (left >= level.pages() && pa.is_aligned(level.size())).then_some(pa)
    }

    pub(crate) fn info(&self) -> SlotInfo {
        let extents = self.ground.pieces.iter().map(|piece| Extent {
            pa: Pa::new(piece.pa),
            pages: piece.pages,
        });
        SlotInfo {
            id: self.id,
            base: self.base,
            pages: self.pages,
            access: self.access,
            extents: extents.collect(),
        }
    }
}

/// How a log works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogMode {
    /// How dirty pages are found.
    pub engine: Engine,
    /// How fine.
    pub granularity: Granularity,
}

/// What a log covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    All,
    One(SlotId),
}

impl Scope {
    pub(crate) fn covers(self, slot: &Slot) -> bool {
        slot.life != Life::Dying
            && match self {
                Scope::All => true,
                Scope::One(id) => slot.id == id,
            }
    }
}

/// A running log, as the fault path needs to know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Log {
    pub(crate) mode: LogMode,
    pub(crate) scope: Scope,
}

/// The slots and the log, as every CPU has them.
pub(crate) struct Layout {
    /// Sorted by address, disjoint.
    pub(crate) slots: Vec<Slot>,
    pub(crate) log: Option<Log>,
}

impl Layout {
    pub(crate) const EMPTY: Self = Self {
        slots: Vec::new(),
        log: None,
    };

    pub(crate) fn slot(&self, id: SlotId) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.id == id)
    }

    /// Changes the slot of that name, if it is there.
    pub(crate) fn change_slot(&mut self, id: SlotId, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.id == id) {
            change(slot);
        }
    }

    /// Returns where in the list a new slot belongs.
    ///
    /// # Errors
    ///
    /// [`Error::SlotExists`], [`Error::SlotOverlap`].
    pub(crate) fn place_for(&self, slot: &Slot) -> Result<usize, Error> {
        if self.slot(slot.id).is_some() {
            return Err(Error::SlotExists(slot.id));
        }
        let at = self
            .slots
            .partition_point(|other| other.end() <= slot.start());
        match self.slots.get(at) {
            Some(other) if other.start() < slot.end() => Err(Error::SlotOverlap(other.id)),
            _ => Ok(at),
        }
    }

    /// Returns the usable slot that holds `ipa`.
    pub(crate) fn slot_at(&self, ipa: Ipa) -> Option<&Slot> {
        let at = self.slots.partition_point(|slot| slot.end() <= ipa.raw());
        let slot = self.slots.get(at)?;
        (slot.start() <= ipa.raw() && slot.life == Life::Usable).then_some(slot)
    }

    /// Returns how writes to `slot` are logged, if they are.
    pub(crate) fn tracking(&self, slot: &Slot) -> Option<LogMode> {
        let log = self.log.as_ref()?;
        (slot.access == Access::ReadWrite && log.scope.covers(slot)).then_some(log.mode)
    }

    /// Returns the first slot of `scope` with anything at or above `from`, and where in it to go on.
    pub(crate) fn next(&self, scope: Scope, from: u64) -> Option<(&Slot, u64)> {
        let slot = self.from(scope, from).next()?;
        Some((slot, from.max(slot.start())))
    }

    /// Returns the slots of `scope` with anything at or above `from`.
    pub(crate) fn from(&self, scope: Scope, from: u64) -> impl Iterator<Item = &Slot> {
        let after = self.slots.partition_point(|slot| slot.end() <= from);
        let rest = self.slots.get(after..).unwrap_or(&[]).iter();
        rest.filter(move |slot| scope.covers(slot))
    }

    /// Returns the slots of `scope`.
    pub(crate) fn covered(&self, scope: Scope) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |slot| scope.covers(slot))
    }

    /// Returns (pages below `from`, pages in all) of the slots of `scope`.
    pub(crate) fn progress(&self, scope: Scope, from: u64) -> (u64, u64) {
        self.covered(scope).fold((0, 0), |(done, total), slot| {
            let behind = from.clamp(slot.start(), slot.end()) - slot.start();
            (done + (behind >> PAGE_SHIFT), total + slot.pages)
        })
    }
}
