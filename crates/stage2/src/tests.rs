//! Tests on the build machine. Names begin with the invariant they check, where there is one.

mod access;
mod age;
mod bitmaps;
mod clear;
mod coherence;
mod completion;
mod descriptors;
mod engine;
mod epochs;
mod interleavings;
mod invariants;
mod leaves;
mod memory;
mod parallel;
mod quota;
mod races;
mod random;
mod review2014;
mod sequences;
mod settled;
mod sim;
mod simulated;
mod slots;
mod steps;
mod stress;
mod vmids;
mod world;

/// A number from the environment, decimal or with 0x.
fn from_env(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    let value = value.trim();
    let parsed = match value.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => value.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{name}={value} is no number")))
}
