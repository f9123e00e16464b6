//! The host's side of Tidemark, as a library: the tool itself, the tests and the demo use it.
//!
//! Purpose: reach a target over any byte stream ([`link`]), hold a session with it
//! ([`client`]), and turn what it says into bitmaps ([`bitmaps`]), pictures ([`heatmap`]) and
//! exact copies of guests ([`copy`]). [`commands`] is what the binary runs, one module each.
//!
//! Invariants: an epoch that was taken is committed only after what it stands for is safely
//! on this side, and is given back on every other way out. Data goes to standard output,
//! words to standard error. Every failure is an [`Error`] with an exit code, a short code for
//! programs and, where there is one, the way out.
//!
//! Concurrency: one reader and one writer thread for each link, joined by channels; all else
//! runs on the caller's thread.
#![forbid(unsafe_code)]

pub mod bitmaps;
pub mod client;
pub mod commands;
pub mod copy;
pub mod error;
pub mod heatmap;
pub mod image;
pub mod kernel;
pub mod link;
pub mod output;
pub mod terminal;
pub mod units;

pub use error::Error;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;
