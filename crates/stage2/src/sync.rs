//! Atomics and locks, from one place.
//!
//! In the image and for every user of this crate they are those of `core` and `spin`. In this crate's
//! own tests the 64-bit atomics, of which tables and bitmaps are made, tell an observer before and
//! after each access (`fake::traced`), and a CPU that spins on a lock lets the others run. So a
//! simulator sees every single access and can put another CPU in front of any of them.
//!
//! Under `cfg(loom)` they are loom's (`looms`), for the package in `loom/`.
//!
//! The modules have the names of the originals, so that an import differs in its first word only.

pub(crate) mod atomic {
    pub use core::sync::atomic::*;

    #[cfg(loom)]
    pub use crate::looms::AtomicU64;

    #[cfg(all(test, not(loom)))]
    pub use crate::fake::traced::AtomicU64;
}

/// Returns the ordinary atomic: simulated hardware looks at memory without being looked at.
#[cfg(all(any(test, feature = "fake"), not(loom)))]
pub(crate) fn raw(word: &atomic::AtomicU64) -> &core::sync::atomic::AtomicU64 {
    #[cfg(test)]
    let word = word.raw();
    word
}

#[cfg(loom)]
pub(crate) use crate::looms::{mutex, rwlock};

#[cfg(not(any(test, loom)))]
pub(crate) use spin::{mutex, rwlock};

#[cfg(all(test, not(loom)))]
pub(crate) mod mutex {
    pub(crate) type SpinMutex<T> = spin::mutex::SpinMutex<T, crate::fake::traced::Relax>;
}

#[cfg(all(test, not(loom)))]
pub(crate) mod rwlock {
    use crate::fake::traced::Relax;

    pub(crate) type RwLock<T> = spin::rwlock::RwLock<T, Relax>;
    pub(crate) type RwLockReadGuard<'a, T> = spin::rwlock::RwLockReadGuard<'a, T, Relax>;
}
