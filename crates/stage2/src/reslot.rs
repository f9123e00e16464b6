//! Slots that change while vCPUs run and a log is on: moved to other addresses, made larger or smaller.
//!
//! Each is a call that takes one bounded step; call it with the same arguments until it is done. What is
//! known about pages goes with the pages: a slot's bitmaps count from its first page, so a slot that moved
//! has the dirty pages it had, and none more. The alternative, all of a moved slot dirty, would send
//! memory that the host has.
//!
//! * **Move.** The leaves at the old addresses are taken out, what was dirty is noted, and then the slot
//!   has its new addresses. Faults at the old ones are retried until then, and are "not memory" after.
//! * **Shrink.** The pages at the end are the guest's no more from the first call on. Their leaves are
//!   taken out, with a block that reaches over the new end, and their bits forgotten.
//! * **Grow.** The new pages are there from the first call on, mapped on touch. The bitmaps are exchanged
//!   for longer ones, and the old ones added to them piece by piece. As with a new slot, the host is
//!   told of a new page when it is written; in a log that began with every page dirty, at once.
//!
//! None of this happens in the middle of a harvest or while a log starts: both would not find again what
//! they had in front of them. And while a slot is resized no harvest begins and no bitmap is read.
//!
//! One thing at a time is done to a slot, a change of its access included: they share a cursor, and each
//! says `Done` of what it found. Only a deletion comes over all others, and takes out whatever any of them
//! may have left a leaf of.
//!
//! # Concurrency
//!
//! One step holds the control mutex. EL2's own writes are the caller's to keep out of a slot that moves: a
//! page that was written at the old address is not marked at the new one.

use crate::control::{Control, Initially, Phase, TakePass};
use crate::error::Error;
use crate::hardware::Hardware;
use crate::protect::FILL;
use crate::pte::Kind;
use crate::slot::{Life, Older, Slot};
use crate::stage2::Stage2;
use crate::types::{Extent, Gfn, PAGE_SHIFT, PAGE_SIZE, Progress, SlotId};
use alloc::vec::Vec;

impl<H: Hardware> Stage2<H> {
    /// Moves a slot to where frame `base` is its first. Call it until it is done.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSlot`], [`Error::SlotRange`], [`Error::SlotOverlap`], [`Error::SlotDying`],
    /// [`Error::SlotChanging`] if it is on its way to somewhere else, [`Error::TakeUnfinished`] in the
    /// middle of a harvest, [`Error::Busy`] while a log starts.
    pub fn move_slot(&self, id: SlotId, base: Gfn) -> Result<Progress, Error> {
        let control = self.control.lock();
        let mut slot = self.slot(id)?;
        let Some(()) = require_quiet(&control)? else {
            return Ok(self.somebody_else_steps());
        };
        if slot.life != (Life::Moving { to: base }) {
            slot.require_still()?;
            if slot.base == base {
                return Ok(Progress::Done);
            }
            let mut there = slot.clone();
            there.base = base;
            self.require_in_range(&there)?;
            self.layout().require_free(&there)?;
            slot.set_unmapped(slot.start());
            slot = self.change_slot(id, |slot| slot.life = Life::Moving { to: base })?;
        }
        let progress = self.unmap_step(&slot, None);
        if progress == Progress::Done {
            self.layouts.change(|layout| layout.relocate(id, base));
        }
        Ok(progress)
    }

    /// Takes the pages from page `pages` on away from a slot. Call it until it is done.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSlot`], [`Error::SlotRange`] if it has fewer pages or none would be left,
    /// [`Error::SlotDying`], [`Error::SlotChanging`] if something else is being changed,
    /// [`Error::TakeUnfinished`] in the middle of a harvest, [`Error::Busy`] while a log starts,
    /// [`Error::OutOfMemory`].
    pub fn shrink_slot(&self, id: SlotId, pages: u64) -> Result<Progress, Error> {
        let mut control = self.control.lock();
        let mut slot = self.slot(id)?;
        let Some(()) = require_quiet(&control)? else {
            return Ok(self.somebody_else_steps());
        };
        if slot.reach == slot.pages || slot.pages != pages || slot.life != Life::Usable {
            slot.require_still()?;
            control.require_nothing_resized()?;
            if slot.pages == pages {
                return Ok(Progress::Done);
            }
            if pages == 0 || pages > slot.pages {
                return Err(Error::SlotRange {
                    base: slot.base,
                    pages,
                });
            }
            let shorter = self.resized(&slot, pages, slot.extents(pages).collect())?;
            let end = shorter.end();
            let place = self.descend(end);
            let reaches_over = place.kind == Kind::Leaf;
            let from = match reaches_over {
                true => end & !(place.level.size() - 1),
                false => end,
            };
            shorter.set_unmapped(from.max(slot.start()));
            control.resizing = Some(id);
            slot = self.change_slot(id, |slot| {
                let mut shorter = shorter.clone();
                (shorter.reach, shorter.dirty) = (slot.pages, slot.dirty.clone());
                *slot = shorter;
            })?;
        }
        let before = slot.unmapped();
        self.unmap_step(&slot, None);
        // Not further than the bits that a step can forget.
        let at = slot.unmapped().min(before + FILL as u64 * 64 * PAGE_SIZE);
        slot.set_unmapped(at);
        let first = slot.page(before.max(slot.end()));
        slot.dirty
            .forget(first, slot.page(at.max(slot.end())) - first);
        if at < slot.reached_end() {
            return Ok(Progress::More {
                done: slot.page(at),
                total: slot.reach,
            });
        }
        self.change_slot(id, |slot| slot.reach = slot.pages)?;
        control.resizing = None;
        Ok(Progress::Done)
    }

    /// Adds `more` machine memory behind a slot's last page. Call it until it is done.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSlot`], [`Error::SlotRange`], [`Error::SlotOverlap`], [`Error::ExtentRange`],
    /// [`Error::SlotDying`], [`Error::SlotChanging`] if something else is being changed,
    /// [`Error::TakeUnfinished`] in the middle of a harvest, [`Error::Busy`] while a log starts,
    /// [`Error::OutOfMemory`].
    pub fn grow_slot(&self, id: SlotId, more: &[Extent]) -> Result<Progress, Error> {
        let mut control = self.control.lock();
        let mut slot = self.slot(id)?;
        let Some(()) = require_quiet(&control)? else {
            return Ok(self.somebody_else_steps());
        };
        if !slot.is_growing_by(more) {
            slot.require_still()?;
            control.require_nothing_resized()?;
            let mut extents: Vec<Extent> = Vec::new();
            extents
                .try_reserve_exact(more.len() + slot.extents(slot.pages).count())
                .map_err(|_| Error::OutOfMemory)?;
            extents.extend(slot.extents(slot.pages));
            extents.extend(more);
            let sum = |sum: u64, extent: &Extent| sum.checked_add(extent.pages);
            let pages = extents.iter().try_fold(0, sum);
            let pages = pages.ok_or(Error::SlotRange {
                base: slot.base,
                pages: u64::MAX,
            })?;
            let longer = self.resized(&slot, pages, extents)?;
            self.layout().require_free(&longer)?;
            if control.phase != Phase::Off && control.initially == Initially::Dirty {
                longer.dirty.mark_run(slot.pages, pages - slot.pages);
            }
            control.resizing = Some(id);
            slot = self.change_slot(id, |slot| {
                let mut longer = longer.clone();
                longer.older = Some(Older {
                    dirty: slot.dirty.clone(),
                    pages: slot.pages,
                });
                *slot = longer;
            })?;
        }
        // Here the cursor counts words.
        let from = slot.unmapped();
        let older = slot.older.as_ref();
        let left = older.is_some_and(|older| {
            let Older { dirty, pages } = older;
            slot.dirty.inherit(dirty, *pages, from as usize, FILL)
        });
        if left {
            slot.set_unmapped(from + FILL as u64);
            return Ok(Progress::More {
                done: from * 64,
                total: slot.pages,
            });
        }
        self.change_slot(id, |slot| slot.older = None)?;
        control.resizing = None;
        Ok(Progress::Done)
    }

    /// Returns the slot, which is still, with other pages, of other memory, with empty bitmaps.
    fn resized(&self, slot: &Slot, pages: u64, extents: Vec<Extent>) -> Result<Slot, Error> {
        let (shape, pa_bits) = (&self.shape, self.features.pa_bits);
        Slot::new(
            slot.id,
            slot.base,
            pages,
            slot.access,
            &extents,
            shape,
            pa_bits,
        )
    }

    fn require_in_range(&self, slot: &Slot) -> Result<(), Error> {
        let end = slot.base.raw().checked_add(slot.pages);
        if end.is_some_and(|end| end <= self.shape.limit() >> PAGE_SHIFT) {
            return Ok(());
        }
        Err(Error::SlotRange {
            base: slot.base,
            pages: slot.pages,
        })
    }
}

/// Does no harvest collect and no log start? Nothing, if only a CPU is still at a stretch of a harvest
/// that was given up.
fn require_quiet(control: &Control) -> Result<Option<()>, Error> {
    if matches!(control.phase, Phase::Starting(_)) {
        return Err(Error::Busy);
    }
    match control.taking {
        Some(taking) if taking.pass != TakePass::Taken => Err(Error::TakeUnfinished(taking.epoch)),
        _ => Ok(control.claims.are_idle().then_some(())),
    }
}
