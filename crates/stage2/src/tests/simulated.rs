//! The invariants, in simulated runs: guests that write while EL2 works, in as many orders as there are
//! seeds, watched at every step (see [`sim`](super::sim)). What a single thread can check is in
//! `invariants`, what needs the exact moment in `races`.
//!
//! Seeds are fixed: each of these tests does the same thing every time (`TIDEMARK_FIRST_SEED` takes other
//! ones). And each check was seen to fail: by a plant (`plants/`), or here, by a test that breaks the rule
//! itself.

mod machine;
mod tables;

use super::sim::*;
use super::world::*;
use crate::fake::{Guest, Machine, Speculation, Stage1};
use crate::pte::{CLEAR_WRITE, Permission, Pte};
use crate::sync::atomic::Ordering;
use crate::types::*;
use crate::{FaultAccess, Features, Outcome, Stage2, Support};
use std::boxed::Box;
use std::collections::BTreeSet;
use std::string::ToString;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

const GRANULARITIES: [Granularity; 3] =
    [Granularity::Page, Granularity::Adaptive, Granularity::Block];

/// Two blocks and a tail.
const PAGES: u64 = 2 * P2M + 5;

/// Few pages, so that the CPUs meet.
const HOT: [u64; 8] = [0, 1, 63, 511, 512, 600, 1023, 1028];

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn ram(access: Access) -> Place {
    Place {
        id: 0,
        ipa: IPA,
        pages: PAGES,
        access,
        pa: RAM,
    }
}

/// A VM with one slot, nothing mapped.
fn vm(setup: Setup) -> Arc<Sim> {
    let sim = Sim::new(setup);
    sim.alone(|sim| sim.add(ram(Access::ReadWrite)));
    sim
}

/// A guest that writes hot pages and reads some.
fn guest<'a>(sim: &'a Sim, accesses: usize) -> Box<dyn FnOnce() + Send + 'a> {
    Box::new(move || {
        for _ in 0..accesses {
            let ipa = page(HOT[sim.roll(HOT.len() as u64) as usize]);
            if sim.roll(5) == 0 {
                sim.read(ipa);
            } else {
                sim.write(ipa);
            }
            sim.breathe();
        }
    })
}

/// How often CPUs take turns: at nearly every access to memory, or seldom.
fn pace(seed: u64) -> Option<u32> {
    [Some(2), Some(7), Some(30), Some(200), Some(1500)][seed as usize % 5]
}

/// So many seeds: the same ones every time, or others if a soak says where they begin.
fn seeds_from(count: u64) -> std::ops::Range<u64> {
    let first = super::from_env("TIDEMARK_FIRST_SEED").unwrap_or(0);
    first..first + count
}

fn setups(engine_features: Features, seeds: u64) -> impl Iterator<Item = Setup> {
    seeds_from(seeds).map(move |seed| Setup {
        every: pace(seed),
        ..Setup::new(engine_features, seed)
    })
}

/// The message of the panic that `run` must end in.
fn refused(run: impl FnOnce()) -> std::string::String {
    let end = quietly(|| std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)));
    let cause = end.expect_err("it must be refused");
    let text = cause.downcast_ref::<std::string::String>().cloned();
    text.unwrap_or_else(|| cause.downcast_ref::<&str>().unwrap_or(&"").to_string())
}

#[test]
fn invariant_01_in_whatever_order_nothing_is_lost() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 25) {
                let sim = vm(setup);
                let s = &sim;
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    (0..3).for_each(|_| drop(s.harvest()));
                });
                s.run(vec![manager, guest(s, 40), guest(s, 40)]);
                sim.conclude();
            }
        }
    }
}

/// A guest touches one new table after the other while the host harvests: the fault maps the page dirty
/// and notes it, and the harvest walks by and sees a hole. Each page is written once more later.
#[test]
fn invariant_01_a_hole_that_is_mapped_during_a_harvest_loses_nothing() {
    const TABLES: u64 = 12;
    for (engine, features) in engines() {
        for setup in setups(features, 40) {
            let sim = Sim::new(Setup {
                every: Some(1 + setup.seed as u32 % 7),
                ..setup
            });
            let s = &sim;
            s.alone(|s| {
                // One page off, so that every 2 MiB are a table of pages.
                s.add(Place {
                    pages: TABLES * P2M,
                    pa: RAM + PAGE_SIZE,
                    ..ram(Access::ReadWrite)
                });
                s.start(engine, Granularity::Page);
            });
            let toucher = |odd: u64| {
                Box::new(move || {
                    for table in (odd..TABLES).step_by(2) {
                        s.write(page(table * P2M));
                        s.pause();
                        s.write(page(table * P2M));
                    }
                    (odd..TABLES).for_each(|table| s.write(page(table * P2M)));
                })
            };
            let manager = Box::new(|| (0..8).for_each(|_| drop(s.harvest())));
            s.run(vec![manager, toucher(0), toucher(1)]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_01_a_write_nobody_knows_of_ends_the_run() {
    let sim = vm(Setup::new(dbm(), 1));
    sim.alone(|sim| {
        sim.start(Engine::Dbm, Granularity::Page);
        // Mapped by this, which leaves a bit; the second time only the leaf knows.
        sim.write(page(3));
        sim.harvest();
        sim.write(page(3));
        sim.stop_guests();
    });
    let why = refused(|| {
        sim.alone(|sim| {
            // Cleaned, and noted nowhere.
            sim.op("forgets", |_| {
                let entry = sim.world.entry(page(3));
                entry.fetch_and(CLEAR_WRITE, Ordering::SeqCst)
            });
        });
    });
    assert!(why.contains("nothing knows"), "{why}");
}

#[test]
fn invariant_02_a_plain_store_to_a_live_descriptor_ends_the_run() {
    let sim = vm(Setup::new(dbm(), 1));
    sim.alone(|sim| {
        sim.start(Engine::Dbm, Granularity::Page);
        sim.read(page(3));
    });
    let why = refused(|| {
        sim.alone(|sim| {
            let entry = sim.world.entry(page(3));
            let same = entry.load(Ordering::SeqCst);
            entry.store(same, Ordering::SeqCst);
        });
    });
    assert!(why.contains("a plain store"), "{why}");
}

/// Every access of the engine may be followed by one of the hardware's, and updates come late.
#[test]
fn invariant_02_the_hardware_comes_between_any_two_steps_and_loses_nothing() {
    for granularity in GRANULARITIES {
        for seed in seeds_from(60) {
            let sim = vm(Setup {
                every: Some(1 + seed as u32 % 3),
                ..Setup::new(dbm(), seed)
            });
            let s = &sim;
            s.alone(|sim| sim.start(Engine::Dbm, granularity));
            let manager = Box::new(|| {
                s.harvest();
                s.world.stage2.set_engine(Engine::WriteProtect).unwrap();
                s.harvest();
                s.world.stage2.set_engine(Engine::Dbm).unwrap();
                s.harvest();
            });
            s.run(vec![manager, guest(s, 60), guest(s, 60)]);
            sim.conclude();
        }
    }
}

/// The host copies the moment it may, and the guest goes on writing through whatever its TLBs hold.
#[test]
fn invariant_03_the_host_may_copy_the_moment_a_take_is_done() {
    for (engine, features) in engines() {
        // One page by address, several by range or by address, many by VMID.
        for count in [1, 3, 40, 200] {
            for whims in [None, Some(Speculation::Never)] {
                let sim = vm(Setup {
                    whims,
                    ..Setup::new(features, count)
                });
                let s = &sim;
                let write_all = |cpu: usize| {
                    s.world.machine.become_pe(cpu);
                    (0..count).for_each(|number| s.write(page(number)));
                };
                s.alone(|s| {
                    s.map_ahead(0).unwrap();
                    s.start(engine, Granularity::Page);
                    for _ in 0..3 {
                        write_all(1);
                        write_all(2);
                        s.world.machine.become_pe(0);
                        let epoch = s.take();
                        s.copy(epoch);
                        write_all(2);
                        write_all(1);
                        s.world.machine.become_pe(0);
                        s.commit(epoch);
                    }
                });
                sim.conclude();
            }
        }
    }
}

/// EL2 marks pages, each once, in words that a take is moving.
#[test]
fn invariant_04_a_mark_that_races_a_take_lands_in_this_round_or_the_next() {
    for (engine, features) in engines() {
        for setup in setups(features, 60) {
            let sim = vm(Setup {
                every: Some(1 + setup.seed as u32 % 9),
                ..setup
            });
            let s = &sim;
            s.alone(|s| {
                s.map_ahead(0).unwrap();
                s.start(engine, GRANULARITIES[setup.seed as usize % 3]);
            });
            let marks = |odd: u64| {
                Box::new(move || {
                    for number in 0..40 {
                        s.el2_write(page(2 * number + odd));
                        s.breathe();
                    }
                })
            };
            let manager = Box::new(|| (0..8).for_each(|_| drop(s.harvest())));
            s.run(vec![manager, marks(0), marks(1)]);
            sim.conclude();
        }
    }
}

/// Hardware that makes pages dirty for accesses that never happen: more is reported, nothing less.
#[test]
fn invariant_10_more_may_be_reported_and_never_less() {
    let mut more = 0;
    for granularity in GRANULARITIES {
        for mut setup in setups(dbm(), 40) {
            setup.whims = Some(Speculation::Sometimes);
            let sim = vm(setup);
            let s = &sim;
            let reader = Box::new(|| {
                for _ in 0..40 {
                    s.read(page(100 + s.roll(3)));
                    s.breathe();
                }
            });
            let mut reported = BTreeSet::new();
            let manager = Box::new(|| {
                s.start(Engine::Dbm, granularity);
                (0..3).for_each(|_| reported.extend(s.harvest()));
            });
            s.run(vec![manager, guest(s, 40), reader]);
            let extra = |ipa: &u64| granularity == Granularity::Page && *ipa >= page(100);
            more += reported.iter().filter(|ipa| extra(ipa)).count();
            s.alone(|s| {
                s.last_round();
                s.stop();
            });
            sim.end();
        }
    }
    assert!(more > 0, "nobody speculated");
}

#[test]
fn invariant_18_a_write_by_el2_that_is_not_marked_ends_the_run() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let sim = vm(Setup::new(features, 1));
            sim.alone(|sim| {
                sim.start(engine, granularity);
                sim.el2_write(page(5));
                assert!(sim.harvest().contains(&page(5)));
            });
            let why = refused(|| sim.alone(|sim| sim.hidden_write(page(5))));
            assert!(why.contains("nothing knows"), "{why}");
        }
    }
}

/// The host fails at any moment: what it had of an epoch comes again, and is copied as it is then.
#[test]
fn invariant_19_an_epoch_that_fails_comes_again() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 15) {
                let sim = Sim::new(setup);
                let s = &sim;
                s.alone(|s| {
                    // More than one step of a take can see.
                    s.add(Place {
                        pages: 6 * P2M,
                        ..ram(Access::ReadWrite)
                    })
                });
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    for round in 0..6 {
                        let epoch = s.world.new_epoch();
                        let steps = [1, 2, 3, u64::MAX][s.roll(4) as usize];
                        let mut done = Progress::More { done: 0, total: 0 };
                        for _ in 0..steps {
                            done = s.take_step(epoch, None).unwrap();
                            if done == Progress::Done {
                                break;
                            }
                            s.pause();
                        }
                        if done == Progress::Done {
                            s.copy(epoch);
                        }
                        if done != Progress::Done || round % 2 == 0 {
                            s.abort(epoch);
                        } else {
                            s.commit(epoch);
                        }
                    }
                });
                s.run(vec![manager, guest(s, 50), guest(s, 50)]);
                sim.conclude();
            }
        }
    }
}

/// The same programs on every machine and engine: the same pages are reported, and the copy is the same.
#[test]
fn invariant_21_every_machine_and_engine_reports_the_same() {
    for granularity in GRANULARITIES {
        for seed in 0..5 {
            let run = |engine, features| {
                let sim = vm(Setup::new(features, seed).calm());
                let s = &sim;
                let mut rounds: Vec<BTreeSet<u64>> = Vec::new();
                s.alone(|s| {
                    s.start(engine, granularity);
                    for round in 0..5 {
                        for cpu in 0..3 {
                            s.world.machine.become_pe(cpu);
                            (0..10).for_each(|_| s.write(page(s.roll(PAGES))));
                            s.read(page(s.roll(PAGES)));
                        }
                        s.world.machine.become_pe(0);
                        if round == 2 {
                            let epoch = s.take();
                            s.copy(epoch);
                            s.abort(epoch);
                        }
                        s.el2_write(page(s.roll(PAGES)));
                        rounds.push(s.harvest());
                    }
                });
                let memory = s.copied();
                sim.conclude();
                (rounds, memory)
            };
            let (engine, features) = engines()[0];
            let reference = run(engine, features);
            for (engine, features) in engines() {
                assert_eq!(run(engine, features), reference, "{engine:?} {features:?}");
            }
        }
    }
}
