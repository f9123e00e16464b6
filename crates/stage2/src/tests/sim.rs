//! Simulated runs: CPUs that take turns as a seed decides, guests that write, EL2 at work, a host that
//! copies, and three watchers that end the run when something is wrong the moment it is:
//! [`rules`] (what may be written to a descriptor), [`ghost`] (what the host lacks is known) and the
//! machine itself (TLB conflicts).
//!
//! A run is repeated exactly by its seed. One that fails prints the last things that happened.

pub mod ghost;
pub mod rules;

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

/// What happened, for whoever has to find out why.
enum Happened {
    Machine(Event),
    /// And so many more behind it, changed alike.
    Descriptor(Scope, Write, u64),
    Begins(&'static str),
    Returns(&'static str),
    Access(u64, FaultAccess, Result<(), Outcome>),
    Stored(u64, u64),
    Host(String),
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Happened::Machine(event) => write!(f, "{event:x?}"),
            Happened::Descriptor(scope, write, more) => {
                let Write { old, new, how, .. } = write;
                let Scope { start, level, .. } = scope;
                write!(f, "{start:#x} level {level}: {old:#x} -> {new:#x} {how:?}")?;
                if *more > 0 {
                    write!(f, ", and {more} behind it")?;
                }
                Ok(())
            }
            Happened::Begins(name) => write!(f, "{name} ..."),
            Happened::Returns(name) => write!(f, "... {name}"),
            Happened::Access(ipa, access, result) => write!(f, "{access:?} {ipa:#x}: {result:?}"),
            Happened::Stored(ipa, content) => write!(f, "stored {content} at {ipa:#x}"),
            Happened::Host(what) => write!(f, "host: {what}"),
        }
    }
}

#[derive(Default)]
struct Trace {
    last: VecDeque<(usize, Happened)>,
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
    /// Where it will be, perhaps by now.
    next: Place,
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

    fn explain(&self) {
        std::eprintln!("{:?}\nThe last things that happened:", self.setup);
        for (cpu, happened) in &lock(&self.trace).last {
            std::eprintln!("  CPU {cpu}: {happened}");
        }
    }

    fn happened(&self, happened: Happened) {
        const LENGTH: usize = 400;
        let mut trace = lock(&self.trace);
        let cpu = self.world.machine.current_pe();
        if let Happened::Descriptor(scope, write, _) = &happened
            && let Some((by, Happened::Descriptor(first, other, more))) = trace.last.back_mut()
            && *by == cpu
            && first.start + (*more + 1) * (first.end - first.start) == scope.start
            && first.level == scope.level
            && (other.old ^ other.new ^ write.old ^ write.new) & 0x0000_ffff_ffff_f000
                == other.old ^ other.new ^ write.old ^ write.new
        {
            *more += 1;
            return;
        }
        if trace.last.len() == LENGTH {
            trace.last.pop_front();
        }
        trace.last.push_back((cpu, happened));
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
        let holds = |slot: &&Known| slot.place.holds(ipa) || slot.next.holds(ipa);
        slots.values().find(holds).copied()
    }

    fn set_presence(&self, id: u16, presence: Presence) {
        if let Some(slot) = lock(&self.slots).get_mut(&id) {
            slot.presence = presence;
            slot.version += 1;
            if presence == Presence::There {
                slot.place = slot.next;
            }
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
        let mut places = [slot.place, slot.next].into_iter();
        let own = |place: Place| {
            let page = (ipa.wrapping_sub(place.ipa)) & !(PAGE_SIZE - 1);
            place.holds(ipa) && pa.raw() == place.pa + page
        };
        assert!(places.any(own), "{ipa:#x} reached foreign memory");
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

    pub fn add(&self, place: Place) {
        let Place {
            id,
            ipa,
            pages,
            access,
            pa,
        } = place;
        let known = Known {
            place,
            next: place,
            presence: Presence::Changing,
            version: 0,
        };
        let before = lock(&self.slots).get(&id).map_or(0, |slot| slot.version);
        let known = Known {
            version: before + 1,
            ..known
        };
        lock(&self.slots).insert(id, known);
        let extent = Extent {
            pa: Pa::new(pa),
            pages,
        };
        self.op("add_slot", |stage2| {
            stage2.add_slot(SlotId(id), Ipa::new(ipa).gfn(), pages, access, &[extent])
        })
        .unwrap();
        let dirty = self.world.dirty(id);
        lock(&self.ghost).add_slot(id, ipa, dirty, pages);
        self.set_presence(id, Presence::There);
    }

    /// Calls a bounded operation of the engine until it is done.
    pub fn finish(
        &self,
        name: &'static str,
        mut step: impl FnMut(&Stage2<Arc<Machine>>) -> Result<Progress, Error>,
    ) -> Result<(), Error> {
        loop {
            match self.op(name, &mut step)? {
                Progress::Done => return Ok(()),
                Progress::More { .. } => self.pause(),
            }
        }
    }

    pub fn delete(&self, id: u16) {
        self.set_presence(id, Presence::Changing);
        lock(&self.ghost).remove_slot(id);
        self.finish("delete_slot", |stage2| stage2.delete_slot(SlotId(id)))
            .unwrap();
        self.set_presence(id, Presence::Gone);
    }

    pub fn set_access(&self, id: u16, access: Access) {
        self.set_presence(id, Presence::Changing);
        self.finish("set_access", |stage2| stage2.set_access(SlotId(id), access))
            .unwrap();
        self.change_place(id, |place| place.access = access);
        self.set_presence(id, Presence::There);
    }

    /// What a slot will be when it is there again.
    fn change_place(&self, id: u16, change: impl FnOnce(&mut Place)) {
        if let Some(slot) = lock(&self.slots).get_mut(&id) {
            change(&mut slot.next);
        }
    }

    pub fn move_slot(&self, id: u16, ipa: u64) {
        self.change_place(id, |place| place.ipa = ipa);
        self.set_presence(id, Presence::Changing);
        let base = Ipa::new(ipa).gfn();
        self.finish("move_slot", |stage2| stage2.move_slot(SlotId(id), base))
            .unwrap();
        lock(&self.ghost).move_slot(id, ipa);
        self.set_presence(id, Presence::There);
        self.check_all();
    }

    pub fn shrink(&self, id: u16, pages: u64) {
        self.set_presence(id, Presence::Changing);
        let dirty = self.world.dirty(id);
        lock(&self.ghost).resize_slot(id, pages, dirty);
        self.finish("shrink_slot", |stage2| {
            stage2.shrink_slot(SlotId(id), pages)
        })
        .unwrap();
        self.change_place(id, |place| place.pages = pages);
        self.set_presence(id, Presence::There);
        self.check_all();
    }

    /// Adds `pages` pages that follow in the machine too.
    pub fn grow(&self, id: u16, pages: u64) {
        self.set_presence(id, Presence::Changing);
        let place = lock(&self.slots)[&id].place;
        self.change_place(id, |place| place.pages += pages);
        let more = [Extent {
            pa: Pa::new(place.pa + place.pages * PAGE_SIZE),
            pages,
        }];
        lock(&self.ghost).exchanges(id);
        loop {
            let step = self.op("grow_slot", |stage2| stage2.grow_slot(SlotId(id), &more));
            let (total, dirty) = (place.pages + pages, self.world.dirty(id));
            lock(&self.ghost).resize_slot(id, total, dirty);
            self.check_all();
            match step.unwrap() {
                Progress::Done => break,
                Progress::More { .. } => self.pause(),
            }
        }
        lock(&self.ghost).resized(id);
        self.set_presence(id, Presence::There);
        self.check_all();
    }

    pub fn map_ahead(&self, id: u16) -> Result<(), Error> {
        let mut from = 0;
        loop {
            let progress = self.op("map_ahead", |stage2| stage2.map_ahead(SlotId(id), from))?;
            match progress {
                Progress::Done => return Ok(()),
                Progress::More { done, .. } => from = done,
            }
            self.pause();
        }
    }

    pub fn start(&self, engine: Engine, granularity: Granularity) {
        self.finish("start_log", |stage2| stage2.start_log(engine, granularity))
            .unwrap();
        self.started();
    }

    /// The log has said that it is on.
    pub fn started(&self) {
        self.note(|| "copies everything".into());
        lock(&self.ghost).start();
    }

    pub fn start_all_dirty(&self, engine: Engine, granularity: Granularity) {
        self.finish("start_log_all_dirty", |stage2| {
            stage2.start_log_all_dirty(engine, granularity)
        })
        .unwrap();
        self.note(|| "has nothing".into());
        lock(&self.ghost).start_all_dirty();
    }

    /// The pages of a slot that were accessed since they were asked for last.
    pub fn young(&self, slot: u16) -> BTreeSet<u64> {
        let Some(place) = lock(&self.slots).get(&slot).map(|known| known.place) else {
            return BTreeSet::new();
        };
        let (mut young, mut first) = (BTreeSet::new(), 0);
        while first < place.pages {
            let mut words = [0; 7];
            let left = place.pages - first;
            let Ok(asked) = self.op("test_and_clear_young", |stage2| {
                stage2.test_and_clear_young(SlotId(slot), first, left, &mut words)
            }) else {
                break;
            };
            assert!(asked > 0 && asked <= left);
            for (index, word) in words.into_iter().enumerate() {
                for bit in crate::dirty::Bits(word) {
                    let page = first + index as u64 * 64 + u64::from(bit);
                    assert!(page < first + asked);
                    young.insert(place.ipa + page * PAGE_SIZE);
                }
            }
            first += asked;
        }
        young
    }

    /// A step of a take of `part`, or of everything.
    pub fn take_step(&self, epoch: Epoch, part: Option<Part>) -> Result<Progress, Error> {
        {
            let (machine, guest) = (&self.world.machine, self.world.guest);
            lock(&self.ghost).take_asked(machine, guest, epoch, part);
        }
        let step = match part {
            None => self.op("take", |stage2| stage2.take(epoch)),
            Some(Part { slot, first, pages }) => self.op("take_range", |stage2| {
                stage2.take_range(epoch, slot, first, pages)
            }),
        };
        if step == Ok(Progress::Done) {
            let done = lock(&self.ghost).take_done(epoch);
            self.require(done);
        }
        step
    }

    fn take_of(&self, part: Option<Part>) -> Epoch {
        let epoch = self.world.new_epoch();
        while self.take_step(epoch, part).unwrap() != Progress::Done {
            self.pause();
        }
        epoch
    }

    /// Takes an epoch of a range.
    pub fn take_range(&self, slot: u16, first: u64, pages: u64) -> Epoch {
        let slot = SlotId(slot);
        self.take_of(Some(Part { slot, first, pages }))
    }

    pub fn stop(&self) {
        lock(&self.ghost).stop();
        self.finish("stop_log", |stage2| stage2.stop_log()).unwrap();
    }

    /// Takes an epoch; it is with the host then, not copied.
    pub fn take(&self) -> Epoch {
        self.take_of(None)
    }

    /// Copies what the epoch holds, and returns it.
    pub fn copy(&self, epoch: Epoch) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        let taken = self.op("taken", |stage2| stage2.taken(epoch)).unwrap();
        for slot in taken {
            let words = self.op("in_flight", |stage2| stage2.in_flight(slot.slot, epoch));
            // A slot may have been deleted since.
            let Ok(words) = words else { continue };
            for (index, word) in words.iter().enumerate() {
                for bit in crate::dirty::Bits(word.load(std::sync::atomic::Ordering::Acquire)) {
                    let page = index as u64 * 64 + u64::from(bit);
                    assert!(page < slot.pages, "past the end of slot {}", slot.slot);
                    let ipa = slot.base.ipa().raw() + page * PAGE_SIZE;
                    lock(&self.ghost).copy(ipa);
                    pages.insert(ipa);
                }
            }
        }
        self.note(|| format!("copied {} pages", pages.len()));
        pages
    }

    pub fn commit(&self, epoch: Epoch) {
        self.op("commit", |stage2| stage2.commit(epoch)).unwrap();
        lock(&self.ghost).commit();
        self.check_all();
    }

    /// Aborts an epoch that may not have begun.
    pub fn give_up(&self, epoch: Epoch) {
        self.op("give_up", |stage2| stage2.give_up(epoch));
        lock(&self.ghost).abort();
        let outstanding = self.world.stage2.log_status().outstanding;
        assert_ne!(outstanding, Some(epoch), "it was given up");
        self.check_all();
    }

    pub fn abort(&self, epoch: Epoch) {
        self.op("abort", |stage2| stage2.abort(epoch)).unwrap();
        lock(&self.ghost).abort();
        self.check_all();
    }

    /// Takes, copies and commits.
    pub fn harvest(&self) -> BTreeSet<u64> {
        let epoch = self.take();
        let pages = self.copy(epoch);
        self.commit(epoch);
        pages
    }

    /// The guest stops: its vCPU on each CPU exits, with the barrier that belongs to it.
    pub fn stop_guests(&self) {
        for cpu in 0..self.setup.cpus {
            self.world.machine.synchronize(cpu);
        }
    }

    /// The end of a migration: guests stand still, the last epoch is copied, the copy is the memory.
    pub fn last_round(&self) {
        self.stop_guests();
        self.harvest();
        let missing = self.missing();
        assert!(missing.is_empty(), "lost: {missing:x?}");
        assert!(
            self.harvest().is_empty(),
            "a second harvest after the last is empty"
        );
    }

    /// Counts and tables agree with what is really there.
    pub fn check_counts(&self) {
        let leaves = self.world.leaves();
        let of = |level| leaves.iter().filter(|leaf| leaf.1 == level).count() as u64;
        let mappings = self.world.stage2.mappings();
        assert_eq!(
            (mappings.blocks_1g, mappings.blocks_2m, mappings.pages_4k),
            (of(Level::L1), of(Level::L2), of(Level::L3))
        );
        assert_eq!(mappings.tables as usize, self.world.machine.tables_in_use());
    }

    /// The end of a log: the last round has what is missing, and the counts are right with it and without.
    pub fn last_of_the_log(&self) {
        self.last_round();
        self.check_counts();
        self.stop();
        self.check_counts();
    }

    /// The end of a run with a log.
    pub fn conclude(self: Arc<Self>) {
        self.alone(Sim::last_of_the_log);
        self.end();
    }

    /// Deletes all and ends the VM: nothing is leaked.
    pub fn end(self: Arc<Self>) {
        let machine = Arc::clone(&self.world.machine);
        let ids: Vec<u16> = lock(&self.slots)
            .iter()
            .filter(|(_, slot)| slot.presence == Presence::There)
            .map(|(id, _)| *id)
            .collect();
        let roots = {
            self.alone(|sim| ids.iter().for_each(|id| sim.delete(*id)));
            let mappings = self.world.stage2.mappings();
            assert_eq!(
                (mappings.blocks_1g, mappings.blocks_2m, mappings.pages_4k),
                (0, 0, 0)
            );
            mappings.tables as usize
        };
        assert_eq!(machine.tables_in_use(), roots, "only the roots are left");
        drop(self);
        assert_eq!(machine.tables_in_use(), 0);
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
