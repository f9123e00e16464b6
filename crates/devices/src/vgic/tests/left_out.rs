//! Accesses to the active state of interrupts in no list register, some of which the guest has just ended.

use super::*;

/// A board whose vCPU 1, with one list register, has SPIs 40, 41 and 42 active, of which 40 (the least urgent) and 41 are left out.
fn board() -> Board {
    let mut board = Board::with_list_registers(2, 1);
    for (intid, priority) in [(40, 0xa0), (41, 0x80), (42, 0x60)] {
        take(&mut board, intid, priority);
    }
    board.sync(1);
    assert_eq!(board.cpu(1).state(42), 2);
    board
}

/// vCPU 1 takes an edge.
fn take(board: &mut Board, intid: u32, priority: u8) {
    board.edge(1, intid);
    board.priority(1, intid, priority);
    board.enable(1, intid);
    match intid {
        32.. => {
            board.route(intid, 1);
            board.line(intid, Level::High);
        }
        _ => board.raise(1, intid, Link::Software),
    }
    assert_eq!(board.cpu(1).acknowledge(), Some(intid));
}

fn active(board: &Board) -> Vec<u32> {
    let all = [20, 21, 40, 41, 42, 50].into_iter();
    all.filter(|intid| board.read_bit(1, 0x300, *intid) == 1)
        .collect()
}

/// Writes the bit of one without a sync.
fn write(board: &Board, base: u64, intid: u32) -> Kick {
    let (frame, offset) = match intid {
        0..32 => (Frame::Redistributor(vcpu(1)), GICR_SGI + base),
        _ => (Frame::Distributor, base + u64::from(intid / 32) * 4),
    };
    let bit = 1 << (intid % 32);
    board
        .vgic
        .mmio_write(V0, frame, offset, AccessSize::Word, bit)
}

#[test]
fn a_read_is_told_of_an_end_where_none_is_listed() {
    let mut board = Board::with_list_registers(2, 1);
    take(&mut board, 20, 0xa0);
    take(&mut board, 40, 0x80);
    let private = (Frame::Redistributor(vcpu(1)), GICR_SGI + 0x300);
    // The list register is an SPI's: no private one is listed.
    board.cpu(1).end(40);
    board.cpu(1).end(20);
    let kick = board.vgic.refresh(private.0, private.1);
    assert_eq!(kick, Kick::one(vcpu(1)));
    board.settle(kick);
    assert_eq!(active(&board), []);

    // And the other way round.
    let mut board = Board::with_list_registers(2, 1);
    take(&mut board, 40, 0xa0);
    take(&mut board, 20, 0x80);
    board.cpu(1).end(20);
    board.cpu(1).end(40);
    assert_eq!(board.read_bit(1, 0x300, 40), 1, "what the last sync saw");
    assert!(board.vgic.needs_sync(vcpu(1)), "but the next is right");
    board.sync(1);
    assert_eq!(active(&board), []);
}

#[test]
fn an_end_before_a_deactivation_by_hand_is_no_others() {
    for (least, middle) in [(40, 41), (20, 21), (40, 20), (20, 40)] {
        let mut board = Board::with_list_registers(2, 1);
        take(&mut board, least, 0xa0);
        take(&mut board, middle, 0x80);
        take(&mut board, 50, 0x60);
        board.cpu(1).end(50);
        board.cpu(1).end(middle);
        let kick = write(&board, 0x380, middle);
        assert_eq!(
            board.read_bit(1, 0x300, middle),
            0,
            "{middle} is inactive at once"
        );
        board.settle(kick);
        board.sync(1);
        assert_eq!(active(&board), [least], "{least} is in its handler");
        board.cpu(1).end(least);
        board.sync(1);
        assert_eq!(active(&board), []);
        assert_eq!(board.cpu(1).shortage, Shortage::None);
    }
}

#[test]
fn one_left_out_and_made_inactive_by_hand_comes_again() {
    let mut board = board();
    board.line(41, Level::Low);
    board.line(41, Level::High);
    // It goes to another by now.
    board.route(41, 0);
    let kick = write(&board, 0x380, 41);
    assert!(kick.contains(vcpu(1)), "it looks for the end");
    board.settle(kick);
    assert_eq!(active(&board), [40, 42]);
    assert_eq!(board.cpu(0).acknowledge(), Some(41));
}

#[test]
fn an_end_before_an_activation_by_hand_does_not_undo_it() {
    let mut board = board();
    board.cpu(1).end(42);
    board.cpu(1).end(41);
    let kick = write(&board, 0x300, 41);
    board.settle(kick);
    board.sync(1);
    assert_eq!(active(&board), [40, 41]);
    // The next end is its own.
    board.cpu(1).end(41);
    board.sync(1);
    assert_eq!(active(&board), [40]);
}

#[test]
fn of_two_writes_about_one_left_out_the_later_counts() {
    let mut board = board();
    for (first, second, expected) in [
        (0x380, 0x300, &[40, 41, 42][..]),
        (0x300, 0x380, &[40, 42][..]),
    ] {
        let kick = write(&board, first, 41).union(write(&board, second, 41));
        assert_eq!(active(&board), expected);
        board.settle(kick);
        assert_eq!(active(&board), expected);
    }
}

#[test]
fn an_end_is_not_that_of_one_made_active_by_hand_since() {
    for by_hand in [20, 50] {
        let mut board = board();
        board.priority(1, by_hand, 0);
        if by_hand >= 32 {
            board.route(by_hand, 1);
        }
        board.cpu(1).end(42);
        // Of 41: the other was not active yet.
        board.cpu(1).end(41);
        let kick = write(&board, 0x300, by_hand);
        board.settle(kick);
        board.sync(1);
        let mut expected = [40, by_hand];
        expected.sort_unstable();
        assert_eq!(active(&board), expected);
    }
}

#[test]
fn an_end_of_one_made_active_by_hand_since_is_its_own_if_there_is_no_other() {
    let mut board = board();
    board.cpu(1).end(42);
    board.cpu(1).end(41);
    board.cpu(1).end(40);
    board.priority(1, 50, 0);
    board.route(50, 1);
    let kick = write(&board, 0x300, 50);
    board.cpu(1).end(50);
    board.settle(kick);
    assert_eq!(active(&board), []);
}

#[test]
fn the_line_of_an_earlier_list_register_is_not_that_of_the_next() {
    let mut board = Board::new(1);
    board.enable(0, 27);
    board.raise(0, 27, Link::Hardware(27));
    board.cpu(0).acknowledge();
    board.sync(0);
    let in_line = |board: &Board| board.vgic.banks[0].private.lock().word.in_line >> 27 & 1;
    assert_eq!(in_line(&board), 1, "high at the fold");
    board.cpu(0).end(27);
    board.sync(0);
    board.raise(0, 27, Link::Hardware(27));
    assert_eq!(board.cpu(0).state(27), 1);
    assert_eq!(in_line(&board), 0, "nobody has folded it yet");
}
