//! Atomics and locks with a place for other CPUs in front of each access, and behind each lock that is given back.
//!
//! Without an observer on the thread they are the ordinary ones. The orders tried are those of a machine on which every
//! access is seen by all at once; what weaker memory does is for loom.

use crate::scheduler::Scheduler;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{self, Ordering};

std::thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static SCHEDULER: RefCell<Option<Rc<Scheduler>>> = const { RefCell::new(None) };
}

/// The scheduler of this thread's CPUs.
fn scheduler() -> Option<Rc<Scheduler>> {
    if !ON.with(Cell::get) {
        return None;
    }
    SCHEDULER.with(|scheduler| scheduler.borrow().clone())
}

/// A place where another CPU may come first.
pub fn point() {
    if let Some(scheduler) = scheduler() {
        scheduler.point();
    }
}

/// A place between two things that a CPU does: another's turn here is no interruption.
pub fn breathe() {
    if let Some(scheduler) = scheduler() {
        scheduler.breathe();
    }
}

/// The CPU waits for another one.
pub fn wait() {
    match scheduler() {
        Some(scheduler) => scheduler.wait(),
        None => std::hint::spin_loop(),
    }
}

/// The CPU that runs, by its place among the programs; 0 where none does.
pub fn cpu() -> usize {
    scheduler().map_or(0, |scheduler| scheduler.current())
}

/// Calls `with` while `scheduler` gives this thread's turns.
pub(crate) fn under<R>(scheduler: Rc<Scheduler>, with: impl FnOnce() -> R) -> R {
    /// Also when `with` panics.
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            ON.with(|on| on.set(false));
            SCHEDULER.with(|scheduler| scheduler.borrow_mut().take());
        }
    }
    SCHEDULER.with(|place| *place.borrow_mut() = Some(scheduler));
    ON.with(|on| on.set(true));
    let _off = Off;
    with()
}

macro_rules! atomics {
    ($($name:ident of $value:ty: $($method:ident($($argument:ident),*) -> $result:ty),*;)*) => {
        $(
            /// As the original.
            #[derive(Default, Debug)]
            pub struct $name(atomic::$name);

            impl $name {
                /// Makes one.
                pub const fn new(value: $value) -> Self {
                    Self(atomic::$name::new(value))
                }

                $(
                    /// As the original.
                    pub fn $method(&self, $($argument: $value,)* order: Ordering) -> $result {
                        point();
                        self.0.$method($($argument,)* order)
                    }
                )*
            }
        )*
    };
}

atomics! {
    AtomicBool of bool: load() -> bool, store(value) -> (), swap(value) -> bool;
    AtomicU8 of u8: load() -> u8, store(value) -> (), swap(value) -> u8, fetch_or(value) -> u8;
    AtomicU64 of u64: load() -> u64, store(value) -> (), swap(value) -> u64, fetch_add(value) -> u64;
    AtomicUsize of usize: load() -> usize, store(value) -> (), swap(value) -> usize, fetch_add(value) -> usize;
}

/// How a CPU waits for a lock: it lets the others run.
#[derive(Debug)]
pub struct Relax;

impl spin::RelaxStrategy for Relax {
    fn relax() {
        wait();
    }
}

/// A lock that waits.
#[derive(Debug)]
pub struct Mutex<T>(spin::mutex::SpinMutex<T, Relax>);

/// A lock that is held.
pub struct MutexGuard<'a, T> {
    // Given back before the other is dropped.
    guard: spin::mutex::SpinMutexGuard<'a, T, Relax>,
    _behind: Behind,
}

/// The place behind a lock. Not in a CPU that a failure has ended.
struct Behind;

impl Drop for Behind {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            point();
        }
    }
}

impl<T> Mutex<T> {
    /// Makes one.
    pub const fn new(value: T) -> Self {
        Self(spin::mutex::SpinMutex::new(value))
    }

    /// As the original.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        point();
        MutexGuard {
            guard: self.0.lock(),
            _behind: Behind,
        }
    }
}

impl<T> std::ops::Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> std::ops::DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}
