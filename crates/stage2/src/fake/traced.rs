//! Atomics that tell an [`Observer`] about every access: what tables and bitmaps are made of in this
//! crate's own tests (see `sync`).
//!
//! Without an observer on the thread they are the ordinary ones. With one, each access is preceded by
//! [`Observer::point`], where another simulated CPU may come first, and each write is followed by
//! [`Observer::wrote`] with nothing in between.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{self, Ordering};

/// How a word was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// A plain store.
    Store,
    /// A swap, or a compare-and-swap that succeeded.
    Exchange,
    /// A `fetch_and` with this operand.
    And(u64),
    /// A `fetch_or` with this operand.
    Or(u64),
    /// An addition or subtraction.
    Add,
}

/// One write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Where.
    pub address: usize,
    /// What was there.
    pub old: u64,
    /// What is there now.
    pub new: u64,
    /// How.
    pub how: How,
}

/// Where CPUs meet, by its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// A word of 64 bits, of a table or a bitmap mostly.
    Word(usize),
    /// A lock, or another atomic.
    Other(usize),
}

/// Whoever watches a thread's accesses.
pub trait Observer {
    /// Before an access, as often as [`skip`] lets it: another CPU may come first.
    fn point(&self, at: Point);
    /// Where others come first more often than elsewhere: a barrier, an invalidation.
    fn milestone(&self);
    /// A CPU waits for another one.
    fn wait(&self);
    /// The word is about to be written or read and written: what hardware has under way to it arrives.
    fn settle(&self, address: usize);
    /// A word was written.
    fn wrote(&self, write: Write);
    /// The allocator wrote all of a table: it was free before, or is now.
    fn filled(&self, table: usize);
    /// A CPU did something else.
    fn noted(&self, event: super::Event);
}

std::thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static UNTIL: Cell<u32> = const { Cell::new(0) };
    static OBSERVER: RefCell<Option<Arc<dyn Observer>>> = const { RefCell::new(None) };
}

fn observer() -> Option<Arc<dyn Observer>> {
    if !ON.with(Cell::get) {
        return None;
    }
    OBSERVER.with(|observer| observer.borrow().clone())
}

/// A place where another CPU may come first.
#[inline]
pub(super) fn point(at: Point) {
    if !ON.with(Cell::get) {
        return;
    }
    let left = UNTIL.with(Cell::get);
    if left > 0 {
        UNTIL.with(|until| until.set(left - 1));
    } else if let Some(observer) = observer() {
        observer.point(at);
    }
}

/// A place where another CPU comes first more often.
pub(super) fn milestone() {
    if let Some(observer) = observer() {
        observer.milestone();
    }
}

/// Passes over the next `points` points: it is cheaper to count than to ask each time.
pub fn skip(points: u32) {
    UNTIL.with(|until| until.set(points));
}

/// The allocator wrote all of a table.
pub(super) fn filled(table: usize) {
    if let Some(observer) = observer() {
        observer.filled(table);
    }
}

/// A CPU did this.
pub(super) fn noted(event: super::Event) {
    if let Some(observer) = observer() {
        observer.noted(event);
    }
}

/// Calls `with` while `observer` watches this thread.
pub fn observed<R>(observer: Arc<dyn Observer>, with: impl FnOnce() -> R) -> R {
    /// Also when `with` panics.
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            ON.with(|on| on.set(false));
            OBSERVER.with(|observer| observer.borrow_mut().take());
        }
    }
    OBSERVER.with(|place| *place.borrow_mut() = Some(observer));
    ON.with(|on| on.set(true));
    let _off = Off;
    with()
}

/// Calls `with` unobserved. It must not wait for anybody.
pub fn quietly<R>(with: impl FnOnce() -> R) -> R {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            ON.with(|on| on.set(self.0));
        }
    }
    let _back = Back(ON.with(|on| on.replace(false)));
    with()
}

/// How a CPU waits for a lock: it lets the others run.
#[derive(Debug)]
pub struct Relax;

impl spin::RelaxStrategy for Relax {
    fn relax() {
        match observer() {
            Some(observer) => observer.wait(),
            None => core::hint::spin_loop(),
        }
    }
}

/// A 64-bit atomic.
#[repr(transparent)]
#[derive(Default, Debug)]
pub struct AtomicU64(atomic::AtomicU64);

impl AtomicU64 {
    /// Makes one.
    pub const fn new(value: u64) -> Self {
        Self(atomic::AtomicU64::new(value))
    }

    /// Returns the ordinary atomic inside: what the hardware and the tests look at.
    pub fn raw(&self) -> &atomic::AtomicU64 {
        &self.0
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Does one write; `write` returns what was there and what is there now, if it wrote.
    fn write(&self, how: How, write: impl FnOnce(&atomic::AtomicU64) -> (u64, Option<u64>)) -> u64 {
        let Some(observer) = observer() else {
            return write(&self.0).0;
        };
        point(Point::Word(self.address()));
        observer.settle(self.address());
        let (old, new) = write(&self.0);
        if let Some(new) = new {
            let address = self.address();
            observer.wrote(Write {
                address,
                old,
                new,
                how,
            });
        }
        old
    }

    /// As the original.
    pub fn load(&self, order: Ordering) -> u64 {
        point(Point::Word(self.address()));
        self.0.load(order)
    }

    /// As the original.
    pub fn store(&self, value: u64, order: Ordering) {
        self.write(How::Store, |word| {
            let old = word.load(Ordering::Relaxed);
            word.store(value, order);
            (old, Some(value))
        });
    }

    /// As the original.
    pub fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.write(How::Exchange, |word| (word.swap(value, order), Some(value)))
    }

    /// As the original.
    ///
    /// # Errors
    ///
    /// What was there instead.
    pub fn compare_exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        let mut result = Ok(current);
        self.write(How::Exchange, |word| {
            result = word.compare_exchange(current, new, success, failure);
            match result {
                Ok(old) => (old, Some(new)),
                Err(old) => (old, None),
            }
        });
        result
    }

    /// As the original; it never fails in vain.
    ///
    /// # Errors
    ///
    /// What was there instead.
    pub fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.compare_exchange(current, new, success, failure)
    }

    /// As the original: a load and compare-and-swaps, with room for others between them.
    ///
    /// # Errors
    ///
    /// The value that `change` refused.
    pub fn fetch_update(
        &self,
        set: Ordering,
        fetch: Ordering,
        change: impl FnMut(u64) -> Option<u64>,
    ) -> Result<u64, u64> {
        let load = || self.load(fetch);
        let swap = |old, new| self.compare_exchange(old, new, set, fetch);
        crate::sync::fetch_update(load, swap, change)
    }

    /// As the original.
    pub fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
        self.write(How::And(value), |word| {
            let old = word.fetch_and(value, order);
            (old, Some(old & value))
        })
    }

    /// As the original.
    pub fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.write(How::Or(value), |word| {
            let old = word.fetch_or(value, order);
            (old, Some(old | value))
        })
    }

    /// As the original.
    pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.write(How::Add, |word| {
            let old = word.fetch_add(value, order);
            (old, Some(old.wrapping_add(value)))
        })
    }

    /// As the original.
    pub fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.write(How::Add, |word| {
            let old = word.fetch_sub(value, order);
            (old, Some(old.wrapping_sub(value)))
        })
    }

    /// As the original.
    pub fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
        self.write(How::Exchange, |word| {
            let old = word.fetch_max(value, order);
            (old, Some(old.max(value)))
        })
    }

    /// As the original.
    pub fn get_mut(&mut self) -> &mut u64 {
        self.0.get_mut()
    }
}

/// Atomics that nobody watches, with a place for others in front of each access.
macro_rules! passed {
    ($name:ident of $value:ty: $($method:ident($($argument:ident: $type:ty),*) -> $result:ty),*) => {
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
                pub fn $method(&self, $($argument: $type,)* order: Ordering) -> $result {
                    point(Point::Other(std::ptr::from_ref(self).addr()));
                    self.0.$method($($argument,)* order)
                }
            )*
        }
    };
}

passed!(AtomicBool of bool: load() -> bool, store(value: bool) -> ());
passed!(AtomicI64 of i64: load() -> i64, fetch_add(value: i64) -> i64);
