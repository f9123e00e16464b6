//! The three bugs of the 2014 KVM/ARM dirty-logging patches, found in review then: attributes lost
//! on write protection, 1 GiB blocks refused, addresses cut to 32 bits.

use super::world::*;
use crate::pte::{Permission, Pte};
use crate::types::*;
use std::sync::atomic::Ordering;

/// Everything that protecting, splitting and releasing may change.
fn fixed(pte: Pte) -> u64 {
    const MOVED: u64 = 0x0000_ffff_ffff_f000 | 0b10;
    pte.with(Permission::ReadOnly).0 & !MOVED
}

#[test]
fn bug_1_attributes_survive_every_change() {
    for (engine, features) in engines() {
        for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
            let world = World::sized(features, 40, 64, 2);
            world.slot(0, 0x4000_0000, 2 * P2M, Access::ReadWrite, RAM);
            world.map_all(0);
            // Attributes nobody here sets: execute-never, hardware-use bits, outer shareable,
            // another memory type. Protection must carry them all along.
            for ipa in [0x4000_0000, 0x4020_0000] {
                let entry = world.entry(ipa);
                entry.fetch_or(0b10 << 53 | 0b1001 << 59, Ordering::SeqCst);
                entry.fetch_and(!(0b1 << 8 | 0b1 << 5), Ordering::SeqCst);
            }
            let before = world.leaves();
            let attributes = fixed(before[0].2);
            assert_ne!(
                attributes,
                fixed(Pte::leaf(
                    Level::L3,
                    Pa::new(0),
                    world.stage2.shape.attr,
                    Permission::ReadOnly
                ))
            );
            let check = |when| {
                let leaves = world.leaves();
                assert!(
                    leaves.iter().all(|(_, _, pte)| fixed(*pte) == attributes),
                    "{when} {engine:?} {granularity:?}"
                );
            };
            world.start(engine, granularity);
            check("started");
            for _ in 0..3 {
                world.write(0, 0x4000_1000);
                check("written");
                world.harvest();
                check("harvested");
            }
            world.stop();
            assert_eq!(world.leaves(), before);
        }
    }
}

#[test]
fn bug_2_a_1_gib_block_is_tracked_split_and_put_back() {
    for (engine, features) in engines() {
        for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
            let world = World::sized(features, 40, 600, 2);
            world.slot(0, GIB, P1G, Access::ReadWrite, RAM);
            world.map_all(0);
            assert_eq!(world.stage2.mappings().blocks_1g, 1);
            world.start(engine, granularity);
            let ipa = GIB + 700 * MIB + 5 * PAGE_SIZE;
            let block = ipa & !(2 * MIB - 1);
            let rounds: [_; 3] = core::array::from_fn(|_| {
                world.write(0, ipa);
                world.harvest()
            });
            let expected = match granularity {
                Granularity::Page => [set([ipa]), set([ipa]), set([ipa])],
                Granularity::Adaptive => [span(GIB, GIB), span(block, 2 * MIB), set([ipa])],
                Granularity::Block => [span(GIB, GIB), span(GIB, GIB), span(GIB, GIB)],
            };
            assert_eq!(rounds, expected, "{engine:?} {granularity:?}");
            let left = world.stage2.mappings();
            let shape = (left.blocks_1g, left.blocks_2m, left.pages_4k);
            match granularity {
                Granularity::Page => assert_eq!(shape, (0, 0, P1G)),
                Granularity::Adaptive => assert_eq!(shape, (0, 511, P2M)),
                Granularity::Block => assert_eq!(shape, (1, 0, 0)),
            }
            world.stop();
            let back = world.stage2.mappings();
            assert_eq!((back.blocks_1g, back.blocks_2m, back.pages_4k), (1, 0, 0));
        }
    }
}

#[test]
fn bug_3_nothing_wraps_above_4_gib() {
    for bits in [40, 44, 48] {
        for (engine, mut features) in engines() {
            features.pa_bits = 48;
            let world = World::sized(features, bits, 600, 2);
            let top = 1u64 << bits;
            // Across 4 GiB, and the last pages of the address space; the same low 32 bits as slot 2.
            let bases = [
                4 * GIB - 3 * PAGE_SIZE,
                top - (P2M + 7) * PAGE_SIZE,
                8 * PAGE_SIZE,
            ];
            let pages = [P2M + 9, P2M + 7, P2M];
            for (id, (base, pages)) in bases.into_iter().zip(pages).enumerate() {
                world.slot(
                    id as u16,
                    base,
                    pages,
                    Access::ReadWrite,
                    (1 << 39) + id as u64 * GIB + base % GIB,
                );
                world.map_all(id as u16);
            }
            world.start(engine, Granularity::Page);
            let written = set([
                4 * GIB - PAGE_SIZE,
                4 * GIB,
                4 * GIB + 8 * PAGE_SIZE,
                top - PAGE_SIZE,
                top - (P2M + 7) * PAGE_SIZE,
            ]);
            written.iter().for_each(|ipa| world.touch(0, *ipa));
            assert_eq!(world.harvest(), written, "{bits} {engine:?}");
            world.stage2.mark_dirty(Ipa::new(top - 1), 1).unwrap();
            assert!(world.stage2.mark_dirty(Ipa::new(top - 1), 2).is_err());
            assert_eq!(world.harvest(), set([top - PAGE_SIZE]));
            world.stop();
        }
    }
}
