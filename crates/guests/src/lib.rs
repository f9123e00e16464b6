//! What Tidemark's guests are made of.
//!
//! The binaries of this package are the programs Tidemark runs to test and to measure itself:
//!
//! | binary | runs at | what for |
//! |---|---|---|
//! | `oracle` | EL1, bare metal | writes pages it chooses by a seeded generator and says which: the judge of dirty tracking |
//! | `bench` | EL1, bare metal | measures exits, interrupts and tracked writes with the guest's own clock |
//! | `hostile` | EL1, bare metal | does what no guest may, and checks that it gets what the architecture has for it |
//! | `load` | EL0, under Linux | writes memory in a pattern and at a rate |
//! | `cntvct` | EL0, under Linux | prints the counter, to time a guest's boot by its own clock |
//!
//! The library has two halves. [`pattern`], [`report`], [`command`], [`workload`] and [`fdt`] are pure: the host's tests use them to
//! know what a guest must have written and to read what it says, and they are unit-tested on the build machine.
//! `rt` (EL1) and `el0` (EL0) are the run times of the binaries and exist on the bare-metal target only.

#![cfg_attr(not(test), no_std)]

pub mod command;
pub mod fdt;
pub mod pattern;
pub mod report;
pub mod workload;

#[cfg(all(target_arch = "aarch64", target_os = "none"))]
pub mod el0;
#[cfg(all(target_arch = "aarch64", target_os = "none"))]
pub mod rt;
