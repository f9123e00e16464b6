//! Which vCPU a CPU runs.
//!
//! Each vCPU has a home CPU and a place in that CPU's queue when it is ready. An exit that
//! needs no change of vCPU never comes here. What is decided here is returned ([`Decision`]); the loop above
//! (`entry::run`) acts.
//!
//! A vCPU stays loaded on its CPU while it waits; only another vCPU's turn unloads it. So a
//! guest that waits and wakes pays for no switch.
//!
//! A vCPU whose quota is used up (`control::throttle`) waits as well, but for the time alone: interrupts
//! that come meanwhile it takes afterwards.
//!
//! Locks: a queue's lock is a leaf, taken inside a vCPU's `run`.

use crate::arch::cpu::{self, MAX_CPUS, PerCpu};
use crate::arch::timer::NEVER;
use crate::arch::{barrier, gic, timer, tlb};
use crate::task::job::{self, Job};
use crate::vm::Vm;
use crate::vm::vcpu::{Request, Run, Taken, Vcpu};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use spin::Mutex;
use tidemark_devices::vgic::Kick;
use tidemark_stage2::{Count, Turn, Verdict};

/// The SGI that makes another CPU look at the requests of its vCPU, and at [`CALLED`].
pub const KICK: u32 = 0;

/// How long a vCPU runs while another waits for its CPU, in microseconds.
const SLICE: u64 = 4_000;
/// How often a busy CPU takes a step of a job, in microseconds.
const JOB_TICK: u64 = 1_000;

/// Ready vCPUs of a CPU, in order.
static QUEUES: [Mutex<VecDeque<&'static Vcpu>>; MAX_CPUS] =
    [const { Mutex::new(VecDeque::new()) }; MAX_CPUS];
/// All vCPUs whose home a CPU is.
static HOMED: [Mutex<Vec<&'static Vcpu>>; MAX_CPUS] = [const { Mutex::new(Vec::new()) }; MAX_CPUS];
/// The vCPU whose state is in this CPU's registers.
static LOADED: PerCpu<Option<&'static Vcpu>> = PerCpu::new(None);
/// A CPU was called for what is its own and not its vCPU's.
static CALLED: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];
/// When the running vCPU's slice ends.
static SLICE_END: PerCpu<u64> = PerCpu::new(NEVER);
/// When the running vCPU is to ask the throttle again.
static TURN_END: PerCpu<u64> = PerCpu::new(NEVER);
/// When this CPU takes its next step of a job although it is busy.
static JOB_DUE: PerCpu<u64> = PerCpu::new(NEVER);
/// What a CPU does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// The same vCPU goes on.
    GoOn,
    /// The vCPU has left its CPU. A change of its VM may have waited for that, and then another one is to be picked.
    Left,
}

/// Gives a vCPU its home: CPUs in turn.
pub fn adopt(vcpu: &'static Vcpu) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let home = NEXT.fetch_add(1, Relaxed) % cpu::count();
    vcpu.home.store(home, Relaxed);
    vcpu.context.set_owner(vcpu);
    HOMED[home].lock().push(vcpu);
}

/// The vCPU that this CPU just left.
#[inline]
pub fn current() -> Option<&'static Vcpu> {
    LOADED.get()
}

/// Has a CPU look at its vCPU's requests, if it is another one.
pub fn kick_cpu(index: usize) {
    if index != cpu::index() {
        gic::send_sgi(KICK, cpu::affinity_of(index));
    }
}

/// Has a CPU look at its queue, its timers and the jobs: another one now, this one before
/// it goes back to its guest.
fn call(index: usize) {
    if index != cpu::index() {
        CALLED[index].store(true, SeqCst);
        kick_cpu(index);
    } else if let Some(loaded) = current() {
        loaded.requests.make(Request::Schedule);
    }
}

/// Another CPU sent [`KICK`]: it called this one, or made a request of the vCPU that runs here.
pub fn called() {
    if CALLED[cpu::index()].swap(false, SeqCst)
        && let Some(loaded) = current()
    {
        loaded.requests.make(Request::Schedule);
    }
}

/// Gives the CPUs a job: every one looks, the busy ones at their next tick.
pub fn submit(job: Job) {
    job::enqueue(job);
    (0..cpu::count()).for_each(call);
}

/// Gives each CPU a job, for work that is divided among them.
pub fn submit_to_all(job: impl Fn() -> Job) {
    (0..cpu::count()).for_each(|_| job::enqueue(job()));
    (0..cpu::count()).for_each(call);
}

/// Gives this CPU a small job, for its next tick at the latest, and calls no other: for what
/// guests cause all the time.
pub fn submit_here(job: Job) {
    job::enqueue(job);
    call(cpu::index());
}

/// Gives the CPUs a job that begins when the count is `due`: this CPU's timer sees to that, and any other's that is set
/// meanwhile.
pub fn submit_at(due: u64, job: Job) {
    job::enqueue_at(due, job);
    call(cpu::index());
}

/// The alarm of a VM's clock was set: the CPU that watches it sets its timer anew.
pub fn alarm_set(vm: &Vm) {
    if let Some(first) = vm.vcpus().first() {
        call(first.home.load(Relaxed));
    }
}

/// Something changed for `vcpu`: it is woken if it waits, and looked at if it runs.
pub fn wake(vcpu: &'static Vcpu) {
    let mut run = vcpu.run.lock();
    match *run {
        Run::Blocked => make_ready(vcpu, &mut run),
        Run::Running => {
            let home = vcpu.home.load(Relaxed);
            drop(run);
            kick_cpu(home);
        }
        Run::Off | Run::Starting | Run::Queued | Run::Parked | Run::Stalled => {}
    }
}

/// The throttle may answer a vCPU otherwise by now: if it waits for its quota or runs, it asks again.
pub fn ask_again(vcpu: &'static Vcpu) {
    vcpu.requests.make(Request::Schedule);
    let mut run = vcpu.run.lock();
    match *run {
        Run::Stalled => {
            vcpu.end_stall(&mut run);
            make_ready(vcpu, &mut run);
        }
        Run::Running => {
            let home = vcpu.home.load(Relaxed);
            drop(run);
            kick_cpu(home);
        }
        Run::Off | Run::Starting | Run::Blocked | Run::Queued | Run::Parked => {}
    }
}

/// Puts a vCPU that may run into its CPU's queue, or aside if its VM is paused.
pub fn make_ready(vcpu: &'static Vcpu, run: &mut Run) {
    if vcpu.vm.is_held() {
        *run = Run::Parked;
        return;
    }
    *run = if *run == Run::Off {
        Run::Starting
    } else {
        Run::Queued
    };
    let home = vcpu.home.load(Relaxed);
    QUEUES[home].lock().push_back(vcpu);
    // Whoever runs there now must not keep the CPU past a slice.
    call(home);
}

/// Wakes the vCPUs of `vm` that the vGIC named.
#[inline]
pub fn kick(vcpu: &'static Vcpu, kick: Kick) {
    if kick.is_none() {
        return;
    }
    if kick.contains(vcpu.index) {
        // Its own is seen to before the guest goes on.
        vcpu.requests.make(Request::Sync);
    }
    kick_others(vcpu, kick);
}

/// Wakes the other vCPUs among them: most often there is none.
#[inline]
fn kick_others(vcpu: &'static Vcpu, kick: Kick) {
    let others = kick.without(vcpu.index);
    if !others.is_none() {
        raise(vcpu.vm, others);
    }
}

/// The same from anywhere but an exit of one of them.
#[inline(never)]
pub fn raise(vm: &'static Vm, kick: Kick) {
    for index in kick.iter() {
        if let Some(vcpu) = vm.vcpus().get(index.index()) {
            vcpu.requests.make(Request::Sync);
            wake(vcpu);
        }
    }
}

/// Brings a loaded vCPU's list registers up to date.
#[inline]
pub fn sync(vcpu: &'static Vcpu) {
    if vcpu.needs_sync() {
        sync_always(vcpu);
    }
}

/// The same, whether or not something is known to be new: for the maintenance interrupt.
pub fn sync_always(vcpu: &'static Vcpu) {
    let others = vcpu.sync();
    if !others.is_none() {
        raise(vcpu.vm, others);
    }
}

/// Sees to what is asked of a vCPU.
pub fn attend(vcpu: &'static Vcpu) -> Decision {
    // First: it may hand an interrupt to a vCPU that then waits for this CPU, which is a request. One that comes from
    // another CPU meanwhile has its kick behind it.
    sync(vcpu);
    if vcpu.requests.take() == Taken::SyncAtMost {
        return Decision::GoOn;
    }
    let mut run = vcpu.run.lock();
    if *run == Run::Running {
        // Under the lock, as everywhere: a resume either finds the vCPU parked or is seen here.
        if vcpu.vm.is_held() {
            leave(vcpu, &mut run, Run::Parked);
        } else if let Turn::StallUntil(end) = next_turn(vcpu) {
            leave(vcpu, &mut run, Run::Stalled);
            vcpu.begin_stall(&mut run, end);
        } else if slice_is_over() {
            leave(vcpu, &mut run, Run::Queued);
            QUEUES[cpu::index()].lock().push_back(vcpu);
        } else {
            drop(run);
            arm_timer();
            return Decision::GoOn;
        }
    }
    Decision::Left
}

/// Whether another vCPU waits for this CPU and the running one has had its time.
fn slice_is_over() -> bool {
    if QUEUES[cpu::index()].lock().is_empty() {
        return false;
    }
    let now = timer::now();
    if SLICE_END.get() == NEVER {
        SLICE_END.set(now + timer::ticks(SLICE));
    }
    now >= SLICE_END.get()
}

/// Asks the throttle for the running vCPU's next turn, if it has to do with it at all.
fn next_turn(vcpu: &'static Vcpu) -> Turn {
    if TURN_END.get() == NEVER && !vcpu.vm.quota.is_set() {
        return Turn::Free;
    }
    turn(vcpu, Count(timer::now()))
}

/// Asks the throttle for a vCPU's turn on this CPU.
fn turn(vcpu: &'static Vcpu, now: Count) -> Turn {
    let turn = vcpu.meter.pace(vcpu.vm.quota.duty(), now);
    TURN_END.set(match turn {
        Turn::Until(end) => end.0,
        Turn::Free | Turn::StallUntil(_) => NEVER,
    });
    turn
}

/// A vCPU leaves its CPU. What it wrote, and what the hardware noted of it, is seen by all
/// before anyone can see that it left (invariant 13: a barrier on its own CPU, before a
/// last harvest trusts the tables).
fn leave(vcpu: &'static Vcpu, run: &mut Run, to: Run) {
    barrier::dsb_sy();
    vcpu.meter.left(Count(timer::now()));
    *run = to;
}

/// The vCPU waits for an interrupt: its CPU goes to another, or idles.
pub fn block(vcpu: &'static Vcpu) {
    {
        let mut run = vcpu.run.lock();
        if *run == Run::Running {
            leave(vcpu, &mut run, Run::Blocked);
        }
    }
    // A sender that saw it running before this only kicked; look again (D: state, then
    // `run`; here: `run`, then state).
    sync_always(vcpu);
    if vcpu.vm.vgic.has_deliverable(vcpu.index) {
        wake(vcpu);
    }
}

/// The vCPU may dirty no page for now: its CPU goes to another, or idles.
pub fn stall(vcpu: &'static Vcpu) -> Decision {
    let mut run = vcpu.run.lock();
    // Asked again, under the lock: a limit that changes meanwhile is seen here, or finds it waiting.
    let verdict = match vcpu.vm.quota.limit() {
        Some(limit) => vcpu.meter.admit(limit, Count(timer::now())),
        None => Verdict::Go,
    };
    let Verdict::StallUntil(end) = verdict else {
        return Decision::GoOn;
    };
    if *run == Run::Running {
        leave(vcpu, &mut run, Run::Stalled);
        vcpu.begin_stall(&mut run, end);
    }
    Decision::Left
}

/// The vCPU is off, or its VM has ended: it does not come back by itself.
pub fn turn_off(vcpu: &'static Vcpu) {
    kick_others(vcpu, vcpu.withdraw());
    leave(vcpu, &mut vcpu.run.lock(), Run::Off);
}

/// The next vCPU for this CPU, loaded and marked as running. If there is none, EL2's timer is set for what may come.
pub fn pick() -> Option<&'static Vcpu> {
    let Some(vcpu) = take_ready() else {
        SLICE_END.set(NEVER);
        TURN_END.set(NEVER);
        arm_timer();
        return None;
    };
    switch_to(vcpu);
    Some(vcpu)
}

/// The next ready vCPU of this CPU that may run, marked as running.
fn take_ready() -> Option<&'static Vcpu> {
    loop {
        let vcpu = QUEUES[cpu::index()].lock().pop_front()?;
        let mut run = vcpu.run.lock();
        // Before a look at what they may be about. Who made one and then finds it running, under this lock, made it
        // after this, and it is there when the kick comes; who made it before is heard here.
        vcpu.requests.take();
        match *run {
            // No change waited for it: it did not run.
            Run::Queued | Run::Starting if vcpu.vm.is_held() => *run = Run::Parked,
            Run::Queued | Run::Starting => {
                let now = Count(timer::now());
                if let Turn::StallUntil(end) = turn(vcpu, now) {
                    vcpu.begin_stall(&mut run, end);
                    continue;
                }
                *run = Run::Running;
                vcpu.meter.entered(now);
                return Some(vcpu);
            }
            // Turned off, or parked, while it stood in the queue.
            _ => {}
        }
    }
}

fn switch_to(vcpu: &'static Vcpu) {
    let loaded = LOADED.get();
    let same = loaded.is_some_and(|loaded| core::ptr::eq(loaded, vcpu));
    if !same || vcpu.must_be_loaded() {
        if let Some(loaded) = loaded {
            loaded.unload();
        }
        vcpu.load();
        if vcpu.follows_another() {
            // Two vCPUs of a VM share its VMID, and each takes this CPU's TLB for its own.
            tlb::vmalle1();
            barrier::dsb_nsh();
            barrier::isb();
        }
        LOADED.set(Some(vcpu));
        if let Some(cpu) = cpu::current() {
            cpu.set_context(&vcpu.context);
        }
    }
    sync_always(vcpu);
    let alone = QUEUES[cpu::index()].lock().is_empty();
    SLICE_END.set(if alone {
        NEVER
    } else {
        timer::now() + timer::ticks(SLICE)
    });
    arm_timer();
}

/// Sets EL2's timer for whatever this CPU must not miss.
fn arm_timer() {
    let mut deadline = SLICE_END.get().min(TURN_END.get()).min(job::earliest());
    if job::waiting() {
        // Absolute: a guest that exits often must not push it ahead for ever.
        if JOB_DUE.get() == NEVER {
            JOB_DUE.set(timer::now() + timer::ticks(JOB_TICK));
        }
        deadline = deadline.min(JOB_DUE.get());
    }
    let loaded = LOADED.get();
    if let Some(physical) = loaded.and_then(|vcpu| vcpu.physical_timer.lock().deadline()) {
        deadline = deadline.min(physical);
    }
    for vcpu in HOMED[cpu::index()].lock().iter() {
        deadline = deadline.min(vcpu.next_deadline());
    }
    timer::set_deadline((deadline != NEVER).then_some(deadline));
}

/// EL2's timer fired, which is not set any more: the running vCPU and the CPU are looked at, and the timer is set anew.
pub fn timer_fired() {
    timer::set_deadline(None);
    JOB_DUE.set(NEVER);
    if let Some(loaded) = LOADED.get() {
        loaded.requests.make(Request::Schedule);
    }
}

/// Some of the vCPUs of this CPU whose [`Vcpu::next_deadline`] has come. The timer fires again for more.
pub fn due(now: u64) -> impl Iterator<Item = &'static Vcpu> {
    let mut due: [Option<&'static Vcpu>; 8] = [None; 8];
    let homed = HOMED[cpu::index()].lock();
    let late = homed.iter().filter(|vcpu| vcpu.next_deadline() <= now);
    for (place, vcpu) in due.iter_mut().zip(late) {
        *place = Some(vcpu);
    }
    due.into_iter().flatten()
}
