//! A machine on which the first broadcast TLBI and its DSB end before another CPU's stores do that go through what
//! was dropped (CVE-2025-10263): an operation that says it is done must have outlasted them.

use super::world::*;
use crate::fake::{Event, Machine};
use crate::hardware::Hardware;
use crate::types::*;
use crate::{FaultAccess, Features, Support, Tlbi};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

/// Both engines; by range, leaf by leaf, and with blocks that must be broken.
fn engines_of_cores_with_the_erratum() -> Vec<(Engine, Features)> {
    let twice = |(engine, features)| {
        let tlbi = Tlbi::Twice;
        (engine, Features { tlbi, ..features })
    };
    engines().into_iter().map(twice).collect()
}

fn world(features: Features, pages: u64) -> Arc<World> {
    let world = World::sized(features, 39, 64, 2);
    world.slot(0, IPA, pages, Access::ReadWrite, RAM);
    world.map_all(0);
    Arc::new(world)
}

/// The machine itself: what the first DSB leaves under way, the second one ends.
#[test]
fn the_fake_completes_a_store_at_the_second_dsb() {
    for (tlbi, under_way) in [(Tlbi::Once, false), (Tlbi::Twice, true)] {
        let world = world(
            Features {
                tlbi,
                ..Features::BASELINE
            },
            P2M,
        );
        world.write(1, IPA);
        world.machine.become_pe(0);
        let pte = world.entry(IPA).swap(0, Ordering::SeqCst);
        let store = || {
            let reached = world
                .machine
                .access(1, world.guest, IPA, FaultAccess::Write, |_| ());
            reached.is_ok()
        };
        world.machine.dsb_ishst();
        let previous = world.machine.select(world.guest.vttbr);
        world.machine.tlbi_vmalls12e1is();
        assert!(store(), "nothing is complete");
        world.machine.dsb_ish();
        assert_eq!(store(), under_way, "{tlbi:?}");
        world.machine.tlbi_vale2is();
        world.machine.dsb_ish();
        assert!(!store(), "{tlbi:?}");
        world.machine.restore(previous);
        world.entry(IPA).store(pte, Ordering::SeqCst);
    }
}

/// A store after a harvest is in the next one, however many pages went into the first.
#[test]
fn invariant_03_a_harvest_outlasts_the_stores_it_took_the_permission_from() {
    // One leaf; some, by a list; so many that the VMID goes as a whole.
    for pages in [1, 5, P2M] {
        for (engine, features) in engines_of_cores_with_the_erratum() {
            let world = world(features, 2 * P2M);
            world.start(engine, Granularity::Page);
            let written = || (0..pages).map(|page| IPA + page * PAGE_SIZE);
            for ipa in written() {
                world.write(1, ipa);
            }
            world.machine.become_pe(0);
            let first = world.harvest();
            assert_eq!(first, written().collect());
            world.write(1, IPA);
            world.machine.become_pe(0);
            let second = world.harvest();
            assert_eq!(second, set([IPA]), "{engine:?} {features:?}");
        }
    }
}

/// A store that comes between the two is in this harvest or in the next one.
#[test]
fn invariant_01_a_store_before_the_second_dsb_is_reported() {
    for (engine, features) in engines_of_cores_with_the_erratum() {
        let world = world(features, P2M);
        world.start(engine, Granularity::Page);
        world.write(1, IPA);
        world.machine.become_pe(0);
        let stored = Arc::new(AtomicU64::new(0));
        let (counter, there) = (Arc::clone(&stored), Arc::downgrade(&world));
        world.machine.interrupt(Event::Vale2is, move || {
            let world = there.upgrade().unwrap();
            let (machine, guest) = (&world.machine, world.guest);
            let then = |_| counter.fetch_add(1, Ordering::SeqCst);
            // Through the entry that is gone: there is no fault.
            machine
                .access(1, guest, IPA, FaultAccess::Write, then)
                .unwrap();
        });
        let (_, pages) = world.take();
        assert_eq!(stored.load(Ordering::SeqCst), 1);
        assert_eq!(pages, set([IPA]), "the host reads the page after this");
    }
}

/// What a block was replaced by is not left behind either.
#[test]
fn invariant_06_a_split_outlasts_the_stores_through_its_block() {
    for bbm2 in [Support::Present, Support::Absent] {
        for engine in [Engine::WriteProtect, Engine::Dbm] {
            let features = Features {
                bbm2,
                ..Machine::everything()
            };
            let world = world(features, 2 * P2M);
            world.write(1, IPA);
            world.machine.become_pe(0);
            world.start(engine, Granularity::Page);
            let first = world.harvest();
            assert_eq!(first, set([]));
            world.write(1, IPA + PAGE_SIZE);
            world.machine.become_pe(0);
            let second = world.harvest();
            assert_eq!(second, set([IPA + PAGE_SIZE]));
        }
    }
}
