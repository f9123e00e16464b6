//! A VM's memory slots: added, deleted, given another access, while vCPUs run and a log is on.
//!
//! A deletion and a change of access are calls that take one bounded step; call them with the same arguments
//! until they are done. They share the slot's cursor, so that one begins where the other may have left leaves:
//! at the slot's first page.
//!
//! A slot keeps its place and its size: whoever wants others deletes it and adds one.
//!
//! # Concurrency
//!
//! One step holds the control mutex, and changes each CPU's copy of the list.

use crate::control::{Initially, Phase};
use crate::error::Error;
use crate::hardware::Hardware;
use crate::slot::{LeavesOf, Life, Slot, SlotInfo};
use crate::stage2::Stage2;
use crate::types::{Access, Extent, Gfn, Progress, SlotId};
use alloc::vec::Vec;

impl<H: Hardware> Stage2<H> {
    /// Adds a memory slot. Nothing is mapped yet; that happens on first touch or by
    /// [`map_ahead`](Self::map_ahead). While a log of the whole VM is on, the slot belongs to it; in one
    /// that began with every page dirty, so does the slot.
    ///
    /// # Errors
    ///
    /// [`Error::SlotExists`], [`Error::SlotOverlap`], [`Error::SlotRange`], [`Error::ExtentRange`],
    /// [`Error::ExtentTotal`], [`Error::OutOfMemory`].
    pub fn add_slot(
        &self,
        id: SlotId,
        base: Gfn,
        pages: u64,
        access: Access,
        extents: &[Extent],
    ) -> Result<(), Error> {
        let slot = Slot::new(
            id,
            base,
            pages,
            access,
            extents,
            &self.shape,
            self.features.pa_bits,
        )?;
        // Holding it keeps the copies alike.
        let control = self.control.lock();
        let index = self.layout().place_for(&slot)?;
        if control.phase != Phase::Off && control.initially == Initially::Dirty {
            slot.dirty.mark_run(0, pages);
        }
        self.layouts
            .try_change(
                |layout| layout.slots.try_reserve(1),
                |layout| layout.slots.insert(index, slot.clone()),
            )
            .map_err(|_| Error::OutOfMemory)
    }

    /// Removes a memory slot, in bounded steps; call it until it is done. From the first call on
    /// faults in it are answered "not memory", and when it is done no CPU can reach its memory. A change of
    /// its access that is half way is over with that.
    ///
    /// While a log is on, what is known about the slot's dirty pages goes with it, as does its part of
    /// an outstanding epoch: the host must read what it still wants before asking for this.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSlot`].
    pub fn delete_slot(&self, id: SlotId) -> Result<Progress, Error> {
        let _control = self.control.lock();
        let mut slot = self.slot(id)?;
        if slot.life != Life::Dying {
            slot.set_unmapped(slot.start());
            slot = self.change_slot(id, |slot| slot.life = Life::Dying)?;
        }
        let progress = self.unmap_step(&slot, None);
        if progress == Progress::Done {
            self.layouts
                .change(|layout| layout.slots.retain(|slot| slot.id != id));
        }
        Ok(progress)
    }

    /// Changes what the guest may do with a slot, in bounded steps; call it until it is done. Its leaves
    /// are taken out and come back on first touch; what was dirty stays known. From [`Access::None`] it is
    /// done at once, whatever else is under way: there are no leaves. So is what is so already, and no CPU's copy of the
    /// layout is written for it.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSlot`], [`Error::SlotDying`].
    pub fn set_access(&self, id: SlotId, access: Access) -> Result<Progress, Error> {
        let control = self.control.lock();
        let mut slot = self.slot(id)?;
        slot.require_usable()?;
        if slot.access == access && slot.leaves == LeavesOf::ItsAccess {
            return Ok(Progress::Done);
        }
        if slot.access == Access::None && slot.leaves == LeavesOf::ItsAccess {
            self.change_slot(id, |slot| slot.access = access)?;
            return Ok(Progress::Done);
        }
        if !control.claims.are_idle() {
            // A harvest that has passed a leaf would miss what is noted when the leaf goes.
            return Ok(self.somebody_else_steps());
        }
        if slot.access != access {
            slot.set_unmapped(slot.start());
            slot = self.change_slot(id, |slot| {
                slot.access = access;
                slot.leaves = LeavesOf::Older;
            })?;
        }
        // Leaves mapped meanwhile are of the new kind already; those in front of the cursor go once
        // more, which costs a fault.
        let harvested = self.harvested(&control, &slot);
        let progress = self.unmap_step(&slot, harvested);
        if progress == Progress::Done {
            self.change_slot(id, |slot| slot.leaves = LeavesOf::ItsAccess)?;
        }
        Ok(progress)
    }

    /// Returns a copy of the slot of that name.
    pub(crate) fn slot(&self, id: SlotId) -> Result<Slot, Error> {
        let found = self.layout().slot(id).cloned();
        found.ok_or(Error::NoSuchSlot(id))
    }

    /// Changes the slot of that name for every CPU, and returns it as it is then: whoever goes on with a
    /// copy from before would go on with another slot. Under the control mutex.
    pub(crate) fn change_slot(
        &self,
        id: SlotId,
        change: impl Fn(&mut Slot),
    ) -> Result<Slot, Error> {
        self.layouts
            .change(|layout| layout.change_slot(id, &change));
        self.slot(id)
    }

    /// Returns the slots, by address.
    pub fn slots(&self) -> Vec<SlotInfo> {
        self.layout().slots.iter().map(Slot::info).collect()
    }
}
