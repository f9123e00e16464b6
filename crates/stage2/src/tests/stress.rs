//! Guests that write while the host harvests, on real threads.
//!
//! Each writer is a CPU with its own TLB and updates dirty state by compare-and-swap, as the hardware
//! does. The host copies what it is told, round after round, while they go on. Then they stop and one
//! last round must leave copy and memory equal: nothing was lost on the way (invariants 1, 2, 4, 13).

use super::world::*;
use crate::fake::Machine;
use crate::types::*;
use crate::{FaultAccess, Features, Outcome};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
/// Begins and ends inside a block.
const LEAD: u64 = 5;
const PAGES: u64 = 2 * P2M + 77;
const BASE: u64 = IPA + LEAD * PAGE_SIZE;
/// Pages the guests fight over; few, so that they meet the harvester often.
const HOT: [u64; 12] = [0, 1, 62, 63, 64, 506, 507, 508, 1018, 1019, 1020, PAGES - 1];

struct Arena {
    world: World,
    memory: Vec<AtomicU64>,
    stop: AtomicBool,
    writes: AtomicU64,
    /// Writers that have not stopped.
    running: AtomicUsize,
}

impl Arena {
    fn new(features: Features) -> Self {
        let world = World::sized(features, 39, 64, 8);
        world.slot(0, BASE, PAGES, Access::ReadWrite, RAM + LEAD * PAGE_SIZE);
        let memory = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        Self {
            world,
            memory,
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            running: AtomicUsize::new(0),
        }
    }

    fn guest_write(&self, pe: usize, page: u64) {
        let (machine, guest) = (&self.world.machine, self.world.guest);
        loop {
            let store = |pa: Pa| {
                let page = (pa.raw() - RAM) / PAGE_SIZE - LEAD;
                self.memory[page as usize].fetch_add(1, Ordering::SeqCst);
            };
            match machine.access(
                pe,
                guest,
                BASE + page * PAGE_SIZE,
                FaultAccess::Write,
                store,
            ) {
                Ok(()) => return,
                Err(abort) => {
                    let outcome = self.world.stage2.handle_fault(abort);
                    assert!(
                        matches!(
                            outcome,
                            Outcome::Resume | Outcome::Dirtied(_) | Outcome::Retry
                        ),
                        "{outcome:?}"
                    );
                }
            }
        }
    }

    fn write_for_ever(&self, pe: usize) {
        self.world.machine.become_pe(pe);
        let mut state = pe as u64 + 1;
        while !self.stop.load(Ordering::SeqCst) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let random = state >> 33;
            let page = if random.is_multiple_of(8) {
                random / 8 % PAGES
            } else {
                HOT[(random / 8) as usize % HOT.len()]
            };
            self.guest_write(pe, page);
            let writes = self.writes.fetch_add(1, Ordering::Relaxed);
            if writes.is_multiple_of(16) {
                // Who waits for this CPU's TLB wins its lock only while nobody wants it.
                thread::yield_now();
            }
        }
    }

    fn el2_write(&self, page: u64) {
        self.memory[page as usize].fetch_add(1, Ordering::SeqCst);
        self.world
            .stage2
            .mark_dirty(Ipa::new(BASE + page * PAGE_SIZE), 1)
            .unwrap();
    }

    fn copy_all(&self, copy: &mut [u64]) {
        for (to, from) in copy.iter_mut().zip(&self.memory) {
            *to = from.load(Ordering::SeqCst);
        }
    }

    fn copy_epoch(&self, epoch: Epoch, copy: &mut [u64]) {
        let words = self.world.stage2.in_flight(SlotId(0), epoch).unwrap();
        for page in pages_of(&words) {
            copy[page as usize] = self.memory[page as usize].load(Ordering::SeqCst);
        }
    }

    fn lost(&self, copy: &[u64]) -> Vec<usize> {
        let now = self.memory.iter().map(|word| word.load(Ordering::SeqCst));
        now.zip(copy)
            .enumerate()
            .filter(|(_, (now, copy))| now != *copy)
            .map(|(page, _)| page)
            .collect()
    }
}

/// What the host does besides taking.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// Aborts some epochs, half way or whole.
    Aborts,
    /// Switches engines.
    Switches,
}

fn soak(
    features: Features,
    engine: Engine,
    granularity: Granularity,
    trouble: Trouble,
    time: Duration,
) {
    let arena = &Arena::new(features);
    let stage2 = &arena.world.stage2;
    let began = Instant::now();
    let mut sessions = 0;
    while began.elapsed() < time || sessions == 0 {
        sessions += 1;
        arena.stop.store(false, Ordering::SeqCst);
        thread::scope(|scope| {
            arena.running.store(2, Ordering::SeqCst);
            for pe in 1..=2 {
                scope.spawn(move || {
                    arena.write_for_ever(pe);
                    arena.running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            arena.world.machine.become_pe(0);
            let mut copy = std::vec![0; PAGES as usize];
            if sessions % 3 == 1 {
                // Let them map things first; otherwise faults map while the log runs.
                arena.world.map_all(0);
            }
            arena.world.start(engine, granularity);
            arena.copy_all(&mut copy);
            for round in 0..ROUNDS {
                arena.el2_write(round * 41 % PAGES);
                let epoch = arena.world.new_epoch();
                if trouble == Trouble::Aborts && round % 3 == 1 {
                    for _ in 0..=round % 4 {
                        stage2.take(epoch).unwrap();
                        thread::yield_now();
                    }
                    stage2.abort(epoch).unwrap();
                    continue;
                }
                if trouble == Trouble::Switches {
                    let next = if round % 2 == 0 {
                        Engine::WriteProtect
                    } else {
                        Engine::Dbm
                    };
                    stage2.set_engine(next).unwrap();
                }
                finish(|| stage2.take(epoch)).unwrap();
                arena.copy_epoch(epoch, &mut copy);
                stage2.commit(epoch).unwrap();
                thread::yield_now();
            }
            arena.stop.store(true, Ordering::SeqCst);
            // The last round comes after the last write.
            while arena.running.load(Ordering::SeqCst) != 0 {
                thread::yield_now();
            }
            let epoch = arena.world.new_epoch();
            finish(|| stage2.take(epoch)).unwrap();
            arena.copy_epoch(epoch, &mut copy);
            stage2.commit(epoch).unwrap();
            let lost = arena.lost(&copy);
            assert!(
                lost.is_empty(),
                "{engine:?} {granularity:?}: lost {} pages, first {:?}",
                lost.len(),
                lost.first()
            );
            assert!(arena.world.harvest().is_empty());
            arena.world.stop();
            if sessions % 2 == 0 {
                arena.world.delete(0);
                arena
                    .world
                    .slot(0, BASE, PAGES, Access::ReadWrite, RAM + LEAD * PAGE_SIZE);
            }
        });
    }
    assert!(arena.writes.load(Ordering::Relaxed) > 0);
}

/// Epochs a session.
const ROUNDS: u64 = 60;
const TIME: Duration = Duration::from_millis(400);

#[test]
fn invariant_01_write_protect_loses_nothing_under_fire() {
    for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
        soak(
            Features::BASELINE,
            Engine::WriteProtect,
            granularity,
            Trouble::None,
            TIME,
        );
    }
}

#[test]
fn invariant_01_dbm_loses_nothing_under_fire() {
    for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
        soak(dbm(), Engine::Dbm, granularity, Trouble::None, TIME);
        soak(
            Machine::everything(),
            Engine::Dbm,
            granularity,
            Trouble::None,
            TIME,
        );
    }
}

#[test]
fn invariant_19_aborts_lose_nothing_under_fire() {
    soak(dbm(), Engine::Dbm, Granularity::Page, Trouble::Aborts, TIME);
    soak(
        dbm(),
        Engine::WriteProtect,
        Granularity::Adaptive,
        Trouble::Aborts,
        TIME,
    );
}

#[test]
fn invariant_14_switching_engines_loses_nothing_under_fire() {
    for granularity in [Granularity::Page, Granularity::Adaptive] {
        soak(dbm(), Engine::Dbm, granularity, Trouble::Switches, TIME);
    }
}

/// A harvester that never rests while a guest touches one new table after the other: the fault maps
/// the page dirty and notes it while the harvest walks by and sees a hole.
#[test]
fn invariant_01_a_hole_that_is_mapped_during_a_harvest_is_not_lost() {
    const TABLES: u64 = 500;
    let began = Instant::now();
    while began.elapsed() < 2 * TIME {
        let world = &World::sized(Features::BASELINE, 39, 600, 2);
        // One page off, so that every 2 MiB are a table of pages.
        world.slot(0, IPA, TABLES * P2M, Access::ReadWrite, RAM + PAGE_SIZE);
        world.machine.become_pe(0);
        world.start(Engine::WriteProtect, Granularity::Page);
        let touched = &AtomicU64::new(0);
        let mut reported = thread::scope(|scope| {
            scope.spawn(move || {
                for table in 0..TABLES {
                    world.touch(1, IPA + table * 2 * MIB);
                    touched.store(table + 1, Ordering::SeqCst);
                }
            });
            let mut reported = std::collections::BTreeSet::new();
            while touched.load(Ordering::SeqCst) < TABLES {
                reported.extend(world.harvest());
            }
            reported
        });
        reported.extend(world.harvest());
        assert_eq!(
            reported,
            set((0..TABLES).map(|table| IPA + table * 2 * MIB))
        );
        // Whatever the TLB holds by now, a second write is noted too.
        (0..TABLES).for_each(|table| world.touch(1, IPA + table * 2 * MIB));
        assert_eq!(world.harvest().len() as u64, TABLES);
    }
}

/// Eight CPUs fault on the same unmapped memory: one mapping, no table leaked.
#[test]
fn parallel_first_touches_agree() {
    for round in 0..50 {
        let arena = &Arena::new(Features::BASELINE);
        thread::scope(|scope| {
            for pe in 0..8 {
                scope.spawn(move || {
                    arena.world.machine.become_pe(pe);
                    (0..PAGES)
                        .step_by(61)
                        .for_each(|page| arena.guest_write(pe, page));
                });
            }
        });
        let mappings = arena.world.stage2.mappings();
        assert_eq!(
            (mappings.blocks_2m, mappings.pages_4k),
            (1, P2M - LEAD + 77 + LEAD),
            "{round}"
        );
        assert_eq!(arena.world.machine.tables_in_use() as u64, mappings.tables);
        let expected = (0..PAGES)
            .step_by(61)
            .all(|page| arena.memory[page as usize].load(Ordering::SeqCst) == 8);
        assert!(expected);
        arena.world.delete(0);
        assert_eq!(arena.world.machine.tables_in_use(), 1);
    }
}
