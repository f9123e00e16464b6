//! Putting blocks back together once no log needs them small.
//!
//! Runs under the exclusive lock, a few tables a step, with no log on (invariant 7). A table whose 512
//! leaves are one block in small change (same attributes, same state, contiguous, aligned) is broken,
//! one invalidation covers all tables of the step, then the blocks are made and the tables freed: by
//! then no TLB and no walker, software or hardware, can reach them.

use crate::hardware::{Hardware, Table};
use crate::pte::{Kind, Pte};
use crate::slot::{Layout, Scope};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Level, Pa};

/// Tables looked at in a step.
const BATCH: usize = 8;
/// Entries passed over in a step.
const VISITS: usize = 512;

struct Candidate<'a> {
    entry: &'a AtomicU64,
    block: Pte,
    table: Pa,
}

impl<H: Hardware> Stage2<H> {
    /// Collapses tables under entries of `target`, from address `from` on. Returns where to go on, or
    /// `None` when the scope is through.
    pub(crate) fn collapse_step(
        &self,
        layout: &Layout,
        scope: Scope,
        target: Level,
        from: u64,
    ) -> Option<u64> {
        let below = target.below()?;
        let mut at = from;
        let mut batch: [Option<Candidate<'_>>; BATCH] = [const { None }; BATCH];
        let mut tables = 0;
        let mut next = None;
        for _ in 0..VISITS {
            let Some((slot, here)) = layout.next(scope, at) else {
                next = None;
                break;
            };
            let place = self.descend_to(here, target);
            if let (Kind::Table(pa), true) = (place.kind, place.level == target) {
                if tables == BATCH {
                    next = Some(here);
                    break;
                }
                // A block is of one slot, even where two touch and their memory too: the next log would
                // report all of it as the one's.
                if slot.leaf(here, target).is_some()
                    && let Some(block) = whole_block(self.hw.table(pa), target, below)
                    && let Some(place_for) = batch.get_mut(tables)
                {
                    *place_for = Some(Candidate {
                        entry: place.entry(),
                        block,
                        table: pa,
                    });
                }
                tables += 1;
            }
            // Past this entry; a wide empty one is passed in one go.
            at = (here & !(place.level.size() - 1)) + place.level.size();
            next = Some(at);
        }
        self.collapse_batch(&batch, target, below);
        next
    }

    fn collapse_batch(&self, batch: &[Option<Candidate<'_>>], target: Level, below: Level) {
        let chosen = || batch.iter().flatten();
        if chosen().next().is_none() {
            return;
        }
        for candidate in chosen() {
            let before = candidate.entry.swap(Pte::BUSY.0, Ordering::AcqRel);
            debug_assert_eq!(before, Pte::table(candidate.table).0);
        }
        // 512 leaves each, so by VMID rather than one by one.
        self.tlb().everything();
        for candidate in chosen() {
            let before = candidate.entry.swap(candidate.block.0, Ordering::AcqRel);
            debug_assert_eq!(before, Pte::BUSY.0);
        }
        self.hw.dsb_ishst();
        for candidate in chosen() {
            self.hw.free_tables(candidate.table, 1);
            self.counters.collapses.fetch_add(1, Ordering::Relaxed);
            self.count_tables(-1);
            self.count_leaves(below, -512);
            self.count_leaves(target, 1);
        }
    }
}

/// Returns the block that would mean the same as `table`, if there is one.
fn whole_block(table: &Table, target: Level, below: Level) -> Option<Pte> {
    let first = Pte(table.entry(0).load(Ordering::Relaxed));
    // A tracked leaf may be changed by the hardware at any time, and its dirtiness would be lost.
    if first.kind(below) != Kind::Leaf
        || first.is_tracked()
        || !first.output().is_aligned(target.size())
    {
        return None;
    }
    let mut expected = first.0;
    for entry in &table.0 {
        if entry.load(Ordering::Relaxed) != expected {
            return None;
        }
        expected += below.size();
    }
    Some(first.parent())
}
