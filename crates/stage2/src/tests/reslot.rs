//! Slots that are moved and resized while vCPUs run and a log is on.

use super::sim::*;
use super::world::*;
use crate::types::*;
use crate::{Error, FaultAccess, Features, Outcome};
use std::boxed::Box;
use std::string::ToString;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
/// Where the slot moves to, and back from: not aligned alike, so its blocks are pages there.
const THERE: u64 = IPA + 64 * MIB + PAGE_SIZE;

/// Two blocks and a tail.
const PAGES: u64 = 2 * P2M + 70;
const LARGE: u64 = 12 * P2M;
/// The end within the second block.
const FEWER: u64 = P2M + 100;

const GRANULARITIES: [Granularity; 3] =
    [Granularity::Page, Granularity::Adaptive, Granularity::Block];

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn vm(setup: Setup) -> Arc<Sim> {
    let sim = Sim::with_ram(setup, IPA, PAGES);
    sim.alone(|sim| sim.map_ahead(0).unwrap());
    sim
}

/// A slot of many tables, which are not taken out in one step.
fn large() -> Arc<Sim> {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        s.delete(0);
        s.add(Place {
            id: 0,
            ipa: IPA,
            pages: LARGE,
            access: Access::ReadWrite,
            pa: RAM + PAGE_SIZE,
        });
        s.map_ahead(0).unwrap();
    });
    sim
}

#[test]
fn what_a_slot_knows_moves_with_it() {
    for (engine, features) in engines() {
        let sim = vm(Setup::new(features, 1).calm());
        sim.alone(|s| {
            s.start(engine, Granularity::Page);
            s.write(page(7));
            s.harvest();
            [3, 600, 1093]
                .iter()
                .for_each(|number| s.write(page(*number)));
            s.move_slot(0, THERE);
            assert_eq!(s.guest(page(3), FaultAccess::Read), Err(Outcome::NotMemory));
            s.write(THERE + 9 * PAGE_SIZE);
            let there = [3, 9, 600, 1093].map(|number| THERE + number * PAGE_SIZE);
            assert_eq!(s.harvest(), set(there));
            // And back, with an epoch that the host has, and gives back.
            s.write(there[0]);
            let epoch = s.take();
            s.move_slot(0, IPA);
            s.abort(epoch);
            assert_eq!(s.harvest(), set([page(3)]));
            // To where it is, is nothing.
            s.move_slot(0, IPA);
            assert_eq!(s.harvest(), set([]));
        });
        sim.conclude();
    }
}

#[test]
fn a_dirty_block_that_moves_is_dirty_whole() {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        s.start(Engine::Dbm, Granularity::Adaptive);
        s.write(page(5));
        s.move_slot(0, THERE);
        assert_eq!(s.harvest(), span(THERE, 2 * MIB));
    });
    sim.conclude();
}

#[test]
fn a_move_is_refused_where_others_are_or_will_be() {
    let sim = large();
    sim.alone(|s| {
        let other = |id, ipa, pages| Place {
            id,
            ipa,
            pages,
            access: Access::ReadWrite,
            pa: RAM + 64 * MIB,
        };
        s.add(other(1, IPA + 32 * MIB, 10));
        let stage2 = &s.world.stage2;
        let to = |id, ipa| stage2.move_slot(SlotId(id), Ipa::new(ipa).gfn());
        assert_eq!(to(0, IPA + 30 * MIB), Err(Error::SlotOverlap(SlotId(1))));
        assert_eq!(to(7, IPA), Err(Error::NoSuchSlot(SlotId(7))));
        let beyond = to(0, (1 << 40) - 4 * MIB);
        assert!(matches!(beyond, Err(Error::SlotRange { .. })));
        // Half way: both places are taken, and nothing else is done to it.
        assert!(matches!(to(0, THERE), Ok(Progress::More { .. })));
        assert_eq!(to(1, THERE), Err(Error::SlotOverlap(SlotId(0))));
        assert_eq!(to(1, IPA), Err(Error::SlotOverlap(SlotId(0))));
        let changing = Error::SlotChanging(SlotId(0));
        assert_eq!(to(0, IPA + 128 * MIB), Err(changing));
        assert_eq!(
            stage2.set_access(SlotId(0), Access::ReadOnly),
            Err(changing)
        );
        assert_eq!(stage2.shrink_slot(SlotId(0), 5), Err(changing));
        assert_eq!(stage2.map_ahead(SlotId(0), 0), Err(changing));
        assert!(changing.to_string().contains("finish that first"));
        // Faults wait for the end of it.
        let waits =
            stage2.handle_fault(fault(IPA, FaultAccess::Read, crate::FaultKind::Translation));
        assert_eq!(waits, Outcome::Retry);
        s.move_slot(0, THERE);
    });
    sim.end();
}

/// A log that starts goes through memory by address, and would miss what moves behind it.
#[test]
fn nothing_changes_while_a_log_starts() {
    let sim = large();
    sim.alone(|s| {
        let stage2 = &s.world.stage2;
        s.move_slot(0, THERE);
        let step = stage2.start_log_all_dirty(Engine::Dbm, Granularity::Page);
        assert!(matches!(step, Ok(Progress::More { .. })));
        let back = Ipa::new(IPA).gfn();
        assert_eq!(stage2.move_slot(SlotId(0), back), Err(Error::Busy));
        assert_eq!(stage2.shrink_slot(SlotId(0), 1), Err(Error::Busy));
        s.start_all_dirty(Engine::Dbm, Granularity::Page);
        s.move_slot(0, IPA);
        assert_eq!(s.harvest().len() as u64, LARGE);
    });
    sim.conclude();
}

#[test]
fn nothing_changes_in_the_middle_of_a_harvest() {
    let sim = large();
    sim.alone(|s| {
        s.start(Engine::Dbm, Granularity::Page);
        let stage2 = &s.world.stage2;
        let epoch = s.world.new_epoch();
        stage2.take(epoch).unwrap();
        let refused = Err(Error::TakeUnfinished(epoch));
        assert_eq!(stage2.move_slot(SlotId(0), Ipa::new(THERE).gfn()), refused);
        assert_eq!(stage2.shrink_slot(SlotId(0), FEWER), refused);
        let more = [Extent {
            pa: Pa::new(RAM + GIB),
            pages: 1,
        }];
        assert_eq!(stage2.grow_slot(SlotId(0), &more), refused);
        s.abort(epoch);
        // And none begins while bitmaps are exchanged.
        assert!(matches!(
            stage2.shrink_slot(SlotId(0), FEWER),
            Ok(Progress::More { .. })
        ));
        let epoch = s.world.new_epoch();
        for _ in 0..9 {
            assert_ne!(stage2.take(epoch), Ok(Progress::Done));
        }
        s.shrink(0, FEWER);
        s.finish("take", |stage2| stage2.take(epoch)).unwrap();
        s.commit(epoch);
    });
    sim.conclude();
}

/// The bits of a slot that grows are in its old bitmaps until they are all in the new ones: no harvest is done before.
#[test]
fn no_harvest_is_done_before_a_slot_has_grown() {
    // More than a step adds.
    const PAGES: u64 = 70_000;
    for (engine, features) in engines() {
        let sim = Sim::with_ram(Setup::new(features, 1).calm(), IPA, PAGES);
        sim.alone(|s| {
            s.start(engine, Granularity::Page);
            s.write(page(PAGES - 1));
            s.el2_write(page(3));
            let more = [Extent {
                pa: Pa::new(RAM + PAGES * PAGE_SIZE),
                pages: 9,
            }];
            let step = s.world.stage2.grow_slot(SlotId(0), &more);
            assert!(matches!(step, Ok(Progress::More { .. })));
            let epoch = s.world.new_epoch();
            for _ in 0..9 {
                assert_ne!(s.take_step(epoch, None), Ok(Progress::Done));
            }
            finish(|| s.world.stage2.grow_slot(SlotId(0), &more)).unwrap();
            finish(|| s.world.stage2.take(epoch)).unwrap();
            let reported = s.world.read_epoch(epoch);
            assert_eq!(reported, set([3, PAGES - 1].map(page)));
        });
    }
}

/// Its bitmaps are of the pages it had once. It grows from those it has, in one step and in two.
#[test]
fn a_slot_that_was_made_smaller_grows_again() {
    const MORE: u64 = 500;
    for (engine, features) in engines() {
        for (fewer, steps) in [(60_000, 1), (68_000, 2)] {
            let world = World::new(features);
            world.slot(0, IPA, 70_000, Access::ReadWrite, RAM);
            world.start(engine, Granularity::Page);
            for number in [3, fewer - 1, fewer, 69_999] {
                world.write(0, page(number));
            }
            finish(|| world.stage2.shrink_slot(SlotId(0), fewer)).unwrap();
            let more = [Extent {
                pa: Pa::new(RAM + GIB),
                pages: MORE,
            }];
            let grow = || world.stage2.grow_slot(SlotId(0), &more);
            for _ in 1..steps {
                assert!(matches!(grow(), Ok(Progress::More { .. })));
            }
            assert_eq!(grow(), Ok(Progress::Done), "{fewer}");
            assert_eq!(world.stage2.slots()[0].pages, fewer + MORE);
            world.write(0, page(fewer + MORE - 1));
            let known = [3, fewer - 1, fewer + MORE - 1].map(page);
            assert_eq!(world.harvest(), set(known), "{engine:?} {fewer}");
        }
    }
}

#[test]
fn pages_that_stay_keep_their_bits_and_those_that_go_are_told_no_more() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let sim = vm(Setup::new(features, 1).calm());
            sim.alone(|s| {
                s.start(engine, granularity);
                let written = [0, 511, FEWER - 1, FEWER, 1030, PAGES - 1];
                written.iter().for_each(|number| s.write(page(*number)));
                s.shrink(0, FEWER);
                let gone = s.guest(page(FEWER), FaultAccess::Write);
                assert_eq!(gone, Err(Outcome::NotMemory));
                let reported = s.harvest();
                assert!(set([0, 511, FEWER - 1].map(page)).is_subset(&reported));
                assert!(reported.iter().all(|ipa| *ipa < page(FEWER)));
                if granularity == Granularity::Page {
                    assert_eq!(reported.len(), 3);
                }
                s.write(page(FEWER - 1));
                s.grow(0, PAGES - FEWER);
                s.write(page(PAGES - 1));
                let reported = s.harvest();
                assert!(set([FEWER - 1, PAGES - 1].map(page)).is_subset(&reported));
                assert!(!reported.contains(&page(1030)), "what went is forgotten");
            });
            sim.conclude();
        }
    }
}

/// The epoch that the host has, and the one it gave back, are in the new bitmaps.
#[test]
fn invariant_19_an_epoch_outlives_a_change_of_size() {
    for (engine, features) in engines() {
        let sim = vm(Setup::new(features, 1).calm());
        sim.alone(|s| {
            s.start(engine, Granularity::Page);
            [3, 70].iter().for_each(|number| s.write(page(*number)));
            let epoch = s.take();
            s.grow(0, 2 * P2M);
            assert_eq!(s.copy(epoch), set([3, 70].map(page)));
            s.abort(epoch);
            s.grow(0, 1);
            s.shrink(0, 71);
            s.write(page(9));
            assert_eq!(s.harvest(), set([3, 9, 70].map(page)));
            assert_eq!(s.harvest(), set([]));
        });
        sim.conclude();
    }
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        let stage2 = &s.world.stage2;
        let shrink = |pages| stage2.shrink_slot(SlotId(0), pages);
        assert!(matches!(shrink(0), Err(Error::SlotRange { .. })));
        assert!(matches!(shrink(PAGES + 1), Err(Error::SlotRange { .. })));
        assert_eq!(shrink(PAGES), Ok(Progress::Done));
        s.add(Place {
            id: 1,
            ipa: page(PAGES) + MIB,
            pages: 1,
            access: Access::ReadOnly,
            pa: RAM + 64 * MIB,
        });
        let grow = |pa, pages| {
            let pa = Pa::new(pa);
            stage2.grow_slot(SlotId(0), &[Extent { pa, pages }])
        };
        assert_eq!(grow(RAM + GIB, 257), Err(Error::SlotOverlap(SlotId(1))));
        assert!(matches!(
            grow(RAM + GIB, u64::MAX),
            Err(Error::SlotRange { .. })
        ));
        assert!(matches!(grow(RAM + 7, 1), Err(Error::ExtentRange(_))));
        assert_eq!(stage2.slots()[0].pages, PAGES);
    });
    sim.end();
}

/// In a log that began with every page dirty, new pages are too.
#[test]
fn new_pages_of_a_log_that_began_dirty_are_dirty() {
    let sim = vm(Setup::new(dbm(), 1).calm());
    sim.alone(|s| {
        s.start_all_dirty(Engine::Dbm, Granularity::Page);
        assert_eq!(s.harvest().len() as u64, PAGES);
        s.grow(0, 100);
        assert_eq!(s.harvest(), span(page(PAGES), 100 * PAGE_SIZE));
    });
    sim.conclude();
}

/// Moves and changes of size, between harvests, while guests write.
#[test]
fn invariant_05_slots_that_move_and_change_their_size_under_fire_lose_nothing() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for seed in 0..10 {
                let every = [Some(2), Some(9), Some(60)][seed as usize % 3];
                let sim = vm(Setup {
                    every,
                    ..Setup::new(features, seed)
                });
                let s = &sim;
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    for _ in 0..5 {
                        let place = s.slots.lock().unwrap()[&0].place;
                        match (s.roll(2), place.ipa == IPA, place.pages == PAGES) {
                            (0, true, _) => s.move_slot(0, THERE),
                            (0, false, _) => s.move_slot(0, IPA),
                            (_, _, true) => s.shrink(0, FEWER),
                            (_, _, false) => s.grow(0, PAGES - FEWER),
                        }
                        let epoch = s.take();
                        s.copy(epoch);
                        match s.roll(3) {
                            0 => s.abort(epoch),
                            _ => s.commit(epoch),
                        }
                    }
                });
                let guest = || {
                    for _ in 0..40 {
                        let hot = [0, 63, 511, 512, FEWER - 1, FEWER, PAGES - 1];
                        let place = s.slots.lock().unwrap()[&0].place;
                        let number = hot[s.roll(7) as usize];
                        // It may be gone when the access comes, or come.
                        let _ = s.guest(place.ipa + number * PAGE_SIZE, FaultAccess::Write);
                        s.breathe();
                    }
                };
                s.run(vec![manager, Box::new(guest), Box::new(guest)]);
                sim.conclude();
            }
        }
    }
}

/// A block whose slot becomes another comes back as pages, and not before the last TLB has forgotten it.
#[test]
fn invariant_05_a_block_that_comes_back_as_pages_was_broken_first() {
    for (engine, features) in engines() {
        for seed in 0..12 {
            let sim = Sim::new(Setup {
                every: [Some(2), Some(9), Some(60)][seed as usize % 3],
                ..Setup::new(features, seed)
            });
            let s = &sim;
            s.alone(|s| {
                s.add(Place {
                    id: 0,
                    ipa: IPA,
                    pages: PAGES,
                    access: Access::ReadOnly,
                    pa: RAM,
                });
                s.map_ahead(0).unwrap();
                s.start(engine, Granularity::Page);
                assert_eq!(s.world.stage2.mappings().blocks_2m, 2);
            });
            let manager = Box::new(|| {
                for access in [Access::ReadWrite, Access::ReadOnly, Access::ReadWrite] {
                    s.set_access(0, access);
                    s.harvest();
                }
            });
            let guest = || {
                for _ in 0..40 {
                    s.read(page([0, 511, 512, 1023][s.roll(4) as usize]));
                    s.breathe();
                }
            };
            s.run(vec![manager, Box::new(guest), Box::new(guest)]);
            sim.conclude();
        }
    }
}

type Step = fn(&World) -> Result<Progress, Error>;

/// What is done to a slot step by step, so that with [`changing`]'s one step is not all.
const CHANGES: [Step; 4] = [
    |world| world.stage2.move_slot(SlotId(0), Ipa::new(THERE).gfn()),
    |world| world.stage2.shrink_slot(SlotId(0), 9),
    |world| world.stage2.grow_slot(SlotId(0), &[MORE]),
    |world| world.stage2.set_access(SlotId(0), Access::ReadOnly),
];
const GROW: usize = 2;
const ACCESS: usize = 3;

const MORE: Extent = Extent {
    pa: Pa::new(RAM + 8 * GIB),
    pages: 5,
};

/// A slot of which a dozen tables are mapped, in the middle of a change; and pages of it.
fn changing(features: Features, change: Step) -> (World, Vec<u64>) {
    const PAGES: u64 = 70_000;
    let world = World::new(features);
    world.slot(0, IPA, PAGES, Access::ReadWrite, RAM + PAGE_SIZE);
    let written: Vec<u64> = (0..11)
        .map(|table| table * P2M)
        .chain([PAGES - 1])
        .collect();
    written.iter().for_each(|number| {
        world.write(0, page(*number));
    });
    let step = change(&world);
    assert!(matches!(step, Ok(Progress::More { .. })), "{step:?}");
    (world, written)
}

/// A deletion comes over whatever else is done to a slot: all its leaves are out when it is done, and nobody
/// goes on with the other.
#[test]
fn invariant_05_a_slot_deleted_in_the_middle_of_a_change_is_gone_whole() {
    for change in CHANGES {
        let (world, written) = changing(Features::BASELINE, change);
        let mut steps = 0;
        while world.stage2.delete_slot(SlotId(0)) != Ok(Progress::Done) {
            steps += 1;
            for change in CHANGES {
                assert_eq!(change(&world), Err(Error::SlotDying(SlotId(0))));
            }
        }
        for number in written {
            for ipa in [page(number), THERE + number * PAGE_SIZE] {
                let reached = world.access(0, ipa, FaultAccess::Write);
                assert_eq!(reached, Err(Outcome::NotMemory), "{ipa:#x}");
            }
        }
        assert_eq!(world.stage2.mappings().pages_4k, 0);
        assert_eq!(world.machine.tables_in_use(), 2, "only the roots are left");
        // Nothing is resized any more, either.
        world.start(Engine::WriteProtect, Granularity::Page);
        assert!(steps > 1, "{steps} steps: that is no test");
    }
}

/// What is done to a slot step by step shares a cursor: one thing at a time, and `Done` is true of all of it.
#[test]
fn invariant_08_a_slot_is_changed_in_one_way_at_a_time() {
    for (at, change) in CHANGES.into_iter().enumerate() {
        for (other, another) in CHANGES.into_iter().enumerate() {
            if at == other {
                continue;
            }
            let (world, written) = changing(Features::BASELINE, change);
            let refused = another(&world);
            assert_eq!(refused, Err(Error::SlotChanging(SlotId(0))), "{at} {other}");
            finish(|| change(&world)).unwrap();
            if at == ACCESS {
                assert_eq!(world.stage2.mappings().pages_4k, 0);
                for number in written {
                    let reached = world.access(0, page(number), FaultAccess::Write);
                    assert_eq!(reached, Err(Outcome::ReadOnly), "{number}");
                }
            }
        }
    }
}

/// A log that starts in the middle of a change of access: leaves that are still writable are of it, and what is
/// written through them is known.
#[test]
fn a_slot_that_is_becoming_read_only_is_logged_until_it_is() {
    for (engine, features) in engines() {
        let (world, written) = changing(features, CHANGES[ACCESS]);
        world.start(engine, Granularity::Page);
        let last = page(*written.last().unwrap());
        let reached = world.access(0, last, FaultAccess::Write);
        finish(|| CHANGES[ACCESS](&world)).unwrap();
        match reached {
            Ok(_) => assert_eq!(world.harvest(), set([last]), "{engine:?}"),
            Err(refused) => assert_eq!(refused, Outcome::ReadOnly),
        }
    }
}

/// It grows by what it began to grow by; another caller's memory is not taken for that.
#[test]
fn a_slot_that_grows_grows_by_nothing_else() {
    let (world, _) = changing(Features::BASELINE, CHANGES[GROW]);
    let grow = |more: &[Extent]| world.stage2.grow_slot(SlotId(0), more);
    let refused = Err(Error::SlotChanging(SlotId(0)));
    let with = |pa, pages| Extent {
        pa: Pa::new(pa),
        pages,
    };
    let at = MORE.pa.raw();
    assert_eq!(grow(&[]), refused);
    assert_eq!(grow(&[with(at + PAGE_SIZE, 5)]), refused);
    assert_eq!(grow(&[with(at, 4)]), refused);
    assert_eq!(grow(&[with(at, 6)]), refused);
    assert_eq!(grow(&[MORE, with(at, 1)]), refused);
    // The same, said otherwise.
    finish(|| grow(&[with(at, 2), with(at + 2 * PAGE_SIZE, 3)])).unwrap();
    assert_eq!(world.stage2.slots()[0].pages, 70_005);
}
