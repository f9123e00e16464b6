//! Several CPUs in the same operation, or in operations that must not disturb each other.

use super::world::*;
use crate::fake::Event;
use crate::types::*;
use crate::{Error, FaultAccess, Features, LogStage};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
/// Two whole stretches of a harvest and a part of a third.
const PAGES: u64 = 40 * P2M + 9;
const HARVESTERS: usize = 3;
const TIME: Duration = Duration::from_millis(400);

/// Takes `epoch` on as many CPUs as `HARVESTERS`, the caller among them.
fn take_together(world: &World, epoch: Epoch) {
    let take = |pe: usize| {
        world.machine.become_pe(pe);
        while world.stage2.take(epoch).unwrap() != Progress::Done {
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        for pe in 1..HARVESTERS {
            scope.spawn(move || take(pe));
        }
        take(0);
    });
}

#[test]
fn several_cpus_harvest_one_epoch_and_lose_nothing() {
    for (engine, features) in engines() {
        for granularity in [Granularity::Page, Granularity::Adaptive] {
            let world = &World::sized(features, 39, 128, HARVESTERS + 1);
            world.slot(0, IPA, PAGES, Access::ReadWrite, RAM);
            world.map_all(0);
            world.start(engine, granularity);
            let stop = &AtomicBool::new(false);
            let mut reported: BTreeSet<u64> = BTreeSet::new();
            // The number of the last write to each page, as its writer and as the host know it.
            let written: &Vec<AtomicU64> = &(0..PAGES).map(|_| AtomicU64::new(0)).collect();
            let mut copied = std::vec![0; PAGES as usize];
            thread::scope(|scope| {
                scope.spawn(move || {
                    world.machine.become_pe(HARVESTERS);
                    let mut page = 0;
                    while !stop.load(Ordering::SeqCst) {
                        page = (page * 5 + 4099) % PAGES;
                        world.access_then(HARVESTERS, IPA + page * PAGE_SIZE, || {
                            written[page as usize].fetch_add(1, Ordering::SeqCst);
                        });
                    }
                });
                let began = Instant::now();
                // On a busy machine the writer may come late.
                while began.elapsed() < TIME / 8 || reported.is_empty() {
                    let epoch = world.new_epoch();
                    take_together(world, epoch);
                    let pages = world.read_epoch(epoch);
                    for ipa in &pages {
                        let page = ((ipa - IPA) / PAGE_SIZE) as usize;
                        copied[page] = written[page].load(Ordering::SeqCst);
                    }
                    reported.extend(pages);
                    world.stage2.commit(epoch).unwrap();
                }
                stop.store(true, Ordering::SeqCst);
            });
            for ipa in world.harvest() {
                let page = ((ipa - IPA) / PAGE_SIZE) as usize;
                copied[page] = written[page].load(Ordering::SeqCst);
                reported.insert(ipa);
            }
            let lost = (0..PAGES as usize)
                .filter(|&page| copied[page] != written[page].load(Ordering::SeqCst))
                .count();
            assert_eq!(lost, 0, "{engine:?} {granularity:?}");
            assert!(!reported.is_empty());
            assert!(world.harvest().is_empty());
        }
    }
}

/// An epoch that is given up while other CPUs are at it: they hand in what they have, the next epoch
/// has it all, and a log that is stopped meanwhile leaves nothing behind for the next one.
#[test]
fn an_epoch_is_given_up_while_others_harvest() {
    let began = Instant::now();
    while began.elapsed() < TIME {
        let world = &World::sized(dbm(), 39, 128, HARVESTERS);
        world.slot(0, IPA, PAGES, Access::ReadWrite, RAM);
        world.map_all(0);
        world.start(Engine::Dbm, Granularity::Page);
        let written: BTreeSet<u64> = (0..PAGES).step_by(3).map(|p| IPA + p * PAGE_SIZE).collect();
        for &ipa in &written {
            world.touch(0, ipa);
        }
        let epoch = world.new_epoch();
        world.stage2.take(epoch).unwrap();
        thread::scope(|scope| {
            for pe in 1..HARVESTERS {
                scope.spawn(move || {
                    world.machine.become_pe(pe);
                    // Not so many that it could be over: a step is a tenth of it at most.
                    for _ in 0..2 {
                        match world.stage2.take(epoch) {
                            Ok(Progress::More { .. }) => {}
                            Err(Error::StaleEpoch { .. }) => break,
                            other => panic!("{other:?}"),
                        }
                    }
                });
            }
            thread::yield_now();
            assert!(world.stage2.taken(epoch).is_err());
            world.stage2.abort(epoch).unwrap();
        });
        assert_eq!(world.harvest(), written);
        assert!(world.harvest().is_empty());
        world.stop();
        world.start(Engine::WriteProtect, Granularity::Page);
        assert!(world.harvest().is_empty(), "left over from the last log");
    }
}

/// Slots that share their first and last tables come and go under a guest that uses their neighbour.
#[test]
fn tables_shared_with_a_neighbour_stay_and_others_go() {
    let world = &World::sized(Features::BASELINE, 39, 64, 3);
    // A neighbour on each side, every border inside a table.
    let middle = IPA + 2 * MIB - 9 * PAGE_SIZE;
    let last = middle + (P2M + 30) * PAGE_SIZE;
    world.slot(0, IPA, P2M - 9, Access::ReadWrite, RAM + PAGE_SIZE);
    let stop = &AtomicBool::new(false);
    let writes = &AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut page = 0;
            while !stop.load(Ordering::SeqCst) {
                page = (page + 7) % (P2M - 9);
                world.touch(2, IPA + page * PAGE_SIZE);
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        world.machine.become_pe(0);
        let began = Instant::now();
        let mut round = 0;
        while began.elapsed() < TIME {
            round += 1;
            world.slot(
                1,
                middle,
                P2M + 30,
                Access::ReadWrite,
                RAM + GIB + PAGE_SIZE,
            );
            world.slot(2, last, 40, Access::ReadWrite, RAM + 2 * GIB);
            world.touch(0, middle + (round % 500) * PAGE_SIZE);
            world.touch(0, last);
            world.delete(1);
            if round % 2 == 0 {
                // The neighbour too, so that the tables between them empty in either order.
                let access = [Access::ReadOnly, Access::ReadWrite];
                for access in access {
                    finish(|| world.stage2.set_access(SlotId(2), access)).unwrap();
                    world.read(0, last + PAGE_SIZE);
                }
            }
            world.delete(2);
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(writes.load(Ordering::Relaxed) > 0);
    let mappings = world.stage2.mappings();
    assert_eq!(world.machine.tables_in_use() as u64, mappings.tables);
    assert_eq!(world.leaves().len() as u64, mappings.pages_4k);
    world.delete(0);
    assert_eq!(world.machine.tables_in_use(), 1, "only the root is left");
}

/// Blocks are put together while the guest reads and writes in them.
#[test]
fn collapsing_stops_nobody_and_loses_nothing() {
    let world = &World::sized(dbm(), 39, 64, 3);
    world.slot(0, IPA, 4 * P2M, Access::ReadWrite, RAM);
    world.map_all(0);
    let stop = &AtomicBool::new(false);
    let writes = &AtomicU64::new(0);
    thread::scope(|scope| {
        for pe in 1..=2 {
            scope.spawn(move || {
                let mut page = pe as u64;
                while !stop.load(Ordering::SeqCst) {
                    page = (page * 13 + 7) % (4 * P2M);
                    world
                        .access(pe, IPA + page * PAGE_SIZE, FaultAccess::Write)
                        .unwrap();
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        world.machine.become_pe(0);
        let began = Instant::now();
        while began.elapsed() < TIME {
            for engine in [Engine::Dbm, Engine::WriteProtect] {
                world.start(engine, Granularity::Page);
                world.harvest();
                world.stop();
                let mappings = world.stage2.mappings();
                assert_eq!((mappings.blocks_2m, mappings.pages_4k), (4, 0));
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(writes.load(Ordering::Relaxed) > 0);
    assert_eq!(
        world.machine.tables_in_use() as u64,
        world.stage2.mappings().tables
    );
}

/// Faults on different CPUs share no lock: one that is held up holds up nobody.
#[test]
fn a_reader_on_one_cpu_holds_up_no_other() {
    let world = &World::sized(Features::BASELINE, 39, 64, 3);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.machine.become_pe(1);
    let held = world.stage2.layout();
    let changed = &AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || {
            world.machine.become_pe(0);
            world.slot(1, IPA + GIB, P2M, Access::ReadWrite, RAM + GIB);
            changed.store(true, Ordering::SeqCst);
        });
        // While the change waits for CPU 1, the guest runs on CPU 2.
        for page in 0..2000 {
            world.touch(2, IPA + page % P2M * PAGE_SIZE);
        }
        assert!(
            !changed.load(Ordering::SeqCst),
            "it does not wait for its reader"
        );
        world.machine.become_pe(1);
        drop(held);
    });
    assert!(changed.load(Ordering::SeqCst));
}

/// Runs `other` right after the first `TLBI VMALLS12E1IS` from now on, and says whether it ran.
fn at_the_invalidation(
    world: &Arc<World>,
    other: impl FnOnce(&Arc<World>) + Send + 'static,
) -> Arc<AtomicBool> {
    let ran = Arc::new(AtomicBool::new(false));
    let (there, done) = (Arc::downgrade(world), Arc::clone(&ran));
    world.machine.interrupt(Event::Vmalls12e1is, move || {
        // Gone only when the test has failed already.
        if let Some(world) = there.upgrade() {
            other(&world);
            done.store(true, Ordering::SeqCst);
        }
    });
    ran
}

/// A log that is being stopped, with all but the collapse of one table done; `other` happens between
/// the invalidation and the rest of that, and is told where the first leaf is.
fn about_to_collapse(
    other: impl FnOnce(&Arc<World>, (Pa, usize)) + Send + 'static,
) -> (Arc<World>, Arc<AtomicBool>) {
    let world = Arc::new(World::sized(dbm(), 39, 64, 2));
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.map_all(0);
    world.start(Engine::Dbm, Granularity::Page);
    // One step releases so few leaves, and invalidates.
    world.stage2.stop_log().unwrap();
    assert!(!world.pte(IPA).0.is_tracked());
    let place = world.where_is(IPA, Level::L3);
    let ran = at_the_invalidation(&world, move |world| other(world, place));
    (world, ran)
}

/// A table that got a leaf between being broken off and being freed goes back in its place.
#[test]
fn a_table_that_is_used_again_is_not_freed() {
    let world = Arc::new(World::sized(Features::BASELINE, 39, 64, 2));
    world.slot(0, IPA, 8, Access::ReadWrite, RAM);
    world.slot(1, IPA + 8 * PAGE_SIZE, 8, Access::ReadWrite, RAM + GIB);
    world.map_all(0);
    let (table, index) = world.where_is(IPA, Level::L3);
    let leaf = world.pte(IPA).0.0;
    // What a fault in the neighbour does that had found the table before.
    let ran = at_the_invalidation(&world, move |world| {
        world.machine.table_of(table).entries()[index + 8].store(leaf, Ordering::SeqCst);
    });
    world.delete(0);
    assert!(ran.load(Ordering::SeqCst));
    assert_eq!(world.where_is(IPA, Level::L3).0, table);
    assert_eq!(world.pte(IPA + 8 * PAGE_SIZE).0.0, leaf);
    assert_eq!(
        world.machine.tables_in_use() as u64,
        world.stage2.mappings().tables
    );
}

/// The same for a table that is to become a block: a leaf that changed meanwhile stays as it is.
#[test]
fn a_table_that_changes_is_not_collapsed() {
    // The write permission of the first leaf; an access flag alone would not matter.
    let (world, ran) = about_to_collapse(|world, (table, index)| {
        let entry = &world.machine.table_of(table).entries()[index];
        entry.fetch_and(!(1 << 7), Ordering::SeqCst);
    });
    let (table, index) = world.where_is(IPA, Level::L3);
    let changed = world.pte(IPA).0.0 & !(1 << 7);
    world.stop();
    assert!(ran.load(Ordering::SeqCst));
    assert_eq!(world.where_is(IPA, Level::L3), (table, index));
    assert_eq!(world.pte(IPA).0.0, changed);
    assert_eq!(world.stage2.mappings().blocks_2m, 0);
}

/// A log does not end while somebody has not handed in what a harvest that was given up brought.
#[test]
fn a_log_ends_after_everybody_has_handed_in() {
    let world = Arc::new(World::sized(dbm(), 39, 64, 2));
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.map_all(0);
    world.start(Engine::Dbm, Granularity::Page);
    world.touch(1, IPA);
    world.machine.become_pe(0);
    let epoch = world.new_epoch();
    world.stage2.take(epoch).unwrap();
    let there = Arc::downgrade(&world);
    let (answer, answered) = mpsc::channel();
    // At the barrier of the CPU that harvests, before it hands in.
    world.machine.interrupt(Event::DsbIshst, move || {
        let world = there.upgrade().unwrap();
        world.stage2.abort(epoch).unwrap();
        thread::spawn(move || {
            world.machine.become_pe(1);
            let _ = answer.send(world.stage2.stop_log());
        });
        let said = answered.recv_timeout(Duration::from_secs(20));
        let said = said.expect("it waits for the harvest instead of saying so");
        assert_eq!(said, Ok(Progress::More { done: 0, total: 0 }));
    });
    world.stage2.take(epoch).unwrap();
    assert_eq!(world.stage2.log_status().stage, LogStage::On);
    assert_eq!(world.harvest(), set([IPA]));
    world.stop();
}

/// A stretch is of guest addresses, not of a slot: what was left of one when its slot went is harvested
/// as what is there now.
#[test]
fn a_stretch_outlives_its_slot() {
    for (engine, features) in engines() {
        let world = World::sized(features, 39, 128, 2);
        world.slot(0, IPA, 32 * P2M, Access::ReadWrite, RAM);
        world.map_all(0);
        world.start(engine, Granularity::Page);
        for page in 0..32 * P2M {
            world.touch(0, IPA + page * PAGE_SIZE);
        }
        let epoch = world.new_epoch();
        // Clear, then a part of the first stretch.
        world.stage2.take(epoch).unwrap();
        world.stage2.take(epoch).unwrap();
        world.delete(0);
        let border = IPA + 9 * MIB;
        world.slot(1, IPA, 9 * P2M / 2, Access::ReadWrite, RAM + GIB);
        world.slot(2, border, 27 * P2M, Access::ReadWrite, RAM + 2 * GIB);
        world.map_all(1);
        world.map_all(2);
        let written = [border, border + MIB, border + 20 * MIB];
        for ipa in written {
            world.touch(0, ipa);
        }
        finish(|| world.stage2.take(epoch)).unwrap();
        let mut reported = world.read_epoch(epoch);
        world.stage2.commit(epoch).unwrap();
        reported.extend(world.harvest());
        assert_eq!(reported, set(written), "{engine:?}");
    }
}

/// An epoch that is given up before anybody began it never begins.
#[test]
fn an_epoch_given_up_early_never_begins() {
    let world = World::sized(dbm(), 39, 64, 2);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Page);
    let epoch = world.new_epoch();
    world.stage2.give_up(epoch);
    assert!(matches!(
        world.stage2.take(epoch),
        Err(Error::StaleEpoch { .. })
    ));
    assert!(world.harvest().is_empty());
}
