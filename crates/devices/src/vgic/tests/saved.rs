//! Saved and restored state.

use super::*;

/// A board with something of everything, withdrawn.
fn busy() -> Board {
    let mut board = Board::new(2);
    board.edge(0, 40);
    for intid in [40, 70] {
        board.enable(0, intid);
    }
    board.enable(1, 6);
    board.priority(0, 70, 0x48);
    board.priority(1, 6, 0x30);
    board.route(70, 1);
    board.line(40, Level::High);
    board.line(70, Level::High);
    board.cpu(0).acknowledge();
    board.sgi(0, 6 << 24 | 0b10);
    board.raise(0, 27, Link::Hardware(27));
    let waker = board
        .vgic
        .mmio_write(V0, Frame::Redistributor(vcpu(1)), 0x14, AccessSize::Word, 0);
    board.settle(waker);
    for index in 0..2 {
        let kick = board.vgic.withdraw(vcpu(index), &mut board.cpus[index]);
        assert!(kick.is_none());
    }
    board
}

#[test]
fn a_restored_controller_goes_on_where_the_saved_one_was() {
    let board = busy();
    let state = board.vgic.save();
    assert_eq!(state.shared[0].active, 1 << 8);
    assert_eq!(state.private[1].pending, 1 << 6);
    assert_eq!(
        state.private[0].pending, 0,
        "a hardware link does not travel"
    );
    assert_eq!(state.awake, 0b10);
    let mut other = Board::new(2);
    other.vgic.restore(&state).expect("fits");
    assert_eq!(other.vgic.save(), state);
    other.sync_all();
    assert_eq!(other.cpu(0).state(40), 2);
    assert_eq!(other.cpu(1).acknowledge(), Some(6), "priority 0x30");
    other.cpu(1).end(6);
    assert_eq!(other.cpu(1).acknowledge(), Some(70));
    for index in 0..2 {
        assert!(!other.vgic.needs_sync(vcpu(index)));
    }
    // What was in list registers when it was saved without withdrawing is there too, as the last sync saw it.
    other.sync_all();
    assert_eq!(other.vgic.save().shared[1].active, 1 << 6);
}

#[test]
fn what_is_still_listed_is_saved_as_the_last_sync_saw_it() {
    let mut board = Board::new(1);
    board.edge(0, 40);
    board.enable(0, 40);
    board.line(40, Level::High);
    assert_eq!(board.cpu(0).state(40), 1);
    assert_eq!(board.vgic.save().shared[0].pending, 1 << 8);
    board.cpu(0).acknowledge();
    board.sync(0);
    let state = board.vgic.save();
    assert_eq!(
        (state.shared[0].pending, state.shared[0].active),
        (0, 1 << 8)
    );
}

#[test]
fn a_mailed_sgi_is_saved() {
    let board = Board::new(2);
    let _ = board.vgic.sgi(V0, 3 << 24 | 0b10, SgiRegister::Group1);
    assert_eq!(board.vgic.save().private[1].pending, 1 << 3);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let board = busy();
    let before = board.vgic.save();
    let other = Vgic::new(3).save();
    let error = board.vgic.restore(&other).expect_err("three vCPUs");
    assert_eq!(error, RestoreError::Vcpus { saved: 3, have: 2 });
    assert!(std::format!("{error}").contains("3 vCPUs"));
    for cut in [
        |state: &mut VgicState| state.shared.truncate(3),
        |state: &mut VgicState| state.routes.push(0),
    ] {
        let mut state = before.clone();
        cut(&mut state);
        assert!(matches!(
            board.vgic.restore(&state),
            Err(RestoreError::Spis { have: 128, .. })
        ));
    }
    assert_eq!(board.vgic.save(), before);
}

#[test]
fn values_no_register_holds_are_cut() {
    let board = Board::new(1);
    let mut state = board.vgic.save();
    state.groups = u32::MAX;
    state.awake = u32::MAX;
    state.private[0].priority = [0xff; 32];
    state.private[0].edge = 0;
    state.routes[0] = u64::MAX;
    board.vgic.restore(&state).expect("fits");
    let state = board.vgic.save();
    assert_eq!((state.groups, state.awake), (3, 1));
    assert_eq!(state.private[0].priority, [0xf8; 32]);
    assert_eq!(state.private[0].edge, 0xffff, "SGIs");
    assert_eq!(state.routes[0], 0xff_80ff_ffff);
}
