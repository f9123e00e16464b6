//! The scheduler: ready vCPUs by CPU, and the ways in and out of a guest, a pause and a run.

use crate::entity::{Entity, Request, RunState, Taken};
use crate::lifecycle::{Completed, Hold, Holds, Lifecycle, State, Status, Transition};
use crate::sync::{AtomicBool, Mutex, MutexGuard};
use alloc::collections::VecDeque;
use alloc::string::String;
use core::sync::atomic::Ordering::SeqCst;

/// How long a vCPU may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may run.
    Go,
    /// Its quota is used up until this count.
    StallUntil(u64),
}

/// A vCPU, as the scheduler sees it. All of these are called with its run state's lock held.
pub trait Vcpu: Sync + Sized + 'static {
    /// Its VM's type.
    type Vm: Vm<Vcpu = Self>;

    /// What is kept of it here.
    fn entity(&self) -> &Entity;
    /// Whose it is.
    fn vm(&self) -> &'static Self::Vm;
    /// Asks for a turn on its CPU, which is the one that calls.
    fn turn(&self) -> Turn;
    /// The same while it runs.
    fn next_turn(&self) -> Turn {
        self.turn()
    }
    /// Whether it has to wait for its quota before it may go on with what it faulted on.
    fn admit(&self, now: u64) -> Turn;
    /// It came onto its CPU.
    fn entered(&self, now: u64);
    /// It left its CPU.
    fn left(&self, now: u64);
    /// It begins to wait for its quota.
    fn stall_began(&self, now: u64);
    /// It waits for its quota no more.
    fn stall_ended(&self, now: u64);
    /// Whether an interrupt waits that would wake it.
    fn has_interrupt(&self) -> bool;
    /// Whether its timers have to be set anew although it waits.
    fn must_be_loaded(&self) -> bool;
}

/// A VM, as the scheduler sees it.
pub trait Vm: Sync + 'static {
    /// Its vCPUs' type.
    type Vcpu: Vcpu<Vm = Self>;

    /// What is kept of it here.
    fn lifecycle(&self) -> &Lifecycle;
    /// Its vCPUs.
    fn vcpus(&self) -> &[Self::Vcpu];
    /// It is paused. None of its vCPUs runs, and its status is locked.
    fn paused(&self, now: u64);
    /// It goes on after a pause. None of its vCPUs runs yet, and its status is locked.
    fn resumed(&self, now: u64);
    /// It starts. None of its vCPUs runs yet, and its status is locked.
    fn started(&self, now: u64);
}

/// What the scheduler needs of the machine.
pub trait Machine<V>: Sync {
    /// The CPU that calls, by index.
    fn cpu(&self) -> usize;
    /// The count.
    fn now(&self) -> u64;
    /// Has another CPU come out of its guest or its sleep.
    fn kick(&self, cpu: usize);
    /// Returns when what this CPU wrote is seen by all, and what the hardware noted of it (DSB SY).
    fn publish(&self);
    /// The vCPU whose state is in the registers of the CPU that calls.
    fn loaded(&self) -> Option<&'static V>;
    /// Whether the running vCPU has had its time, if another one waits for its CPU.
    fn slice_is_over(&self) -> bool;
}

/// What a CPU does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// The same vCPU goes on.
    GoOn,
    /// The same vCPU goes on, and the CPU's timer is to be set anew.
    Rearm,
    /// The vCPU has left its CPU. A transition of its VM may have waited for that ([`Scheduler::left`]), and then another one is
    /// to be taken.
    Left,
}

/// Ready vCPUs, by CPU.
pub struct Scheduler<V: Vcpu, M, const CPUS: usize> {
    /// What it runs on.
    pub machine: M,
    queues: [Mutex<VecDeque<&'static V>>; CPUS],
    /// A CPU was called for what is its own and not its vCPU's.
    called: [AtomicBool; CPUS],
}

impl<V: Vcpu, M: Machine<V>, const CPUS: usize> Scheduler<V, M, CPUS> {
    /// Nothing is ready.
    pub const fn new(machine: M) -> Self {
        Self {
            machine,
            queues: [const { Mutex::new(VecDeque::new()) }; CPUS],
            called: [const { AtomicBool::new(false) }; CPUS],
        }
    }

    /// Whether nobody waits for a CPU.
    pub fn is_alone(&self, cpu: usize) -> bool {
        match self.queues.get(cpu) {
            Some(queue) => queue.lock().is_empty(),
            None => true,
        }
    }

    /// Has a CPU look at its vCPU's requests, if it is another one.
    fn kick_cpu(&self, cpu: usize) {
        if cpu != self.machine.cpu() {
            self.machine.kick(cpu);
        }
    }

    /// Has a CPU look at its queue, its timers and the jobs: another one now, this one before
    /// it goes back to its guest.
    pub fn call(&self, cpu: usize) {
        if cpu != self.machine.cpu() {
            if let Some(called) = self.called.get(cpu) {
                called.store(true, SeqCst);
            }
            self.machine.kick(cpu);
        } else if let Some(loaded) = self.machine.loaded() {
            loaded.entity().requests.make(Request::Schedule);
        }
    }

    /// This CPU was kicked: it was called, or a request was made of the vCPU that runs here.
    pub fn kicked(&self) {
        let called = self.called.get(self.machine.cpu());
        if called.is_some_and(|called| called.swap(false, SeqCst))
            && let Some(loaded) = self.machine.loaded()
        {
            loaded.entity().requests.make(Request::Schedule);
        }
    }

    /// Something changed for `vcpu`: it is woken if it waits, and looked at if it runs.
    pub fn wake(&self, vcpu: &'static V) {
        let mut run = vcpu.entity().run();
        match *run {
            RunState::Blocked => self.make_ready(vcpu, &mut run),
            RunState::Running => {
                drop(run);
                self.kick_cpu(vcpu.entity().home());
            }
            RunState::Off
            | RunState::Starting
            | RunState::Queued
            | RunState::Paused
            | RunState::Stalled => {}
        }
    }

    /// The throttle may answer a vCPU otherwise by now: if it waits for its quota or runs, it asks again.
    pub fn ask_again(&self, vcpu: &'static V) {
        let entity = vcpu.entity();
        entity.requests.make(Request::Schedule);
        let mut run = entity.run();
        match *run {
            RunState::Stalled => {
                self.end_stall(vcpu, &mut run);
                self.make_ready(vcpu, &mut run);
            }
            RunState::Running => {
                drop(run);
                self.kick_cpu(entity.home());
            }
            RunState::Off
            | RunState::Starting
            | RunState::Blocked
            | RunState::Queued
            | RunState::Paused => {}
        }
    }

    /// Puts a vCPU that may run into its CPU's queue, or aside if its VM is held.
    fn make_ready(&self, vcpu: &'static V, run: &mut RunState) {
        if vcpu.vm().lifecycle().is_held() {
            *run = RunState::Paused;
            return;
        }
        *run = if *run == RunState::Off {
            RunState::Starting
        } else {
            RunState::Queued
        };
        let home = vcpu.entity().home();
        if let Some(queue) = self.queues.get(home) {
            queue.lock().push_back(vcpu);
        }
        // Whoever runs there now must not keep the CPU past a slice.
        self.call(home);
    }

    /// Turns a vCPU on if `may` says so of where it stands; `reset` gives it its first state. Two callers cannot both start it.
    pub fn turn_on(
        &self,
        vcpu: &'static V,
        may: impl FnOnce(RunState) -> bool,
        reset: impl FnOnce(),
    ) {
        let mut run = vcpu.entity().run();
        if may(*run) {
            reset();
            self.make_ready(vcpu, &mut run);
        }
    }

    /// Sees to what is asked of a vCPU, at the end of an exit. A sync was done before: it may hand an interrupt to a vCPU that then
    /// waits for this CPU, which is a request. One that comes from another CPU meanwhile has its kick behind it.
    pub fn attend(&self, vcpu: &'static V) -> Decision {
        let entity = vcpu.entity();
        if entity.requests.take() == Taken::SyncAtMost {
            return Decision::GoOn;
        }
        let mut run = entity.run();
        if *run != RunState::Running {
            return Decision::Left;
        }
        // Under the lock, as everywhere: a resume either finds the vCPU paused or is seen here.
        if vcpu.vm().lifecycle().is_held() {
            self.leave(vcpu, &mut run, RunState::Paused);
        } else if let Turn::StallUntil(end) = vcpu.next_turn() {
            self.stall_until(vcpu, &mut run, end);
        } else if !self.is_alone(self.machine.cpu()) && self.machine.slice_is_over() {
            self.leave(vcpu, &mut run, RunState::Queued);
            if let Some(queue) = self.queues.get(self.machine.cpu()) {
                queue.lock().push_back(vcpu);
            }
        } else {
            return Decision::Rearm;
        }
        Decision::Left
    }

    /// A vCPU leaves its CPU. What it wrote, and what the hardware noted of it, is seen by all
    /// before anyone can see that it left: a last harvest trusts the tables.
    fn leave(&self, vcpu: &'static V, run: &mut RunState, to: RunState) {
        self.machine.publish();
        vcpu.left(self.machine.now());
        *run = to;
    }

    fn stall_until(&self, vcpu: &'static V, run: &mut RunState, end: u64) {
        self.leave(vcpu, run, RunState::Stalled);
        self.begin_stall(vcpu, run, end);
    }

    fn begin_stall(&self, vcpu: &'static V, run: &mut RunState, end: u64) {
        vcpu.entity().begin_stall(run, end);
        vcpu.stall_began(self.machine.now());
    }

    fn end_stall(&self, vcpu: &'static V, run: &mut RunState) {
        if vcpu.entity().end_stall(run) {
            vcpu.stall_ended(self.machine.now());
        }
    }

    /// The vCPU waits for an interrupt, and has left its CPU. `sync` brings its list registers up to date.
    pub fn block(&self, vcpu: &'static V, sync: impl FnOnce()) {
        {
            let mut run = vcpu.entity().run();
            if *run == RunState::Running {
                self.leave(vcpu, &mut run, RunState::Blocked);
            }
        }
        // A sender that saw it running before this only kicked; look again (there: interrupt, then run state; here: run
        // state, then interrupt).
        sync();
        if vcpu.has_interrupt() {
            self.wake(vcpu);
        }
    }

    /// The vCPU may dirty no page for now.
    pub fn stall(&self, vcpu: &'static V) -> Decision {
        let mut run = vcpu.entity().run();
        // Asked again, under the lock: a limit that changes meanwhile is seen here, or finds it waiting.
        let Turn::StallUntil(end) = vcpu.admit(self.machine.now()) else {
            return Decision::GoOn;
        };
        if *run == RunState::Running {
            self.stall_until(vcpu, &mut run, end);
        }
        Decision::Left
    }

    /// The vCPU turned itself off, and has left its CPU.
    pub fn turn_off(&self, vcpu: &'static V) {
        self.leave(vcpu, &mut vcpu.entity().run(), RunState::Off);
    }

    /// The next ready vCPU of this CPU that may run, marked as running.
    pub fn take(&self) -> Option<&'static V> {
        let queue = self.queues.get(self.machine.cpu())?;
        loop {
            let vcpu = queue.lock().pop_front()?;
            let entity = vcpu.entity();
            let mut run = entity.run();
            // Before a look at what they may be about. Who made one and then finds it running, under this lock, made it
            // after this, and it is there when the kick comes; who made it before is heard here.
            entity.requests.take();
            match *run {
                // No transition waited for it: it did not run.
                RunState::Queued | RunState::Starting if vcpu.vm().lifecycle().is_held() => {
                    *run = RunState::Paused;
                }
                RunState::Queued | RunState::Starting => {
                    if let Turn::StallUntil(end) = vcpu.turn() {
                        self.begin_stall(vcpu, &mut run, end);
                        continue;
                    }
                    *run = RunState::Running;
                    vcpu.entered(self.machine.now());
                    return Some(vcpu);
                }
                // Turned off, or paused, while it stood in the queue.
                RunState::Off
                | RunState::Blocked
                | RunState::Running
                | RunState::Paused
                | RunState::Stalled => {}
            }
        }
    }
}

/// The life cycle of VMs.
impl<V: Vcpu, M: Machine<V>, const CPUS: usize> Scheduler<V, M, CPUS> {
    /// Begins a start of a VM that has no run: it is to be loaded, and its vCPUs are held.
    ///
    /// # Errors
    ///
    /// It has one, in this state.
    pub fn start(&self, vm: &'static V::Vm) -> Result<(), State> {
        let mut status = vm.lifecycle().status();
        if !matches!(status.state, State::Stopped | State::Failed) {
            return Err(status.state);
        }
        status.state = State::Starting;
        status.pauses += 1;
        status.holds = Holds::default();
        status.reason.clear();
        vm.lifecycle().set_held(true);
        Ok(())
    }

    /// A VM is loaded: its first vCPU runs, or what was asked of it meanwhile is completed.
    pub fn loaded(&self, vm: &'static V::Vm) -> Option<Completed> {
        {
            let mut status = vm.lifecycle().status();
            vm.started(self.machine.now());
            status.state = State::Running;
            // A guest must not get out of a pause by restarting itself.
            if status.holds.any() && status.pending.is_none() {
                status.pending = Some(Transition::Pause);
            }
            vm.lifecycle().set_held(status.pending.is_some());
            // Before anybody can have the VM reset again: its vCPUs would be another run's by then.
            if let Some(first) = vm.vcpus().first() {
                self.make_ready(first, &mut first.entity().run());
            }
        }
        self.complete(vm)
    }

    /// A VM could not be loaded.
    pub fn failed(&self, vm: &'static V::Vm, reason: String) {
        let mut status = vm.lifecycle().status();
        status.state = State::Failed;
        status.reason = reason;
        status.pending = None;
    }

    /// Asks for a transition; it is completed when no vCPU of the VM runs, here if that is so already.
    ///
    /// # Errors
    ///
    /// Gives the state that does not allow it.
    pub fn request(
        &self,
        vm: &'static V::Vm,
        transition: Transition,
        reason: &str,
    ) -> Result<Option<Completed>, State> {
        let status = vm.lifecycle().status();
        match status.state {
            State::Running | State::Paused | State::Starting => {
                Ok(self.hold_for(vm, status, transition, reason))
            }
            State::Stopped | State::Failed => Err(status.state),
        }
    }

    /// Pauses a VM for whoever asks, or has whoever asks keep it paused too.
    ///
    /// # Errors
    ///
    /// Gives the state that does not allow it.
    pub fn pause(&self, vm: &'static V::Vm, hold: Hold) -> Result<Option<Completed>, State> {
        let mut status = vm.lifecycle().status();
        match status.state {
            State::Running => {
                status.holds.take(hold);
                Ok(self.hold_for(vm, status, Transition::Pause, ""))
            }
            // It is, or will be as soon as it is loaded.
            State::Paused | State::Starting => {
                status.holds.take(hold);
                Ok(None)
            }
            State::Stopped | State::Failed => Err(status.state),
        }
    }

    /// Holds the vCPUs for a transition, which is completed here if none of them runs.
    fn hold_for(
        &self,
        vm: &'static V::Vm,
        mut status: MutexGuard<'_, Status>,
        transition: Transition,
        reason: &str,
    ) -> Option<Completed> {
        // The stronger one stays.
        if status.pending < Some(transition) {
            status.pending = Some(transition);
            status.reason = reason.into();
        }
        vm.lifecycle().set_held(true);
        drop(status);
        for vcpu in vm.vcpus() {
            let entity = vcpu.entity();
            entity.requests.make(Request::Schedule);
            let running = *entity.run() == RunState::Running;
            if running {
                self.kick_cpu(entity.home());
            }
        }
        self.complete(vm)
    }

    /// Takes a pause back. The VM goes on, or does not pause, unless it is held by somebody else too. Says whether it goes on.
    ///
    /// # Errors
    ///
    /// Gives the state that does not allow it.
    pub fn resume(&self, vm: &'static V::Vm, hold: Hold) -> Result<bool, State> {
        {
            let mut status = vm.lifecycle().status();
            let held = status.holds.any();
            status.holds.give_back(hold);
            match status.state {
                State::Starting if held => return Ok(false),
                State::Paused | State::Running if status.holds.any() => return Ok(false),
                State::Paused => {
                    status.state = State::Running;
                    // Before the first of its vCPUs may run again.
                    vm.resumed(self.machine.now());
                }
                State::Running => {}
                other => return Err(other),
            }
            if status.pending == Some(Transition::Pause) {
                status.pending = None;
            }
            status.pauses += 1;
            vm.lifecycle().set_held(status.pending.is_some());
        }
        for vcpu in vm.vcpus() {
            let mut run = vcpu.entity().run();
            // One that waits sets its timers anew: its CPU has them by the time before the pause.
            let waits = *run == RunState::Blocked && vcpu.must_be_loaded();
            if *run == RunState::Paused || waits {
                self.make_ready(vcpu, &mut run);
            }
        }
        Ok(true)
    }

    /// A vCPU has left its CPU: completes what may have waited for that.
    #[inline]
    pub fn left(&self, vm: &'static V::Vm) -> Option<Completed> {
        match vm.lifecycle().is_held() {
            true => self.complete(vm),
            false => None,
        }
    }

    /// Completes the transition that is pending, if no vCPU runs any more.
    fn complete(&self, vm: &'static V::Vm) -> Option<Completed> {
        let mut status = vm.lifecycle().status();
        // While it is being loaded nothing runs, and whoever loads it completes it.
        if status.state == State::Starting {
            return None;
        }
        let transition = status.pending?;
        let runs = |vcpu: &V| *vcpu.entity().run() == RunState::Running;
        if vm.vcpus().iter().any(runs) {
            return None;
        }
        // Each CPU did so for its vCPU as that left; here for what this one wrote for the VM by itself.
        self.machine.publish();
        status.pending = None;
        for vcpu in vm.vcpus() {
            let mut run = vcpu.entity().run();
            self.end_stall(vcpu, &mut run);
            if transition > Transition::Pause {
                *run = RunState::Off;
            }
        }
        Some(match transition {
            Transition::Pause => {
                status.state = State::Paused;
                vm.paused(self.machine.now());
                Completed::Paused
            }
            Transition::Reset => {
                status.state = State::Starting;
                status.restarts += 1;
                status.pauses += 1;
                status.reason.clear();
                Completed::Reset
            }
            Transition::Stop => {
                status.state = State::Stopped;
                Completed::Stopped(status.reason.clone())
            }
            Transition::Fail => {
                status.state = State::Failed;
                Completed::Failed(status.reason.clone())
            }
        })
    }
}
