//! Starts machines, talks to them over their serial line, and judges what they say.
//!
//! The pieces, from the outside in: a [`machine::Machine`] is a file of `qemu/`; a
//! [`target::Target`] is such a machine switched on (or a board on a port), with its
//! [`line::Line`] being read; scripts wait for text under three [`clocks`]; programs
//! reach the same line through [`relay`]. The serial tests, `demo`, `bench` and
//! `shell` are all written on these.
//!
//! A verdict never rests on one sign: a script passes when the text it awaited came,
//! no sign of a crash came before or after, the machine powered off with its own good
//! verdict, and QEMU's exit status agrees.

pub mod artifacts;
pub mod clocks;
pub mod devicetree;
pub mod filter;
pub mod guests;
pub mod host;
pub mod kernels;
pub mod line;
pub mod machine;
pub mod oracle;
pub mod qemu;
pub mod qmp;
pub mod relay;
pub mod rows;
pub mod script;
pub mod target;
pub mod terminal;
pub mod transcript;
pub mod work;
