//! No step is long, however large the VM: nothing at EL2 may run for long without a look for an
//! interrupt. Counted in accesses to tables and bitmaps, which is what the steps are made of; how many
//! instructions that is on the machine itself is for the benchmark in EL2 to say (`longest_el2`).

use super::world::*;
use crate::fake::Event;
use crate::fake::traced::{self, Observer, Point, Write};
use crate::types::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bits of a block of 1 GiB are 4096 words, and it is reported and split as one.
const MOST: u64 = 4096 + 768;

#[derive(Default)]
struct Count(AtomicU64);

impl Observer for Count {
    fn point(&self, at: Point) {
        let word = matches!(at, Point::Word(_));
        self.0.fetch_add(u64::from(word), Ordering::Relaxed);
    }
    fn milestone(&self) {}
    fn wait(&self) {}
    fn settle(&self, _: usize) {}
    fn wrote(&self, _: Write) {}
    fn filled(&self, _: usize) {}
    fn noted(&self, _: Event) {}
}

/// Steps until it is done, each of them short.
fn short(name: &str, step: impl FnMut() -> Progress) {
    at_most(MOST, name, step);
}

fn at_most(most: u64, name: &str, mut step: impl FnMut() -> Progress) {
    loop {
        let count = Arc::new(Count::default());
        let progress = traced::observed(count.clone(), &mut step);
        let accesses = count.0.load(Ordering::Relaxed);
        assert!(accesses <= most, "{name}: {accesses} accesses in a step");
        if progress == Progress::Done {
            break;
        }
    }
}

/// Blocks or pages: where the memory is, for it to be mapped so.
#[derive(Clone, Copy)]
enum Leaves {
    Far,
    Gib,
    Mib,
    Pages,
}

/// A VM of 64 or 4 GiB in large blocks, of 16 GiB in small ones, of 64 MiB in pages.
fn vm(leaves: Leaves) -> (World, u64, u64) {
    let (pages, pa, size) = match leaves {
        Leaves::Far => (64 * P1G, RAM, GIB),
        Leaves::Gib => (4 * P1G, RAM, GIB),
        Leaves::Mib => (16 * P1G, RAM + 2 * MIB, 2 * MIB),
        Leaves::Pages => (64 * 256, RAM + PAGE_SIZE, PAGE_SIZE),
    };
    let world = World::sized(dbm(), 40, 128, 2);
    world.slot(0, GIB, pages, Access::ReadWrite, pa);
    let ahead = |from: &mut u64| {
        let progress = world.stage2.map_ahead(SlotId(0), *from).unwrap();
        if let Progress::More { done, .. } = progress {
            *from = done;
        }
        progress
    };
    let mut from = 0;
    short("map_ahead", || ahead(&mut from));
    (world, pages * PAGE_SIZE, size)
}

/// A log over all kinds of leaves, everything dirty or nothing, from its start to its end.
#[test]
fn every_step_of_a_log_is_short() {
    for leaves in [Leaves::Far, Leaves::Gib, Leaves::Mib, Leaves::Pages] {
        for engine in [Engine::WriteProtect, Engine::Dbm] {
            for granularity in [Granularity::Block, Granularity::Adaptive] {
                let (world, bytes, size) = vm(leaves);
                let stage2 = &world.stage2;
                short("start_log", || {
                    stage2.start_log(engine, granularity).unwrap()
                });
                for at in (0..bytes).step_by(size as usize) {
                    world.write(0, GIB + at);
                }
                for epoch in 1..=2 {
                    short("take", || stage2.take(Epoch(epoch)).unwrap());
                    let dirty = stage2.taken(Epoch(epoch)).unwrap()[0].dirty_pages;
                    assert_eq!(dirty, if epoch == 1 { bytes / PAGE_SIZE } else { 0 });
                    stage2.commit(Epoch(epoch)).unwrap();
                }
                let other = match engine {
                    Engine::WriteProtect => Engine::Dbm,
                    Engine::Dbm => Engine::WriteProtect,
                };
                stage2.set_engine(other).unwrap();
                short("bring_over", || stage2.bring_over().unwrap());
                short("stop_log", || stage2.stop_log().unwrap());
            }
        }
    }
}

/// What EL2 writes where nothing is mapped, or under a block, is found by the live bits alone.
#[test]
fn steps_over_what_el2_wrote_are_short() {
    for engine in [Engine::WriteProtect, Engine::Dbm] {
        let world = World::sized(dbm(), 40, 128, 2);
        world.slot(0, GIB, 2 * P1G, Access::ReadWrite, RAM);
        world.start(engine, Granularity::Adaptive);
        world.read(0, GIB);
        world.stage2.mark_dirty(Ipa::new(GIB), 2 * GIB).unwrap();
        short("take", || world.stage2.take(Epoch(1)).unwrap());
        assert_eq!(
            world.stage2.taken(Epoch(1)).unwrap()[0].dirty_pages,
            2 * P1G
        );
    }
}

/// A slot goes, or changes its access, with all of it dirty. A part of it are looks at whether a table has
/// become empty, which are loads and nothing else.
#[test]
fn every_step_of_a_slot_that_goes_is_short() {
    for leaves in [Leaves::Gib, Leaves::Mib, Leaves::Pages] {
        let (world, bytes, size) = vm(leaves);
        world.start(Engine::Dbm, Granularity::Block);
        for at in (0..bytes).step_by(size as usize) {
            world.write(0, GIB + at);
        }
        let stage2 = &world.stage2;
        let (most, to) = (MOST + 4 * 512, Access::ReadOnly);
        at_most(most, "set_access", || {
            stage2.set_access(SlotId(0), to).unwrap()
        });
        world.map_all(0);
        at_most(most, "delete_slot", || {
            stage2.delete_slot(SlotId(0)).unwrap()
        });
    }
}

/// Flash asks with every command: what a slot's access is already waits for no CPU that reads the layout.
#[test]
fn an_access_that_is_so_already_waits_for_nobody() {
    struct NoWait;
    impl Observer for NoWait {
        fn point(&self, _: Point) {}
        fn milestone(&self) {}
        fn wait(&self) {
            panic!("it waits");
        }
        fn settle(&self, _: usize) {}
        fn wrote(&self, _: Write) {}
        fn filled(&self, _: usize) {}
        fn noted(&self, _: Event) {}
    }
    for access in [Access::None, Access::ReadOnly, Access::ReadWrite] {
        let world = World::new(dbm());
        world.slot(0, GIB, 1, access, RAM);
        let reader = world.stage2.layout();
        let change = || world.stage2.set_access(SlotId(0), access);
        let progress = traced::observed(Arc::new(NoWait), change);
        assert_eq!(progress, Ok(Progress::Done), "{access:?}");
        drop(reader);
    }
}
