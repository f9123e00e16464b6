//! Per-CPU data: what TPIDR_EL2 points to.

use super::context::Context;
use aarch64_cpu::registers::{MPIDR_EL1, TPIDR_EL2};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};
use tock_registers::interfaces::{Readable, Writeable};

/// How many CPUs the image can use. A machine's further CPUs are reported and left out.
pub const MAX_CPUS: usize = 32;

/// The part of a CPU's data that assembly knows.
#[repr(C)]
#[derive(Debug)]
pub struct Cpu {
    /// Where the exit path saves the guest's registers; null before the first guest.
    context: AtomicPtr<()>,
    /// Top of the stack on which a fatal exception is reported.
    emergency_stack: AtomicUsize,
    stack_top: AtomicUsize,
    index: AtomicUsize,
    mpidr: AtomicU64,
}

/// Offset of `context`, for the assembly.
pub const CPU_CONTEXT: usize = offset_of!(Cpu, context);
/// Offset of `emergency_stack`, for the assembly.
pub const CPU_EMERGENCY: usize = offset_of!(Cpu, emergency_stack);

static CPUS: [Cpu; MAX_CPUS] = [const {
    Cpu {
        context: AtomicPtr::new(null_mut()),
        emergency_stack: AtomicUsize::new(0),
        stack_top: AtomicUsize::new(0),
        index: AtomicUsize::new(0),
        mpidr: AtomicU64::new(0),
    }
}; MAX_CPUS];

/// CPUs that run, in all.
static COUNT: AtomicUsize = AtomicUsize::new(1);

/// How many CPUs run. Their indices are below it.
pub fn count() -> usize {
    COUNT.load(Relaxed)
}

/// Says how many CPUs run, before there is more than one to ask.
pub fn set_count(count: usize) {
    COUNT.store(count, Relaxed);
}

/// The affinity fields of an MPIDR: what names a CPU to PSCI and to the GIC.
pub const AFFINITY: u64 = 0xff_00ff_ffff;

/// Prepares the data of CPU `index`, before it runs.
pub fn prepare(index: usize, mpidr: u64, stack_top: usize, emergency_stack: usize) -> &'static Cpu {
    let cpu = &CPUS[index];
    cpu.index.store(index, Relaxed);
    cpu.mpidr.store(mpidr & AFFINITY, Relaxed);
    cpu.stack_top.store(stack_top, Relaxed);
    cpu.emergency_stack.store(emergency_stack, Relaxed);
    cpu
}

/// Makes `cpu` the data of the CPU that calls. The boot CPU's own; the others get theirs
/// from the assembly.
pub fn adopt(cpu: &'static Cpu) {
    TPIDR_EL2.set(core::ptr::from_ref(cpu) as u64);
}

/// This CPU's affinity, from the hardware.
pub fn affinity() -> u64 {
    MPIDR_EL1.get() & AFFINITY
}

/// This CPU's index: 0 is the boot CPU. Also 0 before [`adopt`].
#[inline]
pub fn index() -> usize {
    current().map_or(0, |cpu| cpu.index.load(Relaxed))
}

/// The affinity of CPU `index`.
pub fn affinity_of(index: usize) -> u64 {
    CPUS[index].mpidr.load(Relaxed)
}

/// This CPU's data, once it has been given some.
#[inline]
pub fn current() -> Option<&'static Cpu> {
    let cpu = TPIDR_EL2.get() as *const Cpu;
    // SAFETY: TPIDR_EL2 is written by head.S and `adopt` alone, with zero or with the
    // address of an element of CPUS, which is never moved or freed.
    unsafe { cpu.as_ref() }
}

impl Cpu {
    /// Names the registers that the next exit on this CPU saves.
    #[inline]
    pub fn set_context<O>(&self, context: &'static Context<O>) {
        self.context
            .store(core::ptr::from_ref(context).cast_mut().cast(), Relaxed);
    }

    /// Top of this CPU's stack.
    pub fn stack_top(&self) -> usize {
        self.stack_top.load(Relaxed)
    }
}

/// One value a CPU, read and written by that CPU alone.
///
/// EL2 is never interrupted and never moves between CPUs, so a copy in or out is atomic as
/// far as the CPU itself can tell, and no other CPU looks.
pub struct PerCpu<T: Copy>(UnsafeCell<[T; MAX_CPUS]>);

// SAFETY: element `i` is only touched by CPU `i` (`get`, `set` use `index()`). The first value of each was made by
// another CPU (`new`), so it must be one that may go there.
unsafe impl<T: Copy + Send> Sync for PerCpu<T> {}

/// Does not compile if what may not go to another CPU is shared: then two traits have the method.
const _: () = {
    trait IsNotSync<Why> {
        const CHECKED: () = ();
    }
    struct ItIs;
    impl<T> IsNotSync<()> for T {}
    impl<T: Sync> IsNotSync<ItIs> for T {}
    <PerCpu<*const ()> as IsNotSync<_>>::CHECKED
};

impl<T: Copy> PerCpu<T> {
    /// The same value for every CPU.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new([value; MAX_CPUS]))
    }

    #[inline]
    fn own(&self) -> *mut T {
        let index = index();
        debug_assert!(index < MAX_CPUS);
        // `index` came from `prepare`, which indexed CPUS with it.
        self.0.get().cast::<T>().wrapping_add(index)
    }

    /// This CPU's value.
    #[inline]
    pub fn get(&self) -> T {
        // SAFETY: this CPU's own element, in bounds (`own`); no reference to it ever exists.
        unsafe { self.own().read() }
    }

    /// Sets this CPU's value.
    #[inline]
    pub fn set(&self, value: T) {
        // SAFETY: as for `get`.
        unsafe { self.own().write(value) }
    }
}
