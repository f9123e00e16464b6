//! What the host is given is what the guest stored, past the caches or through them.

use super::world::*;
use crate::fake::traced::{self, Observer, Point, Write};
use crate::fake::{Caching, Event};
use crate::sync::atomic::Ordering;
use crate::types::*;
use crate::{Error, FaultAccess, Features, Support};
use std::ops::Range;
use std::sync::{Arc, Mutex};
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

/// EL2 changes part of a line whose rest the guest stored past the caches, and the guest looks again.
#[test]
fn a_store_by_el2_keeps_what_stands_beside_it() {
    const OLD: u64 = 0x1111_1111_1111_1111;
    // Within a word, over its end, from one on, to one, a whole line and more.
    for (at, len) in [(42, 3), (38, 4), (40, 9), (35, 13), (40, 8), (61, 70)] {
        for fwb in [Support::Absent, Support::Present] {
            let world = world(fwb);
            for word in 0..24 {
                guest_stores(&world, word, OLD, Caching::Bypass);
            }
            let bytes: Vec<u8> = (1..=len as u8).map(|byte| 0x80 | byte).collect();
            let words = &world.machine.words()[at / 8..];
            let stored = world.stage2.store(Ipa::new(IPA + at as u64), words, &bytes);
            assert_eq!(stored, Ok(len));
            let mut expected = [0x11; 24 * 8];
            expected[at..at + len].copy_from_slice(&bytes);
            // Through the caches, the lines it touched: the others have what they had.
            let lines = at / 64 * 8..(at + len).div_ceil(64) * 8;
            for (words, caching) in [(0..24, Caching::Bypass), (lines, Caching::WriteBack)] {
                let load = |word| world.machine.load(word, caching).to_le_bytes();
                let seen: Vec<u8> = words.clone().flat_map(load).collect();
                let expected = &expected[words.start * 8..words.end * 8];
                assert_eq!(seen, expected, "{at} {len} {caching:?}");
            }
        }
    }
}

#[test]
fn a_store_by_el2_goes_as_far_as_the_words_do() {
    let world = world(Support::Absent);
    let words = world.machine.words();
    let store = |at, words, bytes| world.stage2.store(Ipa::new(IPA + at), words, bytes);
    assert_eq!(store(3, &words[..2], &[1; 20]), Ok(13));
    assert_eq!(store(3, &words[..0], &[1; 20]), Ok(0));
    assert_eq!(store(3, &words[..1], &[]), Ok(0));
    assert_eq!(store(0, &words[..1], &[1; 20]), Ok(8));
    world.start(Engine::WriteProtect, Granularity::Page);
    assert_eq!(store(PAGE_SIZE - 1, words, &[]), Ok(0));
    assert!(world.harvest().is_empty(), "nothing was stored");
    assert_eq!(store(PAGE_SIZE - 1, &words[511..], &[1; 2]), Ok(1));
    assert_eq!(world.harvest(), set([IPA]));
    let outside = IPA - 8;
    let refused = world.stage2.store(Ipa::new(outside), words, &[1]);
    assert_eq!(refused, Err(Error::NotMemory(Ipa::new(outside))));
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Did {
    Maintain,
    Store,
    Mark,
}

/// What a CPU does to memory and to a word of the dirty log, in order.
struct Order {
    memory: Range<usize>,
    mark: usize,
    did: Mutex<Vec<Did>>,
}

impl Order {
    fn push(&self, did: Did) {
        self.did.lock().unwrap().push(did);
    }
}

impl Observer for Order {
    fn point(&self, _: Point) {}
    fn milestone(&self) {}
    fn wait(&self) {}
    fn settle(&self, _: usize) {}
    fn wrote(&self, write: Write) {
        if self.memory.contains(&write.address) {
            self.push(Did::Store);
        } else if write.address == self.mark {
            self.push(Did::Mark);
        }
    }
    fn filled(&self, _: usize) {}
    fn noted(&self, event: Event) {
        if matches!(event, Event::CleanInvalidate(_)) {
            self.push(Did::Maintain);
        }
    }
}

/// A harvest that comes between takes the page's bit or leaves it; the mark comes when the host would be given
/// the new bytes.
#[test]
fn invariant_18_a_store_by_el2_is_marked_when_it_is_in_memory() {
    let world = world(Support::Absent);
    world.start(Engine::WriteProtect, Granularity::Page);
    let slot = world.stage2.slot(SlotId(0)).unwrap();
    let memory = world.machine.words().as_ptr_range();
    let order = Arc::new(Order {
        memory: memory.start.addr()..memory.end.addr(),
        mark: std::ptr::from_ref(&slot.dirty.live()[0]).addr(),
        did: Mutex::default(),
    });
    let stored = traced::observed(order.clone(), || {
        let words = world.machine.words();
        world.stage2.store(Ipa::new(IPA + 4), words, &[1; 8])
    });
    assert_eq!(stored, Ok(8));
    let did = order.did.lock().unwrap().clone();
    let [maintain, store, mark] = [Did::Maintain, Did::Store, Did::Mark];
    assert_eq!(did, [maintain, store, store, maintain, mark]);
    assert_eq!(world.harvest(), set([IPA]));
    // Of whole lines nothing is kept.
    order.did.lock().unwrap().clear();
    let filled = traced::observed(order.clone(), || {
        let words = &world.machine.words()[..8];
        let fill = || words[7].store(1, Ordering::SeqCst);
        world.stage2.overwrite(Ipa::new(IPA), words, fill)
    });
    assert_eq!(filled, Ok(()));
    assert_eq!(*order.did.lock().unwrap(), [store, maintain, mark]);
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
