//! The heap refuses a request, each one in turn: whoever asked says so, and all is as it was before.
//!
//! A program of its own, because the allocator is one for all of a program. It refuses on the thread that
//! asks it to, and only what is large: lists and bitmaps, which grow with the guest and of which the
//! crate says that it can do without. What is small and always of one size it takes for granted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use tidemark_stage2::fake::Machine;
use tidemark_stage2::*;

/// What counts as large, in bytes.
const LARGE: usize = 128;

struct Heap;

#[global_allocator]
static HEAP: Heap = Heap;

thread_local! {
    /// Large requests until one is refused.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    /// Bytes that this thread got and did not give back.
    static HELD: Cell<isize> = const { Cell::new(0) };
}

fn refuses(size: usize) -> bool {
    if size < LARGE {
        return false;
    }
    LEFT.with(|left| match left.get() {
        Some(0) => {
            left.set(None);
            true
        }
        Some(more) => {
            left.set(Some(more - 1));
            false
        }
        None => false,
    })
}

// SAFETY: every request goes to the system's allocator unchanged, or is answered with null, which says
// that there is no memory. The thread's counters need no memory and have no destructor.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if refuses(layout.size()) {
            return std::ptr::null_mut();
        }
        HELD.with(|held| held.set(held.get() + layout.size() as isize));
        // SAFETY: the caller's promise about the layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.with(|held| held.set(held.get() - layout.size() as isize));
        // SAFETY: it came from `alloc`, with this layout, as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Calls `run` with the large request after `after` others refused, and says whether there was one.
fn refusing<R>(after: usize, run: impl FnOnce() -> R) -> (R, bool) {
    LEFT.with(|left| left.set(Some(after)));
    let result = run();
    let refused = LEFT.with(|left| left.take().is_none());
    (result, refused)
}

/// Bytes that `run` got and did not give back.
fn leaked(run: impl FnOnce()) -> isize {
    let before = HELD.with(Cell::get);
    run();
    HELD.with(Cell::get) - before
}

const CPUS: usize = 4;
const BASE: Ipa = Ipa::new(0x4000_0000);

fn vm(machine: &Arc<Machine>) -> Result<Stage2<Arc<Machine>>, Error> {
    let vmid = Vmid::new(1, VmidWidth::Eight).unwrap();
    Stage2::new(Arc::clone(machine), 40, vmid, Features::BASELINE)
}

/// Many extents, none beside the one before: a list of them is large.
fn extents() -> Vec<Extent> {
    let extent = |number: u64| Extent {
        pa: Pa::new(0x20_0000_0000 + number * 0x100_0000),
        pages: 2048,
    };
    (0..32).map(extent).collect()
}

#[test]
fn a_vm_without_memory_for_its_lists_is_not_made() {
    let machine = Arc::new(Machine::new(16, CPUS));
    let mut refusals = 0;
    let leaked = leaked(|| {
        for after in 0.. {
            let (vm, refused) = refusing(after, || vm(&machine));
            if !refused {
                assert!(vm.is_ok());
                break;
            }
            assert!(matches!(vm, Err(Error::OutOfMemory)), "at {after}");
            assert_eq!(machine.tables_in_use(), 0);
            refusals += 1;
        }
    });
    assert_eq!((refusals, leaked), (1, 0));
}

#[test]
fn a_slot_without_memory_for_its_bitmaps_is_not_added() {
    let mut refusals = 0;
    let leaked = leaked(|| {
        for after in 0.. {
            let machine = Arc::new(Machine::new(16, CPUS));
            let stage2 = vm(&machine).unwrap();
            let extents = extents();
            let add = || {
                let pages = extents.iter().map(|extent| extent.pages).sum();
                stage2.add_slot(SlotId(7), BASE.gfn(), pages, Access::ReadWrite, &extents)
            };
            let (added, refused) = refusing(after, add);
            if !refused {
                assert_eq!(added, Ok(()));
                break;
            }
            assert_eq!(added, Err(Error::OutOfMemory), "at {after}");
            refusals += 1;
            assert!(stage2.slots().is_empty());
            assert_eq!(stage2.translate(BASE), None);
            assert_eq!(stage2.log_status().live_pages, 0);
            assert_eq!(machine.tables_in_use() as u64, stage2.mappings().tables);
            // With memory it is added, and logged.
            add().unwrap();
            while stage2.start_log(Engine::WriteProtect, Granularity::Page) != Ok(Progress::Done) {}
            let write = Fault {
                ipa: BASE,
                access: FaultAccess::Write,
                kind: FaultKind::Translation,
                va: None,
            };
            assert_eq!(stage2.handle_fault(write), Outcome::Dirtied(Level::L3));
            while stage2.take(Epoch(1)) != Ok(Progress::Done) {}
            assert_eq!(stage2.taken(Epoch(1)).unwrap()[0].dirty_pages, 1);
        }
    });
    // Its extents, its two bitmaps, and a place in each CPU's list.
    assert_eq!((refusals, leaked), (3 + CPUS, 0));
}
