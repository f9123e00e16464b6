//! Slots whose access changes while vCPUs run and a log is on.

use super::sim::*;
use super::world::*;
use crate::types::*;
use crate::{Error, FaultAccess, FaultKind, Features, Outcome};
use std::boxed::Box;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

/// Two blocks and a tail.
const PAGES: u64 = 2 * P2M + 70;

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

#[test]
fn changing_access_is_refused_where_there_is_no_slot() {
    let world = World::sized(Features::BASELINE, 40, 300, 2);
    let change = |access| world.stage2.set_access(SlotId(0), access);
    assert_eq!(change(Access::ReadOnly), Err(Error::NoSuchSlot(SlotId(0))));
    let pages = 100 * P2M;
    world.slot(0, IPA, pages, Access::ReadWrite, RAM + PAGE_SIZE);
    assert_eq!(change(Access::ReadWrite), Ok(Progress::Done));
    world.map_all(0);
    assert!(matches!(
        change(Access::ReadOnly),
        Ok(Progress::More { .. })
    ));
    // Changed back half way: whatever was mapped meanwhile goes too.
    world.read(0, IPA);
    assert!(matches!(
        change(Access::ReadWrite),
        Ok(Progress::More { .. })
    ));
    finish(|| change(Access::ReadWrite)).unwrap();
    assert_eq!(world.stage2.mappings().pages_4k, 0);
    // A write that meets a leaf of the old kind waits for it to go; it is no error of the guest's.
    finish(|| change(Access::ReadOnly)).unwrap();
    world.map_all(0);
    assert!(matches!(
        change(Access::ReadWrite),
        Ok(Progress::More { .. })
    ));
    let last = IPA + (pages - 1) * PAGE_SIZE;
    let abort = fault(last, FaultAccess::Write, FaultKind::Permission);
    assert_eq!(world.stage2.handle_fault(abort), Outcome::Retry);
    finish(|| change(Access::ReadWrite)).unwrap();
    world.write(0, last);
    world.write(0, IPA);
    world.map_all(0);
    assert!(matches!(
        world.stage2.delete_slot(SlotId(0)),
        Ok(Progress::More { .. })
    ));
    assert_eq!(change(Access::ReadOnly), Err(Error::SlotDying(SlotId(0))));
}

/// Flash that shows its status: no CPU reaches the memory, what EL2 programs meanwhile is noted, and the
/// memory comes back at once, in the middle of a harvest too.
#[test]
fn memory_behind_a_device_is_out_of_reach_and_logged() {
    for (engine, features) in engines() {
        let world = World::new(features);
        world.slot(0, IPA, P2M, Access::ReadOnly, RAM);
        world.slot(1, IPA + GIB, 20 * P2M, Access::ReadWrite, RAM + GIB);
        let change = |access| world.stage2.set_access(SlotId(0), access);
        world.map_all(0);
        world.map_all(1);
        world.start(engine, Granularity::Page);
        for pe in [0, 1] {
            world.read(pe, IPA + 7 * PAGE_SIZE);
        }
        finish(|| change(Access::None)).unwrap();
        let mapped = |world: &World| world.leaves().iter().any(|(ipa, ..)| *ipa < IPA + GIB);
        for pe in [0, 1] {
            for access in [FaultAccess::Read, FaultAccess::Write, FaultAccess::Execute] {
                let ipa = IPA + 7 * PAGE_SIZE;
                assert_eq!(world.access(pe, ipa, access), Err(Outcome::NotMemory));
            }
        }
        world.map_all(0);
        assert!(!mapped(&world), "not ahead either");
        world
            .stage2
            .mark_dirty(Ipa::new(IPA + PAGE_SIZE), 1)
            .unwrap();
        assert_eq!(world.harvest(), set([IPA + PAGE_SIZE]));
        world.stage2.mark_dirty(Ipa::new(IPA), 1).unwrap();
        let epoch = world.new_epoch();
        let taken = world.stage2.take(epoch).unwrap();
        // Under write protection the bits alone say what is dirty, and a step is enough.
        assert!(taken != Progress::Done || engine == Engine::WriteProtect);
        assert_eq!(change(Access::ReadOnly), Ok(Progress::Done));
        world.read(1, IPA + 7 * PAGE_SIZE);
        let write = world.access(0, IPA, FaultAccess::Write);
        assert_eq!(write, Err(Outcome::ReadOnly));
        finish(|| world.stage2.take(epoch)).unwrap();
        assert_eq!(world.read_epoch(epoch), set([IPA]));
        world.stage2.commit(epoch).unwrap();
        // Half way there and back.
        finish(|| change(Access::None)).unwrap();
        finish(|| change(Access::ReadWrite)).unwrap();
        world.write(0, IPA + 3 * PAGE_SIZE);
        finish(|| change(Access::None)).unwrap();
        let write = world.access(1, IPA + 3 * PAGE_SIZE, FaultAccess::Write);
        assert_eq!(write, Err(Outcome::NotMemory));
        assert_eq!(world.harvest(), set([IPA + 3 * PAGE_SIZE]));
        world.stop();
        assert!(!mapped(&world));
        finish(|| world.stage2.delete_slot(SlotId(0))).unwrap();
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

/// A slot of which a dozen tables are mapped, in the middle of becoming read-only; and pages of it.
fn changing(features: Features) -> (World, Vec<u64>) {
    const PAGES: u64 = 70_000;
    let world = World::new(features);
    world.slot(0, IPA, PAGES, Access::ReadWrite, RAM + PAGE_SIZE);
    let tables = (0..11).map(|table| table * P2M);
    let written: Vec<u64> = tables.chain([PAGES - 1]).collect();
    written.iter().for_each(|number| {
        world.write(0, page(*number));
    });
    let step = read_only(&world);
    assert!(matches!(step, Ok(Progress::More { .. })), "{step:?}");
    (world, written)
}

fn read_only(world: &World) -> Result<Progress, Error> {
    world.stage2.set_access(SlotId(0), Access::ReadOnly)
}

/// A deletion comes over a change of access: all leaves are out when it is done, and nobody goes on with the other.
#[test]
fn invariant_05_a_slot_deleted_in_the_middle_of_a_change_is_gone_whole() {
    let (world, written) = changing(Features::BASELINE);
    // Mapped anew, in front of where the change has come.
    world.read(0, IPA);
    let mut steps = 0;
    while world.stage2.delete_slot(SlotId(0)) != Ok(Progress::Done) {
        steps += 1;
        assert_eq!(read_only(&world), Err(Error::SlotDying(SlotId(0))));
    }
    for number in written {
        let reached = world.access(0, page(number), FaultAccess::Write);
        assert_eq!(reached, Err(Outcome::NotMemory), "{number}");
    }
    assert_eq!(world.stage2.mappings().pages_4k, 0);
    assert_eq!(world.machine.tables_in_use(), 2, "only the roots are left");
    assert!(steps > 1, "{steps} steps: that is no test");
}

#[test]
fn invariant_08_a_change_of_access_that_is_done_left_no_older_leaf() {
    let (world, written) = changing(Features::BASELINE);
    finish(|| read_only(&world)).unwrap();
    assert_eq!(world.stage2.mappings().pages_4k, 0);
    for number in written {
        let reached = world.access(0, page(number), FaultAccess::Write);
        assert_eq!(reached, Err(Outcome::ReadOnly), "{number}");
    }
}

/// A log that starts in the middle of a change of access: leaves that are still writable are of it, and what is
/// written through them is known.
#[test]
fn a_slot_that_is_becoming_read_only_is_logged_until_it_is() {
    for (engine, features) in engines() {
        let (world, written) = changing(features);
        world.start(engine, Granularity::Page);
        let last = page(*written.last().unwrap());
        let reached = world.access(0, last, FaultAccess::Write);
        finish(|| read_only(&world)).unwrap();
        match reached {
            Ok(_) => assert_eq!(world.harvest(), set([last]), "{engine:?}"),
            Err(refused) => assert_eq!(refused, Outcome::ReadOnly),
        }
    }
}

/// A change back half way stops in the middle of a table, which becomes a block when the log stops. What only that
/// block knows, under the next log, is of all its pages.
#[test]
fn invariant_05_a_block_around_the_cursor_is_noted_whole() {
    for (engine, features) in engines() {
        let world = World::new(features);
        world.slot(0, IPA, 2 * P2M, Access::ReadWrite, RAM);
        world.start(engine, Granularity::Page);
        world.map_all(0);
        (P2M..P2M + 100).for_each(|number| world.touch(0, page(number)));
        assert!(matches!(read_only(&world), Ok(Progress::More { .. })));
        let back = || world.stage2.set_access(SlotId(0), Access::ReadWrite);
        let reached = loop {
            match back() {
                Ok(Progress::More { done, .. }) if done <= P2M => {}
                Ok(Progress::More { done, .. }) => break done,
                end => panic!("{end:?}: that was one step"),
            }
        };
        assert!(reached < 2 * P2M, "{reached}");
        world.read(0, page(P2M));
        world.stop();
        world.start(engine, Granularity::Adaptive);
        assert_eq!(world.stage2.mappings().blocks_2m, 1);
        world.write(0, page(P2M + 1));
        finish(back).unwrap();
        assert_eq!(world.harvest(), span(page(P2M), 2 * MIB), "{engine:?}");
    }
}
