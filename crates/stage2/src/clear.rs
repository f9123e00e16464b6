//! Some pages at a time: an epoch of a range, and a log that begins with every page dirty.
//!
//! KVM's `KVM_CLEAR_DIRTY_LOG` forgets the bits of a range and protects its pages anew, just before the
//! host copies them: less is done at once, and a page that the guest writes all the time is reported
//! once, not twice. In two phases forgetting is the commit, so here it is an epoch that is *taken* of a
//! range ([`take_range`](Stage2::take_range)): the range's pages are tracked anew, and its bits kept until
//! the host has what they stand for. There is no separate look without consequences, and no need of one:
//! a page that a range does not have costs its harvest a load of its leaf, under either engine.
//!
//! With that a log can start by noting every page and arming none
//! ([`start_log_all_dirty`](Stage2::start_log_all_dirty), KVM's `INITIALLY_SET`): starting it costs two bits
//! a page, and no guest takes a fault or loses a block before the first copy of that memory is made. A leaf
//! that is not armed is plainly writable, under either engine; it is known to be dirty by its page's bit,
//! and whoever takes the bit arms the leaf. Blocks are armed whole by the first range that touches them:
//! the bits of their other pages stay.

use crate::control::{Initially, Part};
use crate::error::Error;
use crate::hardware::Hardware;
use crate::slot::{LogMode, Scope, Slot};
use crate::stage2::Stage2;
use crate::types::{Engine, Epoch, Granularity, Progress, SlotId};

impl<H: Hardware> Stage2<H> {
    /// Takes an epoch of `pages` pages of a slot from page `first` on, and of nothing else: as
    /// [`take`](Self::take), with the same numbers, commits and aborts. `first` and `pages` are multiples of
    /// 64, or the range ends with the slot.
    ///
    /// What the other pages know stays known. What an aborted epoch held is reported by the next epoch
    /// of those pages.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take), and [`Error::NoSuchSlot`], [`Error::PageRange`], and
    /// [`Error::NotLogging`] if the log is of another slot.
    pub fn take_range(
        &self,
        epoch: Epoch,
        slot: SlotId,
        first: u64,
        pages: u64,
    ) -> Result<Progress, Error> {
        {
            let layout = self.layout();
            let found = layout.slot(slot).ok_or(Error::NoSuchSlot(slot))?;
            found.require_range(first, pages)?;
            if !layout.log.is_some_and(|log| log.scope.covers(found)) {
                return Err(Error::NotLogging);
            }
        }
        self.take_of(epoch, Some(Part { slot, first, pages }))
    }

    /// Starts a log of every slot that takes every page for dirty until it was taken once, read-only
    /// ones too: the host has none of it. Otherwise as [`start_log`](Self::start_log).
    ///
    /// No permission is taken away and no block is split by this: that is done range by range, by the
    /// epochs that report the pages first. `Page` splits blocks then.
    ///
    /// # Errors
    ///
    /// As [`start_log`](Self::start_log).
    pub fn start_log_all_dirty(
        &self,
        engine: Engine,
        granularity: Granularity,
    ) -> Result<Progress, Error> {
        let mode = LogMode {
            engine,
            granularity,
        };
        self.start(Scope::All, mode, Initially::Dirty)
    }
}

impl Slot {
    /// Are these pages of the slot, and whole words of its bitmaps?
    pub(crate) fn require_range(&self, first: u64, pages: u64) -> Result<(), Error> {
        let end = first.checked_add(pages).filter(|end| *end <= self.pages);
        let whole = pages.is_multiple_of(64) || end == Some(self.pages);
        if pages != 0 && first.is_multiple_of(64) && end.is_some() && whole {
            return Ok(());
        }
        Err(Error::PageRange {
            slot: self.id,
            first,
            pages,
        })
    }
}
