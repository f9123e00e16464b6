use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const RAM: PageRun = PageRun::new(Gfn(0x40000), 16 * BLOCK_PAGES);

fn holes() -> [PageRun; 3] {
    [
        PageRun::new(Gfn(0x40200), 0x80),
        PageRun::EMPTY,
        PageRun::new(Gfn(0x41000), 3),
    ]
}

fn pages(writes: Writes<'_>) -> BTreeSet<Gfn> {
    writes.flat_map(|write| write.run.pages()).collect()
}

#[test]
fn the_same_numbers_give_the_same_writes_and_others_do_not() {
    let holes = holes();
    let layout = Layout::new(RAM, &holes);
    let config = Config {
        vcpus: 2,
        ..Config::default()
    };
    let make = |config: &Config, vcpu, iteration| {
        writes(&layout, config, vcpu, iteration).collect::<Vec<_>>()
    };
    let first = make(&config, Vcpu(0), Iteration(1));
    assert_eq!(first, make(&config, Vcpu(0), Iteration(1)));
    assert_ne!(first, make(&config, Vcpu(1), Iteration(1)));
    assert_ne!(first, make(&config, Vcpu(0), Iteration(2)));
    assert_ne!(
        first,
        make(
            &Config {
                seed: Seed(2),
                ..config
            },
            Vcpu(0),
            Iteration(1)
        )
    );
}

/// The guest and the host are built separately; this pins the function they must agree on.
#[test]
fn the_pattern_is_the_one_it_was() {
    let holes = holes();
    let layout = Layout::new(RAM, &holes);
    let mut sum = Sum::NEW;
    for iteration in 1..=100 {
        for vcpu in 0..4 {
            for write in writes(
                &layout,
                &Config::default(),
                Vcpu(vcpu),
                Iteration(iteration),
            ) {
                for store in write.stores(Vcpu(vcpu), Iteration(iteration)) {
                    sum.add(store.ipa);
                    sum.add(store.value);
                }
            }
        }
    }
    assert_eq!(
        sum.0, GOLDEN,
        "the pattern changed: guests and host of different versions would disagree"
    );
}
const GOLDEN: u64 = 13_811_476_431_299_321_765;

#[test]
fn every_kind_of_write_comes_up() {
    let holes = holes();
    let layout = Layout::new(RAM, &holes);
    let config = Config {
        vcpus: 2,
        ..Config::default()
    };
    let mut seen = BTreeSet::new();
    let mut times = BTreeMap::<Gfn, u32>::new();
    let mut shared = 0;
    for iteration in 1..=64 {
        let [a, b] =
            [0, 1].map(|vcpu| pages(writes(&layout, &config, Vcpu(vcpu), Iteration(iteration))));
        shared += a.intersection(&b).count();
        for page in a.union(&b) {
            *times.entry(*page).or_default() += 1;
        }
        for write in writes(&layout, &config, Vcpu(0), Iteration(iteration)) {
            let run = write.run;
            let crosses = (run.end().0 - 1) / BLOCK_PAGES != run.first.0 / BLOCK_PAGES;
            seen.insert(match (write.shape, run.count) {
                (Shape::Straddle, _) if crosses => "store across a block edge",
                (Shape::Straddle, _) => "store across a page edge",
                (Shape::Stamp, 1) if run.first == RAM.first => "first page",
                (Shape::Stamp, 1) if run.end() == RAM.end() => "last page",
                (Shape::Stamp, 1) => "lone page",
                (Shape::Stamp, BLOCK_PAGES) if run.first.0 % BLOCK_PAGES == 0 => "whole block",
                (Shape::Stamp, _) if crosses => "run across a block edge",
                (Shape::Stamp, _) => "run",
            });
        }
    }
    assert_eq!(seen.len(), 8, "missing kinds: only {seen:?}");
    assert!(
        shared > 64,
        "two vCPUs must often write the same page in the same iteration, shared {shared}"
    );
    let hot = times.values().filter(|times| **times >= 16).count();
    assert!(hot >= 16, "the hot set must come back, {hot} pages did");
}

#[test]
fn free_runs_are_what_is_left_of_ram() {
    let holes = [
        PageRun::new(Gfn(12), 2),
        PageRun::new(Gfn(8), 3),
        PageRun::new(Gfn(13), 3),
        PageRun::new(Gfn(50), 9),
    ];
    let layout = Layout::new(PageRun::new(Gfn(10), 10), &holes);
    let runs: Vec<_> = layout.free(PageRun::new(Gfn(0), u64::MAX)).collect();
    assert_eq!(runs, [PageRun::new(Gfn(11), 1), PageRun::new(Gfn(16), 4)]);
    assert_eq!(layout.free(PageRun::new(Gfn(12), 2)).next(), None);
}

#[test]
fn stores_of_one_page_do_not_overlap() {
    let run = PageRun::new(Gfn(1), 1);
    let mut bytes = BTreeSet::new();
    for vcpu in 0..Vcpu::MAX as u8 {
        for store in (Write {
            run,
            shape: Shape::Stamp,
        })
        .stores(Vcpu(vcpu), Iteration(7))
        {
            assert!((0..8).all(|n| bytes.insert(store.ipa + n)));
        }
    }
    // A straddling store is the same whoever makes it, and touches no stamp.
    let straddle = Write {
        run: PageRun::new(Gfn(0), 2),
        shape: Shape::Straddle,
    };
    let stores: Vec<_> = straddle.stores(Vcpu(3), Iteration(7)).collect();
    assert_eq!(
        stores,
        [Store {
            ipa: 4092,
            value: 0x7_0000_0007
        }]
    );
    assert!((0..8).all(|n| bytes.insert(4092 + n)));
}

#[test]
fn covering_counts_the_pages_touched() {
    assert_eq!(PageRun::covering(4095, 2), PageRun::new(Gfn(0), 2));
    assert_eq!(PageRun::covering(4096, 4096), PageRun::new(Gfn(1), 1));
    assert_eq!(PageRun::covering(4096, 0), PageRun::EMPTY);
    assert!(PageRun::covering(u64::MAX, u64::MAX).count == 1);
}

proptest! {
    #[test]
    fn writes_are_bounded_and_never_in_a_hole(
        seed: u64, vcpu in 0u8..16, iteration: u64, budget in 0u32..400, blocks in 0u32..4,
        base in 0u64..0x2_0000_0000, size in 0u64..3000,
        holes in proptest::collection::vec((0u64..3200, 0u64..700), 0..4),
    ) {
        let holes: Vec<_> = holes.iter().map(|(at, count)| PageRun::new(Gfn(base + at), *count)).collect();
        let layout = Layout::new(PageRun::new(Gfn(base), size), &holes);
        let config = Config { seed: Seed(seed), vcpus: 16, pages: budget, blocks, more: 0 };
        let mut total = 0;
        for write in writes(&layout, &config, Vcpu(vcpu), Iteration(iteration)) {
            prop_assert!(write.run.count > 0);
            total += write.run.count;
            for page in write.run.pages() {
                prop_assert!(layout.is_free(page), "{page:?}");
            }
            for store in write.stores(Vcpu(vcpu), Iteration(iteration)) {
                prop_assert!(write.run.contains(Gfn(store.ipa / PAGE_BYTES)));
                prop_assert!(write.run.contains(Gfn((store.ipa + 7) / PAGE_BYTES)));
            }
        }
        prop_assert!(total <= u64::from(budget) + BLOCK_PAGES);
    }

    #[test]
    fn free_runs_agree_with_is_free(
        start in 0u64..40, count in 0u64..40,
        holes in proptest::collection::vec((0u64..50, 0u64..10), 0..6),
    ) {
        let holes: Vec<_> = holes.iter().map(|(at, count)| PageRun::new(Gfn(*at), *count)).collect();
        let layout = Layout::new(PageRun::new(Gfn(5), 30), &holes);
        let range = PageRun::new(Gfn(start), count);
        let listed: Vec<_> = layout.free(range).flat_map(PageRun::pages).collect();
        let expected: Vec<_> = range.pages().filter(|page| layout.is_free(*page)).collect();
        prop_assert_eq!(listed, expected);
    }
}
