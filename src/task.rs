//! Work in bounded steps, and what each costs.

pub mod job;
pub mod meter;
