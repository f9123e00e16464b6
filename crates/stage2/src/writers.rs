//! Who else writes to a VM's memory, and a log's word that it knows of all of it.
//!
//! A vCPU's writes are seen by its leaves. Everybody else says so: [`mark_dirty`](Stage2::mark_dirty) after
//! the write is the one door (invariant 18), for EL2's emulation and for a device whose requests EL2 carries
//! out. A device that writes by itself, and has no SMMU that walks these tables with hardware dirty state,
//! goes past both. No log can be right beside it; so the two exclude each other, and whoever comes second is
//! refused.
//!
//! # Concurrency
//!
//! The control mutex, which a start holds too.

use crate::control::Phase;
use crate::error::Error;
use crate::hardware::Hardware;
use crate::stage2::Stage2;

impl<H: Hardware> Stage2<H> {
    /// Admits a device that writes to the VM's memory with nobody telling. From here to
    /// [`remove_unseen_writer`](Self::remove_unseen_writer) no log is started. To be asked for before the
    /// device can reach the memory.
    ///
    /// # Errors
    ///
    /// [`Error::UnseenWriterOfALog`] while a log is on.
    pub fn admit_unseen_writer(&self) -> Result<(), Error> {
        let mut control = self.control.lock();
        if control.phase != Phase::Off {
            return Err(Error::UnseenWriterOfALog);
        }
        control.unseen_writers += 1;
        Ok(())
    }

    /// Says that such a device cannot reach the memory any more, its last write included.
    pub fn remove_unseen_writer(&self) {
        let mut control = self.control.lock();
        control.unseen_writers = control.unseen_writers.saturating_sub(1);
    }
}
