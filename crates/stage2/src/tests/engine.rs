//! The engine is changed while a log is on: by request, or because few pages are left.
//!
//! Nothing is lost in simulated runs, and the harvest that matters reads no leaf.

use super::sim::*;
use super::world::*;
use crate::fake::Machine;
use crate::types::*;
use crate::{Error, Features};
use std::boxed::Box;
use std::sync::Arc;
use std::vec;

const IPA: u64 = 0x4000_0000;

/// Two blocks and a tail.
const PAGES: u64 = 2 * P2M + 5;

/// Few pages, so that the CPUs meet.
const HOT: [u64; 8] = [0, 1, 63, 511, 512, 600, 1023, 1028];

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn vm(setup: Setup) -> Arc<Sim> {
    Sim::with_ram(setup, IPA, PAGES)
}

fn bring_over(sim: &Sim) {
    sim.finish("bring_over", |stage2| stage2.bring_over())
        .unwrap();
}

fn engine(sim: &Sim) -> Engine {
    sim.world.stage2.log_status().mode.unwrap().engine
}

fn leaves_read(sim: &Sim) -> u64 {
    sim.world.stage2.counters().leaves_read
}

fn guest<'a>(sim: &'a Sim, accesses: usize) -> Box<dyn FnOnce() + Send + 'a> {
    Box::new(move || {
        for _ in 0..accesses {
            let ipa = page(HOT[sim.roll(HOT.len() as u64) as usize]);
            sim.write(ipa);
            sim.breathe();
        }
    })
}

/// Leaves are brought over while guests write them, the hardware changes them, and harvests come and
/// are given up in between.
#[test]
fn leaves_change_their_engine_under_fire_and_lose_nothing() {
    for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
        for seed in 0..60 {
            let sim = vm(Setup {
                every: Some(1 + seed as u32 % 9),
                ..Setup::new(Machine::everything(), seed)
            });
            let s = &sim;
            s.alone(|s| {
                s.map_ahead(0).unwrap();
                s.start(Engine::Dbm, granularity);
            });
            let manager = Box::new(|| {
                for turn in 0..6 {
                    let engine = [Engine::WriteProtect, Engine::Dbm][turn % 2];
                    s.op("set_engine", |stage2| stage2.set_engine(engine))
                        .unwrap();
                    if s.roll(3) > 0 {
                        bring_over(s);
                    }
                    match s.roll(3) {
                        0 => drop(s.harvest()),
                        1 => {
                            let epoch = s.take();
                            s.abort(epoch);
                        }
                        _ => s.breathe(),
                    }
                }
                s.op("set_engine", |stage2| {
                    stage2.set_engine(Engine::WriteProtect)
                })
                .unwrap();
                bring_over(s);
                s.harvest();
            });
            s.run(vec![manager, guest(s, 60), guest(s, 60)]);
            sim.conclude();
        }
    }
}

/// A page that the hardware made dirty, and a fault, and nobody: each is what it was, of another engine.
#[test]
fn what_was_dirty_stays_so_and_what_was_clean_too() {
    for (from, to) in [
        (Engine::Dbm, Engine::WriteProtect),
        (Engine::WriteProtect, Engine::Dbm),
    ] {
        let sim = vm(Setup::new(Machine::everything(), 3).calm());
        sim.alone(|s| {
            s.map_ahead(0).unwrap();
            s.start(from, Granularity::Page);
            s.write(page(7));
            s.harvest();
            s.write(page(9));
            s.op("set_engine", |stage2| stage2.set_engine(to)).unwrap();
            bring_over(s);
            for (_, _, pte) in s.world.leaves() {
                assert_eq!(pte.engine(), to);
            }
            s.write(page(11));
            assert_eq!(s.harvest(), set([page(9), page(11)]));
            s.write(page(9));
            assert_eq!(s.harvest(), set([page(9)]));
        });
        sim.conclude();
    }
}

/// The late switch: few pages, and the next harvests, the last one too, read no leaf of any table.
/// Many pages, and the hardware has it again.
#[test]
fn few_pages_are_harvested_without_a_look_at_a_table() {
    let sim = vm(Setup::new(Machine::everything(), 5).calm());
    sim.alone(|s| {
        s.map_ahead(0).unwrap();
        s.start(Engine::Dbm, Granularity::Page);
        let adapt = || {
            s.op("adapt_engine", |stage2| stage2.adapt_engine())
                .unwrap()
        };
        // Many pages: 3 are more than 1029 / 512.
        (0..3).for_each(|number| s.write(page(number)));
        s.harvest();
        assert_eq!(adapt(), Engine::Dbm);
        assert_eq!(leaves_read(s), PAGES);
        // One is few.
        s.write(page(5));
        s.harvest();
        assert_eq!(adapt(), Engine::WriteProtect);
        bring_over(s);
        let before = leaves_read(s);
        for _ in 0..3 {
            (100..108).for_each(|number| s.write(page(number)));
            assert_eq!(s.harvest(), (100..108).map(page).collect());
            // Between the limits.
            assert_eq!(adapt(), Engine::WriteProtect);
        }
        s.last_round();
        assert_eq!(leaves_read(s), before, "a late harvest looked at leaves");
        // Nothing was asked since: the judgement is used up.
        adapt();
        assert_eq!(adapt(), Engine::WriteProtect);
        (0..9).for_each(|number| s.write(page(number)));
        s.harvest();
        assert_eq!(adapt(), Engine::Dbm);
        (0..3).for_each(|number| s.write(page(number)));
        // Not brought over: the harvest does it.
        assert_eq!(s.harvest(), (0..3).map(page).collect());
        for (_, _, pte) in s.world.leaves() {
            assert_eq!(pte.engine(), Engine::Dbm);
        }
    });
    sim.conclude();
}

/// Whole migrations as a host runs them, whatever the guest does in between: the policy decides, and
/// the copy is the memory.
#[test]
fn the_engine_follows_the_guest_and_nothing_is_lost() {
    let mut changes = 0;
    for seed in 0..40 {
        let sim = vm(Setup::new(Machine::everything(), seed));
        let s = &sim;
        s.alone(|s| {
            s.map_ahead(0).unwrap();
            s.start(Engine::Dbm, Granularity::Page);
        });
        let mut last = Engine::Dbm;
        let manager = Box::new(|| {
            for _ in 0..8 {
                (0..s.roll(40)).for_each(|_| s.pause());
                s.harvest();
                let now = s
                    .op("adapt_engine", |stage2| stage2.adapt_engine())
                    .unwrap();
                changes += u32::from(now != last);
                last = now;
                if s.roll(2) == 0 {
                    bring_over(s);
                }
            }
        });
        // Now this page or that, now dozens.
        let moody = || {
            for _ in 0..8 {
                let pages = [1, 40][s.roll(2) as usize];
                let from = s.roll(PAGES - pages);
                (from..from + pages).for_each(|number| s.write(page(number)));
                (0..s.roll(9)).for_each(|_| s.pause());
            }
        };
        s.run(vec![manager, Box::new(moody), Box::new(moody)]);
        sim.conclude();
    }
    assert!(changes > 40, "{changes} changes of engine: that is no test");
}

#[test]
fn a_machine_without_dirty_state_stays_with_faults() {
    let sim = vm(Setup::new(Features::BASELINE, 1).calm());
    sim.alone(|s| {
        let refused = s.op("adapt_engine", |stage2| stage2.adapt_engine());
        assert_eq!(refused, Err(Error::NotLogging));
        let refused = s.op("bring_over", |stage2| stage2.bring_over());
        assert_eq!(refused, Err(Error::NotLogging));
        s.start(Engine::WriteProtect, Granularity::Page);
        (0..100).for_each(|number| s.write(page(number)));
        s.harvest();
        let now = s.op("adapt_engine", |stage2| stage2.adapt_engine());
        assert_eq!(now, Ok(Engine::WriteProtect));
        let refused = s.op("set_engine", |stage2| stage2.set_engine(Engine::Dbm));
        assert_eq!(refused, Err(Error::EngineUnavailable));
        assert_eq!(engine(s), Engine::WriteProtect);
        assert_eq!(leaves_read(s), 0);
    });
    sim.conclude();
}

/// A harvest that has begun brings leaves over itself; one that was given up leaves the rest to do.
#[test]
fn a_harvest_in_between_finishes_what_was_begun() {
    let sim = vm(Setup::new(Machine::everything(), 9).calm());
    sim.alone(|s| {
        s.map_ahead(0).unwrap();
        s.start(Engine::Dbm, Granularity::Page);
        s.write(page(600));
        s.op("set_engine", |stage2| {
            stage2.set_engine(Engine::WriteProtect)
        })
        .unwrap();
        let step = s.op("bring_over", |stage2| stage2.bring_over()).unwrap();
        assert_ne!(step, Progress::Done, "one step is all: this is no test");
        let epoch = s.world.new_epoch();
        s.take_step(epoch, None).unwrap();
        let busy = s.op("set_engine", |stage2| stage2.set_engine(Engine::Dbm));
        assert_eq!(busy, Err(Error::TakeUnfinished(epoch)));
        assert_eq!(
            s.op("bring_over", |stage2| stage2.bring_over()),
            Ok(Progress::Done)
        );
        s.abort(epoch);
        bring_over(s);
        assert!(
            s.world
                .leaves()
                .iter()
                .all(|leaf| leaf.2.engine() == Engine::WriteProtect)
        );
        assert_eq!(s.harvest(), set([page(600)]));
    });
    sim.conclude();
}

/// The log began with every page dirty, and its first half is armed for the hardware when the engine becomes
/// write protection: what the hardware finds there, no bit says, and only a look at every leaf does.
#[test]
fn a_half_that_was_armed_for_the_hardware_is_looked_at_after_a_change() {
    for (first, second) in [
        ((0, P2M), (P2M, PAGES - P2M)),
        ((P2M, PAGES - P2M), (0, P2M)),
    ] {
        let sim = vm(Setup::new(Machine::everything(), 11).calm());
        sim.alone(|s| {
            let take = |(first, pages)| {
                let epoch = s.take_range(0, first, pages);
                assert_eq!(s.copy(epoch).len() as u64, pages);
                s.commit(epoch);
            };
            s.map_ahead(0).unwrap();
            s.start_all_dirty(Engine::Dbm, Granularity::Page);
            take(first);
            s.op("set_engine", |stage2| {
                stage2.set_engine(Engine::WriteProtect)
            })
            .unwrap();
            let written = page(first.0 + 3);
            s.write(written);
            take(second);
            assert_eq!(s.harvest(), set([written]));
            assert!(
                s.world
                    .leaves()
                    .iter()
                    .all(|leaf| leaf.2.engine() == Engine::WriteProtect)
            );
        });
        sim.conclude();
    }
}

/// An epoch of some pages brings over those and no others.
#[test]
fn a_part_leaves_the_rest_to_be_brought_over() {
    for part in [(0, P2M), (P2M, P2M), (2 * P2M, 5)] {
        let sim = vm(Setup::new(Machine::everything(), 12).calm());
        sim.alone(|s| {
            s.map_ahead(0).unwrap();
            s.start(Engine::Dbm, Granularity::Page);
            s.op("set_engine", |stage2| {
                stage2.set_engine(Engine::WriteProtect)
            })
            .unwrap();
            let written = [3, P2M + 3, 2 * P2M + 3].map(page);
            written.into_iter().for_each(|ipa| s.write(ipa));
            let (first, pages) = part;
            let epoch = s.take_range(0, first, pages);
            let taken = s.copy(epoch);
            assert_eq!(taken, set([page(first + 3)]));
            s.commit(epoch);
            let rest = written.into_iter().filter(|ipa| !taken.contains(ipa));
            assert_eq!(s.harvest(), rest.collect());
        });
        sim.conclude();
    }
}

/// Changed back half way: what was brought over to the other engine comes back too, else no harvest by live bits
/// would find what the hardware notes there.
#[test]
fn an_engine_that_is_changed_back_half_way_has_all_leaves() {
    let sim = vm(Setup::new(Machine::everything(), 13).calm());
    sim.alone(|s| {
        s.map_ahead(0).unwrap();
        s.start(Engine::WriteProtect, Granularity::Page);
        let change = |engine| {
            s.op("set_engine", |stage2| stage2.set_engine(engine))
                .unwrap();
        };
        change(Engine::Dbm);
        let step = s.op("bring_over", |stage2| stage2.bring_over()).unwrap();
        assert_ne!(step, Progress::Done, "one step is all: this is no test");
        change(Engine::WriteProtect);
        bring_over(s);
        for number in [3, PAGES - 1] {
            s.write(page(number));
            assert_eq!(s.harvest(), set([page(number)]));
        }
    });
    sim.conclude();
}
