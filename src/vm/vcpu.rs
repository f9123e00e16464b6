//! A vCPU: its registers while it does not run, and where it stands with the scheduler.

use super::Vm;
use crate::arch::context;
use crate::arch::cpu;
use crate::arch::el1::{self, CounterReads, El1State};
use crate::arch::gic::{self, VirtualInterface, Watch};
use crate::arch::lock::{Mutex, rank};
use crate::arch::timer::NEVER;
use crate::arch::{barrier, timer, tlb};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering::*};
use tidemark_devices::guest_time;
use tidemark_devices::psci::PowerState;
use tidemark_devices::vgic::{Kick, Link, ListRegisters, Shortage};
use tidemark_devices::virt::{PHYSICAL_TIMER, VIRTUAL_TIMER};
use tidemark_devices::{Level, VcpuIndex};
use tidemark_sched::{Entity, RunState};
use tidemark_stage2::{Flush, Meter};

/// A vCPU's general registers, which know whose they are.
pub type Context = context::Context<Vcpu>;

/// A vCPU.
pub struct Vcpu {
    /// Its general registers.
    pub context: Context,
    /// Whose it is.
    pub vm: &'static Vm,
    /// Which one of the VM's.
    pub index: VcpuIndex,
    /// Where it stands with the scheduler, and what is asked of it.
    pub entity: Entity,
    /// The rest of its state, while another vCPU is loaded on its CPU.
    saved: Mutex<Saved, { rank::SAVED }>,
    /// What its saved state is to what its CPU still holds of it.
    saved_is: AtomicU8,
    /// When its timers want it awake, as a physical count, while it is not loaded.
    pub deadline: AtomicU64,
    /// The emulated physical timer.
    pub physical_timer: Mutex<PhysicalTimer, { rank::PHYSICAL_TIMER }>,
    /// What it dirtied, ran and waited. Written with its run state held, and by the CPU that it runs on.
    pub meter: Meter,
}

/// What PSCI says of a vCPU that stands there.
pub const fn power(run: RunState) -> PowerState {
    match run {
        RunState::Off => PowerState::Off,
        RunState::Starting => PowerState::OnPending,
        RunState::Blocked
        | RunState::Queued
        | RunState::Running
        | RunState::Paused
        | RunState::Stalled => PowerState::On,
    }
}

/// CNTP as the guest sees it; EL2 keeps the hardware's for itself.
#[derive(Clone, Copy, Debug)]
pub struct PhysicalTimer {
    /// CNTP_CTL without ISTATUS.
    pub control: u64,
    /// CNTP_CVAL.
    pub compare: u64,
    /// Its interrupt is raised already.
    pub raised: bool,
    /// When it fires, as the machine's count.
    deadline: u64,
}

impl PhysicalTimer {
    const RESET: Self = Self {
        control: 0,
        compare: 0,
        raised: false,
        deadline: NEVER,
    };

    /// When it fires as the machine's count, if it is yet to.
    pub fn deadline(&self) -> Option<u64> {
        (self.deadline != NEVER).then_some(self.deadline)
    }

    /// Sets that anew, after a change of anything else. The guest's counter has this offset.
    pub fn arm(&mut self, offset: u64) {
        self.deadline = if self.control & 0b11 == 0b01 && !self.raised {
            guest_time::deadline(self.compare, offset)
        } else {
            NEVER
        };
    }

    /// It does not fire until it is armed again.
    pub fn stop(&mut self) {
        self.deadline = NEVER;
    }
}

/// What the CPU holds of a vCPU, if anything, is newer than what is saved.
const OLDER: u8 = 0;
/// It is not to be kept: the saved state was set anew.
const RESET_SINCE: u8 = 1;
/// It is to be kept, but for the offsets of its counters.
const TIME_MOVED: u8 = 2;

struct Saved {
    el1: El1State,
    interface: VirtualInterface,
    list_registers: [u64; 16],
}

impl Vcpu {
    /// A vCPU that is off; `None` past the most that a VM may have.
    pub fn new(vm: &'static Vm, index: usize) -> Option<Self> {
        Some(Self {
            context: Context::new(),
            vm,
            index: VcpuIndex::new(index)?,
            entity: Entity::new(),
            saved: Mutex::new(Saved {
                el1: El1State::reset(),
                interface: VirtualInterface::default(),
                list_registers: [0; 16],
            }),
            saved_is: AtomicU8::new(OLDER),
            deadline: AtomicU64::new(NEVER),
            physical_timer: Mutex::new(PhysicalTimer::RESET),
            meter: Meter::new(),
        })
    }

    /// Gives it the state of a CPU that PSCI turns on. It does not run.
    pub fn reset(&self, entry: u64, context: u64) {
        let mut saved = self.saved.lock();
        saved.el1 = El1State::reset();
        saved.interface = VirtualInterface::default();
        // Nothing is listed: a vCPU that turns off gives its list registers back, and a
        // restart of the VM clears the books.
        saved.list_registers = [0; 16];
        self.context.reset(entry, context);
        {
            let mut timer = self.physical_timer.lock();
            *timer = PhysicalTimer::RESET;
            // It does not run, so nobody is to be told.
            let _ = self.vm.vgic.lower_ppi(self.index, PHYSICAL_TIMER);
        }
        self.deadline.store(NEVER, Relaxed);
        self.saved_is.store(RESET_SINCE, Release);
    }

    /// Takes its state out of this CPU, where it was loaded.
    pub fn unload(&self) {
        // First the lock, then the question: a reset takes the same one.
        let mut saved = self.saved.lock();
        if self.is_fresh() {
            // It was reset since: what the CPU holds is of an earlier life.
            El1State::discard();
            VirtualInterface::save();
            release_timer();
            return;
        }
        saved.el1.save();
        for n in 0..gic::list_register_count() {
            saved.list_registers[n] = gic::read_list_register(n);
        }
        saved.interface = VirtualInterface::save();
        release_timer();
        let (control, compare) = saved.el1.virtual_timer();
        let deadline = if control & 0b11 == 0b01 {
            guest_time::deadline(compare, self.vm.counter_offset.load(Relaxed))
        } else {
            NEVER
        };
        drop(saved);
        let physical = self.physical_timer.lock().deadline().unwrap_or(NEVER);
        self.deadline.store(deadline.min(physical), Relaxed);
    }

    /// Puts its state into this CPU.
    pub fn load(&self) {
        let saved = self.saved.lock();
        self.saved_is.store(OLDER, Relaxed);
        // What ran here before is complete: there was a barrier when it left (`Machine::publish`).
        let (vttbr, flush) = self
            .vm
            .memory
            .stage2()
            .load(cpu::index())
            .expect("a CPU without a place among the VMIDs");
        el1::set_vm(
            vttbr,
            // RES1 bit 31; a CPU of a multiprocessor.
            1 << 31 | self.index.affinity(),
            self.vm.counter_offset.load(Relaxed),
            match self.vm.physical_offset.load(Relaxed) {
                0 => CounterReads::Direct,
                _ => CounterReads::Trap,
            },
        );
        if flush == Flush::Local {
            // Before there are walks again (`set_vm`).
            tlb::forget_all();
        }
        saved.interface.load();
        for n in 0..gic::list_register_count() {
            if let Some(physical) = hardware_link(saved.list_registers[n]) {
                crate::platform::gic().set_private_active(physical);
            }
            gic::write_list_register(n, saved.list_registers[n]);
        }
        saved.interface.enable();
        saved.el1.load();
        self.deadline.store(NEVER, Relaxed);
    }

    /// When its VM's clock is to be looked at, as a physical count, if this vCPU's CPU is the one
    /// that does.
    pub fn alarm(&self) -> u64 {
        if self.index.index() == 0 {
            self.vm.alarm.load(Relaxed)
        } else {
            NEVER
        }
    }

    /// When its CPU has something to do for it, as a physical count.
    pub fn next_deadline(&self) -> u64 {
        self.deadline
            .load(Relaxed)
            .min(self.alarm())
            .min(self.entity.stall_end())
    }

    /// Notes that this CPU now runs it; says whether the last vCPU of its VM here was another.
    pub fn follows_another(&self) -> bool {
        let mine = self.index.index() as u8 + 1;
        let last = &self.vm.last_on[cpu::index()];
        let before = last.load(Relaxed);
        last.store(mine, Relaxed);
        before != 0 && before != mine
    }

    /// Whether it was reset since it was loaded: what its CPU holds is of an earlier life.
    pub fn is_fresh(&self) -> bool {
        self.saved_is.load(Acquire) == RESET_SINCE
    }

    /// Whether its state must be loaded although this CPU has it loaded.
    pub fn must_be_loaded(&self) -> bool {
        self.saved_is.load(Acquire) != OLDER
    }

    /// Whether something is known to be new for its list registers.
    #[inline]
    pub fn needs_sync(&self) -> bool {
        self.vm.vgic.needs_sync(self.index)
    }

    /// Brings its list registers up to date. It is loaded on this CPU. Gives who else is to be kicked.
    #[inline]
    pub fn sync(&self) -> Kick {
        if self.is_fresh() {
            // Reset since it was loaded: what these list registers hold is of an earlier life.
            return Kick::NONE;
        }
        let kick = self.vm.vgic.sync(self.index, &mut LiveListRegisters);
        kick.without(self.index)
    }

    /// An interrupt that waits in its list registers goes to another vCPU or back to the books. Gives who is to be kicked.
    pub fn withdraw(&self) -> Kick {
        let kick = self.vm.vgic.withdraw(self.index, &mut LiveListRegisters);
        kick.without(self.index)
    }

    /// Its virtual timer fired, as the physical interrupt `intid`. It is loaded on this CPU, running or waiting.
    pub fn virtual_timer_fired(&self, intid: u32) -> Kick {
        let link = Link::Hardware(intid as u16);
        self.vm.vgic.raise_ppi(self.index, VIRTUAL_TIMER, link)
    }

    /// Its VM's time stands still. It does not run, and its virtual timer is looked at before that has an effect; the physical
    /// one is EL2's to fire.
    pub fn time_stops(&self) {
        self.physical_timer.lock().stop();
    }

    /// Its VM's time goes on, later by the machine's count.
    pub fn time_goes_on(&self) {
        let mut timer = self.physical_timer.lock();
        timer.arm(self.vm.physical_offset.load(Relaxed));
        drop(timer);
        // A reset sets the counters as well.
        let _ = self
            .saved_is
            .compare_exchange(OLDER, TIME_MOVED, AcqRel, Relaxed);
    }

    /// What PSCI says of it.
    pub fn power(&self) -> PowerState {
        power(*self.entity.run())
    }
}

/// Lets the virtual timer fire for the next vCPU. It is active as long as this one has not
/// ended its interrupt, which may be in a list register, wait for one, or have been
/// forgotten by a reset.
fn release_timer() {
    crate::platform::gic().clear_private_active(crate::platform::interrupts().virtual_timer);
}

/// The physical interrupt that a list register holds active, if it does.
fn hardware_link(register: u64) -> Option<u32> {
    (register >> 61 & 1 == 1 && register >> 62 != 0).then_some((register >> 32 & 0x1fff) as u32)
}

/// The list registers of the vCPU that is loaded on this CPU.
struct LiveListRegisters;

impl ListRegisters for LiveListRegisters {
    #[inline]
    fn count(&self) -> usize {
        gic::list_register_count()
    }

    #[inline]
    fn empty(&self) -> u32 {
        // Another register than those that may have been written since the guest ran (a load, an earlier sync), and
        // nothing orders the two but a context synchronization.
        barrier::isb();
        gic::empty_list_registers()
    }

    #[inline]
    fn read(&self, n: usize) -> u64 {
        gic::read_list_register(n)
    }

    #[inline]
    fn write(&mut self, n: usize, value: u64) {
        gic::write_list_register(n, value);
    }

    fn set_shortage(&mut self, shortage: Shortage) {
        gic::watch(match shortage {
            Shortage::None => Watch::NOTHING,
            Shortage::Pending => Watch::PENDING,
            Shortage::Active => Watch::ends(),
            Shortage::Both => Watch::PENDING.and(Watch::ends()),
        });
    }

    fn take_ended(&mut self) -> u32 {
        gic::take_ended()
    }

    fn deactivate(&mut self, physical: u16) {
        gic::deactivate(u32::from(physical));
    }

    /// The virtual timer's is the only one that is linked.
    fn physical_line(&self, _: u16) -> Level {
        match timer::virtual_line_is_high() {
            true => Level::High,
            false => Level::Low,
        }
    }
}
