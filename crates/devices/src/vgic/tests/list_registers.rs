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
    assert_eq!(board.cpu(0).underflow, Underflow::On);
    let order: Vec<u32> = expected.iter().map(|(intid, _)| *intid).collect();
    assert_eq!(drain(&mut board), order);
    assert_eq!(board.cpu(0).underflow, Underflow::Off);
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
    assert_eq!(board.cpu(0).underflow, Underflow::On);
    assert_eq!(drain(&mut board).len(), 7);
    assert_eq!(board.cpu(0).underflow, Underflow::Off);
}

#[test]
fn an_urgent_one_displaces_a_waiting_one_but_never_an_active_one() {
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
    assert_eq!(board.cpu(0).acknowledge(), Some(42));
    // All registers are active: even the most urgent waits until one ends.
    pending(&mut board, &[(44, 0x00)]);
    assert_eq!(
        [40, 42, 44].map(|intid| board.cpus[0].state(intid)),
        [2, 2, 0]
    );
    assert_eq!(board.cpu(0).underflow, Underflow::On);
    board.cpu(0).end(42);
    board.sync(0);
    assert_eq!(board.cpu(0).acknowledge(), Some(44));
    board.cpu(0).end(44);
    board.cpu(0).end(40);
    board.sync(0);
    assert_eq!(drain(&mut board), [43, 41]);
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
    assert!(
        board.vgic.needs_sync(V0),
        "with one register every entry looks for room"
    );
    board.sync(0);
    let lr = board.cpu(0).holding(27).expect("back");
    assert_eq!((lr & HARDWARE, lr >> 32 & 0x1fff), (HARDWARE, 27));
    assert_eq!(
        board.cpu(0).underflow,
        Underflow::Off,
        "a full single register would assert it"
    );
}

#[test]
fn an_active_one_without_a_register_goes_in_first() {
    let mut board = Board::with_list_registers(1, 2);
    pending(&mut board, &[(40, 0x10), (41, 0x20)]);
    board.priority(0, 90, 0xf8);
    board.bit(0, 0x300, 90);
    assert_eq!(
        [40, 41, 90].map(|intid| board.cpus[0].state(intid)),
        [1, 0, 2],
        "the guest's end must find it"
    );
    board.cpu(0).end(90);
    board.sync(0);
    assert_eq!(drain(&mut board), [40, 41]);
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
        fn read(&self, n: usize) -> u64 {
            self.reads.set(self.reads.get() + 1);
            self.inner.read(n)
        }
        fn write(&mut self, n: usize, value: u64) {
            self.writes += 1;
            self.inner.write(n, value);
        }
        fn set_underflow_interrupt(&mut self, underflow: Underflow) {
            self.inner.set_underflow_interrupt(underflow);
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
    // In the round after the first the finished register is looked at, and not cleared in vain.
    for (round, reads) in [(1, 0), (2, 1), (3, 2)] {
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
