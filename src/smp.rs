//! The machine's further CPUs: started one by one through PSCI, held until the boot CPU has
//! set everything up, then let go to look for work.

use crate::arch::boot::{self, Answer, Progress, SecondaryBoot};
use crate::arch::features::Features;
use crate::arch::lock::{Mutex, rank};
use crate::arch::stage1::EnableMmu;
use crate::arch::{barrier, cpu, el1, timer, tlb};
use crate::entry::run;
use crate::mm::frames::Run;
use crate::mm::{PAGE, layout, stage1};
use crate::platform::{self, Board};
use crate::vm;
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use log::warn;
use spin::Once;
use tidemark_errata::walks::OutOfContext;
use tidemark_ownership::Owner;

/// How long a CPU may take to answer, in microseconds.
const TIMEOUT: u64 = 5_000_000;
/// Pages of a CPU's stack for fatal exceptions.
const EMERGENCY_PAGES: usize = 2;

/// What the CPUs that came up can do, and how many there are.
static JOINED: Mutex<Option<Features>, { rank::JOINED }> = Mutex::new(None);
static UP: AtomicUsize = AtomicUsize::new(1);
static RELEASED: AtomicBool = AtomicBool::new(false);
static CONTROLS: Once<Controls> = Once::new();

#[derive(Clone, Copy)]
struct Controls {
    hcr: u64,
    vtcr: u64,
}

/// Gives the boot CPU its data.
pub fn adopt_boot_cpu() {
    cpu::adopt(cpu::prepare(
        0,
        cpu::affinity(),
        layout::boot_stack_top(),
        layout::emergency_stack_top(),
    ));
    // The window's first stretch stays empty: CPU 0 keeps the boot stack.
}

/// Starts all CPUs but this one. Gives the features that all CPUs have that came up; one
/// that does not is reported and left out.
pub fn start_others(board: &Board) -> Features {
    *JOINED.lock() = Some(Features::read());
    let boot_cpu = cpu::affinity();
    if board.cpus_left_out > 0 {
        warn!(
            "{} CPUs are past the {} that this image can use, and are left out",
            board.cpus_left_out,
            cpu::MAX_CPUS
        );
    }
    for &mpidr in board.cpus.iter().filter(|&&mpidr| mpidr != boot_cpu) {
        let index = UP.load(Acquire);
        if index >= cpu::MAX_CPUS {
            break;
        }
        if let Err(reason) = start(index, mpidr) {
            warn!("CPU {mpidr:#x} does not come up ({reason}) and is left out");
        }
    }
    cpu::set_count(UP.load(Acquire));
    JOINED.lock().unwrap_or_else(Features::read)
}

fn start(index: usize, mpidr: u64) -> Result<(), &'static str> {
    // A stretch of the stack window for each try: a CPU that answers too late is on its own.
    static TRIES: AtomicUsize = AtomicUsize::new(1);
    let place = TRIES.fetch_add(1, Relaxed);
    let no_memory = "no memory for its stack";
    let stack = Run::take(stage1::STACK_SIZE / PAGE, Owner::Hypervisor).ok_or(no_memory)?;
    let emergency = Run::take(EMERGENCY_PAGES, Owner::Hypervisor).ok_or(no_memory)?;
    let stack_top =
        stage1::map_stack(place, stack.leak()).map_err(|_| "its stack cannot be mapped")?;
    let emergency_top = emergency.leak() as usize + EMERGENCY_PAGES * PAGE;
    let mmu = EnableMmu::new();
    stage1::fill_registers(&mmu);
    let boot = Box::leak(Box::new(SecondaryBoot {
        mmu,
        stack_top,
        cpu: cpu::prepare(index, mpidr, stack_top, emergency_top),
        answer: Answer::silent(),
    }));
    boot::start_cpu(mpidr, boot).map_err(|error| match error.0 {
        -2 => "PSCI: invalid parameters",
        -4 => "PSCI: already on",
        -9 => "PSCI: invalid address",
        _ => "PSCI refuses",
    })?;
    let end = timer::now() + timer::ticks(TIMEOUT);
    loop {
        match boot.answer.progress() {
            Progress::Ready => {
                UP.store(index + 1, Release);
                return Ok(());
            }
            Progress::Unfit => return Err("it cannot take interrupts"),
            Progress::Silent if timer::now() > end && boot.answer.give_up() => {
                return Err("it was started but does not answer");
            }
            // One that has begun comes to an end: what it waits for has a limit, and the
            // console is free, as nobody prints here.
            Progress::Silent | Progress::Begun => core::hint::spin_loop(),
        }
    }
}

/// A further CPU's way, from boot/head.S.
#[unsafe(no_mangle)]
extern "C" fn secondary_main(boot: &'static SecondaryBoot) -> ! {
    // Its index is only its own from here on.
    if !boot.answer.begin() {
        halt();
    }
    if let Err(error) = platform::init_cpu() {
        warn!("CPU {:#x}: {error}", cpu::affinity());
        boot.answer.unfit();
        halt();
    }
    let mine = Features::read();
    {
        let mut joined = JOINED.lock();
        *joined = Some(joined.map_or(mine, |others| others.least(mine)));
    }
    boot.answer.ready();
    while !RELEASED.load(Acquire) {
        barrier::wfe();
    }
    if let Some(controls) = CONTROLS.get() {
        el1::init_controls(controls.hcr, controls.vtcr);
    }
    run::forever()
}

/// A CPU that is left out waits for nothing.
fn halt() -> ! {
    loop {
        barrier::wfi();
    }
}

/// Decides EL2's controls for all CPUs, and sets this one's.
pub fn init_controls(features: &Features) {
    let mut hcr = el1::HCR_GUEST;
    if features.fwb >= 1 {
        hcr |= el1::HCR_FWB;
    }
    let controls = CONTROLS.call_once(|| Controls {
        hcr,
        vtcr: vm::stage2::vtcr().unwrap_or_else(|error| panic!("{error}")),
    });
    el1::set_errata(&features.errata);
    tlb::set_out_of_context(if features.errata.speculative_walks.is_sound() {
        OutOfContext::Never
    } else {
        OutOfContext::Possible
    });
    el1::init_controls(controls.hcr, controls.vtcr);
}

/// Lets the further CPUs look for work.
pub fn release_others() {
    RELEASED.store(true, Release);
    barrier::dsb_sy();
    barrier::sev();
}
