//! Atomics and locks, from one place: those of `core` and `spin`, and in this crate's own tests those in front of which other
//! CPUs may come first.

#[cfg(not(test))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};
#[cfg(not(test))]
pub(crate) use spin::{Mutex, MutexGuard};
#[cfg(test)]
pub(crate) use tidemark_orders::traced::{
    AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Mutex, MutexGuard,
};
