//! Simulated runs about tables: what is freed, split, put together and walked, and what an invalidation names.

use super::*;

#[test]
fn invariant_05_a_slot_that_goes_or_changes_is_not_reached_and_loses_nothing() {
    for (engine, features) in engines() {
        for setup in setups(features, 25) {
            let sim = vm(setup);
            let s = &sim;
            let other = Place {
                id: 1,
                ipa: IPA + PAGES * PAGE_SIZE,
                pages: 70,
                access: Access::ReadWrite,
                pa: RAM + 64 * MIB + PAGE_SIZE,
            };
            s.alone(|s| {
                s.add(other);
                s.start(engine, Granularity::Adaptive);
            });
            let manager = Box::new(|| {
                s.set_access(0, Access::ReadOnly);
                s.harvest();
                s.delete(1);
                s.set_access(0, Access::ReadWrite);
                // The memory goes to other addresses: whoever still reaches it by the old ones is caught.
                s.add(Place {
                    pa: RAM + 128 * MIB,
                    ..other
                });
                s.harvest();
            });
            let guest = || {
                Box::new(|| {
                    for _ in 0..40 {
                        let near = page(PAGES - 8 + s.roll(70));
                        let hot = page(HOT[s.roll(8) as usize]);
                        let ipa = if s.roll(2) == 0 { near } else { hot };
                        let access = [FaultAccess::Write, FaultAccess::Read][s.roll(2) as usize];
                        let _ = s.guest(ipa, access);
                        s.breathe();
                    }
                })
            };
            s.run(vec![manager, guest(), guest()]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_05_a_table_that_is_still_linked_or_remembered_does_not_go_back() {
    use crate::hardware::{Hardware, TablePages};
    let tables = || {
        let sim = vm(Setup::new(Features::BASELINE, 1));
        sim.alone(|sim| {
            sim.start(Engine::WriteProtect, Granularity::Page);
            sim.read(page(3));
        });
        let table = Pte(sim.world.parent(page(3)).load(Ordering::SeqCst)).output();
        // What comes of it cannot be put away.
        std::mem::forget(Arc::clone(&sim));
        (sim, table)
    };
    let (sim, table) = tables();
    let why = refused(|| sim.alone(|sim| sim.world.machine.free_tables(TablePages::new(table, 1))));
    assert!(why.contains("while it is linked"), "{why}");
    let (sim, table) = tables();
    let why = refused(|| {
        sim.alone(|sim| {
            let machine = &sim.world.machine;
            sim.world
                .parent(page(3))
                .swap(Pte::EMPTY.0, Ordering::SeqCst);
            machine.dsb_ishst();
            // CPU 0 walked through it, and no invalidation said that it must not again.
            machine.free_tables(TablePages::new(table, 1));
        });
    });
    assert!(why.contains("may walk through it"), "{why}");
}

/// The value that the exchange returned decides: the hardware may have made the block dirty since it
/// was looked at.
#[test]
fn invariant_06_a_write_at_any_moment_of_a_split_is_known() {
    for bbm2 in [Support::Absent, Support::Present] {
        let mut seen = [0; 2];
        for seed in seeds_from(80) {
            let features = Features { bbm2, ..dbm() };
            let sim = vm(Setup {
                every: Some([3, 40, 150, 400][seed as usize % 4]),
                ..Setup::new(features, seed)
            });
            let s = &sim;
            s.alone(|s| {
                s.start(Engine::Dbm, Granularity::Block);
                s.read(page(9));
            });
            let splitter = Box::new(|| {
                s.op("split", |stage2| {
                    let entry = s.world.entry(page(9));
                    let old = stage2.split(entry, Level::L2, page(9), Engine::Dbm);
                    let old = old.unwrap();
                    if old.is_dirty() {
                        stage2.mark_dirty(Ipa::new(IPA), 2 * MIB).unwrap();
                    }
                    seen[usize::from(old.is_dirty())] += 1;
                });
            });
            let writer = |number| {
                Box::new(move || {
                    (0..s.roll(20)).for_each(|_| s.read(page(number)));
                    s.write(page(number));
                })
            };
            s.run(vec![splitter, writer(9), writer(400)]);
            sim.conclude();
        }
        assert!(seen[0] > 0 && seen[1] > 0, "both must happen: {seen:?}");
    }
}

/// A dirty block that is split is reported whole, and its pages one by one from then on.
#[test]
fn invariant_06_what_a_block_knew_is_reported_when_it_is_split() {
    for (engine, features) in engines() {
        let mut split = 0;
        for setup in setups(features, 20) {
            let sim = vm(setup);
            let s = &sim;
            s.alone(|s| s.map_ahead(0).unwrap());
            let manager = Box::new(|| {
                s.start(engine, Granularity::Adaptive);
                (0..4).for_each(|_| drop(s.harvest()));
            });
            s.run(vec![manager, guest(s, 30), guest(s, 30)]);
            s.alone(|s| drop(s.harvest()));
            let left = s.world.leaves();
            let block = |(_, level, pte): &(u64, Level, Pte)| *level < Level::L3 && pte.is_dirty();
            assert!(!left.iter().any(block), "a dirty block stayed");
            split += s.world.stage2.counters().splits;
            sim.conclude();
        }
        assert!(split > 20, "{split}");
    }
}

#[test]
fn invariant_06_a_size_that_changes_without_a_break_ends_the_run() {
    let sim = vm(Setup::new(Features::BASELINE, 1));
    sim.alone(|sim| sim.read(page(3)));
    // An equivalent table in the place of the block, at once: good under FEAT_BBM level 2 only.
    let why = refused(|| {
        sim.alone(|sim| {
            use crate::hardware::Hardware;
            let machine = &sim.world.machine;
            let block = Pte(sim.world.entry(page(3)).load(Ordering::SeqCst));
            let table = machine.alloc_tables(1).unwrap();
            for (index, entry) in machine.table_of(table).entries().iter().enumerate() {
                let child = block.child(Level::L3, index, Permission::Untracked);
                entry.store(child.0, Ordering::SeqCst);
            }
            machine.dsb_ishst();
            let entry = sim.world.entry(page(3));
            entry.swap(Pte::table(table).0, Ordering::SeqCst);
        });
    });
    assert!(why.contains("without a break"), "{why}");
    // Unwatched, the TLBs notice.
    let world = World::sized(Features::BASELINE, 39, 8, 1);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.read(0, IPA);
    let why = refused(|| {
        use crate::hardware::Hardware;
        let block = world.pte(IPA).0;
        let table = world.machine.alloc_tables(1).unwrap();
        for (index, entry) in world.machine.table_of(table).entries().iter().enumerate() {
            let child = block.child(Level::L3, index, Permission::Untracked);
            entry.store(child.0, Ordering::SeqCst);
        }
        world.entry(IPA).swap(Pte::table(table).0, Ordering::SeqCst);
        world.read(0, IPA);
    });
    assert!(why.contains("TLB conflict"), "{why}");
}

/// A table in the place of a block that is gone from the entry and not from a TLB: its pages must be the block's,
/// even under FEAT_BBM level 2, which lets them live side by side.
#[test]
fn invariant_06_a_table_over_what_a_tlb_holds_ends_the_run_unless_it_is_the_same() {
    use crate::hardware::Hardware;
    let link = |features: Features, other: usize| {
        let sim = vm(Setup::new(features, 1));
        sim.alone(|sim| {
            sim.read(page(3));
            let machine = &sim.world.machine;
            let entry = sim.world.entry(page(3));
            let block = Pte(entry.swap(Pte::EMPTY.0, Ordering::SeqCst));
            let table = machine.alloc_tables(1).unwrap();
            for (index, entry) in machine.table_of(table).entries().iter().enumerate() {
                let child = block.child(Level::L3, index ^ other, Permission::Untracked);
                entry.store(child.0, Ordering::SeqCst);
            }
            machine.dsb_ishst();
            entry.swap(Pte::table(table).0, Ordering::SeqCst);
        });
    };
    let bbm2 = Features {
        bbm2: Support::Present,
        ..Features::BASELINE
    };
    link(bbm2, 0);
    for (features, other) in [(bbm2, 1), (Features::BASELINE, 0)] {
        let why = refused(|| link(features, other));
        assert!(why.contains("cached for"), "{why}");
    }
}

/// Blocks come back under guests that run, and what is written then is known to the next log.
#[test]
fn invariant_07_blocks_come_back_while_guests_write() {
    for (engine, features) in engines() {
        for setup in setups(features, 20) {
            let sim = vm(setup);
            let s = &sim;
            s.alone(|s| s.map_ahead(0).unwrap());
            let before = s.world.stage2.mappings();
            let manager = Box::new(|| {
                s.start(engine, Granularity::Page);
                s.harvest();
                s.stop();
                s.start(engine, Granularity::Block);
                s.harvest();
            });
            s.run(vec![manager, guest(s, 60), guest(s, 60)]);
            s.alone(|s| {
                s.last_round();
                s.stop();
                s.check_counts();
            });
            assert_eq!(s.world.stage2.mappings(), before);
            sim.end();
        }
    }
}

/// A read-only leaf among others, of either size, stays one whatever walks over it.
#[test]
fn invariant_08_read_only_stays_read_only_under_fire() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 6) {
                let sim = vm(setup);
                let s = &sim;
                let read_only = [page(600), page(1026)];
                s.alone(|s| {
                    s.map_ahead(0).unwrap();
                    for ipa in read_only {
                        let entry = s.world.entry(ipa);
                        let pte = Pte(entry.load(Ordering::SeqCst));
                        entry.swap(pte.with(Permission::ReadOnly).0, Ordering::SeqCst);
                    }
                });
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    s.harvest();
                    if s.world.stage2.features().dbm == Support::Present {
                        for engine in [Engine::WriteProtect, Engine::Dbm] {
                            s.world.stage2.set_engine(engine).unwrap();
                            s.harvest();
                        }
                    }
                    s.stop();
                });
                let guest = || {
                    Box::new(|| {
                        for _ in 0..30 {
                            s.write(page([0, 1, 511, 1024, 1025, 1027][s.roll(6) as usize]));
                            s.breathe();
                        }
                    })
                };
                s.run(vec![manager, guest(), guest()]);
                for ipa in read_only {
                    let (pte, _) = s.world.pte(ipa);
                    assert!(!pte.is_writable() && !pte.is_tracked(), "{ipa:#x}");
                }
                sim.end();
            }
        }
    }
}

#[test]
fn invariant_08_read_only_that_becomes_something_else_ends_the_run() {
    for permission in [
        Permission::Untracked,
        Permission::Clean(Engine::WriteProtect),
        Permission::Clean(Engine::Dbm),
    ] {
        let sim = Sim::new(Setup::new(dbm(), 1));
        let why = refused(|| {
            sim.alone(|sim| {
                sim.add(ram(Access::ReadOnly));
                sim.read(page(1));
                let entry = sim.world.entry(page(1));
                let pte = Pte(entry.load(Ordering::SeqCst));
                entry.swap(pte.with(permission).0, Ordering::SeqCst);
            });
        });
        assert!(why.contains("a read-only leaf became another"), "{why}");
    }
}

/// Any member of a contiguous group may say that the group is dirty: reported is then another page than
/// the one written. So the engine makes none, and a rule sees to it.
#[test]
fn invariant_11_a_contiguous_group_would_report_another_page() {
    const CONTIGUOUS: u64 = 1 << 52;
    let world = World::sized(dbm(), 39, 8, 1);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Page);
    world.read(0, IPA);
    for number in 0..16 {
        let entry = world.entry(page(number));
        entry.fetch_or(CONTIGUOUS, Ordering::SeqCst);
    }
    // The CPU forgets what it has cached of the leaves alone.
    world.stage2.tlb().everything();
    world.write(0, page(3));
    let reported = world.harvest();
    assert_eq!(reported.len(), 1);
    assert!(
        !reported.contains(&page(3)),
        "the simulated CPU is too kind"
    );

    let sim = vm(Setup::new(dbm(), 1));
    let why = refused(|| {
        sim.alone(|sim| {
            sim.read(page(3));
            let entry = sim.world.entry(page(3));
            entry.fetch_or(CONTIGUOUS, Ordering::SeqCst);
        });
    });
    assert!(why.contains("Contiguous"), "{why}");
}

/// A walk over a range goes on behind whatever it meets: entries that are broken at the moment, empty
/// ones, and ones that somebody else just changed.
#[test]
fn invariant_15_no_walk_stops_at_an_entry_that_others_are_changing() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 12) {
                let sim = vm(setup);
                let s = &sim;
                s.alone(|s| s.start(engine, granularity));
                // Others help with every step, and map what is not mapped yet.
                let helper = || {
                    Box::new(|| {
                        for _ in 0..20 {
                            let _ = s.map_ahead(0);
                            s.write(page(HOT[s.roll(8) as usize]));
                            s.breathe();
                        }
                    })
                };
                let manager = Box::new(|| (0..4).for_each(|_| drop(s.harvest())));
                s.run(vec![manager, helper(), helper()]);
                sim.conclude();
            }
        }
    }
}

/// Hints and ranges, with levels that change beneath them: what an operand fails to name stays in a TLB
/// and is written through.
#[test]
fn invariant_16_operands_name_the_leaves_that_are_there() {
    for (ttl, tlb_range) in [
        (Support::Present, Support::Present),
        (Support::Present, Support::Absent),
        (Support::Absent, Support::Present),
    ] {
        let features = Features {
            ttl,
            tlb_range,
            ..dbm()
        };
        for engine in [Engine::WriteProtect, Engine::Dbm] {
            for granularity in GRANULARITIES {
                for setup in setups(features, 10) {
                    let sim = vm(setup);
                    let s = &sim;
                    let runs = || {
                        Box::new(|| {
                            for _ in 0..8 {
                                // Runs of pages, odd and even, over the edge of a block.
                                let first = 500 + s.roll(20);
                                let count = 1 + s.roll(30);
                                (first..first + count).for_each(|number| s.write(page(number)));
                                s.breathe();
                            }
                        })
                    };
                    let manager = Box::new(|| {
                        s.start(engine, granularity);
                        (0..4).for_each(|_| drop(s.harvest()));
                        s.stop();
                        s.start(engine, Granularity::Adaptive);
                        (0..2).for_each(|_| drop(s.harvest()));
                    });
                    s.run(vec![manager, runs(), runs()]);
                    sim.conclude();
                }
            }
        }
    }
}
