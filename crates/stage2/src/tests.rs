//! Tests on the build machine. Names begin with the invariant they check, where there is one.

mod descriptors;
mod epochs;
mod invariants;
mod parallel;
mod quota;
mod races;
mod random;
mod review2014;
mod sequences;
mod sim;
mod simulated;
mod slots;
mod steps;
mod stress;
mod world;
