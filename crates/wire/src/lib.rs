//! What the image and the host tool say to each other, and nothing else.
//!
//! Purpose: one definition of every byte that crosses the line between EL2 and the
//! host, so that both ends are built from the same source. The picture of it all is
//! `docs/wire-format.md`.
//!
//! - [`frame`]: `00 | COBS(header, payload, CRC-32C) | 00`, mixed with plain text.
//! - [`message`]: requests, responses and events (postcard).
//! - [`bitmap`]: a piece of a dirty bitmap as `{empty, full, raw, rle}`.
//! - [`pages`]: guest memory as runs of equal words and literal words.
//! - [`bundle`]: the guests a boot loader hands over.
//! - [`granule`]: which page size a kernel in one is built for.
//!
//! Invariants: nothing here panics, loops without bound or reads out of bounds on any
//! input; frames, bitmaps and pages are encoded and decoded without allocation, since
//! EL2 does so on its polling path. Messages that carry lists need `alloc`.
//!
//! Concurrency: everything is a value or a function of its arguments; there is no
//! shared state.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bitmap;
pub mod bundle;
pub mod checksum;
pub mod frame;
pub mod granule;
pub mod message;
pub mod pages;

/// Version of the messages, exchanged in `Hello`.
pub const PROTOCOL: u16 = 4;

/// Bytes in a page, the unit of every bitmap.
pub const PAGE_SIZE: u64 = 4096;

/// Longest payload the host may send. Small, because a UART's receive FIFO is.
pub const REQUEST_PAYLOAD_MAX: usize = 256;

/// Longest payload the target may send, whatever the host offers in `Hello`.
pub const RESPONSE_PAYLOAD_MAX: usize = 16384;

/// Shortest maximum the host may offer in `Hello`; the target takes less for this. The
/// longest list of VMs fits, and all about a VM with all the slots it can have.
pub const RESPONSE_PAYLOAD_MIN: usize = 1024;

/// Most console bytes in one `ConsoleWrite`.
pub const CONSOLE_WRITE_MAX: usize = 128;

/// Shortest time that a session may ask to be silent for, in milliseconds, before what it holds is given back.
pub const PATIENCE_MS_MIN: u32 = 1_000;

/// Longest such time: a guest must not stand still much longer because a host died.
pub const PATIENCE_MS_MAX: u32 = 600_000;

/// What it is for a session that says nothing of it.
pub const PATIENCE_MS: u32 = 10_000;

/// Most pages one `BitmapRead` may ask for, which bounds EL2's work for it.
pub const BITMAP_READ_PAGES_MAX: u32 = 32768;

/// Shortest interval of a dirty quota, in milliseconds: a few time slices.
pub const QUOTA_INTERVAL_MS_MIN: u32 = 10;

/// Longest interval of a dirty quota, in milliseconds. A vCPU may wait for several of them.
pub const QUOTA_INTERVAL_MS_MAX: u32 = 1000;

/// Lowest number of a memory slot that can be added and deleted; those below are what a VM is started with.
pub const HOT_SLOT_FIRST: u16 = 3;

/// Highest number of such a slot. Fewer than would be possible, so that all about a VM fits the shortest answer.
pub const HOT_SLOT_LAST: u16 = 18;

/// What such a slot's base and size are multiples of: a block of stage 2.
pub const HOT_SLOT_UNIT: u64 = 2 << 20;

/// The largest such slot. Its bitmaps, 2 bits a page, are made in one step, and steps at EL2 are short.
pub const HOT_SLOT_BYTES_MAX: u64 = 512 << 20;

/// Most pages one `PageSums` may ask for.
pub const PAGE_SUMS_MAX: u32 = 2048;

/// Most bytes one `ReadMemory` may ask for, which bounds EL2's work for it.
pub const MEMORY_READ_MAX: u32 = 65536;
