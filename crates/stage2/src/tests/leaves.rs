//! Memory that is mapped in pages alone.

use super::world::*;
use crate::types::*;
use crate::{Features, Leaves};

const IPA: u64 = 0x4000_0000;

/// Where blocks do not pay there are none: not ahead, not at a touch, and not when a log has ended.
#[test]
fn where_leaves_are_pages_there_is_no_block() {
    const PAGES: u64 = 32 * P2M;
    for (engine, features) in engines() {
        let features = Features {
            leaves: Leaves::Pages,
            ..features
        };
        let world = World::new(features);
        world.slot(0, IPA, PAGES, Access::ReadWrite, RAM);
        let no_blocks = |pages_4k| {
            let mappings = world.stage2.mappings();
            assert_eq!(
                (mappings.blocks_1g, mappings.blocks_2m, mappings.pages_4k),
                (0, 0, pages_4k)
            );
        };
        world.touch(0, IPA + 7 * PAGE_SIZE);
        no_blocks(P2M);
        world.map_all(0);
        no_blocks(PAGES);
        for granularity in [Granularity::Page, Granularity::Block, Granularity::Adaptive] {
            world.start(engine, granularity);
            world.write(0, IPA + 5 * MIB);
            assert!(world.harvest().contains(&(IPA + 5 * MIB)));
            world.stop();
            no_blocks(PAGES);
        }
        assert_eq!(world.stage2.counters().collapses, 0);
        assert_eq!(world.stage2.counters().splits, 0);
    }
}
