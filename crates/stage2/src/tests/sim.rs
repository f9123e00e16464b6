//! Simulated runs: CPUs that take turns as a seed decides, guests that write, EL2 at work, a host that
//! copies, and three watchers that end the run when something is wrong the moment it is:
//! [`rules`] (what may be written to a descriptor), [`ghost`] (what the host lacks is known) and the
//! machine itself (TLB conflicts).
//!
//! A run is repeated exactly by its seed. One that fails prints the last things that happened.

pub mod ghost;
mod host;
pub mod rules;
mod trace;

use super::world::*;
use crate::control::Part;
use crate::fake::scheduler::{Path, Program, Scheduler};
use crate::fake::traced::{self, Observer, Point, Write};
use crate::fake::{Event, Machine, Rng, Speculation, Stage1, Whims};
use crate::types::*;
use crate::{Error, FaultAccess, Features, Outcome, Stage2};
use ghost::Ghost;
use rules::{Bbm, Rules, Scope};
use std::boxed::Box;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::format;
use std::panic::{self, AssertUnwindSafe};
use std::string::String;
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::vec::Vec;
use trace::{Happened, Trace};

/// A slot: where the guest has it, and where the machine.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub id: u16,
    pub ipa: u64,
    pub pages: u64,
    pub access: Access,
    pub pa: u64,
}

impl Place {
    pub fn end(&self) -> u64 {
        self.ipa + self.pages * PAGE_SIZE
    }

    pub fn holds(&self, ipa: u64) -> bool {
        (self.ipa..self.end()).contains(&ipa)
    }
}

/// How a run is made up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub features: Features,
    pub ipa_bits: u8,
    pub tables: usize,
    pub cpus: usize,
    pub seed: u64,
    /// Points between two turns on average; none but where a CPU waits at `None`.
    pub every: Option<u32>,
    /// Do the CPUs have whims?
    pub whims: Option<Speculation>,
}

impl Setup {
    pub fn new(features: Features, seed: u64) -> Self {
        Self {
            features,
            ipa_bits: 40,
            tables: 64,
            cpus: 3,
            seed,
            every: Some(20),
            whims: Some(Speculation::Never),
        }
    }

    /// Nothing happens by chance but the order in which the CPUs' programs take turns.
    pub fn calm(self) -> Self {
        Self {
            every: None,
            whims: None,
            ..self
        }
    }
}

/// Is a slot there?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    There,
    /// Being added, deleted or changed: an access may end either way.
    Changing,
    Gone,
}

#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub place: Place,
    pub presence: Presence,
    /// Counts changes, so that an access can tell whether there was one meanwhile.
    pub version: u64,
}

/// Which pages were written, to know what may be reported.
#[derive(Default, Debug)]
pub struct Written {
    /// Since the log was asked for.
    pub since_start: BTreeSet<u64>,
    /// Since the last harvest was done, or during it.
    pub unreported: BTreeSet<u64>,
    /// Since the harvest under way began.
    pub during: BTreeSet<u64>,
    /// Writes under way: the page may be dirty already.
    attempts: Vec<u64>,
}

impl Written {
    pub fn forget(&mut self) {
        let attempts = std::mem::take(&mut self.attempts);
        *self = Self {
            attempts,
            ..Self::default()
        };
    }

    pub fn attempts(&self) -> impl Iterator<Item = &u64> {
        self.attempts.iter()
    }
}

pub struct Sim {
    pub world: World,
    setup: Setup,
    scheduler: Scheduler,
    rules: Mutex<Rules>,
    pub ghost: Mutex<Ghost>,
    trace: Mutex<Trace>,
    pub slots: Mutex<BTreeMap<u16, Known>>,
    clock: Mutex<u64>,
    pub written: Mutex<Written>,
    rng: Mutex<Rng>,
    /// Where CPUs may be interrupted, if not everywhere.
    meets: OnceLock<Meets>,
}

/// The words that a scenario is about.
struct Meets {
    /// By index, of descriptors in any table: a table that is not linked yet counts too.
    entries: BTreeSet<usize>,
    /// By address, of bitmaps and locks.
    words: BTreeSet<usize>,
}

impl Meets {
    fn at(&self, machine: &Machine, address: usize) -> bool {
        match machine.locate(address) {
            Some(place) => self.entries.contains(&place.index),
            None => self.words.contains(&address),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The observer is the simulation, seen from the engine.
struct Watch(Arc<Sim>);

impl Observer for Watch {
    fn point(&self, at: Point) {
        let (Point::Word(address) | Point::Other(address)) = at;
        let here = |meets: &Meets| meets.at(&self.0.world.machine, address);
        if self.0.meets.get().is_none_or(here) {
            self.0.scheduler.point();
        }
    }

    fn milestone(&self) {
        self.0.scheduler.milestone();
    }

    fn wait(&self) {
        self.0.scheduler.wait();
    }

    fn settle(&self, address: usize) {
        let machine = &self.0.world.machine;
        if let Some(place) = machine.locate(address) {
            machine.settle(place);
        }
    }

    fn wrote(&self, write: Write) {
        self.0.wrote(write);
    }

    fn filled(&self, table: usize) {
        let filled = lock(&self.0.rules).filled(&self.0.world.machine, table);
        self.0.require(filled);
    }

    fn noted(&self, event: Event) {
        self.0.happened(Happened::Machine(event));
    }
}

impl Sim {
    pub fn new(setup: Setup) -> Arc<Self> {
        Self::with(setup, Scheduler::new(setup.seed, setup.every))
    }

    /// One whose CPUs take turns as `path` says.
    pub fn on(setup: Setup, path: Path) -> Arc<Self> {
        Self::with(setup, Scheduler::of(path))
    }

    fn with(setup: Setup, scheduler: Scheduler) -> Arc<Self> {
        let world = World::sized(setup.features, setup.ipa_bits, setup.tables, setup.cpus);
        if let Some(speculation) = setup.whims {
            world
                .machine
                .set_whims(Whims::new(setup.seed ^ 0x5eed, speculation));
        }
        let bbm = match setup.features.bbm2.is_present() {
            true => Bbm::Level2,
            false => Bbm::Needed,
        };
        let mut rules = Rules::new(bbm);
        rules.root(&world.machine, world.guest.vtcr, world.guest.vttbr);
        Arc::new(Self {
            world,
            setup,
            scheduler,
            rules: Mutex::new(rules),
            ghost: Mutex::default(),
            trace: Mutex::default(),
            slots: Mutex::default(),
            clock: Mutex::default(),
            written: Mutex::default(),
            rng: Mutex::new(Rng::new(setup.seed.rotate_left(32))),
            meets: OnceLock::new(),
        })
    }

    /// From now on CPUs are interrupted only where they may meet over these addresses: in front of an
    /// access to their descriptors and bits, and at barriers, invalidations and allocations.
    pub fn meet_at(&self, addresses: &[u64]) {
        let mut meets = Meets {
            entries: BTreeSet::new(),
            words: BTreeSet::new(),
        };
        for &ipa in addresses {
            meets.entries.extend(LEVELS.map(|level| level.index(ipa)));
            let place = self.slot_of(ipa).unwrap().place;
            let word = ((ipa - place.ipa) / PAGE_SIZE / 64) as usize;
            let dirty = self.world.dirty(place.id);
            for bitmap in [dirty.live(), dirty.in_flight()] {
                meets.words.insert(std::ptr::from_ref(&bitmap[word]).addr());
            }
            for parts in dirty.marked_parts() {
                meets.words.insert(std::ptr::from_ref(parts).addr());
            }
        }
        assert!(self.meets.set(meets).is_ok(), "said twice");
    }

    /// The same for the control mutex: in front of it, and behind it.
    pub fn meet_at_the_mutex(&self) {
        let meets = Meets {
            entries: BTreeSet::new(),
            words: [self.world.stage2.control.address()].into(),
        };
        assert!(self.meets.set(meets).is_ok(), "said twice");
    }

    /// Returns the path that was gone.
    pub fn path(&self) -> Option<Path> {
        self.scheduler.path()
    }

    /// A run with one slot of writable memory.
    pub fn with_ram(setup: Setup, ipa: u64, pages: u64) -> Arc<Self> {
        let sim = Self::new(setup);
        sim.alone(|sim| {
            sim.add(Place {
                id: 0,
                ipa,
                pages,
                access: Access::ReadWrite,
                pa: RAM,
            });
        });
        sim
    }

    /// Runs one program a CPU to the end, CPU 0 first in the list.
    pub fn run(self: &Arc<Self>, programs: Vec<Program<'_>>) {
        assert!(programs.len() <= self.setup.cpus);
        let enter = |cpu| self.world.machine.become_pe(cpu);
        self.watched(|| self.scheduler.run(programs, enter));
    }

    /// Runs one program, on CPU 0, with nobody in between.
    pub fn alone(self: &Arc<Self>, program: impl FnOnce(&Sim)) {
        self.world.machine.become_pe(0);
        self.watched(|| program(self));
    }

    fn watched(self: &Arc<Self>, run: impl FnOnce()) {
        let end = traced::observed(Arc::new(Watch(Arc::clone(self))), || {
            panic::catch_unwind(AssertUnwindSafe(run))
        });
        if let Err(cause) = end {
            if !quiet() {
                self.explain();
            }
            panic::resume_unwind(cause);
        }
    }

    /// Notes what the host does.
    pub fn note(&self, what: impl FnOnce() -> String) {
        self.happened(Happened::Host(what()));
    }

    fn require(&self, result: Result<(), String>) {
        if let Err(why) = result {
            panic!("{why}");
        }
    }

    fn wrote(&self, write: Write) {
        let machine = &self.world.machine;
        let Some(place) = machine.locate(write.address) else {
            lock(&self.ghost).bitmap(machine.current_pe(), write);
            return;
        };
        let scope = lock(&self.rules).scope(place);
        if write.old != write.new {
            machine.changed(place, write.old);
            if let Some(scope) = scope {
                self.happened(Happened::Descriptor(scope, write, 0));
                lock(&self.ghost).descriptor(machine.current_pe(), scope, write);
            }
        }
        let checked = lock(&self.rules).check(machine, place, write);
        self.require(checked);
    }

    /// Calls the engine. When it returns, the CPU holds nothing any more.
    pub fn op<R>(&self, name: &'static str, call: impl FnOnce(&Stage2<Arc<Machine>>) -> R) -> R {
        self.happened(Happened::Begins(name));
        let result = call(&self.world.stage2);
        self.happened(Happened::Returns(name));
        self.world.machine.released();
        let pages = lock(&self.ghost).release(self.world.machine.current_pe());
        for page in pages {
            self.check(page);
        }
        result
    }

    fn check(&self, ipa: u64) {
        let checked = lock(&self.ghost).check(&self.world.machine, self.world.guest, ipa);
        self.require(checked);
    }

    /// Checks every page.
    pub fn check_all(&self) {
        let pages = lock(&self.ghost).all();
        pages.into_iter().for_each(|page| self.check(page));
    }

    /// Lets the others go on: whoever calls this would otherwise wait in a loop.
    pub fn pause(&self) {
        self.scheduler.wait();
    }

    /// A place for others to go on, between two things.
    pub fn breathe(&self) {
        self.scheduler.breathe();
    }

    pub fn roll(&self, bound: u64) -> u64 {
        lock(&self.rng).below(bound)
    }

    fn may_be_dirty(&self, page: u64) {
        let mut written = lock(&self.written);
        written.since_start.insert(page);
        written.unreported.insert(page);
        written.during.insert(page);
    }

    fn stored(&self, ipa: u64) {
        let now = {
            let mut clock = lock(&self.clock);
            *clock += 1;
            *clock
        };
        self.happened(Happened::Stored(ipa, now));
        lock(&self.ghost).stored(ipa, now);
        self.may_be_dirty(ipa & !(PAGE_SIZE - 1));
        self.check(ipa);
    }

    /// Do CPUs of this run write to descriptors for accesses that never happen?
    pub fn speculates(&self) -> bool {
        self.setup.whims == Some(Speculation::Sometimes)
    }

    /// Is no slot being added, deleted or changed?
    pub fn slots_are_still(&self) -> bool {
        let slots = lock(&self.slots);
        slots
            .values()
            .all(|slot| slot.presence != Presence::Changing)
    }

    pub fn slot_of(&self, ipa: u64) -> Option<Known> {
        let slots = lock(&self.slots);
        let holds = |slot: &&Known| slot.place.holds(ipa);
        slots.values().find(holds).copied()
    }

    fn set_presence(&self, id: u16, presence: Presence) {
        if let Some(slot) = lock(&self.slots).get_mut(&id) {
            slot.presence = presence;
            slot.version += 1;
        }
    }

    /// One access by the guest on the current CPU, faults and all. The result is checked against the
    /// slots as they are, if they did not change meanwhile.
    pub fn guest(&self, ipa: u64, access: FaultAccess) -> Result<(), Outcome> {
        let before = self.slot_of(ipa);
        let page = ipa & !(PAGE_SIZE - 1);
        lock(&self.written).attempts.push(page);
        let result = self.access(ipa, access);
        {
            let attempts = &mut lock(&self.written).attempts;
            let done = attempts.iter().position(|attempt| *attempt == page);
            attempts.swap_remove(done.unwrap());
        }
        if access == FaultAccess::Write && result.is_err() {
            // A fault may have opened the page before the slot became another.
            self.may_be_dirty(page);
        }
        self.happened(Happened::Access(ipa, access, result));
        let after = self.slot_of(ipa);
        let still = |slot: &Known| {
            slot.presence != Presence::Changing && after.is_some_and(|a| a.version == slot.version)
        };
        if result != Err(Outcome::OutOfTables)
            && let Some(slot) = before.filter(still)
        {
            let write = access == FaultAccess::Write;
            let expected = match (slot.presence, slot.place.access) {
                (Presence::Gone, _) => Err(Outcome::NotMemory),
                (_, Access::None) => Err(Outcome::NotMemory),
                (_, Access::ReadOnly) if write => Err(Outcome::ReadOnly),
                _ => Ok(()),
            };
            assert_eq!(result, expected, "{access:?} of {ipa:#x}");
        }
        result
    }

    fn access(&self, ipa: u64, access: FaultAccess) -> Result<(), Outcome> {
        const TRIES: usize = 5_000;
        let machine = &self.world.machine;
        let cpu = machine.current_pe();
        for _ in 0..TRIES {
            let reached = machine.access(cpu, self.world.guest, ipa, access, |pa| {
                self.arrived(ipa, pa);
                if access == FaultAccess::Write {
                    self.stored(ipa);
                }
            });
            let Err(abort) = reached else { return Ok(()) };
            match self.op("fault", |stage2| stage2.handle_fault(abort)) {
                Outcome::Resume | Outcome::Dirtied(_) => self.breathe(),
                Outcome::Retry => self.pause(),
                other => return Err(other),
            }
        }
        panic!("the guest faults for ever at {ipa:#x}");
    }

    /// An access got through to `pa`: it must be the guest's own memory.
    fn arrived(&self, ipa: u64, pa: Pa) {
        let slot = self.slot_of(ipa).unwrap();
        let page = (ipa - slot.place.ipa) & !(PAGE_SIZE - 1);
        let own = pa.raw() == slot.place.pa + page;
        assert!(own, "{ipa:#x} reached foreign memory");
        assert_ne!(
            slot.presence,
            Presence::Gone,
            "{ipa:#x} is reachable, and its slot was deleted"
        );
    }

    /// One access by the guest's own address.
    pub fn guest_va(&self, stage1: &Stage1, va: u64, access: FaultAccess) {
        let machine = &self.world.machine;
        loop {
            let stored = |pa: Pa| {
                let slots = lock(&self.slots).clone();
                let slot = slots.values().find(|slot| {
                    let place = &slot.place;
                    (place.pa..place.pa + place.pages * PAGE_SIZE).contains(&pa.raw())
                });
                let place = slot.unwrap().place;
                self.stored(place.ipa + (pa.raw() - place.pa));
            };
            let cpu = machine.current_pe();
            let reached = machine.access_va(cpu, self.world.guest, stage1, va, access, stored);
            let Err(abort) = reached else { return };
            let outcome = self.op("fault", |stage2| stage2.handle_fault(abort));
            assert!(matches!(
                outcome,
                Outcome::Resume | Outcome::Dirtied(_) | Outcome::Retry
            ));
            self.pause();
        }
    }

    pub fn write(&self, ipa: u64) {
        self.guest(ipa, FaultAccess::Write).unwrap();
    }

    pub fn read(&self, ipa: u64) {
        self.guest(ipa, FaultAccess::Read).unwrap();
    }

    /// A write by EL2, as emulation does it: first the write, then the mark.
    pub fn el2_write(&self, ipa: u64) {
        lock(&self.ghost).hold(self.world.machine.current_pe(), ipa);
        self.stored(ipa);
        let marked = self.op("mark_dirty", |stage2| stage2.mark_dirty(Ipa::new(ipa), 8));
        // Deleted meanwhile, perhaps.
        assert!(matches!(marked, Ok(()) | Err(Error::NotMemory(_))));
    }

    /// A write by EL2 that says nothing: what must not be.
    pub fn hidden_write(&self, ipa: u64) {
        self.stored(ipa);
    }

    /// What the host lacks.
    pub fn missing(&self) -> BTreeSet<u64> {
        lock(&self.ghost).missing()
    }

    /// What the host has: each page, and its content when it was copied.
    pub fn copied(&self) -> BTreeMap<u64, u64> {
        lock(&self.ghost).copied()
    }
}

std::thread_local! {
    static QUIET: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

fn quiet() -> bool {
    QUIET.with(std::cell::Cell::get)
}

/// Lets failing runs on this thread print nothing while `search` goes on: there will be many before the
/// smallest is found.
pub fn quietly<R>(search: impl FnOnce() -> R) -> R {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !quiet() {
                before(info);
            }
        }));
    });
    QUIET.with(|cell| cell.set(true));
    let result = search();
    QUIET.with(|cell| cell.set(false));
    result
}
