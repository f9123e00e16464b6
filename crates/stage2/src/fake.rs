//! A machine to test against: table memory, a record of every barrier and invalidation, and CPUs
//! with TLBs that hold on to everything the architecture lets them.
//!
//! The simulated hardware is deliberately the worst the architecture allows (see [`pe`](Machine::access)):
//! a TLB entry stays until an invalidation that must remove it has been *completed* by a DSB, an
//! invalidation by IPA leaves combined entries alone, and a wrong level hint removes nothing. So a
//! missing step shows as a lost page, not only as a wrong record.
//!
//! Its walker decodes VTCR_EL2 and VTTBR_EL2 by itself and shares no code with the engine.

mod pe;

pub use pe::{Abort, Guest};

use crate::hardware::{Features, Hardware, Support, Table};
use crate::tlb::{IpaOperand, RangeOperand};
use crate::types::{GuestVa, Pa, VmidWidth};
use pe::{Op, Pe};
use std::boxed::Box;
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::vec::Vec;

/// Where the fake's table memory lies.
const TABLES: u64 = 0x0000_00ab_cd00_0000;

/// What a freed table is filled with: a table, or a page, at address zero.
const POISON: u64 = 3;

/// One thing the engine did to the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The watched descriptor has this value by now. Recorded before the next event.
    Descriptor(u64),
    /// Tables were allocated.
    Alloc(usize),
    /// Tables were freed.
    Free(usize),
    /// `DSB ISHST`.
    DsbIshst,
    /// `DSB ISH`.
    DsbIsh,
    /// `DSB NSH`.
    DsbNsh,
    /// `ISB`.
    Isb,
    /// VTTBR_EL2 was made current.
    Select(u64),
    /// VTTBR_EL2 was put back.
    Restore(u64),
    /// `TLBI IPAS2E1IS` of an address with a TTL.
    Ipas2e1is(u64, u8),
    /// `TLBI RIPAS2E1IS` of an address and a number of pages.
    Ripas2e1is(u64, u64),
    /// `TLBI VMALLE1IS`.
    Vmalle1is,
    /// `TLBI VMALLS12E1IS`.
    Vmalls12e1is,
    /// `TLBI IPAS2E1` of an address with a TTL.
    Ipas2e1(u64, u8),
    /// `TLBI VAAE1` of an address.
    Vaae1(u64),
    /// `TLBI VMALLE1`.
    Vmalle1,
}

struct Memory {
    used: Vec<bool>,
    in_use: usize,
    /// Where to look first.
    hint: usize,
    /// Tables that may be in use at once.
    limit: usize,
}

#[derive(Default)]
struct Record {
    on: bool,
    events: Vec<Event>,
    watched: Option<(usize, usize, u64)>,
}

/// Locks, also after a test that failed with the lock held: it must still be able to clean up.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What another CPU does in the middle of something.
type Interruption = Box<dyn FnOnce() + Send>;

/// The fake machine.
pub struct Machine {
    interruptions: Mutex<Vec<(Event, Interruption)>>,
    tables: Vec<Table>,
    memory: Mutex<Memory>,
    record: Mutex<Record>,
    pes: Vec<Mutex<Pe>>,
    /// Invalidations issued and not yet completed by a DSB of the same thread.
    queues: Mutex<HashMap<ThreadId, Vec<Op>>>,
    vttbr: AtomicU64,
}

std::thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

impl Machine {
    /// Makes a machine with memory for `tables` tables and with `pes` CPUs.
    pub fn new(tables: usize, pes: usize) -> Self {
        Self {
            tables: (0..tables).map(|_| Table::new()).collect(),
            memory: Mutex::new(Memory {
                used: std::vec![false; tables],
                in_use: 0,
                hint: 0,
                limit: tables,
            }),
            record: Mutex::new(Record::default()),
            pes: (0..pes).map(|_| Mutex::default()).collect(),
            queues: Mutex::default(),
            vttbr: AtomicU64::new(0),
            interruptions: Mutex::default(),
        }
    }

    /// Returns a feature set with everything in it.
    pub const fn everything() -> Features {
        Features {
            dbm: Support::Present,
            bbm2: Support::Present,
            fwb: Support::Present,
            tlb_range: Support::Present,
            ttl: Support::Present,
            vmid: VmidWidth::Sixteen,
            pa_bits: 48,
        }
    }

    /// Says which CPU the calling thread is from now on.
    pub fn become_pe(&self, pe: usize) {
        CURRENT.with(|current| current.set(pe));
    }

    /// Lets at most `limit` tables be in use at once.
    pub fn limit_tables(&self, limit: usize) {
        lock(&self.memory).limit = limit;
    }

    /// Returns how many tables are in use.
    pub fn tables_in_use(&self) -> usize {
        self.memory
            .lock()
            .unwrap()
            .used
            .iter()
            .filter(|used| **used)
            .count()
    }

    /// Runs `then`, once, the next time the engine does `event`, right after it: what another CPU may
    /// do at that very moment. It must not need the table lock exclusively.
    pub fn interrupt(&self, event: Event, then: impl FnOnce() + Send + 'static) {
        lock(&self.interruptions).push((event, Box::new(then)));
    }

    /// Starts recording, with an empty record.
    pub fn record(&self) {
        *lock(&self.record) = Record {
            on: true,
            ..Record::default()
        };
    }

    /// Starts recording, and notes each new value of the descriptor at `index` of the table at `pa`.
    pub fn record_watching(&self, pa: Pa, index: usize) {
        let table = self.index(pa);
        let value = self.tables[table].entries()[index].load(Ordering::SeqCst);
        let watched = Some((table, index, value));
        *lock(&self.record) = Record {
            on: true,
            events: Vec::new(),
            watched,
        };
    }

    /// Stops recording and returns the record.
    pub fn recorded(&self) -> Vec<Event> {
        let mut record = lock(&self.record);
        self.look(&mut record);
        record.on = false;
        std::mem::take(&mut record.events)
    }

    fn look(&self, record: &mut Record) {
        if let Some((table, index, last)) = &mut record.watched {
            let now = self.tables[*table].entries()[*index].load(Ordering::SeqCst);
            if now != *last {
                *last = now;
                record.events.push(Event::Descriptor(now));
            }
        }
    }

    fn note(&self, event: Event) {
        let mut record = lock(&self.record);
        if record.on {
            self.look(&mut record);
            record.events.push(event);
        }
        drop(record);
        let then = {
            let mut interruptions = lock(&self.interruptions);
            let place = interruptions.iter().position(|(when, _)| *when == event);
            place.map(|place| interruptions.swap_remove(place).1)
        };
        if let Some(then) = then {
            then();
        }
    }

    fn index(&self, pa: Pa) -> usize {
        usize::try_from((pa.raw() - TABLES) / 4096).unwrap()
    }

    fn enqueue(&self, op: Op) {
        let mut queues = lock(&self.queues);
        queues
            .entry(std::thread::current().id())
            .or_default()
            .push(op);
    }

    fn complete(&self, shareable: Shareable) {
        let id = std::thread::current().id();
        let ops: Vec<Op> = {
            let mut queues = lock(&self.queues);
            let Some(queue) = queues.get_mut(&id) else {
                return;
            };
            let (now, later) = queue
                .drain(..)
                .partition(|op| shareable == Shareable::Inner || !op.is_broadcast());
            *queue = later;
            now
        };
        if ops.is_empty() {
            return;
        }
        let current = CURRENT.with(Cell::get);
        for (number, pe) in self.pes.iter().enumerate() {
            // Waits for an access in progress, as the DSB does.
            lock(pe).invalidate(
                ops.iter()
                    .filter(|op| op.is_broadcast() || number == current),
            );
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shareable {
    Inner,
    Non,
}

impl Hardware for Machine {
    fn table(&self, pa: Pa) -> &Table {
        &self.tables[self.index(pa)]
    }

    fn alloc_tables(&self, count: usize) -> Option<Pa> {
        let mut memory = lock(&self.memory);
        if memory.in_use + count > memory.limit {
            return None;
        }
        let fits = |first: &usize| {
            let run = memory.used.get(*first..*first + count);
            run.is_some_and(|run| run.iter().all(|used| !used))
        };
        let from = memory.hint.next_multiple_of(count);
        let mut places = (from..memory.used.len())
            .step_by(count)
            .chain((0..from).step_by(count));
        let first = places.find(fits)?;
        memory.in_use += count;
        memory.hint = first + count;
        for table in first..first + count {
            memory.used[table] = true;
            for entry in self.tables[table].entries() {
                entry.store(0, Ordering::SeqCst);
            }
        }
        drop(memory);
        self.note(Event::Alloc(count));
        Some(Pa::new(TABLES + first as u64 * 4096))
    }

    fn free_tables(&self, pa: Pa, count: usize) {
        self.note(Event::Free(count));
        let first = self.index(pa);
        let mut memory = lock(&self.memory);
        for table in first..first + count {
            assert!(memory.used[table], "a table was freed twice");
            memory.used[table] = false;
            memory.in_use -= 1;
            memory.hint = memory.hint.min(table);
            // Whoever still walks through here ends at an address that is nothing.
            for entry in self.tables[table].entries() {
                entry.store(POISON, Ordering::SeqCst);
            }
        }
    }

    fn dsb_ishst(&self) {
        self.note(Event::DsbIshst);
    }

    fn dsb_ish(&self) {
        self.note(Event::DsbIsh);
        self.complete(Shareable::Inner);
    }

    fn dsb_nsh(&self) {
        self.note(Event::DsbNsh);
        self.complete(Shareable::Non);
    }

    fn isb(&self) {
        self.note(Event::Isb);
    }

    fn select(&self, vttbr: u64) -> u64 {
        self.note(Event::Select(vttbr));
        self.vttbr.swap(vttbr, Ordering::SeqCst)
    }

    fn restore(&self, previous: u64) {
        self.note(Event::Restore(previous));
        self.vttbr.store(previous, Ordering::SeqCst);
    }

    fn tlbi_ipas2e1is(&self, operand: IpaOperand) {
        self.note(Event::Ipas2e1is(operand.ipa().raw(), operand.ttl()));
        self.enqueue(Op::Ipa {
            ipa: operand.ipa().raw(),
            ttl: operand.ttl(),
            broadcast: true,
        });
    }

    fn tlbi_ripas2e1is(&self, operand: RangeOperand) {
        let start = operand.start().raw();
        self.note(Event::Ripas2e1is(start, operand.pages()));
        let ttl = (operand.bits() >> 37 & 3) as u8;
        self.enqueue(Op::Range {
            start,
            end: start + operand.pages() * 4096,
            ttl,
        });
    }

    fn tlbi_vmalle1is(&self) {
        self.note(Event::Vmalle1is);
        self.enqueue(Op::Combined { broadcast: true });
    }

    fn tlbi_vmalls12e1is(&self) {
        self.note(Event::Vmalls12e1is);
        self.enqueue(Op::Everything);
    }

    fn tlbi_ipas2e1(&self, operand: IpaOperand) {
        self.note(Event::Ipas2e1(operand.ipa().raw(), operand.ttl()));
        self.enqueue(Op::Ipa {
            ipa: operand.ipa().raw(),
            ttl: operand.ttl(),
            broadcast: false,
        });
    }

    fn tlbi_vaae1(&self, va: GuestVa) {
        self.note(Event::Vaae1(va.raw()));
        self.enqueue(Op::Va { va: va.raw() });
    }

    fn tlbi_vmalle1(&self) {
        self.note(Event::Vmalle1);
        self.enqueue(Op::Combined { broadcast: false });
    }
}
