//! Virtual machines: what one is made of, and the table of them.
//!
//! A VM is made once, from the bundle's manifest, and stays in the table until the machine
//! stops; what starts and ends are its runs. The order of its locks is in ARCHITECTURE.md.

pub mod console;
pub mod exits;
pub mod flash;
pub mod id_registers;
pub mod memory;
pub mod random;
pub mod stage2;
pub mod vcpu;

use crate::arch::cpu::MAX_CPUS;
use crate::arch::lock::{Mutex, rank};
use crate::arch::timer;
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use flash::Flash;
use memory::GuestMemory;
use spin::{MutexGuard, Once};
use tidemark_devices::fw_cfg::{FwCfg, Kernel};
use tidemark_devices::guest_time::GuestTime;
use tidemark_devices::pl011::Pl011;
use tidemark_devices::pl031::{Pl031, UnixSeconds};
use tidemark_devices::random::Generator;
use tidemark_devices::vgic::Vgic;
use tidemark_ownership::Generation;
use tidemark_sched::{Lifecycle, Status};
use tidemark_stage2::Quota;
use tidemark_wire::bundle::{Boot, Clock, VmSpec};
use tidemark_wire::message::VmId;
use vcpu::Vcpu;

/// A guest and all that is kept for it.
pub struct Vm {
    /// Its number: its place in the table.
    pub id: VmId,
    /// What the manifest says of it.
    pub spec: VmSpec,
    /// Its memory, and how it is mapped.
    pub memory: GuestMemory,
    /// Its interrupt controller.
    pub vgic: Vgic,
    /// Its UART.
    pub uart: Mutex<Pl011, { rank::UART }>,
    /// Its clock.
    pub clock: Mutex<Pl031, { rank::CLOCK }>,
    /// Its flash, if it starts from firmware.
    pub flash: Option<Flash>,
    /// What it has to say to its firmware.
    pub fw_cfg: Option<Mutex<FwCfg, { rank::FW_CFG }>>,
    /// When the clock is to be looked at for its alarm, as a physical count: its first vCPU's
    /// CPU wakes for it.
    pub alarm: AtomicU64,
    /// What it wrote to its console, and what waits to be read there.
    pub console: console::GuestConsole,
    /// What each vCPU may dirty while a log is on. It stays until a host lifts it.
    pub quota: Quota,
    /// How it is, and why.
    pub lifecycle: Lifecycle,
    /// Where its counters are. Changed while its status is held.
    pub time: Mutex<GuestTime, { rank::TIME }>,
    /// The vCPU that ran last on each CPU: its index plus one, 0 for none.
    pub last_on: [AtomicU8; MAX_CPUS],
    /// What it has cost.
    pub counters: Counters,
    /// What the machine's count is ahead of its virtual counter. Changes only while none of its vCPUs runs, as `physical_offset`.
    pub counter_offset: AtomicU64,
    /// And of its physical one: zero, and then reads of it do not trap.
    pub physical_offset: AtomicU64,
    /// Its memory is its own: what the frames' last owner left was cleared. Before, nobody
    /// gets to see it.
    pub cleared: AtomicBool,
    /// The life that its frames are of; each restart is the next one.
    pub life: Mutex<Generation, { rank::LIFE }>,
    /// What its random numbers come from, another at each start.
    pub random: Mutex<Generator, { rank::RANDOM }>,
    vcpus: Once<Box<[Vcpu]>>,
}

/// What a VM has cost, counted as it happens.
#[derive(Debug, Default)]
pub struct Counters {
    /// HVC and SMC.
    pub hypercalls: AtomicU64,
    /// Device accesses.
    pub mmio: AtomicU64,
    /// WFI.
    pub wfi: AtomicU64,
    /// Physical interrupts while it ran.
    pub interrupts: AtomicU64,
    /// Other exits.
    pub others: AtomicU64,
    /// Stage-2 faults on its memory.
    pub faults: AtomicU64,
}

/// Adds one.
#[inline]
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

impl Vm {
    /// A VM with memory but without a run. `payload` is what its firmware is given to start.
    pub fn new(
        id: VmId,
        spec: VmSpec,
        memory: GuestMemory,
        payload: Option<Kernel<'static>>,
    ) -> &'static Self {
        let vcpus = usize::from(spec.vcpus);
        let flash = memory::FlashSize::of(&spec.boot);
        let flash = flash.map(|size| Flash::new(size.variables));
        let fw_cfg = match &spec.boot {
            Boot::Firmware(_) => Some(Mutex::new(FwCfg::new(spec.vcpus.into(), payload))),
            Boot::Kernel(_) => None,
        };
        let vm = Box::leak(Box::new(Self {
            id,
            memory,
            vgic: Vgic::new(vcpus),
            uart: Mutex::new(Pl011::new()),
            clock: Mutex::new(Pl031::new()),
            flash,
            fw_cfg,
            alarm: AtomicU64::new(timer::NEVER),
            console: console::GuestConsole::new(),
            quota: Quota::new(),
            lifecycle: Lifecycle::new("not started".into()),
            time: Mutex::new(GuestTime::new(timer::now())),
            last_on: [const { AtomicU8::new(0) }; MAX_CPUS],
            counters: Counters::default(),
            counter_offset: AtomicU64::new(0),
            physical_offset: AtomicU64::new(0),
            cleared: AtomicBool::new(false),
            life: Mutex::new(Generation::FIRST),
            random: Mutex::new(Generator::new()),
            vcpus: Once::new(),
            spec,
        }));
        let vm: &'static Self = vm;
        vm.vcpus
            .call_once(|| (0..vcpus).filter_map(|n| Vcpu::new(vm, n)).collect());
        vm
    }

    /// Its vCPUs.
    pub fn vcpus(&self) -> &[Vcpu] {
        self.vcpus.get().map_or(&[], |vcpus| vcpus)
    }

    /// How it is. Held, so that nobody changes it meanwhile.
    pub fn status(&self) -> MutexGuard<'_, Status> {
        self.lifecycle.status()
    }

    /// Its time begins. None of its vCPUs runs, here and in the two below.
    pub fn time_begins(&self, now: u64) {
        let time = GuestTime::new(now);
        self.publish_time(&time);
        *self.time.lock() = time;
    }

    /// Its time stands still, if the manifest says so of a pause.
    pub fn time_stops(&self, now: u64) {
        if self.spec.clock == Clock::Stop {
            self.time.lock().stop(now);
            self.vcpus().iter().for_each(Vcpu::time_stops);
        }
    }

    /// Its time goes on, if it stood still.
    pub fn time_goes_on(&self, now: u64) {
        let mut time = self.time.lock();
        if time.go_on(now) {
            self.publish_time(&time);
            self.vcpus().iter().for_each(Vcpu::time_goes_on);
        }
    }

    /// Gives the vCPUs the counters that it has by now.
    fn publish_time(&self, time: &GuestTime) {
        self.counter_offset.store(time.virtual_offset(), Relaxed);
        self.physical_offset.store(time.physical_offset(), Relaxed);
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }
}

static TABLE: Once<Box<[&'static Vm]>> = Once::new();

/// Makes the VMs known. Once, at boot.
pub fn publish(vms: Box<[&'static Vm]>) {
    TABLE.call_once(|| vms);
}

/// All VMs, by id.
pub fn all() -> &'static [&'static Vm] {
    TABLE.get().map_or(&[], |table| table)
}

/// The VM with this id.
pub fn by_id(id: VmId) -> Option<&'static Vm> {
    all().get(usize::from(id.0)).copied()
}

/// The VM that a person names: by name, or by number.
pub fn by_name(name: &str) -> Option<&'static Vm> {
    all()
        .iter()
        .find(|vm| vm.name() == name)
        .copied()
        .or_else(|| by_id(VmId(name.parse().ok()?)))
}

/// The time of day in the machine's clock when EL2 started, less the count then.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// Sets the time of day, in Unix seconds.
pub fn set_time(now: u64) {
    EPOCH.store(now.saturating_sub(timer::seconds()), Relaxed);
}

/// The time of day, as guests' clocks count it, at a second of the counter.
pub fn unix_time(second: u64) -> UnixSeconds {
    UnixSeconds((EPOCH.load(Relaxed) + second) as u32)
}
