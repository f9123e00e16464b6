//! What the host is given is what the guest stored, past the caches or through them.

use super::world::*;
use crate::fake::{Caching, Event};
use crate::sync::atomic::Ordering;
use crate::types::*;
use crate::{FaultAccess, Features, Support};
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
const WORDS: usize = 512;

fn world(fwb: Support) -> World {
    let world = World::sized(Features { fwb, ..dbm() }, 39, 64, 2);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.map_all(0);
    world.machine.add_ram(WORDS);
    world
}

/// Page 0 as the host is given it.
fn for_the_host(world: &World) -> Vec<u64> {
    let words = world.stage2.coherent(world.machine.words());
    words
        .iter()
        .map(|word| word.load(Ordering::SeqCst))
        .collect()
}

fn guest_stores(world: &World, word: usize, value: u64, caching: Caching) {
    let store = |_| world.machine.store(word, value, caching);
    let access = || {
        world
            .machine
            .access(1, world.guest, IPA, FaultAccess::Write, store)
    };
    world.machine.become_pe(1);
    for _ in 0..4 {
        match access() {
            Ok(()) => return,
            Err(abort) => {
                world.stage2.handle_fault(abort);
            }
        }
    }
    panic!("the guest faults for ever");
}

/// A boot loader writes to a page with its MMU off; the page is reported, and read by the host.
#[test]
fn what_is_reported_is_read_as_it_was_stored() {
    for fwb in [Support::Absent, Support::Present] {
        for engine in [Engine::WriteProtect, Engine::Dbm] {
            for caching in [Caching::WriteBack, Caching::Bypass] {
                let world = world(fwb);
                world.start(engine, Granularity::Page);
                for value in 1..4 {
                    guest_stores(&world, 5, value, caching);
                    guest_stores(&world, 511, 10 * value, caching);
                    world.machine.become_pe(0);
                    let (epoch, pages) = world.take();
                    assert_eq!(pages, set([IPA]));
                    let page = for_the_host(&world);
                    let read = (page[5], page[511]);
                    assert_eq!(read, (value, 10 * value), "{caching:?}, FWB {fwb:?}");
                    world.stage2.commit(epoch).unwrap();
                }
            }
        }
    }
}

/// Without the maintenance the fake shows what silicon would: the check can fail.
#[test]
fn a_look_without_maintenance_sees_the_old_bytes() {
    for (fwb, seen) in [(Support::Absent, 0), (Support::Present, 7)] {
        let world = world(fwb);
        guest_stores(&world, 5, 7, Caching::Bypass);
        assert_eq!(world.machine.words()[5].load(Ordering::SeqCst), seen);
    }
}

#[test]
fn a_look_loses_nothing_that_is_in_the_caches_alone() {
    let world = world(Support::Absent);
    guest_stores(&world, 5, 7, Caching::WriteBack);
    assert_eq!(for_the_host(&world)[5], 7);
    assert_eq!(world.machine.load(5, Caching::WriteBack), 7);
    assert_eq!(world.machine.load(5, Caching::Bypass), 7, "it was cleaned");
}

/// EL2 changes one word of a line whose others the guest stored past the caches.
#[test]
fn a_store_by_el2_keeps_what_stands_beside_it() {
    let world = world(Support::Absent);
    guest_stores(&world, 4, 1, Caching::Bypass);
    let changed = &world.machine.words()[5..6];
    world.stage2.coherent(changed);
    world.machine.store_by_el2(5, 2);
    world.stage2.stored(changed);
    for (word, value) in [(4, 1), (5, 2)] {
        assert_eq!(world.machine.load(word, Caching::Bypass), value);
        assert_eq!(world.machine.load(word, Caching::WriteBack), value);
    }
}

/// Where stage 2 forces Write-Back it costs nothing; elsewhere what is looked at and no more.
#[test]
fn only_what_is_looked_at_is_maintained() {
    for (fwb, expected) in [
        (Support::Present, std::vec![]),
        (Support::Absent, std::vec![Event::CleanInvalidate(64)]),
    ] {
        let world = world(fwb);
        world.machine.record();
        world.stage2.coherent(&world.machine.words()[64..128]);
        world.stage2.coherent(&world.machine.words()[..0]);
        assert_eq!(world.machine.recorded(), expected);
    }
}
