//! Which vCPU a CPU runs: `crates/sched` on this machine, with its timers.
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

use crate::arch::cpu::{self, MAX_CPUS, PerCpu};
use crate::arch::lock::{Mutex, rank};
use crate::arch::timer::NEVER;
use crate::arch::{barrier, gic, timer, tlb};
use crate::task::job::{self, Job};
use crate::vm::Vm;
use crate::vm::vcpu::Vcpu;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tidemark_devices::vgic::Kick;
pub use tidemark_sched::Decision;
use tidemark_sched::{Entity, Lifecycle, Machine, Request, Scheduler, Turn};
use tidemark_stage2::{self as stage2, Count, Verdict};

/// The SGI that makes another CPU look at the requests of its vCPU, and at what it is called for.
pub const KICK: u32 = 0;

/// How long a vCPU runs while another waits for its CPU, in microseconds.
const SLICE: u64 = 4_000;
/// How often a busy CPU takes a step of a job, in microseconds.
const JOB_TICK: u64 = 1_000;

/// The scheduler.
pub static SCHEDULER: Scheduler<Vcpu, Cpus, MAX_CPUS> = Scheduler::new(Cpus);

/// All vCPUs whose home a CPU is.
static HOMED: [Mutex<Vec<&'static Vcpu>, { rank::HOMED }>; MAX_CPUS] =
    [const { Mutex::new(Vec::new()) }; MAX_CPUS];
/// The vCPU whose state is in this CPU's registers.
static LOADED: PerCpu<Option<&'static Vcpu>> = PerCpu::new(None);
/// When the running vCPU's slice ends.
static SLICE_END: PerCpu<u64> = PerCpu::new(NEVER);
/// When the running vCPU is to ask the throttle again.
static TURN_END: PerCpu<u64> = PerCpu::new(NEVER);
/// When this CPU takes its next step of a job although it is busy.
static JOB_DUE: PerCpu<u64> = PerCpu::new(NEVER);

/// This machine's CPUs.
pub struct Cpus;

impl Machine<Vcpu> for Cpus {
    #[inline]
    fn cpu(&self) -> usize {
        cpu::index()
    }

    #[inline]
    fn now(&self) -> u64 {
        timer::now()
    }

    #[inline]
    fn kick(&self, cpu: usize) {
        gic::send_sgi(KICK, cpu::affinity_of(cpu));
    }

    #[inline]
    fn publish(&self) {
        barrier::dsb_sy();
    }

    #[inline]
    fn loaded(&self) -> Option<&'static Vcpu> {
        LOADED.get()
    }

    fn slice_is_over(&self) -> bool {
        let now = timer::now();
        if SLICE_END.get() == NEVER {
            SLICE_END.set(now + timer::ticks(SLICE));
        }
        now >= SLICE_END.get()
    }
}

impl tidemark_sched::Vcpu for Vcpu {
    type Vm = Vm;

    #[inline]
    fn entity(&self) -> &Entity {
        &self.entity
    }

    #[inline]
    fn vm(&self) -> &'static Vm {
        self.vm
    }

    fn turn(&self) -> Turn {
        let turn = self.meter.pace(self.vm.quota.duty(), Count(timer::now()));
        TURN_END.set(match turn {
            stage2::Turn::Until(end) => end.0,
            stage2::Turn::Free | stage2::Turn::StallUntil(_) => NEVER,
        });
        match turn {
            stage2::Turn::Free | stage2::Turn::Until(_) => Turn::Go,
            stage2::Turn::StallUntil(end) => Turn::StallUntil(end.0),
        }
    }

    #[inline]
    fn next_turn(&self) -> Turn {
        if TURN_END.get() == NEVER && !self.vm.quota.is_set() {
            return Turn::Go;
        }
        self.turn()
    }

    fn admit(&self, now: u64) -> Turn {
        let verdict = match self.vm.quota.limit() {
            Some(limit) => self.meter.admit(limit, Count(now)),
            None => Verdict::Go,
        };
        match verdict {
            Verdict::Go => Turn::Go,
            Verdict::StallUntil(end) => Turn::StallUntil(end.0),
        }
    }

    #[inline]
    fn entered(&self, now: u64) {
        self.meter.entered(Count(now));
    }

    #[inline]
    fn left(&self, now: u64) {
        self.meter.left(Count(now));
    }

    fn stall_began(&self, now: u64) {
        self.meter.stall_began(Count(now));
    }

    fn stall_ended(&self, now: u64) {
        self.meter.stall_ended(Count(now));
    }

    #[inline]
    fn has_interrupt(&self) -> bool {
        self.vm.vgic.has_deliverable(self.index)
    }

    fn must_be_loaded(&self) -> bool {
        Self::must_be_loaded(self)
    }
}

impl tidemark_sched::Vm for Vm {
    type Vcpu = Vcpu;

    #[inline]
    fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    #[inline]
    fn vcpus(&self) -> &[Vcpu] {
        Self::vcpus(self)
    }

    fn paused(&self, now: u64) {
        self.time_stops(now);
    }

    fn resumed(&self, now: u64) {
        self.time_goes_on(now);
    }

    fn started(&self, now: u64) {
        self.time_begins(now);
    }
}

/// Gives a vCPU its home: CPUs in turn.
pub fn adopt(vcpu: &'static Vcpu) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let home = NEXT.fetch_add(1, Relaxed) % cpu::count();
    vcpu.entity.set_home(home);
    vcpu.context.set_owner(vcpu);
    HOMED[home].lock().push(vcpu);
}

/// The vCPU that this CPU just left.
#[inline]
pub fn current() -> Option<&'static Vcpu> {
    LOADED.get()
}

fn call(cpu: usize) {
    SCHEDULER.call(cpu);
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
        call(first.entity.home());
    }
}

/// Wakes the vCPUs of `vm` that the vGIC named.
#[inline]
pub fn kick(vcpu: &'static Vcpu, kick: Kick) {
    if kick.is_none() {
        return;
    }
    if kick.contains(vcpu.index) {
        // Its own is seen to before the guest goes on.
        vcpu.entity.requests.make(Request::Sync);
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
            vcpu.entity.requests.make(Request::Sync);
            SCHEDULER.wake(vcpu);
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

/// Sees to what is asked of a vCPU, at the end of an exit.
pub fn attend(vcpu: &'static Vcpu) -> Decision {
    sync(vcpu);
    let decision = SCHEDULER.attend(vcpu);
    if decision == Decision::Rearm {
        arm_timer();
    }
    decision
}

/// The vCPU waits for an interrupt, and has left its CPU.
pub fn block(vcpu: &'static Vcpu) {
    SCHEDULER.block(vcpu, || sync_always(vcpu));
}

/// The vCPU turned itself off, and has left its CPU.
pub fn turn_off(vcpu: &'static Vcpu) {
    kick_others(vcpu, vcpu.withdraw());
    SCHEDULER.turn_off(vcpu);
}

/// The next vCPU for this CPU, loaded and marked as running. If there is none, EL2's timer is set for what may come.
pub fn pick() -> Option<&'static Vcpu> {
    let Some(vcpu) = SCHEDULER.take() else {
        SLICE_END.set(NEVER);
        TURN_END.set(NEVER);
        arm_timer();
        return None;
    };
    switch_to(vcpu);
    Some(vcpu)
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
    let alone = SCHEDULER.is_alone(cpu::index());
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
        loaded.entity.requests.make(Request::Schedule);
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
