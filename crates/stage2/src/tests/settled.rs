//! What an epoch leaves behind once it is settled: nothing, whatever its slots become then.

use super::world::*;
use crate::control::Part;
use crate::types::*;

const IPA: u64 = 0x4000_0000;
const ENGINES: [Engine; 2] = [Engine::WriteProtect, Engine::Dbm];

/// A log with an epoch committed that was larger than what a commit forgets: EL2 wrote two slots' worth of 1 GiB.
fn committed(pages: u64) -> World {
    let world = World::sized(dbm(), 40, 256, 2);
    world.slot(0, IPA, pages, Access::ReadWrite, RAM);
    world.start(Engine::WriteProtect, Granularity::Block);
    let mark = world.stage2.mark_dirty(Ipa::new(IPA), pages * PAGE_SIZE);
    mark.unwrap();
    assert_eq!(world.harvest().len() as u64, pages);
    world
}

#[test]
fn invariant_01_a_slot_in_the_place_of_another_is_told_of_anew() {
    for engine in ENGINES {
        let world = committed(2 * P1G);
        world.delete(0);
        // Its addresses meet those of the one before.
        let base = IPA - 64 * MIB;
        world.slot(0, base, P1G, Access::ReadWrite, RAM + PAGE_SIZE);
        world.stage2.set_engine(engine).unwrap();
        assert_eq!(world.harvest(), set([]), "{engine:?}");
        world.write(0, base + 300 * MIB);
        let told = world.harvest();
        assert_eq!(told, set([base + 300 * MIB]), "{engine:?}");
    }
}

/// Given up in the middle of forgetting the one before.
#[test]
fn invariant_01_what_is_half_forgotten_is_forgotten_whole() {
    let world = committed(2 * P1G);
    let epoch = world.new_epoch();
    let more = world.stage2.take(epoch).unwrap();
    assert!(matches!(more, Progress::More { done: 0, .. }), "{more:?}");
    world.stage2.abort(epoch).unwrap();
    assert_eq!(world.harvest(), set([]));
    for block in [IPA, IPA + GIB] {
        world.write(0, block);
        assert_eq!(world.harvest(), span(block, GIB));
    }
}

#[test]
fn invariant_19_a_start_that_is_stopped_leaves_nothing_of_an_older_log() {
    let world = committed(2 * P1G);
    world.stop();
    let stage2 = &world.stage2;
    let first = stage2.start_log(Engine::WriteProtect, Granularity::Page);
    assert!(matches!(first, Ok(Progress::More { .. })), "{first:?}");
    finish(|| stage2.stop_log()).unwrap();
    assert_eq!(stage2.log_status().live_pages, 0);
}

/// An epoch of a slot that goes before it is done looks at no other slot, and believes of none that it did.
#[test]
fn invariant_01_an_epoch_of_a_slot_that_went_arms_no_other() {
    for engine in ENGINES {
        let world = World::sized(dbm(), 40, 256, 2);
        world.slot(0, IPA, 1024, Access::ReadWrite, RAM);
        world.slot(1, 8 * GIB, 4 * P1G, Access::ReadWrite, RAM + 8 * GIB);
        world.write(0, IPA);
        let stage2 = &world.stage2;
        finish(|| stage2.start_log_all_dirty(engine, Granularity::Block)).unwrap();
        let epoch = world.new_epoch();
        let part = Part {
            slot: SlotId(1),
            first: 0,
            pages: 4 * P1G,
        };
        stage2.take_range(epoch, SlotId(1), 0, 4 * P1G).unwrap();
        // Another CPU is in it, past its look at the slot.
        world.delete(1);
        finish(|| stage2.take_of(epoch, Some(part))).unwrap();
        stage2.commit(epoch).unwrap();
        world.harvest();
        world.write(0, IPA);
        assert_eq!(world.harvest(), span(IPA, 2 * MIB), "{engine:?}");
    }
}

/// What the engine is chosen by are leaves that guests made dirty, each once.
#[test]
fn a_harvest_counts_leaves_and_not_bits() {
    let world = World::sized(dbm(), 40, 64, 2);
    world.slot(0, IPA, 16 * P2M, Access::ReadWrite, RAM);
    world.start(Engine::WriteProtect, Granularity::Block);
    let judged = || world.stage2.control.lock().judged.unwrap().dirty;
    world.write(0, IPA);
    world.harvest();
    assert_eq!(judged(), 1);
    let hole = world.stage2.mark_dirty(Ipa::new(IPA + 8 * MIB), 8 * MIB);
    hole.unwrap();
    world.harvest();
    assert_eq!(judged(), 0);
}
