//! (crate docs)
#![no_std]
