//! The exact order of descriptor writes, barriers and invalidations.

use super::world::*;
use crate::fake::Event::*;
use crate::fake::{Event, Machine};
use crate::pte::{MemAttr, Permission, Pte};
use crate::types::*;
use crate::{FaultAccess, FaultKind, Features, Outcome, Support, Tlbi};
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
const PAGES: u64 = 2 * P2M;

/// 39 bits: one root table, at level 1.
fn world(features: Features) -> World {
    let world = World::sized(features, 39, 64, 2);
    world.slot(0, IPA, PAGES, Access::ReadWrite, RAM);
    world
}

fn leaf(level: Level, offset: u64, permission: Permission) -> Event {
    Descriptor(Pte::leaf(level, Pa::new(RAM + offset), MemAttr::WriteBack, permission).0)
}

fn everything(world: &World) -> Vec<Event> {
    let mut events = std::vec![DsbIshst, Select(world.guest.vttbr), Vmalls12e1is];
    events.extend(completion(world));
    events
}

/// What ends every sequence of broadcast invalidations.
fn completion(world: &World) -> Vec<Event> {
    match world.stage2.features().tlbi {
        Tlbi::Once => std::vec![DsbIsh, Isb, Restore(0)],
        Tlbi::Twice => std::vec![DsbIsh, Vale2is, DsbIsh, Isb, Restore(0)],
    }
}

#[test]
fn map_links_a_table_after_it_is_visible_and_a_leaf_before_the_guest_runs() {
    let world = world(Features::BASELINE);
    let (root, index) = world.where_is(IPA, Level::L1);
    world.machine.record_watching(root, index);
    assert_eq!(
        world
            .stage2
            .handle_fault(fault(IPA, FaultAccess::Read, FaultKind::Translation)),
        Outcome::Resume
    );
    let events = world.machine.recorded();
    let (table, _) = world.where_is(IPA, Level::L2);
    assert_eq!(
        events,
        [
            Alloc(1),
            DsbIshst,
            Descriptor(Pte::table(table).0),
            DsbIshst
        ]
    );
    assert_eq!(world.pte(IPA).1, Level::L2);
}

#[test]
fn map_puts_a_leaf_into_a_table_that_is_there_before_the_guest_runs() {
    let world = World::sized(Features::BASELINE, 39, 64, 2);
    let door = IPA + PAGE_SIZE;
    world.slot(0, IPA, 1, Access::ReadWrite, RAM);
    world.slot(1, door, 1, Access::ReadWrite, RAM + PAGE_SIZE);
    world.read(0, IPA);
    let (table, index) = world.where_is(door, Level::L3);
    world.machine.record_watching(table, index);
    world
        .stage2
        .handle_fault(fault(door, FaultAccess::Read, FaultKind::Translation));
    let put = leaf(Level::L3, PAGE_SIZE, Permission::Untracked);
    assert_eq!(world.machine.recorded(), [put, DsbIshst]);
}

#[test]
fn map_fills_a_page_table_before_it_links_it() {
    let world = World::sized(Features::BASELINE, 39, 64, 2);
    // The memory is one page off, so only pages fit.
    world.slot(0, IPA, PAGES, Access::ReadWrite, RAM + PAGE_SIZE);
    world.read(0, IPA);
    let (table, index) = world.where_is(IPA + 2 * MIB, Level::L2);
    world.machine.record_watching(table, index);
    world.stage2.handle_fault(fault(
        IPA + 2 * MIB,
        FaultAccess::Read,
        FaultKind::Translation,
    ));
    let events = world.machine.recorded();
    let (pages, _) = world.where_is(IPA + 2 * MIB, Level::L3);
    assert_eq!(
        events,
        [
            Alloc(1),
            DsbIshst,
            Descriptor(Pte::table(pages).0),
            DsbIshst
        ]
    );
    assert_eq!(world.stage2.mappings().pages_4k, 2 * P2M);
}

fn split_events(features: Features) -> (World, Vec<Event>) {
    let world = world(features);
    world.map_all(0);
    let (table, index) = world.where_is(IPA, Level::L2);
    // The first call clears bitmaps, the second arms. Two blocks, so two splits; watch the first.
    world
        .stage2
        .start_log(Engine::WriteProtect, Granularity::Page)
        .unwrap();
    world.machine.record_watching(table, index);
    finish(|| {
        world
            .stage2
            .start_log(Engine::WriteProtect, Granularity::Page)
    })
    .unwrap();
    let events = world.machine.recorded();
    (world, events)
}

#[test]
fn split_without_bbm2_breaks_before_it_makes() {
    for tlbi in [Tlbi::Once, Tlbi::Twice] {
        split_breaks_before_it_makes(tlbi);
    }
}

fn split_breaks_before_it_makes(tlbi: Tlbi) {
    let (world, events) = split_events(Features {
        ttl: Support::Present,
        tlbi,
        ..Features::BASELINE
    });
    let vttbr = Select(world.guest.vttbr);
    let table = Descriptor(Pte::table(world.where_is(IPA, Level::L3).0).0);
    let broken = Descriptor(Pte::BUSY.0);
    let invalidate = |ipa| {
        let mut events = std::vec![DsbIshst, vttbr, Ipas2e1is(ipa, 0b0110), DsbIsh, Vmalle1is];
        events.extend(completion(&world));
        events
    };
    let mut expected = std::vec![Alloc(1), broken];
    expected.extend(invalidate(IPA));
    // A step ends with a barrier of its own: the invalidation at the end may be another CPU's.
    expected.extend([table, DsbIshst, DsbIshst, Alloc(1)]);
    expected.extend(invalidate(IPA + 2 * MIB));
    expected.extend([DsbIshst, DsbIshst]);
    expected.extend(everything(&world));
    assert_eq!(events, expected);
}

#[test]
fn split_with_bbm2_never_shows_an_invalid_entry() {
    let (world, events) = split_events(Features {
        bbm2: Support::Present,
        ..Features::BASELINE
    });
    let vttbr = Select(world.guest.vttbr);
    let table = Descriptor(Pte::table(world.where_is(IPA, Level::L3).0).0);
    let invalidate = |ipa| {
        [
            DsbIshst,
            vttbr,
            Ipas2e1is(ipa, 0),
            DsbIsh,
            Vmalle1is,
            DsbIsh,
            Isb,
            Restore(0),
        ]
    };
    // The first barrier makes the children visible before the table points to them.
    let mut expected = std::vec![Alloc(1), DsbIshst, table];
    expected.extend(invalidate(IPA));
    expected.extend([DsbIshst, Alloc(1), DsbIshst]);
    expected.extend(invalidate(IPA + 2 * MIB));
    expected.push(DsbIshst);
    expected.extend(everything(&world));
    assert_eq!(events, expected);
}

#[test]
fn invariant_03_harvest_clears_then_invalidates_then_says_done() {
    for (engine, features) in engines() {
        let features = Features {
            tlb_range: Support::Absent,
            ttl: Support::Absent,
            ..features
        };
        let world = world(features);
        world.map_all(0);
        world.start(engine, Granularity::Page);
        world.write(0, IPA);
        world.write(0, IPA + 5 * PAGE_SIZE);
        let (table, index) = world.where_is(IPA, Level::L3);
        world.machine.record_watching(table, index);
        let (_, pages) = world.take();
        let attr = if features.fwb == Support::Present {
            MemAttr::ForcedWriteBack
        } else {
            MemAttr::WriteBack
        };
        let clean =
            Descriptor(Pte::leaf(Level::L3, Pa::new(RAM), attr, Permission::Clean(engine)).0);
        let mut expected = std::vec![clean];
        if engine == Engine::Dbm {
            // Of the CPU that cleared. Under write protection it is the one that invalidates.
            expected.push(DsbIshst);
        }
        expected.extend([
            DsbIshst,
            Select(world.guest.vttbr),
            Ipas2e1is(IPA, 0),
            Ipas2e1is(IPA + 5 * PAGE_SIZE, 0),
            DsbIsh,
            Vmalle1is,
        ]);
        expected.extend(completion(&world));
        assert_eq!(world.machine.recorded(), expected);
        assert_eq!(pages, set([IPA, IPA + 5 * PAGE_SIZE]));
    }
}

#[test]
fn invariant_03_a_large_harvest_invalidates_by_vmid_once() {
    for (engine, features) in engines() {
        let world = world(Features {
            tlb_range: Support::Absent,
            ..features
        });
        world.map_all(0);
        world.start(engine, Granularity::Page);
        for page in (0..PAGES).step_by(2) {
            world.write(0, IPA + page * PAGE_SIZE);
        }
        world.machine.record();
        world.take();
        let events = world.machine.recorded();
        let invalidation = everything(&world);
        let (steps, last) = events.split_at(events.len() - invalidation.len());
        // Each step of it ends with a barrier of the CPU that took it, but for the last, if that invalidates.
        assert!(!steps.is_empty() && steps.iter().all(|event| *event == DsbIshst));
        assert_eq!(last, invalidation);
    }
}

#[test]
fn invariant_16_a_run_goes_by_range_where_the_machine_can() {
    let world = world(Machine::everything());
    world.map_all(0);
    world.start(Engine::Dbm, Granularity::Page);
    for page in 3..3 + 67 {
        world.write(0, IPA + page * PAGE_SIZE);
    }
    world.machine.record();
    world.take();
    let at = IPA + 3 * PAGE_SIZE;
    let mut expected = std::vec![
        DsbIshst,
        DsbIshst,
        Select(world.guest.vttbr),
        // 67 = 1 + 2 + 64: the odd one alone, then scale 0, then scale 1.
        Ipas2e1is(at, 0b0111),
        Ripas2e1is(at + PAGE_SIZE, 2),
        Ripas2e1is(at + 3 * PAGE_SIZE, 64),
        DsbIsh,
        Vmalle1is,
    ];
    expected.extend(completion(&world));
    assert_eq!(world.machine.recorded(), expected);
}

#[test]
fn a_clean_harvest_touches_neither_memory_nor_tlbs() {
    for (engine, features) in engines() {
        for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
            let world = world(features);
            world.map_all(0);
            world.start(engine, granularity);
            world.machine.record();
            assert!(world.harvest().is_empty());
            assert_eq!(world.machine.recorded(), []);
        }
    }
}

#[test]
fn relaxing_is_local_and_drops_one_guest_address() {
    let world = world(Features::BASELINE);
    world.map_all(0);
    world.start(Engine::WriteProtect, Granularity::Page);
    world.read(0, IPA);
    let (table, index) = world.where_is(IPA, Level::L3);
    world.machine.record_watching(table, index);
    assert_eq!(world.write(0, IPA), 1, "one abort a page");
    assert_eq!(
        world.machine.recorded(),
        [
            leaf(Level::L3, 0, Permission::Dirty(Engine::WriteProtect)),
            DsbNsh,
            Select(world.guest.vttbr),
            Ipas2e1(IPA, 0),
            DsbNsh,
            Vaae1(IPA),
            DsbNsh,
            Isb,
            Restore(0)
        ]
    );
}

#[test]
fn a_spurious_permission_fault_drops_all_combined_entries() {
    let world = world(Features::BASELINE);
    world.map_all(0);
    world.start(Engine::WriteProtect, Granularity::Page);
    // CPU 1 holds the page read-only while CPU 0 makes it writable.
    world.read(1, IPA);
    world.write(0, IPA);
    world.machine.record();
    assert_eq!(world.write(1, IPA), 1);
    assert_eq!(
        world.machine.recorded(),
        [
            DsbNsh,
            Select(world.guest.vttbr),
            Ipas2e1(IPA, 0),
            DsbNsh,
            Vmalle1,
            DsbNsh,
            Isb,
            Restore(0)
        ]
    );
    assert_eq!(world.stage2.counters().spurious_faults, 1);
    assert_eq!(world.stage2.counters().write_faults, 1);
}

#[test]
fn invariant_07_collapse_breaks_all_of_a_step_with_one_invalidation_and_frees_last() {
    let world = world(Features::BASELINE);
    world.map_all(0);
    world.start(Engine::WriteProtect, Granularity::Page);
    let (table, index) = world.where_is(IPA, Level::L2);
    world.stage2.stop_log().unwrap();
    while !matches!(world.pte(IPA).0, pte if pte.is_untracked_writable()) {
        world.stage2.stop_log().unwrap();
    }
    world.machine.record_watching(table, index);
    world.stop();
    let mut expected = everything(&world);
    expected.push(Descriptor(Pte::BUSY.0));
    expected.extend(everything(&world));
    expected.extend([
        leaf(Level::L2, 0, Permission::Untracked),
        DsbIshst,
        Free(1),
        Free(1),
    ]);
    assert_eq!(world.machine.recorded(), expected);
}

#[test]
fn invariant_05_tables_are_freed_after_the_invalidation() {
    let world = World::sized(Features::BASELINE, 39, 64, 2);
    world.slot(0, IPA, PAGES, Access::ReadWrite, RAM + PAGE_SIZE);
    world.map_all(0);
    world.machine.record();
    world.delete(0);
    // Each level-3 table in a step of its own, then the one above them.
    let mut expected = Vec::new();
    for _ in 0..3 {
        expected.extend(everything(&world));
        expected.extend([Free(1), DsbIshst]);
    }
    assert_eq!(world.machine.recorded(), expected);
}
