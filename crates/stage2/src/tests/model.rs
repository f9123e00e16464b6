//! Random histories against a plain model.
//!
//! The model is a host that copies memory as it would over the wire: everything once a log has
//! started, then the pages of each epoch, and only when it commits. After every operation the ghost
//! invariant (1) is checked page by page, and at the end the copy equals the memory.

use super::world::*;
use crate::fake::Machine;
use crate::pte::{Kind, Pte};
use crate::types::*;
use crate::{Error, FaultAccess, Features, LogStage, Outcome, Support};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::vec;
use std::vec::Vec;

/// (id, base, pages, access, memory): slots that begin and end inside blocks, lie on unaligned
/// memory, share tables, hold a 1 GiB block, or are read-only.
const SLOTS: [(u16, u64, u64, Access, u64); 5] = [
    (
        0,
        GIB + 3 * PAGE_SIZE,
        2 * P2M + 100,
        Access::ReadWrite,
        RAM + 3 * PAGE_SIZE,
    ),
    (
        1,
        GIB + 4 * MIB + 103 * PAGE_SIZE,
        70,
        Access::ReadWrite,
        RAM + 16 * MIB + 5 * PAGE_SIZE,
    ),
    (2, GIB + 8 * MIB, P2M, Access::ReadOnly, RAM + 32 * MIB),
    (3, 4 * GIB, P1G + 33, Access::ReadWrite, RAM + 4 * GIB),
    (
        4,
        2 * GIB,
        P2M + 7,
        Access::ReadWrite,
        RAM + 64 * MIB + PAGE_SIZE,
    ),
];

/// Pages worth touching: edges of slots and blocks, and a few in the middle.
fn pages() -> Vec<u64> {
    let mut pages = BTreeSet::new();
    for (_, base, count, _, _) in SLOTS {
        for page in [
            0,
            1,
            62,
            63,
            64,
            65,
            count / 2,
            count / 2 + 1,
            count - 2,
            count - 1,
        ] {
            pages.insert(base + page * PAGE_SIZE);
        }
        for block in [P2M, 2 * P2M, 100 * P2M] {
            let page = block - (base >> 12) % P2M;
            for page in [page - 1, page, page + 1] {
                if page < count {
                    pages.insert(base + page * PAGE_SIZE);
                }
            }
        }
    }
    pages.into_iter().collect()
}

#[derive(Clone, Debug)]
enum Action {
    Write(usize, prop::sample::Index),
    Read(usize, prop::sample::Index),
    El2Write(prop::sample::Index),
    MapAhead(usize),
    Start(Engine, Granularity),
    StartStep,
    StopStep,
    SetEngine(Engine),
    TakeStep,
    Take,
    Commit,
    Abort,
    Delete(usize),
    Add(usize),
    Limit(usize),
    Flip,
}

fn engine() -> impl Strategy<Value = Engine> {
    prop_oneof![Just(Engine::WriteProtect), Just(Engine::Dbm)]
}

fn granularity() -> impl Strategy<Value = Granularity> {
    prop_oneof![
        Just(Granularity::Page),
        Just(Granularity::Adaptive),
        Just(Granularity::Block)
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        12 => (0..2usize, any::<prop::sample::Index>()).prop_map(|(pe, page)| Action::Write(pe, page)),
        6 => (0..2usize, any::<prop::sample::Index>()).prop_map(|(pe, page)| Action::Read(pe, page)),
        2 => any::<prop::sample::Index>().prop_map(Action::El2Write),
        2 => (0..SLOTS.len()).prop_map(Action::MapAhead),
        4 => (engine(), granularity()).prop_map(|(engine, granularity)| Action::Start(engine, granularity)),
        2 => Just(Action::StartStep),
        1 => Just(Action::StopStep),
        2 => engine().prop_map(Action::SetEngine),
        6 => Just(Action::TakeStep),
        3 => Just(Action::Take),
        4 => Just(Action::Commit),
        2 => Just(Action::Abort),
        1 => (0..SLOTS.len()).prop_map(Action::Delete),
        1 => (0..SLOTS.len()).prop_map(Action::Add),
        1 => (0..40usize).prop_map(Action::Limit),
        1 => Just(Action::Flip),
    ]
}

fn features() -> impl Strategy<Value = Features> {
    let support = || prop_oneof![Just(Support::Present), Just(Support::Absent)];
    (support(), support(), support(), support()).prop_map(|(dbm, bbm2, tlb_range, ttl)| Features {
        dbm,
        bbm2,
        tlb_range,
        ttl,
        ..Machine::everything()
    })
}

struct Host {
    world: World,
    pages: Vec<u64>,
    present: [bool; SLOTS.len()],
    access: [Access; SLOTS.len()],
    mode: Option<(Engine, Granularity)>,
    /// The log has said it is started: from here on nothing may be lost.
    on: bool,
    stopping: bool,
    epoch: Option<(Epoch, bool)>,
    /// What the host has of each page.
    copied: BTreeMap<u64, u64>,
    /// Pages written since the last harvest finished: all that page granularity may report.
    written: BTreeSet<u64>,
    /// Pages written while the harvest under way was stepping.
    during: BTreeSet<u64>,
    aborted: BTreeSet<u64>,
    /// Table memory is short now.
    starved: bool,
    /// It was at some time, so a block may have stayed where pages were asked for.
    ever_starved: bool,
}

impl Host {
    fn new(features: Features) -> Self {
        let host = Self {
            world: World::sized(features, 40, 700, 2),
            pages: pages(),
            present: [true; SLOTS.len()],
            access: SLOTS.map(|slot| slot.3),
            mode: None,
            on: false,
            stopping: false,
            epoch: None,
            copied: BTreeMap::new(),
            written: BTreeSet::new(),
            during: BTreeSet::new(),
            aborted: BTreeSet::new(),
            starved: false,
            ever_starved: false,
        };
        (0..SLOTS.len()).for_each(|slot| host.add(slot));
        host
    }

    fn add(&self, slot: usize) {
        let (id, base, pages, access, pa) = SLOTS[slot];
        self.world.slot(id, base, pages, access, pa);
    }

    fn slot_of(&self, ipa: u64) -> usize {
        let holds = |slot: &(u16, u64, u64, Access, u64)| {
            slot.1 <= ipa && ipa < slot.1 + slot.2 * PAGE_SIZE
        };
        SLOTS.iter().position(holds).unwrap()
    }

    fn wrote(&mut self, ipa: u64) {
        self.written.insert(ipa);
        self.during.insert(ipa);
    }

    fn access(&mut self, pe: usize, ipa: u64, access: FaultAccess) {
        let slot = self.slot_of(ipa);
        let expected = if !self.present[slot] {
            Err(Outcome::NotMemory)
        } else if access == FaultAccess::Write && self.access[slot] == Access::ReadOnly {
            Err(Outcome::ReadOnly)
        } else {
            Ok(())
        };
        let mut found = self.world.access(pe, ipa, access).map(drop);
        if found == Err(Outcome::OutOfTables) {
            assert!(self.starved, "there was memory for tables");
            self.starved = false;
            self.world.machine.limit_tables(700);
            found = self.world.access(pe, ipa, access).map(drop);
        }
        assert_eq!(found, expected, "{ipa:#x}");
        if access == FaultAccess::Write && found.is_ok() {
            self.wrote(ipa);
        }
    }

    fn copy(&mut self, ipa: u64) {
        let content = self.world.content(ipa);
        self.copied.insert(ipa, content);
    }

    fn start_step(&mut self) {
        let Some((engine, granularity)) = self.mode else {
            return;
        };
        if self.on || self.stopping {
            return;
        }
        if self.world.stage2.start_log(engine, granularity).unwrap() == Progress::Done {
            self.on = true;
            for ipa in self.pages.clone() {
                if self.present[self.slot_of(ipa)] {
                    self.copy(ipa);
                }
            }
        }
    }

    fn take_step(&mut self) {
        if !self.on {
            return;
        }
        let epoch = match self.epoch {
            Some((epoch, _)) => epoch,
            None => {
                self.during.clear();
                self.world.new_epoch()
            }
        };
        let done = self.world.stage2.take(epoch).unwrap() == Progress::Done;
        let was = self.epoch.replace((epoch, done));
        if done && !matches!(was, Some((_, true))) {
            let reported = self.world.read_epoch(epoch);
            // Nothing but what was written, where a page is the grain and memory was there to split.
            if matches!(self.mode, Some((_, Granularity::Page))) && !self.ever_starved {
                let allowed: BTreeSet<u64> = self.written.union(&self.aborted).copied().collect();
                let extra: Vec<_> = reported.difference(&allowed).take(5).collect();
                assert!(extra.is_empty(), "never written: {extra:x?}");
            }
            self.written = self.during.clone();
            self.aborted.clear();
        }
    }

    fn settle(&mut self, fate: fn(&mut Self, Epoch)) {
        if let Some((epoch, _)) = self.epoch {
            fate(self, epoch);
        }
    }

    fn commit(&mut self, epoch: Epoch) {
        if self.epoch == Some((epoch, false)) {
            assert_eq!(
                self.world.stage2.commit(epoch),
                Err(Error::TakeUnfinished(epoch))
            );
            return;
        }
        let reported = self.world.read_epoch(epoch);
        for ipa in self.pages.clone() {
            if reported.contains(&ipa) {
                self.copy(ipa);
            }
        }
        self.world.stage2.commit(epoch).unwrap();
        self.epoch = None;
    }

    fn abort(&mut self, epoch: Epoch) {
        if self.epoch == Some((epoch, true)) {
            self.aborted.extend(self.world.read_epoch(epoch));
        } else {
            self.aborted.extend(self.written.iter().copied());
        }
        self.world.stage2.abort(epoch).unwrap();
        self.epoch = None;
    }

    fn stop_step(&mut self) {
        if self.mode.is_none() {
            assert_eq!(self.world.stage2.stop_log(), Err(Error::NotLogging));
            return;
        }
        if self.world.stage2.log_status().stage == LogStage::Off {
            return;
        }
        if let Some((epoch, _)) = self.epoch {
            assert_eq!(
                self.world.stage2.stop_log(),
                Err(Error::EpochOutstanding(epoch))
            );
            return;
        }
        (self.on, self.stopping) = (false, true);
        if self.world.stage2.stop_log().unwrap() == Progress::Done {
            (self.stopping, self.mode) = (false, None);
            assert!(
                self.world
                    .leaves()
                    .iter()
                    .all(|(_, _, pte)| !pte.is_tracked())
            );
        }
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Write(pe, page) => self.access(*pe, *page.get(&self.pages), FaultAccess::Write),
            Action::Read(pe, page) => self.access(*pe, *page.get(&self.pages), FaultAccess::Read),
            Action::El2Write(page) => {
                let ipa = *page.get(&self.pages);
                if self.present[self.slot_of(ipa)] {
                    self.world.el2_write(ipa);
                    self.wrote(ipa);
                }
            }
            Action::MapAhead(slot) => {
                let from = self.world.stage2.map_ahead(SlotId(SLOTS[*slot].0), 0);
                let refused = matches!(from, Err(Error::NoSuchSlot(_) | Error::OutOfTables));
                assert!(from.is_ok() || refused, "{from:?}");
            }
            Action::Start(engine, granularity) => {
                let usable = self.world.stage2.features().dbm == Support::Present;
                if self.mode.is_none() && (usable || *engine == Engine::WriteProtect) {
                    self.mode = Some((*engine, *granularity));
                    self.written.clear();
                    self.aborted.clear();
                }
                // Mostly started in one go, sometimes left half way.
                for _ in 0..8 {
                    self.start_step();
                }
            }
            Action::StartStep => self.start_step(),
            Action::StopStep => self.stop_step(),
            Action::SetEngine(engine) => {
                let _ = self.world.stage2.set_engine(*engine);
            }
            Action::TakeStep => self.take_step(),
            Action::Take => {
                for _ in 0..10_000 {
                    self.take_step();
                    if !matches!(self.epoch, Some((_, false))) {
                        return;
                    }
                }
                panic!("a take never finished");
            }
            Action::Commit => self.settle(Self::commit),
            Action::Abort => self.settle(Self::abort),
            Action::Delete(slot) => {
                if self.present[*slot] {
                    self.world.delete(SLOTS[*slot].0);
                    self.present[*slot] = false;
                    let gone = |ipa: &u64| {
                        SLOTS[*slot].1 <= *ipa && *ipa < SLOTS[*slot].1 + SLOTS[*slot].2 * PAGE_SIZE
                    };
                    self.copied.retain(|ipa, _| !gone(ipa));
                }
            }
            Action::Add(slot) => {
                if !self.present[*slot] {
                    self.add(*slot);
                    self.present[*slot] = true;
                    self.access[*slot] = SLOTS[*slot].3;
                    // The host copies a slot whole when it first sees it.
                    for ipa in self.pages.clone() {
                        if self.slot_of(ipa) == *slot {
                            self.copy(ipa);
                        }
                    }
                }
            }
            Action::Flip => {
                const FLIPPED: usize = 4;
                if self.present[FLIPPED] {
                    let access = match self.access[FLIPPED] {
                        Access::ReadOnly => Access::ReadWrite,
                        Access::ReadWrite => Access::ReadOnly,
                    };
                    self.access[FLIPPED] = access;
                    finish(|| self.world.stage2.set_access(SlotId(4), access)).unwrap();
                }
            }
            Action::Limit(more) => {
                self.world
                    .machine
                    .limit_tables(self.world.machine.tables_in_use() + more);
                (self.starved, self.ever_starved) = (true, true);
            }
        }
    }

    /// Invariant 1: what the host lacks is known to the tables or the bitmaps.
    fn check_ghost(&self) {
        if !self.on {
            return;
        }
        let layout = self.world.stage2.layout.read();
        for (ipa, copied) in &self.copied {
            let slot = layout.slot_at(Ipa::new(*ipa)).unwrap();
            let pa = slot.backing(slot.page(*ipa)).unwrap().0.raw();
            if self
                .world
                .ram
                .lock()
                .unwrap()
                .get(&pa)
                .copied()
                .unwrap_or(0)
                == *copied
            {
                continue;
            }
            let page = slot.page(*ipa);
            let (entry, level) = self.world.machine.walk(self.world.guest, *ipa);
            let pte = Pte(entry.load(Ordering::SeqCst));
            let known = pte.kind(LEVELS[level as usize]) == Kind::Leaf && pte.is_dirty();
            assert!(
                known || slot.dirty.knows(page),
                "{ipa:#x} was written and nothing knows it"
            );
        }
    }

    fn check_read_only(&self) {
        let (_, base, pages, _, _) = SLOTS[2];
        let leaves = self.world.leaves();
        let writable = leaves.iter().find(|(ipa, _, pte)| {
            (base..base + pages * PAGE_SIZE).contains(ipa)
                && (pte.is_writable() || pte.is_tracked())
        });
        assert_eq!(writable, None);
    }

    /// The guest stops, the host takes what is left: the copy is the memory.
    fn finish(mut self) {
        self.settle(Self::abort);
        if self.on {
            self.act(&Action::Take);
            self.settle(Self::commit);
            for (ipa, copied) in &self.copied {
                assert_eq!(self.world.content(*ipa), *copied, "{ipa:#x} was lost");
            }
            assert!(
                self.world.harvest().is_empty(),
                "a second harvest after the last is empty"
            );
        }
        let world = self.world;
        if world.stage2.log_status().stage != LogStage::Off {
            world.stop();
        }
        let machine = std::sync::Arc::clone(&world.machine);
        drop(world);
        assert_eq!(machine.tables_in_use(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn inv01_no_history_loses_a_page(features in features(), actions in prop::collection::vec(action(), 1..120)) {
        let mut host = Host::new(features);
        for action in &actions {
            host.act(action);
            host.check_ghost();
        }
        host.check_read_only();
        host.finish();
    }
}
