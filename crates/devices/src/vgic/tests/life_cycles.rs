//! The way of one interrupt, from its source through a list register to its end.

use super::*;

const NONE: u64 = 0;
const P: u64 = 1;
const A: u64 = 2;
const PA: u64 = 3;

#[test]
fn an_edge_is_delivered_once() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    let lr = board.cpu(0).holding(40).expect("listed");
    assert_eq!(
        lr & (HARDWARE | EOI),
        0,
        "nobody need know when an edge ends"
    );
    assert_eq!(lr >> 60 & 1, 1, "group 1");
    assert_eq!(board.cpu(0).acknowledge(), Some(40));
    assert!(!board.cpu(0).end(40));
    board.sync(0);
    assert_eq!(
        board.cpu(0).state(40),
        NONE,
        "the line is still high, but it was an edge"
    );
    board.line(40, Level::Low);
    assert_eq!(board.cpu(0).state(40), NONE);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), P, "the next edge");
}

#[test]
fn an_edge_while_active_is_pending_and_active() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).acknowledge(), Some(40));
    board.line(40, Level::Low);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), PA);
    board.cpu(0).end(40);
    assert_eq!(
        board.cpu(0).acknowledge(),
        Some(40),
        "without a sync in between"
    );
    board.cpu(0).end(40);
    board.sync(0);
    assert_eq!(board.cpu(0).acknowledge(), None);
}

#[test]
fn an_edge_after_the_end_but_before_a_sync_is_not_lost() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    board.cpu(0).acknowledge();
    board.cpu(0).end(40);
    board.line(40, Level::Low);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), P);
}

#[test]
fn a_level_comes_again_as_long_as_its_line_is_high() {
    let mut board = Board::new(1);
    board.enable(0, 33);
    board.line(33, Level::High);
    assert_ne!(
        board.cpu(0).holding(33).expect("listed") & EOI,
        0,
        "its end must be told"
    );
    for _ in 0..3 {
        assert_eq!(board.cpu(0).acknowledge(), Some(33));
        board.sync(0);
        assert_eq!(board.cpu(0).state(33), A, "not pending beside active");
        assert!(board.cpu(0).end(33), "maintenance interrupt");
        board.sync(0);
        assert_eq!(board.cpu(0).state(33), P);
    }
    board.cpu(0).acknowledge();
    board.line(33, Level::Low);
    assert_eq!(board.cpu(0).state(33), A);
    board.cpu(0).end(33);
    board.sync(0);
    assert_eq!(board.cpu(0).state(33), NONE);
    assert_eq!(
        board.cpu(0).lrs,
        [0; 4],
        "the finished register is overwritten, so maintenance ends"
    );
}

#[test]
fn a_level_that_falls_before_it_is_taken_is_pulled_back() {
    let mut board = Board::new(1);
    board.enable(0, 33);
    board.line(33, Level::High);
    assert_eq!(board.cpu(0).state(33), P);
    assert!(board.vgic.has_deliverable(V0));
    board.line(33, Level::Low);
    assert_eq!(board.cpu(0).state(33), NONE);
    assert!(!board.vgic.has_deliverable(V0));
    assert_eq!(board.read_bit(0, 0x200, 33), 0);
}

#[test]
fn a_level_made_pending_by_hand_stays_without_its_line() {
    let mut board = Board::new(1);
    board.enable(0, 33);
    board.bit(0, 0x200, 33);
    assert_eq!(board.cpu(0).state(33), P);
    board.line(33, Level::High);
    board.line(33, Level::Low);
    assert_eq!(board.cpu(0).state(33), P, "ISPENDR holds it");
    assert_eq!(board.cpu(0).acknowledge(), Some(33));
    board.cpu(0).end(33);
    board.sync(0);
    assert_eq!(board.cpu(0).state(33), NONE, "taken, so gone");
    // Cleared by hand it goes, unless the line holds it.
    board.bit(0, 0x200, 33);
    board.bit(0, 0x280, 33);
    assert_eq!(board.cpu(0).state(33), NONE);
    board.line(33, Level::High);
    board.bit(0, 0x280, 33);
    assert_eq!(board.cpu(0).state(33), P);
}

#[test]
fn disabling_pulls_a_pending_one_back_and_enabling_brings_it_again() {
    for intid in [3, 20, 40] {
        let mut board = Board::new(1);
        if intid > 16 {
            board.edge(0, intid);
        }
        board.enable(0, intid);
        board.bit(0, 0x200, intid);
        assert_eq!(board.cpu(0).state(intid), P);
        board.disable(0, intid);
        assert_eq!(board.cpu(0).state(intid), NONE);
        assert_eq!(board.read_bit(0, 0x200, intid), 1, "still pending");
        assert!(!board.vgic.has_deliverable(V0));
        board.enable(0, intid);
        assert_eq!(board.cpu(0).acknowledge(), Some(intid));
        board.cpu(0).end(intid);
        board.sync(0);
        assert_eq!(board.cpu(0).state(intid), NONE, "once, not twice");
        assert_eq!(board.read_bit(0, 0x200, intid), 0);
    }
}

#[test]
fn disabling_leaves_an_active_one_to_the_guest() {
    let mut board = Board::new(1);
    board.enable(0, 40);
    board.edge(0, 40);
    board.line(40, Level::High);
    board.cpu(0).acknowledge();
    board.line(40, Level::Low);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), PA);
    board.disable(0, 40);
    assert_eq!(board.cpu(0).state(40), A);
    assert_eq!(board.read_bit(0, 0x200, 40), 1);
    board.cpu(0).end(40);
    board.sync(0);
    assert_eq!(board.cpu(0).state(40), NONE);
    board.enable(0, 40);
    assert_eq!(board.cpu(0).state(40), P);
}

#[test]
fn group_enables_gate_delivery() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.gicd(0, 1);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), NONE, "group 1 is off");
    board.gicd(0, 2);
    assert_eq!(board.cpu(0).state(40), P);
    board.gicd(0, 0);
    assert_eq!(board.cpu(0).state(40), NONE);
    board.gicd(0x84, 0);
    board.gicd(0, 1);
    let lr = board
        .cpu(0)
        .holding(40)
        .expect("in group 0 now, which is on");
    assert_eq!(lr >> 60 & 1, 0);
}

#[test]
fn a_hardware_linked_timer_goes_round() {
    let mut board = Board::new(1);
    board.enable(0, 27);
    for _ in 0..3 {
        board.raise(0, 27, Link::Hardware(27));
        let lr = board.cpu(0).holding(27).expect("listed");
        assert_ne!(lr & HARDWARE, 0);
        assert_eq!(lr >> 32 & 0x1fff, 27, "pINTID, no EOI bit in it");
        assert_eq!(board.cpu(0).acknowledge(), Some(27));
        assert!(!board.cpu(0).end(27));
        // The deactivated timer fires again before anybody synced.
    }
    assert_eq!(board.cpu(0).ended, [27, 27, 27]);
    assert_eq!(board.cpu(0).deactivated, []);
    board.sync(0);
    assert_eq!(board.cpu(0).state(27), NONE);
}

#[test]
fn a_disabled_hardware_linked_timer_waits_and_keeps_its_link() {
    let mut board = Board::new(1);
    board.raise(0, 27, Link::Hardware(30));
    assert_eq!(board.cpu(0).state(27), NONE);
    assert_eq!(board.read_bit(0, 0x200, 27), 1);
    board.enable(0, 27);
    board.disable(0, 27);
    assert_eq!(board.cpu(0).state(27), NONE);
    board.enable(0, 27);
    let lr = board.cpu(0).holding(27).expect("listed");
    assert_eq!((lr & HARDWARE, lr >> 32 & 0x1fff), (HARDWARE, 30));
    assert_eq!(
        board.cpu(0).deactivated,
        [],
        "the physical one is the guest's all the while"
    );
}

#[test]
fn a_hardware_linked_interrupt_is_pending_as_long_as_its_line_is_high() {
    // Not listed: disabled. Nobody tells of the line.
    let mut board = Board::new(1);
    board.raise(0, 27, Link::Hardware(27));
    board.bit(0, 0x280, 27);
    board.sync(0);
    assert_eq!(
        board.read_bit(0, 0x200, 27),
        1,
        "ICPENDR takes nothing of a line's"
    );
    assert_eq!(board.cpu(0).deactivated, []);
    board.cpu(0).line = Level::Low;
    let refresh = GICR_SGI + 0x200;
    let kick = board.vgic.refresh(Frame::Redistributor(V0), refresh);
    assert_eq!(kick, Kick::one(V0), "only a sync tells");
    board.settle(kick);
    assert_eq!(board.read_bit(0, 0x200, 27), 0);
    assert_eq!(board.cpu(0).deactivated, [27], "so that it comes again");
    // Nobody looked before it is enabled.
    board.raise(0, 27, Link::Hardware(27));
    board.cpu(0).line = Level::Low;
    board.enable(0, 27);
    assert_eq!(board.cpu(0).state(27), NONE);
    assert!(!board.vgic.has_deliverable(V0));
    assert_eq!(board.cpu(0).deactivated, [27, 27]);
    // Listed and pending.
    board.raise(0, 27, Link::Hardware(27));
    assert_eq!(board.cpu(0).state(27), P);
    board.cpu(0).line = Level::Low;
    board.sync(0);
    assert_eq!(board.cpu(0).state(27), NONE);
    assert_eq!(board.cpu(0).deactivated, [27; 3]);
    // Active: pending beside it while the line is high.
    board.raise(0, 27, Link::Hardware(27));
    board.cpu(0).acknowledge();
    let both = |board: &mut Board| {
        let kick = board.vgic.refresh(Frame::Redistributor(V0), refresh);
        board.settle(kick);
        (board.read_bit(0, 0x200, 27), board.read_bit(0, 0x300, 27))
    };
    assert_eq!(both(&mut board), (1, 1));
    board.cpu(0).line = Level::Low;
    assert_eq!(both(&mut board), (0, 1));
    assert_eq!(board.cpu(0).state(27), A);
    // A kernel that takes over from a crashed one clears it so.
    board.bit(0, 0x380, 27);
    assert_eq!(board.cpu(0).state(27), NONE);
    assert_eq!(board.cpu(0).deactivated, [27; 4]);
    assert_eq!(board.read_bit(0, 0x300, 27), 0);
    // And it still works.
    board.raise(0, 27, Link::Hardware(27));
    assert_eq!(board.cpu(0).acknowledge(), Some(27));
}

#[test]
fn a_latch_beside_a_hardware_link_outlives_the_line() {
    let mut board = Board::new(1);
    board.bit(0, 0x200, 27);
    board.raise(0, 27, Link::Hardware(27));
    board.enable(0, 27);
    let lr = board.cpu(0).holding(27).expect("listed");
    assert_eq!(lr & HARDWARE, HARDWARE);
    board.cpu(0).line = Level::Low;
    board.sync(0);
    let lr = board.cpu(0).holding(27).expect("still pending by hand");
    assert_eq!((lr & HARDWARE, lr & EOI), (0, EOI));
    assert_eq!(board.cpu(0).deactivated, [27]);
    assert_eq!(board.cpu(0).acknowledge(), Some(27));
    board.cpu(0).end(27);
    board.sync(0);
    assert_eq!(board.cpu(0).state(27), NONE);
    // By hand while a linked one is active: the link is cut, as the hardware cannot show both.
    board.raise(0, 27, Link::Hardware(27));
    board.cpu(0).acknowledge();
    board.bit(0, 0x200, 27);
    assert_eq!(board.cpu(0).state(27), PA);
    assert_eq!(board.cpu(0).deactivated, [27, 27]);
}

#[test]
fn a_software_ppi_is_a_level() {
    let mut board = Board::new(2);
    board.enable(1, 30);
    board.raise(1, 30, Link::Software);
    assert_eq!(board.cpu(0).state(30), NONE, "private");
    assert_eq!(board.cpu(1).acknowledge(), Some(30));
    assert!(board.cpu(1).end(30));
    board.sync(1);
    assert_eq!(board.cpu(1).state(30), P, "the line is high");
    board.lower(1, 30);
    assert_eq!(board.cpu(1).state(30), NONE);
}

#[test]
fn clearing_active_ends_a_software_interrupt() {
    let mut board = Board::new(1);
    board.enable(0, 33);
    board.line(33, Level::High);
    board.cpu(0).acknowledge();
    board.sync(0);
    assert_eq!(board.read_bit(0, 0x300, 33), 1);
    board.bit(0, 0x380, 33);
    assert_eq!(board.cpu(0).state(33), P, "the level is still there");
    assert_eq!(board.read_bit(0, 0x300, 33), 0);
}

#[test]
fn an_interrupt_made_active_by_hand_can_be_ended_and_is_not_delivered_before() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.bit(0, 0x300, 40);
    assert_eq!(board.cpu(0).state(40), A, "where the guest's end finds it");
    board.line(40, Level::High);
    assert_eq!(
        board.cpu(0).acknowledge(),
        None,
        "an active one is not delivered"
    );
    board.cpu(0).end(40);
    board.sync(0);
    assert_eq!(board.cpu(0).acknowledge(), Some(40));
}

#[test]
fn reading_state_in_list_registers_asks_for_a_sync() {
    let mut board = Board::new(2);
    board.edge(0, 40);
    board.enable(0, 40);
    board.route(40, 1);
    board.line(40, Level::High);
    board.cpu(1).acknowledge();
    board.sync(1);
    board.cpu(1).end(40);
    assert_eq!(board.read_bit(0, 0x300, 40), 1, "what the last sync saw");
    assert!(
        board.vgic.needs_sync(vcpu(1)),
        "but the next read will be right"
    );
    board.sync(1);
    assert_eq!(board.read_bit(0, 0x300, 40), 0);
    assert!(
        !board.vgic.needs_sync(vcpu(1)),
        "and nothing more is asked for"
    );
    // The same at once.
    board.line(40, Level::Low);
    board.line(40, Level::High);
    board.cpu(1).acknowledge();
    let kick = board.vgic.refresh(Frame::Distributor, 0x304);
    assert_eq!(kick, Kick::one(vcpu(1)));
    board.settle(kick);
    assert_eq!(
        (board.read_bit(0, 0x300, 40), board.read_bit(0, 0x200, 40)),
        (1, 0)
    );
    assert!(board.vgic.refresh(Frame::Distributor, 0x104).is_none());
    assert!(board.vgic.refresh(Frame::Distributor, 0x308).is_none());
    assert!(
        board
            .vgic
            .refresh(Frame::Redistributor(V0), GICR_SGI + 0x300)
            .is_none()
    );
}

#[test]
fn an_edge_made_level_while_active_comes_again_at_its_end() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    board.cpu(0).acknowledge();
    board.gicd(0xc08, 0);
    assert!(board.cpu(0).end(40), "now its end is of interest");
    board.sync(0);
    assert_eq!(board.cpu(0).state(40), P);
}

#[test]
fn of_two_writes_before_a_sync_the_later_counts() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    board.cpu(0).acknowledge();
    board.sync(0);
    let mut write_both = |first: u64, second: u64| {
        for base in [first, second] {
            let frame = Frame::Distributor;
            let _ = board
                .vgic
                .mmio_write(V0, frame, base + 4u64, AccessSize::Word, 1 << 8);
        }
        board.sync(0);
        board.cpus[0].state(40)
    };
    assert_eq!(write_both(0x380, 0x300), A, "inactive, then active");
    assert_eq!(write_both(0x200, 0x280), A, "pending, then not");
    assert_eq!(write_both(0x280, 0x200), PA, "not pending, then pending");
    assert_eq!(write_both(0x300, 0x380), P, "active, then inactive");
    assert_eq!(write_both(0x180, 0x100), P, "disabled, then enabled");
}

/// What described an interrupt in an earlier list register says nothing about it in the next one.
mod earlier_lives {
    use super::*;

    /// A board with PPI 20 enabled, which has been through a list register as an edge.
    fn after_an_edge() -> Board {
        let mut board = Board::new(1);
        board.enable(0, 20);
        board.edge(0, 20);
        board.raise(0, 20, Link::Software);
        board.lower(0, 20);
        assert_eq!(board.cpu(0).acknowledge(), Some(20));
        board.cpu(0).end(20);
        board.sync(0);
        board
    }

    #[test]
    fn an_ended_level_ppi_leaves_no_maintenance_behind() {
        let mut board = Board::new(1);
        board.enable(0, 20);
        board.raise(0, 20, Link::Software);
        board.cpu(0).acknowledge();
        board.lower(0, 20);
        assert!(board.cpu(0).end(20));
        board.sync(0);
        assert_eq!(board.cpu(0).lrs, [0; 4]);
    }

    #[test]
    fn an_sgi_that_was_active_is_not_when_it_comes_again() {
        let mut board = Board::new(1);
        board.enable(0, 1);
        board.sgi(0, 1 << 24 | 1);
        board.cpu(0).acknowledge();
        board.sync(0);
        assert_eq!(board.read_bit(0, 0x300, 1), 1);
        board.cpu(0).end(1);
        board.sgi(0, 1 << 24 | 1);
        assert_eq!(
            (board.read_bit(0, 0x300, 1), board.read_bit(0, 0x200, 1)),
            (0, 1)
        );
    }

    #[test]
    fn an_end_told_once_is_not_told_for_good() {
        let mut board = Board::new(1);
        board.enable(0, 20);
        board.raise(0, 20, Link::Software);
        board.cpu(0).acknowledge();
        board.lower(0, 20);
        assert!(board.cpu(0).end(20));
        board.sync(0);
        board.edge(0, 20);
        board.raise(0, 20, Link::Software);
        board.cpu(0).acknowledge();
        board.gicr(0, 0xc04, 0);
        assert!(board.cpu(0).end(20), "a level again, and its line is high");
        board.sync(0);
        assert_eq!(board.cpu(0).state(20), P);
    }

    #[test]
    fn a_deactivation_too_late_does_not_hit_the_next() {
        let mut board = Board::new(1);
        board.enable(0, 1);
        board.sgi(0, 1 << 24 | 1);
        board.cpu(0).acknowledge();
        board.sync(0);
        let frame = Frame::Redistributor(V0);
        let clear = GICR_SGI + 0x380;
        let _ = board.vgic.mmio_write(V0, frame, clear, AccessSize::Word, 2);
        board.cpu(0).end(1);
        board.sgi(0, 1 << 24 | 1);
        board.cpu(0).acknowledge();
        board.sync(0);
        assert_eq!(board.cpu(0).state(1), A);
        assert_eq!(board.read_bit(0, 0x300, 1), 1);
    }

    #[test]
    fn nor_that_of_an_spi() {
        let mut board = Board::new(1);
        board.edge(0, 40);
        board.enable(0, 40);
        board.line(40, Level::High);
        board.cpu(0).acknowledge();
        board.sync(0);
        let _ = board
            .vgic
            .mmio_write(V0, Frame::Distributor, 0x384, AccessSize::Word, 1 << 8);
        board.cpu(0).end(40);
        board.line(40, Level::Low);
        board.line(40, Level::High);
        board.cpu(0).acknowledge();
        board.sync(0);
        assert_eq!(board.cpu(0).state(40), A);
    }

    #[test]
    fn a_level_after_an_edge_is_held_by_its_line_alone() {
        let mut board = after_an_edge();
        board.gicr(0, 0xc04, 0);
        board.raise(0, 20, Link::Software);
        assert_eq!(board.cpu(0).state(20), P);
        board.lower(0, 20);
        assert_eq!(board.cpu(0).state(20), NONE);
    }

    #[test]
    fn a_hardware_link_ends_with_its_list_register() {
        let mut board = Board::new(1);
        board.enable(0, 27);
        board.raise(0, 27, Link::Hardware(27));
        board.cpu(0).acknowledge();
        board.cpu(0).end(27);
        board.sync(0);
        // Listed again by hand, without a link.
        board.cpu(0).line = Level::Low;
        board.bit(0, 0x200, 27);
        board.sync(0);
        assert_eq!(
            board.cpu(0).state(27),
            P,
            "a line that falls takes nothing of ISPENDR's"
        );
        assert_eq!(board.cpu(0).holding(27).map(|lr| lr & HARDWARE), Some(0));
        board.raise(0, 27, Link::Hardware(27));
        assert_eq!(board.cpu(0).acknowledge(), Some(27));
        board.cpu(0).end(27);
        board.sync(0);
        assert_eq!(board.cpu(0).acknowledge(), Some(27));
        board.cpu(0).end(27);
        board.cpu(0).line = Level::Low;
        board.sync(0);
        // Pending by hand and not listed.
        board.disable(0, 27);
        board.bit(0, 0x200, 27);
        board.sync(0);
        assert_eq!(board.read_bit(0, 0x200, 27), 1);
        assert_eq!(board.cpu(0).deactivated, []);
    }
}
