//! vCPU 1: idle, busy with nothing or with reading its counter, in a storm of its own, answering interrupts, or off.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tidemark_guests::fdt::Mpidr;
use tidemark_guests::pattern::{Random, Vcpu};
use tidemark_guests::rt::gic::{self, Private};
use tidemark_guests::rt::{Boot, counter, psci, smp};

use super::{devices, flash, instructions};

const IDLE: u32 = 1;
const STORM: u32 = 2;
const ANSWER: u32 = 3;
const LEAVE: u32 = 4;
const BUSY: u32 = 5;
const COUNT: u32 = 6;

/// What it is to do.
static WANTED: AtomicU32 = AtomicU32::new(IDLE);
/// What it does; 0 before it has come.
static DOES: AtomicU32 = AtomicU32::new(0);
/// Which storm: the index of what it does a turn.
static WHICH: AtomicU32 = AtomicU32::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);
static ACCESSES: AtomicU64 = AtomicU64::new(0);
static EXCEPTIONS: AtomicU64 = AtomicU64::new(0);
static COUNTED: AtomicU64 = AtomicU64::new(0);

/// The interrupt it answers, and the one it answers with.
pub const QUESTION: Private = Private(6);
/// The answer.
pub const REPLY: Private = Private(7);

/// Starts it; how many vCPUs there are then.
pub fn start(boot: &Boot) -> u8 {
    let Some(cpu) = boot.machine.cpus().get(1) else {
        return 1;
    };
    if smp::start(Vcpu(1), *cpu, work).is_err() {
        return 1;
    }
    if counter::within(10, || DOES.load(Ordering::Acquire) == IDLE) {
        2
    } else {
        1
    }
}

fn want(what: u32) -> bool {
    WANTED.store(what, Ordering::Release);
    smp::wake();
    what == LEAVE || counter::within(10, || DOES.load(Ordering::Acquire) == what)
}

/// What it does in a storm, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storm {
    /// Accesses devices at random.
    Devices,
    /// Changes the table that code is translated by.
    Tables,
    /// Changes code.
    Code,
    /// Reads flash.
    Flash,
}

/// One turn of each; whether it raised something.
const TURNS: [fn(&mut Random) -> bool; 4] = [
    devices::storm,
    instructions::change_tables,
    instructions::change_code,
    flash::storm,
];

/// Has it do so until [`calm`].
pub fn storm(which: Storm, seed: u64) {
    WHICH.store(which as u32, Ordering::Relaxed);
    SEED.store(seed, Ordering::Relaxed);
    ACCESSES.store(0, Ordering::Relaxed);
    EXCEPTIONS.store(0, Ordering::Relaxed);
    want(STORM);
}

/// Ends a storm: how many accesses there were, and exceptions.
pub fn calm() -> (u64, u64) {
    if !want(IDLE) {
        return (0, 0);
    }
    (
        ACCESSES.load(Ordering::Relaxed),
        EXCEPTIONS.load(Ordering::Relaxed),
    )
}

/// Has it answer SGIs until [`calm`]; whether it does.
pub fn answer() -> bool {
    want(ANSWER)
}

/// Has it keep its CPU until [`calm`], no interrupt taken; whether it does.
pub fn busy() -> bool {
    want(BUSY)
}

/// Has it say what its virtual counter is, all the time, until [`calm`].
pub fn count() -> bool {
    want(COUNT)
}

/// What it said last.
pub fn counted() -> u64 {
    COUNTED.load(Ordering::Acquire)
}

/// Turns it off; whether it is.
pub fn leave(cpu: Mpidr) -> bool {
    want(LEAVE);
    counter::within(10, || psci::is_off(cpu))
}

fn work(_vcpu: Vcpu) -> ! {
    super::probe::init();
    loop {
        let wanted = WANTED.load(Ordering::Acquire);
        match wanted {
            STORM => {
                let mut random = Random(SEED.load(Ordering::Relaxed));
                let turn = TURNS[WHICH.load(Ordering::Relaxed) as usize];
                DOES.store(STORM, Ordering::Release);
                while WANTED.load(Ordering::Acquire) == STORM {
                    let raised = turn(&mut random);
                    ACCESSES.fetch_add(1, Ordering::Relaxed);
                    EXCEPTIONS.fetch_add(u64::from(raised), Ordering::Relaxed);
                }
            }
            ANSWER => {
                super::interrupts::reset_interface();
                gic::init(&[QUESTION]);
                DOES.store(ANSWER, Ordering::Release);
                while WANTED.load(Ordering::Acquire) == ANSWER {
                    if gic::acknowledge() == QUESTION {
                        gic::end(QUESTION);
                        gic::send(gic::sgi(REPLY, Mpidr(0)));
                    }
                    smp::pause();
                }
            }
            BUSY => {
                DOES.store(BUSY, Ordering::Release);
                while WANTED.load(Ordering::Acquire) == BUSY {
                    smp::pause();
                }
            }
            COUNT => {
                COUNTED.store(0, Ordering::Release);
                DOES.store(COUNT, Ordering::Release);
                while WANTED.load(Ordering::Acquire) == COUNT {
                    COUNTED.store(counter::now(), Ordering::Release);
                }
            }
            LEAVE => psci::cpu_off(),
            _ => {
                DOES.store(IDLE, Ordering::Release);
                smp::wait(|| WANTED.load(Ordering::Acquire) != IDLE);
            }
        }
    }
}
