//! Epochs of a range, and logs that begin with every page dirty.

use super::sim::*;
use super::world::*;
use crate::types::*;
use crate::{Error, FaultAccess};
use std::boxed::Box;
use std::collections::BTreeSet;
use std::string::ToString;
use std::sync::Arc;
use std::vec;

const IPA: u64 = 0x4000_0000;

/// Two blocks and a tail that is no whole word.
const PAGES: u64 = 2 * P2M + 69;

/// The words of the slot, as ranges of pages.
const RANGES: [(u64, u64); 5] = [(0, 64), (64, 448), (512, 256), (768, 256), (1024, 69)];

const GRANULARITIES: [Granularity; 3] =
    [Granularity::Page, Granularity::Adaptive, Granularity::Block];

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn vm(setup: Setup) -> Arc<Sim> {
    Sim::with_ram(setup, IPA, PAGES)
}

/// Takes, copies and commits a range.
fn harvest_range(sim: &Sim, (first, pages): (u64, u64)) -> BTreeSet<u64> {
    let epoch = sim.take_range(0, first, pages);
    let copied = sim.copy(epoch);
    let within = span(page(first), pages * PAGE_SIZE);
    assert!(copied.is_subset(&within), "pages outside the range");
    sim.commit(epoch);
    copied
}

fn guest<'a>(sim: &'a Sim, accesses: usize) -> Box<dyn FnOnce() + Send + 'a> {
    const HOT: [u64; 9] = [0, 63, 64, 511, 512, 767, 768, 1023, 1090];
    Box::new(move || {
        for _ in 0..accesses {
            sim.write(page(HOT[sim.roll(HOT.len() as u64) as usize]));
            sim.breathe();
        }
    })
}

fn conclude(sim: Arc<Sim>) {
    sim.alone(|sim| {
        sim.last_of_the_log();
        assert_eq!(sim.world.stage2.mappings().blocks_2m, 2, "blocks are back");
    });
    sim.end();
}

#[test]
fn a_range_is_whole_words_or_ends_with_the_slot() {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        s.map_ahead(0).unwrap();
        let ask = |slot, first, pages| {
            s.op("take_range", |stage2| {
                stage2.take_range(Epoch(900), SlotId(slot), first, pages)
            })
        };
        assert_eq!(ask(0, 0, 64), Err(Error::NotLogging));
        s.start(Engine::Dbm, Granularity::Page);
        let wrong = [
            (0, 0),
            (1, 64),
            (63, 64),
            (0, 63),
            (0, 65),
            (1024, 68),
            (1024, 70),
            (1024, 128),
            (1088, 64),
            (PAGES, 64),
            (u64::MAX - 63, 128),
            (64, u64::MAX - 63),
        ];
        for (first, pages) in wrong {
            let refused = ask(0, first, pages).unwrap_err();
            let slot = SlotId(0);
            assert_eq!(refused, Error::PageRange { slot, first, pages });
            assert!(refused.to_string().contains("multiple of 64"));
        }
        assert_eq!(ask(7, 0, 64), Err(Error::NoSuchSlot(SlotId(7))));
        assert_eq!(s.world.stage2.log_status().outstanding, None);
        for range in RANGES.into_iter().chain([(0, PAGES), (1088, 5)]) {
            assert_eq!(harvest_range(s, range), set([]));
        }
        // One epoch, one range.
        let epoch = s.take_range(0, 0, 64);
        for (first, pages) in [(64, 64), (0, 128)] {
            let other = s.op("take_range", |stage2| {
                stage2.take_range(epoch, SlotId(0), first, pages)
            });
            assert_eq!(other, Err(Error::EpochOutstanding(epoch)));
        }
        let whole = s.op("take", |stage2| stage2.take(epoch));
        assert_eq!(whole, Err(Error::EpochOutstanding(epoch)));
        s.commit(epoch);
    });
    conclude(sim);
}

/// KVM's CLEAR: the range's bits go and its pages are tracked anew, and no others.
#[test]
fn an_epoch_of_a_range_leaves_the_rest_as_it_was() {
    for (engine, features) in engines() {
        let sim = vm(Setup::new(features, 1).calm());
        sim.alone(|s| {
            s.map_ahead(0).unwrap();
            s.start(engine, Granularity::Page);
            let written = [3, 63, 64, 600, 1090];
            written.iter().for_each(|number| s.write(page(*number)));
            assert_eq!(harvest_range(s, (0, 64)), set([page(3), page(63)]));
            assert_eq!(harvest_range(s, (0, 64)), set([]));
            s.write(page(3));
            assert_eq!(harvest_range(s, (1024, 69)), set([page(1090)]));
            assert_eq!(s.harvest(), set([3, 64, 600].map(page)));
        });
        conclude(sim);
    }
}

/// What an aborted epoch held comes with the next of the same pages, and with no other.
#[test]
fn invariant_19_an_aborted_range_is_told_by_the_next_of_its_pages() {
    for (engine, features) in engines() {
        let sim = vm(Setup::new(features, 1).calm());
        sim.alone(|s| {
            s.map_ahead(0).unwrap();
            s.start(engine, Granularity::Page);
            [3, 70, 600]
                .iter()
                .for_each(|number| s.write(page(*number)));
            let whole = s.take();
            s.abort(whole);
            assert_eq!(harvest_range(s, (512, 256)), set([page(600)]));
            let part = s.take_range(0, 0, 64);
            s.abort(part);
            assert_eq!(harvest_range(s, (64, 448)), set([page(70)]));
            s.write(page(3));
            assert_eq!(harvest_range(s, (0, 64)), set([page(3)]));
            assert_eq!(s.harvest(), set([]));
        });
        conclude(sim);
    }
}

/// A dirty block is clean again after the first range of it, and its other pages are told all the same.
#[test]
fn invariant_06_a_block_that_was_taken_in_part_is_told_whole_in_the_end() {
    for (engine, features) in engines() {
        for granularity in [Granularity::Adaptive, Granularity::Block] {
            let sim = vm(Setup::new(features, 1).calm());
            sim.alone(|s| {
                s.map_ahead(0).unwrap();
                s.start(engine, granularity);
                s.write(page(700));
                let part = span(page(512), 256 * PAGE_SIZE);
                assert_eq!(harvest_range(s, (512, 256)), part);
                assert_eq!(harvest_range(s, (512, 256)), set([]));
                let rest = span(page(768), 256 * PAGE_SIZE);
                assert_eq!(harvest_range(s, (768, 256)), rest);
                assert_eq!(s.harvest(), set([]));
            });
            conclude(sim);
        }
    }
}

/// Starting arms nothing: no fault, no table, no invalidation, and every page is reported once.
#[test]
fn a_log_that_begins_dirty_arms_what_is_taken_and_nothing_before() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let sim = vm(Setup::new(features, 1).calm());
            sim.alone(|s| {
                s.map_ahead(0).unwrap();
                let stage2 = &s.world.stage2;
                let (before, tables) = (stage2.counters(), stage2.mappings());
                s.start_all_dirty(engine, granularity);
                (0..PAGES)
                    .step_by(7)
                    .for_each(|number| s.write(page(number)));
                assert_eq!(stage2.counters(), before, "something was done");
                assert_eq!(stage2.mappings(), tables);
                assert_eq!(stage2.log_status().live_pages, PAGES);
                // In any order: what follows is armed or not, whatever was taken before.
                for index in [2, 0, 4, 1, 3] {
                    let (first, pages) = RANGES[index];
                    let all = span(page(first), pages * PAGE_SIZE);
                    assert_eq!(harvest_range(s, (first, pages)), all);
                    s.write(page(first));
                    let again = harvest_range(s, (first, pages));
                    assert!(again.contains(&page(first)), "{first} was not armed");
                }
                s.harvest();
                assert!(s.world.leaves().iter().all(|leaf| leaf.2.is_clean()));
            });
            conclude(sim);
        }
    }
}

/// Ranges taken in order arm all there is, and then harvests look at no more than in any other log.
#[test]
fn once_all_was_taken_the_log_is_like_any_other() {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        s.map_ahead(0).unwrap();
        s.start_all_dirty(Engine::WriteProtect, Granularity::Page);
        for range in RANGES {
            assert_eq!(harvest_range(s, range).len() as u64, range.1);
        }
        let before = s.world.stage2.counters().leaves_read;
        s.write(page(5));
        assert_eq!(s.harvest(), set([page(5)]));
        assert_eq!(s.world.stage2.counters().leaves_read, before);
    });
    conclude(sim);
}

/// A hole is reported too, and what is mapped there later is armed from birth.
#[test]
fn memory_that_is_not_mapped_is_dirty_once_as_well() {
    for (engine, features) in engines() {
        let sim = vm(Setup::new(features, 1).calm());
        sim.alone(|s| {
            s.start_all_dirty(engine, Granularity::Page);
            s.write(page(600));
            assert_eq!(harvest_range(s, (0, 64)), span(page(0), 64 * PAGE_SIZE));
            s.write(page(1));
            assert_eq!(s.harvest().len() as u64, PAGES - 64 + 1);
            s.write(page(600));
            assert_eq!(s.harvest(), set([page(600)]));
            s.map_ahead(0).unwrap();
        });
        sim.alone(|s| {
            s.last_round();
            s.stop();
        });
        sim.end();
    }
}

/// Ranges, whole epochs, aborts and changes of engine, while guests write everywhere.
#[test]
fn invariant_01_ranges_in_any_order_lose_nothing() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for seed in 0..12 {
                let sim = vm(Setup {
                    every: [Some(2), Some(9), Some(60)][seed as usize % 3],
                    ..Setup::new(features, seed)
                });
                let s = &sim;
                s.alone(|s| {
                    if seed % 4 > 0 {
                        s.map_ahead(0).unwrap();
                    }
                });
                let manager = Box::new(|| {
                    if seed % 3 == 0 {
                        s.start(engine, granularity);
                    } else {
                        s.start_all_dirty(engine, granularity);
                    }
                    for turn in 0..10 {
                        let (first, pages) = RANGES[s.roll(5) as usize];
                        let epoch = match s.roll(6) {
                            0 => s.take(),
                            _ => s.take_range(0, first, pages),
                        };
                        s.copy(epoch);
                        s.breathe();
                        match s.roll(4) {
                            0 => s.abort(epoch),
                            _ => s.commit(epoch),
                        }
                        if turn == 5 && engine == Engine::Dbm {
                            let other = Engine::WriteProtect;
                            s.op("set_engine", |stage2| stage2.set_engine(other))
                                .unwrap();
                        }
                    }
                });
                s.run(vec![manager, guest(s, 40), guest(s, 40)]);
                s.alone(|s| {
                    s.map_ahead(0).unwrap();
                    s.guest(page(0), FaultAccess::Read).unwrap();
                });
                sim.conclude();
            }
        }
    }
}

/// Memory that is added to such a log, and memory that the guest may only read: the host has neither.
#[test]
fn every_slot_begins_dirty() {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        let other = |id: u16, access| Place {
            id,
            ipa: IPA + u64::from(id) * 16 * MIB,
            pages: 70,
            access,
            pa: RAM + u64::from(id) * 16 * MIB,
        };
        s.add(other(1, Access::ReadOnly));
        s.map_ahead(0).unwrap();
        s.start_all_dirty(Engine::Dbm, Granularity::Page);
        s.add(other(2, Access::ReadWrite));
        assert_eq!(s.harvest().len() as u64, PAGES + 2 * 70);
        assert_eq!(s.harvest(), set([]));
    });
    conclude(sim);
}

/// In a log of all slots each can be harvested for itself, as if it had a log of its own.
#[test]
fn each_slot_has_epochs_of_its_own() {
    for (engine, features) in engines() {
        let sim = vm(Setup::new(features, 1).calm());
        sim.alone(|s| {
            let other = IPA + 16 * MIB;
            s.add(Place {
                id: 1,
                ipa: other,
                pages: 70,
                access: Access::ReadWrite,
                pa: RAM + 16 * MIB,
            });
            s.map_ahead(0).unwrap();
            s.start(engine, Granularity::Page);
            s.write(page(3));
            s.write(other);
            let epoch = s.take_range(1, 0, 70);
            assert_eq!(s.copy(epoch), set([other]));
            // The other slot's waits.
            let refused = s.op("take_range", |stage2| {
                stage2.take_range(s.world.new_epoch(), SlotId(0), 0, PAGES)
            });
            assert_eq!(refused, Err(Error::EpochOutstanding(epoch)));
            s.commit(epoch);
            let epoch = s.take_range(1, 0, 70);
            assert_eq!(s.copy(epoch), set([]));
            s.commit(epoch);
            assert_eq!(harvest_range(s, (0, PAGES)), set([page(3)]));
        });
        conclude(sim);
    }
}

/// A block that an epoch of some of its pages found dirty is told of whole: in front of them and behind them by the
/// next epoch.
#[test]
fn what_a_block_has_beside_a_part_stays_live_on_both_sides() {
    for engine in [Engine::Dbm, Engine::WriteProtect] {
        let world = World::sized(dbm(), 39, 64, 2);
        world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
        world.map_all(0);
        world.start(engine, Granularity::Block);
        world.write(0, IPA);
        let part = span(IPA + 128 * PAGE_SIZE, 128 * PAGE_SIZE);
        let epoch = world.new_epoch();
        finish(|| world.stage2.take_range(epoch, SlotId(0), 128, 128)).unwrap();
        assert_eq!(world.read_epoch(epoch), part);
        world.stage2.commit(epoch).unwrap();
        assert_eq!(world.harvest(), &span(IPA, 2 * MIB) - &part, "{engine:?}");
    }
}

/// In a log that began with every page dirty, so does a slot that is added to it.
#[test]
fn a_slot_that_comes_to_a_log_that_began_dirty_is_dirty() {
    let world = World::sized(dbm(), 39, 64, 2);
    finish(|| {
        let stage2 = &world.stage2;
        stage2.start_log_all_dirty(Engine::WriteProtect, Granularity::Page)
    })
    .unwrap();
    world.slot(0, IPA, 100, Access::ReadWrite, RAM);
    assert_eq!(world.harvest(), span(IPA, 100 * PAGE_SIZE));
    assert!(world.harvest().is_empty());
}
