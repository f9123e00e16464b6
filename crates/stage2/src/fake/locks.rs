//! The locks of simulated runs: in front of each that is taken, and behind each that is given back, another
//! CPU may come first. So what is done under one lock is told from what is done under the same lock twice.
//!
//! A CPU that waits for one lets the others run.

use super::traced::{Point, Relax, point};
use std::ops::{Deref, DerefMut};

/// A held lock of either kind.
pub(crate) struct Guard<G> {
    // Given back before the other is dropped.
    guard: G,
    behind: Behind,
}

/// The place behind a lock, by its address. Not in a CPU that a failure has ended.
struct Behind(usize);

impl Drop for Behind {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            point(Point::Other(self.0));
        }
    }
}

impl<G: Deref> Deref for Guard<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Guard<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

/// Takes a lock, with a place for others in front.
fn taken<'a, L, G>(lock: &'a L, take: impl FnOnce(&'a L) -> G) -> Guard<G> {
    let address = std::ptr::from_ref(lock).addr();
    point(Point::Other(address));
    Guard {
        guard: take(lock),
        behind: Behind(address),
    }
}

pub(crate) mod mutex {
    use super::{Guard, Relax, taken};
    use spin::mutex::spin as spinning;

    type Guarding<'a, T> = Guard<spinning::SpinMutexGuard<'a, T, Relax>>;

    pub(crate) struct SpinMutex<T>(spinning::SpinMutex<T, Relax>);

    impl<T> SpinMutex<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(spinning::SpinMutex::new(value))
        }

        pub(crate) fn lock(&self) -> Guarding<'_, T> {
            taken(&self.0, spinning::SpinMutex::lock)
        }

        pub(crate) fn try_lock(&self) -> Option<Guarding<'_, T>> {
            let Guard { guard, behind } = taken(&self.0, spinning::SpinMutex::try_lock);
            guard.map(|guard| Guard { guard, behind })
        }

        /// Where it is, for a run in which CPUs meet at it.
        pub(crate) fn address(&self) -> usize {
            std::ptr::from_ref(&self.0).addr()
        }
    }
}

pub(crate) mod rwlock {
    use super::{Guard, Point, Relax, point, taken};
    use spin::rwlock as spinning;

    pub(crate) struct RwLock<T>(spinning::RwLock<T, Relax>);

    pub(crate) type RwLockReadGuard<'a, T> = Guard<spinning::RwLockReadGuard<'a, T, Relax>>;
    type Upgradeable<'a, T> = Guard<spinning::RwLockUpgradableGuard<'a, T, Relax>>;
    type Writing<'a, T> = Guard<spinning::RwLockWriteGuard<'a, T, Relax>>;

    impl<T> RwLock<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(spinning::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            taken(&self.0, spinning::RwLock::read)
        }

        pub(crate) fn upgradeable_read(&self) -> Upgradeable<'_, T> {
            taken(&self.0, spinning::RwLock::upgradeable_read)
        }
    }

    impl<'a, T> Upgradeable<'a, T> {
        pub(crate) fn upgrade(self) -> Writing<'a, T> {
            point(Point::Other(self.behind.0));
            Guard {
                guard: self.guard.upgrade(),
                behind: self.behind,
            }
        }
    }
}
