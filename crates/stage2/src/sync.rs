//! Atomics and locks, from one place.
//!
//! In the image and for every user of this crate they are those of `core` and `spin`. In this crate's
//! own tests the atomics tell an observer before each access, and those of 64 bits, of which tables and
//! bitmaps are made, after it too (`fake::traced`); so do the locks, before they are taken and after they are
//! given back (`fake::locks`), and a CPU that waits for one lets the others run. So a simulator sees every
//! single access and can put another CPU in front of any of them.
//!
//! Under `cfg(loom)` they are loom's (`looms`), for the package in `loom/`.
//!
//! The modules have the names of the originals, so that an import differs in its first word only.

pub(crate) mod atomic {
    pub use core::sync::atomic::*;

    #[cfg(loom)]
    pub use crate::looms::AtomicU64;

    #[cfg(all(test, not(loom)))]
    pub use crate::fake::traced::{AtomicBool, AtomicI64, AtomicU64};
}

/// Returns the ordinary atomic: simulated hardware looks at memory without being looked at.
#[cfg(all(any(test, feature = "fake"), not(loom)))]
pub(crate) fn raw(word: &atomic::AtomicU64) -> &core::sync::atomic::AtomicU64 {
    #[cfg(test)]
    let word = word.raw();
    word
}

/// An atomic's `fetch_update`, made of its load and its compare-and-swap, with room for others between them.
#[cfg(any(test, loom))]
pub(crate) fn fetch_update(
    load: impl FnOnce() -> u64,
    swap: impl Fn(u64, u64) -> Result<u64, u64>,
    mut change: impl FnMut(u64) -> Option<u64>,
) -> Result<u64, u64> {
    let mut seen = load();
    while let Some(new) = change(seen) {
        match swap(seen, new) {
            Ok(old) => return Ok(old),
            Err(now) => seen = now,
        }
    }
    Err(seen)
}

#[cfg(loom)]
pub(crate) use crate::looms::{mutex, rwlock};

#[cfg(not(any(test, loom)))]
pub(crate) use spin::{mutex, rwlock};

#[cfg(all(test, not(loom)))]
pub(crate) use crate::fake::locks::{mutex, rwlock};
