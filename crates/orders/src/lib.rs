//! Every order in which a few simulated CPUs can do what they do.
//!
//! A crate that is to be tried so takes its atomics and locks from a module of its own, which in its tests is [`traced`]. Then
//! [`in_every_order`] runs a small scenario again and again, each time in another order, until none is left:
//!
//! ```
//! use std::sync::atomic::Ordering::SeqCst;
//! use tidemark_orders::{Program, in_every_order, traced::AtomicUsize};
//!
//! let mut ends = std::collections::BTreeSet::new();
//! let orders = in_every_order(
//!     2,
//!     || AtomicUsize::new(0),
//!     |counter| {
//!         let add = || Box::new(|| counter.store(counter.load(SeqCst) + 1, SeqCst)) as Program<'_>;
//!         vec![add(), add()]
//!     },
//!     |counter| {
//!         ends.insert(counter.load(SeqCst));
//!     },
//! );
//! assert!(orders > 2);
//! assert_eq!(ends.into_iter().collect::<Vec<_>>(), [1, 2], "an addition can be lost");
//! ```
#![forbid(unsafe_code)]

mod scheduler;
pub mod traced;

pub use scheduler::Program;
use scheduler::{Path, Scheduler};
use std::rc::Rc;

/// Runs the programs that `programs` makes in every order, all seeing each access at once, in which CPUs are interrupted `interruptions` times at most, each time
/// in a world that `world` made, and looks at each end with `conclude`. A CPU that waits, or is between two things, hands over for
/// free, and one that waits to the next in turn. Gives how many orders there were.
pub fn in_every_order<W>(
    interruptions: u32,
    world: impl Fn() -> W,
    programs: impl for<'a> Fn(&'a W) -> Vec<Program<'a>>,
    mut conclude: impl FnMut(&W),
) -> usize {
    let mut path = Some(Path::first(interruptions));
    let mut orders = 0;
    while let Some(this) = path {
        let scheduler = Rc::new(Scheduler::of(this));
        let world = world();
        let run = || scheduler.run(programs(&world));
        traced::under(scheduler.clone(), run);
        conclude(&world);
        path = scheduler.path().next();
        orders += 1;
    }
    orders
}
