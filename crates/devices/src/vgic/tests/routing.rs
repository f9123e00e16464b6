//! Where interrupts go: SGI targets, IROUTER, SPIs that change vCPU.

use super::*;

fn targets(board: &Board, from: usize, value: u64, register: SgiRegister) -> u32 {
    board.vgic.sgi(vcpu(from), value, register).mask()
}

#[test]
fn sgis_go_to_their_target_list() {
    let mut board = Board::new(4);
    for index in 0..4 {
        board.gicr(index, 0x100, 0xffff);
    }
    board.sgi(2, 7 << 24 | 0b1010);
    assert_eq!(
        [0, 1, 2, 3].map(|index| board.cpus[index].state(7)),
        [0, 1, 0, 1]
    );
    board.sgi(2, 9 << 24 | 0b0100);
    assert_eq!(
        [0, 1, 2, 3].map(|index| board.cpus[index].state(9)),
        [0, 0, 1, 0],
        "itself, if it says so"
    );
    board.sgi(2, 15 << 24 | 1 << 40 | 0xffff);
    assert_eq!(
        [0, 1, 2, 3].map(|index| board.cpus[index].state(15)),
        [1, 1, 0, 1],
        "all but itself, whatever the list"
    );
    assert_eq!(board.cpu(3).acknowledge(), Some(7));
    board.cpu(3).end(7);
    assert_eq!(board.cpu(3).acknowledge(), Some(15));
    assert_eq!(board.cpu(3).acknowledge(), None);
}

#[test]
fn sgis_to_nobody_kick_nobody() {
    let board = Board::new(4);
    let group1 = SgiRegister::Group1;
    assert_eq!(targets(&board, 0, 0xfff0, group1), 0, "vCPUs there are not");
    assert_eq!(targets(&board, 0, 0, group1), 0);
    for affinity in [1 << 16, 1 << 32, 1 << 48, 1 << 44] {
        assert_eq!(
            targets(&board, 0, affinity | 0xf, group1),
            0,
            "affinity or range {affinity:#x}"
        );
        assert_eq!(
            targets(&board, 0, affinity | 1 << 40, group1),
            0b1110,
            "which IRM ignores"
        );
    }
    assert_eq!(targets(&board, 3, u64::MAX, group1), 0b0111);
}

#[test]
fn group_0_registers_reach_group_0_only() {
    let mut board = Board::new(3);
    board.gicr(1, 0x80, 0xffff_ffff & !(1 << 4));
    for register in [SgiRegister::Group0, SgiRegister::AliasGroup1] {
        assert_eq!(targets(&board, 0, 4 << 24 | 0b111, register), 0b010);
        assert_eq!(targets(&board, 0, 5 << 24 | 0b111, register), 0);
    }
    assert_eq!(
        targets(&board, 0, 4 << 24 | 0b111, SgiRegister::Group1),
        0b111,
        "either group"
    );
}

#[test]
fn an_sgi_while_active_comes_again() {
    let mut board = Board::new(1);
    board.enable(0, 1);
    board.sgi(0, 1 << 24 | 1);
    board.cpu(0).acknowledge();
    board.sgi(0, 1 << 24 | 1);
    board.sgi(0, 1 << 24 | 1);
    assert_eq!(board.cpu(0).state(1), 3);
    board.cpu(0).end(1);
    assert_eq!(board.cpu(0).acknowledge(), Some(1));
    board.cpu(0).end(1);
    board.sync(0);
    assert_eq!(board.cpu(0).acknowledge(), None, "pending is one bit");
}

#[test]
fn a_mailed_sgi_shows_and_clears_before_any_sync() {
    let board = Board::new(2);
    let _ = board.vgic.sgi(V0, 6 << 24 | 0b10, SgiRegister::Group1);
    assert_eq!(board.read_bit(1, 0x200, 6), 1);
    let frame = Frame::Redistributor(vcpu(1));
    let _ = board
        .vgic
        .mmio_write(V0, frame, GICR_SGI + 0x280, AccessSize::Word, 1 << 6);
    assert_eq!(board.read_bit(1, 0x200, 6), 0);
}

#[test]
fn wfi_ends_for_what_is_enabled() {
    let mut board = Board::new(2);
    let send = |board: &Board| board.vgic.sgi(V0, 6 << 24 | 0b10, SgiRegister::Group1);
    board.sgi(0, 6 << 24 | 0b10);
    assert!(!board.vgic.has_deliverable(vcpu(1)), "disabled");
    board.enable(1, 6);
    assert!(board.vgic.has_deliverable(vcpu(1)), "in a list register");
    board.cpu(1).acknowledge();
    board.sync(1);
    assert!(!board.vgic.has_deliverable(vcpu(1)), "active");
    let _ = send(&board);
    assert!(
        !board.vgic.has_deliverable(vcpu(1)),
        "pending and active waits for the end"
    );
    board.cpu(1).end(6);
    board.sync(1);
    assert!(board.vgic.has_deliverable(vcpu(1)));
    board.cpu(1).acknowledge();
    board.cpu(1).end(6);
    board.sync(1);
    assert!(!board.vgic.has_deliverable(vcpu(1)));
    let _ = send(&board);
    assert!(board.vgic.has_deliverable(vcpu(1)), "in the mail");
    board.sync(1);
    board.cpu(1).acknowledge();
    board.cpu(1).end(6);
    board.sync(1);
    board.enable(0, 40);
    board.route(40, 1);
    let _ = board
        .vgic
        .set_spi_level(Spi::new(40).expect("SPI"), Level::High);
    assert!(
        board.vgic.has_deliverable(vcpu(1)),
        "an SPI before any sync"
    );
    assert!(!board.vgic.has_deliverable(V0), "which is not the other's");
}

#[test]
fn spis_go_where_they_are_routed() {
    let mut board = Board::new(4);
    for (intid, target) in [(32, 0), (64, 3), (159, 2)] {
        board.enable(0, intid);
        board.route(intid, target);
        board.line(intid, Level::High);
        for index in 0..4 {
            let expected = u64::from(index as u64 == target);
            assert_eq!(
                board.cpus[index].state(intid),
                expected,
                "{intid} on {index}"
            );
        }
    }
}

#[test]
fn a_route_to_nobody_holds_the_spi() {
    let mut board = Board::new(2);
    board.enable(0, 40);
    for route in [2, 0x100, 0x1_0000, 1 << 32] {
        board.route(40, route);
        board.line(40, Level::High);
        assert!(
            board.cpus.iter().all(|cpu| cpu.state(40) == 0),
            "{route:#x}"
        );
        assert_eq!(board.read_bit(0, 0x200, 40), 1);
        board.route(40, 1);
        assert_eq!(board.cpu(1).state(40), 1);
        board.line(40, Level::Low);
    }
}

#[test]
fn rerouting_hands_a_pending_spi_over() {
    for edge in [false, true] {
        let mut board = Board::new(2);
        if edge {
            board.edge(0, 40);
        }
        board.enable(0, 40);
        board.line(40, Level::High);
        assert_eq!(board.cpu(0).state(40), 1);
        board.route(40, 1);
        assert_eq!([0, 1].map(|index| board.cpus[index].state(40)), [0, 1]);
    }
}

#[test]
fn rerouting_leaves_an_active_spi_until_it_ends() {
    let mut board = Board::new(2);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    board.cpu(0).acknowledge();
    board.sync(0);
    board.route(40, 1);
    board.line(40, Level::Low);
    board.line(40, Level::High);
    assert_eq!(
        [0, 1].map(|index| board.cpus[index].state(40)),
        [2, 0],
        "pending, but active elsewhere"
    );
    board.cpu(0).end(40);
    board.sync(0);
    assert_eq!([0, 1].map(|index| board.cpus[index].state(40)), [0, 1]);
}

#[test]
fn the_end_of_a_rerouted_active_spi_is_told_when_it_is_pending_elsewhere() {
    let mut board = Board::new(2);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    board.cpu(0).acknowledge();
    board.route(40, 1);
    board.line(40, Level::Low);
    board.line(40, Level::High);
    assert!(
        board.cpu(0).end(40),
        "nothing else would bring vCPU 0 to hand it over"
    );
    board.sync(0);
    assert_eq!(board.cpu(1).state(40), 1);
}

#[test]
fn any_vcpu_means_the_lowest_awake() {
    let mut board = Board::new(3);
    board.enable(0, 40);
    board.route(40, 1 << 31 | 2);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), 1, "nobody awake: the first");
    let waker = |board: &mut Board, index: usize, value: u64| {
        let frame = Frame::Redistributor(vcpu(index));
        let kick = board
            .vgic
            .mmio_write(V0, frame, 0x14, AccessSize::Word, value);
        board.settle(kick);
    };
    waker(&mut board, 2, 0);
    assert_eq!(
        [0, 1, 2].map(|index| board.cpus[index].state(40)),
        [0, 0, 1]
    );
    waker(&mut board, 1, 0);
    assert_eq!(
        [0, 1, 2].map(|index| board.cpus[index].state(40)),
        [0, 1, 0]
    );
    waker(&mut board, 1, 2);
    assert_eq!(
        [0, 1, 2].map(|index| board.cpus[index].state(40)),
        [0, 0, 1]
    );
}

#[test]
fn withdrawing_empties_the_registers_and_loses_nothing() {
    let mut board = Board::new(2);
    board.edge(0, 40);
    for intid in [1, 27, 33, 40] {
        board.enable(0, intid);
    }
    board.priority(0, 33, 0x08);
    board.sgi(0, 1 << 24 | 1);
    board.line(40, Level::High);
    board.line(33, Level::High);
    board.raise(0, 27, Link::Hardware(27));
    for intid in [1, 27, 33, 40] {
        assert_eq!(board.cpu(0).state(intid), 1);
    }
    board.cpu(0).acknowledge();
    let kick = board.vgic.withdraw(V0, &mut board.cpus[0]);
    assert!(kick.is_none());
    assert_eq!(board.cpu(0).lrs, [0; 4]);
    assert_eq!(board.cpu(0).deactivated, [27], "the link is cut");
    assert!(board.vgic.needs_sync(V0));
    board.sync(0);
    let acknowledged = 1;
    assert_eq!(
        [1, 27, 33, 40].map(|intid| board.cpus[0].state(intid)),
        [2, 0, 1, 1],
        "{acknowledged} was active"
    );
}
