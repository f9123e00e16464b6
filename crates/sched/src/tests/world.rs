//! A machine of two CPUs, the vCPUs of one VM on it, and what must be so at the end.

use crate::*;
use std::boxed::Box;
use std::cell::Cell;
use std::sync::atomic::{
    AtomicBool as Plain, AtomicU64 as PlainU64, AtomicUsize, Ordering::SeqCst,
};
use std::sync::{Mutex, OnceLock};
use std::vec::Vec;
use tidemark_orders::traced::{self, AtomicBool};
use tidemark_orders::{Program, in_every_order};

pub const CPUS: usize = 2;
/// No CPU.
const NOWHERE: usize = usize::MAX;

std::thread_local! {
    /// The CPU that acts where no program runs.
    static ALONE: Cell<usize> = const { Cell::new(NOWHERE) };
}

/// What a guest does the next time it is in its vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// WFI.
    Block,
    /// CPU_OFF.
    TurnOff,
    /// CPU_ON of this vCPU.
    TurnOn(usize),
    /// SYSTEM_RESET.
    Reset,
    /// A write that its quota may forbid.
    Write,
}

pub struct TestVcpu {
    entity: Entity,
    vm: OnceLock<&'static TestVm>,
    script: Mutex<Vec<Act>>,
    /// An interrupt that is not delivered yet.
    pub interrupt: AtomicBool,
    /// Its quota is used up.
    pub exhausted: AtomicBool,
    /// It gets no turn.
    pub paced: AtomicBool,
    /// Its timers have to be set anew.
    pub stale: Plain,
    /// The CPU that runs it.
    on: AtomicUsize,
    /// The CPU has written for it what is not seen by all.
    unpublished: Plain,
    stalled: Plain,
    /// How often it came onto its CPU.
    pub entries: PlainU64,
    /// How often it got its first state.
    pub resets: PlainU64,
}

pub struct TestVm {
    lifecycle: Lifecycle,
    vcpus: Vec<TestVcpu>,
    /// Its time stands still.
    still: Plain,
    /// Runs of it that were loaded.
    pub starts: PlainU64,
    /// It is to be loaded.
    load: AtomicBool,
}

#[derive(Default)]
pub struct TestMachine {
    kicks: [AtomicBool; CPUS],
    loaded: [Mutex<Option<&'static TestVcpu>>; CPUS],
}

impl TestMachine {
    fn loaded_on(&self, cpu: usize) -> Option<&'static TestVcpu> {
        *self.loaded[cpu].lock().unwrap()
    }
}

impl Machine<TestVcpu> for TestMachine {
    fn cpu(&self) -> usize {
        match ALONE.get() {
            NOWHERE => traced::cpu(),
            cpu => cpu,
        }
    }

    fn now(&self) -> u64 {
        0
    }

    fn kick(&self, cpu: usize) {
        self.kicks[cpu].store(true, SeqCst);
    }

    fn publish(&self) {
        if let Some(loaded) = self.loaded() {
            loaded.unpublished.store(false, SeqCst);
        }
    }

    fn loaded(&self) -> Option<&'static TestVcpu> {
        self.loaded_on(self.cpu())
    }

    fn slice_is_over(&self) -> bool {
        true
    }
}

impl Vcpu for TestVcpu {
    type Vm = TestVm;

    fn entity(&self) -> &Entity {
        &self.entity
    }

    fn vm(&self) -> &'static TestVm {
        self.vm.get().unwrap()
    }

    fn turn(&self) -> Turn {
        match self.paced.load(SeqCst) {
            true => Turn::StallUntil(1),
            false => Turn::Go,
        }
    }

    fn admit(&self, _: u64) -> Turn {
        match self.exhausted.load(SeqCst) {
            true => Turn::StallUntil(1),
            false => Turn::Go,
        }
    }

    fn entered(&self, _: u64) {
        self.entries.fetch_add(1, SeqCst);
    }

    fn left(&self, _: u64) {}

    fn stall_began(&self, _: u64) {
        assert!(!self.stalled.swap(true, SeqCst), "it waits already");
    }

    fn stall_ended(&self, _: u64) {
        assert!(self.stalled.swap(false, SeqCst), "it does not wait");
    }

    fn has_interrupt(&self) -> bool {
        self.interrupt.load(SeqCst)
    }

    fn must_be_loaded(&self) -> bool {
        self.stale.load(SeqCst)
    }
}

impl Vm for TestVm {
    type Vcpu = TestVcpu;

    fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    fn vcpus(&self) -> &[TestVcpu] {
        &self.vcpus
    }

    fn paused(&self, _: u64) {
        self.require_stillness("it is paused");
        self.still.store(true, SeqCst);
    }

    fn resumed(&self, _: u64) {
        self.require_stillness("it is not resumed yet");
        self.still.store(false, SeqCst);
    }

    fn started(&self, _: u64) {
        self.require_stillness("it is not started yet");
        self.still.store(false, SeqCst);
        self.starts.fetch_add(1, SeqCst);
    }
}

impl TestVm {
    fn require_stillness(&self, why: &str) {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            assert_eq!(
                vcpu.on.load(SeqCst),
                NOWHERE,
                "vCPU {index} runs, and {why}"
            );
            assert!(
                !vcpu.unpublished.load(SeqCst),
                "vCPU {index}: not seen by all, and {why}"
            );
        }
    }
}

/// Two CPUs and a VM whose vCPUs are at home on them in turn.
pub struct World {
    pub sched: Scheduler<TestVcpu, TestMachine, CPUS>,
    pub vm: &'static TestVm,
}

impl World {
    /// A VM whose vCPUs have these scripts, not started.
    pub fn new(scripts: &[&[Act]]) -> Self {
        let vcpu = |script: &&[Act]| TestVcpu {
            entity: Entity::new(),
            vm: OnceLock::new(),
            script: Mutex::new(script.iter().rev().copied().collect()),
            interrupt: AtomicBool::new(false),
            exhausted: AtomicBool::new(false),
            paced: AtomicBool::new(false),
            stale: Plain::new(false),
            on: AtomicUsize::new(NOWHERE),
            unpublished: Plain::new(false),
            stalled: Plain::new(false),
            entries: PlainU64::new(0),
            resets: PlainU64::new(0),
        };
        let vm: &'static TestVm = Box::leak(Box::new(TestVm {
            lifecycle: Lifecycle::new("not started".into()),
            vcpus: scripts.iter().map(vcpu).collect(),
            still: Plain::new(true),
            starts: PlainU64::new(0),
            load: AtomicBool::new(false),
        }));
        for (index, vcpu) in vm.vcpus.iter().enumerate() {
            assert!(vcpu.vm.set(vm).is_ok());
            vcpu.entity.set_home(index % CPUS);
        }
        Self {
            sched: Scheduler::new(TestMachine::default()),
            vm,
        }
    }

    /// One that runs: each vCPU is on.
    pub fn running(scripts: &[&[Act]]) -> Self {
        Self::partly_running(scripts, scripts.len())
    }

    /// One that runs, and so many of its vCPUs are on.
    pub fn partly_running(scripts: &[&[Act]], on: usize) -> Self {
        let world = Self::new(scripts);
        world.alone(0, || {
            world.sched.start(world.vm).unwrap();
            world.follow(world.sched.loaded(world.vm));
            for index in 1..on {
                world.turn_on(index);
            }
        });
        world
    }

    /// Does something as this CPU, while no program runs.
    pub fn alone<R>(&self, cpu: usize, with: impl FnOnce() -> R) -> R {
        ALONE.set(cpu);
        let value = with();
        ALONE.set(NOWHERE);
        value
    }

    /// What the room above does when a transition is complete.
    pub fn follow(&self, completed: Option<Completed>) {
        // A pause may be taken back by now.
        if !matches!(completed, None | Some(Completed::Paused)) {
            self.vm.require_stillness("its run is over");
        }
        if completed == Some(Completed::Reset) {
            self.vm.load.store(true, SeqCst);
        }
    }

    /// Loads the VM, if it is to be.
    fn load(&self) {
        if self.vm.load.swap(false, SeqCst) {
            self.follow(self.sched.loaded(self.vm));
        }
    }

    pub fn vcpu(&self, index: usize) -> &'static TestVcpu {
        &self.vm.vcpus[index]
    }

    pub fn run_state(&self, index: usize) -> RunState {
        *self.vcpu(index).entity.run()
    }

    pub fn state(&self) -> State {
        self.vm.lifecycle.status().state
    }

    fn turn_on(&self, index: usize) {
        let vcpu = self.vcpu(index);
        let may = |run| run == RunState::Off;
        self.sched.turn_on(vcpu, may, || {
            assert_eq!(vcpu.on.load(SeqCst), NOWHERE, "it is reset while it runs");
            vcpu.resets.fetch_add(1, SeqCst);
        });
    }

    /// An interrupt comes for a vCPU, as from a device.
    pub fn interrupt(&self, index: usize) {
        let vcpu = self.vcpu(index);
        vcpu.interrupt.store(true, SeqCst);
        vcpu.entity.requests.make(Request::Sync);
        self.sched.wake(vcpu);
    }

    /// The quota is lifted.
    pub fn lift(&self, index: usize) {
        let vcpu = self.vcpu(index);
        vcpu.exhausted.store(false, SeqCst);
        vcpu.paced.store(false, SeqCst);
        self.sched.ask_again(vcpu);
    }

    pub fn pause(&self) {
        if let Ok(completed) = self.sched.pause(self.vm, Hold::Lasting) {
            self.follow(completed);
        }
    }

    pub fn resume(&self) {
        let _ = self.sched.resume(self.vm, Hold::Lasting);
    }

    pub fn request(&self, transition: Transition) {
        if let Ok(completed) = self.sched.request(self.vm, transition, "asked for") {
            self.follow(completed);
        }
    }

    /// One CPU's loop, until it would wait with nothing to do, or stays in a guest that does nothing more.
    pub fn cpu(&self) {
        loop {
            let cpu = self.sched.machine.cpu();
            if let Some(vcpu) = self.sched.machine.loaded_on(cpu)
                && vcpu.on.load(SeqCst) == cpu
            {
                if !self.guest(vcpu) {
                    return;
                }
                continue;
            }
            let kicked = self.take_kick();
            self.load();
            match self.sched.take() {
                Some(vcpu) => {
                    assert_eq!(vcpu.on.swap(cpu, SeqCst), NOWHERE, "two CPUs run one vCPU");
                    assert!(
                        !vcpu.vm().still.load(SeqCst),
                        "it runs while its time stands still"
                    );
                    *self.sched.machine.loaded[cpu].lock().unwrap() = Some(vcpu);
                    self.deliver(vcpu);
                }
                None if kicked => {}
                None => return,
            }
        }
    }

    fn take_kick(&self) -> bool {
        let cpu = self.sched.machine.cpu();
        let kicked = self.sched.machine.kicks[cpu].swap(false, SeqCst);
        if kicked {
            self.sched.kicked();
        }
        kicked
    }

    fn deliver(&self, vcpu: &'static TestVcpu) {
        vcpu.interrupt.store(false, SeqCst);
    }

    /// In the guest, until it leaves its CPU. False: it has nothing more to do, and nobody calls it.
    fn guest(&self, vcpu: &'static TestVcpu) -> bool {
        loop {
            traced::breathe();
            vcpu.unpublished.store(true, SeqCst);
            let kicked = self.take_kick();
            if kicked {
                // An interrupt of EL2's is an exit, and each such exit looks.
                self.deliver(vcpu);
            }
            let act = match kicked {
                true => None,
                false => vcpu.script.lock().unwrap().pop(),
            };
            if !kicked && act.is_none() {
                return false;
            }
            let decision = match act {
                None => Decision::GoOn,
                Some(Act::Block) => {
                    vcpu.on.store(NOWHERE, SeqCst);
                    self.sched.block(vcpu, || {});
                    Decision::Left
                }
                Some(Act::TurnOff) => {
                    vcpu.on.store(NOWHERE, SeqCst);
                    self.sched.turn_off(vcpu);
                    Decision::Left
                }
                Some(Act::Write) => {
                    let decision = self.leaving(vcpu, || self.sched.stall(vcpu));
                    if decision == Decision::Left {
                        // It tries again.
                        vcpu.script.lock().unwrap().push(Act::Write);
                    }
                    decision
                }
                Some(Act::TurnOn(index)) => {
                    self.turn_on(index);
                    Decision::GoOn
                }
                Some(Act::Reset) => {
                    self.request(Transition::Reset);
                    Decision::GoOn
                }
            };
            if self.leaves(vcpu, decision) {
                return true;
            }
        }
    }

    /// The end of an exit. Says whether the vCPU has left its CPU.
    fn leaves(&self, vcpu: &'static TestVcpu, decision: Decision) -> bool {
        let decision = match decision {
            Decision::Left => Decision::Left,
            _ if !vcpu.entity.requests.any() => Decision::GoOn,
            _ => {
                self.deliver(vcpu);
                self.leaving(vcpu, || self.sched.attend(vcpu))
            }
        };
        let left = decision == Decision::Left;
        if left {
            self.follow(self.sched.left(vcpu.vm()));
        }
        left
    }

    /// Does something in an exit of whatever guest runs on this CPU, or while it idles.
    pub fn act(&self, with: impl FnOnce(&Self)) {
        with(self);
        let cpu = self.sched.machine.cpu();
        if let Some(vcpu) = self.sched.machine.loaded_on(cpu)
            && vcpu.on.load(SeqCst) == cpu
        {
            let _ = self.leaves(vcpu, Decision::GoOn);
        }
    }

    /// Does what the vCPU may leave its CPU by: others may take it at once.
    fn leaving(&self, vcpu: &'static TestVcpu, with: impl FnOnce() -> Decision) -> Decision {
        let cpu = vcpu.on.swap(NOWHERE, SeqCst);
        let decision = with();
        if decision != Decision::Left {
            assert_eq!(vcpu.on.swap(cpu, SeqCst), NOWHERE, "two CPUs run one vCPU");
        }
        decision
    }

    /// Lets all CPUs go on until nothing happens any more.
    pub fn settle(&self) {
        let machine = &self.sched.machine;
        for _ in 0..50 {
            for cpu in 0..CPUS {
                self.alone(cpu, || self.cpu());
            }
            let quiet = machine.kicks.iter().all(|kick| !kick.load(SeqCst));
            if quiet && !self.vm.load.load(SeqCst) {
                return self.require_order();
            }
        }
        panic!("it does not come to rest");
    }

    /// What must be so when nothing happens any more.
    fn require_order(&self) {
        let status = self.vm.lifecycle.status().clone();
        let held = self.vm.lifecycle.is_held();
        assert_eq!(status.pending, None, "nobody completes it");
        assert_eq!(held, status.state != State::Running, "{status:?}");
        let still = self.vm.still.load(SeqCst);
        match status.state {
            State::Running => assert!(!still, "its time stands still while it runs"),
            State::Paused => assert!(still, "its time goes on while it is paused"),
            State::Stopped | State::Starting | State::Failed => {}
        }
        for (index, vcpu) in self.vm.vcpus.iter().enumerate() {
            let run = self.run_state(index);
            let what = std::format!("vCPU {index} is {run:?}, its VM {:?}", status.state);
            match (status.state, run) {
                (State::Running, RunState::Paused | RunState::Queued | RunState::Starting) => {
                    // One more may wait for the CPU of a guest that never exits.
                    let running = |other: &&TestVcpu| other.on.load(SeqCst) == index % CPUS;
                    let waits = run != RunState::Paused
                        && self.vm.vcpus.iter().any(|other| running(&other));
                    assert!(waits, "{what}");
                }
                (State::Running, _) | (State::Paused, RunState::Off | RunState::Blocked) => {}
                (State::Paused, RunState::Paused | RunState::Queued | RunState::Starting) => {}
                (State::Stopped | State::Failed, RunState::Off) => {}
                _ => panic!("{what}"),
            }
            if run == RunState::Running {
                assert!(!vcpu.entity.requests.any(), "{what}: a request is lost");
                assert!(
                    !vcpu.interrupt.load(SeqCst),
                    "{what}: an interrupt is not delivered"
                );
            }
            if run == RunState::Blocked {
                assert!(!vcpu.interrupt.load(SeqCst), "{what}: it is not woken");
            }
            if run == RunState::Stalled {
                let waits = vcpu.exhausted.load(SeqCst) || vcpu.paced.load(SeqCst);
                assert!(waits, "{what}: it waits for nothing");
            }
        }
    }
}

/// Runs a scenario in every order and looks at each end.
pub fn orders(
    world: impl Fn() -> World,
    programs: impl for<'a> Fn(&'a World) -> Vec<Program<'a>>,
    mut conclude: impl FnMut(&World),
) {
    const USUAL: u32 = 2;
    let bound = std::env::var("TIDEMARK_INTERRUPTIONS")
        .ok()
        .and_then(|bound| bound.parse().ok())
        .unwrap_or(USUAL);
    let orders = in_every_order(bound, world, programs, |world| {
        world.settle();
        conclude(world);
    });
    std::eprintln!("{orders} orders");
    assert!(orders > 20 || bound < USUAL, "they do not meet: {orders}");
}
