//! Starting, pausing, restarting and ending a VM: what follows when `crates/sched` has changed its state.

use super::event::{self, Event};
use super::loader::{Loader, Progress, Start};
use super::work;
use crate::platform::console;
use crate::platform::options::WhenIdle;
use crate::sched::{self, SCHEDULER};
use crate::task::job::Step;
use crate::vm::exits::device;
use crate::vm::{self, Vm};
use alloc::boxed::Box;
use alloc::string::String;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use log::{error, info, warn};
use tidemark_sched::{Completed, Hold, State, Transition};

/// Whether the machine goes off with its last guest.
static POWER_OFF_WHEN_IDLE: AtomicBool = AtomicBool::new(false);

/// Says what happens when the last guest has ended.
pub fn when_idle(what: WhenIdle) {
    POWER_OFF_WHEN_IDLE.store(what == WhenIdle::PowerOff, Relaxed);
}

/// Starts a VM that does not run. One without memory stays as it is: it failed when it was made.
pub fn start(vm: &'static Vm) {
    if vm.memory.is_there() && SCHEDULER.start(vm).is_ok() {
        load(vm);
    }
}

/// Restarts a guest that runs, or starts one that does not.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn restart(vm: &'static Vm, reason: &str) -> Result<(), State> {
    let state = vm.status().state;
    match state {
        State::Stopped | State::Failed => {
            if !vm.memory.is_there() {
                return Err(state);
            }
            vm.status().restarts += 1;
            start(vm);
            Ok(())
        }
        // It begins anew as it is, and no vCPU of it has run yet.
        State::Starting => Ok(()),
        State::Running | State::Paused => request(vm, Transition::Reset, reason),
    }
}

fn load(vm: &'static Vm) {
    note_state(vm);
    match Loader::new(vm) {
        Ok(mut loader) => sched::submit(Box::new(move || {
            match loader.step() {
                Progress::Again => return Step::Again,
                Progress::Later => return Step::Later,
                Progress::Loaded(start) => loaded(vm, start),
                Progress::Failed(reason) => failed(vm, reason),
            }
            Step::Done
        })),
        Err(reason) => failed(vm, reason),
    }
}

/// The loader is through: the first vCPU runs.
fn loaded(vm: &'static Vm, Start { entry, context }: Start) {
    // No vCPU's list registers reach the books from here on, and then they are clean.
    for vcpu in vm.vcpus() {
        vcpu.reset(entry, context);
    }
    vm.vgic.reset();
    device::reset(vm);
    work::guest_loaded(vm);
    // Before its own first words.
    info!("{}: running", vm.name());
    let completed = SCHEDULER.loaded(vm);
    note_state(vm);
    follow(vm, completed);
}

/// The VM could not be started.
pub fn failed(vm: &'static Vm, reason: String) {
    error!("{}: {reason}", vm.name());
    SCHEDULER.failed(vm, reason);
    note_state(vm);
    look_for_the_end();
}

/// Asks for a transition; it is completed when no vCPU of the VM runs.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn request(vm: &'static Vm, transition: Transition, reason: &str) -> Result<(), State> {
    let completed = SCHEDULER.request(vm, transition, reason)?;
    follow(vm, completed);
    Ok(())
}

/// Pauses a VM for whoever asks, or has whoever asks keep it paused too.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn pause(vm: &'static Vm, hold: Hold) -> Result<(), State> {
    let completed = SCHEDULER.pause(vm, hold)?;
    follow(vm, completed);
    Ok(())
}

/// Takes a pause back. The VM goes on, or does not pause, unless it is held by somebody else too.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn resume(vm: &'static Vm, hold: Hold) -> Result<(), State> {
    if SCHEDULER.resume(vm, hold)? {
        note_state(vm);
    }
    Ok(())
}

/// The session that held it is over: takes its pause back, and says whether there was one.
pub fn session_over(vm: &'static Vm) -> bool {
    let held = vm.status().holds.has(Hold::Session);
    held && resume(vm, Hold::Session).is_ok()
}

/// A vCPU has left its CPU: was it the last that a transition waits for?
#[inline]
pub fn vcpu_left(vm: &'static Vm) {
    if let Some(completed) = SCHEDULER.left(vm) {
        follow(vm, Some(completed));
    }
}

/// Does what follows from a transition.
#[inline(never)]
fn follow(vm: &'static Vm, completed: Option<Completed>) {
    match completed {
        None => {}
        Some(Completed::Paused) => note_state(vm),
        Some(Completed::Reset) => {
            info!("{}: restarting", vm.name());
            load(vm);
        }
        Some(Completed::Stopped(reason)) => {
            info!("{}: stopped ({reason})", vm.name());
            note_state(vm);
            look_for_the_end();
        }
        Some(Completed::Failed(reason)) => {
            warn!("{}: failed: {reason}", vm.name());
            note_state(vm);
            look_for_the_end();
        }
    }
}

/// The state that a VM is in now is news. Noted under its lock: the last that is told is the one that it is in.
fn note_state(vm: &Vm) {
    let status = vm.status();
    event::note(Event::State(vm.id, status.state));
}

/// Notes that no guest is left, if the machine is to go off then.
fn look_for_the_end() {
    let over = vm::all()
        .iter()
        .all(|vm| matches!(vm.status().state, State::Stopped | State::Failed));
    if over && POWER_OFF_WHEN_IDLE.load(Relaxed) {
        event::note(Event::Over);
    }
}

/// Ends the machine, everything said.
pub fn power_off() -> ! {
    let failed = vm::all()
        .iter()
        .any(|vm| vm.status().state == State::Failed);
    let verdict = if failed { "failed" } else { "ok" };
    console::print(format_args!("tidemark: verdict {verdict}\n"));
    console::flush();
    crate::arch::smc::system_off()
}
