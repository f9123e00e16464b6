//! Dirty tracking judged by a guest that says what it wrote.
//!
//! In step mode the guest stands still between iterations, so a harvest must hold just
//! what was written. In free mode all vCPUs write while the host harvests; there the
//! judge is memory itself: a host that copies every page it is told about, when it is
//! told, must end with a copy that is right.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use tidemark_guests::pattern::{BLOCK_PAGES, Config, Gfn, Iteration, PageRun, Seed, Vcpu};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Copy, Harvest, Host, OracleGuest};
use tidemark_tests::oracle::{Ledger, Pages, check_exact, check_superset, check_within_blocks};
use tidemark_tests::script::Script;
use tidemark_wire::message::{
    Engine, EngineChoice, ErrorReply, Granularity, Logging, SlotId, VmId,
};

use crate::case::{Case, Place};

/// vCPUs of the oracle. Each has a CPU for itself: changing vCPUs drops translations in QEMU, and a stale one could
/// hide behind that.
const VCPUS: u8 = 4;

/// Rounds in step mode, with each engine.
const STEPS: u64 = 7;

/// A round without anything special.
const PLAIN: u64 = 0;

/// The round before which a slot is added that the guest writes from then on.
const PLUGGED: u64 = 2;

/// The round whose harvest the host throws away, to see it again in the next.
const ABORTED: u64 = 4;

/// Times that one page is written, harvested, and written again with nothing between, with each engine.
const REWRITES: u64 = 3;

/// Bursts in free mode that the host's harvests meet in the middle, with each engine to begin with. Each burst is
/// judged by itself. In the first the guest gets a slot, in the second it loses it.
const BURSTS: u64 = 2;

/// Bursts after which it is no bad luck any more that harvests do not meet them.
const MOST_BURSTS: u64 = 20;

/// Iterations in a burst. So many that the guest is still at it when the host has taken once and changed what it
/// changes; with few and long ones it is through before the second take.
const BURST: u64 = 8;

/// Pages a vCPU writes in an iteration of a burst. All iterations write no more than a part of its memory, so
/// that most pages are written once and no later write makes up for a lost one.
const BURST_PAGES: u32 = 60;

/// Logs that are started and stopped one after the other.
const LOGS: u64 = 100;

/// Pages a vCPU writes in an iteration, whole blocks not counted.
const PAGES: u32 = 60;

/// The guest's memory: several 2 MiB blocks beside the image, small enough to read.
const MEMORY: Mib = Mib(16);

/// What is added behind it, twice: two blocks.
const SLOT_PAGES: u32 = 1024;

/// A slot that the guest does not know of, anywhere: it comes and goes in the middle of epochs.
const BALLAST: SlotId = SlotId(18);
const BALLAST_PAGES: PageRun = PageRun::new(Gfn(0x10_0000), 512);

pub fn cases() -> Vec<Case> {
    let judged: [(&str, crate::case::Body); 10] = [
        ("oracle_max_in_pages", |s| judge_in_pages(s, "virt-smp4")),
        ("oracle_max_page", |s| {
            judge(s, "virt-smp4", Granularity::Page)
        }),
        ("oracle_max_adaptive", |s| {
            judge(s, "virt-smp4", Granularity::Adaptive)
        }),
        ("oracle_max_block", |s| {
            judge(s, "virt-smp4", Granularity::Block)
        }),
        ("oracle_a76_page", |s| {
            judge(s, "virt-a76-smp4", Granularity::Page)
        }),
        ("oracle_a76_adaptive", |s| {
            judge(s, "virt-a76-smp4", Granularity::Adaptive)
        }),
        ("oracle_a76_block", |s| {
            judge(s, "virt-a76-smp4", Granularity::Block)
        }),
        ("oracle_a72_page", |s| {
            judge(s, "virt-a72-smp4", Granularity::Page)
        }),
        ("oracle_a72_adaptive", |s| {
            judge(s, "virt-a72-smp4", Granularity::Adaptive)
        }),
        ("oracle_a72_block", |s| {
            judge(s, "virt-a72-smp4", Granularity::Block)
        }),
    ];
    let mut cases: Vec<Case> = judged
        .into_iter()
        .map(|(name, body)| Case::new(name, 180, body))
        .collect();
    cases.push(Case::new("oracle_a72_dbm_refused", 60, a72_dbm_refused));
    cases.push(Case::new("oracle_logs_come_and_go", 90, logs_come_and_go));
    cases.push(Case::new("oracle_engine_follows", 90, engine_follows));
    cases.push(Case::new(
        "oracle_more_vms_than_vmids",
        120,
        more_vms_than_vmids,
    ));
    let boards: [(&str, crate::case::Body); 3] = [
        ("oracle_page", |s| judge(s, "", Granularity::Page)),
        ("oracle_adaptive", |s| judge(s, "", Granularity::Adaptive)),
        ("oracle_block", |s| judge(s, "", Granularity::Block)),
    ];
    let on_board = |(name, body)| Case::new(name, 600, body).at(Place::Board);
    cases.extend(boards.into_iter().map(on_board));
    cases
}

/// Starts an oracle on a machine of its own, or goes to the one that runs.
fn start(script: &mut Script, machine: &str, config: &Config) -> Result<OracleGuest> {
    start_with(script, machine, "leaves=blocks", config)
}

fn start_with(
    script: &mut Script,
    machine: &str,
    options: &str,
    config: &Config,
) -> Result<OracleGuest> {
    let bundle = guests::pack([guests::oracle(config.vcpus, MEMORY)?])?;
    let target = script.start_tidemark(machine, &bundle, options)?;
    target.to_prompt()?;
    let guest = OracleGuest::attach(Host::connect(target)?, config)?;
    let up = guest.ledger.vcpus();
    ensure!(up == config.vcpus, "only {up} vCPUs came up");
    Ok(guest)
}

/// Ends the session; the machine must have come through it.
fn finish(script: &mut Script, guest: OracleGuest) -> Result<()> {
    guest.host.finish();
    script.target()?.still_on()
}

/// What an oracle is configured to before anything is asked of it.
fn few_pages(script: &Script) -> Config {
    Config {
        seed: Seed(script.seed()),
        vcpus: VCPUS,
        pages: PAGES,
        blocks: 8,
        more: 0,
    }
}

/// What the harvests since the start have to account for.
struct Judge {
    granularity: Granularity,
    /// The last iteration that a committed harvest covers.
    accounted: Iteration,
    copy: Copy,
    /// Pages that it was told of in step mode, to be copied at its end: later is as good, and read once.
    owed: Pages,
    /// Pages that were added and that no harvest has told yet.
    added: Pages,
    /// Blocks that were found dirty, and so were split.
    split: BTreeSet<u64>,
    /// Blocks that the last harvest found dirty as wholes, if it was thrown away.
    again: BTreeSet<u64>,
    /// Bursts that a harvest met in the middle.
    raced: u64,
    /// What the engine is changed to in the middle of the next harvests of a burst, for ever.
    engines: Vec<EngineChoice>,
    /// How often it was.
    switches: usize,
    /// Whether the slot is there that the guest does not know of.
    ballast: Ballast,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ballast {
    Ashore,
    Aboard,
}

impl Judge {
    fn new(guest: &OracleGuest, granularity: Granularity) -> Self {
        Self {
            granularity,
            accounted: guest.ledger.done(),
            copy: Copy::default(),
            owed: Pages::new(),
            added: Pages::new(),
            split: BTreeSet::new(),
            again: BTreeSet::new(),
            raced: 0,
            engines: Vec::new(),
            switches: 0,
            ballast: Ballast::Ashore,
        }
    }
}

/// The guest writes on all its vCPUs, under every engine that the machine has: step by step, and in bursts during
/// which the host changes the engine, adds memory and takes it away.
fn judge(script: &mut Script, machine: &str, granularity: Granularity) -> Result<()> {
    let config = few_pages(script);
    let guest = start(script, machine, &config)?;
    judge_guest(script, guest, &config, granularity)
}

/// The same where no leaf is larger than a page.
fn judge_in_pages(script: &mut Script, machine: &str) -> Result<()> {
    let config = few_pages(script);
    let guest = start_with(script, machine, "leaves=pages", &config)?;
    judge_guest(script, guest, &config, Granularity::Page)
}

fn judge_guest(
    script: &mut Script,
    mut guest: OracleGuest,
    config: &Config,
    granularity: Granularity,
) -> Result<()> {
    let mut engines = vec![EngineChoice::WriteProtect, EngineChoice::Auto];
    if guest.host.info(guest.vm)?.features.dbm_usable {
        engines.insert(0, EngineChoice::Dbm);
    } else {
        // A board decides for itself which CPUs it has.
        refused(&mut guest.host, guest.vm, EngineChoice::Dbm)?;
    }
    let mut copy = Copy::default();
    for &engine in &engines {
        guest.configure(config)?;
        let mut judge = Judge {
            engines: engines.clone(),
            // What an earlier log told still stands.
            copy,
            ..Judge::new(&guest, granularity)
        };
        judge
            .log(&mut guest, engine)
            .with_context(|| format!("{engine:?}"))?;
        copy = judge.copy;
    }
    finish(script, guest)
}

impl Judge {
    /// One log, from its start to its end.
    fn log(&mut self, guest: &mut OracleGuest, choice: EngineChoice) -> Result<()> {
        let (vm, before) = (guest.vm, guest.host.info(guest.vm)?.mappings);
        guest.host.dirty_start(vm, choice, self.granularity)?;
        let engine = match choice {
            EngineChoice::WriteProtect => Some(Engine::WriteProtect),
            EngineChoice::Dbm => Some(Engine::Dbm),
            EngineChoice::Auto => None,
        };
        let logging = guest.host.dirty_status(vm)?.logging;
        let as_asked = |logging: Logging| {
            logging.granularity == self.granularity && engine.is_none_or(|it| it == logging.engine)
        };
        ensure!(
            logging.is_some_and(as_asked),
            "what runs is {logging:?}, {engine:?} was asked for"
        );
        for round in 1..=STEPS {
            self.step(guest, round)
                .with_context(|| format!("step {round}"))?;
        }
        let owed = std::mem::take(&mut self.owed);
        self.copy.read(&mut guest.host, vm, &owed)?;
        for number in 1..=REWRITES {
            self.accounted =
                rewrite(guest, &mut self.copy).with_context(|| format!("rewrite {number}"))?;
        }
        let faults = guest.host.dirty_status(vm)?.write_faults;
        match engine {
            Some(Engine::Dbm) => ensure!(faults == 0, "{faults} write faults under the dirty bit"),
            Some(Engine::WriteProtect) => ensure!(faults > 0, "write protection without a fault"),
            None => {}
        }
        let config = guest.ledger.config();
        guest.configure(&Config {
            pages: BURST_PAGES,
            blocks: 8,
            ..config
        })?;
        let mut bursts = 0;
        // Whether a harvest meets a burst is a matter of speed: where it did not, that burst does not count.
        while self.raced < BURSTS || bursts % 2 == 1 {
            bursts += 1;
            ensure!(
                bursts <= MOST_BURSTS,
                "only {} of {MOST_BURSTS} bursts were met by a harvest",
                self.raced
            );
            self.burst(guest, bursts)
                .with_context(|| format!("burst {bursts}"))?;
        }
        ensure!(
            self.switches >= self.engines.len(),
            "the engine was changed {} times only",
            self.switches
        );
        if self.ballast == Ballast::Aboard {
            guest.host.delete_slot(vm, BALLAST)?;
            self.ballast = Ballast::Ashore;
        }
        self.lose(guest)?;
        self.at_rest(guest).context("at rest")?;
        guest.host.dirty_stop(vm)?;
        let after = guest.host.info(vm)?.mappings;
        ensure!(
            after == before,
            "blocks are not put back: {before:?} before, {after:?} after"
        );
        Ok(())
    }
}

/// Logs of all kinds, one after the other. Each start and stop is asked for again until the
/// machine is through with it, which it may be at any moment of the asking.
fn logs_come_and_go(script: &mut Script) -> Result<()> {
    let config = Config {
        blocks: 1,
        ..few_pages(script)
    };
    let mut guest = start(script, "virt-smp4", &config)?;
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
    finish(script, guest)
}

/// Left to itself, the image goes over to write protection when few pages are left, so that the last
/// harvests look at no table, and back when the guest writes many again.
fn engine_follows(script: &mut Script) -> Result<()> {
    let config = Config {
        blocks: 1,
        ..few_pages(script)
    };
    let mut guest = start(script, "virt-smp4", &config)?;
    let (vm, page) = (guest.vm, Granularity::Page);
    guest.host.dirty_start(vm, EngineChoice::Auto, page)?;
    let mut judge = Judge::new(&guest, page);
    for _ in 0..3 {
        judge.step(&mut guest, PLAIN)?;
        engine_is(&mut guest, Engine::Dbm).context("many pages")?;

        judge.at_rest(&mut guest)?;
        engine_is(&mut guest, Engine::WriteProtect).context("few pages")?;
        // This one brings the leaves over, unless that is done already.
        judge.at_rest(&mut guest)?;
        let before = guest.host.dirty_status(vm)?.entries_read;
        ensure!(before > 0, "the dirty bit's harvests read nothing");
        judge.at_rest(&mut guest)?;
        judge.step(&mut guest, PLAIN)?;
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
    finish(script, guest)
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
        more: 0,
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
    let target = script.start_tidemark("virt", &bundle, "vmids=4 leaves=blocks")?;
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
            for _ in 0..2 * REWRITES {
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
    copy.read(&mut guest.host, guest.vm, &harvest.pages)?;
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
        copy.read(&mut guest.host, guest.vm, &harvest.pages)?;
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
    /// A harvest, with all in it that was added since the last one.
    fn take(&mut self, guest: &mut OracleGuest) -> Result<Harvest> {
        let harvest = guest.host.take(guest.vm)?;
        check_superset(&self.added, &harvest.pages).context("what was added")?;
        Ok(harvest)
    }

    /// The host has it. `added` is what was there when it was taken.
    fn commit(&mut self, guest: &mut OracleGuest, harvest: &Harvest) -> Result<()> {
        guest.host.commit(guest.vm, harvest)?;
        self.added = self.added.difference(&harvest.pages).copied().collect();
        Ok(())
    }

    /// Adds memory behind what the guest has.
    fn add(&mut self, guest: &mut OracleGuest) -> Result<()> {
        let (slot, run) = self.next_slot(guest);
        guest.host.add_slot(guest.vm, slot, run)?;
        self.added.extend(run.pages());
        Ok(())
    }

    /// The slot behind all that the guest knows of.
    fn next_slot(&self, guest: &OracleGuest) -> (SlotId, PageRun) {
        let before = guest.ledger.config().more / SLOT_PAGES;
        let run = PageRun::new(guest.ledger.memory().end(), SLOT_PAGES.into());
        (SlotId(3 + before as u16), run)
    }

    /// One iteration, one harvest, nothing running in between.
    fn step(&mut self, guest: &mut OracleGuest, round: u64) -> Result<()> {
        if round == PLUGGED {
            self.add(guest)?;
            guest.plug(SLOT_PAGES)?;
        }
        let done = guest.step()?;
        let harvest = self.take(guest)?;
        let written = guest.ledger.written_between(self.accounted, done);
        self.judge_harvest(guest, &written, &harvest)?;
        self.owed.extend(&harvest.pages);
        if round == ABORTED {
            // Thrown away: the next harvest must tell it again.
            guest.host.abort(guest.vm, &harvest)?;
        } else {
            self.commit(guest, &harvest)?;
            self.again.clear();
            self.accounted = done;
        }
        Ok(())
    }

    /// Nothing is missing; and nothing is there that nobody wrote, but for the rest of blocks that are found dirty
    /// for the first time, or always are found whole.
    fn judge_harvest(
        &mut self,
        guest: &OracleGuest,
        written: &Pages,
        harvest: &Harvest,
    ) -> Result<()> {
        check_superset(written, &harvest.pages)?;
        let own: &Pages = &(guest.ledger.own() | &self.added);
        match self.granularity {
            Granularity::Page => check_exact(written, own, &harvest.pages),
            Granularity::Block => check_within_blocks(written, own, &harvest.pages),
            Granularity::Adaptive => {
                let block = |page: &Gfn| page.0 / BLOCK_PAGES;
                // What was added is dirty because it is said to be, and no block of it is split for that.
                let dirtied = written.iter().chain(guest.ledger.own());
                let now: BTreeSet<u64> = dirtied.map(block).collect();
                self.again.extend(now.difference(&self.split));
                self.split.extend(now);
                let exactly = |page: &&Gfn| !self.again.contains(&block(page));
                let exactly = harvest.pages.iter().filter(exactly).copied().collect();
                check_exact(written, own, &exactly)
            }
        }
    }

    /// What may be in a harvest although no burst wrote it: the guest's own pages and what was added, and where blocks are
    /// reported whole the blocks around them.
    fn reported_anyway(&self, guest: &OracleGuest) -> Pages {
        let own = guest.ledger.own() | &self.added;
        match self.granularity {
            Granularity::Page => own,
            Granularity::Adaptive | Granularity::Block => {
                let blocks: BTreeSet<u64> = own.iter().map(|page| page.0 / BLOCK_PAGES).collect();
                let pages = |block: u64| (block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES).map(Gfn);
                blocks.into_iter().flat_map(pages).collect()
            }
        }
    }

    /// All vCPUs write while the host takes, copies and commits. Meanwhile the engine is changed, and slots come and
    /// go; one of them becomes the guest's in every second burst, and in the one after that it loses it.
    fn burst(&mut self, guest: &mut OracleGuest, number: u64) -> Result<()> {
        let first = guest.ledger.done();
        let last = Iteration(first.0 + BURST);
        let mut told = Pages::new();
        let mut telling = 0;
        guest.start_free(BURST)?;
        let mut adds = number % 2 == 1;
        loop {
            // Seen before the take begins, so the take must have everything.
            let over = guest.ledger.done() >= last;
            let mut harvest = self.take(guest)?;
            let own = self.reported_anyway(guest);
            telling += u64::from(!harvest.pages.is_subset(&own));
            self.switch(guest)?;
            self.shift_ballast(guest, &mut harvest)?;
            if std::mem::take(&mut adds) {
                self.add(guest)?;
            }
            self.copy.read(&mut guest.host, guest.vm, &harvest.pages)?;
            self.commit(guest, &harvest)?;
            told.extend(harvest.pages);
            if over {
                break;
            }
            guest.listen()?;
        }
        self.accounted = last;
        // What a second one tells was not written when the first was taken.
        self.raced += u64::from(telling > 1);
        check_superset(&guest.ledger.written_between(first, last), &told)?;
        self.copy.check(&guest.ledger.contents(last))?;
        match number % 2 {
            1 => guest.plug(SLOT_PAGES),
            _ => self.lose(guest),
        }
    }

    /// The guest loses the slot it got last, in the middle of an epoch, while all its vCPUs write there.
    fn lose(&mut self, guest: &mut OracleGuest) -> Result<()> {
        let harvest = self.take(guest)?;
        self.copy.read(&mut guest.host, guest.vm, &harvest.pages)?;
        guest.lose(SLOT_PAGES, |host, vm| {
            let slots = host.info(vm)?.slots.into_iter().map(|slot| slot.id);
            let last = slots.filter(|slot| *slot != BALLAST).max();
            host.delete_slot(vm, last.context("the guest has no slots")?)
        })?;
        self.commit(guest, &harvest)?;
        let (_, run) = self.next_slot(guest);
        self.added.retain(|page| !run.contains(*page));
        self.copy.forget(run);
        Ok(())
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

    /// Adds or deletes the slot that the guest does not know of while the guest writes and the host has an epoch.
    fn shift_ballast(&mut self, guest: &mut OracleGuest, harvest: &mut Harvest) -> Result<()> {
        self.ballast = match self.ballast {
            Ballast::Ashore => {
                guest.host.add_slot(guest.vm, BALLAST, BALLAST_PAGES)?;
                self.added.extend(BALLAST_PAGES.pages());
                Ballast::Aboard
            }
            Ballast::Aboard => {
                guest.host.delete_slot(guest.vm, BALLAST)?;
                let there = |page: &Gfn| !BALLAST_PAGES.contains(*page);
                self.added.retain(there);
                harvest.pages.retain(there);
                Ballast::Ashore
            }
        };
        Ok(())
    }

    /// The guest waits for a command: nothing but its own pages may be dirty.
    fn at_rest(&mut self, guest: &mut OracleGuest) -> Result<()> {
        let harvest = guest.host.take(guest.vm)?;
        guest.host.commit(guest.vm, &harvest)?;
        let (none, own) = (Pages::new(), guest.ledger.own());
        match self.granularity {
            Granularity::Block => check_within_blocks(&none, own, &harvest.pages),
            _ => check_exact(&none, own, &harvest.pages),
        }
    }
}

fn a72_dbm_refused(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::oracle(1, MEMORY)?])?;
    let target = script.start_tidemark("virt-a72", &bundle, "leaves=blocks")?;
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
