//! Who owns each 4 KiB frame of machine memory.
//!
//! One 64-bit word a frame says what it is used for and, for guests, by which VM, which life of that
//! VM (its *generation*) and at which guest frame number. Nothing is handed out, mapped or taken back
//! without changing that word, so a frame reachable by two owners cannot arise without a refused
//! transition naming both.
//!
//! Rules:
//!
//! * A transition names the owner it expects. It is a compare-and-swap: if the frame is somebody
//!   else's by now, it is refused and says whose.
//! * Only transitions of [`Kind::may_become`] exist. Guest memory never becomes free directly: it is
//!   [`Owner::Dying`] until it was scrubbed and no translation reaches it.
//! * A range moves as a whole or not at all. While it moves its frames are *in transit*, which nobody
//!   may take, so putting them back cannot fail.
//! * All-zero memory is a table of reserved frames: what was never released cannot be claimed.
//!
//! Concurrency: any CPU, any time, no lock. A successful transition releases what was written before
//! it and acquires what the previous owner wrote. Who changes a guest's page tables as well does so
//! under the VM's lock, which comes before this table.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod owner;
mod range;
mod table;
#[cfg(test)]
mod tests;

pub use owner::{Generation, Guest, Kind, Owner, Pa, VmId};
pub use range::{Range, without};
pub use table::{Census, Error, FRAME_SIZE, FrameTable};
