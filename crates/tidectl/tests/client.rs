//! The client against a fake target, over good lines and bad ones.

#[path = "support/fake.rs"]
mod fake;

use fake::line::{Faults, connect};
use fake::vm::{Slot, Vm};
use fake::{Lie, Target, lock, temp_dir};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tidectl::Error;
use tidectl::client::{Client, Ending, Options, Output};
use tidectl::copy::{self, After, Phase, Plan, Round, Step, Verify};
use tidectl::image::{Contents, MemoryFile};
use tidectl::link::{Link, Pace};
use tidemark_wire::frame::Session;
use tidemark_wire::message::{
    ConsoleFrom, EngineChoice, ErrorReply, Granularity, Hold, SlotAccess, SlotId, VmId, VmState,
};

const VM: VmId = VmId(0);

fn small() -> Vm {
    let slots = vec![
        Slot::new(0, 0, 5, SlotAccess::ReadOnly),
        Slot::new(1, 0x4000_0000, 1000, SlotAccess::ReadWrite),
        Slot::new(2, 0x8000_0000, 65, SlotAccess::ReadWrite),
    ];
    Vm::new("small", slots)
}

fn options() -> Options {
    Options {
        timeout: Duration::from_secs(5),
        retry: Duration::from_millis(15),
        ..Options::for_pace(Pace::Socket)
    }
}

fn open(target: &Arc<Mutex<Target>>, faults: Faults) -> Client {
    open_with(target, faults, options()).expect("a session")
}

fn open_with(
    target: &Arc<Mutex<Target>>,
    faults: Faults,
    options: Options,
) -> tidectl::Result<Client> {
    let link = Link::from_unix(connect(target, faults)).expect("a socket");
    Client::open(link, options)
}

fn bad_line(seed: u64) -> Faults {
    Faults {
        seed,
        drop: 5,
        flip: 5,
        cut: 3,
        double: 5,
        text: 5,
        ..Faults::default()
    }
}

fn start(client: &mut Client) {
    let (engine, granularity) = (EngineChoice::Auto, Granularity::Page);
    client
        .start_log(VM, engine, granularity, Hold::Lasting, &mut |_, _| {})
        .expect("a log");
}

fn plan(name: &str) -> Plan {
    Plan {
        image_dir: temp_dir(name),
        rounds: 4,
        enough_pages: 0,
        interval: Duration::ZERO,
        contents: Contents::Channel,
        engine: EngineChoice::Auto,
        granularity: Granularity::Page,
        verify: Verify::Running,
        after: After::AsBefore,
    }
}

fn code<T>(result: tidectl::Result<T>) -> (u8, &'static str) {
    match result {
        Ok(_) => (0, "ok"),
        Err(error) => (error.exit_code(), error.code()),
    }
}

#[test]
fn vms_are_found_by_name_and_by_id() {
    let target = Target::new(vec![small(), Vm::new("7up", vec![])]);
    let mut client = open(&target, Faults::default());
    assert_eq!(client.image(), "fake 1");
    assert_eq!(client.list().expect("a list").len(), 2);
    assert_eq!(client.find("7up").expect("it is there").id, VmId(1));
    assert_eq!(client.find("0").expect("it is there").name, "small");
    let Err(Error::NoSuchVm { known, .. }) = client.find("nobody") else {
        panic!("found nobody")
    };
    assert_eq!(known, ["small", "7up"]);
    assert_eq!(code(client.find("2")), (5, "no-such-vm"));
    assert_eq!(code(client.info(VmId(9))), (5, "no-such-vm"));
    assert_eq!(client.info(VM).expect("it is there").slots.len(), 3);
}

#[test]
fn lifecycle() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    assert_eq!(
        code(client.hash(VM, SlotId(1), &mut |_, _| {})),
        (5, "not-paused")
    );
    client.pause(VM, Hold::Lasting).expect("it pauses");
    client.pause(VM, Hold::Lasting).expect("it is paused");
    assert_eq!(
        client.resume(VM, Hold::Lasting).expect("it runs"),
        VmState::Running
    );
    client.reset(VM).expect("it resets");
    assert_eq!(lock(&target).vms[0].restarts, 1);
    assert_eq!(client.stop(VM).expect("it stops"), VmState::Stopped);
    assert_eq!(code(client.pause(VM, Hold::Lasting)), (5, "vm-gone"));
    assert_eq!(code(client.resume(VM, Hold::Lasting)), (5, "bad-state"));
}

#[test]
fn reset_happens_once_however_often_it_is_sent() {
    for seed in 0..20 {
        let target = Target::new(vec![small()]);
        let mut client = open(&target, bad_line(seed));
        client.reset(VM).expect("it resets");
        client.reset(VM).expect("it resets");
        assert_eq!(lock(&target).vms[0].restarts, 2, "seed {seed}");
    }
}

#[test]
fn copy_is_exact_on_a_good_line() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    let mut verified = 0;
    let plan = plan("good");
    let report = copy::run(&mut client, VM, &plan, &mut |step| {
        if let Step::Verified(_) = step {
            verified += 1;
        }
    });
    let report = report.expect("an exact copy");
    assert_eq!(verified, 1);
    assert_eq!(report.slots.len(), 3);
    let state = lock(&target);
    let vm = &state.vms[0];
    for slot in &vm.slots {
        let file = plan.image_dir.join(format!("slot-{}.bin", slot.id));
        let copied = std::fs::read(file).expect("an image");
        assert_eq!(copied.len(), slot.memory.len());
    }
    assert_eq!(vm.state, VmState::Running, "it goes on as before");
    assert_eq!(vm.logging, None, "and is not logged any more");
    let total: u64 = report.rounds.iter().skip(1).map(|round| round.pages).sum();
    assert!(total > 0, "the guest wrote meanwhile");
}

#[test]
fn copy_is_exact_on_bad_lines() {
    for seed in 0..6 {
        let target = Target::new(vec![small()]);
        let mut client = open(&target, bad_line(seed));
        let report = copy::run(&mut client, VM, &plan(&format!("bad{seed}")), &mut |_| {});
        assert!(report.is_ok(), "seed {seed}: {:?}", report.err());
        let stats = client.stats();
        assert!(
            stats.retransmits > 0 && stats.bad_frames > 0,
            "seed {seed}: {stats:?}"
        );
    }
}

#[test]
fn copy_is_exact_with_small_frames_and_one_in_flight() {
    let mut vm = small();
    // No two words alike: a frame holds a small part of what is asked for, and the rest is asked for again.
    let words = vm.slots[2].memory.as_chunks_mut::<8>().0;
    for (n, word) in (1u64..).zip(words) {
        *word = n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes();
    }
    let target = Target::new(vec![vm]);
    let options = Options {
        max_payload: 1024,
        window: 1,
        ..options()
    };
    let mut client = open_with(&target, Faults::default(), options).expect("a session");
    copy::run(&mut client, VM, &plan("narrow"), &mut |_| {}).expect("an exact copy");
}

#[test]
fn a_lost_request_is_noticed_by_the_next_answer_not_by_the_clock() {
    let target = Target::new(vec![small()]);
    let options = Options {
        retry: Duration::from_secs(4),
        ..options()
    };
    let faults = Faults {
        lose_request: Some(4),
        ..Faults::default()
    };
    let mut client = open_with(&target, faults, options).expect("a session");
    let begun = Instant::now();
    let mut bytes = 0;
    let ranges = [(0x4000_0000, 1000 * 4096)];
    let read = client.read_memory(VM, ranges, |_, part| {
        bytes += part.len();
        Ok(())
    });
    read.expect("memory");
    assert_eq!(bytes, 1000 * 4096);
    assert!(client.stats().retransmits > 0);
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn answers_of_other_sessions_are_not_listened_to() {
    let target = Target::new(vec![small()]);
    let faults = Faults {
        stale_answers: true,
        ..Faults::default()
    };
    let mut client = open(&target, faults);
    copy::run(&mut client, VM, &plan("stale"), &mut |_| {}).expect("an exact copy");
}

#[test]
fn copy_leaves_a_paused_guest_paused_and_a_log_running() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    start(&mut client);
    client.pause(VM, Hold::Lasting).expect("it pauses");
    copy::run(&mut client, VM, &plan("paused"), &mut |_| {}).expect("an exact copy");
    let state = lock(&target);
    assert_eq!(state.vms[0].state, VmState::Paused);
    assert!(state.vms[0].logging.is_some());
}

/// Requests from the one that pauses to the one that resumes.
fn while_paused(target: &Target) -> Vec<String> {
    let requests = target.requests.iter();
    let paused = requests.skip_while(|name| !name.starts_with("Ok Pause"));
    paused
        .take_while(|name| !name.starts_with("Ok Resume"))
        .cloned()
        .collect()
}

#[test]
fn a_copy_is_verified_after_the_guest_was_let_go() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    let report = copy::run(&mut client, VM, &plan("running"), &mut |_| {}).expect("a copy");
    assert_eq!(report.verified.pages + report.verified.written, 1070);
    assert!(report.verified.pages > 0 && report.verified.written > 0);
    let state = lock(&target);
    let paused = while_paused(&state);
    assert!(!paused.is_empty());
    let slow = |name: &String| name.contains("Hash") || name.contains("PageSums");
    assert!(!paused.iter().any(slow), "{paused:?}");
    assert!(state.requests.iter().any(slow), "it was verified");
    assert_eq!(state.vms[0].logging, None);
    assert_eq!(state.vms[0].outstanding, None);
}

#[test]
fn a_copy_verified_while_paused_counts_that_as_downtime() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    let plan = Plan {
        verify: Verify::Paused,
        ..plan("hashed")
    };
    let report = copy::run(&mut client, VM, &plan, &mut |_| {}).expect("an exact copy");
    assert_eq!((report.verified.pages, report.verified.written), (1070, 0));
    assert!(report.downtime >= report.verify_time);
    let paused = while_paused(&lock(&target));
    assert!(
        paused.iter().any(|name| name.contains("Hash")),
        "{paused:?}"
    );
}

#[test]
fn a_page_copied_wrongly_is_found_out_however_it_is_verified() {
    for (verify, after) in [
        (Verify::Running, After::AsBefore),
        (Verify::Running, After::Paused),
        (Verify::Paused, After::AsBefore),
    ] {
        let mut vm = small();
        vm.writes = 0;
        let target = Target::new(vec![vm]);
        let mut client = open(&target, Faults::default());
        let plan = Plan {
            verify,
            after,
            ..plan("spoilt")
        };
        let file = plan.image_dir.join("slot-1.bin.partial");
        let copied = copy::run(&mut client, VM, &plan, &mut |step| {
            if let Step::Round(Round {
                phase: Phase::Last, ..
            }) = step
            {
                let file = std::fs::File::options().write(true).open(&file);
                let at = 999 * 4096 + 4095;
                std::os::unix::fs::FileExt::write_all_at(&file.expect("a copy"), b"x", at)
                    .expect("it is written");
            }
        });
        let text = copied.as_ref().err().map(ToString::to_string);
        assert!(
            text.as_ref()
                .is_some_and(|text| text.contains("0x403e7000")),
            "{verify:?}: {text:?}"
        );
        assert_eq!(code(copied), (7, "mismatch"));
        assert_eq!(lock(&target).vms[0].state, VmState::Running);
    }
}

#[test]
fn a_guest_that_has_ended_is_copied_without_a_log() {
    let mut vm = small();
    vm.state = VmState::Stopped;
    let target = Target::new(vec![vm]);
    let mut client = open(&target, Faults::default());
    let ended = plan("ended");
    let report = copy::run(&mut client, VM, &ended, &mut |_| {}).expect("an exact copy");
    assert_eq!((report.verified.pages, report.verified.written), (1070, 0));
    assert_eq!(report.downtime, Duration::ZERO);
    {
        let state = lock(&target);
        let asked = |what: &str| state.requests.iter().any(|name| name.contains(what));
        assert!(
            !asked("DirtyStart") && !asked("Pause"),
            "{:?}",
            state.requests
        );
        for slot in &state.vms[0].slots {
            let file = ended.image_dir.join(format!("slot-{}.bin", slot.id));
            assert!(std::fs::read(file).expect("an image") == slot.memory);
        }
    }
    // And if it is started behind the copy's back, that is said.
    let started = copy::run(&mut client, VM, &plan("started"), &mut |step| {
        if let Step::Round(_) = step {
            lock(&target).vms[0].state = VmState::Running;
        }
    });
    assert_eq!(code(started), (8, "cancelled"));
}

#[test]
fn a_dying_session_gives_back_its_pause_and_its_log_and_nobody_elses() {
    for lasting in [false, true] {
        let target = Target::new(vec![small()]);
        let mut client = open(&target, Faults::default());
        if lasting {
            start(&mut client);
            client.pause(VM, Hold::Lasting).expect("it pauses");
        }
        client.close();
        let mut client = open(&target, Faults::default());
        let died = copy::run(&mut client, VM, &plan("dying"), &mut |step| {
            if matches!(step, Step::Paused) {
                // As at a SIGKILL: nobody puts anything back, and the target finds out.
                let mut target = lock(&target);
                target.session = None;
                target.vms[0].give_back();
                target.vms[0].session_over();
            }
        });
        assert_eq!(code(died), (5, "stale-session"));
        let state = &lock(&target).vms[0];
        let (paused, logging) = (state.state == VmState::Paused, state.logging.is_some());
        assert_eq!((paused, logging), (lasting, lasting));
    }
}

#[test]
fn a_session_that_holds_something_is_heard_of_while_its_owner_is_busy() {
    let target = Target::new(vec![small()]);
    let options = Options {
        patience: Duration::from_millis(1),
        ..options()
    };
    let mut client = open_with(&target, Faults::default(), options).expect("a session");
    client.pause(VM, Hold::Lasting).expect("it pauses");
    assert_eq!(lock(&target).patience_ms, None, "nothing is the session's");
    client.pause(VM, Hold::Session).expect("it pauses");
    // The shortest there is.
    assert_eq!(lock(&target).patience_ms, Some(1000));
    // The owner says nothing, and more is heard than the answer to it takes.
    let begun = Instant::now();
    while lock(&target).kept_alive < 4 {
        assert!(begun.elapsed() < Duration::from_secs(20), "not heard of");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Answers to beats are nobody's.
    assert_eq!(client.list().expect("a list").len(), 1);
    client.close();
    let heard = lock(&target).kept_alive;
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(lock(&target).kept_alive, heard, "it is over");
}

#[test]
fn copy_can_leave_the_guest_paused_and_exactly_as_copied() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    let plan = Plan {
        after: After::Paused,
        ..plan("left")
    };
    copy::run(&mut client, VM, &plan, &mut |_| {}).expect("an exact copy");
    let state = lock(&target);
    assert_eq!(state.vms[0].state, VmState::Paused);
    for slot in &state.vms[0].slots {
        let file = plan.image_dir.join(format!("slot-{}.bin", slot.id));
        assert!(
            std::fs::read(file).expect("an image") == slot.memory,
            "slot {}",
            slot.id
        );
    }
}

#[test]
fn copy_reads_the_machines_memory_file() {
    let target = Target::new(vec![small()]);
    let dir = temp_dir("ramfile");
    let ram = dir.join("ram");
    lock(&target).vms[0].back_by(&ram, 0x4000_0000);
    let mut client = open(&target, Faults::default());
    let contents = Contents::MemoryFile(MemoryFile::open(&ram, 0x4000_0000).expect("a file"));
    let plan = Plan {
        contents,
        ..plan("fromram")
    };
    copy::run(&mut client, VM, &plan, &mut |_| {}).expect("an exact copy");
    assert!(
        !lock(&target)
            .requests
            .iter()
            .any(|r| r.starts_with("Ok ReadMemory"))
    );
    // A wrong base address is a clear error, not a wrong copy.
    let contents = Contents::MemoryFile(MemoryFile::open(&ram, 0x8000_0000).expect("a file"));
    let wrong = copy::run(&mut client, VM, &Plan { contents, ..plan }, &mut |_| {});
    let text = wrong
        .as_ref()
        .err()
        .map(ToString::to_string)
        .unwrap_or_default();
    assert!(text.contains("--memory-base"), "{text}");
    assert_eq!(code(wrong), (1, "bad-input"));
    assert_eq!(lock(&target).vms[0].state, VmState::Running);
}

#[test]
fn a_tracker_that_misses_writes_is_found_out() {
    let mut vm = small();
    vm.misses_every = Some(5);
    let target = Target::new(vec![vm]);
    let mut client = open(&target, Faults::default());
    let result = copy::run(&mut client, VM, &plan("missed"), &mut |_| {});
    let text = result
        .as_ref()
        .err()
        .map(ToString::to_string)
        .unwrap_or_default();
    assert!(
        text.contains("0x4") || text.contains("0x8"),
        "names pages that differ: {text}"
    );
    assert_eq!(code(result), (7, "mismatch"));
    let state = lock(&target);
    assert_eq!(state.vms[0].state, VmState::Running, "the guest goes on");
    assert_eq!(state.vms[0].logging, None);
    assert_eq!(state.vms[0].outstanding, None);
}

#[test]
fn a_write_that_is_noticed_late_is_no_wrong_copy() {
    let mut vm = small();
    vm.late_every = Some(5);
    let target = Target::new(vec![vm]);
    let mut client = open(&target, Faults::default());
    let report = copy::run(&mut client, VM, &plan("late"), &mut |_| {}).expect("a copy");
    assert!(report.verified.written > 0);
    let state = lock(&target);
    let settled = state.requests.iter().filter(|name| *name == "Ok Resume");
    assert!(settled.count() >= 2, "it was paused once more");
    assert_eq!(state.vms[0].state, VmState::Running, "the guest goes on");
    assert_eq!(state.vms[0].logging, None);
    assert_eq!(state.vms[0].outstanding, None);
}

#[test]
fn what_was_not_kept_is_reported_again() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    start(&mut client);
    client.pause(VM, Hold::Lasting).expect("it pauses");
    let dirty = lock(&target).vms[0].dirty();
    assert!(dirty > 0);
    let failed = client.harvest(VM, Ending::Commit, &mut |_, _| {}, |client, report| {
        assert_eq!(
            client
                .read_bitmaps(VM, report, &mut |_, _| {})?
                .dirty_pages(),
            dirty
        );
        Err::<(), _>(Error::Cancelled("disk full".into()))
    });
    assert_eq!(code(failed), (8, "cancelled"));
    assert_eq!(lock(&target).vms[0].outstanding, None);
    let mut count = |ending| {
        client
            .harvest(VM, ending, &mut |_, _| {}, |client, report| {
                let bitmaps = client.read_bitmaps(VM, report, &mut |_, _| {})?;
                assert_eq!(bitmaps.dirty_pages(), report.dirty_pages);
                Ok(report.dirty_pages)
            })
            .expect("a harvest")
    };
    assert_eq!(count(Ending::GiveBack), dirty, "after a failure");
    assert_eq!(count(Ending::Commit), dirty, "after a peek");
    assert_eq!(count(Ending::Commit), 0, "after a commit");
}

#[test]
fn nothing_is_lost_when_the_target_vanishes_at_any_moment() {
    let mut finished = false;
    for after in 1..200 {
        let mut vm = small();
        vm.writes = 0;
        let target = Target::new(vec![vm]);
        {
            let mut client = open(&target, Faults::default());
            start(&mut client);
            let mut state = lock(&target);
            (0..50).for_each(|_| state.vms[0].write_somewhere());
        }
        let before = lock(&target).vms[0].dirty();
        let options = Options {
            max_payload: 1024,
            ..options()
        };
        let faults = Faults {
            vanish_after: Some(after),
            ..Faults::default()
        };
        let result = open_with(&target, faults, options).and_then(|mut client| {
            client.harvest(VM, Ending::Commit, &mut |_, _| {}, |client, report| {
                client.read_bitmaps(VM, report, &mut |_, _| {})
            })
        });
        let kept = result.is_ok();
        if !kept {
            assert_eq!(code(result).0, 3, "after {after} frames");
        }
        let mut client = open(&target, Faults::default());
        let status = client.log_status(VM).expect("a status");
        assert_eq!(status.outstanding, None, "after {after} frames");
        let again = client
            .harvest(VM, Ending::Commit, &mut |_, _| {}, |client, report| {
                client.read_bitmaps(VM, report, &mut |_, _| {})
            })
            .expect("a harvest")
            .dirty_pages();
        // Only an epoch whose commit arrived may be gone; its bitmap was read whole then.
        let committed = again == 0 && status.last_committed.0 > 0;
        assert!(
            again == before || committed,
            "after {after} frames: {again} of {before}"
        );
        if kept {
            assert_eq!(again, 0);
            finished = true;
            break;
        }
    }
    assert!(finished, "with enough frames it goes through");
}

#[test]
fn a_target_of_another_version_is_refused() {
    let target = Target::new(vec![small()]);
    lock(&target).protocol = 9;
    let result = open_with(&target, Faults::default(), options());
    let error = result.err().expect("refused");
    assert_eq!((error.exit_code(), error.code()), (4, "version-mismatch"));
    assert!(error.to_string().contains('9'), "{error}");
}

#[test]
fn a_session_that_is_over_is_told_so() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    start(&mut client);
    lock(&target).session = Some(Session(1));
    let refused = client.list();
    let text = refused.as_ref().err().map(ToString::to_string);
    let text = text.unwrap_or_default();
    // The target answers both with the same.
    assert!(
        text.contains("nothing was heard of this program for its --timeout"),
        "{text}"
    );
    assert!(text.contains("another program has opened one"), "{text}");
    assert_eq!(code(refused), (5, "stale-session"));
    assert_eq!(code(client.take(VM, &mut |_, _| {})), (5, "stale-session"));
}

#[test]
fn a_new_session_gives_back_what_the_old_one_took() {
    let target = Target::new(vec![small()]);
    let mut first = open(&target, Faults::default());
    start(&mut first);
    let taken = first
        .take(VM, &mut |_, _| {})
        .expect("an epoch")
        .dirty_pages;
    assert!(taken > 0 && lock(&target).vms[0].outstanding.is_some());
    let mut second = open(&target, Faults::default());
    assert_eq!(second.log_status(VM).expect("a status").outstanding, None);
    assert!(lock(&target).vms[0].dirty() >= taken);
}

#[test]
fn a_silent_target_is_given_up_in_time() {
    let target = Target::new(vec![small()]);
    let options = Options {
        timeout: Duration::from_millis(300),
        ..options()
    };
    let mut client = open_with(&target, Faults::default(), options.clone()).expect("a session");
    start(&mut client);
    let mut harvest = || {
        client.harvest(VM, Ending::Commit, &mut |_, _| {}, |client, report| {
            lock(&target).mute = true;
            client.read_bitmaps(VM, report, &mut |_, _| {})
        })
    };
    let begun = Instant::now();
    assert_eq!(code(harvest()), (3, "no-answer"));
    drop(client);
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    let nobody = open_with(&target, Faults::default(), options);
    assert_eq!(code(nobody), (3, "no-answer"));
    lock(&target).mute = false;
    let client = open(&target, Faults::default());
    assert_eq!(lock(&target).vms[0].outstanding, None);
    client.close();
}

#[test]
fn interrupt_gives_the_epoch_back() {
    let target = Target::new(vec![small()]);
    let interrupt = Arc::new(AtomicBool::new(false));
    let options = Options {
        interrupt: Arc::clone(&interrupt),
        ..options()
    };
    let mut client = open_with(&target, Faults::default(), options).expect("a session");
    start(&mut client);
    let result = client.harvest(VM, Ending::Commit, &mut |_, _| {}, |client, report| {
        interrupt.store(true, Ordering::Relaxed);
        client.read_bitmaps(VM, report, &mut |_, _| {})
    });
    assert_eq!(code(result), (130, "interrupted"));
    assert_eq!(lock(&target).vms[0].outstanding, None);
    assert!(lock(&target).vms[0].dirty() > 0);
}

#[test]
fn lies_are_not_believed() {
    for lie in [
        Lie::WrongCount,
        Lie::NoMemory,
        Lie::TooMuchMemory,
        Lie::WrongPiece,
        Lie::WrongKind,
        Lie::Garbage,
    ] {
        let target = Target::new(vec![small()]);
        let mut client = open(&target, Faults::default());
        start(&mut client);
        lock(&target).vms[0].write(1, 3, 77);
        lock(&target).lie = Some(lie);
        let result = copy::run(&mut client, VM, &plan(&format!("lie-{lie:?}")), &mut |_| {});
        assert_eq!(code(result), (4, "protocol"), "{lie:?}");
        lock(&target).lie = None;
        assert_eq!(
            client.log_status(VM).expect("a status").outstanding,
            None,
            "{lie:?}"
        );
    }
}

#[test]
fn taking_without_a_log_says_how_to_start_one() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    let error = client.take(VM, &mut |_, _| {}).expect_err("refused");
    assert_eq!((error.exit_code(), error.code()), (5, "not-logging"));
    assert!(error.to_string().contains("dirty start"), "{error}");
    start(&mut client);
    let first = client.take(VM, &mut |_, _| {}).expect("an epoch");
    let error = client.take(VM, &mut |_, _| {}).expect_err("refused");
    assert_eq!(error.code(), "epoch-outstanding");
    client.commit(VM, first.epoch).expect("committed");
    client.commit(VM, first.epoch).expect("committed already");
    assert_eq!(code(client.abort(VM, first.epoch)), (5, "no-such-epoch"));
    let other = client.start_log(
        VM,
        EngineChoice::WriteProtect,
        Granularity::Page,
        Hold::Lasting,
        &mut |_, _| {},
    );
    let Err(Error::Target { reply, .. }) = other else {
        panic!("two logs at once")
    };
    assert_eq!(reply, ErrorReply::AlreadyLogging);
}

/// Gathers console output.
fn gather(client: &mut Client) -> Arc<Mutex<(Vec<u8>, u64)>> {
    let gathered = Arc::new(Mutex::new((Vec::new(), 0)));
    let sink = Arc::clone(&gathered);
    client.set_sink(Box::new(move |output| {
        let mut gathered = sink.lock().expect("not poisoned");
        match output {
            Output::Console { data, offset, .. } => {
                assert_eq!(offset, gathered.1 + gathered.0.len() as u64, "in order");
                gathered.0.extend_from_slice(data);
            }
            Output::Missed { bytes, .. } => gathered.1 += bytes,
            _ => {}
        }
    }));
    gathered
}

#[test]
fn consoles_lose_and_double_nothing_on_bad_lines() {
    for seed in 0..4 {
        let target = Target::new(vec![small()]);
        lock(&target).vms[0].print(b"before anybody listened\n");
        let mut client = open(&target, bad_line(seed));
        let gathered = gather(&mut client);
        assert_eq!(client.attach(VM, ConsoleFrom::Oldest).expect("attached"), 0);
        let typed: Vec<u8> = (0..2000).map(|i| b"0123456789abcdef\n"[i % 17]).collect();
        client.type_input(VM, &typed).expect("typed");
        let begun = Instant::now();
        let wanted = lock(&target).vms[0].console.clone();
        while gathered.lock().expect("not poisoned").0.len() < wanted.len() {
            client.poll(Duration::from_millis(50)).expect("a line");
            assert!(begun.elapsed() < Duration::from_secs(20), "seed {seed}");
        }
        assert_eq!(lock(&target).vms[0].typed, typed, "seed {seed}");
        assert!(
            gathered.lock().expect("not poisoned").0 == wanted,
            "seed {seed}"
        );
    }
}

#[test]
fn output_that_is_gone_is_told() {
    let target = Target::new(vec![small()]);
    {
        let mut state = lock(&target);
        state.vms[0].print(&[b'x'; 500]);
        state.vms[0].oldest = 300;
    }
    let mut client = open(&target, Faults::default());
    let gathered = gather(&mut client);
    assert_eq!(client.read_console(VM, 0).expect("read").0, 300);
    client.attach(VM, ConsoleFrom::Now).expect("attached");
    {
        // A flood between two looks: most of it is gone before it can be read.
        let mut state = lock(&target);
        state.vms[0].print(&[b'y'; 5000]);
        state.vms[0].sent = 5500;
        state.vms[0].oldest = 5400;
    }
    gathered.lock().expect("not poisoned").1 = 500;
    let begun = Instant::now();
    while gathered.lock().expect("not poisoned").0.len() < 100 {
        client.poll(Duration::from_secs(2)).expect("a line");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    let (data, base) = gathered.lock().expect("not poisoned").clone();
    assert_eq!((data.len(), base), (100, 5400));
}

#[test]
fn a_guest_that_does_not_read_is_told() {
    let target = Target::new(vec![small()]);
    lock(&target).vms[0].takes = 0;
    let options = Options {
        timeout: Duration::from_millis(200),
        ..options()
    };
    let mut client = open_with(&target, Faults::default(), options).expect("a session");
    assert_eq!(code(client.type_input(VM, b"hello")), (6, "too-slow"));
    assert_eq!(client.offer_input(VM, b"hello").expect("offered"), 0);
    lock(&target).vms[0].takes = 2;
    client.type_input(VM, b"hello").expect("typed");
    assert_eq!(lock(&target).vms[0].typed, b"hello");
}

#[test]
fn other_threads_can_put_input_among_the_outputs() {
    let target = Target::new(vec![small()]);
    let mut client = open(&target, Faults::default());
    let (sender, came) = std::sync::mpsc::channel();
    client.set_sink(Box::new(move |output| {
        if let Output::Injected(bytes) = output {
            sender.send(bytes.to_vec()).expect("the test listens");
        }
    }));
    client.injector().send(b"key").expect("a client");
    client.poll(Duration::from_secs(5)).expect("a line");
    assert_eq!(came.try_recv().expect("it came"), b"key");
    let injector = client.injector();
    drop(client);
    assert!(injector.send(b"late").is_err());
}

#[test]
fn goodbye_closes_the_session() {
    let target = Target::new(vec![small()]);
    let client = open(&target, Faults::default());
    assert!(lock(&target).session.is_some());
    drop(client);
    assert_eq!(lock(&target).session, None);
}
