//! Dirty tracking judged by a guest that says what it wrote.
//!
//! In step mode the guest stands still between iterations, so a harvest must hold just
//! what was written. In free mode both vCPUs write while the host harvests; there the
//! judge is memory itself: a host that copies every page it is told about, when it is
//! told, must end with a copy that is right.

use anyhow::{Context, Result, ensure};
use tidemark_guests::pattern::{Config, Iteration, Seed, Vcpu};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Copy, Harvest, Host, OracleGuest};
use tidemark_tests::oracle::{
    Ledger, Pages, check_exact, check_superset, check_within_blocks, show,
};
use tidemark_tests::script::Script;
use tidemark_tests::target::Arrival;
use tidemark_wire::message::{Engine, EngineChoice, ErrorReply, Granularity, Logging, VmId};

use crate::case::{Case, Place};

/// Rounds in step mode.
const STEPS: u64 = 12;

/// The round whose harvest the host throws away, to see it again in the next.
const ABORTED: u64 = 5;

/// Times that one page is written, harvested, and written again with nothing between.
const REWRITES: u64 = 8;

/// Bursts in free mode, each judged by itself.
const BURSTS: u64 = 16;

/// Iterations in a burst: one to find pages clean, one to find them harvested meanwhile.
const BURST: u64 = 2;

/// Pages a vCPU writes in an iteration of a burst. So many that writing, not printing, is
/// what the guest does while the host harvests; and no more than a part of its memory, so
/// that most pages are written once and no later write makes up for a lost one.
const BURST_PAGES: u32 = 2000;

/// Logs that are started and stopped one after the other.
const LOGS: u64 = 100;

/// Pages a vCPU writes in an iteration, whole blocks not counted.
const PAGES: u32 = 120;

/// The guest's memory: several 2 MiB blocks beside the image, small enough to read.
const MEMORY: Mib = Mib(32);

pub fn cases() -> Vec<Case> {
    let judged: [(&str, crate::case::Body); 10] = [
        ("oracle_max_wp_page", |s| {
            judge(s, "virt", Engine::WriteProtect, Granularity::Page)
        }),
        ("oracle_max_wp_adaptive", |s| {
            judge(s, "virt", Engine::WriteProtect, Granularity::Adaptive)
        }),
        ("oracle_max_dbm_page", |s| {
            judge(s, "virt", Engine::Dbm, Granularity::Page)
        }),
        ("oracle_max_dbm_adaptive", |s| {
            judge(s, "virt", Engine::Dbm, Granularity::Adaptive)
        }),
        ("oracle_a76_wp_page", |s| {
            judge(s, "virt-a76", Engine::WriteProtect, Granularity::Page)
        }),
        ("oracle_a76_wp_adaptive", |s| {
            judge(s, "virt-a76", Engine::WriteProtect, Granularity::Adaptive)
        }),
        ("oracle_a76_dbm_page", |s| {
            judge(s, "virt-a76", Engine::Dbm, Granularity::Page)
        }),
        ("oracle_a76_dbm_adaptive", |s| {
            judge(s, "virt-a76", Engine::Dbm, Granularity::Adaptive)
        }),
        ("oracle_a72_wp_page", |s| {
            judge(s, "virt-a72", Engine::WriteProtect, Granularity::Page)
        }),
        ("oracle_a72_wp_adaptive", |s| {
            judge(s, "virt-a72", Engine::WriteProtect, Granularity::Adaptive)
        }),
    ];
    let mut cases: Vec<Case> = judged
        .into_iter()
        .map(|(name, body)| Case::new(name, 150, body))
        .collect();
    cases.push(Case::new("oracle_a72_dbm_refused", 60, a72_dbm_refused));
    cases.push(Case::new("oracle_logs_come_and_go", 90, logs_come_and_go));
    cases.push(Case::new("oracle_engine_switched", 150, engine_switched));
    cases.push(Case::new("oracle_engine_follows", 90, engine_follows));
    cases.push(Case::new(
        "oracle_more_vms_than_vmids",
        120,
        more_vms_than_vmids,
    ));
    let boards: [(&str, crate::case::Body); 4] = [
        ("oracle_wp_page", |s| {
            judge(s, "", Engine::WriteProtect, Granularity::Page)
        }),
        ("oracle_wp_adaptive", |s| {
            judge(s, "", Engine::WriteProtect, Granularity::Adaptive)
        }),
        ("oracle_dbm_page", |s| {
            judge(s, "", Engine::Dbm, Granularity::Page)
        }),
        ("oracle_dbm_adaptive", |s| {
            judge(s, "", Engine::Dbm, Granularity::Adaptive)
        }),
    ];
    let on_board = |(name, body)| Case::new(name, 600, body).at(Place::Board);
    cases.extend(boards.into_iter().map(on_board));
    cases
}

/// What the harvests since the start have to account for.
struct Judge {
    granularity: Granularity,
    /// The last iteration that a committed harvest covers.
    accounted: Iteration,
    copy: Copy,
    /// Harvests that found something while the guest was writing.
    raced: u64,
    /// What the engine is changed to in the middle of the next harvests of a burst, for ever.
    engines: &'static [EngineChoice],
    /// How often it was.
    switches: usize,
}

impl Judge {
    fn new(guest: &OracleGuest, granularity: Granularity) -> Self {
        Self {
            granularity,
            accounted: guest.ledger.done(),
            copy: Copy::default(),
            raced: 0,
            engines: &[],
            switches: 0,
        }
    }
}

fn judge(
    script: &mut Script,
    machine: &str,
    engine: Engine,
    granularity: Granularity,
) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: PAGES,
        blocks: 8,
    };
    let bundle = guests::pack([guests::oracle(2, MEMORY)?])?;
    let target = script.start_tidemark(machine, &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    ensure!(
        guest.ledger.vcpus() == 2,
        "only {} vCPUs came up",
        guest.ledger.vcpus()
    );

    let before = guest.host.info(guest.vm)?.mappings;
    let choice = match engine {
        Engine::WriteProtect => EngineChoice::WriteProtect,
        Engine::Dbm => EngineChoice::Dbm,
    };
    let features = guest.host.info(guest.vm)?.features;
    let own_machine = target.arrival() == Arrival::Fresh;
    if engine == Engine::Dbm && !features.dbm_usable && !own_machine {
        // A board decides for itself which CPUs it has; the rest of this test needs others.
        return refused(&mut guest.host, guest.vm, choice);
    }
    guest.host.dirty_start(guest.vm, choice, granularity)?;
    let logging = guest.host.dirty_status(guest.vm)?.logging;
    ensure!(
        logging
            == Some(Logging {
                engine,
                granularity
            }),
        "what runs is {logging:?}"
    );

    let mut judge = Judge::new(&guest, granularity);
    for round in 1..=STEPS {
        judge
            .step(&mut guest, round)
            .with_context(|| format!("step {round}"))?;
    }
    for number in 1..=REWRITES {
        judge.accounted =
            rewrite(&mut guest, &mut judge.copy).with_context(|| format!("rewrite {number}"))?;
    }
    guest.configure(&Config {
        pages: BURST_PAGES,
        ..config
    })?;
    for number in 1..=BURSTS {
        judge
            .burst(&mut guest)
            .with_context(|| format!("burst {number}"))?;
    }
    ensure!(
        judge.raced >= BURSTS / 2,
        "only {} harvests met a guest that was writing",
        judge.raced
    );
    judge.at_rest(&mut guest).context("at rest")?;

    let faults = guest.host.dirty_status(guest.vm)?.write_faults;
    match engine {
        Engine::Dbm => ensure!(faults == 0, "{faults} write faults under the dirty bit"),
        Engine::WriteProtect => ensure!(faults > 0, "write protection without a fault"),
    }
    guest.host.dirty_stop(guest.vm)?;
    let after = guest.host.info(guest.vm)?.mappings;
    ensure!(
        after == before,
        "blocks are not put back: {before:?} before, {after:?} after"
    );
    guest.host.finish();
    target.still_on()
}

/// Logs of all kinds, one after the other. Each start and stop is asked for again until the
/// machine is through with it, which it may be at any moment of the asking.
fn logs_come_and_go(script: &mut Script) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: PAGES,
        blocks: 1,
    };
    let bundle = guests::pack([guests::oracle(2, MEMORY)?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let before = guest.host.info(guest.vm)?.mappings;
    for number in 1..=LOGS {
        let (engine, granularity) = match number % 4 {
            0 => (EngineChoice::Dbm, Granularity::Page),
            1 => (EngineChoice::WriteProtect, Granularity::Adaptive),
            2 => (EngineChoice::Dbm, Granularity::Adaptive),
            _ => (EngineChoice::WriteProtect, Granularity::Page),
        };
        one_log(&mut guest, engine, granularity).with_context(|| format!("log {number}"))?;
    }
    let after = guest.host.info(guest.vm)?.mappings;
    ensure!(
        after == before,
        "blocks are not put back: {before:?} before, {after:?} after"
    );
    guest.host.finish();
    target.still_on()
}

/// The engine is changed from write protection to the dirty bit and back, again and again, while both
/// vCPUs write and harvests go on.
fn engine_switched(script: &mut Script) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: BURST_PAGES,
        blocks: 8,
    };
    let bundle = guests::pack([guests::oracle(2, MEMORY)?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    for granularity in [Granularity::Page, Granularity::Adaptive] {
        guest
            .host
            .dirty_start(guest.vm, EngineChoice::WriteProtect, granularity)?;
        let mut judge = Judge {
            engines: &[EngineChoice::Dbm, EngineChoice::WriteProtect],
            ..Judge::new(&guest, granularity)
        };
        for number in 1..=BURSTS {
            judge
                .burst(&mut guest)
                .with_context(|| format!("{granularity}, burst {number}"))?;
        }
        ensure!(
            judge.raced >= BURSTS / 2 && judge.switches as u64 >= BURSTS,
            "only {} harvests met a guest that was writing, and {} changes of engine",
            judge.raced,
            judge.switches
        );
        judge.at_rest(&mut guest).context("at rest")?;
        let faults = guest.host.dirty_status(guest.vm)?.write_faults;
        ensure!(faults > 0, "write protection without a fault");
        guest.host.dirty_stop(guest.vm)?;
    }
    guest.host.finish();
    target.still_on()
}

/// Left to itself, the image goes over to write protection when few pages are left, so that the last
/// harvests look at no table, and back when the guest writes many again.
fn engine_follows(script: &mut Script) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: PAGES,
        blocks: 1,
    };
    let bundle = guests::pack([guests::oracle(2, MEMORY)?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let (vm, page) = (guest.vm, Granularity::Page);
    guest.host.dirty_start(vm, EngineChoice::Auto, page)?;
    let mut judge = Judge::new(&guest, page);
    for round in 1..=3 {
        judge.step(&mut guest, 2 * round)?;
        engine_is(&mut guest, Engine::Dbm).context("many pages")?;

        judge.at_rest(&mut guest)?;
        engine_is(&mut guest, Engine::WriteProtect).context("few pages")?;
        // This one brings the leaves over, unless that is done already.
        judge.at_rest(&mut guest)?;
        let before = guest.host.dirty_status(vm)?.entries_read;
        ensure!(before > 0, "the dirty bit's harvests read nothing");
        judge.at_rest(&mut guest)?;
        judge.step(&mut guest, 2 * round + 1)?;
        let after = guest.host.dirty_status(vm)?.entries_read;
        ensure!(
            after == before,
            "late harvests read {} entries",
            after - before
        );
    }
    // Asked for again, it is still the log that runs; told an engine, it keeps to it.
    guest.host.dirty_start(vm, EngineChoice::Auto, page)?;
    guest.host.dirty_engine(vm, EngineChoice::Dbm)?;
    judge.at_rest(&mut guest)?;
    judge.at_rest(&mut guest)?;
    engine_is(&mut guest, Engine::Dbm).context("told so")?;
    guest.host.dirty_engine(vm, EngineChoice::Auto)?;
    judge.at_rest(&mut guest)?;
    engine_is(&mut guest, Engine::WriteProtect).context("left to itself again")?;
    guest.host.dirty_stop(vm)?;
    guest.host.finish();
    target.still_on()
}

fn engine_is(guest: &mut OracleGuest, wanted: Engine) -> Result<()> {
    let logging = guest.host.dirty_status(guest.vm)?.logging;
    let engine = logging.map(|logging| logging.engine);
    ensure!(engine == Some(wanted), "the engine is {engine:?}");
    Ok(())
}

/// Four VMIDs, and five guests that are at work. Four of them write all the time on one CPU, so that there
/// is a rollover every few switches, and what the host copies of them must be right. On the other CPU a vCPU
/// of the fifth keeps its number through all of these, and what it writes again after a harvest must be
/// heard of.
fn more_vms_than_vmids(script: &mut Script) -> Result<()> {
    const VMS: usize = 8;
    let first = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: 300,
        blocks: 0,
    };
    let rest = Config { vcpus: 1, ..first };
    let config = |number: usize| if number == 0 { &first } else { &rest };
    let names: Vec<String> = (0..VMS).map(|number| format!("oracle{number}")).collect();
    let drafts = names.iter().enumerate().map(|(number, name)| {
        let mut draft = guests::oracle(config(number).vcpus, Mib(16))?;
        draft.name.clone_from(name);
        Ok(draft)
    });
    let bundle = guests::pack(drafts.collect::<Result<Vec<_>>>()?)?;
    let target = script.start_tidemark("virt", &bundle, "vmids=4")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let mut all = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let guest = OracleGuest::attach_to(host, name, config(number))?;
        all.push(One {
            vm: guest.vm,
            ledger: guest.ledger,
            copy: Copy::default(),
        });
        host = guest.host;
    }
    // vCPUs have their CPUs in turn: these are on one, with the first guest's first vCPU. Those that
    // would be on the other go, so that its second has that for itself.
    let (alone, others) = all.split_first_mut().context("no guest")?;
    for one in others.iter().skip(1).step_by(2) {
        host.client().stop(one.vm)?;
    }
    let mut crowd: Vec<&mut One> = others.iter_mut().step_by(2).collect();
    for one in &mut crowd {
        host = one.with(host, |guest, _| {
            let (engine, granularity) = (EngineChoice::Dbm, Granularity::Page);
            guest.host.dirty_start(guest.vm, engine, granularity)?;
            guest.start_free(0)
        })?;
    }
    for engine in [EngineChoice::WriteProtect, EngineChoice::Dbm] {
        host = alone.with(host, |guest, copy| {
            guest
                .host
                .dirty_start(guest.vm, engine, Granularity::Page)?;
            for _ in 0..REWRITES {
                rewrite(guest, copy)?;
            }
            guest.host.dirty_stop(guest.vm)
        })?;
        for one in &mut crowd {
            host = one.with(host, round)?;
        }
    }
    for one in &mut crowd {
        host = one.with(host, |guest, copy| {
            guest.stop_free()?;
            round(guest, copy)?;
            let done = guest.ledger.done();
            ensure!(done.0 > 1, "it got to {done} only");
            copy.check(&guest.ledger.contents(done))?;
            guest.host.dirty_stop(guest.vm)
        })?;
    }
    host.finish();
    target.still_on()
}

/// One of several guests that share a session.
struct One {
    vm: VmId,
    ledger: Ledger,
    copy: Copy,
}

impl One {
    /// Has `act` act on this guest, with the session that it gives back.
    fn with(
        &mut self,
        host: Host,
        act: impl FnOnce(&mut OracleGuest, &mut Copy) -> Result<()>,
    ) -> Result<Host> {
        let mut guest = OracleGuest {
            host,
            vm: self.vm,
            ledger: std::mem::take(&mut self.ledger),
        };
        act(&mut guest, &mut self.copy).with_context(|| format!("VM {}", self.vm))?;
        self.ledger = guest.ledger;
        Ok(guest.host)
    }
}

/// One harvest into the copy.
fn round(guest: &mut OracleGuest, copy: &mut Copy) -> Result<()> {
    guest.listen()?;
    let harvest = guest.host.take(guest.vm)?;
    copy.update(&mut guest.host, guest.vm, &harvest)?;
    guest.host.commit(guest.vm, &harvest)
}

/// The second vCPU writes a page, the host harvests it, the vCPU writes it again. A harvest that leaves a
/// translation behind does not hear of the second write.
fn rewrite(guest: &mut OracleGuest, copy: &mut Copy) -> Result<Iteration> {
    let from = Seed(guest.ledger.config().seed.0.wrapping_add(1));
    let config = guest.ledger.same_page_twice(from, Vcpu(1))?;
    guest.configure(&config)?;
    let mut last = guest.ledger.done();
    for _ in 0..2 {
        last = guest.step()?;
        let harvest = guest.host.take(guest.vm)?;
        check_superset(&guest.ledger.written_in(last), &harvest.pages)?;
        copy.update(&mut guest.host, guest.vm, &harvest)?;
        guest.host.commit(guest.vm, &harvest)?;
    }
    Ok(last)
}

fn one_log(guest: &mut OracleGuest, engine: EngineChoice, granularity: Granularity) -> Result<()> {
    guest.host.dirty_start(guest.vm, engine, granularity)?;
    let iteration = guest.step()?;
    let harvest = guest.host.take(guest.vm)?;
    check_superset(&guest.ledger.written_in(iteration), &harvest.pages)?;
    guest.host.commit(guest.vm, &harvest)?;
    guest.host.dirty_stop(guest.vm)
}

impl Judge {
    /// One iteration, one harvest, nothing running in between.
    fn step(&mut self, guest: &mut OracleGuest, round: u64) -> Result<()> {
        let done = guest.step()?;
        let harvest = guest.host.take(guest.vm)?;
        let written = guest.ledger.written_between(self.accounted, done);
        self.judge_harvest(guest, &written, &harvest, round)?;
        self.copy.update(&mut guest.host, guest.vm, &harvest)?;
        if round == ABORTED {
            // Thrown away: the next harvest must tell it again.
            guest.host.abort(guest.vm, &harvest)?;
        } else {
            guest.host.commit(guest.vm, &harvest)?;
            self.accounted = done;
        }
        Ok(())
    }

    fn judge_harvest(
        &self,
        guest: &OracleGuest,
        written: &Pages,
        harvest: &Harvest,
        round: u64,
    ) -> Result<()> {
        let own = guest.ledger.own();
        check_superset(written, &harvest.pages)?;
        match self.granularity {
            Granularity::Page => check_exact(written, own, &harvest.pages),
            _ => {
                check_within_blocks(written, own, &harvest.pages)?;
                if round < STEPS {
                    return Ok(());
                }
                // All blocks have long been found dirty and split. Tracking that has not
                // become exact by now would be `block`.
                check_exact(written, own, &harvest.pages)
            }
        }
    }

    /// Both vCPUs write while the host takes, copies and commits.
    fn burst(&mut self, guest: &mut OracleGuest) -> Result<()> {
        let first = guest.ledger.done();
        let last = Iteration(first.0 + BURST);
        let mut told = Pages::new();
        guest.start_free(BURST)?;
        loop {
            // Seen before the take begins, so the take must have everything.
            let over = guest.ledger.done() >= last;
            let harvest = guest.host.take(guest.vm)?;
            self.switch(guest)?;
            self.copy.update(&mut guest.host, guest.vm, &harvest)?;
            guest.host.commit(guest.vm, &harvest)?;
            self.raced += u64::from(!over && !harvest.pages.is_empty());
            told.extend(harvest.pages);
            if over {
                break;
            }
            guest.listen()?;
        }
        self.accounted = last;
        check_superset(&guest.ledger.written_between(first, last), &told)?;
        self.copy.check(&guest.ledger.contents(last))
    }

    /// Changes the engine while the guest writes and the host has an epoch.
    fn switch(&mut self, guest: &mut OracleGuest) -> Result<()> {
        let mut engines = self.engines.iter().cycle().skip(self.switches);
        let Some(engine) = engines.next() else {
            return Ok(());
        };
        guest.host.dirty_engine(guest.vm, *engine)?;
        self.switches += 1;
        Ok(())
    }

    /// The guest waits for a command: nothing but its own pages may be dirty.
    fn at_rest(&mut self, guest: &mut OracleGuest) -> Result<()> {
        let harvest = guest.host.take(guest.vm)?;
        guest.host.commit(guest.vm, &harvest)?;
        let own = guest.ledger.own();
        let extra: Pages = harvest.pages.difference(own).copied().collect();
        ensure!(
            extra.is_empty(),
            "pages are dirty that nobody wrote: {}",
            show(&extra)
        );
        Ok(())
    }
}

fn a72_dbm_refused(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::oracle(1, MEMORY)?])?;
    let target = script.start_tidemark("virt-a72", &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    host.until_running(vm)?;
    refused(&mut host, vm, EngineChoice::Dbm)?;
    host.finish();
    target.still_on()
}

/// An engine that the CPUs do not have is refused, and nothing is started instead.
fn refused(host: &mut Host, vm: VmId, engine: EngineChoice) -> Result<()> {
    let refused = host.dirty_start_refused(vm, engine, Granularity::Page)?;
    ensure!(
        refused == ErrorReply::EngineUnavailable,
        "it was answered by {refused:?}"
    );
    let status = host.dirty_status(vm)?;
    ensure!(
        status.logging.is_none(),
        "a log runs all the same: {status:?}"
    );
    Ok(())
}
