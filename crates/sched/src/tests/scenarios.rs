//! What two CPUs can do to each other at a VM's vCPUs.

use super::world::*;
use crate::*;
use std::boxed::Box;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::SeqCst;
use std::vec;
use std::vec::Vec;
use tidemark_orders::Program;

/// One CPU runs its vCPUs, the other does `does`, and then runs its own.
fn beside(
    scripts: &'static [&'static [Act]],
    does: impl Fn(&World) + Send + Sync + Copy + 'static,
    conclude: impl FnMut(&World),
) {
    orders(
        || World::running(scripts),
        |world| {
            vec![
                Box::new(|| world.cpu()) as Program<'_>,
                Box::new(move || {
                    world.act(does);
                    world.cpu();
                }),
            ]
        },
        conclude,
    );
}

#[test]
fn an_interrupt_and_a_vcpu_that_blocks() {
    let mut ends = BTreeSet::new();
    beside(
        &[&[Act::Block]],
        |world| world.interrupt(0),
        |world| {
            ends.insert(std::format!("{:?}", world.run_state(0)));
        },
    );
    // It blocks if the interrupt came before.
    assert_eq!(ends.len(), 2, "{ends:?}");
}

#[test]
fn two_interrupts_and_a_vcpu_that_blocks_twice() {
    let twice = |world: &World| (0..2).for_each(|_| world.interrupt(0));
    // The second may come before the first was taken, and then it is one.
    let mut ends = BTreeSet::new();
    beside(&[&[Act::Block, Act::Block]], twice, |world| {
        ends.insert(std::format!("{:?}", world.run_state(0)));
    });
    assert_eq!(ends.len(), 2, "{ends:?}");
}

#[test]
fn a_pause_and_a_vcpu_that_runs() {
    beside(&[&[]], World::pause, |world| {
        assert_eq!(world.state(), State::Paused);
    });
}

#[test]
fn a_pause_and_a_vcpu_that_blocks() {
    beside(&[&[Act::Block]], World::pause, |world| {
        assert_eq!(world.state(), State::Paused);
    });
}

#[test]
fn a_pause_that_is_taken_back() {
    let does = |world: &World| {
        world.pause();
        world.resume();
    };
    beside(&[&[]], does, |world| {
        assert_eq!(world.state(), State::Running);
        assert_eq!(world.run_state(0), RunState::Running);
    });
}

#[test]
fn a_pause_that_is_taken_back_and_two_vcpus() {
    let does = |world: &World| {
        world.pause();
        world.resume();
    };
    beside(&[&[], &[]], does, |world| {
        assert_eq!(world.state(), State::Running);
        assert_eq!(world.run_state(0), RunState::Running);
        assert_eq!(world.run_state(1), RunState::Running);
    });
}

#[test]
fn a_paused_vm_and_an_interrupt_and_a_resume() {
    orders(
        || {
            let world = World::running(&[&[Act::Block]]);
            world.alone(0, || world.cpu());
            assert_eq!(world.run_state(0), RunState::Blocked);
            world.alone(1, || world.act(World::pause));
            world
        },
        |world| {
            vec![
                Box::new(|| world.act(|world| world.interrupt(0))) as Program<'_>,
                Box::new(|| {
                    world.act(World::resume);
                    world.cpu();
                }),
            ]
        },
        |world| assert_eq!(world.run_state(0), RunState::Running),
    );
}

#[test]
fn a_pause_beside_an_interrupt() {
    let does = |world: &World| {
        world.interrupt(0);
        world.pause();
        world.resume();
    };
    beside(&[&[Act::Block]], does, |world| {
        assert_eq!(world.state(), State::Running);
    });
}

#[test]
fn two_pauses_and_one_resume_at_a_time() {
    orders(
        || World::running(&[&[]]),
        |world| {
            vec![
                Box::new(|| {
                    world.cpu();
                    world.act(World::pause);
                    world.cpu();
                }) as Program<'_>,
                Box::new(|| {
                    world.act(World::pause);
                    world.act(World::resume);
                }),
            ]
        },
        |world| assert_ne!(world.state(), State::Starting),
    );
}

#[test]
fn a_reset_and_a_vcpu_that_runs() {
    let does = |world: &World| world.request(Transition::Reset);
    beside(&[&[], &[]], does, |world| {
        assert_eq!(world.state(), State::Running);
        assert_eq!(world.vm.starts.load(SeqCst), 2);
        assert_eq!(world.run_state(0), RunState::Running);
        assert_eq!(world.run_state(1), RunState::Off);
    });
}

#[test]
fn a_reset_by_the_guest_and_a_stop() {
    let does = |world: &World| world.request(Transition::Stop);
    beside(&[&[Act::Reset]], does, |world| {
        assert_eq!(world.state(), State::Stopped);
    });
}

#[test]
fn a_reset_by_the_guest_and_a_pause() {
    beside(&[&[Act::Reset]], World::pause, |world| {
        assert_eq!(
            world.state(),
            State::Paused,
            "a guest does not restart itself out of it"
        );
    });
}

/// One CPU is through with loading the VM, the other asks for `transition`.
fn a_load_that_ends_and(transition: Transition, conclude: impl FnMut(&World)) {
    orders(
        || {
            let world = World::new(&[&[]]);
            world.alone(0, || world.sched.start(world.vm)).unwrap();
            world
        },
        |world| {
            vec![
                Box::new(|| {
                    world.follow(world.sched.loaded(world.vm));
                    world.cpu();
                }) as Program<'_>,
                Box::new(move || {
                    world.act(|world| world.request(transition));
                    world.cpu();
                }),
            ]
        },
        conclude,
    );
}

#[test]
fn a_load_that_ends_and_a_stop() {
    a_load_that_ends_and(Transition::Stop, |world| {
        assert_eq!(world.state(), State::Stopped);
    });
}

#[test]
fn a_load_that_ends_and_a_reset() {
    a_load_that_ends_and(Transition::Reset, |world| {
        assert_eq!(world.state(), State::Running);
        assert_eq!(world.run_state(0), RunState::Running);
    });
}

#[test]
fn two_vcpus_turn_one_on() {
    orders(
        || World::partly_running(&[&[Act::TurnOn(2)], &[Act::TurnOn(2)], &[]], 2),
        |world| {
            vec![
                Box::new(|| world.cpu()) as Program<'_>,
                Box::new(|| world.cpu()),
            ]
        },
        |world| assert_eq!(world.vcpu(2).resets.load(SeqCst), 1),
    );
}

#[test]
fn a_vcpu_that_is_turned_on_beside_a_pause() {
    orders(
        || World::partly_running(&[&[Act::TurnOn(1)], &[]], 1),
        |world| {
            vec![
                Box::new(|| world.cpu()) as Program<'_>,
                Box::new(|| {
                    world.act(World::pause);
                    world.act(World::resume);
                    world.cpu();
                }),
            ]
        },
        |world| {
            assert_eq!(world.state(), State::Running);
            assert_eq!(world.run_state(1), RunState::Running);
        },
    );
}

#[test]
fn a_vcpu_turns_off_and_is_turned_on() {
    beside(&[&[Act::TurnOff], &[Act::TurnOn(0)]], |_| {}, |_| {});
}

#[test]
fn a_quota_that_is_lifted() {
    orders(
        || {
            let world = World::running(&[&[Act::Write]]);
            world.vcpu(0).exhausted.store(true, SeqCst);
            world
        },
        |world| {
            vec![
                Box::new(|| world.cpu()) as Program<'_>,
                Box::new(|| world.act(|world| world.lift(0))),
            ]
        },
        |world| assert_eq!(world.run_state(0), RunState::Running),
    );
}

#[test]
fn a_pause_and_a_vcpu_that_waits_for_its_quota() {
    orders(
        || {
            let world = World::running(&[&[Act::Write]]);
            world.vcpu(0).exhausted.store(true, SeqCst);
            world
        },
        |world| {
            vec![
                Box::new(|| world.cpu()) as Program<'_>,
                Box::new(|| {
                    world.act(World::pause);
                    world.act(|world| world.lift(0));
                    world.act(World::resume);
                }),
            ]
        },
        |world| assert_eq!(world.run_state(0), RunState::Running),
    );
}

#[test]
fn a_vcpu_that_wakes_and_one_that_keeps_its_cpu() {
    orders(
        || {
            // The third is at home where the first is.
            let world = World::running(&[&[], &[], &[Act::Block]]);
            world.settle();
            world.alone(0, || {
                world.act(|world| world.sched.call(0));
                world.cpu();
            });
            assert_eq!(world.run_state(2), RunState::Blocked);
            assert_eq!(world.run_state(0), RunState::Running);
            world
        },
        |world| {
            vec![
                Box::new(|| world.cpu()) as Program<'_>,
                Box::new(|| {
                    world.act(|world| world.interrupt(2));
                    world.cpu();
                }),
            ]
        },
        |world| assert_eq!(world.vcpu(2).entries.load(SeqCst), 2, "it got no turn"),
    );
}

#[test]
fn an_interrupt_and_a_vcpu_that_runs() {
    beside(
        &[&[]],
        |world| world.interrupt(0),
        |world| assert_eq!(world.run_state(0), RunState::Running),
    );
}

#[test]
fn a_resume_beside_a_stronger_transition() {
    for (transition, end) in [
        (Transition::Reset, State::Running),
        (Transition::Stop, State::Stopped),
    ] {
        let does = move |world: &World| {
            world.pause();
            world.request(transition);
            world.resume();
        };
        beside(&[&[], &[]], does, |world| {
            assert_eq!(world.state(), end, "{transition:?}");
            let starts = 1 + u64::from(transition == Transition::Reset);
            assert_eq!(world.vm.starts.load(SeqCst), starts);
        });
    }
}

#[test]
fn two_reasons_to_look_at_once() {
    let call_and_pause = |world: &World| {
        world.sched.call(0);
        world.pause();
    };
    beside(&[&[]], call_and_pause, |world| {
        assert_eq!(world.state(), State::Paused);
    });
    let call_and_interrupt = |world: &World| {
        world.sched.call(0);
        world.interrupt(0);
    };
    beside(&[&[]], call_and_interrupt, |_| {});
}

#[test]
fn a_pace_that_begins_and_ends() {
    let does = |world: &World| {
        world.vcpu(0).paced.store(true, SeqCst);
        world.sched.ask_again(world.vcpu(0));
        world.lift(0);
    };
    beside(&[&[]], does, |world| {
        assert_eq!(world.run_state(0), RunState::Running);
    });
}

#[test]
fn a_pace_that_begins() {
    let does = |world: &World| {
        world.vcpu(0).paced.store(true, SeqCst);
        world.sched.ask_again(world.vcpu(0));
    };
    beside(&[&[]], does, |world| {
        assert_eq!(world.run_state(0), RunState::Stalled);
    });
}

/// Each run state that a vCPU can be in when a transition is asked for, and each transition. The third is at home where the first
/// is, and waits for it; where the VM is paused before, all of them are.
#[test]
fn each_run_state_by_each_transition() {
    let scripts: [&'static [Act]; 4] = [&[], &[Act::Block], &[Act::TurnOff], &[Act::Write]];
    for script in scripts {
        for transition in [
            Transition::Pause,
            Transition::Reset,
            Transition::Stop,
            Transition::Fail,
        ] {
            for (stalls, paused) in [(false, false), (true, false), (false, true)] {
                let mut states: Vec<State> = Vec::new();
                orders(
                    || {
                        let scripts: &[&[Act]] = &[script, &[Act::Write], &[]];
                        let world = World::running(scripts);
                        if paused {
                            world.alone(1, || world.act(World::pause));
                        }
                        world.vcpu(0).exhausted.store(stalls, SeqCst);
                        world
                    },
                    |world| {
                        vec![
                            Box::new(|| world.cpu()) as Program<'_>,
                            Box::new(move || {
                                world.act(|world| world.request(transition));
                                world.cpu();
                            }),
                        ]
                    },
                    |world| {
                        if !states.contains(&world.state()) {
                            states.push(world.state());
                        }
                    },
                );
                let end = match transition {
                    Transition::Reset if paused => State::Paused,
                    Transition::Pause => State::Paused,
                    Transition::Reset => State::Running,
                    Transition::Stop => State::Stopped,
                    Transition::Fail => State::Failed,
                };
                assert_eq!(states, [end], "{script:?}, {transition:?}");
            }
        }
    }
}
