//! Replacing a block by a table of 512 smaller leaves, while the guest runs.
//!
//! The subtree is written in full and made visible (DSB ISHST) before anything points to it. Without
//! FEAT_BBM level 2 the block is broken first: busy marker, invalidation, then the table; a guest that
//! touches the block meanwhile faults, finds the marker and retries. With it, the table replaces the
//! block at once and the invalidation follows.
//!
//! Either way the exchange is a compare-and-swap against the value last seen, so success means that
//! value *was* what the hardware had written last, and it alone decides dirtiness (invariant 6).
//! Children of a tracked block are born WC and the caller reports the whole block when the returned
//! value says dirty: 512 WD children would be harvested one by one only to say the same.

use crate::hardware::{Hardware, Table};
use crate::pte::{Kind, Permission, Pte};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Engine, Level, Pa};

/// Why a block is still there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unsplit {
    /// No memory for the table. The block is as it was.
    NoTables,
    /// It was no block any more.
    Raced,
}

/// Attempts to exchange a block; the hardware can change one under us once a round.
const ATTEMPTS: usize = 8;

impl<H: Hardware> Stage2<H> {
    /// Splits the block `entry` of `level`, which covers `ipa`, one level down. Returns the block as
    /// it was at the moment it ceased to be reachable.
    ///
    /// Children of a writable block belong to the log of `engine`; read-only ones stay read-only.
    pub(crate) fn split(
        &self,
        entry: &AtomicU64,
        level: Level,
        ipa: u64,
        engine: Engine,
    ) -> Result<Pte, Unsplit> {
        let Some(below) = level.below() else {
            return Err(Unsplit::Raced);
        };
        let base = ipa & !(level.size() - 1);
        let pa = self.hw.alloc_unwritten().ok_or(Unsplit::NoTables)?;
        let children = self.table(pa);
        // All its lines at once: nobody has had them for a while, and stores wait for them one after the other.
        for group in children.0.as_chunks().0 {
            self.hw.prefetch(group);
        }
        let mut seen = Pte(entry.load(Ordering::Acquire));
        let mut built = None;
        for _ in 0..ATTEMPTS {
            if seen.kind(level) != Kind::Leaf {
                break;
            }
            // Which kind of children does not depend on W, so a write by the hardware in between
            // changes only what is reported, not what was built.
            let model = seen.with(state_of_children(seen, engine));
            if built != Some(model) {
                build(children, model, below);
                built = Some(model);
            }
            match self.exchange(entry, seen, pa, level, base) {
                Ok(()) => {
                    self.counters.splits.fetch_add(1, Ordering::Relaxed);
                    self.count_tables(1);
                    self.count_leaves(level, -1);
                    self.count_leaves(below, 512);
                    return Ok(seen);
                }
                Err(now) => seen = now,
            }
        }
        // Never linked, so nothing can reach it.
        self.free_tables(pa, 1);
        Err(Unsplit::Raced)
    }

    /// Puts the table in the place of `block`, or returns what is there instead.
    fn exchange(
        &self,
        entry: &AtomicU64,
        block: Pte,
        table: Pa,
        level: Level,
        base: u64,
    ) -> Result<(), Pte> {
        let table = Pte::table(table);
        if self.features.bbm2.is_present() {
            self.hw.dsb_ishst();
            swap_if(entry, block, table)?;
            self.tlb().leaf(base, level);
            return Ok(());
        }
        swap_if(entry, block, Pte::BUSY)?;
        self.tlb().leaf(base, level);
        // Nobody but us touches a busy entry. The DSB in the invalidation already made the children
        // visible; release says the same to software walkers.
        let before = entry.swap(table.0, Ordering::AcqRel);
        debug_assert_eq!(before, Pte::BUSY.0);
        self.hw.dsb_ishst();
        Ok(())
    }
}

fn swap_if(entry: &AtomicU64, from: Pte, to: Pte) -> Result<(), Pte> {
    entry
        .compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire)
        .map(|_| ())
        .map_err(Pte)
}

fn state_of_children(block: Pte, engine: Engine) -> Permission {
    if block.is_tracked() || block.is_untracked_writable() {
        Permission::Clean(engine)
    } else {
        Permission::ReadOnly
    }
}

fn build(children: &Table, model: Pte, below: Level) {
    let state = if model.is_tracked() {
        Permission::Clean(model.engine())
    } else {
        Permission::ReadOnly
    };
    // The children differ in their output address alone, which a block's alignment keeps from carrying. By
    // eights and unchecked: else the loop around the store would be half of a split.
    let mut child = model.child(below, 0, state).0;
    let (eights, _) = children.0.as_chunks::<8>();
    for eight in eights {
        for entry in eight {
            entry.store(child, Ordering::Relaxed);
            child = child.wrapping_add(below.size());
        }
    }
}
