//! EL2's locks, each with its place in the order in which a CPU may take them.
//!
//! A CPU takes a lock only while all that it holds have lower ranks ([`rank`]). With debug assertions each lock that is
//! taken is checked against that, and EL2 stops at the first that is not in order, whether or not two CPUs meet at it; without, these
//! are spin's. Locks inside of the crates (a VM's status and a vCPU's run state, stage 2's, the vGIC's) have no ranks: ARCHITECTURE.md
//! says where they stand, and the crates' own tests take them in many orders among themselves.

use core::ops::{Deref, DerefMut};

/// The order, outermost first.
pub mod rank {
    /// A request of the host that is carried out.
    pub const REQUEST: u8 = 0;
    /// The answer in the making.
    pub const BUILDER: u8 = 1;
    /// The shell's line.
    pub const SHELL: u8 = 2;
    /// A bank of flash.
    pub const FLASH: u8 = 3;
    /// What is being done for a VM.
    pub const WORK: u8 = 4;
    /// A VM's list of slots.
    pub const SLOTS: u8 = 5;
    /// What of a VM is being cleared.
    pub const CLEARING: u8 = 6;
    /// A VM's time.
    pub const TIME: u8 = 7;
    /// The registers of a vCPU that is not loaded.
    pub const SAVED: u8 = 8;
    /// A vCPU's physical timer.
    pub const PHYSICAL_TIMER: u8 = 9;
    /// A VM's UART.
    pub const UART: u8 = 10;
    /// A VM's clock.
    pub const CLOCK: u8 = 11;
    /// What a VM's firmware is told.
    pub const FW_CFG: u8 = 12;
    /// What a guest wrote.
    pub const HISTORY: u8 = 13;
    /// What was typed for a guest.
    pub const INPUT: u8 = 14;
    /// A guest's line for a shared terminal.
    pub const LINE: u8 = 15;
    /// A VM's life, for the frames' owners.
    pub const LIFE: u8 = 16;
    /// What a VM's random numbers come from.
    pub const RANDOM: u8 = 17;
    /// What all random numbers come from.
    pub const MACHINE_RANDOM: u8 = 18;
    /// The decoder of what the line brings.
    pub const RECEIVER: u8 = 19;
    /// The host's session.
    pub const SESSION: u8 = 20;
    /// Answers that wait to be made.
    pub const PENDING: u8 = 21;
    /// What has happened to VMs and nobody has told.
    pub const EVENTS: u8 = 22;
    /// The vCPUs whose home a CPU is.
    pub const HOMED: u8 = 23;
    /// Jobs.
    pub const JOBS: u8 = 24;
    /// Jobs whose time is to come.
    pub const DELAYED: u8 = 25;
    /// What the CPUs have in common, while they come up.
    pub const JOINED: u8 = 26;
    /// Free frames.
    pub const FRAMES: u8 = 27;
    /// The heap.
    pub const HEAP: u8 = 28;
    /// The console: under any of them something may be said.
    pub const CONSOLE: u8 = 29;
}

/// A mutex that waits.
#[derive(Debug)]
pub struct Mutex<T, const RANK: u8>(spin::Mutex<T>);

/// A mutex that is held.
pub struct MutexGuard<'a, T, const RANK: u8> {
    guard: spin::MutexGuard<'a, T>,
    _held: Held<RANK>,
}

impl<T, const RANK: u8> Mutex<T, RANK> {
    /// One that nobody holds.
    pub const fn new(value: T) -> Self {
        Self(spin::Mutex::new(value))
    }

    /// Waits for it.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T, RANK> {
        let held = Held::take();
        MutexGuard {
            guard: self.0.lock(),
            _held: held,
        }
    }

    /// Takes it if nobody holds it.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T, RANK>> {
        let guard = self.0.try_lock()?;
        Some(MutexGuard {
            guard,
            _held: Held::take(),
        })
    }
}

impl<T, const RANK: u8> Deref for MutexGuard<'_, T, RANK> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, const RANK: u8> DerefMut for MutexGuard<'_, T, RANK> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// A lock that many may read by.
#[derive(Debug)]
pub struct RwLock<T, const RANK: u8>(spin::RwLock<T>);

/// A lock by which somebody reads.
pub struct RwLockReadGuard<'a, T, const RANK: u8> {
    guard: spin::RwLockReadGuard<'a, T>,
    _held: Held<RANK>,
}

/// A lock by which somebody writes.
pub struct RwLockWriteGuard<'a, T, const RANK: u8> {
    guard: spin::RwLockWriteGuard<'a, T>,
    _held: Held<RANK>,
}

impl<T, const RANK: u8> RwLock<T, RANK> {
    /// One that nobody holds.
    pub const fn new(value: T) -> Self {
        Self(spin::RwLock::new(value))
    }

    /// Waits for it, to read.
    #[inline]
    pub fn read(&self) -> RwLockReadGuard<'_, T, RANK> {
        let held = Held::take();
        RwLockReadGuard {
            guard: self.0.read(),
            _held: held,
        }
    }

    /// Waits for it, to write.
    #[inline]
    pub fn write(&self) -> RwLockWriteGuard<'_, T, RANK> {
        let held = Held::take();
        RwLockWriteGuard {
            // New readers wait for whoever is about to write.
            guard: self.0.upgradeable_read().upgrade(),
            _held: held,
        }
    }
}

impl<T, const RANK: u8> Deref for RwLockReadGuard<'_, T, RANK> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, const RANK: u8> Deref for RwLockWriteGuard<'_, T, RANK> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, const RANK: u8> DerefMut for RwLockWriteGuard<'_, T, RANK> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// That this CPU holds a lock of this rank.
#[derive(Debug)]
struct Held<const RANK: u8>;

#[cfg(not(debug_assertions))]
impl<const RANK: u8> Held<RANK> {
    #[inline(always)]
    const fn take() -> Self {
        Self
    }
}

#[cfg(debug_assertions)]
mod checked {
    use super::Held;
    use crate::arch::cpu::{self, MAX_CPUS};
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// Ranks that a CPU holds, a bit each. Written by that CPU alone.
    static HELD: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

    impl<const RANK: u8> Held<RANK> {
        pub fn take() -> Self {
            let held = &HELD[cpu::index()];
            let before = held.load(Relaxed);
            if before >> RANK != 0 {
                // What is said about it needs the console, and nobody checks that any more.
                held.store(0, Relaxed);
                panic!("a lock of rank {RANK} is taken under ranks {before:#b}");
            }
            held.store(before | 1 << RANK, Relaxed);
            Self
        }
    }

    impl<const RANK: u8> Drop for Held<RANK> {
        fn drop(&mut self) {
            let held = &HELD[cpu::index()];
            held.store(held.load(Relaxed) & !(1 << RANK), Relaxed);
        }
    }
}
