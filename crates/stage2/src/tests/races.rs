//! Two CPUs at the same entry, at the worst moment, every time: the fake lets the other one act right
//! after a given barrier or allocation.

use super::world::*;
use crate::fake::Event;
use crate::types::*;
use crate::{FaultAccess, FaultKind, Features, Outcome, Support};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const IPA: u64 = 0x4000_0000;

fn world(features: Features, pages: u64, pa: u64) -> Arc<World> {
    let world = World::sized(features, 39, 64, 2);
    world.slot(0, IPA, pages, Access::ReadWrite, pa);
    Arc::new(world)
}

/// Lets `other` happen right after the next `event`, and returns a count of how often it did.
fn interrupt(
    world: &Arc<World>,
    event: Event,
    other: impl FnOnce(&World) + Send + 'static,
) -> Arc<AtomicU64> {
    let happened = Arc::new(AtomicU64::new(0));
    let (counter, there) = (Arc::clone(&happened), Arc::downgrade(world));
    world.machine.interrupt(event, move || {
        other(&there.upgrade().unwrap());
        counter.fetch_add(1, Ordering::SeqCst);
    });
    happened
}

fn touch(world: &World) {
    let abort = fault(IPA, FaultAccess::Write, FaultKind::Translation);
    assert_eq!(world.stage2.handle_fault(abort), Outcome::Resume);
}

#[test]
fn the_loser_of_a_link_gives_its_table_back() {
    for pa in [RAM, RAM + PAGE_SIZE] {
        for nth in 0..2 {
            let world = world(Features::BASELINE, P2M, pa);
            if nth == 1 {
                // With a neighbour mapped the level-2 table is there and only the last one is linked.
                world.slot(1, IPA + 2 * MIB, P2M, Access::ReadWrite, RAM + GIB);
                world.map_all(1);
            }
            let happened = interrupt(&world, Event::Alloc(1), touch);
            world.write(0, IPA);
            let expected = u64::from(nth == 0 || pa != RAM);
            assert_eq!(happened.load(Ordering::SeqCst), expected);
            let mappings = world.stage2.mappings();
            assert_eq!(world.machine.tables_in_use() as u64, mappings.tables);
            assert_eq!(
                world.leaves().len() as u64,
                mappings.blocks_2m + mappings.pages_4k
            );
        }
    }
}

#[test]
fn invariant_06_a_write_between_building_and_linking_the_children_is_reported() {
    let world = world(
        Features {
            bbm2: Support::Present,
            ..dbm()
        },
        2 * P2M,
        RAM,
    );
    world.map_all(0);
    world.start(Engine::Dbm, Granularity::Block);
    let block = world.pte(IPA).0;
    assert!(block.is_clean());
    let happened = interrupt(&world, Event::DsbIshst, |world| {
        world.touch(1, IPA + 9 * PAGE_SIZE)
    });
    let old = world
        .stage2
        .split(world.entry(IPA), Level::L2, IPA, Engine::Dbm)
        .unwrap();
    assert_eq!(happened.load(Ordering::SeqCst), 1);
    assert!(old.is_dirty(), "the value at the exchange decides");
    assert!(world.leaves().iter().all(|(_, _, pte)| pte.is_clean()));
}

#[test]
fn invariant_06_two_cpus_split_one_block_once() {
    let world = world(
        Features {
            bbm2: Support::Present,
            ..dbm()
        },
        P2M,
        RAM,
    );
    world.map_all(0);
    world.start(Engine::Dbm, Granularity::Block);
    interrupt(&world, Event::DsbIshst, |world| {
        world
            .stage2
            .split(world.entry(IPA), Level::L2, IPA, Engine::Dbm)
            .unwrap();
    });
    assert!(
        world
            .stage2
            .split(world.entry(IPA), Level::L2, IPA, Engine::Dbm)
            .is_err()
    );
    assert_eq!(
        (
            world.stage2.counters().splits,
            world.stage2.mappings().pages_4k
        ),
        (1, P2M)
    );
    assert_eq!(
        world.machine.tables_in_use() as u64,
        world.stage2.mappings().tables
    );
}

#[test]
fn invariant_15_a_guest_in_the_middle_of_a_break_retries_and_another_harvest_waits() {
    let world = world(Features::BASELINE, 2 * P2M, RAM);
    world.map_all(0);
    world.start(Engine::WriteProtect, Granularity::Adaptive);
    world.write(0, IPA);
    let happened = interrupt(&world, Event::Ipas2e1is(IPA, 0), |world| {
        let abort = fault(IPA, FaultAccess::Write, FaultKind::Translation);
        assert_eq!(world.stage2.handle_fault(abort), Outcome::Retry);
        // Another CPU that wants to help is sent away, not made to wait.
        assert!(matches!(
            world.stage2.take(Epoch(1)),
            Ok(Progress::More { .. })
        ));
    });
    finish(|| world.stage2.take(Epoch(1))).unwrap();
    assert_eq!(happened.load(Ordering::SeqCst), 1);
    assert_eq!(world.read_epoch(Epoch(1)), span(IPA, 2 * MIB));
}

#[test]
fn invariant_03_writes_until_the_last_barrier_belong_to_the_epoch() {
    for (engine, features) in engines() {
        // After any step of the invalidation: the page is in the epoch, or dirty again for the next.
        let moments = [
            Event::DsbIshst,
            Event::DsbIsh,
            Event::Vmalle1is,
            Event::Ipas2e1is(IPA, 0),
            Event::Isb,
        ];
        for moment in moments {
            let world = world(
                Features {
                    ttl: Support::Absent,
                    ..features
                },
                P2M,
                RAM,
            );
            world.map_all(0);
            world.start(engine, Granularity::Page);
            world.write(1, IPA);
            let happened = interrupt(&world, moment, |world| world.touch(1, IPA));
            assert_eq!(world.harvest(), set([IPA]), "{engine:?} {moment:?}");
            assert_eq!(happened.load(Ordering::SeqCst), 1);
            world.write(1, IPA);
            assert_eq!(world.harvest(), set([IPA]), "{engine:?} {moment:?}: lost");
        }
    }
}

#[test]
fn a_first_write_to_unmapped_memory_costs_one_abort() {
    for (engine, features) in engines() {
        for granularity in [Granularity::Page, Granularity::Adaptive] {
            let world = World::sized(features, 39, 64, 1);
            world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
            world.start(engine, granularity);
            assert_eq!(world.write(0, IPA), 1, "{engine:?} {granularity:?}");
            assert!(world.harvest().contains(&IPA));
        }
    }
}
