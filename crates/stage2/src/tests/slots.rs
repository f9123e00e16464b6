//! Slots: what is accepted, what is mapped where, and with which leaves.

use super::sim::{Place, Setup, Sim};
use super::world::*;
use crate::fake::{Event, Machine};
use crate::types::*;
use crate::{Error, FaultAccess, FaultKind, Features, Mappings, Outcome, Stage2, Translation};
use std::sync::Arc;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

fn add(world: &World, id: u16, ipa: u64, pages: u64, extents: &[(u64, u64)]) -> Result<(), Error> {
    let extents: Vec<Extent> = extents
        .iter()
        .map(|(pa, pages)| Extent {
            pa: Pa::new(*pa),
            pages: *pages,
        })
        .collect();
    world.stage2.add_slot(
        SlotId(id),
        Ipa::new(ipa).gfn(),
        pages,
        Access::ReadWrite,
        &extents,
    )
}

#[test]
fn impossible_slots_are_refused_with_the_reason() {
    let world = World::new(Features::BASELINE);
    let limit = 1u64 << 40;
    add(&world, 1, IPA, 16, &[(RAM, 16)]).unwrap();
    assert_eq!(
        add(&world, 1, 0, 1, &[(RAM, 1)]),
        Err(Error::SlotExists(SlotId(1)))
    );
    for (ipa, pages) in [
        (IPA, 1),
        (IPA - PAGE_SIZE, 2),
        (IPA + 15 * PAGE_SIZE, 9),
        (IPA - PAGE_SIZE, 99),
    ] {
        assert_eq!(
            add(&world, 2, ipa, pages, &[(RAM, pages)]),
            Err(Error::SlotOverlap(SlotId(1)))
        );
    }
    for (ipa, pages) in [
        (0, 0),
        (limit - PAGE_SIZE, 2),
        (limit, 1),
        (!0xfff, 1),
        (0, u64::MAX),
    ] {
        let range = Error::SlotRange {
            base: Ipa::new(ipa).gfn(),
            pages,
        };
        assert_eq!(add(&world, 2, ipa, pages, &[(RAM, pages)]), Err(range));
    }
    for (pa, pages) in [
        (RAM + 1, 4),
        (RAM, 0),
        (limit - PAGE_SIZE, 4),
        (!0xfff, 4),
        (0, u64::MAX),
    ] {
        let refused = add(&world, 2, 0, 4, &[(pa, pages)]);
        assert_eq!(
            refused,
            Err(Error::ExtentRange(Extent {
                pa: Pa::new(pa),
                pages
            }))
        );
    }
    for extents in [&[][..], &[(RAM, 3)], &[(RAM, 2), (RAM + GIB, 3)]] {
        let total = extents.iter().map(|extent| extent.1).sum();
        assert_eq!(
            add(&world, 2, 0, 4, extents),
            Err(Error::ExtentTotal {
                slot: 4,
                extents: total
            })
        );
    }
    assert_eq!(world.stage2.slots().len(), 1);
    // The last page of the space, and a neighbour that only touches.
    add(&world, 3, limit - PAGE_SIZE, 1, &[(RAM, 1)]).unwrap();
    add(&world, 4, IPA + 16 * PAGE_SIZE, 1, &[(RAM, 1)]).unwrap();
}

#[test]
fn every_error_says_what_and_the_way_out() {
    use std::string::ToString;
    let errors = [
        Error::IpaBits {
            asked: 50,
            most: 40,
        },
        Error::PaBits(7),
        Error::TooManyCpus {
            asked: 200,
            most: 127,
        },
        Error::OutOfTables,
        Error::OutOfMemory,
        Error::NoSuchSlot(SlotId(3)),
        Error::SlotExists(SlotId(3)),
        Error::SlotOverlap(SlotId(3)),
        Error::SlotRange {
            base: Gfn::new(1).unwrap(),
            pages: 0,
        },
        Error::ExtentRange(Extent {
            pa: Pa::new(1),
            pages: 2,
        }),
        Error::ExtentTotal {
            slot: 1,
            extents: 2,
        },
        Error::SlotDying(SlotId(3)),
        Error::NotMemory(Ipa::new(5)),
        Error::NotLogging,
        Error::AlreadyLogging,
        Error::Busy,
        Error::EngineUnavailable,
        Error::EpochOutstanding(Epoch(4)),
        Error::NoSuchEpoch {
            asked: Epoch(4),
            outstanding: None,
        },
        Error::NoSuchEpoch {
            asked: Epoch(4),
            outstanding: Some(Epoch(5)),
        },
        Error::StaleEpoch {
            asked: Epoch(4),
            last: Epoch(5),
        },
        Error::TakeUnfinished(Epoch(4)),
    ];
    let texts: std::collections::BTreeSet<_> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), errors.len());
    assert!(
        texts
            .iter()
            .all(|text| text.len() > 15 && !text.contains("Slot"))
    );
}

#[test]
fn leaves_are_as_large_as_both_addresses_allow() {
    // (address, memory, pages, 1 GiB blocks, 2 MiB blocks, pages)
    let cases = [
        (IPA, RAM, P1G, 1, 0, 0),
        (IPA, RAM, 2 * P1G, 2, 0, 0),
        (IPA, RAM + 2 * MIB, P1G, 0, 512, 0),
        (IPA, RAM + PAGE_SIZE, P2M, 0, 0, P2M),
        (IPA + 2 * MIB, RAM + 2 * MIB, P1G, 0, 512, 0),
        (IPA + PAGE_SIZE, RAM + PAGE_SIZE, 2 * P2M, 0, 1, P2M),
        (
            IPA + 2 * MIB - PAGE_SIZE,
            RAM + 2 * MIB - PAGE_SIZE,
            1 + P2M + 1,
            0,
            1,
            2,
        ),
        (IPA, RAM, P1G + P2M + 1, 1, 1, 1),
        (IPA - 2 * MIB, RAM - 2 * MIB, P2M + P1G + P2M, 1, 2, 0),
    ];
    for features in [Features::BASELINE, Machine::everything()] {
        for (ipa, pa, pages, blocks_1g, blocks_2m, pages_4k) in cases {
            let world = World::sized(features, 40, 32, 2);
            add(&world, 0, ipa, pages, &[(pa, pages)]).unwrap();
            world.map_all(0);
            let found = world.stage2.mappings();
            assert_eq!(
                (found.blocks_1g, found.blocks_2m, found.pages_4k),
                (blocks_1g, blocks_2m, pages_4k),
                "{ipa:#x}"
            );
            assert_eq!(found.tables as usize, world.machine.tables_in_use());
            for page in [0, 1, pages / 2, pages - 1] {
                assert_eq!(
                    world.write(0, ipa + page * PAGE_SIZE),
                    0,
                    "mapped ahead, so no abort"
                );
            }
            world.delete(0);
            let empty = Mappings {
                tables: 2,
                ..Mappings::default()
            };
            assert_eq!(
                (world.stage2.mappings(), world.machine.tables_in_use()),
                (empty, 2)
            );
        }
    }
}

#[test]
fn leaves_do_not_reach_across_extents() {
    let world = World::new(Features::BASELINE);
    // The first two are one run in two pieces; the third begins in the middle of a block.
    add(
        &world,
        0,
        IPA,
        2 * P2M + P2M,
        &[
            (RAM, 100),
            (RAM + 100 * PAGE_SIZE, P2M),
            (RAM + GIB, 2 * P2M - 100),
        ],
    )
    .unwrap();
    world.map_all(0);
    assert_eq!(
        (
            world.stage2.mappings().blocks_2m,
            world.stage2.mappings().pages_4k
        ),
        (1, 2 * P2M)
    );
    assert_eq!(
        world.stage2.slots()[0].extents.len(),
        2,
        "neighbours that touch are one"
    );
    for page in 0..3 * P2M {
        world.write(0, IPA + page * PAGE_SIZE);
    }
}

#[test]
fn first_touch_maps_the_largest_leaf_and_whole_tables() {
    for (ipa, aborts_for_all) in [(IPA, 1), (IPA + 16 * PAGE_SIZE, 1)] {
        let world = World::new(Features::BASELINE);
        add(
            &world,
            0,
            ipa,
            P2M - 16,
            &[(RAM + 16 * PAGE_SIZE, P2M - 16)],
        )
        .unwrap();
        let aborts: usize = (0..P2M - 16)
            .map(|page| world.write(0, ipa + page * PAGE_SIZE))
            .sum();
        assert_eq!(aborts, aborts_for_all);
        assert_eq!(world.stage2.counters().translation_faults, 1);
    }
}

#[test]
fn two_slots_share_a_table_and_leave_it_in_turn() {
    let world = World::new(Features::BASELINE);
    add(&world, 0, IPA, 100, &[(RAM, 100)]).unwrap();
    add(&world, 1, IPA + 100 * PAGE_SIZE, 100, &[(RAM + GIB, 100)]).unwrap();
    world.write(0, IPA + 5 * PAGE_SIZE);
    world.write(0, IPA + 105 * PAGE_SIZE);
    assert_eq!(world.stage2.mappings().pages_4k, 200);
    world.delete(0);
    assert_eq!(world.stage2.mappings().pages_4k, 100);
    assert_eq!(
        world.write(0, IPA + 105 * PAGE_SIZE),
        0,
        "the neighbour is still mapped"
    );
    assert_eq!(
        world.access(0, IPA, FaultAccess::Read),
        Err(Outcome::NotMemory)
    );
    world.delete(1);
    assert_eq!(world.machine.tables_in_use(), 2);
    assert_eq!(
        world.stage2.delete_slot(SlotId(1)),
        Err(Error::NoSuchSlot(SlotId(1)))
    );
}

/// A harvest of one slot leaves the leaves beside it alone, of which it has no bit to say it by.
#[test]
fn two_slots_in_a_table_are_harvested_each_for_itself() {
    for (engine, features) in engines() {
        for scope in [None, Some(0), Some(1)] {
            let world = World::new(features);
            let door = |page: u64| IPA + page * PAGE_SIZE;
            // Neither begins or ends with a word of 64 entries.
            add(&world, 0, IPA, 100, &[(RAM, 100)]).unwrap();
            add(&world, 1, door(100), 100, &[(RAM + GIB, 100)]).unwrap();
            world.start(engine, Granularity::Page);
            let (mine, others) = ([0, 64, 99].map(door), [100, 127, 199].map(door));
            for ipa in mine.into_iter().chain(others) {
                world.write(0, ipa);
            }
            let both = set(mine.into_iter().chain(others));
            let Some(slot) = scope else {
                assert_eq!(world.harvest(), both, "{engine:?}");
                continue;
            };
            let epoch = world.new_epoch();
            finish(|| world.stage2.take_range(epoch, SlotId(slot), 0, 100)).unwrap();
            let taken = world.read_epoch(epoch);
            assert_eq!(taken, set([mine, others][usize::from(slot)]));
            world.stage2.commit(epoch).unwrap();
            assert_eq!(world.harvest(), &both - &taken, "{engine:?}");
        }
    }
}

#[test]
fn a_slot_being_deleted_answers_no_fault() {
    let world = World::sized(Features::BASELINE, 40, 300, 2);
    let pages = 100 * P2M;
    add(&world, 0, IPA, pages, &[(RAM + PAGE_SIZE, pages)]).unwrap();
    world.map_all(0);
    assert!(matches!(
        world.stage2.delete_slot(SlotId(0)).unwrap(),
        Progress::More { .. }
    ));
    let last = IPA + (pages - 1) * PAGE_SIZE;
    let abort = fault(last, FaultAccess::Read, FaultKind::Translation);
    assert_eq!(world.stage2.handle_fault(abort), Outcome::NotMemory);
    assert_eq!(
        world.stage2.map_ahead(SlotId(0), 0),
        Err(Error::SlotDying(SlotId(0)))
    );
    assert_eq!(world.stage2.translate(Ipa::new(last)), None);
    world.delete(0);
    assert_eq!(world.machine.tables_in_use(), 2);
}

#[test]
fn slots_come_and_go_while_a_log_is_on() {
    for (engine, features) in engines() {
        let world = World::new(features);
        add(&world, 0, IPA, P2M, &[(RAM, P2M)]).unwrap();
        world.start(engine, Granularity::Page);
        world.write(0, IPA);
        add(&world, 1, IPA + GIB, P2M, &[(RAM + GIB, P2M)]).unwrap();
        world.write(0, IPA + GIB + PAGE_SIZE);
        assert_eq!(world.harvest(), set([IPA, IPA + GIB + PAGE_SIZE]));
        // Documented: what is known about a slot goes with it.
        world.write(0, IPA);
        world.write(0, IPA + GIB);
        let epoch = world.new_epoch();
        world.stage2.take(epoch).unwrap();
        world.delete(0);
        finish(|| world.stage2.take(epoch)).unwrap();
        assert_eq!(world.read_epoch(epoch), set([IPA + GIB]));
        world.stage2.commit(epoch).unwrap();
        // And a new one in its place knows nothing of it.
        add(&world, 0, IPA, P2M, &[(RAM, P2M)]).unwrap();
        assert!(world.harvest().is_empty());
    }
}

#[test]
fn inv15_clean_blocks_are_not_passed_beyond_their_slot() {
    for (engine, features) in engines() {
        let world = World::new(features);
        for id in 0..3u16 {
            let (ipa, pa) = (IPA + u64::from(id) * 4 * MIB, RAM + u64::from(id) * GIB);
            add(&world, id, ipa, 2 * P2M, &[(pa, 2 * P2M)]).unwrap();
            world.map_all(id);
        }
        world.start(engine, Granularity::Adaptive);
        // Only EL2 writes, so all six blocks stay clean, side by side in one table.
        for block in 0..6 {
            for ipa in [block * 2 * MIB, (block + 1) * 2 * MIB - PAGE_SIZE] {
                world.el2_write(IPA + ipa);
                assert_eq!(world.harvest(), set([IPA + ipa]), "{engine:?}");
            }
        }
        assert_eq!(world.stage2.mappings().blocks_2m, 6);
    }
}

/// The same where blocks begin in the middle of a word of the bitmaps.
#[test]
fn inv15_clean_blocks_are_not_passed_with_bits_of_their_last_pages() {
    const HEAD: u64 = 5;
    for (engine, features) in engines() {
        let world = World::new(features);
        let head = HEAD * PAGE_SIZE;
        let pages = HEAD + 4 * P2M;
        add(&world, 0, IPA - head, pages, &[(RAM - head, pages)]).unwrap();
        world.map_all(0);
        world.start(engine, Granularity::Adaptive);
        assert_eq!(world.stage2.mappings().blocks_2m, 4);
        for block in 1..=4 {
            for back in [1, HEAD, HEAD + 1, 64] {
                let ipa = IPA + block * 2 * MIB - back * PAGE_SIZE;
                world.el2_write(ipa);
                let epoch = world.new_epoch();
                // Under write protection too this looks at every block.
                finish(|| world.stage2.take_range(epoch, SlotId(0), 0, pages)).unwrap();
                assert_eq!(world.read_epoch(epoch), set([ipa]), "{engine:?}");
                world.stage2.commit(epoch).unwrap();
            }
        }
    }
}

/// A page and a block two entries of its size further on are two runs to invalidate, each of its level.
#[test]
fn invariant_16_a_page_and_a_block_behind_it_are_both_invalidated() {
    for (engine, features) in engines() {
        let world = World::new(features);
        let extents = [(RAM + PAGE_SIZE, P2M), (RAM + GIB, P2M)];
        add(&world, 0, IPA, 2 * P2M, &extents).unwrap();
        world.map_all(0);
        world.start(engine, Granularity::Block);
        let block = IPA + 2 * MIB;
        for _ in 0..2 {
            world.write(0, IPA);
            world.write(0, block);
            let both = &set([IPA]) | &span(block, 2 * MIB);
            assert_eq!(world.harvest(), both, "{engine:?}");
        }
    }
}

#[test]
fn translate_says_where_and_how_far() {
    let world = World::new(Features::BASELINE);
    add(&world, 0, IPA, 5, &[(RAM, 2), (RAM + GIB, 3)]).unwrap();
    let at = |ipa| world.stage2.translate(Ipa::new(ipa));
    let found = |pa, bytes| {
        Some(Translation {
            pa: Pa::new(pa),
            bytes,
            access: Access::ReadWrite,
        })
    };
    assert_eq!(at(IPA), found(RAM, 2 * PAGE_SIZE));
    assert_eq!(at(IPA + 4097), found(RAM + 4097, 4095));
    assert_eq!(at(IPA + 2 * PAGE_SIZE), found(RAM + GIB, 3 * PAGE_SIZE));
    assert_eq!(
        at(IPA + 5 * PAGE_SIZE - 1),
        found(RAM + GIB + 3 * PAGE_SIZE - 1, 1)
    );
    for outside in [0, IPA - 1, IPA + 5 * PAGE_SIZE, 1 << 40, u64::MAX] {
        assert_eq!(at(outside), None);
    }
}

#[test]
fn guests_cannot_fault_their_way_out() {
    let world = World::new(Features::BASELINE);
    add(&world, 0, IPA, 1, &[(RAM, 1)]).unwrap();
    for ipa in [0, IPA - 1, IPA + PAGE_SIZE, 1 << 40, 1 << 48, u64::MAX] {
        for access in [FaultAccess::Read, FaultAccess::Write, FaultAccess::Execute] {
            for kind in [
                FaultKind::Translation,
                FaultKind::Permission,
                FaultKind::AccessFlag,
            ] {
                assert_eq!(
                    world.stage2.handle_fault(fault(ipa, access, kind)),
                    Outcome::NotMemory
                );
            }
        }
    }
}

#[test]
fn out_of_tables_is_said_and_leaks_nothing() {
    let world = World::new(Features::BASELINE);
    add(&world, 0, IPA, P2M, &[(RAM + PAGE_SIZE, P2M)]).unwrap();
    world.machine.limit_tables(3);
    let abort = fault(IPA, FaultAccess::Write, FaultKind::Translation);
    assert_eq!(world.stage2.handle_fault(abort), Outcome::OutOfTables);
    assert_eq!(
        world.stage2.map_ahead(SlotId(0), 0),
        Err(Error::OutOfTables)
    );
    world.machine.limit_tables(4);
    world.map_all(0);
    world.write(0, IPA);
    world.delete(0);
    assert_eq!(world.machine.tables_in_use(), 2);
    world.machine.limit_tables(1);
    assert!(matches!(
        Stage2::new(&*world.machine, 40, vmid(), Features::BASELINE),
        Err(Error::OutOfTables)
    ));
}

#[test]
fn the_end_of_a_vm_frees_all_its_tables() {
    for bits in 32..=48 {
        let machine = std::sync::Arc::new(Machine::new(64, 1));
        let features = Features {
            pa_bits: 48,
            ..Features::BASELINE
        };
        let stage2 = Stage2::new(std::sync::Arc::clone(&machine), bits, vmid(), features).unwrap();
        let last = (1u64 << bits) - PAGE_SIZE;
        for (id, ipa) in [(0, 0), (1, last)] {
            let extent = Extent {
                pa: Pa::new(RAM + u64::from(id) * PAGE_SIZE),
                pages: 1,
            };
            stage2
                .add_slot(
                    SlotId(id),
                    Ipa::new(ipa).gfn(),
                    1,
                    Access::ReadWrite,
                    &[extent],
                )
                .unwrap();
            let abort = fault(ipa, FaultAccess::Write, FaultKind::Translation);
            assert_eq!(stage2.handle_fault(abort), Outcome::Resume);
            let guest = crate::fake::Guest {
                vtcr: stage2.vtcr(),
                vttbr: stage2.vttbr(),
            };
            let reached = machine
                .access(0, guest, ipa, FaultAccess::Write, |pa| pa)
                .unwrap();
            assert_eq!(reached, extent.pa, "{bits}");
        }
        let roots = match bits {
            40..=43 => 1u64 << (bits - 39),
            _ => 1,
        };
        assert_eq!(
            stage2.vttbr() % (4096 * roots),
            0,
            "roots side by side are aligned to their size"
        );
        drop(stage2);
        assert_eq!(machine.tables_in_use(), 0, "{bits}");
    }
}

/// Two slots that touch, and whose memory touches too, do not become one block: the next log would
/// report its writes as those of the first one.
#[test]
fn inv07_a_block_is_never_of_two_slots() {
    let ipa = 0x4000_0000;
    for engine in [Engine::Dbm, Engine::WriteProtect] {
        let world = World::sized(dbm(), 39, 64, 2);
        world.slot(0, ipa, P2M / 2, Access::ReadWrite, RAM);
        world.slot(1, ipa + MIB, P2M / 2, Access::ReadWrite, RAM + MIB);
        world.map_all(0);
        world.map_all(1);
        world.start(engine, Granularity::Page);
        world.harvest();
        world.stop();
        let mappings = world.stage2.mappings();
        assert_eq!((mappings.blocks_2m, mappings.pages_4k), (0, P2M));
        world.start(engine, Granularity::Adaptive);
        for page in [0, P2M / 2 - 1, P2M / 2, P2M - 1] {
            world.touch(0, ipa + page * PAGE_SIZE);
            assert_eq!(world.harvest(), set([ipa + page * PAGE_SIZE]));
        }
    }
}

#[test]
fn marking_nothing_marks_nothing() {
    let ipa = 0x4000_0000;
    let world = World::sized(dbm(), 39, 64, 2);
    world.slot(0, ipa, P2M, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Page);
    for at in [ipa, ipa + PAGE_SIZE, ipa + 5 * PAGE_SIZE + 8] {
        assert_eq!(world.stage2.mark_dirty(Ipa::new(at), 0), Ok(()));
    }
    assert!(world.harvest().is_empty());
}

/// Without FEAT_BBM a block that another CPU has cached may not be mapped anew as pages before the
/// invalidation: the simulated machine ends the run if it is.
#[test]
fn a_change_of_access_is_a_break_before_the_make() {
    let sim = Sim::new(Setup::new(dbm(), 1).calm());
    let read_on = |sim: &Sim, cpu| {
        sim.world.machine.become_pe(cpu);
        sim.read(GIB);
        sim.world.machine.become_pe(0);
    };
    sim.alone(|sim| {
        sim.add(Place {
            id: 0,
            ipa: GIB,
            pages: P2M,
            access: Access::ReadOnly,
            pa: RAM,
        });
        read_on(sim, 1);
        sim.start(Engine::Dbm, Granularity::Page);
        read_on(sim, 1);
        assert_eq!(sim.world.stage2.mappings().blocks_2m, 1);
    });
    let there = Arc::downgrade(&sim);
    sim.world.machine.interrupt(Event::DsbIshst, move || {
        let sim = there.upgrade().unwrap();
        sim.world.machine.become_pe(2);
        let fault = fault(GIB, FaultAccess::Read, FaultKind::Translation);
        assert_eq!(sim.world.stage2.handle_fault(fault), Outcome::Retry);
        sim.world.machine.become_pe(0);
    });
    sim.alone(|sim| {
        sim.set_access(0, Access::ReadWrite);
        assert_eq!(sim.world.stage2.mappings().blocks_2m, 0);
        read_on(sim, 2);
        assert_eq!(sim.world.stage2.mappings().pages_4k, P2M);
    });
}
