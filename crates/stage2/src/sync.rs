//! Atomics and locks, from one place: `core`'s and `spin`'s.
//!
//! The modules have the names of the originals, so that an import differs in its first word only.

pub(crate) mod atomic {
    pub use core::sync::atomic::*;
}

pub(crate) use spin::{mutex, rwlock};
