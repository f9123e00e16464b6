//! Which vCPU a CPU runs, and how a VM starts, pauses and ends: the state machines, without a machine.
//!
//! A vCPU has an [`Entity`] and a VM a [`Lifecycle`]. The [`Scheduler`] changes them and returns what is to be done: a CPU that has
//! to take another vCPU ([`Decision`]), a transition that is complete ([`Completed`]). It calls nothing above; what it needs of
//! below is the [`Machine`] trait, and what it has to ask of a vCPU or a VM are [`Vcpu`] and [`Vm`].
//!
//! Nobody waits for a VM. A transition is requested by anyone at any time: the VM is held, its vCPUs are called out of their
//! guests, and whoever takes the last one off its CPU completes it.
//!
//! # Locks
//!
//! A VM's status, then a vCPU's run state, then a CPU's queue. What is told of a request is told after it was made, and a
//! request is taken before what it may be about is looked at. The tests try every order of small scenarios.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod entity;
mod lifecycle;
mod scheduler;
mod sync;
#[cfg(test)]
mod tests;

pub use entity::{Entity, Request, Requests, RunState, Taken};
pub use lifecycle::{Completed, Hold, Holds, Lifecycle, State, Status, Transition};
pub use scheduler::{Decision, Machine, Scheduler, Turn, Vcpu, Vm};

/// A count that never comes.
pub const NEVER: u64 = u64::MAX;
