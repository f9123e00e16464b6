//! Orders in which a slot goes, or becomes another, while it is harvested and touched.

use super::*;
use crate::{FaultAccess, Outcome};

/// Changes the slot in every CPU's list, as the first step of a long operation does. The others find it so.
fn first_step(sim: &Sim, id: u16, change: impl Fn(&mut Slot)) {
    sim.op("the first step", |stage2| {
        let layouts = &stage2.layouts;
        layouts.change(|layout| layout.change_slot(SlotId(id), &change));
    });
}

/// A block is taken out while another CPU splits it: one of them finds what the other left.
#[test]
fn a_change_of_access_and_a_split() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA],
            |sim| written(sim, BLOCK, engine, Granularity::Block),
            move |sim| {
                vec![
                    Box::new(move || sim.set_access(0, Access::ReadOnly)),
                    Box::new(move || {
                        sim.breathe();
                        sim.op("split", |stage2| {
                            // As a harvest does it.
                            let reading = stage2.layout();
                            let place = stage2.descend(IPA);
                            if place.kind != Kind::Leaf || place.level != Level::L2 {
                                return;
                            }
                            if let Ok(old) = stage2.split(place.entry(), Level::L2, IPA, engine) {
                                drop(reading);
                                if old.is_dirty() {
                                    stage2.mark_dirty(Ipa::new(IPA), 2 * MIB).unwrap();
                                }
                            }
                        });
                    }),
                ]
            },
            ends_read_only,
        );
    }
}

/// A slot is deleted while the guest touches its neighbour in the same table.
#[test]
fn a_deletion_and_a_touch_next_door() {
    const DOOR: u64 = IPA + 2 * PAGE_SIZE;
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA, DOOR],
            |sim| {
                sim.add(SMALL);
                sim.add(Place {
                    id: 1,
                    ipa: DOOR,
                    pa: RAM + GIB,
                    ..SMALL
                });
                sim.start(engine, Granularity::Page);
                sim.write(IPA);
            },
            move |sim| {
                vec![
                    Box::new(move || sim.delete(0)),
                    Box::new(move || writes(sim, &[DOOR])),
                ]
            },
            Sim::last_of_the_log,
        );
    }
}

/// A slot is deleted while another CPU is at another change of it: nothing of it can be reached when it is gone,
/// by a CPU that had it in its TLB either.
#[test]
fn invariant_05_a_deletion_and_another_change() {
    const FAR: u64 = IPA + 2 * MIB + 5 * PAGE_SIZE;
    in_every_order(
        setup(Features::BASELINE),
        &[],
        |sim| {
            sim.add(Place {
                pages: P2M + 6,
                ..SMALL
            });
            sim.map_ahead(0).unwrap();
            sim.world.machine.become_pe(1);
            sim.write(FAR);
            sim.world.machine.become_pe(0);
            sim.abandon(0);
        },
        |sim| {
            vec![
                Box::new(move || {
                    let end = sim.finish("set_access", |stage2| {
                        stage2.set_access(SlotId(0), Access::ReadOnly)
                    });
                    let id = SlotId(0);
                    let gone = [Error::SlotDying(id), Error::NoSuchSlot(id)];
                    assert!(end.is_ok() || gone.map(Err).contains(&end), "{end:?}");
                }),
                Box::new(|| sim.delete(0)),
            ]
        },
        |sim| {
            sim.world.machine.become_pe(1);
            let reached = sim.guest(FAR, FaultAccess::Write);
            assert_eq!(reached, Err(Outcome::NotMemory));
            sim.world.machine.become_pe(0);
            sim.check_counts();
        },
    );
}

/// Ends the log, and no leaf is writable.
fn ends_read_only(sim: &Sim) {
    sim.last_of_the_log();
    let leaves = sim.world.leaves();
    assert!(leaves.iter().all(|(_, _, pte)| !pte.is_writable()));
}

/// A slot becomes read-only while a harvest is under way: its leaves go, and what they knew stays.
#[test]
fn a_harvest_and_a_change_of_access() {
    for (engine, features) in machines() {
        for (place, granularity) in [(SMALL, Granularity::Page), (BLOCK, Granularity::Adaptive)] {
            in_every_order(
                setup(features),
                &[IPA],
                |sim| written(sim, place, engine, granularity),
                move |sim| {
                    vec![
                        Box::new(move || drop(sim.harvest())),
                        Box::new(move || {
                            sim.breathe();
                            sim.set_access(0, Access::ReadOnly);
                        }),
                    ]
                },
                ends_read_only,
            );
        }
    }
}

/// The second step of a change of access takes out a leaf that a harvest passes: what it knew is in this
/// epoch, as for the last one it must be.
#[test]
fn a_harvest_and_the_rest_of_a_change_of_access() {
    in_every_order(
        setup(dbm()),
        &[IPA],
        |sim| {
            sim.start(Engine::Dbm, Granularity::Page);
            sim.add(SMALL);
            sim.write(IPA);
            // Only the leaf knows.
            sim.harvest();
            sim.write(IPA);
            first_step(sim, 0, |slot| {
                slot.access = Access::ReadOnly;
                slot.leaves = LeavesOf::Older;
            });
        },
        |sim| {
            vec![
                Box::new(move || drop(sim.harvest())),
                Box::new(move || {
                    // The take makes way twice before it looks at the leaf.
                    (0..3).for_each(|_| sim.breathe());
                    sim.set_access(0, Access::ReadOnly);
                }),
            ]
        },
        Sim::last_of_the_log,
    );
}

/// A fault puts a table where there was none, and then a dirty page into it. Between the two the table is broken
/// off, being empty, by the rest of a deletion next door; and a harvest that saw a hole there takes the page's
/// bit. The table comes back, with a page that is writable: somebody must still know.
#[test]
fn a_harvest_a_deletion_and_a_touch_of_a_table_between_them() {
    const FAR: u64 = IPA + 32 * MIB + 77 * PAGE_SIZE;
    let three = Setup {
        cpus: 3,
        ..setup(dbm())
    };
    in_every_order(
        three,
        &[FAR],
        |sim| {
            // A harvest that brings leaves over, because the first step of another keeps deletions out.
            sim.start(Engine::Dbm, Granularity::Page);
            let _ = sim.world.stage2.set_engine(Engine::WriteProtect);
            sim.add(SMALL);
            sim.add(Place {
                id: 1,
                ipa: FAR,
                pa: RAM + GIB,
                ..SMALL
            });
            first_step(sim, 0, |slot| slot.life = Life::Dying);
            // For the harvest to look where nothing is mapped yet.
            sim.el2_write(FAR + PAGE_SIZE);
        },
        |sim| {
            vec![
                Box::new(move || sim.write(FAR)),
                Box::new(move || drop(sim.harvest())),
                Box::new(move || {
                    sim.breathe();
                    sim.delete(0);
                }),
            ]
        },
        Sim::last_of_the_log,
    );
}

/// A block whose slot changes its access comes back as a page, when no TLB holds the block any more.
#[test]
fn a_change_of_access_of_a_block_and_a_touch() {
    for (engine, features) in machines() {
        in_every_order(
            setup(features),
            &[IPA],
            |sim| {
                sim.add(Place {
                    access: Access::ReadOnly,
                    ..BLOCK
                });
                sim.map_ahead(0).unwrap();
                sim.start(engine, Granularity::Page);
                sim.read(IPA);
            },
            |sim| {
                vec![
                    Box::new(move || sim.set_access(0, Access::ReadWrite)),
                    Box::new(move || {
                        for page in 0..3 {
                            sim.read(IPA + page * PAGE_SIZE);
                            sim.breathe();
                        }
                    }),
                ]
            },
            Sim::last_of_the_log,
        );
    }
}
