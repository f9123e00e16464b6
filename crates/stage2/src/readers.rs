//! Data that every CPU reads all the time and that hardly ever changes: one copy a CPU.
//!
//! A CPU reads its own copy under that copy's lock, which nobody else touches meanwhile: two CPUs that
//! fault at once share no cache line here. Whoever changes the data changes the copies one after the
//! other, waiting for each copy's reader to leave. So when [`change`](Replicas::change) returns, everybody
//! sees the new data and nobody is left who saw the old.
//!
//! The same wait says when a table that was unlinked may be freed ([`wait_for_readers`]
//! (Replicas::wait_for_readers)): each CPU has passed a point at which it held nothing. That is a grace
//! period without epoch counters: the lock a reader takes anyway is its mark.
//!
//! # Concurrency
//!
//! Readers wait only for a change of their own copy. Changes are serialized by the control mutex. A
//! reader takes no other lock of this crate and changes nothing here, so the waits end.

use crate::error::Error;
use crate::sync::rwlock::{RwLock, RwLockReadGuard};
use alloc::vec::Vec;

/// On cache lines of its own; 128 bytes where lines are fetched in pairs.
#[repr(align(128))]
struct Line<T>(RwLock<T>);

pub(crate) struct Replicas<T> {
    first: Line<T>,
    others: Vec<Line<T>>,
}

impl<T> Replicas<T> {
    /// Makes a copy for each of `cpus` CPUs.
    pub(crate) fn new(cpus: usize, make: impl Fn() -> T) -> Result<Self, Error> {
        let mut others = Vec::new();
        others
            .try_reserve_exact(cpus.saturating_sub(1))
            .map_err(|_| Error::OutOfMemory)?;
        others.extend((1..cpus).map(|_| Line(RwLock::new(make()))));
        let first = Line(RwLock::new(make()));
        Ok(Self { first, others })
    }

    /// Reads the copy of `cpu`. A CPU that there was none of at the beginning shares the first one's.
    #[inline(always)]
    pub(crate) fn read(&self, cpu: usize) -> RwLockReadGuard<'_, T> {
        let line = cpu.checked_sub(1).and_then(|other| self.others.get(other));
        line.unwrap_or(&self.first).0.read()
    }

    /// Changes every copy. When it returns, no reader of an older state is left.
    pub(crate) fn change(&self, mut change: impl FnMut(&mut T)) {
        for line in self.lines() {
            change(&mut line.write());
        }
    }

    /// Changes every copy, or none if `prepare` fails for one.
    pub(crate) fn try_change<E>(
        &self,
        prepare: impl Fn(&mut T) -> Result<(), E>,
        change: impl FnMut(&mut T),
    ) -> Result<(), E> {
        self.lines()
            .try_for_each(|line| prepare(&mut line.write()))?;
        self.change(change);
        Ok(())
    }

    /// Waits until everyone who is reading now has stopped.
    pub(crate) fn wait_for_readers(&self) {
        self.lines().for_each(|line| drop(line.write()));
    }

    fn lines(&self) -> impl Iterator<Item = &Line<T>> {
        core::iter::once(&self.first).chain(&self.others)
    }
}

impl<T> Line<T> {
    /// By way of an upgradeable guard, which keeps its reader from coming back: a plain writer would
    /// starve behind a CPU that faults all the time.
    fn write(&self) -> impl core::ops::DerefMut<Target = T> {
        self.0.upgradeable_read().upgrade()
    }
}
