//! The access flags: told once, and the dirty log hears nothing of it.

use super::sim::*;
use super::world::*;
use crate::pte::Pte;
use crate::types::*;
use crate::{Error, Features};
use std::boxed::Box;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

/// Two blocks and a tail that is no whole word.
const PAGES: u64 = 2 * P2M + 69;

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn vm(setup: Setup, pa: u64) -> Arc<Sim> {
    let sim = Sim::new(setup);
    let ram = Place {
        id: 0,
        ipa: IPA,
        pages: PAGES,
        access: Access::ReadWrite,
        pa,
    };
    sim.alone(|sim| {
        sim.add(ram);
        sim.map_ahead(0).unwrap();
    });
    sim
}

/// Nothing but pages.
fn paged(features: Features) -> Arc<Sim> {
    vm(Setup::new(features, 1).calm(), RAM + PAGE_SIZE)
}

/// Everything about the leaves but the flag.
fn leaves(sim: &Sim) -> Vec<(u64, Level, Pte)> {
    let all = sim.world.leaves().into_iter();
    all.map(|(ipa, level, pte)| (ipa, level, pte.accessed()))
        .collect()
}

#[test]
fn what_was_accessed_is_told_once() {
    for (engine, features) in engines() {
        let sim = paged(features);
        sim.alone(|s| {
            assert_eq!(s.young(0).len() as u64, PAGES, "fresh leaves");
            assert_eq!(s.young(0), set([]));
            [0, 63, 64, 600, 1092]
                .iter()
                .for_each(|number| s.read(page(*number)));
            s.write(page(70));
            assert_eq!(s.young(0), set([0, 63, 64, 70, 600, 1092].map(page)));
            assert_eq!(s.young(0), set([]));
            // Its translation was in the TLB when the flag was taken: only an invalidation has it looked up again.
            s.read(page(63));
            assert_eq!(s.young(0), set([page(63)]));
            s.start(engine, Granularity::Page);
            s.read(page(9));
            let before = leaves(s);
            assert_eq!(s.young(0), set([page(9)]));
            assert_eq!(leaves(s), before);
            s.stop();
        });
        sim.end();
    }
}

/// The flag is set by the hardware where it can, and by a fault where it cannot.
#[test]
fn without_hardware_the_flag_costs_a_fault_and_no_more() {
    for features in [Features::BASELINE, dbm()] {
        let sim = paged(features);
        sim.alone(|s| {
            s.young(0);
            let before = s.world.stage2.counters();
            s.read(page(5));
            s.read(page(5));
            let after = s.world.stage2.counters();
            assert_eq!(after.write_faults, before.write_faults);
            assert_eq!(after.tlbis, before.tlbis, "an absent flag is in no TLB");
            assert_eq!(s.young(0), set([page(5)]));
        });
        sim.end();
    }
}

#[test]
fn invariant_09_a_dirty_page_is_young_until_it_is_harvested() {
    for (engine, features) in engines() {
        let sim = paged(features);
        sim.alone(|s| {
            s.start(engine, Granularity::Page);
            s.young(0);
            s.write(page(600));
            let before = s.world.leaves();
            assert_eq!(s.young(0), set([page(600)]));
            assert_eq!(s.young(0), set([page(600)]));
            assert_eq!(s.world.leaves(), before, "a dirty leaf was touched");
            assert_eq!(s.harvest(), set([page(600)]));
            assert_eq!(s.young(0), set([page(600)]));
            assert_eq!(s.young(0), set([]));
            // Clean and old, and written: both are known.
            s.write(page(600));
            assert_eq!(s.harvest(), set([page(600)]));
            s.stop();
        });
        sim.end();
    }
}

#[test]
fn invariant_09_aging_by_range_under_fire_loses_nothing() {
    const HOT: [u64; 8] = [0, 1, 63, 511, 512, 600, 1023, 1092];
    for (engine, features) in engines() {
        for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
            for seed in 0..12 {
                let every = [Some(2), Some(9), Some(60)][seed as usize % 3];
                let setup = Setup {
                    every,
                    ..Setup::new(features, seed)
                };
                let sim = vm(setup, RAM);
                let s = &sim;
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    (0..4).for_each(|_| drop(s.harvest()));
                });
                let aging = Box::new(|| (0..5).for_each(|_| drop(s.young(0))));
                let guest = Box::new(|| {
                    for _ in 0..60 {
                        let ipa = page(HOT[s.roll(8) as usize]);
                        match s.roll(4) {
                            0 => s.read(ipa),
                            _ => s.write(ipa),
                        }
                        s.breathe();
                    }
                });
                s.run(vec![manager, aging, guest]);
                s.alone(|s| {
                    s.last_round();
                    s.stop();
                    s.check_counts();
                    assert_eq!(s.world.stage2.mappings().blocks_2m, 2, "blocks are back");
                });
                sim.end();
            }
        }
    }
}

/// Asked for in pieces, a block is young for each of them, and then old.
#[test]
fn a_block_is_young_for_all_its_pages() {
    let sim = vm(Setup::new(dbm(), 1).calm(), RAM);
    sim.alone(|s| {
        let ask = |first, pages| {
            let mut words = [0; 8];
            let stage2 = &s.world.stage2;
            let asked = stage2.test_and_clear_young(SlotId(0), first, pages, &mut words);
            assert_eq!(asked, Ok(pages));
            words.iter().map(|word| word.count_ones()).sum::<u32>()
        };
        s.young(0);
        s.read(page(3));
        assert_eq!(ask(0, 64), 64);
        assert_eq!(ask(0, 64), 64);
        assert_eq!(ask(448, 128), 64, "the second block was not accessed");
        assert_eq!(ask(0, 512), 0);
        // Again of what was in the TLB.
        s.read(page(3));
        assert_eq!(ask(0, 512), 512);
        assert_eq!(s.world.stage2.mappings().blocks_2m, 2);
    });
    sim.end();
}

#[test]
fn a_query_is_of_whole_words_and_bounded() {
    let sim = paged(dbm());
    sim.alone(|s| {
        let stage2 = &s.world.stage2;
        let mut words = [0; 64];
        for (first, pages) in [(1, 64), (0, 63), (0, 0), (1024, 70), (u64::MAX - 63, 64)] {
            let slot = SlotId(0);
            let refused = stage2.test_and_clear_young(slot, first, pages, &mut words);
            assert_eq!(refused, Err(Error::PageRange { slot, first, pages }));
        }
        let none = stage2.test_and_clear_young(SlotId(9), 0, 64, &mut words);
        assert_eq!(none, Err(Error::NoSuchSlot(SlotId(9))));
        let mut few = [0; 2];
        let asked = stage2.test_and_clear_young(SlotId(0), 64, 1024, &mut few);
        assert_eq!(asked, Ok(128));
        assert_eq!(few, [u64::MAX; 2]);
        let asked = stage2.test_and_clear_young(SlotId(0), 0, PAGES, &mut words);
        assert_eq!(asked, Ok(PAGES));
        assert_eq!(words[..4], [u64::MAX, 0, 0, u64::MAX]);
        assert_eq!(words[PAGES as usize / 64..][..2], [(1 << 5) - 1, 0]);
    });
    sim.end();
}

/// A log that stops puts blocks back whatever was accessed.
#[test]
fn old_pages_become_a_block_again() {
    let sim = vm(Setup::new(dbm(), 1).calm(), RAM);
    sim.alone(|s| {
        s.start(Engine::Dbm, Granularity::Page);
        s.young(0);
        (0..300).for_each(|number| s.read(page(number)));
        s.stop();
        assert_eq!(s.world.stage2.mappings().blocks_2m, 2);
        let young = s.young(0);
        assert!((0..300).all(|number| young.contains(&page(number))));
        s.check_counts();
    });
    sim.end();
}
