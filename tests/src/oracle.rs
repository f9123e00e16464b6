//! The host's side of the oracle guest: what it must have written, and what may be dirty.
//!
//! The oracle writes pages that its seeded generator picks. The generator is a pure
//! function, so the host knows them without being told; where the guest names them too
//! (`w` lines), both must agree. Every page written must be in the next harvest
//! (superset). With page granularity nothing else may be, except the pages the guest
//! writes for its own running (`own`).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use tidemark_guests::pattern::{
    BLOCK_PAGES, Config, Gfn, Iteration, Layout, PageRun, Seed, Store, Vcpu, Write, writes,
};
use tidemark_guests::report::Line;

/// Guest pages.
pub type Pages = BTreeSet<Gfn>;

/// Everything known about an oracle: what it said, and what follows from it.
#[derive(Debug)]
pub struct Ledger {
    ram: PageRun,
    vcpus: u8,
    /// What was configured, and from which iteration on.
    configs: Vec<(Iteration, Config)>,
    holes: Vec<PageRun>,
    own: Pages,
    /// What the guest named, by iteration; taken out once it has been compared.
    named: BTreeMap<Iteration, Pages>,
    /// The last iteration before this account begins.
    since: Iteration,
    done: Iteration,
    open: String,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            ram: PageRun::EMPTY,
            vcpus: 0,
            configs: Vec::new(),
            holes: Vec::new(),
            own: Pages::new(),
            named: BTreeMap::new(),
            since: Iteration(0),
            done: Iteration(0),
            open: String::new(),
        }
    }
}

/// What a line asks its reader to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It takes commands.
    Ready,
    /// A command was carried out.
    Ok,
    /// An iteration is done.
    Done(Iteration),
    /// A free run was ended by a byte.
    Stopped(Iteration),
    /// All vCPUs write what they are to lose.
    Losing,
    /// Nothing to wait for.
    Nothing,
}

impl Ledger {
    /// Takes in console text, whole lines and halves, and returns what it came to.
    pub fn push(&mut self, text: &str) -> Result<Vec<Step>> {
        self.open.push_str(text);
        let mut steps = Vec::new();
        while let Some((line, rest)) = self.open.split_once('\n') {
            let (line, rest) = (line.to_owned(), rest.to_owned());
            self.open = rest;
            // A restart cuts off the line that was being written.
            let start = line.find("oracle: ready ").unwrap_or(0);
            let said = Line::parse(&line[start..]).map_err(|error| anyhow::anyhow!("{error}"))?;
            steps.push(self.take(&said)?);
        }
        Ok(steps)
    }

    fn take(&mut self, said: &Line<'_>) -> Result<Step> {
        match said {
            Line::Ready(ready) => {
                ensure!(ready.el == 1, "the oracle runs at EL{}", ready.el);
                self.ram = ready.ram;
                self.vcpus = ready.vcpus;
                return Ok(Step::Ready);
            }
            Line::Ok(configured) => {
                if let Some(configured) = configured {
                    if self.configs.is_empty() {
                        // On a board the oracle may have written for others before.
                        self.since = Iteration(configured.next.0.saturating_sub(1));
                        self.done = self.since;
                    }
                    self.configs.push((configured.next, configured.config));
                }
                return Ok(Step::Ok);
            }
            Line::Written(written) => {
                ensure!(
                    written.iteration > self.done,
                    "pages of iteration {} came after it was done",
                    written.iteration
                );
                let pages = written.runs.clone().flat_map(PageRun::pages);
                self.named
                    .entry(written.iteration)
                    .or_default()
                    .extend(pages);
            }
            Line::Done(iteration) => return self.iteration_done(*iteration),
            // `sum` is answered by this line alone.
            Line::Sum(_) => return Ok(Step::Ok),
            Line::Stopped(iteration) => return Ok(Step::Stopped(*iteration)),
            Line::Losing => return Ok(Step::Losing),
            Line::Own(runs) => self.own.extend(runs.clone().flat_map(PageRun::pages)),
            Line::Hole(runs) => self.holes.extend(runs.clone()),
            Line::Error(why) => bail!("the oracle refused a command: {why}"),
            Line::Fail(what) => bail!("the oracle failed: {what}"),
            _ => {}
        }
        Ok(Step::Nothing)
    }

    /// Checks that iterations come in order and that the guest named just what the
    /// generator says.
    fn iteration_done(&mut self, iteration: Iteration) -> Result<Step> {
        ensure!(
            iteration.0 == self.done.0 + 1,
            "iteration {iteration} is done after {}",
            self.done
        );
        self.done = iteration;
        if let Some(named) = self.named.remove(&iteration) {
            let predicted = self.written_in(iteration);
            ensure!(
                named == predicted,
                "the oracle named {} pages for iteration {iteration}, its generator {}",
                named.len(),
                predicted.len()
            );
        }
        Ok(Step::Done(iteration))
    }

    /// Takes over an oracle that said it was ready to somebody else.
    pub fn found_running(&mut self, ram: PageRun, vcpus: u8) {
        self.ram = ram;
        self.vcpus = vcpus;
    }

    /// The last iteration that is done.
    #[must_use]
    pub fn done(&self) -> Iteration {
        self.done
    }

    /// How many vCPUs came up.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// Its RAM.
    #[must_use]
    pub fn ram(&self) -> PageRun {
        self.ram
    }

    /// What is configured, as the guest confirmed it last.
    #[must_use]
    pub fn config(&self) -> Config {
        self.configs
            .last()
            .map_or_else(Config::default, |&(_, config)| config)
    }

    /// What was configured when `iteration` was written, or will be.
    fn config_of(&self, iteration: Iteration) -> Config {
        let mut since = self.configs.iter().rev();
        let found = since.find(|&&(first, _)| first <= iteration);
        found.map_or_else(Config::default, |&(_, config)| config)
    }

    /// The pages it writes for its own running.
    #[must_use]
    pub fn own(&self) -> &Pages {
        &self.own
    }

    /// The memory it has, with what a host has added.
    #[must_use]
    pub fn memory(&self) -> PageRun {
        self.config().memory(self.ram)
    }

    /// The writes of one vCPU in one iteration.
    fn writes(&self, vcpu: Vcpu, iteration: Iteration) -> Vec<Write> {
        let config = self.config_of(iteration);
        let layout = Layout::new(config.memory(self.ram), &self.holes);
        writes(&layout, &config, vcpu, iteration).collect()
    }

    /// Finds a configuration under which `vcpu` writes one and the same page, and nothing
    /// else, in each of the next two iterations. The search begins at `from`.
    ///
    /// That is the guest that a stale TLB entry betrays: between its two writes it takes
    /// no fault whose own invalidation would hide that the harvest's was missing.
    pub fn same_page_twice(&self, from: Seed, vcpu: Vcpu) -> Result<Config> {
        const SEEDS: u64 = 200_000;
        let layout = Layout::new(self.memory(), &self.holes);
        let page = |config: &Config, iteration: u64| {
            let mut all = writes(&layout, config, vcpu, Iteration(iteration));
            match (all.next(), all.next()) {
                (Some(one), None) if one.run.count == 1 => Some(one.run.first),
                _ => None,
            }
        };
        let next = self.done.0 + 1;
        let configs = (0..SEEDS).map(|step| Config {
            seed: Seed(from.0.wrapping_add(step)),
            vcpus: self.vcpus,
            pages: 1,
            blocks: 0,
            more: self.config().more,
        });
        let mut fitting = configs.filter(|config| {
            let first = page(config, next);
            first.is_some() && first == page(config, next + 1)
        });
        fitting
            .next()
            .context("no seed makes the generator repeat a page")
    }

    /// The pages written in one iteration, by all vCPUs.
    #[must_use]
    pub fn written_in(&self, iteration: Iteration) -> Pages {
        let vcpus = (0..self.config_of(iteration).vcpus).map(Vcpu);
        let writes = vcpus.flat_map(|vcpu| self.writes(vcpu, iteration));
        writes.flat_map(|write| write.run.pages()).collect()
    }

    /// The pages written after iteration `since`, up to and with `until`.
    #[must_use]
    pub fn written_between(&self, since: Iteration, until: Iteration) -> Pages {
        let iterations = (since.0 + 1..=until.0).map(Iteration);
        iterations
            .flat_map(|iteration| self.written_in(iteration))
            .collect()
    }

    /// The word that must stand at each address that was stored to, up to and with
    /// iteration `until`. Pages start out zero (`fill`, after `cfg`), and so does what is added; what is
    /// deleted holds nothing.
    #[must_use]
    pub fn contents(&self, until: Iteration) -> BTreeMap<u64, u64> {
        let mut words = BTreeMap::new();
        for iteration in (self.since.0 + 1..=until.0).map(Iteration) {
            cut_off(&mut words, self.config_of(iteration).memory(self.ram));
            for vcpu in (0..self.config_of(iteration).vcpus).map(Vcpu) {
                for write in self.writes(vcpu, iteration) {
                    let stores = write.stores(vcpu, iteration);
                    words.extend(stores.map(|Store { ipa, value }| (ipa, value)));
                }
            }
        }
        cut_off(&mut words, self.memory());
        words
    }
}

/// Forgets what is behind the end of memory: zero, where a word reaches over it.
fn cut_off(words: &mut BTreeMap<u64, u64>, memory: PageRun) {
    let end = memory.end().ipa();
    words.split_off(&end);
    for (ipa, word) in words.range_mut(end - 7..) {
        *word &= u64::MAX >> (8 * (ipa + 8 - end));
    }
}

/// Every page written is reported. The message names the first few that are not.
pub fn check_superset(written: &Pages, reported: &Pages) -> Result<()> {
    let lost: Pages = written.difference(reported).copied().collect();
    ensure!(
        lost.is_empty(),
        "{} of {} written pages are not in the bitmap: {}",
        lost.len(),
        written.len(),
        show(&lost)
    );
    Ok(())
}

/// Nothing is reported but what was written and the guest's own.
pub fn check_exact(written: &Pages, own: &Pages, reported: &Pages) -> Result<()> {
    let explained = |page: &&Gfn| written.contains(page) || own.contains(page);
    let extra: Pages = reported
        .iter()
        .filter(|page| !explained(page))
        .copied()
        .collect();
    ensure!(
        extra.is_empty(),
        "{} pages are in the bitmap that nobody wrote: {}",
        extra.len(),
        show(&extra)
    );
    Ok(())
}

/// Extra pages lie only in 2 MiB blocks where something was written: the coarsest that
/// tracking on 2 MiB leaves may be.
pub fn check_within_blocks(written: &Pages, own: &Pages, reported: &Pages) -> Result<()> {
    let block = |page: &Gfn| page.0 / BLOCK_PAGES;
    let blocks: BTreeSet<u64> = written.iter().chain(own).map(block).collect();
    let extra = reported
        .iter()
        .filter(|page| !blocks.contains(&block(page)));
    let extra: Pages = extra.copied().collect();
    ensure!(
        extra.is_empty(),
        "{} pages are in the bitmap in blocks that nobody wrote: {}",
        extra.len(),
        show(&extra)
    );
    Ok(())
}

/// The first few pages as runs.
#[must_use]
pub fn show(pages: &Pages) -> String {
    let runs = runs(pages);
    let more = if runs.len() > 12 { " ..." } else { "" };
    let words: Vec<String> = runs.iter().take(12).map(PageRun::to_string).collect();
    words.join(" ") + more
}

/// Pages as runs.
#[must_use]
pub fn runs(pages: &Pages) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count += 1,
            _ => runs.push(PageRun::new(page, 1)),
        }
    }
    runs
}

/// The pages of a KVM-layout bitmap (`u64` words, bit 0 first) of memory that begins at
/// page `base`.
pub fn pages_of_bitmap(base: Gfn, words: &[u64]) -> Pages {
    let bits = words.iter().zip(0u64..).flat_map(|(&word, index)| {
        let set = move |bit: &u64| word >> bit & 1 == 1;
        (0..64)
            .filter(set)
            .map(move |bit| base.plus(index * 64 + bit))
    });
    bits.collect()
}

/// Reads the oracle's configuration command's arguments from a [`Config`].
#[must_use]
pub fn configure_command(config: &Config) -> String {
    let Config {
        seed,
        vcpus,
        pages,
        blocks,
        more,
    } = config;
    format!(
        "cfg seed={} vcpus={vcpus} pages={pages} blocks={blocks} more={more}",
        seed.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_guests::report::{Configured, print_runs};

    fn pages(first: u64, count: u64) -> Pages {
        PageRun::new(Gfn(first), count).pages().collect()
    }

    /// A ledger that has heard an oracle with 64 MiB and two vCPUs start.
    fn heard() -> Ledger {
        let mut ledger = Ledger::default();
        let configured = Configured {
            config: Config {
                seed: Seed(7),
                vcpus: 2,
                pages: 40,
                blocks: 4,
                more: 0,
            },
            next: Iteration(1),
        };
        let text = format!(
            "oracle: ready ram=0x40000000+0x4000000 vcpus=2 el=1\r\nok {configured}\nhole 40200+80\nown 40210+8\nok\n"
        );
        let steps = ledger.push(&text).expect("reads");
        assert_eq!(
            steps,
            [
                Step::Ready,
                Step::Ok,
                Step::Nothing,
                Step::Nothing,
                Step::Ok
            ]
        );
        ledger
    }

    fn named(iteration: u64, ledger: &Ledger) -> String {
        let written = ledger.written_in(Iteration(iteration));
        let mut text = String::new();
        let runs = written.iter().map(|&page| PageRun::new(page, 1));
        print_runs(&mut text, format_args!("w {iteration} 0"), runs).expect("string");
        text
    }

    #[test]
    fn what_the_guest_names_must_be_what_the_generator_says() {
        let mut ledger = heard();
        let text = named(1, &ledger) + "done 1\n";
        let steps = ledger.push(&text).expect("agrees");
        assert_eq!(steps.last(), Some(&Step::Done(Iteration(1))));
        let text = named(2, &ledger);
        let short = text.rsplit_once(' ').expect("runs").0.to_owned() + "\ndone 2\n";
        assert!(ledger.push(&short).is_err(), "one page was not named");
    }

    #[test]
    fn halves_of_lines_are_put_together_and_order_is_checked() {
        let mut ledger = heard();
        assert_eq!(ledger.push("do").expect("half"), []);
        assert_eq!(
            ledger.push("ne 1\n").expect("rest"),
            [Step::Done(Iteration(1))]
        );
        assert!(ledger.push("done 3\n").is_err(), "2 is missing");
        assert!(heard().push("fail data abort\n").is_err());
    }

    #[test]
    fn a_lost_page_is_named() {
        let written = pages(0x10, 3);
        let mut reported = pages(0x10, 3);
        reported.remove(&Gfn(0x11));
        let error = check_superset(&written, &reported).expect_err("lost");
        assert!(error.to_string().ends_with(": 11+1"), "{error}");
        check_superset(&written, &pages(0, 0x100)).expect("superset");
    }

    #[test]
    fn a_page_nobody_wrote_is_named() {
        let (written, own) = (pages(0x10, 1), pages(0x300, 1));
        let mut reported = pages(0x10, 1);
        reported.insert(Gfn(0x300));
        check_exact(&written, &own, &reported).expect("exact");
        assert!(check_exact(&written, &own, &pages(0x10, 2)).is_err());
        check_within_blocks(&written, &own, &pages(0, 1024)).expect("in its blocks");
        assert!(check_within_blocks(&written, &own, &pages(1024, 1)).is_err());
    }

    #[test]
    fn the_last_store_to_an_address_is_what_it_holds() {
        let ledger = heard();
        let words = ledger.contents(Iteration(5));
        let last = ledger.writes(Vcpu(1), Iteration(5));
        let store = last
            .first()
            .and_then(|write| write.stores(Vcpu(1), Iteration(5)).next());
        let store = store.expect("a store");
        assert_eq!(words.get(&store.ipa), Some(&store.value));
        let touched: Pages = words.keys().map(|ipa| Gfn(ipa / 4096)).collect();
        assert!(touched.is_subset(&ledger.written_between(Iteration(0), Iteration(5))));
    }

    #[test]
    fn neighbours_are_one_run() {
        let pages: Pages = [1, 2, 3, 7].map(Gfn).into_iter().collect();
        let found = runs(&pages);
        assert_eq!(found, [PageRun::new(Gfn(1), 3), PageRun::new(Gfn(7), 1)]);
    }

    #[test]
    fn each_iteration_is_judged_by_the_configuration_it_was_written_under() {
        let mut ledger = heard();
        let before = ledger.written_in(Iteration(1));
        ledger
            .push("done 1\nok seed=9 vcpus=2 pages=3 blocks=0 more=0 next=2\n")
            .expect("reads");
        assert_eq!(ledger.written_in(Iteration(1)), before);
        assert!(ledger.written_in(Iteration(2)).len() <= 6);
    }

    #[test]
    fn what_was_deleted_holds_nothing_and_what_came_again_begins_anew() {
        let mut ledger = heard();
        let end = ledger.ram().end().ipa();
        let behind = |ledger: &Ledger, until| {
            let words = ledger.contents(Iteration(until));
            words.range(end..).map(|(_, value)| *value).max()
        };
        let configure = |ledger: &mut Ledger, more: u32, next: u64| {
            let said = format!("ok seed=7 vcpus=2 pages=40 blocks=0 more={more} next={next}\n");
            ledger.push(&said).expect("reads");
        };
        assert_eq!(behind(&ledger, 1), None);
        configure(&mut ledger, 4096, 2);
        assert!(behind(&ledger, 4).is_some_and(|value| value & 0xffff_ffff == 4));
        configure(&mut ledger, 0, 5);
        assert_eq!(behind(&ledger, 4), None);
        assert_eq!(behind(&ledger, 5), None);
        configure(&mut ledger, 4096, 6);
        assert_eq!(behind(&ledger, 5), None);
        // A word over the end keeps the half that is in front of it.
        let mut words = BTreeMap::from([(end - 4, 0x2222_2222_1111_1111), (end - 8, u64::MAX)]);
        cut_off(&mut words, ledger.ram());
        assert_eq!(words.get(&(end - 4)), Some(&0x1111_1111));
        assert_eq!(words.get(&(end - 8)), Some(&u64::MAX));
    }

    #[test]
    fn a_seed_is_found_that_writes_one_page_twice() {
        let mut ledger = heard();
        let config = ledger.same_page_twice(Seed(1), Vcpu(1)).expect("a seed");
        let Config {
            seed,
            vcpus,
            pages,
            blocks,
            more,
        } = config;
        let said = format!(
            "ok seed={} vcpus={vcpus} pages={pages} blocks={blocks} more={more} next=1\n",
            seed.0
        );
        ledger.push(&said).expect("reads");
        let runs = |iteration| ledger.writes(Vcpu(1), Iteration(iteration));
        assert_eq!(runs(1), runs(2));
        assert_eq!(runs(1).len(), 1);
    }

    #[test]
    fn a_line_that_a_restart_cut_hides_nothing() {
        let mut ledger = Ledger::default();
        let text = "begin 95\r\nboracle: ready ram=0x40000000+0x2000000 vcpus=2 el=1\r\n";
        let steps = ledger.push(text).expect("it is read");
        assert_eq!(steps.last(), Some(&Step::Ready));
    }

    #[test]
    fn bits_are_pages() {
        let found = pages_of_bitmap(Gfn(0x100), &[1 | 1 << 63, 2]);
        let wanted: Pages = [0x100, 0x13f, 0x141].map(Gfn).into_iter().collect();
        assert_eq!(found, wanted);
    }
}
