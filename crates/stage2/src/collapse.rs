//! Putting blocks back together once no log needs them small.
//!
//! Bounded steps under the control mutex, with no log on (invariant 7). A table whose 512 leaves are one
//! block in small change (same attributes, same state, contiguous, aligned) is broken, one invalidation
//! covers all tables of the step, and every walker that may have found one is waited for. Then, if the
//! table still says so, the block is made and the table freed: by then no TLB and no walker, software or
//! hardware, can reach it.

use crate::hardware::{Hardware, Leaves, Table};
use crate::pte::{Kind, Pte};
use crate::slot::Scope;
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::{Level, Pa};

/// Tables looked at in a step, entry by entry.
const BATCH: usize = 2;
/// Entries compared before a look whether all were as expected: a cache line's.
const LINE: usize = 8;
/// Entries passed over in a step.
const VISITS: usize = 128;

struct Candidate<'a> {
    entry: &'a AtomicU64,
    table: &'a Table,
    pa: Pa,
}

impl<H: Hardware> Stage2<H> {
    /// Collapses tables under entries of `target`, from address `from` on. Returns where to go on, or
    /// `None` when the scope is through.
    pub(crate) fn collapse_step(&self, scope: Scope, target: Level, from: u64) -> Option<u64> {
        if self.features.leaves == Leaves::Pages {
            return None;
        }
        let below = target.below()?;
        let mut at = from;
        let mut batch: [Option<Candidate<'_>>; BATCH] = [const { None }; BATCH];
        let mut tables = 0;
        let mut next = None;
        let layout = self.layout();
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
                let table = self.table(pa);
                // A block is of one slot, even where two touch and their memory too: the next log would
                // report all of it as the one's.
                if slot.leaf(here, target).is_some()
                    && whole_block(table, target, below).is_some()
                    && let Some(place_for) = batch.get_mut(tables)
                {
                    *place_for = Some(Candidate {
                        entry: place.entry(),
                        table,
                        pa,
                    });
                }
                tables += 1;
            }
            // Past this entry; a wide empty one is passed in one go.
            at = (here & !(place.level.size() - 1)) + place.level.size();
            next = Some(at);
        }
        // Readers are waited for, this one too.
        drop(layout);
        self.collapse_batch(batch, target, below);
        next
    }

    fn collapse_batch(
        &self,
        mut batch: [Option<Candidate<'_>>; BATCH],
        target: Level,
        below: Level,
    ) {
        if batch.iter().all(Option::is_none) {
            return;
        }
        for candidate in batch.iter().flatten() {
            // Only the holder of the control mutex changes an entry that points to a table.
            let before = candidate.entry.swap(Pte::BUSY.0, Ordering::AcqRel);
            debug_assert_eq!(before, Pte::table(candidate.pa).0);
        }
        // 512 leaves each, so by VMID rather than one by one.
        self.tlb().everything();
        self.layouts.wait_for_readers();
        for place in &mut batch {
            let Some(candidate) = place else { continue };
            let block = whole_block(candidate.table, target, below);
            let entry = block.unwrap_or(Pte::table(candidate.pa));
            let before = candidate.entry.swap(entry.0, Ordering::AcqRel);
            debug_assert_eq!(before, Pte::BUSY.0);
            if block.is_none() {
                // A fault that was on its way changed a leaf. The table is good as it is.
                *place = None;
            }
        }
        self.hw.dsb_ishst();
        for candidate in batch.iter().flatten() {
            self.free_tables(candidate.pa, 1);
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
    // Who was accessed when is not worth a table. Until the table is broken off the hardware may set
    // a flag, and nothing else.
    let mut expected = first.accessed().0;
    let (lines, _) = table.0.as_chunks::<LINE>();
    for line in lines {
        let mut differences = 0;
        for entry in line {
            differences |= Pte(entry.load(Ordering::Relaxed)).accessed().0 ^ expected;
            // Within the block, which does not wrap.
            expected = expected.wrapping_add(below.size());
        }
        if differences != 0 {
            return None;
        }
    }
    Some(first.accessed().parent())
}
