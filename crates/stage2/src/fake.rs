//! A machine to test against: table memory, a record of every barrier and invalidation, and CPUs
//! with TLBs that hold on to everything the architecture lets them.
//!
//! The simulated hardware is deliberately the worst the architecture allows (see
//! [`access`](Machine::access)): a TLB entry stays until an invalidation that must remove it has been
//! *completed* by a DSB, an invalidation by IPA leaves combined entries alone, and a wrong level hint
//! removes nothing. So a missing step shows as a lost page, not only as a wrong record. Where there is
//! no one worst case, [`Whims`] decide.
//!
//! On a machine that needs them, broadcast invalidations are to be repeated ([`assume`](Machine::assume)): until then
//! other CPUs go on storing through what was dropped.
//!
//! Its walker decodes VTCR_EL2 and VTTBR_EL2 by itself and shares no code with the engine. If it is told
//! what the machine has ([`assume`](Machine::assume)), a TLB conflict panics.
//!
//! | file | part |
//! |---|---|
//! | `pe` | a CPU: walks, hardware updates of descriptors, stage 1 |
//! | `ram` | a guest's memory, and the caches before it |
//! | `tlb` | what it has cached, and what an invalidation removes |
//! | `whims` | what the architecture leaves open |
//! | `traced`, `locks`, `scheduler` | in this crate's own tests: every access is seen, and any CPU may come first |
//! | `watched` | in those tests: what descriptors and TLBs hold |

#[cfg(test)]
pub(crate) mod locks;
mod pe;
mod ram;
mod rng;
#[cfg(test)]
pub(crate) mod scheduler;
mod tlb;
#[cfg(test)]
pub mod traced;
#[cfg(test)]
mod watched;
mod whims;

pub use pe::{Abort, Guest, Stage1};
pub use ram::Caching;
#[cfg(test)]
pub(crate) use rng::Rng;
pub use whims::{Speculation, Whims};

use crate::hardware::{Features, Hardware, Leaves, Support, Table, TableAt, TablePages, Tlbi};
use crate::tlb::{IpaOperand, RangeOperand};
use crate::types::{GuestVa, Pa, VmidWidth};
use pe::Pe;
use std::boxed::Box;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::vec::Vec;
use tlb::{Op, Tlb, What};

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
    /// `DC CIVAC` over so many words.
    CleanInvalidate(usize),
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
    /// `TLBI VALE2IS` of nothing.
    Vale2is,
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
    refusal: Refusal,
    /// How many requests were refused by it.
    refused: usize,
}

/// Requests for tables that find no memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// None.
    None,
    /// The one after so many others, and no more.
    One(usize),
    /// All after so many.
    AllFrom(usize),
}

impl Refusal {
    /// Is the next request refused?
    fn next(&mut self) -> bool {
        let (Refusal::One(after) | Refusal::AllFrom(after)) = self else {
            return false;
        };
        if let Some(fewer) = after.checked_sub(1) {
            *after = fewer;
            return false;
        }
        if matches!(self, Refusal::One(_)) {
            *self = Refusal::None;
        }
        true
    }
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

/// A descriptor in table memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Entry {
    pub(crate) table: usize,
    pub(crate) index: usize,
}

/// An update of a descriptor that others do not see yet (R_RZYCN): the store that caused it has
/// happened, and until a DSB of this CPU (R_MKHJS) plain loads may still find the old value.
///
/// Not so an atomic access by another CPU. The update is one itself, and what it compared was read
/// before the store; so whoever changes the word atomically after that store comes after the update,
/// and it arrives first.
#[derive(Clone, Copy, Debug)]
struct Late {
    pe: usize,
    place: Entry,
    expected: u64,
    dirty: u64,
    /// On tables that are not Inner Shareable Write-Back updates are loads and stores (R_WLTNL).
    atomic: bool,
}

/// A descriptor whose change has no barrier behind it yet: walkers of other CPUs may still see it as
/// it was.
#[derive(Clone, Copy, Debug)]
struct Unsettled {
    by: usize,
    /// The operation that made it has returned, so that others have observed it: what a CPU observed
    /// comes before its own barrier, too.
    observed: bool,
    old: u64,
    /// How often more. Without a barrier it takes long, not for ever.
    looks: u32,
}

struct Cpu {
    pe: Mutex<Pe>,
    /// VTTBR_EL2.
    vttbr: AtomicU64,
    /// Invalidations it issued and did not complete by a DSB yet.
    queue: Mutex<Vec<Op>>,
}

/// The fake machine.
pub struct Machine {
    interruptions: Mutex<Vec<(Event, Interruption)>>,
    tables: Vec<Table>,
    memory: Mutex<Memory>,
    record: Mutex<Record>,
    cpus: Vec<Cpu>,
    whims: OnceLock<Mutex<Whims>>,
    late: Mutex<Vec<Late>>,
    unsettled: Mutex<BTreeMap<Entry, Unsettled>>,
    /// A guest's memory, where a test looks into it.
    ram: OnceLock<ram::Ram>,
    /// What TLBs may hold at once, and what completes a broadcast, if it is to be checked.
    features: OnceLock<Features>,
}

std::thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

impl Machine {
    /// Makes a machine with memory for `tables` tables and with `pes` CPUs, at most 64.
    pub fn new(tables: usize, pes: usize) -> Self {
        let cpu = |number| Cpu {
            pe: Mutex::new(Pe {
                number,
                tlb: Tlb::default(),
                in_flight: BTreeMap::new(),
            }),
            vttbr: AtomicU64::new(0),
            queue: Mutex::default(),
        };
        Self {
            tables: (0..tables).map(|_| Table::new()).collect(),
            memory: Mutex::new(Memory {
                used: std::vec![false; tables],
                in_use: 0,
                hint: 0,
                limit: tables,
                refusal: Refusal::None,
                refused: 0,
            }),
            record: Mutex::new(Record::default()),
            cpus: (0..pes).map(cpu).collect(),
            interruptions: Mutex::default(),
            whims: OnceLock::new(),
            late: Mutex::default(),
            unsettled: Mutex::default(),
            ram: OnceLock::new(),
            features: OnceLock::new(),
        }
    }

    /// Returns a feature set with everything in it, the errata included.
    pub const fn everything() -> Features {
        Features {
            dbm: Support::Present,
            bbm2: Support::Present,
            fwb: Support::Present,
            tlb_range: Support::Present,
            ttl: Support::Present,
            tlbi: Tlbi::Twice,
            leaves: Leaves::Blocks,
            vmid: VmidWidth::Sixteen,
            pa_bits: 48,
        }
    }

    /// Hands out tables, full of `content`.
    fn alloc(&self, count: usize, content: u64) -> Option<Pa> {
        #[cfg(test)]
        traced::milestone();
        let mut memory = lock(&self.memory);
        if memory.refusal.next() {
            memory.refused += 1;
            return None;
        }
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
            self.fill(table, content);
        }
        drop(memory);
        self.note(Event::Alloc(count));
        Some(Pa::new(TABLES + first as u64 * 4096))
    }

    /// Says which CPU the calling thread is from now on.
    pub fn become_pe(&self, pe: usize) {
        CURRENT.with(|current| current.set(pe));
    }

    /// Returns the CPU that the calling thread is.
    pub fn current_pe(&self) -> usize {
        // A thread may have been a CPU of a larger machine before.
        CURRENT.with(Cell::get) % self.cpus.len()
    }

    /// `TLBI ALLE1; DSB NSH` on the CPU that the calling thread is.
    pub fn forget_all(&self) {
        let mut pe = lock(&self.cpus[self.current_pe()].pe);
        pe.tlb = Tlb::default();
        pe.in_flight.clear();
    }

    /// Lets the CPUs have whims from now on. Said once, before anything runs.
    pub fn set_whims(&self, whims: Whims) {
        let first = self.whims.set(Mutex::new(whims));
        assert!(first.is_ok(), "the machine has its whims already");
    }

    fn whims(&self) -> Option<MutexGuard<'_, Whims>> {
        self.whims.get().map(lock)
    }

    /// Checks from now on that no TLB can hold what these features do not let it hold at once, and
    /// completes broadcast invalidations as late as they say. Said once.
    pub fn assume(&self, features: &Features) {
        let first = self.features.set(*features);
        assert!(first.is_ok(), "the machine knows its features already");
    }

    fn completes_early(&self) -> bool {
        let features = self.features.get();
        features.is_some_and(|features| features.tlbi == Tlbi::Twice)
    }

    /// A `DSB SY` on `pe`, as when its vCPU exits for good: the stores and the updates of descriptors it
    /// has under way are visible.
    pub fn synchronize(&self, pe: usize) {
        lock(&self.cpus[pe].pe).in_flight.clear();
        let mut late = lock(&self.late);
        late.retain(|late| {
            if late.pe == pe {
                self.arrive(late);
            }
            late.pe != pe
        });
    }

    /// Returns how many updates of descriptors are under way.
    pub fn late_updates(&self) -> usize {
        lock(&self.late).len()
    }

    /// Lets at most `limit` tables be in use at once.
    pub fn limit_tables(&self, limit: usize) {
        lock(&self.memory).limit = limit;
    }

    /// Refuses requests for tables from now on.
    pub fn refuse_tables(&self, refusal: Refusal) {
        let mut memory = lock(&self.memory);
        (memory.refusal, memory.refused) = (refusal, 0);
    }

    /// Returns how many requests were refused since it was said which ones are to be.
    pub fn refused(&self) -> usize {
        lock(&self.memory).refused
    }

    /// Returns how many tables are in use.
    pub fn tables_in_use(&self) -> usize {
        lock(&self.memory).in_use
    }

    /// Runs `then`, once, the next time the engine does `event`, right after it: what another CPU may
    /// do at that very moment. It must not wait for this CPU.
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
        let watched = Some((table, index, self.value(table, index)));
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
            let now = self.value(*table, *index);
            if now != *last {
                *last = now;
                record.events.push(Event::Descriptor(now));
            }
        }
    }

    fn note(&self, event: Event) {
        #[cfg(test)]
        {
            traced::milestone();
            traced::noted(event);
        }
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

    /// Returns the table at `pa`, whoever has it.
    pub fn table_of(&self, pa: Pa) -> &Table {
        &self.tables[self.index(pa)]
    }

    fn value(&self, table: usize, index: usize) -> u64 {
        crate::sync::raw(&self.tables[table].entries()[index]).load(Ordering::SeqCst)
    }

    fn enqueue(&self, what: What, shareable: Shareable) {
        let current = self.current_pe();
        let broadcast = shareable == Shareable::Inner;
        let cpu = &self.cpus[current];
        let all = u64::MAX >> (64 - self.cpus.len());
        let mut op = Op {
            what,
            vmid: (cpu.vttbr.load(Ordering::SeqCst) >> 48) as u16,
            broadcast,
            left: if broadcast { all } else { 1 << current },
        };
        for (number, cpu) in self.cpus.iter().enumerate() {
            let early = self
                .whims()
                .is_some_and(|mut whims| whims.invalidates_early());
            if early && op.left >> number & 1 == 1 {
                lock(&cpu.pe).tlb.apply(&op);
                op.left &= !(1 << number);
            }
        }
        lock(&cpu.queue).push(op);
    }

    fn complete(&self, shareable: Shareable) {
        let current = self.current_pe();
        let ops: Vec<Op> = {
            let mut queue = lock(&self.cpus[current].queue);
            let (now, later) = queue
                .drain(..)
                .partition(|op| shareable == Shareable::Inner || !op.broadcast);
            *queue = later;
            now
        };
        if ops.is_empty() {
            return;
        }
        let early = self.completes_early() && ops.iter().any(|op| op.broadcast);
        for (number, cpu) in self.cpus.iter().enumerate() {
            // Between invalidations that one DSB completes there is no order. As bad as it gets is that
            // combined entries went first and were made again from the stage-2 ones: that is, stayed.
            let left = || ops.iter().filter(|op| op.left >> number & 1 == 1);
            let by_ipa = left().any(|op| matches!(op.what, What::Ipa { .. } | What::Range { .. }));
            let recombined = by_ipa && self.whims().is_none_or(|mut whims| whims.recombines());
            // Waits for an access in progress, as the DSB does.
            let mut pe = lock(&cpu.pe);
            let before = (early && number != current).then(|| pe.tlb.writable());
            left()
                .filter(|op| op.what != What::Combined || !recombined)
                .for_each(|op| pe.tlb.apply(op));
            if let Some(mut dropped) = before {
                // What an earlier one dropped is complete by this one.
                dropped.subtract(&pe.tlb);
                pe.in_flight.insert(current, dropped);
            }
        }
    }

    /// An update becomes visible.
    fn arrive(&self, late: &Late) {
        let Entry { table, index } = late.place;
        let word = crate::sync::raw(&self.tables[table].entries()[index]);
        if late.atomic {
            let swapped = word.compare_exchange(
                late.expected,
                late.dirty,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
            assert!(
                swapped.is_ok(),
                "{:#x} became {swapped:x?} before the hardware's update of it arrived",
                late.expected
            );
        } else {
            word.store(late.dirty, Ordering::SeqCst);
        }
    }

    /// Writes all of a table, as the allocator does.
    fn fill(&self, table: usize, value: u64) {
        lock(&self.late).retain(|late| late.place.table != table);
        lock(&self.unsettled).retain(|place, _| place.table != table);
        for entry in self.tables[table].entries() {
            crate::sync::raw(entry).store(value, Ordering::SeqCst);
        }
        #[cfg(test)]
        traced::filled(table);
    }

    /// Lets updates of the descriptor arrive: an atomic access to it comes after them.
    pub(crate) fn settle(&self, place: Entry) {
        lock(&self.late).retain(|late| {
            let arrives = late.place == place && late.atomic;
            if arrives {
                self.arrive(late);
            }
            !arrives
        });
    }

    /// Returns what the walker of `pe` sees of a descriptor that holds `value`.
    fn seen(&self, pe: usize, place: Entry, value: u64, whims: Option<&mut Whims>) -> u64 {
        let Some(whims) = whims else { return value };
        match lock(&self.unsettled).get_mut(&place) {
            Some(change) if change.by != pe && change.looks > 0 && whims.looks_back() => {
                change.looks -= 1;
                change.old
            }
            _ => value,
        }
    }

    /// The barriers make earlier changes of descriptors by this CPU visible to every walker.
    fn settle_changes(&self) {
        let current = self.current_pe();
        lock(&self.unsettled).retain(|_, change| change.by != current && !change.observed);
    }

    /// The current CPU has given back the locks it held: whoever takes them knows what it did.
    pub fn released(&self) {
        let current = self.current_pe();
        let mut unsettled = lock(&self.unsettled);
        for change in unsettled.values_mut() {
            change.observed |= change.by == current;
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shareable {
    Inner,
    Non,
}

impl Hardware for Machine {
    fn cpu(&self) -> usize {
        self.current_pe()
    }

    fn cpus(&self) -> usize {
        self.cpus.len()
    }

    fn table(&self, at: TableAt<Self>) -> &Table {
        self.table_of(at.pa())
    }

    fn alloc_tables(&self, count: usize) -> Option<Pa> {
        self.alloc(count, 0)
    }

    fn alloc_unwritten(&self) -> Option<Pa> {
        self.alloc(1, POISON)
    }

    fn free_tables(&self, pages: TablePages<Self>) {
        self.note(Event::Free(pages.count()));
        let first = self.index(pages.first());
        let mut memory = lock(&self.memory);
        for table in first..first + pages.count() {
            assert!(memory.used[table], "a table was freed twice");
            memory.used[table] = false;
            memory.in_use -= 1;
            memory.hint = memory.hint.min(table);
            // Whoever still walks through here ends at an address that is nothing.
            self.fill(table, POISON);
        }
    }

    fn dsb_ishst(&self) {
        self.note(Event::DsbIshst);
        self.settle_changes();
    }

    fn dsb_ish(&self) {
        self.note(Event::DsbIsh);
        self.settle_changes();
        self.complete(Shareable::Inner);
        // Its own updates of descriptors, not those of the CPUs that its invalidations reached: whether
        // TLBI and DSB order those is not said, so nothing may depend on it.
        self.synchronize(self.current_pe());
    }

    fn dsb_nsh(&self) {
        self.note(Event::DsbNsh);
        self.complete(Shareable::Non);
    }

    fn isb(&self) {
        self.note(Event::Isb);
    }

    fn clean_invalidate(&self, words: &[crate::sync::atomic::AtomicU64]) {
        self.maintain(words);
    }

    fn select(&self, vttbr: u64) -> u64 {
        self.note(Event::Select(vttbr));
        let cpu = &self.cpus[self.current_pe()];
        cpu.vttbr.swap(vttbr, Ordering::SeqCst)
    }

    fn restore(&self, previous: u64) {
        self.note(Event::Restore(previous));
        let cpu = &self.cpus[self.current_pe()];
        cpu.vttbr.store(previous, Ordering::SeqCst);
    }

    fn tlbi_ipas2e1is(&self, operand: IpaOperand) {
        let (ipa, ttl) = (operand.ipa().raw(), operand.ttl());
        self.note(Event::Ipas2e1is(ipa, ttl));
        self.enqueue(What::Ipa { ipa, ttl }, Shareable::Inner);
    }

    fn tlbi_ripas2e1is(&self, operand: RangeOperand) {
        let start = operand.start().raw();
        self.note(Event::Ripas2e1is(start, operand.pages()));
        let what = What::Range {
            start,
            end: start + operand.pages() * 4096,
            ttl: (operand.bits() >> 37 & 3) as u8,
        };
        self.enqueue(what, Shareable::Inner);
    }

    fn tlbi_vmalle1is(&self) {
        self.note(Event::Vmalle1is);
        self.enqueue(What::Combined, Shareable::Inner);
    }

    fn tlbi_vmalls12e1is(&self) {
        self.note(Event::Vmalls12e1is);
        self.enqueue(What::Everything, Shareable::Inner);
    }

    fn tlbi_vale2is(&self) {
        self.note(Event::Vale2is);
        self.enqueue(What::Nothing, Shareable::Inner);
    }

    fn tlbi_ipas2e1(&self, operand: IpaOperand) {
        let (ipa, ttl) = (operand.ipa().raw(), operand.ttl());
        self.note(Event::Ipas2e1(ipa, ttl));
        self.enqueue(What::Ipa { ipa, ttl }, Shareable::Non);
    }

    fn tlbi_vaae1(&self, va: GuestVa) {
        self.note(Event::Vaae1(va.raw()));
        self.enqueue(What::Va { va: va.raw() }, Shareable::Non);
    }

    fn tlbi_vmalle1(&self) {
        self.note(Event::Vmalle1);
        self.enqueue(What::Combined, Shareable::Non);
    }
}
