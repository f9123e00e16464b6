//! guests
#![no_std]
