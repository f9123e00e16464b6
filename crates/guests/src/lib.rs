//! What Tidemark's guests are made of.
//!
//! The binaries of this package are the programs Tidemark runs to test and to measure itself:
//!
//! | binary | runs at | what for |
//! |---|---|---|
//! | `oracle` | EL1, bare metal | writes pages it chooses by a seeded generator and says which: the judge of dirty tracking |
//!
//! The library has two halves. [`pattern`], [`report`], [`command`] and [`fdt`] are pure: the host's tests use them to
//! know what a guest must have written and to read what it says, and they are unit-tested on the build machine.
//! `rt` (EL1) is the run time of the binaries and exists on the bare-metal target only.

#![cfg_attr(not(test), no_std)]

pub mod command;
pub mod fdt;
pub mod pattern;
pub mod report;

#[cfg(all(target_arch = "aarch64", target_os = "none"))]
pub mod rt;
