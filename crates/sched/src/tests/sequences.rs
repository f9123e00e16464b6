//! One CPU alone: what each call answers in each state.

use super::world::*;
use crate::*;
use std::string::ToString;
use std::sync::atomic::Ordering::SeqCst;

fn status(world: &World) -> Status {
    world.vm.lifecycle().status().clone()
}

#[test]
fn a_vm_without_a_run_can_only_be_started() {
    let world = World::new(&[&[]]);
    world.alone(0, || {
        assert_eq!(
            world.sched.pause(world.vm, Hold::Lasting),
            Err(State::Stopped)
        );
        assert_eq!(
            world.sched.resume(world.vm, Hold::Lasting),
            Err(State::Stopped)
        );
        assert_eq!(
            world.sched.request(world.vm, Transition::Stop, ""),
            Err(State::Stopped)
        );
        assert_eq!(world.sched.start(world.vm), Ok(()));
        assert_eq!(world.sched.start(world.vm), Err(State::Starting));
    });
}

#[test]
fn a_load_that_fails_leaves_the_reason_and_can_be_tried_again() {
    let world = World::new(&[&[]]);
    world.alone(0, || {
        world.sched.start(world.vm).unwrap();
        world.sched.failed(world.vm, "no memory".to_string());
        assert_eq!(status(&world).state, State::Failed);
        assert_eq!(status(&world).reason, "no memory");
        world.sched.start(world.vm).unwrap();
        assert_eq!(status(&world).reason, "");
    });
}

#[test]
fn the_stronger_transition_stays_with_its_reason() {
    let world = World::running(&[&[]]);
    world.alone(0, || world.cpu());
    world.alone(1, || {
        let ask = |transition, reason| world.sched.request(world.vm, transition, reason);
        assert_eq!(ask(Transition::Stop, "first"), Ok(None));
        assert_eq!(ask(Transition::Reset, "weaker"), Ok(None));
        assert_eq!(ask(Transition::Stop, "again"), Ok(None));
    });
    assert_eq!(status(&world).pending, Some(Transition::Stop));
    world.settle();
    assert_eq!(status(&world).state, State::Stopped);
    assert_eq!(status(&world).reason, "first");
}

#[test]
fn each_hold_is_given_back_by_its_owner() {
    let world = World::running(&[&[]]);
    world.alone(1, || {
        assert_eq!(
            world.sched.pause(world.vm, Hold::Lasting),
            Ok(Some(Completed::Paused))
        );
        assert_eq!(world.sched.pause(world.vm, Hold::Session), Ok(None));
        assert_eq!(world.sched.resume(world.vm, Hold::Lasting), Ok(false));
        assert_eq!(status(&world).state, State::Paused);
        assert_eq!(world.sched.resume(world.vm, Hold::Session), Ok(true));
        assert_eq!(status(&world).state, State::Running);
    });
    world.settle();
    assert_eq!(world.run_state(0), RunState::Running);
}

#[test]
fn a_vm_paused_while_it_starts_is_paused_when_it_is_loaded() {
    let world = World::new(&[&[]]);
    world.alone(0, || {
        world.sched.start(world.vm).unwrap();
        assert_eq!(world.sched.pause(world.vm, Hold::Lasting), Ok(None));
        assert_eq!(world.sched.loaded(world.vm), Some(Completed::Paused));
    });
    world.settle();
    assert_eq!(status(&world).state, State::Paused);
}

#[test]
fn a_restart_keeps_the_pause_and_counts() {
    let world = World::running(&[&[]]);
    world.alone(1, || {
        world.pause();
        assert_eq!(
            world.sched.request(world.vm, Transition::Reset, ""),
            Ok(Some(Completed::Reset))
        );
        assert_eq!(world.sched.loaded(world.vm), Some(Completed::Paused));
    });
    world.settle();
    let status = status(&world);
    assert_eq!((status.state, status.restarts), (State::Paused, 1));
}

#[test]
fn a_vcpu_that_was_turned_on_is_starting_until_it_runs() {
    let world = World::running(&[&[], &[]]);
    assert_eq!(world.run_state(1), RunState::Starting);
    world.settle();
    assert_eq!(world.run_state(1), RunState::Running);
}

#[test]
fn vcpus_of_one_cpu_take_turns() {
    let world = World::running(&[&[], &[], &[]]);
    world.settle();
    assert_eq!(world.run_state(0), RunState::Running);
    assert_eq!(world.run_state(2), RunState::Starting);
    // A tick: the one that runs has had its time.
    world.alone(0, || {
        world.act(|world| world.sched.call(0));
        world.cpu();
    });
    assert_eq!(world.run_state(0), RunState::Queued);
    assert_eq!(world.run_state(2), RunState::Running);
}

#[test]
fn a_resume_lets_all_vcpus_go_on() {
    let world = World::running(&[&[], &[]]);
    world.settle();
    world.alone(0, || world.act(World::pause));
    world.settle();
    for index in 0..2 {
        assert_eq!(world.run_state(index), RunState::Paused);
    }
    world.alone(0, || world.act(World::resume));
    world.settle();
    for index in 0..2 {
        assert_eq!(world.run_state(index), RunState::Running);
    }
}

#[test]
fn two_holders_are_counted_apart() {
    let mut holds = Holds::default();
    assert!(!holds.any());
    holds.take(Hold::Lasting);
    holds.take(Hold::Session);
    holds.take(Hold::Session);
    assert!(holds.has(Hold::Session));
    holds.give_back(Hold::Session);
    assert!(!holds.has(Hold::Session));
    assert!(holds.any(), "the lasting one is still there");
    holds.give_back(Hold::Session);
    assert!(holds.any());
    holds.give_back(Hold::Lasting);
    assert!(!holds.any());
}

#[test]
fn a_resume_counts_and_wakes_those_whose_timers_are_stale() {
    let world = World::running(&[&[Act::Block], &[Act::Block]]);
    world.settle();
    world.vcpu(0).stale.store(true, SeqCst);
    let before = status(&world).pauses;
    world.alone(0, || world.act(World::pause));
    world.alone(0, || world.act(World::resume));
    assert_eq!(status(&world).pauses, before + 1);
    assert_eq!(world.run_state(0), RunState::Queued);
    assert_eq!(world.run_state(1), RunState::Blocked);
}

#[test]
fn a_start_forgets_holds_and_a_failure_what_was_asked_for() {
    let world = World::running(&[&[]]);
    world.alone(1, || {
        world.pause();
        world.request(Transition::Stop);
        world.sched.start(world.vm).unwrap();
    });
    assert!(!status(&world).holds.any());
    world.alone(1, || {
        let asked = world.sched.request(world.vm, Transition::Reset, "");
        assert_eq!(asked, Ok(None), "it is not loaded yet");
        world.sched.failed(world.vm, "no".to_string());
    });
    assert_eq!(status(&world).pending, None);
}
