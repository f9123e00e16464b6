//! Random histories against a plain model.
//!
//! CPU 0 is EL2's manager, with the host behind it: it starts and stops logs, takes, commits, aborts,
//! adds, deletes and changes slots, maps ahead, runs out of memory. The other CPUs run the guest, write
//! for EL2, and lend the manager a hand. What each does is a list of actions; in which order they take
//! turns, and where in the middle of what, a seed decides.
//!
//! The model is a host that copies memory as it would over the wire: everything once a log has started,
//! then the pages of each epoch, and only when it commits. The watchers of [`sim`](super::sim) look at
//! every write; at the end the copy is the memory.
//!
//! `TIDEMARK_SEQUENCES` says how many histories (10,000 without it), `TIDEMARK_SEED` repeats a run, and
//! `TIDEMARK_SHRINK` says how often a failing one may be tried smaller (4,000).

mod history;

use super::from_env;
use super::sim::*;
use crate::control::{Initially, Part};

use crate::types::*;
use crate::{Error, FaultAccess, LogStage, Outcome, Support};
use history::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use std::collections::BTreeSet;
use std::panic::{self, AssertUnwindSafe};
use std::string::{String, ToString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::vec::Vec;
use std::{boxed::Box, vec};

/// Where the manager is, for those who help it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Off,
    Starting,
    On,
    Stopping,
}

/// What the host has of the epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Taken {
    Partly,
    Whole,
    Copied,
}

struct State {
    stage: Stage,
    mode: Option<(Engine, Granularity, Initially)>,
    epoch: Option<(Epoch, Taken)>,
    /// What the epoch is of, if not of all.
    part: Option<Part>,
    /// CPUs in a step that they help with.
    helping: usize,
    /// Nobody is to begin helping.
    alone: bool,
    aborted: BTreeSet<u64>,
    /// Table memory was short at some time, so a block may have stayed where pages were asked for.
    starved: bool,
    /// The log began with every page dirty.
    all_dirty: bool,
}

struct Play {
    sim: Arc<Sim>,
    places: [Place; 5],
    pages: Vec<u64>,
    tables: usize,
    /// Nothing by chance: what is reported is known to the page.
    calm: bool,
    state: Mutex<State>,
}

impl Play {
    fn new(history: &History) -> Self {
        let tables = match history.large {
            Large::Gib => 700,
            Large::None => 40,
        };
        let sim = Sim::new(Setup {
            features: history.features,
            ipa_bits: 40,
            tables,
            cpus: 3,
            seed: history.seed,
            every: history.every,
            whims: history.whims,
        });
        let places = places(history.large);
        sim.alone(|sim| places.iter().for_each(|place| sim.add(*place)));
        Self {
            sim,
            places,
            pages: pages(&places),
            tables,
            calm: history.whims.is_none(),
            state: Mutex::new(State {
                stage: Stage::Off,
                mode: None,
                epoch: None,
                part: None,
                helping: 0,
                alone: false,
                aborted: BTreeSet::new(),
                starved: false,
                all_dirty: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> Stage {
        self.state().stage
    }

    fn epoch(&self) -> Option<(Epoch, Taken)> {
        self.state().epoch
    }

    fn access(&self, ipa: u64, access: FaultAccess) {
        while self.sim.guest(ipa, access) == Err(Outcome::OutOfTables) {
            assert!(self.state().starved, "there was memory for tables");
            self.sim.world.machine.limit_tables(self.tables);
        }
    }

    fn present(&self, ipa: u64) -> bool {
        let slot = self.sim.slot_of(ipa);
        slot.is_some_and(|slot| slot.presence == Presence::There)
    }

    /// Where a slot is, if it is there.
    fn place(&self, id: u16) -> Option<Place> {
        let slot = self.sim.slots.lock().unwrap().get(&id).copied();
        let there = slot.filter(|slot| slot.presence == Presence::There);
        there.map(|slot| slot.place)
    }

    fn run(&self, run: &Run) {
        match run {
            Run::Write(page) => self.access(*page.get(&self.pages), FaultAccess::Write),
            Run::Read(page) => self.access(*page.get(&self.pages), FaultAccess::Read),
            Run::El2Write(page) => {
                let ipa = *page.get(&self.pages);
                if self.present(ipa) {
                    self.sim.el2_write(ipa);
                }
            }
            Run::MapAhead(slot) => {
                let mapped = self.sim.map_ahead(self.places[*slot].id);
                let refused = matches!(
                    mapped,
                    Err(Error::NoSuchSlot(_) | Error::SlotDying(_) | Error::OutOfTables)
                );
                assert!(mapped.is_ok() || refused, "{mapped:?}");
            }
            Run::Age(slot) => drop(self.sim.young(self.places[*slot].id)),
            Run::Flip => self.flip(),
            Run::Help => self.help(),
            Run::Exit => {
                let machine = &self.sim.world.machine;
                machine.synchronize(machine.current_pe());
            }
        }
    }

    fn flip(&self) {
        let slot = self.place(self.places[FLIPPED].id);
        if let Some(Place { id, access, .. }) = slot {
            let other = match access {
                Access::ReadOnly => Access::None,
                Access::None => Access::ReadWrite,
                Access::ReadWrite => Access::ReadOnly,
            };
            self.sim.set_access(id, other);
        }
    }

    fn help(&self) {
        let (stage, epoch, part) = {
            let state = self.state();
            if state.alone {
                return;
            }
            (state.stage, state.epoch, state.part)
        };
        match (stage, epoch) {
            (Stage::Starting, _) => self.helped(|| self.start_step()),
            (Stage::On, Some((epoch, Taken::Partly))) => {
                self.helped(|| self.take_step(epoch, part))
            }
            (Stage::Stopping, _) => self.helped(|| self.stop_step()),
            _ => {}
        }
    }

    fn helped(&self, step: impl FnOnce()) {
        self.state().helping += 1;
        step();
        self.state().helping -= 1;
    }

    /// Before something begins anew, whoever still helps with the old is waited for.
    fn wait_for_helpers(&self) {
        while self.state().helping > 0 {
            self.sim.pause();
        }
    }

    fn manage(&self, manage: &Manage) {
        match manage {
            Manage::Start(engine, granularity, initially) => {
                self.start(*engine, *granularity, *initially);
            }
            Manage::StartStep => {
                if self.stage() == Stage::Starting {
                    self.start_step();
                }
            }
            Manage::StopStep => self.stop(),
            Manage::SetEngine(engine) => {
                let changed = self
                    .sim
                    .op("set_engine", |stage2| stage2.set_engine(*engine));
                assert!(changed.is_err() || self.stage() != Stage::Off);
            }
            Manage::AdaptEngine => {
                let now = self.sim.op("adapt_engine", |stage2| stage2.adapt_engine());
                let usable = self.sim.world.stage2.features().dbm == Support::Present;
                assert!(usable || now != Ok(Engine::Dbm));
            }
            Manage::BringOver => {
                let on = self.stage() == Stage::On;
                let step = self.sim.op("bring_over", |stage2| stage2.bring_over());
                assert!(step.is_ok() || !on, "{step:?}");
            }
            Manage::TakeStep => self.take(1, None),
            Manage::Take => self.take(usize::MAX, None),
            Manage::TakeRange(slot, from, to) => {
                let Some(Place { id, pages, .. }) = self.place(self.places[*slot].id) else {
                    return;
                };
                let words = pages.div_ceil(64) as usize;
                let first = from.index(words) as u64 * 64;
                let end = pages.min(first + (1 + to.index(words) as u64) * 64);
                let part = Part {
                    slot: SlotId(id),
                    first,
                    pages: end - first,
                };
                self.take(usize::MAX, Some(part));
            }
            Manage::Copy => self.copy(),
            Manage::Commit => self.commit(),
            Manage::Abort => self.abort(),
            Manage::Delete(slot) => {
                let place = self.places[*slot];
                if self.place(place.id).is_some() {
                    self.sim.delete(place.id);
                }
            }
            Manage::Add(slot) => {
                let place = self.places[*slot];
                let known = self.sim.slots.lock().unwrap().get(&place.id).copied();
                if known.is_none_or(|slot| slot.presence == Presence::Gone) {
                    self.sim.add(place);
                }
            }
            Manage::GiveUp => self.give_up(),
            Manage::Limit(more) => {
                self.state().starved = true;
                let machine = &self.sim.world.machine;
                machine.limit_tables(machine.tables_in_use() + more);
            }
            Manage::Run(run) => self.run(run),
        }
    }

    fn start(&self, engine: Engine, granularity: Granularity, initially: Initially) {
        let usable = self.sim.world.stage2.features().dbm == Support::Present;
        if self.stage() == Stage::Off {
            if engine == Engine::Dbm && !usable {
                let refused = self
                    .sim
                    .op("start_log", |stage2| stage2.start_log(engine, granularity));
                assert_eq!(refused, Err(Error::EngineUnavailable));
                return;
            }
            self.wait_for_helpers();
            self.sim.written.lock().unwrap().forget();
            let mut state = self.state();
            state.mode = Some((engine, granularity, initially));
            state.all_dirty = initially == Initially::Dirty;
            state.aborted.clear();
            state.stage = Stage::Starting;
        }
        // Mostly started in one go, sometimes left half way.
        for _ in 0..8 {
            if self.stage() == Stage::Starting {
                self.start_step();
                self.sim.breathe();
            }
        }
    }

    fn start_step(&self) {
        let Some((engine, granularity, initially)) = self.state().mode else {
            return;
        };
        let step = self.sim.op("start_log", |stage2| match initially {
            Initially::Clean => stage2.start_log(engine, granularity),
            Initially::Dirty => stage2.start_log_all_dirty(engine, granularity),
        });
        let mut state = self.state();
        match step {
            Ok(Progress::Done) => {
                assert_eq!(state.stage, Stage::Starting);
                state.stage = Stage::On;
                match initially {
                    Initially::Clean => self.sim.started(),
                    Initially::Dirty => self.sim.ghost.lock().unwrap().start_all_dirty(),
                }
            }
            Ok(Progress::More { .. }) => {}
            // Somebody else was faster, and has perhaps not said so yet.
            Err(Error::AlreadyLogging) => {
                assert!(matches!(state.stage, Stage::Starting | Stage::On))
            }
            other => panic!("{other:?}"),
        }
    }

    /// Says that an epoch is being taken: from now on others help. Who is still at one that was given up goes
    /// on, and meets it.
    fn new_epoch(&self, part: Option<Part>) -> Epoch {
        let epoch = self.sim.world.new_epoch();
        self.sim.written.lock().unwrap().during.clear();
        let mut state = self.state();
        state.epoch = Some((epoch, Taken::Partly));
        state.part = part;
        epoch
    }

    fn take(&self, steps: usize, part: Option<Part>) {
        if self.stage() != Stage::On {
            return;
        }
        let epoch = match self.epoch() {
            Some((epoch, _)) => epoch,
            None => self.new_epoch(part),
        };
        for _ in 0..steps {
            let part = self.state().part;
            self.take_step(epoch, part);
            let taken = self.epoch();
            if taken.is_none_or(|(_, taken)| taken != Taken::Partly) {
                return;
            }
            self.sim.pause();
        }
    }

    fn take_step(&self, epoch: Epoch, part: Option<Part>) {
        let step = self.sim.take_step(epoch, part);
        match step {
            // The slot goes, is gone or is another: nothing more of it is to be had.
            Err(Error::NoSuchSlot(_) | Error::NotLogging | Error::PageRange { .. })
                if part.is_some() => {}
            Ok(Progress::Done) => {
                let mut state = self.state();
                if state.epoch == Some((epoch, Taken::Partly)) {
                    state.epoch = Some((epoch, Taken::Whole));
                }
            }
            Ok(Progress::More { .. }) => {}
            // Settled while somebody was on the way to help, and perhaps the next one has begun.
            Err(Error::StaleEpoch { .. } | Error::EpochOutstanding(_)) => {
                assert_ne!(
                    self.epoch().map(|(outstanding, _)| outstanding),
                    Some(epoch)
                );
            }
            other => panic!("{other:?}"),
        }
    }

    fn copy(&self) {
        let Some((epoch, taken)) = self.epoch() else {
            return;
        };
        if taken == Taken::Partly {
            self.state().alone = true;
            self.wait_for_helpers();
            if self.epoch() == Some((epoch, Taken::Partly)) {
                let early = self.sim.op("commit", |stage2| stage2.commit(epoch));
                let begun = early == Err(Error::TakeUnfinished(epoch));
                assert!(begun || !self.has_begun(epoch), "{early:?}");
            }
            self.state().alone = false;
            return;
        }
        let reported = self.sim.copy(epoch);
        let mut state = self.state();
        if taken == Taken::Whole {
            let written = &mut *self.sim.written.lock().unwrap();
            let exact = !state.starved && !state.all_dirty;
            if matches!(state.mode, Some((_, Granularity::Page, _))) && exact {
                let mut allowed: BTreeSet<u64> = if self.calm {
                    written.unreported.union(&state.aborted).copied().collect()
                } else {
                    written.since_start.clone()
                };
                allowed.extend(written.attempts());
                let extra: Vec<_> = reported.difference(&allowed).take(5).collect();
                assert!(
                    extra.is_empty() || self.speculates(),
                    "never written: {extra:x?}"
                );
            }
            let part = state.part;
            let told = |ipa: &u64| match part {
                None => true,
                Some(part) => {
                    let place = self.places.iter().find(|place| place.id == part.slot.0);
                    let page = (ipa.wrapping_sub(place.unwrap().ipa)) / PAGE_SIZE;
                    (part.first..part.first + part.pages).contains(&page)
                }
            };
            written.unreported.retain(|ipa| !told(ipa));
            written.unreported.extend(&written.during);
            state.aborted.retain(|ipa| !told(ipa));
        }
        state.epoch = Some((epoch, Taken::Copied));
    }

    fn speculates(&self) -> bool {
        self.sim.speculates()
    }

    fn commit(&self) {
        if matches!(self.epoch(), Some((_, Taken::Whole | Taken::Copied))) {
            self.copy();
            let (epoch, _) = self.epoch().unwrap();
            self.state().epoch = None;
            self.sim.commit(epoch);
        }
    }

    fn abort(&self) {
        let Some((epoch, taken)) = self.epoch() else {
            return;
        };
        if taken == Taken::Partly {
            let written = self.sim.written.lock().unwrap();
            self.state().aborted.extend(&written.unreported);
        } else {
            let pages = self.sim.copy(epoch);
            self.state().aborted.extend(pages);
        }
        self.state().epoch = None;
        if self.has_begun(epoch) {
            self.sim.abort(epoch);
        } else {
            self.sim.give_up(epoch);
        }
    }

    /// It may not have, if others were in the way each time.
    fn has_begun(&self, epoch: Epoch) -> bool {
        self.sim.world.stage2.log_status().outstanding == Some(epoch)
    }

    /// Gives up an epoch that is being taken, or one that perhaps nobody has begun.
    fn give_up(&self) {
        match (self.stage(), self.epoch()) {
            (Stage::On, None) => {
                self.new_epoch(None);
                self.sim.breathe();
            }
            (_, Some((_, Taken::Partly))) => {}
            _ => return,
        }
        // Somebody may have taken all of it meanwhile.
        if let Some((epoch, Taken::Partly)) = self.epoch() {
            let written = self.sim.written.lock().unwrap().unreported.clone();
            self.state().aborted.extend(written);
            self.state().epoch = None;
            self.sim.give_up(epoch);
        }
    }

    fn stop(&self) {
        let stage = self.stage();
        if stage == Stage::Off {
            let refused = self.sim.op("stop_log", |stage2| stage2.stop_log());
            assert!(refused == Err(Error::NotLogging) || self.may_be_busy(refused));
            return;
        }
        if let Some((epoch, taken)) = self.epoch() {
            if taken == Taken::Partly && !self.has_begun(epoch) {
                return self.give_up();
            }
            let refused = self.sim.op("stop_log", |stage2| stage2.stop_log());
            let outstanding = refused == Err(Error::EpochOutstanding(epoch));
            assert!(outstanding || self.may_be_busy(refused));
            return;
        }
        if stage != Stage::Stopping {
            self.wait_for_helpers();
            if self.stage() == Stage::Off {
                return;
            }
            self.sim.ghost.lock().unwrap().stop();
            self.state().stage = Stage::Stopping;
        }
        self.stop_step();
        // Until it has begun: somebody may be in its way.
        while let LogStage::Starting | LogStage::On = self.sim.world.stage2.log_status().stage {
            self.sim.pause();
            self.stop_step();
        }
    }

    /// Is it only that somebody else was in a step?
    fn may_be_busy(&self, stop: Result<Progress, Error>) -> bool {
        let stage = self.sim.world.stage2.log_status().stage;
        matches!(stop, Ok(Progress::More { .. })) && stage != LogStage::Stopping
    }

    fn stop_step(&self) {
        match self.sim.op("stop_log", |stage2| stage2.stop_log()) {
            Ok(Progress::Done) => {
                let mut state = self.state();
                state.stage = Stage::Off;
                state.mode = None;
                drop(state);
                let tracked = crate::fake::traced::quietly(|| {
                    let leaves = self.sim.world.leaves();
                    leaves.iter().any(|(_, _, pte)| pte.is_tracked())
                });
                assert!(!tracked || !self.sim.slots_are_still());
            }
            Ok(Progress::More { .. }) => {}
            // Somebody else was faster, and has perhaps not said so yet.
            Err(Error::NotLogging) => {
                let mut state = self.state();
                assert!(matches!(state.stage, Stage::Stopping | Stage::Off));
                if state.helping == 0 {
                    // Nor will: the log was never begun, because somebody was in the way.
                    (state.stage, state.mode) = (Stage::Off, None);
                }
            }
            other => panic!("{other:?}"),
        }
    }

    /// The guest stops, the host takes what is left: the copy is the memory. Then all is put away.
    fn finish(self) {
        self.sim.alone(|sim| {
            self.abort();
            sim.world.machine.limit_tables(self.tables);
            if self.stage() == Stage::On {
                sim.last_round();
            }
            while self.stage() != Stage::Off {
                self.stop();
            }
            assert_eq!(sim.world.stage2.log_status().stage, LogStage::Off);
            sim.check_counts();
            self.check_leaves();
        });
        self.sim.end();
    }
}

impl Play {
    /// No log: nothing is tracked, and read-only memory is what it was.
    fn check_leaves(&self) {
        for (ipa, _, pte) in self.sim.world.leaves() {
            assert!(!pte.is_tracked(), "{ipa:#x} is tracked by no log");
            let access = self.sim.slot_of(ipa).unwrap().place.access;
            assert_eq!(pte.is_writable(), access == Access::ReadWrite, "{ipa:#x}");
            assert_ne!(access, Access::None, "{ipa:#x}");
        }
    }
}

fn play(history: &History) {
    let play = Play::new(history);
    let guest = |runs: Vec<Run>| {
        let play = &play;
        let program = move || {
            for run in &runs {
                play.run(run);
                play.sim.breathe();
            }
        };
        Box::new(program) as Box<dyn FnOnce() + Send + '_>
    };
    let manager = Box::new(|| {
        for manage in &history.manager {
            play.manage(manage);
            play.sim.breathe();
        }
    });
    let [one, two] = history.cpus.clone();
    play.sim.run(vec![manager, guest(one), guest(two)]);
    play.finish();
}

/// The message of a panic.
fn message(cause: &(dyn std::any::Any + Send)) -> String {
    let text = cause.downcast_ref::<String>().cloned();
    let text = text.or_else(|| cause.downcast_ref::<&str>().map(ToString::to_string));
    text.unwrap_or_default()
}

/// Plays `sequences` histories of `seed`, and shows the smallest that fails.
fn search(seed: u64, sequences: u32) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let shrink = from_env("TIDEMARK_SHRINK").unwrap_or(4000);
    let config = Config {
        cases: sequences,
        failure_persistence: None,
        max_shrink_iters: shrink.min(u64::from(u32::MAX)) as u32,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let began = Instant::now();
    let test = |history: History| {
        panic::catch_unwind(AssertUnwindSafe(|| play(&history)))
            .map_err(|cause| TestCaseError::fail(message(&*cause)))
    };
    let mut found = Ok(());
    quietly(|| found = runner.run(&history(), test));
    let took = began.elapsed();
    match found {
        Ok(()) => std::eprintln!("{sequences} sequences of seed {seed:#x}: {took:?}"),
        Err(TestError::Fail(why, history)) => {
            std::eprintln!("TIDEMARK_SEED={seed:#x}: {why}\nThe smallest history: {history:#?}");
            play(&history);
            panic!("it does not fail a second time: {why}");
        }
        Err(other) => panic!("TIDEMARK_SEED={seed:#x}: {other}"),
    }
}

#[test]
fn no_history_loses_a_page() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = from_env("TIDEMARK_SEED")
        .unwrap_or_else(|| now().unwrap_or(Duration::ZERO).as_nanos() as u64 & 0xffff_ffff);
    let sequences = from_env("TIDEMARK_SEQUENCES").unwrap_or(10_000);
    std::eprintln!("TIDEMARK_SEED={seed:#x} TIDEMARK_SEQUENCES={sequences}");
    search(seed, u32::try_from(sequences).unwrap_or(u32::MAX));
}
