//! What one invalidation by address costs the memory around that address.
//!
//! To a CPU a block is one entry of its TLB, and an invalidation in it costs one walk. QEMU caches pages whatever the
//! leaf, and to find those of a block again it drops everything. A Linux that changes its own mappings page by page
//! then walks ten times as often, through both stages, and its boot takes a third longer. So it is measured, as
//! EL2's own regime shows it.

use super::PAGE;
use super::frames::Run;
use crate::arch::{barrier, timer, tlb};
use core::hint::black_box;
use core::sync::atomic::Ordering::Relaxed;
use tidemark_ownership::Owner;

/// Pages of a block that are read again after another was invalidated.
pub const NEIGHBOURS: usize = 255;
/// A block.
const PAGES: usize = 512;
/// Measurements, of which the shortest counts: an emulator has other things to do as well.
const MEASUREMENTS: usize = 8;
/// An emulator's walk takes some forty times as long as a load of its; that it is taken for each page is beyond this. A
/// core's takes some ten times as long, so one that drops blocks is not known by this, and keeps them.
const FAR: u64 = 16;

/// How long reading one word of each of [`NEIGHBOURS`] pages takes, in ticks.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    /// Once they are cached.
    pub before: u64,
    /// After an invalidation of one more page.
    pub after: u64,
}

impl Reach {
    /// Whether an invalidation of one page drops what was cached of its block.
    pub fn drops_the_block(self) -> bool {
        self.after / FAR > self.before
    }
}

/// Measures it on this CPU and a free block, which EL2's own tables map as one but where two ranges of memory meet: there
/// it looks as if all were well. `None` if there is none free.
pub fn measure() -> Option<Reach> {
    let run = Run::take(PAGES, Owner::Hypervisor)?;
    let (first, others) = run.words().split_at_checked(PAGE / 8)?;
    let read = || {
        let begun = timer::now();
        for page in others.chunks(PAGE / 8).take(NEIGHBOURS) {
            if let Some(word) = page.first() {
                black_box(word.load(Relaxed));
            }
        }
        barrier::dsb_nsh();
        timer::now() - begun
    };
    let mut reach = Reach {
        before: u64::MAX,
        after: u64::MAX,
    };
    for _ in 0..MEASUREMENTS {
        read();
        reach.before = reach.before.min(read());
        tlb::vale2(first.as_ptr() as u64 >> 12);
        barrier::dsb_nsh();
        barrier::isb();
        reach.after = reach.after.min(read());
    }
    Some(reach)
}
