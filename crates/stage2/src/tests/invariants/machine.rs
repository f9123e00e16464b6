//! The invariants about what the machine does by itself: access flags, hints, walks of stage 1, registers.

use super::*;

#[test]
fn invariant_09_a_leaf_without_access_flag_gets_it_and_keeps_the_rest() {
    let world = mapped(dbm(), P2M);
    world.start(Engine::Dbm, Granularity::Page);
    let before = world.pte(IPA).0;
    world.entry(IPA).fetch_and(!(1 << 10), Ordering::SeqCst);
    let outcome = world
        .stage2
        .handle_fault(fault(IPA, FaultAccess::Read, FaultKind::AccessFlag));
    assert_eq!((outcome, world.pte(IPA).0), (Outcome::Resume, before));
    world.entry(IPA).fetch_and(!(1 << 10), Ordering::SeqCst);
    world
        .stage2
        .handle_fault(fault(IPA, FaultAccess::Write, FaultKind::AccessFlag));
    assert_eq!(
        world.pte(IPA).0,
        before.with(Permission::Dirty(Engine::Dbm))
    );
}

#[test]
fn invariant_11_no_leaf_ever_has_the_contiguous_bit() {
    for (engine, features) in engines() {
        let world = mapped(features, 2 * P2M + 16);
        world.start(engine, Granularity::Page);
        assert!(
            world
                .leaves()
                .iter()
                .all(|(_, _, pte)| pte.0 >> 52 & 1 == 0)
        );
    }
}

#[test]
fn invariant_12_a_write_by_the_stage_1_walker_is_a_write() {
    let world = mapped(Features::BASELINE, P2M);
    world.start(Engine::WriteProtect, Granularity::Page);
    // Such an abort has no address of the page's own, so all combined entries go.
    let abort = fault(
        IPA + 3 * PAGE_SIZE,
        FaultAccess::Write,
        FaultKind::Permission,
    );
    assert_eq!(
        world.stage2.handle_fault(abort),
        Outcome::Dirtied(Level::L3)
    );
    assert_eq!(world.harvest(), set([IPA + 3 * PAGE_SIZE]));
}

#[test]
fn invariant_14_a_cpu_that_does_not_update_dirty_state_faults_and_loses_nothing() {
    let world = mapped(dbm(), 2 * P2M);
    world.start(Engine::Dbm, Granularity::Page);
    let mut guest = world.guest;
    guest.vtcr &= !(1 << 22);
    world.machine.become_pe(1);
    let ipa = IPA + 4 * PAGE_SIZE;
    let mut aborts = 0;
    while let Err(abort) = world
        .machine
        .access(1, guest, ipa, FaultAccess::Write, |_| ())
    {
        assert_eq!(
            world.stage2.handle_fault(abort),
            Outcome::Dirtied(Level::L3)
        );
        aborts += 1;
    }
    assert_eq!(aborts, 1);
    assert_eq!(world.harvest(), set([ipa]));
}

#[test]
fn invariant_14_switching_engines_changes_no_register_and_loses_nothing() {
    let world = mapped(dbm(), 3 * P2M);
    for granularity in GRANULARITIES {
        world.start(Engine::Dbm, granularity);
        let vtcr = world.stage2.vtcr();
        let page = |n: u64| IPA + n * PAGE_SIZE;
        for round in 0..6 {
            let engine = if round % 2 == 0 {
                Engine::WriteProtect
            } else {
                Engine::Dbm
            };
            world.write(0, page(1));
            world.stage2.set_engine(engine).unwrap();
            world.write(0, page(2));
            world.write(1, page(600));
            let written = set([page(1), page(2), page(600)]);
            let reported = world.harvest();
            assert!(reported.is_superset(&written), "{granularity:?} {round}");
            world.write(1, page(2));
            let reported = world.harvest();
            assert!(reported.contains(&page(2)), "{granularity:?} {round}");
            assert!(
                world
                    .leaves()
                    .iter()
                    .all(|(_, _, pte)| pte.engine() == engine)
            );
        }
        assert_eq!(world.stage2.vtcr(), vtcr);
        world.stop();
    }
}
