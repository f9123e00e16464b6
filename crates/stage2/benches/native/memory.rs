//! A machine of nothing but table memory: barriers do nothing, invalidations are counted.
//!
//! So what is measured is the engine and the memory its tables lie in. Tables are handed out in
//! ascending order, side by side, as a hypervisor's boot-time pool would.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tidemark_stage2::{
    GuestVa, Hardware, IpaOperand, PAGE_SIZE, Pa, RangeOperand, Table, TableAt, TablePages,
};

/// Where the tables lie in the machine.
const BASE: u64 = 1 << 40;

pub struct Memory {
    tables: Vec<Table>,
    /// Tables ever handed out.
    used: AtomicUsize,
    /// Single tables that came back.
    back: Mutex<Vec<Pa>>,
    invalidations: AtomicU64,
}

impl Memory {
    pub fn new(tables: usize) -> Self {
        Self {
            tables: (0..tables).map(|_| Table::new()).collect(),
            used: AtomicUsize::new(0),
            back: Mutex::default(),
            invalidations: AtomicU64::new(0),
        }
    }

    /// Returns the number of the table at `pa`.
    pub fn index(pa: Pa) -> usize {
        ((pa.raw() - BASE) / PAGE_SIZE) as usize
    }

    /// Returns the tables of a run of numbers.
    pub fn tables(&self, run: Range<usize>) -> &[Table] {
        &self.tables[run]
    }

    /// Hands out a single table that came back.
    fn take_back(&self) -> Option<Pa> {
        let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        back.pop()
    }

    /// Zeroes a table that came back, as fast as memory can be zeroed.
    fn zero(&self, pa: Pa) {
        let table: *const Table = &self.tables[Self::index(pa)];
        // SAFETY: `AtomicU64` may be written to by way of a shared reference, zero is a value of it, and
        // nobody else reaches a table that was given back and not yet handed out.
        unsafe { table.cast_mut().write_bytes(0, 1) };
    }

    fn invalidate(&self) {
        self.invalidations.fetch_add(1, Ordering::Relaxed);
    }
}

/// How many CPUs there seem to be.
const CPUS: usize = 4;

/// The next thread's CPU: threads that run at once have numbers in a row.
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CPU: usize = NEXT.fetch_add(1, Ordering::Relaxed) % CPUS;
}

impl Hardware for Memory {
    #[inline]
    fn cpu(&self) -> usize {
        CPU.with(|cpu| *cpu)
    }

    fn cpus(&self) -> usize {
        CPUS
    }

    #[inline]
    fn table(&self, at: TableAt<Self>) -> &Table {
        &self.tables[Self::index(at.pa())]
    }

    fn alloc_tables(&self, count: usize) -> Option<Pa> {
        if count == 1
            && let Some(pa) = self.take_back()
        {
            self.zero(pa);
            return Some(pa);
        }
        let fits = |used: usize| {
            let first = used.next_multiple_of(count);
            (first + count <= self.tables.len()).then_some(first + count)
        };
        let used = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .ok()?;
        let first = used.next_multiple_of(count) as u64;
        Some(Pa::new(BASE + first * PAGE_SIZE))
    }

    fn alloc_unwritten(&self) -> Option<Pa> {
        self.take_back().or_else(|| self.alloc_tables(1))
    }

    fn free_tables(&self, pages: TablePages<Self>) {
        // Concatenated roots come back only when the VM ends, and then nobody asks any more.
        if pages.count() == 1 {
            let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
            back.push(pages.first());
        }
    }

    #[inline]
    fn prefetch(&self, entries: &[AtomicU64; 64]) {
        for line in entries.chunks(8) {
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                // SAFETY: a prefetch changes nothing, and this one is of memory that is borrowed.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = line;
        }
    }

    fn dsb_ishst(&self) {}
    fn dsb_ish(&self) {}
    fn dsb_nsh(&self) {}
    fn isb(&self) {}
    fn clean_invalidate(&self, _: &[AtomicU64]) {}

    fn select(&self, vttbr: u64) -> u64 {
        vttbr
    }
    fn restore(&self, _: u64) {}

    fn tlbi_ipas2e1is(&self, _: IpaOperand) {
        self.invalidate();
    }
    fn tlbi_ripas2e1is(&self, _: RangeOperand) {
        self.invalidate();
    }
    fn tlbi_vmalle1is(&self) {
        self.invalidate();
    }
    fn tlbi_vmalls12e1is(&self) {
        self.invalidate();
    }
    fn tlbi_vale2is(&self) {
        self.invalidate();
    }
    fn tlbi_ipas2e1(&self, _: IpaOperand) {
        self.invalidate();
    }
    fn tlbi_vaae1(&self, _: GuestVa) {
        self.invalidate();
    }
    fn tlbi_vmalle1(&self) {
        self.invalidate();
    }
}
