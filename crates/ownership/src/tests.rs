//! Tests on the build machine.

use crate::*;
use std::collections::BTreeSet;
use std::string::ToString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::vec::Vec;

const BASE: u64 = 0x4000_0000;

fn entries(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

fn frame(index: u64) -> Pa {
    Pa(BASE + index * FRAME_SIZE)
}

fn guest(vm: u16, lives: u16, gfn: u64) -> Guest {
    let generation = (0..lives).fold(Generation::FIRST, |generation, _| generation.next());
    Guest::new(VmId::new(vm).unwrap(), generation, gfn).unwrap()
}

/// One of each kind, in the order of `Kind::ALL`.
fn owners() -> [Owner; 8] {
    [
        Owner::Reserved,
        Owner::Free,
        Owner::Hypervisor,
        Owner::Table(VmId::new(7).unwrap()),
        Owner::Bundle,
        Owner::GuestRam(guest(7, 2, 0x40000)),
        Owner::Dying(guest(7, 2, 0x40000)),
        Owner::InTransit,
    ]
}

#[test]
fn packing_keeps_every_owner_apart() {
    let extremes = [
        Owner::GuestRam(guest(0, 0, 0)),
        Owner::GuestRam(guest(1023, 16383, (1 << 36) - 1)),
        Owner::Dying(guest(1023, 0, 0)),
        Owner::Dying(guest(0, 16383, 0)),
        Owner::Table(VmId::new(1023).unwrap()),
        Owner::Table(VmId::new(0).unwrap()),
    ];
    let all: Vec<Owner> = owners().into_iter().chain(extremes).collect();
    let packed: BTreeSet<u64> = all.iter().map(|owner| owner.pack()).collect();
    assert_eq!(packed.len(), all.len());
    assert!(
        all.iter()
            .all(|owner| Owner::unpack(owner.pack()) == *owner)
    );
    assert_eq!(Owner::unpack(0), Owner::Reserved);
    for nonsense in 8..16 {
        assert_eq!(Owner::unpack(u64::MAX << 4 | nonsense), Owner::Reserved);
    }
}

#[test]
fn numbers_are_checked() {
    assert_eq!(VmId::new(1024), None);
    assert_eq!(
        Guest::new(VmId::new(0).unwrap(), Generation::FIRST, 1 << 36),
        None
    );
    let last = (0..16383).fold(Generation::FIRST, |generation, _| generation.next());
    assert_eq!((last.raw(), last.next()), (16383, Generation::FIRST));
}

#[test]
fn every_transition_is_allowed_or_refused_as_the_table_says() {
    use Kind::{Bundle, Dying, Free, GuestRam, Hypervisor, Reserved, Table};
    let allowed: BTreeSet<(Kind, Kind)> = [
        (Reserved, Free),
        (Reserved, Hypervisor),
        (Reserved, Bundle),
        (Free, Hypervisor),
        (Free, Table),
        (Free, GuestRam),
        (Hypervisor, Free),
        (Table, Free),
        (GuestRam, Dying),
        (Dying, Free),
        (Dying, GuestRam),
    ]
    .into();
    for (from_kind, from) in Kind::ALL.into_iter().zip(owners()) {
        assert_eq!(from.kind(), from_kind);
        for (to_kind, to) in Kind::ALL.into_iter().zip(owners()) {
            // Coming back to life needs another life.
            let to = match (from, to) {
                (Owner::Dying(_), Owner::GuestRam(_)) => Owner::GuestRam(guest(7, 3, 0x40000)),
                _ => to,
            };
            let memory = entries(1);
            let table = FrameTable::new(Pa(BASE), &memory).unwrap();
            memory[0].store(from.pack(), Ordering::SeqCst);
            let expected = if allowed.contains(&(from_kind, to_kind)) {
                (Ok(()), Ok(to))
            } else {
                (
                    Err(Error::Forbidden {
                        frame: frame(0),
                        from,
                        to,
                    }),
                    Ok(from),
                )
            };
            assert_eq!(
                (
                    table.transfer_range(frame(0), 1, from, to),
                    table.owner(frame(0))
                ),
                expected,
                "{from} to {to}"
            );
        }
    }
}

#[test]
fn guest_memory_dies_as_what_it_was_and_returns_to_its_place_only() {
    let was = guest(3, 1, 50);
    assert!(Owner::GuestRam(was).may_become(Owner::Dying(was)));
    for other in [guest(4, 1, 50), guest(3, 2, 50), guest(3, 1, 51)] {
        assert!(!Owner::GuestRam(was).may_become(Owner::Dying(other)));
    }
    assert!(Owner::Dying(was).may_become(Owner::GuestRam(guest(3, 2, 50))));
    for other in [was, guest(4, 2, 50), guest(3, 2, 51)] {
        assert!(!Owner::Dying(was).may_become(Owner::GuestRam(other)));
    }
}

#[test]
fn the_wrong_owner_is_refused_and_the_right_one_named() {
    let memory = entries(4);
    let table = FrameTable::new(Pa(BASE), &memory).unwrap();
    table
        .transfer_range(frame(0), 4, Owner::Reserved, Owner::Free)
        .unwrap();
    let ram = Owner::GuestRam(guest(1, 0, 9));
    table.transfer_range(frame(2), 1, Owner::Free, ram).unwrap();
    let refused = table.transfer_range(frame(2), 1, Owner::Free, Owner::Hypervisor);
    let error = Error::NotTheOwner {
        frame: frame(2),
        expected: Owner::Free,
        owner: ram,
    };
    assert_eq!(refused, Err(error));
    assert_eq!(
        error.to_string(),
        "frame 0x40002000 is memory of VM 1 (life 0) at guest frame 0x9, not free; \
         take another frame or wait for its owner"
    );
    // The same VM in another life, or at another place, is somebody else.
    for other in [guest(1, 1, 9), guest(1, 0, 8)] {
        assert!(
            table
                .transfer_range(frame(2), 1, Owner::GuestRam(other), Owner::Dying(other))
                .is_err()
        );
    }
}

#[test]
fn a_range_moves_whole_or_not_at_all() {
    let memory = entries(16);
    let table = FrameTable::new(Pa(BASE), &memory).unwrap();
    table
        .transfer_range(frame(0), 16, Owner::Reserved, Owner::Free)
        .unwrap();
    table
        .transfer_range(frame(11), 1, Owner::Free, Owner::Hypervisor)
        .unwrap();
    let before: Vec<u64> = memory
        .iter()
        .map(|entry| entry.load(Ordering::SeqCst))
        .collect();
    let ram = Owner::GuestRam(guest(2, 0, 0x40000));
    for (first, frames) in [(0, 16), (11, 1), (5, 7), (11, 5)] {
        let refused = table.transfer_range(frame(first), frames, Owner::Free, ram);
        let owner = Owner::Hypervisor;
        assert_eq!(
            refused,
            Err(Error::NotTheOwner {
                frame: frame(11),
                expected: Owner::Free,
                owner
            })
        );
        let after: Vec<u64> = memory
            .iter()
            .map(|entry| entry.load(Ordering::SeqCst))
            .collect();
        assert_eq!(after, before);
    }
    table
        .transfer_range(frame(0), 11, Owner::Free, ram)
        .unwrap();
    assert_eq!(
        table.owner(frame(10)),
        Ok(Owner::GuestRam(guest(2, 0, 0x4000a)))
    );
    // A range that is off by one frame is somebody else's memory.
    let shifted = guest(2, 0, 0x40001);
    assert!(
        table
            .transfer_range(
                frame(0),
                11,
                Owner::GuestRam(shifted),
                Owner::Dying(shifted)
            )
            .is_err()
    );
    let whole = guest(2, 0, 0x40000);
    table
        .transfer_range(frame(0), 11, Owner::GuestRam(whole), Owner::Dying(whole))
        .unwrap();
    table
        .transfer_range(frame(0), 11, Owner::Dying(whole), Owner::Free)
        .unwrap();
    let census = census(&table);
    assert_eq!(
        (
            census.of(Kind::Free),
            census.of(Kind::Hypervisor),
            census.total()
        ),
        (15, 1, 16)
    );
    assert_eq!(
        table.transfer_range(frame(16), 0, Owner::Free, Owner::Hypervisor),
        Ok(())
    );
}

#[test]
fn addresses_and_numbers_outside_are_refused() {
    let memory = entries(4);
    let table = FrameTable::new(Pa(BASE), &memory).unwrap();
    for pa in [
        0,
        BASE - FRAME_SIZE,
        BASE + 1,
        BASE + 4 * FRAME_SIZE,
        u64::MAX,
        !0xfff,
    ] {
        assert_eq!(table.owner(Pa(pa)), Err(Error::NoSuchFrame(Pa(pa))));
        assert!(
            table
                .transfer_range(Pa(pa), 1, Owner::Reserved, Owner::Free)
                .is_err()
        );
    }
    for frames in [4, u64::MAX, u64::MAX / FRAME_SIZE] {
        let refused = table.transfer_range(frame(1), frames, Owner::Reserved, Owner::Free);
        assert_eq!(refused, Err(Error::NoSuchFrame(frame(1))));
    }
    table
        .transfer_range(frame(0), 4, Owner::Reserved, Owner::Free)
        .unwrap();
    let top = Owner::GuestRam(guest(0, 0, (1 << 36) - 2));
    assert_eq!(
        table.transfer_range(frame(0), 3, Owner::Free, top),
        Err(Error::GuestRange(top))
    );
    table.transfer_range(frame(0), 2, Owner::Free, top).unwrap();
    assert!(FrameTable::new(Pa(BASE + 8), &memory).is_err());
    assert!(FrameTable::new(Pa(!0xfff), &memory).is_err());
}

#[test]
fn cpus_that_claim_overlapping_ranges_never_share_a_frame() {
    let memory = entries(64);
    let table = FrameTable::new(Pa(BASE), &memory).unwrap();
    table
        .transfer_range(frame(0), 64, Owner::Reserved, Owner::Free)
        .unwrap();
    let holders: Vec<AtomicU64> = entries(64);
    thread::scope(|scope| {
        for vm in 0..4u16 {
            let (table, holders) = (&table, &holders);
            scope.spawn(move || {
                let mut state = u64::from(vm) + 1;
                for _ in 0..5000 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let (first, frames) = (state >> 33 & 63, state >> 40 & 15);
                    let name = guest(vm, 0, first);
                    if table
                        .transfer_range(frame(first), frames, Owner::Free, Owner::GuestRam(name))
                        .is_err()
                    {
                        continue;
                    }
                    let mine = first as usize..(first + frames) as usize;
                    for holder in &holders[mine.clone()] {
                        assert_eq!(
                            holder.swap(u64::from(vm) + 1, Ordering::SeqCst),
                            0,
                            "two owners"
                        );
                    }
                    for holder in &holders[mine] {
                        assert_eq!(holder.swap(0, Ordering::SeqCst), u64::from(vm) + 1);
                    }
                    table
                        .transfer_range(
                            frame(first),
                            frames,
                            Owner::GuestRam(name),
                            Owner::Dying(name),
                        )
                        .unwrap();
                    table
                        .transfer_range(frame(first), frames, Owner::Dying(name), Owner::Free)
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(census(&table).of(Kind::Free), 64);
}

/// Counts a table by pieces that do not divide it.
fn census(table: &FrameTable<'_>) -> Census {
    let mut census = Census::default();
    let mut next = Some(0);
    while let Some(first) = next {
        next = table.count(first, 7, &mut census);
    }
    census
}
