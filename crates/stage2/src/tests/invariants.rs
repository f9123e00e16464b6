//! One test or more for each invariant that a single thread can check. (4 and the races of 1 and 2
//! are in `stress`; 13, 17 and 20 are the image's to keep.)

mod machine;

use super::world::*;
use crate::pte::{CLEAR_WRITE, Permission, Pte};
use crate::types::*;
use crate::{Error, FaultAccess, FaultKind, Features, Outcome, Support};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

const IPA: u64 = 0x4000_0000;

fn mapped(features: Features, pages: u64) -> World {
    let world = World::sized(features, 39, 600, 2);
    world.slot(0, IPA, pages, Access::ReadWrite, RAM);
    world.map_all(0);
    world
}

const GRANULARITIES: [Granularity; 3] =
    [Granularity::Page, Granularity::Adaptive, Granularity::Block];

#[test]
fn invariant_01_every_write_is_reported_by_every_engine_and_granularity() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let world = mapped(features, 3 * P2M + 5);
            world.start(engine, granularity);
            for round in 0..4u64 {
                let written = set([0, 63, 64, 511, 512, 1500 + round, 3 * P2M + 4]
                    .map(|page| IPA + page * PAGE_SIZE));
                for page in &written {
                    world.write((page >> 12) as usize % 2, *page);
                }
                let reported = world.harvest();
                assert!(
                    reported.is_superset(&written),
                    "{engine:?} {granularity:?} round {round}"
                );
                if granularity == Granularity::Page {
                    assert_eq!(reported, written, "{engine:?} round {round}");
                }
            }
            assert!(world.harvest().is_empty());
        }
    }
}

#[test]
fn invariant_02_the_returned_value_decides_not_an_earlier_look() {
    // The hardware makes the page dirty between a step's look at the table and the step itself: as
    // close as one thread gets is a page made dirty behind the engine's back.
    let world = mapped(dbm(), P2M);
    world.start(Engine::Dbm, Granularity::Page);
    let entry = world.entry(IPA + 7 * PAGE_SIZE);
    entry.fetch_or(!CLEAR_WRITE, Ordering::SeqCst);
    assert_eq!(world.harvest(), set([IPA + 7 * PAGE_SIZE]));
    assert!(world.pte(IPA + 7 * PAGE_SIZE).0.is_clean());
}

#[test]
fn invariant_02_a_fault_that_looked_too_long_ago_changes_nothing() {
    let world = mapped(dbm(), P2M);
    world.start(Engine::WriteProtect, Granularity::Adaptive);
    let layout = world.stage2.layout();
    let slot = layout.slot_at(Ipa::new(IPA)).unwrap();
    let late = fault(IPA, FaultAccess::Write, FaultKind::Permission);
    let place = world.stage2.descend(IPA);
    // Meanwhile another CPU splits the block.
    world
        .stage2
        .split(world.entry(IPA), Level::L2, IPA, Engine::WriteProtect)
        .unwrap();
    let table = place.entry().load(Ordering::SeqCst);
    let outcome = world.stage2.fault_on_leaf(&layout, slot, &late, &place);
    assert_eq!(
        (outcome, place.entry().load(Ordering::SeqCst)),
        (Outcome::Retry, table)
    );
    // And once more: a page that another CPU made dirty and the harvest clean again.
    let place = world.stage2.descend(IPA);
    place.entry().fetch_or(!CLEAR_WRITE, Ordering::SeqCst);
    assert_eq!(
        world.stage2.fault_on_leaf(&layout, slot, &late, &place),
        Outcome::Resume
    );
    assert_eq!(world.stage2.counters().spurious_faults, 1);
    assert!(!slot.dirty.knows(0), "whoever made it dirty notes it");
}

#[test]
fn invariant_03_a_stale_tlb_entry_cannot_outlive_the_harvest() {
    for (engine, features) in engines() {
        let world = mapped(features, P2M);
        world.start(engine, Granularity::Page);
        for _ in 0..3 {
            // The fake's TLB keeps the writable entry until it is told.
            world.write(0, IPA);
            assert_eq!(world.harvest(), set([IPA]));
        }
    }
}

#[test]
fn invariant_03_an_aborted_harvest_still_owes_its_invalidation() {
    for (engine, features) in engines() {
        let pages = 8 * P2M;
        let world = mapped(features, pages);
        world.start(engine, Granularity::Page);
        let many = (0..pages).map(|page| IPA + page * PAGE_SIZE);
        many.for_each(|ipa| world.touch(0, ipa));
        let epoch = world.new_epoch();
        // Some pages are cleaned, none invalidated.
        while world.pte(IPA).0.is_dirty() {
            assert!(matches!(
                world.stage2.take(epoch).unwrap(),
                Progress::More { .. }
            ));
        }
        world.stage2.abort(epoch).unwrap();
        assert_eq!(world.harvest().len() as u64, pages);
        // Written through whatever CPU 0 still holds.
        world.write(0, IPA);
        assert_eq!(world.harvest(), set([IPA]), "{engine:?}");
    }
}

#[test]
fn invariant_05_no_translation_outlives_a_deleted_slot() {
    for (_, features) in engines() {
        for pa in [RAM, RAM + PAGE_SIZE] {
            let world = World::sized(features, 39, 64, 2);
            world.slot(0, IPA, P2M, Access::ReadWrite, pa);
            world.write(0, IPA);
            world.read(1, IPA + PAGE_SIZE);
            world.delete(0);
            for pe in 0..2 {
                assert_eq!(
                    world.access(pe, IPA, FaultAccess::Read),
                    Err(Outcome::NotMemory)
                );
                assert_eq!(
                    world.access(pe, IPA + PAGE_SIZE, FaultAccess::Write),
                    Err(Outcome::NotMemory)
                );
            }
            assert_eq!(world.machine.tables_in_use(), 1, "only the root is left");
        }
    }
}

#[test]
fn invariant_05_a_slot_that_changes_access_keeps_its_dirty_pages() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let world = mapped(features, 30 * P2M + 3);
            let change = |access| finish(|| world.stage2.set_access(SlotId(0), access)).unwrap();
            world.start(engine, granularity);
            let written =
                set([0, 5, P2M, 29 * P2M, 30 * P2M + 2].map(|page| IPA + page * PAGE_SIZE));
            written.iter().for_each(|ipa| world.touch(0, *ipa));
            change(Access::ReadOnly);
            for ipa in &written {
                assert_eq!(
                    world.access(0, *ipa, FaultAccess::Write),
                    Err(Outcome::ReadOnly)
                );
                world.read(1, *ipa);
            }
            let reported = world.harvest();
            assert!(reported.is_superset(&written));
            if granularity == Granularity::Page {
                assert_eq!(reported, written);
            }
            assert!(world.harvest().is_empty());
            change(Access::ReadWrite);
            world.write(1, IPA + 5 * PAGE_SIZE);
            assert!(world.harvest().contains(&(IPA + 5 * PAGE_SIZE)));
            world.stop();
            assert!(
                world
                    .leaves()
                    .iter()
                    .all(|(_, _, pte)| pte.is_untracked_writable())
            );
        }
    }
}

#[test]
fn invariant_06_split_inherits_dirty_from_break() {
    for bbm2 in [Support::Absent, Support::Present] {
        let world = mapped(Features { bbm2, ..dbm() }, 2 * P2M);
        world.start(Engine::Dbm, Granularity::Adaptive);
        world.write(0, IPA + 9 * PAGE_SIZE);
        assert_eq!(world.pte(IPA).1, Level::L2);
        assert!(world.pte(IPA).0.is_dirty());
        let block = world.pte(IPA).0;
        let old = world
            .stage2
            .split(world.entry(IPA), Level::L2, IPA, Engine::Dbm)
            .unwrap();
        assert_eq!(old, block, "the caller learns that the block was dirty");
        for page in 0..P2M {
            let (pte, level) = world.pte(IPA + page * PAGE_SIZE);
            assert_eq!(
                (pte, level),
                (
                    old.child(Level::L3, page as usize, Permission::Clean(Engine::Dbm)),
                    Level::L3
                )
            );
        }
    }
}

#[test]
fn invariant_06_a_dirty_block_is_reported_whole_and_split_for_the_next_round() {
    for (engine, features) in engines() {
        let world = mapped(features, 2 * P2M);
        world.start(engine, Granularity::Adaptive);
        assert_eq!(world.stage2.mappings().blocks_2m, 2);
        world.write(0, IPA + 9 * PAGE_SIZE);
        assert_eq!(world.harvest(), span(IPA, 2 * MIB));
        assert_eq!(
            (
                world.stage2.mappings().blocks_2m,
                world.stage2.mappings().pages_4k
            ),
            (1, P2M)
        );
        world.write(0, IPA + 9 * PAGE_SIZE);
        assert_eq!(world.harvest(), set([IPA + 9 * PAGE_SIZE]));
        assert_eq!(world.stage2.counters().splits, 1);
        assert!(world.harvest().is_empty());
    }
}

#[test]
fn invariant_06_without_memory_a_block_stays_tracked_and_is_reported_whole() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let world = mapped(features, 2 * P2M);
            let tables = world.machine.tables_in_use();
            world.machine.limit_tables(0);
            world.start(engine, granularity);
            for _ in 0..3 {
                world.write(0, IPA + 2 * MIB);
                assert_eq!(
                    world.harvest(),
                    span(IPA + 2 * MIB, 2 * MIB),
                    "{engine:?} {granularity:?}"
                );
                assert!(world.harvest().is_empty());
            }
            assert_eq!(world.machine.tables_in_use(), tables);
            world.stop();
            assert_eq!(world.stage2.mappings().blocks_2m, 2);
        }
    }
}

#[test]
fn invariant_06_a_guest_that_meets_a_break_retries() {
    let world = mapped(Features::BASELINE, P2M);
    world.entry(IPA).swap(Pte::BUSY.0, Ordering::SeqCst);
    for kind in [FaultKind::Translation, FaultKind::Permission] {
        assert_eq!(
            world
                .stage2
                .handle_fault(fault(IPA, FaultAccess::Write, kind)),
            Outcome::Retry
        );
    }
    assert_eq!(world.entry(IPA).load(Ordering::SeqCst), Pte::BUSY.0);
}

#[test]
fn invariant_07_stopping_puts_every_block_back() {
    for (engine, features) in engines() {
        // 1 GiB, two blocks and a tail of pages; and a second slot that shares the tail's 2 MiB.
        let world = World::sized(features, 39, 600, 2);
        world.slot(0, IPA, P1G + 2 * P2M + 10, Access::ReadWrite, RAM);
        world.slot(
            1,
            IPA + GIB + 4 * MIB + 10 * PAGE_SIZE,
            20,
            Access::ReadOnly,
            RAM + 4 * GIB,
        );
        world.map_all(0);
        world.map_all(1);
        let (before, tables) = (world.leaves(), world.machine.tables_in_use());
        assert_eq!(
            before
                .iter()
                .map(|leaf| leaf.1)
                .collect::<std::collections::BTreeSet<_>>()
                .len(),
            3
        );
        for granularity in GRANULARITIES {
            world.start(engine, granularity);
            for page in [0, P2M, P1G - 1, P1G, P1G + 2 * P2M + 9] {
                world.write(0, IPA + page * PAGE_SIZE);
            }
            world.harvest();
            world.write(1, IPA + 77 * PAGE_SIZE);
            world.harvest();
            if granularity == Granularity::Page {
                assert_eq!(world.stage2.mappings().blocks_2m, 0);
            }
            world.stop();
            assert_eq!(world.leaves(), before, "{engine:?} {granularity:?}");
            assert_eq!(world.machine.tables_in_use(), tables);
        }
    }
}

#[test]
fn invariant_07_what_is_no_block_in_small_change_is_not_collapsed() {
    // Unaligned memory, and a hole in the middle of the mapping.
    let world = World::sized(Features::BASELINE, 39, 64, 2);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM + PAGE_SIZE);
    world.slot(1, IPA + 2 * MIB, 100, Access::ReadWrite, RAM + 8 * MIB);
    world.slot(
        2,
        IPA + 2 * MIB + 100 * PAGE_SIZE,
        412,
        Access::ReadOnly,
        RAM + 8 * MIB + 100 * PAGE_SIZE,
    );
    (0..3).for_each(|slot| world.map_all(slot));
    let before = world.leaves();
    world.start(Engine::WriteProtect, Granularity::Page);
    world.write(0, IPA);
    world.harvest();
    world.stop();
    assert_eq!(world.leaves(), before);
    assert_eq!(world.stage2.counters().collapses, 0);
}

#[test]
fn invariant_07_one_leaf_that_differs_keeps_the_table() {
    for odd in [0, 1, P2M - 1] {
        let world = mapped(Features::BASELINE, P2M);
        world.start(Engine::WriteProtect, Granularity::Page);
        world
            .entry(IPA + odd * PAGE_SIZE)
            .fetch_or(0b10 << 53, Ordering::SeqCst);
        world.stop();
        assert_eq!(world.stage2.mappings().pages_4k, P2M, "leaf {odd}");
    }
}

#[test]
fn invariant_08_read_only_memory_never_becomes_writable() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let world = World::sized(features, 39, 600, 2);
            world.slot(0, IPA, 2 * P2M + 3, Access::ReadOnly, RAM);
            world.slot(1, IPA + GIB, P2M, Access::ReadWrite, RAM + GIB);
            let check = |when| {
                for (ipa, level, pte) in world.leaves() {
                    if ipa < IPA + GIB {
                        let alone = Pte::leaf(
                            level,
                            pte.output(),
                            world.stage2.shape.attr,
                            Permission::ReadOnly,
                        );
                        assert_eq!(pte, alone, "{when} at {ipa:#x}");
                    }
                }
                for page in [0, 600, 2 * P2M + 2] {
                    let ipa = IPA + page * PAGE_SIZE;
                    assert_eq!(
                        world.access(0, ipa, FaultAccess::Write),
                        Err(Outcome::ReadOnly),
                        "{when}"
                    );
                    world.read(0, ipa);
                }
            };
            check("before mapping");
            world.map_all(0);
            check("mapped");
            world.start(engine, granularity);
            check("logging");
            world.el2_write(IPA);
            assert_eq!(
                world.harvest(),
                set([IPA]),
                "EL2 may write to it, and says so"
            );
            check("harvested");
            if engine == Engine::Dbm {
                world.stage2.set_engine(Engine::WriteProtect).unwrap();
                world.el2_write(IPA + 2 * MIB);
                world.harvest();
                check("switched");
            }
            world.stop();
            check("stopped");
        }
    }
}

#[test]
fn invariant_08_a_read_only_leaf_in_writable_memory_stays_one() {
    // Nothing here makes such a leaf yet; sharing pages between VMs will.
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let world = World::sized(features, 39, 64, 2);
            world.slot(0, IPA, 3 * P2M + 9, Access::ReadWrite, RAM);
            world.map_all(0);
            let (block, page) = (IPA + 2 * MIB, IPA + 6 * MIB + 3 * PAGE_SIZE);
            for ipa in [block, page] {
                let pte = world.pte(ipa).0.with(Permission::ReadOnly);
                world.entry(ipa).swap(pte.0, Ordering::SeqCst);
            }
            let check = |when| {
                for ipa in [block, block + 9 * PAGE_SIZE, page] {
                    let pte = world.pte(ipa).0;
                    let read_only = !pte.is_writable() && !pte.is_tracked();
                    assert!(read_only, "{when}: {engine:?} {granularity:?} {ipa:#x}");
                    let outcome = world.access(0, ipa, FaultAccess::Write);
                    assert_eq!(outcome, Err(Outcome::ReadOnly), "{when}");
                }
            };
            world.start(engine, granularity);
            check("started");
            for ipa in [block, page] {
                world.stage2.mark_dirty(Ipa::new(ipa), 1).unwrap();
            }
            world.write(0, page + PAGE_SIZE);
            assert!(world.harvest().contains(&page));
            check("harvested");
            world.stage2.set_engine(Engine::WriteProtect).unwrap();
            world.harvest();
            check("switched");
            world.stop();
            check("stopped");
        }
    }
}

#[test]
fn invariant_08_an_untracked_leaf_is_not_the_harvests() {
    for (engine, features) in engines() {
        let world = mapped(features, P2M);
        world.start(engine, Granularity::Page);
        let ipa = IPA + 3 * PAGE_SIZE;
        let plain = world.pte(ipa).0.with(Permission::Untracked);
        world.entry(ipa).swap(plain.0, Ordering::SeqCst);
        world.el2_write(ipa);
        assert_eq!(world.harvest(), set([ipa]));
        assert_eq!(world.pte(ipa).0, plain, "{engine:?}: RW must not become NW");
    }
}

#[test]
fn invariant_15_a_harvest_waits_for_a_busy_entry_instead_of_passing_it() {
    for (engine, features) in engines() {
        let world = mapped(features, 4 * P2M);
        world.start(engine, Granularity::Adaptive);
        world.write(0, IPA + 2 * MIB);
        world.write(0, IPA + 6 * MIB);
        // Another CPU is in the middle of a split of the second block.
        let entry = world.entry(IPA + 2 * MIB);
        let block = entry.swap(Pte::BUSY.0, Ordering::SeqCst);
        let epoch = world.new_epoch();
        for _ in 0..50 {
            assert!(matches!(
                world.stage2.take(epoch).unwrap(),
                Progress::More { .. }
            ));
        }
        entry.swap(block, Ordering::SeqCst);
        finish(|| world.stage2.take(epoch)).unwrap();
        let mut expected = span(IPA + 2 * MIB, 2 * MIB);
        expected.extend(span(IPA + 6 * MIB, 2 * MIB));
        assert_eq!(world.read_epoch(epoch), expected, "{engine:?}");
    }
}

#[test]
fn invariant_15_starting_and_stopping_wait_for_a_busy_entry_too() {
    let world = mapped(dbm(), 2 * P2M);
    let entry = world.entry(IPA);
    let block = entry.swap(Pte::BUSY.0, Ordering::SeqCst);
    for _ in 0..50 {
        let progress = world
            .stage2
            .start_log(Engine::Dbm, Granularity::Block)
            .unwrap();
        assert!(matches!(progress, Progress::More { .. }));
    }
    entry.swap(block, Ordering::SeqCst);
    world.start(Engine::Dbm, Granularity::Block);
    assert!(world.leaves().iter().all(|(_, _, pte)| pte.is_clean()));
    let block = entry.swap(Pte::BUSY.0, Ordering::SeqCst);
    for _ in 0..50 {
        assert!(matches!(
            world.stage2.stop_log().unwrap(),
            Progress::More { .. }
        ));
    }
    entry.swap(block, Ordering::SeqCst);
    world.stop();
    assert!(
        world
            .leaves()
            .iter()
            .all(|(_, _, pte)| pte.is_untracked_writable())
    );
}

#[test]
fn invariant_15_every_alignment_is_covered_exactly() {
    for (engine, features) in engines() {
        for (lead, pages) in [
            (0, 1),
            (1, 1),
            (511, 2),
            (63, 66),
            (510, P2M + 4),
            (5, 3 * P2M - 5),
            (256, P2M),
        ] {
            let world = World::sized(features, 39, 64, 2);
            let base = IPA + lead * PAGE_SIZE;
            // Neighbours on both sides, which the harvest of this slot must leave alone.
            world.slot(0, base, pages, Access::ReadWrite, RAM + lead * PAGE_SIZE);
            world.slot(
                1,
                IPA - 4 * PAGE_SIZE,
                4 + lead,
                Access::ReadWrite,
                RAM + 64 * MIB,
            );
            world.slot(
                2,
                base + pages * PAGE_SIZE,
                100,
                Access::ReadWrite,
                RAM + 128 * MIB,
            );
            (0..3).for_each(|slot| world.map_all(slot));
            finish(|| {
                world
                    .stage2
                    .start_slot_log(SlotId(0), engine, Granularity::Page)
            })
            .unwrap();
            for page in [base, base + (pages - 1) * PAGE_SIZE] {
                world.write(0, page);
            }
            for page in [base - PAGE_SIZE, base + pages * PAGE_SIZE] {
                world.write(0, page);
            }
            assert_eq!(
                world.harvest(),
                set([base, base + (pages - 1) * PAGE_SIZE]),
                "{engine:?} {lead} {pages}"
            );
            (0..pages).for_each(|page| world.touch(0, base + page * PAGE_SIZE));
            assert_eq!(
                world.harvest(),
                span(base, pages * PAGE_SIZE),
                "{engine:?} {lead} {pages}"
            );
            world.stop();
        }
    }
}

#[test]
fn invariant_18_every_write_by_el2_is_marked_whatever_the_engine() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let world = World::sized(features, 39, 64, 2);
            world.slot(0, IPA, 2 * P2M, Access::ReadWrite, RAM);
            world.start(engine, granularity);
            // Unmapped, then mapped, then clean again.
            for _ in 0..2 {
                for page in [0, 1, 511, 512, 1023] {
                    world.el2_write(IPA + page * PAGE_SIZE);
                }
                let marked = set([0, 1, 511, 512, 1023].map(|page| IPA + page * PAGE_SIZE));
                assert_eq!(world.harvest(), marked, "{engine:?} {granularity:?}");
                world.map_all(0);
            }
            world.stage2.mark_dirty(Ipa::new(IPA + 4095), 2).unwrap();
            assert_eq!(world.harvest(), set([IPA, IPA + PAGE_SIZE]));
        }
    }
}

/// Sixty-four pages that EL2 noted, of which the guest had written one: its leaf alone is to be invalidated, and is.
#[test]
fn invariant_03_of_pages_noted_in_a_row_the_dirty_one_is_invalidated() {
    for (engine, features) in engines() {
        for dirty in [0, 3, 62, 63] {
            let world = World::sized(features, 39, 64, 2);
            // The memory is one page off, so only pages fit.
            world.slot(0, IPA, P2M, Access::ReadWrite, RAM + PAGE_SIZE);
            world.map_all(0);
            world.start(engine, Granularity::Page);
            world.harvest();
            let page = IPA + dirty * PAGE_SIZE;
            world.write(0, page);
            let len = 64 * PAGE_SIZE;
            world.stage2.mark_dirty(Ipa::new(IPA), len).unwrap();
            assert_eq!(world.harvest(), span(IPA, len), "{engine:?} {dirty}");
            // Through a translation that is still writable this would be seen by nobody.
            world.write(0, page);
            assert_eq!(world.harvest(), set([page]), "{engine:?} {dirty}");
        }
    }
}

#[test]
fn invariant_18_marking_takes_any_range_and_names_what_is_no_memory() {
    let world = World::sized(Features::BASELINE, 39, 64, 2);
    world.slot(0, IPA, 10, Access::ReadWrite, RAM);
    world.slot(1, IPA + 20 * PAGE_SIZE, 10, Access::ReadWrite, RAM + MIB);
    world.start(Engine::WriteProtect, Granularity::Page);
    let mark = |ipa, len| world.stage2.mark_dirty(Ipa::new(ipa), len);
    assert_eq!(mark(IPA, 0), Ok(()));
    assert_eq!(mark(0, 5), Err(Error::NotMemory(Ipa::new(0))));
    assert_eq!(mark(u64::MAX, 2), Err(Error::NotMemory(Ipa::new(u64::MAX))));
    assert!(world.harvest().is_empty());
    assert_eq!(
        mark(IPA, u64::MAX - IPA),
        Err(Error::NotMemory(Ipa::new(IPA + 10 * PAGE_SIZE)))
    );
    let mut all = span(IPA, 10 * PAGE_SIZE);
    all.extend(span(IPA + 20 * PAGE_SIZE, 10 * PAGE_SIZE));
    assert_eq!(world.harvest(), all);
    assert_eq!(mark(IPA - 1, 2), Err(Error::NotMemory(Ipa::new(IPA - 1))));
    assert_eq!(world.harvest(), set([IPA]));
}

#[test]
fn invariant_19_bits_past_the_end_are_never_set() {
    use crate::dirty::Dirty;
    let dirty = Dirty::new(70).unwrap();
    let add = |page, mask| dirty.added_run(page, 64, dirty.add(page, mask));
    add(64, u64::MAX);
    add(69, u64::MAX);
    dirty.mark_run(66, u64::MAX);
    dirty.mark_run(70, 1);
    dirty.add_run(68, 1000);
    dirty.begin_harvest();
    let mut taken = 0;
    dirty.take_live(0, u64::MAX, |moved| {
        assert!(moved.first + u64::from(moved.pages.ilog2()) < 70);
        taken += moved.count;
        ControlFlow::Continue(())
    });
    assert_eq!(taken, 4);
    let words: std::vec::Vec<_> = dirty
        .in_flight()
        .iter()
        .map(|word| word.load(Ordering::SeqCst))
        .collect();
    assert_eq!(
        (words, dirty.in_flight_pages()),
        (std::vec![0, 0b11_1111], 6)
    );
    add(3, 1 << 63 | 1);
    let words: std::vec::Vec<_> = dirty
        .in_flight()
        .iter()
        .map(|word| word.load(Ordering::SeqCst))
        .collect();
    assert_eq!(
        (words, dirty.in_flight_pages()),
        (std::vec![1 << 3, 0b11_1111], 7),
        "across a word"
    );
}

#[test]
fn invariant_21_both_engines_report_the_same_pages_on_the_same_run() {
    let run = |engine, features, granularity| {
        let world = mapped(features, 5 * P2M + 7);
        world.start(engine, granularity);
        let mut state = 12345u64;
        let rounds = (0..6).map(|_| {
            for _ in 0..200 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let ipa = IPA + (state >> 33) % (5 * P2M + 7) * PAGE_SIZE;
                if state >> 32 & 1 == 0 {
                    world.write(0, ipa)
                } else {
                    world.read(1, ipa)
                };
            }
            world.harvest()
        });
        rounds.collect::<std::vec::Vec<_>>()
    };
    for granularity in GRANULARITIES {
        let reference = run(Engine::WriteProtect, Features::BASELINE, granularity);
        for (engine, features) in engines() {
            assert_eq!(
                run(engine, features, granularity),
                reference,
                "{engine:?} {granularity:?}"
            );
        }
    }
}
