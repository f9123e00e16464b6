//! Every order of small scenarios: run states by transitions, on two simulated CPUs, interrupted twice at most wherever one
//! looks at what the other may change.
//!
//! `TIDEMARK_INTERRUPTIONS` says how many interruptions (2 without it).

mod scenarios;
mod sequences;
mod world;
