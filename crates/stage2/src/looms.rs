//! The small races under a weak memory model: loom runs each model in every order, with at most so many
//! preemptions, and lets a load return any value that the orderings allow.
//!
//! The functions are the real ones, on real tables. Of a table's 512 entries and of a bitmap's words only
//! those that a model watches are loom's; the others are ordinary, nobody else looks at them. There are no
//! TLBs here: what needs them is in `tests/interleavings.rs`, which in turn has no weak memory.
//!
//! Architecture: a hardware update of a descriptor is an atomic read-modify-write (D8.5.3), here a relaxed
//! one, ordered with nothing.

use loom::sync::atomic as weak;
use std::sync::OnceLock;
use std::sync::atomic as plain;
use std::sync::atomic::Ordering;

/// An ordinary atomic until it is watched; loom's from then on.
#[derive(Default, Debug)]
pub struct AtomicU64 {
    plain: plain::AtomicU64,
    watched: OnceLock<weak::AtomicU64>,
}

macro_rules! forward {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(
            /// As the original.
            pub fn $name(&self, $($argument: $type),*) -> $result {
                match self.watched.get() {
                    Some(watched) => watched.$name($($argument),*),
                    None => self.plain.$name($($argument),*),
                }
            }
        )*
    };
}

impl AtomicU64 {
    /// Makes one that is not watched.
    pub const fn new(value: u64) -> Self {
        Self {
            plain: plain::AtomicU64::new(value),
            watched: OnceLock::new(),
        }
    }

    /// Makes it loom's, with the value it has. Before a model's threads begin.
    fn watch(&self) {
        let value = self.plain.load(Ordering::SeqCst);
        self.watched.get_or_init(|| weak::AtomicU64::new(value));
    }

    forward! {
        load(order: Ordering) -> u64;
        store(value: u64, order: Ordering) -> ();
        swap(value: u64, order: Ordering) -> u64;
        compare_exchange(old: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64>;
        compare_exchange_weak(old: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64>;
        fetch_and(value: u64, order: Ordering) -> u64;
        fetch_or(value: u64, order: Ordering) -> u64;
        fetch_add(value: u64, order: Ordering) -> u64;
        fetch_sub(value: u64, order: Ordering) -> u64;
        fetch_max(value: u64, order: Ordering) -> u64;
    }

    /// As the original.
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
}

pub(crate) mod mutex {
    use loom::sync::{Mutex, MutexGuard};

    pub(crate) struct SpinMutex<T>(Mutex<T>);

    impl<T> SpinMutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }
}

pub(crate) mod rwlock {
    pub(crate) use loom::sync::RwLockReadGuard;
    use loom::sync::{RwLock as Lock, RwLockWriteGuard};

    pub(crate) struct RwLock<T>(Lock<T>);

    /// Nobody is kept out by it yet: that a reader does not come back meanwhile is for speed.
    pub(crate) struct Upgradeable<'a, T>(&'a RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(Lock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap()
        }

        pub(crate) fn upgradeable_read(&self) -> Upgradeable<'_, T> {
            Upgradeable(self)
        }
    }

    impl<'a, T> Upgradeable<'a, T> {
        pub(crate) fn upgrade(self) -> RwLockWriteGuard<'a, T> {
            self.0.0.write().unwrap()
        }
    }
}

#[cfg(test)]
mod models {
    use crate::dirty::Dirty;
    use crate::hardware::Table;
    use crate::pte::{Kind, Permission};
    use crate::slot::LeavesOf;
    use crate::tlb::{IpaOperand, RangeOperand};
    use crate::*;
    use loom::sync::Arc;
    use loom::thread;
    use std::ops::ControlFlow;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::vec::Vec;

    const IPA: u64 = 0x4000_0000;

    /// Memory for tables, and barriers.
    struct Machine {
        tables: Vec<Table>,
        used: AtomicUsize,
    }

    impl Hardware for Machine {
        fn cpu(&self) -> usize {
            0
        }
        fn cpus(&self) -> usize {
            1
        }
        fn table(&self, at: TableAt<Self>) -> &Table {
            &self.tables[(at.pa().raw() >> 12) as usize - 1]
        }
        fn alloc_tables(&self, count: usize) -> Option<Pa> {
            let first = self.used.fetch_add(count, Ordering::Relaxed);
            Some(Pa::new((first as u64 + 1) << 12))
        }
        fn free_tables(&self, _: TablePages<Self>) {}
        fn dsb_ishst(&self) {
            super::weak::fence(Ordering::SeqCst);
        }
        fn dsb_ish(&self) {
            super::weak::fence(Ordering::SeqCst);
        }
        fn dsb_nsh(&self) {}
        fn isb(&self) {}
        fn clean_invalidate(&self, _: &[crate::sync::atomic::AtomicU64]) {}
        fn select(&self, _: u64) -> u64 {
            0
        }
        fn restore(&self, _: u64) {}
        fn tlbi_ipas2e1is(&self, _: IpaOperand) {}
        fn tlbi_ripas2e1is(&self, _: RangeOperand) {}
        fn tlbi_vmalle1is(&self) {}
        fn tlbi_vmalls12e1is(&self) {}
        fn tlbi_vale2is(&self) {}
        fn tlbi_ipas2e1(&self, _: IpaOperand) {}
        fn tlbi_vaae1(&self, _: GuestVa) {}
        fn tlbi_vmalle1(&self) {}
    }

    type Vm = Stage2<Machine>;

    /// A VM of one slot with a log on, its first page or block clean and watched.
    fn vm(engine: Engine, granularity: Granularity, pages: u64) -> Arc<Vm> {
        let machine = Machine {
            tables: (0..6).map(|_| Table::new()).collect(),
            used: AtomicUsize::new(0),
        };
        let features = Features {
            dbm: Support::Present,
            ..Features::BASELINE
        };
        let vmid = Vmid::new(1, VmidWidth::Eight).unwrap();
        let vm = Stage2::new(machine, 39, vmid, features).unwrap();
        let extent = Extent {
            pa: Pa::new(0x8000_0000),
            pages,
        };
        let (id, gfn) = (SlotId(0), Ipa::new(IPA).gfn());
        vm.add_slot(id, gfn, pages, Access::ReadWrite, &[extent])
            .unwrap();
        while vm.map_ahead(id, 0) != Ok(Progress::Done) {}
        while vm.start_log(engine, granularity) != Ok(Progress::Done) {}
        // All the way down: an order in which a table goes first must be seen to differ.
        for level in [Level::L1, Level::L2, Level::L3] {
            vm.descend_to(IPA, level).entry().watch();
        }
        let layout = vm.layout();
        layout.slots[0].dirty.live()[0].watch();
        layout.slots[0].dirty.in_flight()[0].watch();
        drop(layout);
        Arc::new(vm)
    }

    /// Takes and commits an epoch. Was the first page in it?
    fn harvest(vm: &Vm, epoch: u64) -> bool {
        while vm.take(Epoch(epoch)) != Ok(Progress::Done) {
            thread::yield_now();
        }
        let word = vm.in_flight(SlotId(0), Epoch(epoch)).unwrap()[0].load(Ordering::Relaxed);
        vm.commit(Epoch(epoch)).unwrap();
        word & 1 == 1
    }

    /// The hardware's update: the leaf becomes dirty, if it is clean. Did it?
    fn update(vm: &Vm) -> bool {
        let place = vm.descend(IPA);
        let dirty = place.pte.with(Permission::Dirty(Engine::Dbm)).0;
        let clean = place.kind == Kind::Leaf && place.pte.is_clean();
        let entry = place.entry();
        clean
            && entry
                .compare_exchange(place.pte.0, dirty, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// A write fault. Did it make the leaf dirty?
    fn write_fault(vm: &Vm) -> bool {
        let fault = Fault {
            ipa: Ipa::new(IPA),
            access: FaultAccess::Write,
            kind: FaultKind::Permission,
            va: None,
        };
        matches!(vm.handle_fault(fault), Outcome::Dirtied(_))
    }

    /// A thread on which the engine's functions have room, in words.
    fn spawn<R: Send + 'static>(run: impl FnOnce() -> R + Send + 'static) -> thread::JoinHandle<R> {
        let builder = thread::Builder::new().stack_size(64 << 10);
        builder.spawn(run).unwrap()
    }

    /// Runs the model in every order with two preemptions, or as many as `LOOM_MAX_PREEMPTIONS` says.
    fn check(run: impl Fn() + Send + Sync + 'static) {
        let run = std::sync::Arc::new(run);
        let orders = std::sync::Arc::new(AtomicUsize::new(0));
        let counter = std::sync::Arc::clone(&orders);
        let mut model = loom::model::Builder::new();
        model.preemption_bound = model.preemption_bound.or(Some(2));
        model.check(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            let run = std::sync::Arc::clone(&run);
            spawn(move || run()).join().unwrap();
        });
        let orders = orders.load(Ordering::Relaxed);
        std::eprintln!("{orders} orders");
        assert!(orders > 2, "they do not meet");
    }

    /// One harvest beside `other`, which says whether it made the page dirty; one after it. Whatever became
    /// dirty is in one of them.
    fn nothing_is_lost(make: impl Fn() -> Arc<Vm> + Send + Sync + 'static, other: fn(&Vm) -> bool) {
        check(move || {
            let vm = make();
            let there = Arc::clone(&vm);
            let other = spawn(move || other(&there));
            let first = harvest(&vm, 1);
            let dirtied = other.join().unwrap();
            let second = harvest(&vm, 2);
            assert!(first || second || !dirtied, "lost");
            // Else nothing would ever note the page again.
            assert!(
                !vm.descend(IPA).pte.is_dirty(),
                "passed by the last harvest"
            );
            assert!(!harvest(&vm, 3), "clean, and reported");
        });
    }

    #[test]
    fn a_harvest_and_an_update_by_the_hardware() {
        nothing_is_lost(|| vm(Engine::Dbm, Granularity::Page, 2), update);
        // And one that brings the leaf over to the other engine.
        let switched = || {
            let vm = vm(Engine::Dbm, Granularity::Page, 2);
            vm.set_engine(Engine::WriteProtect).unwrap();
            vm
        };
        nothing_is_lost(switched, update);
    }

    #[test]
    fn a_harvest_and_a_fault() {
        nothing_is_lost(
            || vm(Engine::WriteProtect, Granularity::Page, 2),
            write_fault,
        );
    }

    #[test]
    fn a_split_and_an_update_or_a_fault() {
        let dirty = |engine| move || vm(engine, Granularity::Block, 512);
        // What the exchange returned is what the caller marks.
        let split = |engine: Engine, other: fn(&Vm) -> bool| {
            let make = dirty(engine);
            check(move || {
                let vm = make();
                let there = Arc::clone(&vm);
                let other = spawn(move || other(&there));
                let entry = vm.descend_to(IPA, Level::L2).entry();
                let old = vm.split(entry, Level::L2, IPA, engine).unwrap();
                let dirtied = other.join().unwrap();
                let leaf = vm.descend(IPA).pte;
                assert!(old.is_dirty() || leaf.is_dirty() || !dirtied, "lost");
            });
        };
        split(Engine::Dbm, update);
        split(Engine::WriteProtect, write_fault);
    }

    /// A page whose table is there, but no leaf of it, and whose word of the bitmap has a bit already. Both words are
    /// watched.
    fn untouched() -> Arc<Vm> {
        let vm = vm(Engine::WriteProtect, Granularity::Page, 2);
        let extent = Extent {
            pa: Pa::new(0x9000_0000),
            pages: 2,
        };
        vm.add_slot(
            SlotId(1),
            Ipa::new(DOOR).gfn(),
            2,
            Access::ReadWrite,
            &[extent],
        )
        .unwrap();
        vm.descend(DOOR).entry().watch();
        vm.layout().slots[1].dirty.live()[0].watch();
        vm.mark_dirty(Ipa::new(DOOR + PAGE_SIZE), 1).unwrap();
        vm
    }

    const DOOR: u64 = IPA + 2 * PAGE_SIZE;

    /// Who takes the bit of a page that was just mapped finds its leaf, and makes it clean. Else nothing would ever
    /// note the page again.
    #[test]
    fn a_harvest_and_a_first_touch() {
        check(|| {
            let vm = untouched();
            let there = Arc::clone(&vm);
            let other = spawn(move || {
                let fault = Fault {
                    ipa: Ipa::new(DOOR),
                    access: FaultAccess::Write,
                    kind: FaultKind::Translation,
                    va: None,
                };
                assert_eq!(there.handle_fault(fault), Outcome::Dirtied(Level::L3));
            });
            let harvest = |epoch| {
                while vm.take(Epoch(epoch)) != Ok(Progress::Done) {
                    thread::yield_now();
                }
                let words = vm.in_flight(SlotId(1), Epoch(epoch)).unwrap();
                let word = words[0].load(Ordering::Relaxed);
                vm.commit(Epoch(epoch)).unwrap();
                word & 1 == 1
            };
            let first = harvest(1);
            other.join().unwrap();
            assert!(harvest(2) || first, "lost");
            assert!(
                !vm.descend(DOOR).pte.is_dirty(),
                "passed by the last harvest"
            );
        });
    }

    /// Makes the slot read-only: its leaf goes.
    fn make_read_only(vm: &Vm) {
        while vm.set_access(SlotId(0), Access::ReadOnly) != Ok(Progress::Done) {
            thread::yield_now();
        }
    }

    /// What was dirty before the harvest began is in it, wherever the leaf went. The first step of the change,
    /// which waits for those who read the list of slots, is done.
    #[test]
    fn a_harvest_and_the_rest_of_a_change_of_access() {
        check(|| {
            let vm = vm(Engine::Dbm, Granularity::Page, 2);
            assert!(update(&vm));
            vm.layouts.change(|layout| {
                layout.change_slot(SlotId(0), |slot| {
                    slot.access = Access::ReadOnly;
                    slot.leaves = LeavesOf::Older;
                });
            });
            let there = Arc::clone(&vm);
            let other = spawn(move || make_read_only(&there));
            assert!(harvest(&vm, 1), "lost");
            other.join().unwrap();
            assert!(!harvest(&vm, 2), "reported twice");
        });
    }

    #[test]
    fn a_change_of_access_and_an_update_by_the_hardware() {
        check(|| {
            let vm = vm(Engine::Dbm, Granularity::Page, 2);
            let there = Arc::clone(&vm);
            let other = spawn(move || update(&there));
            make_read_only(&vm);
            let dirtied = other.join().unwrap();
            assert_eq!(harvest(&vm, 1), dirtied);
        });
    }

    /// EL2 writes to a page and then notes it: whoever takes the bit finds what was written. The part is marked
    /// before, by another page, so the bit has nothing but itself to say so.
    #[test]
    fn a_take_and_what_was_written() {
        check(|| {
            let dirty = Arc::new(Dirty::new(64).unwrap());
            dirty.mark(4);
            dirty.live()[0].watch();
            dirty.in_flight()[0].watch();
            dirty.marked_parts().iter().for_each(|parts| parts.watch());
            let page = Arc::new(super::weak::AtomicU64::new(0));
            let writer = {
                let (dirty, page) = (Arc::clone(&dirty), Arc::clone(&page));
                spawn(move || {
                    page.store(1, Ordering::Relaxed);
                    dirty.mark(3);
                })
            };
            let take = || {
                let mut taken = 0;
                dirty.begin_harvest();
                dirty.take_live(0, 64, |moved| {
                    taken |= moved.pages;
                    ControlFlow::Continue(())
                });
                dirty.end_harvest();
                taken >> 3 & 1 == 1
            };
            let first = take();
            if first {
                assert_eq!(page.load(Ordering::Relaxed), 1, "copied too early");
            }
            writer.join().unwrap();
            assert!(first || take(), "lost");
        });
    }

    #[test]
    fn a_take_and_a_mark() {
        check(|| {
            let dirty = Arc::new(Dirty::new(64).unwrap());
            dirty.live()[0].watch();
            dirty.in_flight()[0].watch();
            dirty.marked_parts().iter().for_each(|parts| parts.watch());
            let marks = |page| {
                let dirty = Arc::clone(&dirty);
                spawn(move || dirty.mark(page))
            };
            let markers = [marks(3), marks(4)];
            let mut taken = 0;
            dirty.begin_harvest();
            if dirty.next_due(0) < 64 {
                dirty.take_live(0, 64, |moved| {
                    taken |= moved.pages;
                    ControlFlow::Continue(())
                });
            }
            dirty.end_harvest();
            markers
                .into_iter()
                .for_each(|marker| marker.join().unwrap());
            dirty.begin_harvest();
            dirty.take_live(0, 64, |moved| {
                assert_eq!(taken & moved.pages, 0, "taken twice");
                taken |= moved.pages;
                ControlFlow::Continue(())
            });
            assert_eq!(taken, 0b11000);
            assert_eq!(dirty.in_flight()[0].load(Ordering::Relaxed), 0b11000);
            assert_eq!((dirty.live_pages(), dirty.in_flight_pages()), (0, 2));
        });
    }
}
