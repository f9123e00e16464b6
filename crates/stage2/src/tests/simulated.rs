//! The invariants, in simulated runs: guests that write while EL2 works, in as many orders as there are
//! seeds, watched at every step (see [`sim`](super::sim)). What a single thread can check is in
//! `invariants`, what needs the exact moment in `races`.
//!
//! Seeds are fixed: each of these tests does the same thing every time (`TIDEMARK_FIRST_SEED` takes other
//! ones). And each check was seen to fail: by a plant (`plants/`), or here, by a test that breaks the rule
//! itself.

use super::sim::*;
use super::world::*;
use crate::fake::{Guest, Machine, Speculation, Stage1};
use crate::pte::{CLEAR_WRITE, Permission, Pte};
use crate::sync::atomic::Ordering;
use crate::types::*;
use crate::{FaultAccess, Features, Outcome, Stage2, Support};
use std::boxed::Box;
use std::collections::BTreeSet;
use std::string::ToString;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

const GRANULARITIES: [Granularity; 3] =
    [Granularity::Page, Granularity::Adaptive, Granularity::Block];

/// Two blocks and a tail.
const PAGES: u64 = 2 * P2M + 5;

/// Few pages, so that the CPUs meet.
const HOT: [u64; 8] = [0, 1, 63, 511, 512, 600, 1023, 1028];

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn ram(access: Access) -> Place {
    Place {
        id: 0,
        ipa: IPA,
        pages: PAGES,
        access,
        pa: RAM,
    }
}

/// A VM with one slot, nothing mapped.
fn vm(setup: Setup) -> Arc<Sim> {
    let sim = Sim::new(setup);
    sim.alone(|sim| sim.add(ram(Access::ReadWrite)));
    sim
}

/// A guest that writes hot pages and reads some.
fn guest<'a>(sim: &'a Sim, accesses: usize) -> Box<dyn FnOnce() + Send + 'a> {
    Box::new(move || {
        for _ in 0..accesses {
            let ipa = page(HOT[sim.roll(HOT.len() as u64) as usize]);
            if sim.roll(5) == 0 {
                sim.read(ipa);
            } else {
                sim.write(ipa);
            }
            sim.breathe();
        }
    })
}

/// How often CPUs take turns: at nearly every access to memory, or seldom.
fn pace(seed: u64) -> Option<u32> {
    [Some(2), Some(7), Some(30), Some(200), Some(1500)][seed as usize % 5]
}

/// So many seeds: the same ones every time, or others if a soak says where they begin.
fn seeds_from(count: u64) -> std::ops::Range<u64> {
    let first = super::from_env("TIDEMARK_FIRST_SEED").unwrap_or(0);
    first..first + count
}

fn setups(engine_features: Features, seeds: u64) -> impl Iterator<Item = Setup> {
    seeds_from(seeds).map(move |seed| Setup {
        every: pace(seed),
        ..Setup::new(engine_features, seed)
    })
}

/// The message of the panic that `run` must end in.
fn refused(run: impl FnOnce()) -> std::string::String {
    let end = quietly(|| std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)));
    let cause = end.expect_err("it must be refused");
    let text = cause.downcast_ref::<std::string::String>().cloned();
    text.unwrap_or_else(|| cause.downcast_ref::<&str>().unwrap_or(&"").to_string())
}

#[test]
fn invariant_01_in_whatever_order_nothing_is_lost() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 25) {
                let sim = vm(setup);
                let s = &sim;
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    (0..3).for_each(|_| drop(s.harvest()));
                });
                s.run(vec![manager, guest(s, 40), guest(s, 40)]);
                sim.conclude();
            }
        }
    }
}

/// A guest touches one new table after the other while the host harvests: the fault maps the page dirty
/// and notes it, and the harvest walks by and sees a hole. Each page is written once more later.
#[test]
fn invariant_01_a_hole_that_is_mapped_during_a_harvest_loses_nothing() {
    const TABLES: u64 = 12;
    for (engine, features) in engines() {
        for setup in setups(features, 40) {
            let sim = Sim::new(Setup {
                every: Some(1 + setup.seed as u32 % 7),
                ..setup
            });
            let s = &sim;
            s.alone(|s| {
                // One page off, so that every 2 MiB are a table of pages.
                s.add(Place {
                    pages: TABLES * P2M,
                    pa: RAM + PAGE_SIZE,
                    ..ram(Access::ReadWrite)
                });
                s.start(engine, Granularity::Page);
            });
            let toucher = |odd: u64| {
                Box::new(move || {
                    for table in (odd..TABLES).step_by(2) {
                        s.write(page(table * P2M));
                        s.pause();
                        s.write(page(table * P2M));
                    }
                    (odd..TABLES).for_each(|table| s.write(page(table * P2M)));
                })
            };
            let manager = Box::new(|| (0..8).for_each(|_| drop(s.harvest())));
            s.run(vec![manager, toucher(0), toucher(1)]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_01_a_write_nobody_knows_of_ends_the_run() {
    let sim = vm(Setup::new(dbm(), 1));
    sim.alone(|sim| {
        sim.start(Engine::Dbm, Granularity::Page);
        // Mapped by this, which leaves a bit; the second time only the leaf knows.
        sim.write(page(3));
        sim.harvest();
        sim.write(page(3));
        sim.stop_guests();
    });
    let why = refused(|| {
        sim.alone(|sim| {
            // Cleaned, and noted nowhere.
            sim.op("forgets", |_| {
                let entry = sim.world.entry(page(3));
                entry.fetch_and(CLEAR_WRITE, Ordering::SeqCst)
            });
        });
    });
    assert!(why.contains("nothing knows"), "{why}");
}

#[test]
fn invariant_02_a_plain_store_to_a_live_descriptor_ends_the_run() {
    let sim = vm(Setup::new(dbm(), 1));
    sim.alone(|sim| {
        sim.start(Engine::Dbm, Granularity::Page);
        sim.read(page(3));
    });
    let why = refused(|| {
        sim.alone(|sim| {
            let entry = sim.world.entry(page(3));
            let same = entry.load(Ordering::SeqCst);
            entry.store(same, Ordering::SeqCst);
        });
    });
    assert!(why.contains("a plain store"), "{why}");
}

/// Every access of the engine may be followed by one of the hardware's, and updates come late.
#[test]
fn invariant_02_the_hardware_comes_between_any_two_steps_and_loses_nothing() {
    for granularity in GRANULARITIES {
        for seed in seeds_from(60) {
            let sim = vm(Setup {
                every: Some(1 + seed as u32 % 3),
                ..Setup::new(dbm(), seed)
            });
            let s = &sim;
            s.alone(|sim| sim.start(Engine::Dbm, granularity));
            let manager = Box::new(|| {
                s.harvest();
                s.world.stage2.set_engine(Engine::WriteProtect).unwrap();
                s.harvest();
                s.world.stage2.set_engine(Engine::Dbm).unwrap();
                s.harvest();
            });
            s.run(vec![manager, guest(s, 60), guest(s, 60)]);
            sim.conclude();
        }
    }
}

/// The host copies the moment it may, and the guest goes on writing through whatever its TLBs hold.
#[test]
fn invariant_03_the_host_may_copy_the_moment_a_take_is_done() {
    for (engine, features) in engines() {
        // One page by address, several by range or by address, many by VMID.
        for count in [1, 3, 40, 200] {
            for whims in [None, Some(Speculation::Never)] {
                let sim = vm(Setup {
                    whims,
                    ..Setup::new(features, count)
                });
                let s = &sim;
                let write_all = |cpu: usize| {
                    s.world.machine.become_pe(cpu);
                    (0..count).for_each(|number| s.write(page(number)));
                };
                s.alone(|s| {
                    s.map_ahead(0).unwrap();
                    s.start(engine, Granularity::Page);
                    for _ in 0..3 {
                        write_all(1);
                        write_all(2);
                        s.world.machine.become_pe(0);
                        let epoch = s.take();
                        s.copy(epoch);
                        write_all(2);
                        write_all(1);
                        s.world.machine.become_pe(0);
                        s.commit(epoch);
                    }
                });
                sim.conclude();
            }
        }
    }
}

/// EL2 marks pages, each once, in words that a take is moving.
#[test]
fn invariant_04_a_mark_that_races_a_take_lands_in_this_round_or_the_next() {
    for (engine, features) in engines() {
        for setup in setups(features, 60) {
            let sim = vm(Setup {
                every: Some(1 + setup.seed as u32 % 9),
                ..setup
            });
            let s = &sim;
            s.alone(|s| {
                s.map_ahead(0).unwrap();
                s.start(engine, GRANULARITIES[setup.seed as usize % 3]);
            });
            let marks = |odd: u64| {
                Box::new(move || {
                    for number in 0..40 {
                        s.el2_write(page(2 * number + odd));
                        s.breathe();
                    }
                })
            };
            let manager = Box::new(|| (0..8).for_each(|_| drop(s.harvest())));
            s.run(vec![manager, marks(0), marks(1)]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_05_a_slot_that_goes_or_changes_is_not_reached_and_loses_nothing() {
    for (engine, features) in engines() {
        for setup in setups(features, 25) {
            let sim = vm(setup);
            let s = &sim;
            let other = Place {
                id: 1,
                ipa: IPA + PAGES * PAGE_SIZE,
                pages: 70,
                access: Access::ReadWrite,
                pa: RAM + 64 * MIB + PAGE_SIZE,
            };
            s.alone(|s| {
                s.add(other);
                s.start(engine, Granularity::Adaptive);
            });
            let manager = Box::new(|| {
                s.set_access(0, Access::ReadOnly);
                s.harvest();
                s.delete(1);
                s.set_access(0, Access::ReadWrite);
                // The memory goes to other addresses: whoever still reaches it by the old ones is caught.
                s.add(Place {
                    pa: RAM + 128 * MIB,
                    ..other
                });
                s.harvest();
            });
            let guest = || {
                Box::new(|| {
                    for _ in 0..40 {
                        let near = page(PAGES - 8 + s.roll(70));
                        let hot = page(HOT[s.roll(8) as usize]);
                        let ipa = if s.roll(2) == 0 { near } else { hot };
                        let access = [FaultAccess::Write, FaultAccess::Read][s.roll(2) as usize];
                        let _ = s.guest(ipa, access);
                        s.breathe();
                    }
                })
            };
            s.run(vec![manager, guest(), guest()]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_05_a_table_that_is_still_linked_or_remembered_does_not_go_back() {
    use crate::hardware::Hardware;
    let tables = || {
        let sim = vm(Setup::new(Features::BASELINE, 1));
        sim.alone(|sim| {
            sim.start(Engine::WriteProtect, Granularity::Page);
            sim.read(page(3));
        });
        let table = Pte(sim.world.parent(page(3)).load(Ordering::SeqCst)).output();
        // What comes of it cannot be put away.
        std::mem::forget(Arc::clone(&sim));
        (sim, table)
    };
    let (sim, table) = tables();
    let why = refused(|| sim.alone(|sim| sim.world.machine.free_tables(table, 1)));
    assert!(why.contains("while it is linked"), "{why}");
    let (sim, table) = tables();
    let why = refused(|| {
        sim.alone(|sim| {
            let machine = &sim.world.machine;
            sim.world
                .parent(page(3))
                .swap(Pte::EMPTY.0, Ordering::SeqCst);
            machine.dsb_ishst();
            // CPU 0 walked through it, and no invalidation said that it must not again.
            machine.free_tables(table, 1);
        });
    });
    assert!(why.contains("may walk through it"), "{why}");
}

/// The value that the exchange returned decides: the hardware may have made the block dirty since it
/// was looked at.
#[test]
fn invariant_06_a_write_at_any_moment_of_a_split_is_known() {
    for bbm2 in [Support::Absent, Support::Present] {
        let mut seen = [0; 2];
        for seed in seeds_from(80) {
            let features = Features { bbm2, ..dbm() };
            let sim = vm(Setup {
                every: Some([3, 40, 150, 400][seed as usize % 4]),
                ..Setup::new(features, seed)
            });
            let s = &sim;
            s.alone(|s| {
                s.start(Engine::Dbm, Granularity::Block);
                s.read(page(9));
            });
            let splitter = Box::new(|| {
                s.op("split", |stage2| {
                    let entry = s.world.entry(page(9));
                    let old = stage2.split(entry, Level::L2, page(9), Engine::Dbm);
                    let old = old.unwrap();
                    if old.is_dirty() {
                        stage2.mark_dirty(Ipa::new(IPA), 2 * MIB).unwrap();
                    }
                    seen[usize::from(old.is_dirty())] += 1;
                });
            });
            let writer = |number| {
                Box::new(move || {
                    (0..s.roll(20)).for_each(|_| s.read(page(number)));
                    s.write(page(number));
                })
            };
            s.run(vec![splitter, writer(9), writer(400)]);
            sim.conclude();
        }
        assert!(seen[0] > 0 && seen[1] > 0, "both must happen: {seen:?}");
    }
}

/// A dirty block that is split is reported whole, and its pages one by one from then on.
#[test]
fn invariant_06_what_a_block_knew_is_reported_when_it_is_split() {
    for (engine, features) in engines() {
        let mut split = 0;
        for setup in setups(features, 20) {
            let sim = vm(setup);
            let s = &sim;
            s.alone(|s| s.map_ahead(0).unwrap());
            let manager = Box::new(|| {
                s.start(engine, Granularity::Adaptive);
                (0..4).for_each(|_| drop(s.harvest()));
            });
            s.run(vec![manager, guest(s, 30), guest(s, 30)]);
            s.alone(|s| drop(s.harvest()));
            let left = s.world.leaves();
            let block = |(_, level, pte): &(u64, Level, Pte)| *level < Level::L3 && pte.is_dirty();
            assert!(!left.iter().any(block), "a dirty block stayed");
            split += s.world.stage2.counters().splits;
            sim.conclude();
        }
        assert!(split > 20, "{split}");
    }
}

#[test]
fn invariant_06_a_size_that_changes_without_a_break_ends_the_run() {
    let sim = vm(Setup::new(Features::BASELINE, 1));
    sim.alone(|sim| sim.read(page(3)));
    // An equivalent table in the place of the block, at once: good under FEAT_BBM level 2 only.
    let why = refused(|| {
        sim.alone(|sim| {
            use crate::hardware::Hardware;
            let machine = &sim.world.machine;
            let block = Pte(sim.world.entry(page(3)).load(Ordering::SeqCst));
            let table = machine.alloc_tables(1).unwrap();
            for (index, entry) in machine.table(table).entries().iter().enumerate() {
                let child = block.child(Level::L3, index, Permission::Untracked);
                entry.store(child.0, Ordering::SeqCst);
            }
            machine.dsb_ishst();
            let entry = sim.world.entry(page(3));
            entry.swap(Pte::table(table).0, Ordering::SeqCst);
        });
    });
    assert!(why.contains("without a break"), "{why}");
    // Unwatched, the TLBs notice.
    let world = World::sized(Features::BASELINE, 39, 8, 1);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.read(0, IPA);
    let why = refused(|| {
        use crate::hardware::Hardware;
        let block = world.pte(IPA).0;
        let table = world.machine.alloc_tables(1).unwrap();
        for (index, entry) in world.machine.table(table).entries().iter().enumerate() {
            let child = block.child(Level::L3, index, Permission::Untracked);
            entry.store(child.0, Ordering::SeqCst);
        }
        world.entry(IPA).swap(Pte::table(table).0, Ordering::SeqCst);
        world.read(0, IPA);
    });
    assert!(why.contains("TLB conflict"), "{why}");
}

/// A table in the place of a block that is gone from the entry and not from a TLB: its pages must be the block's,
/// even under FEAT_BBM level 2, which lets them live side by side.
#[test]
fn invariant_06_a_table_over_what_a_tlb_holds_ends_the_run_unless_it_is_the_same() {
    use crate::hardware::Hardware;
    let link = |features: Features, other: usize| {
        let sim = vm(Setup::new(features, 1));
        sim.alone(|sim| {
            sim.read(page(3));
            let machine = &sim.world.machine;
            let entry = sim.world.entry(page(3));
            let block = Pte(entry.swap(Pte::EMPTY.0, Ordering::SeqCst));
            let table = machine.alloc_tables(1).unwrap();
            for (index, entry) in machine.table(table).entries().iter().enumerate() {
                let child = block.child(Level::L3, index ^ other, Permission::Untracked);
                entry.store(child.0, Ordering::SeqCst);
            }
            machine.dsb_ishst();
            entry.swap(Pte::table(table).0, Ordering::SeqCst);
        });
    };
    let bbm2 = Features {
        bbm2: Support::Present,
        ..Features::BASELINE
    };
    link(bbm2, 0);
    for (features, other) in [(bbm2, 1), (Features::BASELINE, 0)] {
        let why = refused(|| link(features, other));
        assert!(why.contains("cached for"), "{why}");
    }
}

/// Blocks come back under guests that run, and what is written then is known to the next log.
#[test]
fn invariant_07_blocks_come_back_while_guests_write() {
    for (engine, features) in engines() {
        for setup in setups(features, 20) {
            let sim = vm(setup);
            let s = &sim;
            s.alone(|s| s.map_ahead(0).unwrap());
            let before = s.world.stage2.mappings();
            let manager = Box::new(|| {
                s.start(engine, Granularity::Page);
                s.harvest();
                s.stop();
                s.start(engine, Granularity::Block);
                s.harvest();
            });
            s.run(vec![manager, guest(s, 60), guest(s, 60)]);
            s.alone(|s| {
                s.last_round();
                s.stop();
                s.check_counts();
            });
            assert_eq!(s.world.stage2.mappings(), before);
            sim.end();
        }
    }
}

/// A read-only leaf among others, of either size, stays one whatever walks over it.
#[test]
fn invariant_08_read_only_stays_read_only_under_fire() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 6) {
                let sim = vm(setup);
                let s = &sim;
                let read_only = [page(600), page(1026)];
                s.alone(|s| {
                    s.map_ahead(0).unwrap();
                    for ipa in read_only {
                        let entry = s.world.entry(ipa);
                        let pte = Pte(entry.load(Ordering::SeqCst));
                        entry.swap(pte.with(Permission::ReadOnly).0, Ordering::SeqCst);
                    }
                });
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    s.harvest();
                    if s.world.stage2.features().dbm == Support::Present {
                        for engine in [Engine::WriteProtect, Engine::Dbm] {
                            s.world.stage2.set_engine(engine).unwrap();
                            s.harvest();
                        }
                    }
                    s.stop();
                });
                let guest = || {
                    Box::new(|| {
                        for _ in 0..30 {
                            s.write(page([0, 1, 511, 1024, 1025, 1027][s.roll(6) as usize]));
                            s.breathe();
                        }
                    })
                };
                s.run(vec![manager, guest(), guest()]);
                for ipa in read_only {
                    let (pte, _) = s.world.pte(ipa);
                    assert!(!pte.is_writable() && !pte.is_tracked(), "{ipa:#x}");
                }
                sim.end();
            }
        }
    }
}

#[test]
fn invariant_08_read_only_that_becomes_something_else_ends_the_run() {
    for permission in [
        Permission::Untracked,
        Permission::Clean(Engine::WriteProtect),
        Permission::Clean(Engine::Dbm),
    ] {
        let sim = Sim::new(Setup::new(dbm(), 1));
        let why = refused(|| {
            sim.alone(|sim| {
                sim.add(ram(Access::ReadOnly));
                sim.read(page(1));
                let entry = sim.world.entry(page(1));
                let pte = Pte(entry.load(Ordering::SeqCst));
                entry.swap(pte.with(permission).0, Ordering::SeqCst);
            });
        });
        assert!(why.contains("a read-only leaf became another"), "{why}");
    }
}

/// Aging takes the access flag alone. The next access brings it back, by hardware or by a fault, and
/// the dirty state is what it was.
#[test]
fn invariant_09_aging_never_touches_the_dirty_state() {
    use crate::hardware::Hardware;
    const ACCESSED: u64 = 1 << 10;
    for (engine, features) in engines() {
        for setup in setups(features, 20) {
            let sim = vm(setup);
            let s = &sim;
            s.alone(|s| s.start(engine, Granularity::Page));
            let aging = Box::new(|| {
                for round in 0..6 {
                    for number in HOT {
                        let entry = s.world.entry(page(number));
                        let old = Pte(entry.load(Ordering::SeqCst));
                        // A dirty leaf keeps it: software makes none without (I_DSHLJ).
                        if old.is_clean() {
                            let young = old.0;
                            let _ = entry.compare_exchange(
                                young,
                                young & !ACCESSED,
                                Ordering::SeqCst,
                                Ordering::SeqCst,
                            );
                        }
                    }
                    let machine = &s.world.machine;
                    machine.dsb_ishst();
                    let before = machine.select(s.world.guest.vttbr);
                    machine.tlbi_vmalls12e1is();
                    machine.dsb_ish();
                    machine.restore(before);
                    if round % 2 == 1 {
                        s.harvest();
                    }
                }
            });
            s.run(vec![aging, guest(s, 60), guest(s, 60)]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_09_a_dirty_leaf_without_the_access_flag_ends_the_run() {
    let sim = vm(Setup::new(dbm(), 1));
    let why = refused(|| {
        sim.alone(|sim| {
            sim.start(Engine::Dbm, Granularity::Page);
            sim.read(page(1));
            let entry = sim.world.entry(page(1));
            let pte = Pte(entry.load(Ordering::SeqCst)).with(Permission::Dirty(Engine::Dbm));
            entry.swap(pte.0 & !(1 << 10), Ordering::SeqCst);
        });
    });
    assert!(why.contains("dirty and not accessed"), "{why}");
}

/// Hardware that makes pages dirty for accesses that never happen: more is reported, nothing less.
#[test]
fn invariant_10_more_may_be_reported_and_never_less() {
    let mut more = 0;
    for granularity in GRANULARITIES {
        for mut setup in setups(dbm(), 40) {
            setup.whims = Some(Speculation::Sometimes);
            let sim = vm(setup);
            let s = &sim;
            let reader = Box::new(|| {
                for _ in 0..40 {
                    s.read(page(100 + s.roll(3)));
                    s.breathe();
                }
            });
            let mut reported = BTreeSet::new();
            let manager = Box::new(|| {
                s.start(Engine::Dbm, granularity);
                (0..3).for_each(|_| reported.extend(s.harvest()));
            });
            s.run(vec![manager, guest(s, 40), reader]);
            let extra = |ipa: &u64| granularity == Granularity::Page && *ipa >= page(100);
            more += reported.iter().filter(|ipa| extra(ipa)).count();
            s.alone(|s| {
                s.last_round();
                s.stop();
            });
            sim.end();
        }
    }
    assert!(more > 0, "nobody speculated");
}

/// Any member of a contiguous group may say that the group is dirty: reported is then another page than
/// the one written. So the engine makes none, and a rule sees to it.
#[test]
fn invariant_11_a_contiguous_group_would_report_another_page() {
    const CONTIGUOUS: u64 = 1 << 52;
    let world = World::sized(dbm(), 39, 8, 1);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Page);
    world.read(0, IPA);
    for number in 0..16 {
        let entry = world.entry(page(number));
        entry.fetch_or(CONTIGUOUS, Ordering::SeqCst);
    }
    // The CPU forgets what it has cached of the leaves alone.
    world.stage2.tlb().everything();
    world.write(0, page(3));
    let reported = world.harvest();
    assert_eq!(reported.len(), 1);
    assert!(
        !reported.contains(&page(3)),
        "the simulated CPU is too kind"
    );

    let sim = vm(Setup::new(dbm(), 1));
    let why = refused(|| {
        sim.alone(|sim| {
            sim.read(page(3));
            let entry = sim.world.entry(page(3));
            entry.fetch_or(CONTIGUOUS, Ordering::SeqCst);
        });
    });
    assert!(why.contains("Contiguous"), "{why}");
}

/// The guest's own tables have flags that its hardware writes: the page that holds the descriptor is
/// dirty then, whoever wrote it.
#[test]
fn invariant_12_flags_of_the_guests_own_tables_dirty_their_pages() {
    let va = 0xffff_8000_0000_0000;
    let table = page(700);
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 10) {
                let sim = vm(setup);
                let s = &sim;
                let stage1 = Stage1::default();
                let mut reported = BTreeSet::new();
                s.alone(|s| {
                    s.start(engine, granularity);
                    // Everything is mapped, and clean.
                    s.read(page(700));
                    s.read(page(20));
                    s.harvest();
                    // Aliases: what is relaxed for one address may be stale under the other.
                    for alias in 0..4 {
                        stage1.map(va + alias * PAGE_SIZE, page(20), table);
                    }
                    s.guest_va(&stage1, va, FaultAccess::Read);
                    s.stop_guests();
                    reported.extend(s.harvest());
                });
                assert!(reported.contains(&table), "AF was set: {engine:?}");
                let manager = Box::new(|| (0..3).for_each(|_| drop(s.harvest())));
                let guest = || {
                    Box::new(|| {
                        for _ in 0..20 {
                            let alias = va + s.roll(4) * PAGE_SIZE;
                            let access = [FaultAccess::Read, FaultAccess::Write];
                            s.guest_va(&stage1, alias, access[s.roll(2) as usize]);
                            s.breathe();
                        }
                    })
                };
                s.run(vec![manager, guest(), guest()]);
                sim.conclude();
            }
        }
    }
}

/// The store may be visible before the hardware's update of the descriptor. So a harvest is the last one
/// only after a barrier on each CPU that ran the guest; without it there are pages that it misses.
#[test]
fn invariant_13_the_last_harvest_comes_after_a_barrier_on_every_cpu() {
    let mut late = 0;
    for seed in 0..200 {
        let sim = vm(Setup::new(dbm(), seed));
        let s = &sim;
        let mut missing = false;
        s.alone(|s| {
            s.start(Engine::Dbm, Granularity::Page);
            for cpu in 0..3 {
                s.world.machine.become_pe(cpu);
                s.write(page(cpu as u64));
                s.write(page(cpu as u64 + 64));
            }
            // CPU 0 harvests, and its own barriers are none of the others'.
            s.world.machine.become_pe(0);
            s.harvest();
            missing = !s.missing().is_empty();
        });
        late += u32::from(missing);
        // With the barrier nothing is missing, and a second harvest is empty.
        sim.conclude();
    }
    assert!(late > 20, "the update was late in {late} runs of 200");
}

#[test]
fn invariant_14_engines_are_switched_under_fire_and_no_register_changes() {
    let all = Machine::everything();
    for features in [dbm(), all] {
        for granularity in GRANULARITIES {
            for setup in setups(features, 20) {
                let sim = vm(setup);
                let s = &sim;
                let vtcr = s.world.stage2.vtcr();
                let manager = Box::new(|| {
                    s.start(Engine::Dbm, granularity);
                    for round in 0..6 {
                        let engine = [Engine::WriteProtect, Engine::Dbm][round % 2];
                        s.op("set_engine", |stage2| stage2.set_engine(engine))
                            .unwrap();
                        s.harvest();
                    }
                });
                s.run(vec![manager, guest(s, 60), guest(s, 60)]);
                assert_eq!(s.world.stage2.vtcr(), vtcr);
                sim.conclude();
            }
        }
    }
}

/// HD may be cached in a TLB: a CPU whose register says otherwise goes on as before for what it has.
#[test]
fn invariant_14_a_register_that_changed_without_an_invalidation_is_not_seen() {
    let world = World::sized(dbm(), 39, 8, 1);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Page);
    world.read(0, IPA);
    let without = Guest {
        vtcr: world.guest.vtcr & !(1 << 22),
        ..world.guest
    };
    let write = |ipa| {
        let access = FaultAccess::Write;
        world
            .machine
            .access(0, without, ipa, access, |_| ())
            .is_ok()
    };
    assert!(write(IPA), "cached with HD");
    assert!(!write(page(1)), "cached without");
}

/// A walk over a range goes on behind whatever it meets: entries that are broken at the moment, empty
/// ones, and ones that somebody else just changed.
#[test]
fn invariant_15_no_walk_stops_at_an_entry_that_others_are_changing() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 12) {
                let sim = vm(setup);
                let s = &sim;
                s.alone(|s| s.start(engine, granularity));
                // Others help with every step, and map what is not mapped yet.
                let helper = || {
                    Box::new(|| {
                        for _ in 0..20 {
                            let _ = s.map_ahead(0);
                            s.write(page(HOT[s.roll(8) as usize]));
                            s.breathe();
                        }
                    })
                };
                let manager = Box::new(|| (0..4).for_each(|_| drop(s.harvest())));
                s.run(vec![manager, helper(), helper()]);
                sim.conclude();
            }
        }
    }
}

/// Hints and ranges, with levels that change beneath them: what an operand fails to name stays in a TLB
/// and is written through.
#[test]
fn invariant_16_operands_name_the_leaves_that_are_there() {
    for (ttl, tlb_range) in [
        (Support::Present, Support::Present),
        (Support::Present, Support::Absent),
        (Support::Absent, Support::Present),
    ] {
        let features = Features {
            ttl,
            tlb_range,
            ..dbm()
        };
        for engine in [Engine::WriteProtect, Engine::Dbm] {
            for granularity in GRANULARITIES {
                for setup in setups(features, 10) {
                    let sim = vm(setup);
                    let s = &sim;
                    let runs = || {
                        Box::new(|| {
                            for _ in 0..8 {
                                // Runs of pages, odd and even, over the edge of a block.
                                let first = 500 + s.roll(20);
                                let count = 1 + s.roll(30);
                                (first..first + count).for_each(|number| s.write(page(number)));
                                s.breathe();
                            }
                        })
                    };
                    let manager = Box::new(|| {
                        s.start(engine, granularity);
                        (0..4).for_each(|_| drop(s.harvest()));
                        s.stop();
                        s.start(engine, Granularity::Adaptive);
                        (0..2).for_each(|_| drop(s.harvest()));
                    });
                    s.run(vec![manager, runs(), runs()]);
                    sim.conclude();
                }
            }
        }
    }
}

/// Two VMs on one machine: what EL2 does for one is done with its VTTBR_EL2 loaded, whatever was, and
/// the other's is put back.
#[test]
fn invariant_17_invalidations_are_for_the_vm_they_are_meant_for() {
    use crate::hardware::Hardware;
    for (engine, features) in engines() {
        let world = World::sized(features, 39, 64, 2);
        world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
        let machine = Arc::clone(&world.machine);
        let other_id = Vmid::new(8, VmidWidth::Eight).unwrap();
        let other = Stage2::new(Arc::clone(&machine), 39, other_id, features).unwrap();
        // The CPU that harvests runs the other VM.
        machine.become_pe(0);
        let before = machine.select(other.vttbr());
        world.start(engine, Granularity::Page);
        for _ in 0..3 {
            world.write(1, IPA);
            machine.become_pe(0);
            assert_eq!(world.harvest(), set([IPA]), "{engine:?}");
        }
        assert_eq!(machine.select(before), other.vttbr(), "it was put back");
    }
}

/// The VMID of a VM that ended is another's: nothing that is cached under it leads to the old memory.
#[test]
fn invariant_17_nothing_cached_outlives_a_vm_whose_vmid_is_used_again() {
    for (_, features) in engines() {
        let machine = Arc::new(Machine::new(16, 2));
        for life in 0..3 {
            let memory = RAM + life * GIB;
            let stage2 = Stage2::new(Arc::clone(&machine), 39, vmid(), features).unwrap();
            let extent = Extent {
                pa: Pa::new(memory),
                pages: P2M,
            };
            stage2
                .add_slot(
                    SlotId(0),
                    Ipa::new(IPA).gfn(),
                    P2M,
                    Access::ReadWrite,
                    &[extent],
                )
                .unwrap();
            let guest = Guest {
                vtcr: stage2.vtcr(),
                vttbr: stage2.vttbr(),
            };
            for cpu in 0..2 {
                machine.become_pe(cpu);
                let reached = loop {
                    match machine.access(cpu, guest, IPA, FaultAccess::Write, |pa| pa) {
                        Ok(pa) => break pa,
                        Err(abort) => assert_eq!(stage2.handle_fault(abort), Outcome::Resume),
                    }
                };
                assert_eq!(reached.raw(), memory, "life {life}, CPU {cpu}");
            }
        }
    }
}

#[test]
fn invariant_18_a_write_by_el2_that_is_not_marked_ends_the_run() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            let sim = vm(Setup::new(features, 1));
            sim.alone(|sim| {
                sim.start(engine, granularity);
                sim.el2_write(page(5));
                assert!(sim.harvest().contains(&page(5)));
            });
            let why = refused(|| sim.alone(|sim| sim.hidden_write(page(5))));
            assert!(why.contains("nothing knows"), "{why}");
        }
    }
}

/// The host fails at any moment: what it had of an epoch comes again, and is copied as it is then.
#[test]
fn invariant_19_an_epoch_that_fails_comes_again() {
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 15) {
                let sim = Sim::new(setup);
                let s = &sim;
                s.alone(|s| {
                    // More than one step of a take can see.
                    s.add(Place {
                        pages: 6 * P2M,
                        ..ram(Access::ReadWrite)
                    })
                });
                let manager = Box::new(|| {
                    s.start(engine, granularity);
                    for round in 0..6 {
                        let epoch = s.world.new_epoch();
                        let steps = [1, 2, 3, u64::MAX][s.roll(4) as usize];
                        let mut done = Progress::More { done: 0, total: 0 };
                        for _ in 0..steps {
                            done = s.take_step(epoch, None).unwrap();
                            if done == Progress::Done {
                                break;
                            }
                            s.pause();
                        }
                        if done == Progress::Done {
                            s.copy(epoch);
                        }
                        if done != Progress::Done || round % 2 == 0 {
                            s.abort(epoch);
                        } else {
                            s.commit(epoch);
                        }
                    }
                });
                s.run(vec![manager, guest(s, 50), guest(s, 50)]);
                sim.conclude();
            }
        }
    }
}

/// On tables that are not Inner Shareable Write-Back the hardware's update is a load and a store, and
/// undoes what came between. The registers this crate makes say that they are.
#[test]
fn invariant_20_tables_are_shareable_and_write_back_else_updates_are_lost() {
    const SHAREABLE: u64 = 3 << 12;
    const CACHEABLE: u64 = 0b0101 << 8;
    for bits in 32..=48 {
        for features in [Features::BASELINE, dbm(), Machine::everything()] {
            let features = Features {
                pa_bits: 48,
                ..features
            };
            let vtcr = crate::vtcr(bits, &features).unwrap();
            assert_eq!(vtcr & (SHAREABLE | 0xf << 8), SHAREABLE | CACHEABLE);
        }
    }
    for (vtcr, expected) in [(0, true), (SHAREABLE, false), (CACHEABLE, false)] {
        let world = World::sized(dbm(), 39, 8, 2);
        world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
        world.start(Engine::Dbm, Granularity::Page);
        let guest = Guest {
            vtcr: world.guest.vtcr & !vtcr,
            ..world.guest
        };
        let write = |cpu: usize| {
            world.machine.become_pe(cpu);
            while let Err(abort) = world
                .machine
                .access(cpu, guest, IPA, FaultAccess::Write, |_| ())
            {
                assert_eq!(world.stage2.handle_fault(abort), Outcome::Resume);
            }
        };
        world.read(1, IPA);
        write(1);
        world.machine.become_pe(0);
        let entry = world.entry(IPA);
        let marker = 1 << 57;
        entry.fetch_or(marker, Ordering::SeqCst);
        // The update that CPU 1 has under way arrives now.
        world.machine.synchronize(1);
        let kept = entry.load(Ordering::SeqCst) & marker != 0;
        assert_eq!(kept, expected, "without {vtcr:#x}");
    }
}

/// The same programs on every machine and engine: the same pages are reported, and the copy is the same.
#[test]
fn invariant_21_every_machine_and_engine_reports_the_same() {
    for granularity in GRANULARITIES {
        for seed in 0..5 {
            let run = |engine, features| {
                let sim = vm(Setup::new(features, seed).calm());
                let s = &sim;
                let mut rounds: Vec<BTreeSet<u64>> = Vec::new();
                s.alone(|s| {
                    s.start(engine, granularity);
                    for round in 0..5 {
                        for cpu in 0..3 {
                            s.world.machine.become_pe(cpu);
                            (0..10).for_each(|_| s.write(page(s.roll(PAGES))));
                            s.read(page(s.roll(PAGES)));
                        }
                        s.world.machine.become_pe(0);
                        if round == 2 {
                            let epoch = s.take();
                            s.copy(epoch);
                            s.abort(epoch);
                        }
                        s.el2_write(page(s.roll(PAGES)));
                        rounds.push(s.harvest());
                    }
                });
                let memory = s.copied();
                sim.conclude();
                (rounds, memory)
            };
            let (engine, features) = engines()[0];
            let reference = run(engine, features);
            for (engine, features) in engines() {
                assert_eq!(run(engine, features), reference, "{engine:?} {features:?}");
            }
        }
    }
}
