//! Every order, of small scenarios: two CPUs at the same page, interrupted at most twice wherever they
//! may meet (in front of an access to its descriptors and bits, at barriers, invalidations and
//! allocations), and handing over for free where they wait. The watchers of [`sim`](super::sim) look on.
//!
//! Unlike a random run this one cannot miss an order by chance, and unlike loom it has TLBs. What it has
//! not is a weak memory model: for that there is `loom`.
//!
//! `TIDEMARK_INTERRUPTIONS` says how many interruptions (2 without it). What is found with fewer is found with more:
//! the orders with one are among those with two.

mod slots;

use super::sim::*;
use super::world::*;
use crate::fake::Speculation;
use crate::fake::scheduler::{Path, Program};
use crate::pte::Kind;
use crate::slot::{LeavesOf, Life, Slot};
use crate::sync::atomic::Ordering;
use crate::types::*;
use crate::{Error, Features, Support};
use std::boxed::Box;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

/// A slot of two pages, which lie in one word of the bitmaps and in one table.
const SMALL: Place = Place {
    id: 0,
    ipa: IPA,
    pages: 2,
    access: Access::ReadWrite,
    pa: RAM,
};

/// One of a block.
const BLOCK: Place = Place {
    pages: P2M,
    ..SMALL
};

fn setup(features: Features) -> Setup {
    Setup {
        ipa_bits: 39,
        tables: 8,
        cpus: 2,
        ..Setup::new(features, 0).calm()
    }
}

/// Runs the programs that `programs` makes in every order, each time in a VM that `prepare` made, and
/// says how many there were. CPUs meet at `pages`, or, where there are none, at the control mutex.
fn in_every_order(
    setup: Setup,
    pages: &[u64],
    prepare: impl Fn(&Sim),
    programs: impl for<'a> Fn(&'a Sim) -> Vec<Program<'a>>,
    conclude: impl Fn(&Sim),
) {
    const USUAL: u64 = 2;
    let bound = super::from_env("TIDEMARK_INTERRUPTIONS").unwrap_or(USUAL);
    let mut path = Some(Path::first(bound as u32));
    let mut orders = 0;
    while let Some(this) = path {
        let sim = Sim::on(setup, this);
        sim.alone(&prepare);
        match pages {
            [] => sim.meet_at_the_mutex(),
            pages => sim.meet_at(pages),
        }
        sim.run(programs(&sim));
        let gone = sim.path().unwrap();
        sim.alone(&conclude);
        sim.end();
        path = gone.next();
        orders += 1;
    }
    std::eprintln!("{orders} orders");
    assert!(orders > 20 || bound < USUAL, "they do not meet: {orders}");
}

/// The guest writes these, with time between them.
fn writes(sim: &Sim, addresses: &[u64]) {
    for &ipa in addresses {
        sim.breathe();
        sim.write(ipa);
    }
}

/// A slot that is mapped and logged, and its first page written.
fn written(sim: &Sim, place: Place, engine: Engine, granularity: Granularity) {
    sim.add(place);
    sim.map_ahead(0).unwrap();
    sim.start(engine, granularity);
    sim.write(IPA);
}

fn machines() -> Vec<(Engine, Features)> {
    let bbm2 = Features {
        bbm2: Support::Present,
        ..dbm()
    };
    vec![
        (Engine::WriteProtect, Features::BASELINE),
        (Engine::Dbm, dbm()),
        (Engine::Dbm, bbm2),
    ]
}

/// A harvest and the hardware, which makes a page dirty once, and once more when it was cleaned. Under
/// write protection it is the fault handler.
#[test]
fn a_harvest_and_a_write() {
    for (engine, features) in machines() {
        for late in [None, Some(Speculation::Never)] {
            let setup = Setup {
                whims: late,
                ..setup(features)
            };
            in_every_order(
                setup,
                &[IPA],
                |sim| written(sim, SMALL, engine, Granularity::Page),
                move |sim| {
                    vec![
                        Box::new(move || (0..2).for_each(|_| drop(sim.harvest()))),
                        Box::new(move || writes(sim, &[IPA, IPA])),
                    ]
                },
                Sim::last_of_the_log,
            );
        }
    }
}

/// A harvest and the fault that maps the page it looks at.
#[test]
fn a_harvest_and_a_first_touch() {
    for (engine, features) in machines() {
        for granularity in [Granularity::Page, Granularity::Adaptive] {
            in_every_order(
                setup(features),
                &[IPA],
                |sim| {
                    sim.add(SMALL);
                    sim.start(engine, granularity);
                },
                move |sim| {
                    vec![
                        Box::new(move || drop(sim.harvest())),
                        Box::new(move || writes(sim, &[IPA])),
                    ]
                },
                Sim::last_of_the_log,
            );
        }
    }
}

/// The same where the page's table is there, being a neighbour's too: the fault puts the leaf straight into it.
#[test]
fn a_harvest_and_a_first_touch_in_a_table_of_two_slots() {
    const DOOR: u64 = IPA + 2 * PAGE_SIZE;
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[DOOR],
            |sim| {
                sim.add(SMALL);
                sim.map_ahead(0).unwrap();
                sim.start(engine, Granularity::Page);
                sim.add(Place {
                    id: 1,
                    ipa: DOOR,
                    pa: RAM + GIB,
                    ..SMALL
                });
            },
            move |sim| {
                vec![
                    Box::new(move || drop(sim.harvest())),
                    Box::new(move || writes(sim, &[DOOR])),
                ]
            },
            Sim::last_of_the_log,
        );
    }
}

/// A harvest of what `prepare` left unmapped, and a guest that fills it with a block; then a write to that, which
/// the next harvest must know.
fn a_hole_and_the_block_that_fills_it(features: Features, prepare: impl Fn(&Sim)) {
    in_every_order(
        setup(features),
        &[IPA],
        prepare,
        move |sim| {
            vec![
                Box::new(move || drop(sim.harvest())),
                Box::new(move || writes(sim, &[IPA, IPA + PAGE_SIZE])),
            ]
        },
        |sim| {
            sim.harvest();
            sim.write(IPA + 2 * PAGE_SIZE);
            sim.last_of_the_log();
        },
    );
}

/// A harvest that looks where EL2 wrote while nothing was mapped, and the fault that maps a block there.
#[test]
fn a_harvest_of_a_hole_and_the_block_that_fills_it() {
    for (engine, features) in machines() {
        for granularity in [Granularity::Block, Granularity::Adaptive] {
            a_hole_and_the_block_that_fills_it(features, |sim| {
                sim.add(BLOCK);
                sim.start(engine, granularity);
                sim.el2_write(IPA);
            });
        }
    }
}

/// A CPU that is still at a range whose epoch was given up sends what lies beside it to a later epoch.
#[test]
fn a_full_harvest_waits_for_a_straggler_of_a_range() {
    let far = IPA + 256 * PAGE_SIZE;
    in_every_order(
        setup(Features::BASELINE),
        &[IPA, far],
        |sim| {
            sim.add(BLOCK);
            sim.start(Engine::WriteProtect, Granularity::Block);
            sim.write(IPA);
            sim.write(far);
        },
        move |sim| {
            let first = sim.world.new_epoch();
            let part = crate::control::Part {
                slot: SlotId(0),
                first: 0,
                pages: 64,
            };
            vec![
                Box::new(move || {
                    for _ in 0..4 {
                        let _ = sim.take_step(first, Some(part));
                    }
                }),
                Box::new(move || {
                    sim.breathe();
                    sim.give_up(first);
                    sim.take();
                }),
            ]
        },
        |_| {},
    );
}

/// The same hole, with a harvest that brings leaves over to write protection.
#[test]
fn a_converting_harvest_of_a_hole_and_the_block_that_fills_it() {
    for switch in [false, true] {
        a_hole_and_the_block_that_fills_it(dbm(), |sim| {
            sim.add(BLOCK);
            if switch {
                sim.start(Engine::Dbm, Granularity::Block);
                sim.el2_write(IPA);
                sim.op("set_engine", |stage2| {
                    stage2.set_engine(Engine::WriteProtect)
                })
                .unwrap();
            } else {
                sim.start_all_dirty(Engine::WriteProtect, Granularity::Block);
            }
        });
    }
}

/// A dirty block that is split while the guest writes to it.
#[test]
fn a_split_and_a_write() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA],
            |sim| {
                sim.add(BLOCK);
                sim.start(engine, Granularity::Adaptive);
                sim.write(IPA + PAGE_SIZE);
            },
            move |sim| {
                vec![
                    Box::new(move || drop(sim.harvest())),
                    Box::new(move || writes(sim, &[IPA])),
                ]
            },
            Sim::last_of_the_log,
        );
    }
}

/// The same split, and nobody reports the block: the value that the exchange returned decides.
#[test]
fn a_split_alone_and_a_write() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA],
            |sim| {
                sim.add(BLOCK);
                sim.map_ahead(0).unwrap();
                sim.start(engine, Granularity::Block);
            },
            move |sim| {
                vec![
                    Box::new(move || {
                        sim.breathe();
                        sim.op("split", |stage2| {
                            let entry = sim.world.entry(IPA);
                            let old = stage2.split(entry, Level::L2, IPA, engine).unwrap();
                            if old.is_dirty() {
                                stage2.mark_dirty(Ipa::new(IPA), 2 * MIB).unwrap();
                            }
                        });
                    }),
                    Box::new(move || writes(sim, &[IPA])),
                ]
            },
            Sim::last_of_the_log,
        );
    }
}

/// EL2 marks a page while it is taken.
#[test]
fn a_harvest_and_a_mark() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA],
            |sim| {
                sim.add(SMALL);
                sim.map_ahead(0).unwrap();
                sim.start(engine, Granularity::Page);
                sim.el2_write(IPA);
            },
            move |sim| {
                vec![
                    Box::new(move || drop(sim.harvest())),
                    Box::new(move || {
                        sim.breathe();
                        // A page that the harvest takes anyway, and one that it knows by this alone.
                        sim.el2_write(IPA);
                        sim.el2_write(IPA + PAGE_SIZE);
                    }),
                ]
            },
            Sim::last_of_the_log,
        );
    }
}

/// Two CPUs take one epoch, and the host copies the moment either says it is done.
#[test]
fn two_harvests_and_the_host() {
    for (engine, features) in machines() {
        for (place, granularity) in [(SMALL, Granularity::Page), (BLOCK, Granularity::Adaptive)] {
            in_every_order(
                setup(features),
                &[IPA],
                |sim| written(sim, place, engine, granularity),
                move |sim| {
                    let take = move || {
                        while sim.take_step(Epoch(1), None) != Ok(Progress::Done) {
                            sim.pause();
                        }
                        let whole = match place.pages {
                            P2M => span(IPA, 2 * MIB),
                            _ => set([IPA]),
                        };
                        assert_eq!(sim.copy(Epoch(1)), whole, "said to be done, and was not");
                    };
                    vec![Box::new(take), Box::new(take)]
                },
                |sim| {
                    sim.commit(Epoch(1));
                    sim.world.new_epoch();
                    sim.last_of_the_log();
                },
            );
        }
    }
}

/// An epoch is given up by one CPU while another is on its way to begin it, or in it: it is over, or never was.
#[test]
fn a_take_and_its_giving_up() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[],
            |sim| written(sim, SMALL, engine, Granularity::Page),
            |sim| {
                let epoch = sim.world.new_epoch();
                vec![
                    Box::new(move || {
                        for _ in 0..3 {
                            let step = sim.take_step(epoch, None);
                            assert!(step.is_ok() || matches!(step, Err(Error::StaleEpoch { .. })));
                            sim.breathe();
                        }
                    }),
                    Box::new(move || sim.give_up(epoch)),
                ]
            },
            |sim| {
                let status = sim.world.stage2.log_status();
                assert_eq!(status.outstanding, None, "nobody drives it any more");
                sim.last_of_the_log();
            },
        );
    }
}

/// A log is stopped, and its table becomes a block, under a guest that writes.
#[test]
fn a_stop_and_a_write() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA],
            |sim| {
                sim.add(BLOCK);
                sim.map_ahead(0).unwrap();
                sim.start(engine, Granularity::Page);
                sim.write(IPA);
                sim.harvest();
            },
            move |sim| {
                vec![
                    Box::new(move || sim.stop()),
                    Box::new(move || writes(sim, &[IPA, IPA])),
                ]
            },
            |sim| {
                assert_eq!(sim.world.stage2.mappings().blocks_2m, 1);
                sim.check_counts();
            },
        );
    }
}

/// Nobody is in a table that goes back to the allocator, which fills it with something else: neither
/// when a slot is deleted nor when pages become a block.
#[test]
fn invariant_05_a_walker_and_a_table_that_goes() {
    const POISON: u64 = 3;
    for collapse in [false, true] {
        in_every_order(
            setup(dbm()),
            &[IPA],
            |sim| {
                sim.add(BLOCK);
                sim.map_ahead(0).unwrap();
                sim.start(Engine::Dbm, Granularity::Page);
            },
            move |sim| {
                vec![
                    Box::new(move || if collapse { sim.stop() } else { sim.delete(0) }),
                    Box::new(move || {
                        sim.breathe();
                        sim.op("walk", |stage2| {
                            let _reading = stage2.layout();
                            let place = stage2.descend(IPA);
                            for _ in 0..3 {
                                let pte = place.entry().load(Ordering::Relaxed);
                                assert_ne!(pte, POISON, "freed under a walker");
                            }
                        });
                    }),
                ]
            },
            |sim| sim.check_counts(),
        );
    }
}
