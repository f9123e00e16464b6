//! What a random history is made of: slots, and who does what, on which machine. In which order is for a seed to say.

use crate::control::Initially;
use crate::fake::{Machine, Speculation};
use crate::tests::sim::Place;
use crate::tests::world::*;
use crate::types::*;
use crate::{Features, Leaves, Support, Tlbi};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::vec;
use std::vec::Vec;

/// Slots that begin and end inside blocks, lie on unaligned memory, share tables, are read-only, change
/// their access, or hold a block of 1 GiB.
pub(super) fn places(large: Large) -> [Place; 5] {
    let place = |id, ipa, pages, access, pa| Place {
        id,
        ipa,
        pages,
        access,
        pa,
    };
    let (pages, page) = (
        match large {
            Large::Gib => P1G + 33,
            Large::None => 2 * P2M + 33,
        },
        PAGE_SIZE,
    );
    let (writable, read_only) = (Access::ReadWrite, Access::ReadOnly);
    [
        place(0, GIB + 3 * page, 2 * P2M + 100, writable, RAM + 3 * page),
        place(
            1,
            GIB + 4 * MIB + 103 * page,
            70,
            writable,
            RAM + 16 * MIB + 5 * page,
        ),
        place(2, GIB + 8 * MIB, P2M, read_only, RAM + 32 * MIB),
        place(3, 4 * GIB, pages, writable, RAM + 4 * GIB),
        place(4, 2 * GIB, P2M + 7, writable, RAM + 64 * MIB),
    ]
}

/// The one whose access changes.
pub(super) const FLIPPED: usize = 4;

/// Pages worth touching: edges of slots and blocks, and a few in the middle.
pub(super) fn pages(places: &[Place]) -> Vec<u64> {
    let mut pages = BTreeSet::new();
    for Place { ipa, pages: n, .. } in places {
        let blocks = [P2M, 2 * P2M, 100 * P2M].map(|block| block - (ipa >> 12) % P2M);
        let around = blocks.iter().flat_map(|at| [at - 1, *at, at + 1]);
        let few = [0, 1, 62, 63, 64, 65, n / 2, n / 2 + 1, n - 2, n - 1];
        let wanted = few.into_iter().chain(around).filter(|page| page < n);
        pages.extend(wanted.map(|page| ipa + page * PAGE_SIZE));
    }
    pages.into_iter().collect()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Large {
    /// A slot with a block of 1 GiB.
    Gib,
    None,
}

/// Something the manager does.
#[derive(Clone, Debug)]
pub(super) enum Manage {
    Start(Engine, Granularity, Initially),
    StartStep,
    StopStep,
    SetEngine(Engine),
    AdaptEngine,
    BringOver,
    TakeStep,
    Take,
    TakeRange(usize, prop::sample::Index, prop::sample::Index),
    Copy,
    Commit,
    Abort,
    GiveUp,
    Delete(usize),
    Add(usize),
    Limit(usize),
    Run(Run),
}

/// Something any CPU does.
#[derive(Clone, Debug)]
pub(super) enum Run {
    Write(prop::sample::Index),
    Read(prop::sample::Index),
    El2Write(prop::sample::Index),
    MapAhead(usize),
    Age(usize),
    /// Changes a slot's access.
    Flip,
    /// One step of whatever the manager is about.
    Help,
    /// The vCPU exits, with its barrier.
    Exit,
}

pub(super) fn engine() -> impl Strategy<Value = Engine> {
    prop_oneof![Just(Engine::WriteProtect), Just(Engine::Dbm)]
}

pub(super) fn initially() -> impl Strategy<Value = Initially> {
    prop_oneof![3 => Just(Initially::Clean), 1 => Just(Initially::Dirty)]
}

pub(super) fn granularity() -> impl Strategy<Value = Granularity> {
    prop_oneof![
        Just(Granularity::Page),
        Just(Granularity::Adaptive),
        Just(Granularity::Block)
    ]
}

pub(super) fn manage() -> impl Strategy<Value = Manage> {
    prop_oneof![
        4 => (engine(), granularity(), initially()).prop_map(|(engine, granularity, initially)| {
            Manage::Start(engine, granularity, initially)
        }),
        2 => Just(Manage::StartStep),
        1 => Just(Manage::StopStep),
        2 => engine().prop_map(Manage::SetEngine),
        1 => Just(Manage::AdaptEngine),
        2 => Just(Manage::BringOver),
        5 => Just(Manage::TakeStep),
        4 => Just(Manage::Take),
        3 => (0..5usize, any::<prop::sample::Index>(), any::<prop::sample::Index>())
            .prop_map(|(slot, from, to)| Manage::TakeRange(slot, from, to)),
        2 => Just(Manage::Copy),
        4 => Just(Manage::Commit),
        2 => Just(Manage::Abort),
        1 => Just(Manage::GiveUp),
        1 => (0..5usize).prop_map(Manage::Delete),
        1 => (0..5usize).prop_map(Manage::Add),
        1 => (0..40usize).prop_map(Manage::Limit),
        1 => Just(Manage::Run(Run::Flip)),
        8 => run().prop_map(Manage::Run),
    ]
}

pub(super) fn run() -> impl Strategy<Value = Run> {
    let page = any::<prop::sample::Index>;
    prop_oneof![
        12 => page().prop_map(Run::Write),
        5 => page().prop_map(Run::Read),
        1 => page().prop_map(Run::El2Write),
        1 => (0..5usize).prop_map(Run::MapAhead),
        1 => (0..5usize).prop_map(Run::Age),
        1 => Just(Run::Flip),
        2 => Just(Run::Help),
        1 => Just(Run::Exit),
    ]
}

#[derive(Clone, Debug)]
pub(super) struct History {
    pub(super) features: Features,
    pub(super) large: Large,
    pub(super) seed: u64,
    pub(super) every: Option<u32>,
    pub(super) whims: Option<Speculation>,
    pub(super) manager: Vec<Manage>,
    pub(super) cpus: [Vec<Run>; 2],
}

pub(super) fn features() -> impl Strategy<Value = Features> {
    let support = || prop_oneof![Just(Support::Present), Just(Support::Absent)];
    let tlbi = prop_oneof![Just(Tlbi::Once), Just(Tlbi::Twice)];
    let leaves = prop_oneof![3 => Just(Leaves::Blocks), 1 => Just(Leaves::Pages)];
    (support(), support(), support(), support(), tlbi, leaves).prop_map(
        |(dbm, bbm2, tlb_range, ttl, tlbi, leaves)| Features {
            dbm,
            bbm2,
            tlb_range,
            ttl,
            tlbi,
            leaves,
            ..Machine::everything()
        },
    )
}

pub(super) fn history() -> impl Strategy<Value = History> {
    let large = prop_oneof![1 => Just(Large::Gib), 500 => Just(Large::None)];
    let every = prop_oneof![
        2 => Just(None),
        3 => (2..40u32).prop_map(Some),
        3 => (40..3000u32).prop_map(Some)
    ];
    let whims = prop_oneof![
        2 => Just(None),
        3 => Just(Some(Speculation::Never)),
        1 => Just(Some(Speculation::Sometimes))
    ];
    let run = || prop::collection::vec(run(), 0..30);
    let manager = prop::collection::vec(manage(), 1..40);
    (
        features(),
        large,
        any::<u64>(),
        every,
        whims,
        manager,
        [run(), run()],
    )
        .prop_map(
            |(features, large, seed, every, whims, manager, cpus)| History {
                features,
                large,
                seed,
                every,
                whims,
                manager,
                cpus,
            },
        )
}
