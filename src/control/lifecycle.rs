//! Starting, pausing, restarting and ending a VM.
//!
//! A change is wished for by anyone at any time ([`wish`]): the VM is held, its vCPUs are
//! called, and whoever takes the last one off its CPU makes the change ([`settle`]). Nobody
//! waits. Lock order: `status`, then a vCPU's `run`.

use super::event::{self, Event};
use super::loader::{Loader, Progress, Start};
use super::work;
use crate::arch::{barrier, timer};
use crate::platform::console;
use crate::platform::options::WhenIdle;
use crate::sched;
use crate::task::job::Step;
use crate::vm::exits::device;
use crate::vm::vcpu::{Request, Run, Vcpu};
use crate::vm::{self, Status, Vm, Wish};
use alloc::boxed::Box;
use alloc::string::String;
use core::sync::atomic::{AtomicBool, Ordering::*};
use log::{error, info, warn};
use spin::MutexGuard;
use tidemark_devices::guest_time::GuestTime;
use tidemark_lease::Holds;
use tidemark_wire::bundle::Clock;
use tidemark_wire::message::{Hold, VmState};

/// Whether the machine goes off with its last guest.
static POWER_OFF_WHEN_IDLE: AtomicBool = AtomicBool::new(false);

/// Says what happens when the last guest has ended.
pub fn when_idle(what: WhenIdle) {
    POWER_OFF_WHEN_IDLE.store(what == WhenIdle::PowerOff, Relaxed);
}

/// Starts a VM that does not run. One without memory stays as it is: it failed when it was made.
pub fn start(vm: &'static Vm) {
    {
        let mut status = vm.status.lock();
        if !matches!(status.state, VmState::Stopped | VmState::Failed) {
            return;
        }
        if !vm.memory.is_there() {
            return;
        }
        status.state = VmState::Starting;
        status.pauses += 1;
        status.holds = Holds::default();
        status.reason.clear();
        vm.held.store(true, SeqCst);
    }
    load(vm);
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
    {
        let mut status = vm.status.lock();
        status.time = GuestTime::new(timer::now());
        publish_time(vm, &status);
        status.state = VmState::Running;
        // A guest must not get out of a pause by restarting itself.
        if status.holds.any() && status.wish == Wish::Nothing {
            status.wish = Wish::Pause;
        }
        // What was wished for meanwhile comes next.
        vm.held.store(status.wish != Wish::Nothing, SeqCst);
    }
    info!("{}: running", vm.name());
    if let Some(first) = vm.vcpus().first() {
        sched::make_ready(first, &mut first.run.lock());
    }
    note_state(vm);
    settle(vm);
}

/// Gives the vCPUs the counters that the VM has by now. None of them runs.
fn publish_time(vm: &Vm, status: &Status) {
    vm.counter_offset
        .store(status.time.virtual_offset(), Relaxed);
    vm.physical_offset
        .store(status.time.physical_offset(), Relaxed);
}

/// The VM could not be started.
pub fn failed(vm: &'static Vm, reason: String) {
    error!("{}: {reason}", vm.name());
    {
        let mut status = vm.status.lock();
        status.state = VmState::Failed;
        status.reason = reason;
        status.wish = Wish::Nothing;
    }
    note_state(vm);
    look_for_the_end();
}

/// Asks for a change; it is made when no vCPU of the VM runs.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn wish(vm: &'static Vm, wish: Wish, reason: &str) -> Result<(), VmState> {
    let status = vm.status.lock();
    let possible = matches!(
        status.state,
        VmState::Running | VmState::Paused | VmState::Starting
    );
    if !possible && wish != Wish::Nothing {
        return Err(status.state);
    }
    hold_for(vm, status, wish, reason);
    Ok(())
}

/// Pauses a VM for whoever asks, or has whoever asks keep it paused too.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn pause(vm: &'static Vm, hold: Hold) -> Result<(), VmState> {
    let mut status = vm.status.lock();
    match status.state {
        VmState::Running => {
            status.holds.take(hold);
            hold_for(vm, status, Wish::Pause, "");
        }
        // It is, or will be as soon as it is loaded.
        VmState::Paused | VmState::Starting => status.holds.take(hold),
        VmState::Stopped | VmState::Failed => return Err(status.state),
    }
    Ok(())
}

/// Holds the vCPUs for a change, which is made here if none of them runs.
fn hold_for(vm: &'static Vm, mut status: MutexGuard<'static, Status>, wish: Wish, reason: &str) {
    // The stronger wish stays.
    if status.wish < wish {
        status.wish = wish;
        status.reason = reason.into();
    }
    vm.held.store(true, SeqCst);
    drop(status);
    for vcpu in vm.vcpus() {
        vcpu.requests.make(Request::Schedule);
        let running = *vcpu.run.lock() == Run::Running;
        if running {
            sched::kick_cpu(vcpu.home.load(Relaxed));
        }
    }
    settle(vm);
}

/// Takes a pause back. The VM goes on, or does not pause, unless it is held by somebody else too.
///
/// # Errors
///
/// Gives the state that does not allow it.
pub fn resume(vm: &'static Vm, hold: Hold) -> Result<(), VmState> {
    {
        let mut status = vm.status.lock();
        let held = status.holds.any();
        status.holds.give_back(hold);
        match status.state {
            VmState::Starting if held => return Ok(()),
            VmState::Paused | VmState::Running if status.holds.any() => return Ok(()),
            VmState::Paused => {
                status.state = VmState::Running;
                // Before the first of its vCPUs may run again.
                if status.time.go_on(timer::now()) {
                    publish_time(vm, &status);
                    vm.vcpus().iter().for_each(Vcpu::time_goes_on);
                }
            }
            VmState::Running => {}
            other => return Err(other),
        }
        if status.wish == Wish::Pause {
            status.wish = Wish::Nothing;
        }
        status.pauses += 1;
        vm.held.store(status.wish != Wish::Nothing, SeqCst);
    }
    for vcpu in vm.vcpus() {
        let mut run = vcpu.run.lock();
        // One that waits sets its timers anew: its CPU has them by the time before the pause.
        let waits = *run == Run::Blocked && vcpu.must_be_loaded();
        if *run == Run::Parked || waits {
            sched::make_ready(vcpu, &mut run);
        }
    }
    note_state(vm);
    Ok(())
}

/// The session that held it is over: takes its pause back, and says whether there was one.
pub fn session_over(vm: &'static Vm) -> bool {
    let held = vm.status.lock().holds.has(Hold::Session);
    held && resume(vm, Hold::Session).is_ok()
}

/// A vCPU has left its CPU: was it the last that a change waits for?
#[inline]
pub fn vcpu_left(vm: &'static Vm) {
    if vm.is_held() {
        settle(vm);
    }
}

/// Makes the change that was wished for, if no vCPU runs any more.
fn settle(vm: &'static Vm) {
    let mut status = vm.status.lock();
    // While it is being loaded nothing runs, and the loader settles when it is through.
    if status.wish == Wish::Nothing || status.state == VmState::Starting {
        return;
    }
    if vm
        .vcpus()
        .iter()
        .any(|vcpu| *vcpu.run.lock() == Run::Running)
    {
        return;
    }
    barrier::dsb_sy();
    let wish = core::mem::replace(&mut status.wish, Wish::Nothing);
    for vcpu in vm.vcpus() {
        let mut run = vcpu.run.lock();
        vcpu.end_stall(&mut run);
        if wish > Wish::Pause {
            *run = Run::Off;
        }
    }
    match wish {
        Wish::Nothing => {}
        Wish::Pause => {
            status.state = VmState::Paused;
            if vm.spec.clock == Clock::Stop {
                status.time.stop(timer::now());
                vm.vcpus().iter().for_each(Vcpu::time_stops);
            }
        }
        Wish::Reset => {
            status.state = VmState::Starting;
            status.restarts += 1;
            status.pauses += 1;
            status.reason.clear();
        }
        Wish::Stop => status.state = VmState::Stopped,
        Wish::Fail => status.state = VmState::Failed,
    }
    let reason = status.reason.clone();
    drop(status);
    match wish {
        Wish::Nothing => {}
        Wish::Pause => note_state(vm),
        Wish::Reset => {
            info!("{}: restarting", vm.name());
            load(vm);
        }
        Wish::Stop => {
            info!("{}: stopped ({reason})", vm.name());
            note_state(vm);
            look_for_the_end();
        }
        Wish::Fail => {
            warn!("{}: failed: {reason}", vm.name());
            note_state(vm);
            look_for_the_end();
        }
    }
}

/// Powers the machine off if that was asked for and no guest is left.
fn look_for_the_end() {
    let over = vm::all()
        .iter()
        .all(|vm| matches!(vm.status.lock().state, VmState::Stopped | VmState::Failed));
    if over && POWER_OFF_WHEN_IDLE.load(Relaxed) {
        event::note(Event::Over);
    }
}

/// The state that a VM is in now is news.
fn note_state(vm: &Vm) {
    let state = vm.status.lock().state;
    event::note(Event::State(vm.id, state));
}

/// Ends the machine, everything said.
pub fn power_off() -> ! {
    let failed = vm::all()
        .iter()
        .any(|vm| vm.status.lock().state == VmState::Failed);
    let verdict = if failed { "failed" } else { "ok" };
    console::print(format_args!("tidemark: verdict {verdict}\n"));
    console::flush();
    crate::arch::smc::system_off()
}
