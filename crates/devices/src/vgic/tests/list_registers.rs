//! Which interrupts get the list registers, and what happens to those that do not.

use super::*;

/// Makes these SPIs pending edges with these priorities.
fn pending(board: &mut Board, interrupts: &[(u32, u8)]) {
    for (intid, priority) in interrupts {
        board.edge(0, *intid);
        board.priority(0, *intid, *priority);
        board.enable(0, *intid);
    }
    for (intid, _) in interrupts {
        board.line(*intid, Level::High);
    }
}

/// Acknowledges and ends all there is, syncing after each, and gives the order.
fn drain(board: &mut Board) -> Vec<u32> {
    let mut order = Vec::new();
    while let Some(intid) = board.cpu(0).acknowledge() {
        order.push(intid);
        board.cpu(0).end(intid);
        board.sync(0);
        assert!(order.len() < 200);
    }
    order
}

#[test]
fn the_most_urgent_are_listed_and_the_rest_follow() {
    let mut board = Board::new(1);
    let interrupts = [
        (40, 0xa0),
        (41, 0x20),
        (42, 0xf8),
        (70, 0x10),
        (71, 0x40),
        (159, 0x80),
        (32, 0x18),
    ];
    pending(&mut board, &interrupts);
    let mut expected = interrupts.to_vec();
    expected.sort_by_key(|(_, priority)| *priority);
    let listed: Vec<bool> = expected
        .iter()
        .map(|(intid, _)| board.cpu(0).state(*intid) == 1)
        .collect();
    assert_eq!(listed, [true, true, true, true, false, false, false]);
    assert_eq!(board.cpu(0).shortage, Shortage::Pending);
    let order: Vec<u32> = expected.iter().map(|(intid, _)| *intid).collect();
    assert_eq!(drain(&mut board), order);
    assert_eq!(board.cpu(0).shortage, Shortage::None);
    assert!(!board.vgic.has_deliverable(V0));
}

#[test]
fn the_rest_waits_for_underflow_not_for_every_end() {
    let mut board = Board::new(1);
    let interrupts: Vec<(u32, u8)> = (40..50).map(|intid| (intid, 0x80)).collect();
    pending(&mut board, &interrupts);
    for _ in 0..3 {
        let intid = board.cpu(0).acknowledge().expect("listed");
        board.cpu(0).end(intid);
    }
    // One is left, so the hardware raises the underflow interrupt here.
    board.sync(0);
    let listed = (40..50)
        .filter(|intid| board.cpus[0].state(*intid) == 1)
        .count();
    assert_eq!(listed, 4);
    assert_eq!(board.cpu(0).shortage, Shortage::Pending);
    assert_eq!(drain(&mut board).len(), 7);
    assert_eq!(board.cpu(0).shortage, Shortage::None);
}

#[test]
fn an_urgent_one_displaces_a_waiting_one_and_an_active_one_only_where_none_waits() {
    let mut board = Board::with_list_registers(1, 2);
    pending(&mut board, &[(40, 0x80), (41, 0xa0)]);
    assert_eq!(board.cpu(0).acknowledge(), Some(40));
    pending(&mut board, &[(42, 0x20)]);
    assert_eq!(
        [40, 41, 42].map(|intid| board.cpus[0].state(intid)),
        [2, 0, 1]
    );
    assert_eq!(board.read_bit(0, 0x200, 41), 1, "displaced, still pending");
    // As urgent as the one listed: it waits.
    pending(&mut board, &[(43, 0x20)]);
    assert_eq!([42, 43].map(|intid| board.cpus[0].state(intid)), [1, 0]);
    assert_eq!(board.cpu(0).shortage, Shortage::Pending);
    assert_eq!(board.cpu(0).acknowledge(), Some(42));
    assert!(board.cpu(0).asks_maintenance(), "none is pending");
    board.sync(0);
    // All registers were active: the least urgent made room.
    assert_eq!(
        [40, 42, 43].map(|intid| board.cpus[0].state(intid)),
        [0, 2, 1]
    );
    assert_eq!(board.read_bit(0, 0x300, 40), 1, "active all the same");
    assert_eq!(board.cpu(0).shortage, Shortage::Both);
    pending(&mut board, &[(44, 0x00)]);
    assert_eq!(
        [42, 43, 44].map(|intid| board.cpus[0].state(intid)),
        [2, 0, 1]
    );
    assert_eq!(board.cpu(0).acknowledge(), Some(44));
    board.cpu(0).end(44);
    board.cpu(0).end(42);
    board.sync(0);
    assert_eq!(board.cpu(0).acknowledge(), Some(43));
    board.cpu(0).end(43);
    board.sync(0);
    assert_eq!(
        [40, 41].map(|intid| board.cpus[0].state(intid)),
        [2, 1],
        "back where its end finds it"
    );
    board.cpu(0).end(40);
    board.sync(0);
    assert_eq!(drain(&mut board), [41]);
    assert_eq!(board.cpu(0).shortage, Shortage::None);
}

/// Nests these SPIs, each more urgent than the last.
fn nest(board: &mut Board, intids: core::ops::Range<u32>) {
    for (depth, intid) in intids.enumerate() {
        pending(board, &[(intid, 0xf0 - 8 * depth as u8)]);
        if board.cpu(0).asks_maintenance() {
            board.sync(0);
        }
        assert_eq!(board.cpu(0).acknowledge(), Some(intid), "depth {depth}");
        board.line(intid, Level::Low);
    }
}

#[test]
fn any_depth_of_nesting_ends_in_order() {
    for count in [1, 2, 4] {
        let mut board = Board::with_list_registers(1, count);
        nest(&mut board, 40..64);
        // The priority a guest writes now is not the one it runs at.
        board.priority(0, 41, 0);
        for intid in (40..64).rev() {
            let told = board.cpu(0).end(intid);
            assert_eq!(told, board.cpu(0).asks_maintenance());
            board.sync(0);
            assert_eq!(board.read_bit(0, 0x300, intid), 0, "{intid} ended");
            for other in 40..intid {
                assert_eq!(board.read_bit(0, 0x300, other), 1, "{other} has not");
            }
        }
        assert_eq!(board.cpu(0).shortage, Shortage::None);
        assert!(board.cpu(0).lrs.iter().all(|lr| lr >> 62 == 0));
    }
}

#[test]
fn ends_are_told_late_and_of_those_without_a_register_alone() {
    let mut board = Board::with_list_registers(1, 2);
    nest(&mut board, 40..46);
    pending(&mut board, &[(50, 0x40)]);
    // 44 lost its register to 50. Before maintenance comes, 50 is taken and ended, and all others end.
    assert_eq!(
        [44, 45, 50].map(|intid| board.cpus[0].state(intid)),
        [0, 2, 1]
    );
    assert_eq!(board.cpu(0).acknowledge(), Some(50));
    assert!(!board.cpu(0).end(50));
    for intid in (42..46).rev() {
        board.cpu(0).end(intid);
    }
    board.line(50, Level::Low);
    board.line(50, Level::High);
    assert_eq!(board.cpu(0).acknowledge(), Some(50), "and taken again");
    board.sync(0);
    let active: Vec<u32> = (40..51)
        .filter(|intid| board.read_bit(0, 0x300, *intid) == 1)
        .collect();
    assert_eq!(active, [40, 41, 50]);
}

#[test]
fn with_split_ends_any_may_be_deactivated_first() {
    let mut board = Board::with_list_registers(1, 2);
    board.cpu(0).split = true;
    let intids: Vec<u32> = (40..56).collect();
    for intid in &intids {
        pending(&mut board, &[(*intid, 0x80)]);
        if board.cpu(0).asks_maintenance() {
            board.sync(0);
        }
        assert_eq!(board.cpu(0).acknowledge(), Some(*intid));
        board.cpu(0).drop_priority(*intid);
        board.line(*intid, Level::Low);
        if board.cpu(0).asks_maintenance() {
            board.sync(0);
        }
    }
    let mut left = intids.clone();
    for intid in [47, 40, 55, 41, 54] {
        left.retain(|other| *other != intid);
        if board.cpu(0).deactivation_traps(intid) {
            let kick = board.vgic.deactivate(V0, intid);
            board.settle(kick);
        }
        board.sync(0);
        let active: Vec<u32> = (40..56)
            .filter(|intid| board.read_bit(0, 0x300, *intid) == 1)
            .collect();
        assert_eq!(active, left);
    }
    // One that has no such interrupt, and none that is active.
    for intid in [0, 31, 159, 160, 1023, u32::MAX] {
        let kick = board.vgic.deactivate(V0, intid);
        board.settle(kick);
    }
    // Whoever takes an SPI ends it, wherever it goes by then.
    board.route(42, 5);
    let kick = board.vgic.deactivate(V0, 42);
    board.settle(kick);
    assert_eq!(board.read_bit(0, 0x300, 42), 0);
}

#[test]
fn a_linked_one_that_makes_room_gives_its_physical_interrupt_back() {
    let mut board = Board::with_list_registers(1, 1);
    board.enable(0, 27);
    board.priority(0, 27, 0x80);
    board.raise(0, 27, Link::Hardware(27));
    assert_eq!(board.cpu(0).acknowledge(), Some(27));
    pending(&mut board, &[(40, 0x20)]);
    assert_eq!(board.cpu(0).deactivated, [27]);
    // It comes again at once, and waits.
    board.raise(0, 27, Link::Hardware(27));
    assert_eq!(board.cpu(0).acknowledge(), Some(40));
    board.line(40, Level::Low);
    board.cpu(0).end(40);
    board.sync(0);
    assert!(board.cpu(0).end(27), "its end is told");
    board.sync(0);
    assert_eq!(board.cpu(0).acknowledge(), Some(27));
}

#[test]
fn a_displaced_hardware_linked_one_keeps_its_link() {
    let mut board = Board::with_list_registers(1, 1);
    board.enable(0, 27);
    board.priority(0, 27, 0x80);
    board.raise(0, 27, Link::Hardware(27));
    assert_eq!(board.cpu(0).state(27), 1);
    pending(&mut board, &[(40, 0x20)]);
    assert_eq!([27, 40].map(|intid| board.cpus[0].state(intid)), [0, 1]);
    assert_eq!(board.cpu(0).deactivated, []);
    board.cpu(0).acknowledge();
    board.cpu(0).end(40);
    assert!(board.cpu(0).asks_maintenance(), "none is pending");
    board.sync(0);
    let lr = board.cpu(0).holding(27).expect("back");
    assert_eq!((lr & HARDWARE, lr >> 32 & 0x1fff), (HARDWARE, 27));
    assert_eq!(board.cpu(0).shortage, Shortage::None);
}

#[test]
fn one_made_active_by_hand_goes_in_where_there_is_room() {
    let mut board = Board::with_list_registers(1, 2);
    pending(&mut board, &[(40, 0x10), (41, 0x20)]);
    board.priority(0, 90, 0xf8);
    board.bit(0, 0x300, 90);
    assert_eq!(
        [40, 41, 90].map(|intid| board.cpus[0].state(intid)),
        [1, 1, 0]
    );
    assert_eq!(board.read_bit(0, 0x300, 90), 1);
    assert_eq!(board.cpu(0).shortage, Shortage::Active);
    assert_eq!(drain(&mut board), [40, 41]);
    assert_eq!(board.cpu(0).state(90), 2, "the guest's end finds it");
    board.cpu(0).end(90);
    board.sync(0);
    assert_eq!(board.cpu(0).state(90), 0);
}

#[test]
fn equal_priorities_go_by_number() {
    let mut board = Board::with_list_registers(1, 1);
    pending(&mut board, &[(99, 0x80), (35, 0x80), (60, 0x80)]);
    // 99 came first and is listed; an equal one does not displace it.
    assert_eq!(drain(&mut board), [99, 35, 60]);
}

#[test]
fn a_sync_with_one_sgi_touches_one_register() {
    /// Counts what the controller does.
    struct Counting {
        inner: CpuInterface,
        reads: core::cell::Cell<u32>,
        writes: u32,
    }
    impl ListRegisters for Counting {
        fn count(&self) -> usize {
            self.inner.count()
        }
        fn empty(&self) -> u32 {
            self.inner.empty()
        }
        fn read(&self, n: usize) -> u64 {
            self.reads.set(self.reads.get() + 1);
            self.inner.read(n)
        }
        fn write(&mut self, n: usize, value: u64) {
            self.writes += 1;
            self.inner.write(n, value);
        }
        fn set_shortage(&mut self, shortage: Shortage) {
            self.inner.set_shortage(shortage);
        }
        fn take_ended(&mut self) -> u32 {
            self.inner.take_ended()
        }
        fn deactivate(&mut self, pintid: u16) {
            self.inner.deactivate(pintid);
        }
        fn physical_line(&self, pintid: u16) -> Level {
            self.inner.physical_line(pintid)
        }
    }
    let mut board = Board::new(2);
    board.enable(1, 5);
    let mut registers = Counting {
        inner: CpuInterface::new(4),
        reads: core::cell::Cell::new(0),
        writes: 0,
    };
    // That what they held has ended is known without a look at them, and they are not cleared in vain.
    for (round, reads) in [(1, 0), (2, 0), (3, 0)] {
        let kick = board.vgic.sgi(V0, 5 << 24 | 0b10, SgiRegister::Group1);
        assert_eq!(kick, Kick::one(vcpu(1)));
        // A held SPI lock would hang here if the fast way took it.
        let held = board.vgic.shared.lock();
        let _ = board.vgic.sync(vcpu(1), &mut registers);
        drop(held);
        assert_eq!((registers.reads.get(), registers.writes), (reads, round));
        assert_eq!(registers.inner.acknowledge(), Some(5));
        registers.inner.end(5);
    }
}

#[test]
fn an_sgi_made_active_by_hand_is_listed_so_and_not_delivered_beside_that() {
    let mut board = Board::new(1);
    board.enable(0, 5);
    board.bit(0, 0x300, 5);
    board.sync(0);
    assert_eq!(board.cpus[0].state(5), 2);
    let _ = board.vgic.sgi(V0, 5 << 24 | 1, SgiRegister::Group1);
    board.sync(0);
    assert_eq!(board.cpus[0].state(5), 3);
    assert_eq!(board.cpu(0).acknowledge(), None);
}

#[test]
fn several_sgis_in_one_sync_are_all_listed_the_most_urgent_first() {
    for (count, expected) in [(4, [1, 1, 1]), (2, [0, 1, 1]), (1, [0, 0, 1])] {
        let mut board = Board::with_list_registers(2, count);
        for (intid, priority) in [(2, 0x80), (3, 0x40), (9, 0x20)] {
            board.enable(1, intid);
            board.priority(1, intid, priority);
        }
        for intid in [2u64, 3, 9] {
            let kick = board.vgic.sgi(V0, intid << 24 | 0b10, SgiRegister::Group1);
            assert_eq!(kick, Kick::one(vcpu(1)));
        }
        board.sync(1);
        assert_eq!([2, 3, 9].map(|intid| board.cpus[1].state(intid)), expected);
    }
}
