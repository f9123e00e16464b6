//! The host of a machine under test: `tidectl`'s own client, with what scripts need
//! around it — harvests as sets of pages, guests' consoles as text to wait for, and a
//! copy of guest memory made only from what harvests told.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tidectl::bitmaps::Bitmaps;
use tidectl::client::{Client, Options, Output};
use tidectl::link::{Link, Port};
use tidemark_guests::pattern::{Config, Gfn, Iteration, PAGE_BYTES, PageRun};
use tidemark_wire::message::{
    ConsoleFrom, Cost, DirtyStatus, EngineChoice, Epoch, ErrorReply, Granularity, Hold, SlotAccess,
    SlotId, Task, VmId, VmInfo, VmState,
};

use crate::clocks::{Running, scaled};
use crate::line::{FAILURES, Line};
use crate::oracle::{Ledger, Pages, Step, configure_command, pages_of_bitmap, runs};
use crate::target::{Arrival, Target};

/// How long one look at a console takes when there is nothing.
const LOOK: Duration = Duration::from_millis(20);

/// A session with a machine, for as long as this lives.
pub struct Host {
    client: Client,
    consoles: Arc<Mutex<Consoles>>,
    line: Arc<Line>,
    clocks: Running,
    arrival: Arrival,
}

/// What the guests' consoles said and nobody has read yet.
#[derive(Default)]
struct Consoles {
    unread: BTreeMap<VmId, Vec<u8>>,
    /// The part of a line that is not in the transcript yet.
    unlogged: Vec<u8>,
    /// Console output that the machine no longer had.
    missed: u64,
}

/// An epoch in flight, as pages.
#[derive(Clone, Debug)]
pub struct Harvest {
    /// Its name.
    pub epoch: Epoch,
    /// Its bitmaps.
    pub bitmaps: Bitmaps,
    /// Its dirty pages.
    pub pages: Pages,
}

/// What EL2's own work has cost up to a moment.
#[derive(Clone, Debug)]
pub struct Costs(Vec<Cost>);

impl Costs {
    /// What a task has cost.
    pub fn of(&self, task: Task) -> Result<Cost> {
        let found = self.0.iter().find(|cost| cost.task == task);
        found
            .copied()
            .with_context(|| format!("the machine tells no cost of `{task}`"))
    }

    /// What a task cost since `earlier`.
    pub fn since(&self, earlier: &Self, task: Task) -> Result<f64> {
        let (now, then) = (self.of(task)?, earlier.of(task)?);
        ensure!(now.times > then.times, "`{task}` was not done meanwhile");
        Ok((now.ticks - then.ticks) as f64)
    }

    /// The longest time without a look for an interrupt, exits apart.
    pub fn longest(&self) -> Result<f64> {
        Ok(self.of(Task::Stretch)?.longest as f64)
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for cost in self.0.iter().filter(|cost| cost.times > 0) {
            let mean = cost.ticks / cost.times;
            write!(f, "{} {}x{mean}<={}; ", cost.task, cost.times, cost.longest)?;
        }
        Ok(())
    }
}

impl Host {
    /// Opens a session through the machine's relay, as `tidectl --port` would.
    pub fn connect(target: &Target) -> Result<Self> {
        let port: Port = target.port().parse().map_err(anyhow::Error::msg)?;
        let link = Link::open(&port)?;
        let mut options = Options::for_pace(link.pace);
        options.timeout = scaled(30);
        let consoles: Arc<Mutex<Consoles>> = Arc::default();
        let (for_sink, line) = (Arc::clone(&consoles), Arc::clone(target.line()));
        let sink = Box::new(move |output: Output<'_>| {
            lock(&for_sink).take_in(&output, &line);
        });
        let client = Client::open_with(link, options, sink).context("no session")?;
        Ok(Self {
            client,
            consoles,
            line: Arc::clone(target.line()),
            clocks: *target.clocks(),
            arrival: target.arrival(),
        })
    }

    /// The client itself.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Ends the session.
    pub fn finish(self) {
        self.client.close();
    }

    /// Goes away in the middle of things, without a word, as a host does whose cable is
    /// pulled.
    pub fn vanish(self) {
        self.line.cut_client();
        // What the client says on its way out reaches nobody.
        drop(self.client);
    }

    /// The VM called `name`.
    pub fn vm(&mut self, name: &str) -> Result<VmId> {
        Ok(self.client.find(name)?.id)
    }

    /// Everything about a VM.
    pub fn info(&mut self, vm: VmId) -> Result<VmInfo> {
        Ok(self.client.info(vm)?)
    }

    /// What EL2's own work has cost so far, in instructions: what a tick is where they are counted.
    pub fn costs(&mut self) -> Result<Costs> {
        let (frequency, costs) = self.client.costs()?;
        ensure!(
            frequency == 1_000_000_000,
            "a tick is no instruction on this machine: its counter has {frequency} Hz"
        );
        Ok(Costs(costs))
    }

    /// Waits until a VM runs: the prompt is there before the guests have started.
    pub fn until_running(&mut self, vm: VmId) -> Result<VmInfo> {
        loop {
            let info = self.info(vm)?;
            match info.summary.state {
                VmState::Running => return Ok(info),
                VmState::Starting => {}
                other => bail!("the guest is {other}: {}", info.reason),
            }
            // Loading a guest is silent work, so only the total clock counts.
            ensure!(
                !self.clocks.left_in_total().is_zero(),
                "the total clock ran out while a guest was starting"
            );
            self.look()?;
        }
    }

    /// Starts the dirty log.
    pub fn dirty_start(
        &mut self,
        vm: VmId,
        engine: EngineChoice,
        granularity: Granularity,
    ) -> Result<()> {
        Ok(self
            .client
            .start_log(vm, engine, granularity, Hold::Lasting, &mut |_, _| {})?)
    }

    /// Starts the dirty log where that must be refused, and returns how it was.
    pub fn dirty_start_refused(
        &mut self,
        vm: VmId,
        engine: EngineChoice,
        granularity: Granularity,
    ) -> Result<ErrorReply> {
        match self
            .client
            .start_log(vm, engine, granularity, Hold::Lasting, &mut |_, _| {})
        {
            Err(tidectl::Error::Target { reply, .. }) => Ok(reply),
            Err(error) => Err(error.into()),
            Ok(()) => bail!("the log was started, which should have been refused"),
        }
    }

    /// Changes the engine of the log that runs.
    pub fn dirty_engine(&mut self, vm: VmId, engine: EngineChoice) -> Result<()> {
        Ok(self.client.set_engine(vm, engine, &mut |_, _| {})?)
    }

    /// Gives a guest more memory.
    pub fn add_slot(&mut self, vm: VmId, slot: SlotId, run: PageRun) -> Result<()> {
        let (base, bytes) = (run.first.ipa(), run.count * PAGE_BYTES);
        Ok(self
            .client
            .add_slot(vm, slot, base, bytes, &mut |_, _| {})?)
    }

    /// Takes such memory away.
    pub fn delete_slot(&mut self, vm: VmId, slot: SlotId) -> Result<()> {
        Ok(self.client.delete_slot(vm, slot, &mut |_, _| {})?)
    }

    /// Stops the dirty log.
    pub fn dirty_stop(&mut self, vm: VmId) -> Result<()> {
        Ok(self.client.stop_log(vm, &mut |_, _| {})?)
    }

    /// The state of the dirty log.
    pub fn dirty_status(&mut self, vm: VmId) -> Result<DirtyStatus> {
        Ok(self.client.log_status(vm)?)
    }

    /// Takes an epoch and reads its bitmaps; it stays in flight.
    pub fn take(&mut self, vm: VmId) -> Result<Harvest> {
        let report = self.client.take(vm, &mut |_, _| {})?;
        let bitmaps = self.client.read_bitmaps(vm, &report, &mut |_, _| {})?;
        let slots = bitmaps.slots.iter();
        let pages =
            slots.flat_map(|slot| pages_of_bitmap(Gfn(slot.base_ipa / PAGE_BYTES), slot.words()));
        let pages: Pages = pages.collect();
        ensure!(
            pages.len() as u64 == report.dirty_pages,
            "{} pages were reported, {} are in the bitmaps",
            report.dirty_pages,
            pages.len()
        );
        Ok(Harvest {
            epoch: report.epoch,
            bitmaps,
            pages,
        })
    }

    /// Ends an epoch: the host has what it stands for.
    pub fn commit(&mut self, vm: VmId, harvest: &Harvest) -> Result<()> {
        Ok(self.client.commit(vm, harvest.epoch)?)
    }

    /// Ends an epoch: the machine takes it back.
    pub fn abort(&mut self, vm: VmId, harvest: &Harvest) -> Result<()> {
        Ok(self.client.abort(vm, harvest.epoch)?)
    }

    /// Has a guest's console sent here: all of it, or, where other scripts have been
    /// before, what comes from now on.
    pub fn attach(&mut self, vm: VmId) -> Result<()> {
        let from = match self.arrival {
            Arrival::Fresh => ConsoleFrom::Oldest,
            Arrival::Running => ConsoleFrom::Now,
        };
        self.until_running(vm)?;
        self.client.attach(vm, from)?;
        Ok(())
    }

    /// Looks whether there is anything new from the consoles.
    pub fn look(&mut self) -> Result<()> {
        self.client.poll(LOOK)?;
        let missed = lock(&self.consoles).missed;
        ensure!(missed == 0, "{missed} bytes of console output were lost");
        Ok(())
    }

    /// What a guest said that has not been read yet.
    #[must_use]
    pub fn heard(&mut self, vm: VmId) -> String {
        let bytes = lock(&self.consoles).unread.remove(&vm).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Types a line to a guest.
    pub fn type_line(&mut self, vm: VmId, text: &str) -> Result<()> {
        Ok(self.client.type_input(vm, format!("{text}\r").as_bytes())?)
    }

    /// Waits until a guest has said `text` and returns what came before it.
    pub fn expect(&mut self, vm: VmId, text: &str) -> Result<String> {
        let mut said = String::new();
        let mut heard = Instant::now();
        loop {
            let new = self.heard(vm);
            if !new.is_empty() {
                heard = Instant::now();
            }
            said += &new;
            let found = said.find(text);
            let before = said.get(..found.unwrap_or(said.len())).unwrap_or_default();
            if let Some(sign) = FAILURES.iter().find(|sign| before.contains(**sign)) {
                bail!("the guest said `{sign}` while `{text}` was awaited:\n{before}");
            }
            if let Some(at) = found {
                let rest = said.get(at + text.len()..).unwrap_or_default().as_bytes();
                let before = before.to_owned();
                // What came after it is still unread.
                let mut consoles = lock(&self.consoles);
                let unread = consoles.unread.entry(vm).or_default();
                unread.splice(..0, rest.iter().copied());
                return Ok(before);
            }
            self.clocks
                .left(heard.max(self.line.heard_text()))
                .map_err(|ran_out| {
                    anyhow::anyhow!(
                        "{ran_out} while waiting for {text:?} from the guest; it said:\n{said}"
                    )
                })?;
            self.look()?;
        }
    }
}

impl Consoles {
    fn take_in(&mut self, output: &Output<'_>, line: &Line) {
        match output {
            Output::Console { vm, data, .. } => {
                self.unread.entry(*vm).or_default().extend_from_slice(data);
                for &byte in *data {
                    match byte {
                        b'\n' => {
                            line.note_guest(&String::from_utf8_lossy(&self.unlogged));
                            self.unlogged.clear();
                        }
                        b'\r' => {}
                        _ => self.unlogged.push(byte),
                    }
                }
            }
            Output::Missed { bytes, .. } => self.missed += bytes,
            _ => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest memory as a host knows it that reads only the pages it is told about.
///
/// A page it never read counts as zero, which is what the oracle's pages start as.
#[derive(Clone, Debug, Default)]
pub struct Copy {
    pages: BTreeMap<Gfn, Vec<u8>>,
}

impl Copy {
    /// Reads pages of a harvest anew.
    pub fn read(&mut self, host: &mut Host, vm: VmId, pages: &Pages) -> Result<()> {
        let ranges: Vec<(u64, u64)> = runs(pages)
            .iter()
            .map(|run| (run.first.ipa(), run.count * PAGE_BYTES))
            .collect();
        let pages = &mut self.pages;
        host.client.read_memory(vm, ranges, |ipa, bytes| {
            let mut at = ipa;
            let mut rest = bytes;
            // A part may begin and end within a page.
            while !rest.is_empty() {
                let offset = (at % PAGE_BYTES) as usize;
                let length = rest.len().min(PAGE_BYTES as usize - offset);
                let (part, after) = rest.split_at(length);
                let page = pages.entry(Gfn(at / PAGE_BYTES));
                let page = page.or_insert_with(|| vec![0; PAGE_BYTES as usize]);
                if let Some(place) = page.get_mut(offset..offset + length) {
                    place.copy_from_slice(part);
                }
                at += length as u64;
                rest = after;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Forgets what it has of pages that are no memory any more.
    pub fn forget(&mut self, run: PageRun) {
        self.pages.retain(|page, _| !run.contains(*page));
    }

    /// Checks that each address holds the word that must be there.
    pub fn check(&self, words: &BTreeMap<u64, u64>) -> Result<()> {
        let mut wrong = Vec::new();
        for (&ipa, &wanted) in words {
            let found = self.word(ipa);
            if found != wanted {
                wrong.push(format!("{ipa:#x} holds {found:#x}, not {wanted:#x}"));
            }
        }
        ensure!(
            wrong.is_empty(),
            "the copy is wrong at {} of {} addresses: {}",
            wrong.len(),
            words.len(),
            wrong.iter().take(8).cloned().collect::<Vec<_>>().join("; ")
        );
        Ok(())
    }

    /// Eight bytes, which may lie across two pages.
    fn word(&self, ipa: u64) -> u64 {
        let bytes: [u8; 8] = std::array::from_fn(|index| {
            let at = ipa + index as u64;
            let page = self.pages.get(&Gfn(at / PAGE_BYTES));
            page.and_then(|page| page.get((at % PAGE_BYTES) as usize))
                .copied()
                .unwrap_or(0)
        });
        u64::from_le_bytes(bytes)
    }
}

/// An oracle, its console attached, and the account of what it wrote.
pub struct OracleGuest {
    /// The session.
    pub host: Host,
    /// Which VM it is.
    pub vm: VmId,
    /// What it said and must have written.
    pub ledger: Ledger,
}

impl OracleGuest {
    /// Waits until the oracle is ready, configures it, asks for its own pages, and has it
    /// zero all pages it may write.
    pub fn attach(host: Host, config: &Config) -> Result<Self> {
        Self::attach_to(host, "oracle", config)
    }

    /// The same with the oracle called `name`, where there are several.
    pub fn attach_to(mut host: Host, name: &str, config: &Config) -> Result<Self> {
        let vm = host.vm(name)?;
        host.attach(vm)?;
        let mut guest = Self {
            host,
            vm,
            ledger: Ledger::default(),
        };
        match guest.host.arrival {
            Arrival::Fresh => guest
                .wait(|step| step == Step::Ready)
                .context("the oracle is not ready")?,
            Arrival::Running => guest.take_over()?,
        }
        guest.configure(config)?;
        guest.command("map")?;
        guest.command("own")?;
        guest.command("fill")?;
        Ok(guest)
    }

    /// Goes on with an oracle that said it was ready to somebody else.
    fn take_over(&mut self) -> Result<()> {
        let info = self.host.info(self.vm)?;
        let mut slots = info.slots.iter();
        let slot = slots.find(|slot| slot.access == SlotAccess::ReadWrite);
        let slot = slot.context("the oracle has no memory")?;
        let ram = PageRun::new(Gfn(slot.base_ipa / PAGE_BYTES), slot.pages);
        self.ledger.found_running(ram, info.summary.vcpus);
        self.host.dirty_stop(self.vm)
    }

    /// Sets what the next iterations write.
    pub fn configure(&mut self, config: &Config) -> Result<()> {
        self.command(&configure_command(config))?;
        let set = self.ledger.config();
        ensure!(set == *config, "the oracle is configured as {set:?}");
        Ok(())
    }

    /// Gives a command and waits until it is carried out.
    pub fn command(&mut self, command: &str) -> Result<()> {
        self.host.type_line(self.vm, command)?;
        self.wait(|step| step == Step::Ok)
            .with_context(|| format!("the oracle did not do `{command}`"))
    }

    /// Has it write one iteration and returns which.
    pub fn step(&mut self) -> Result<Iteration> {
        let next = Iteration(self.ledger.done().0 + 1);
        self.host.type_line(self.vm, "step")?;
        self.wait(|step| step == Step::Done(next))
            .context("the oracle did not step")?;
        Ok(next)
    }

    /// Has it write `count` iterations and does not wait.
    pub fn start_free(&mut self, count: u64) -> Result<()> {
        self.host.type_line(self.vm, &format!("free {count} quiet"))
    }

    /// Ends a run that was started with `start_free(0)`.
    pub fn stop_free(&mut self) -> Result<()> {
        self.host.client.type_input(self.vm, b" ")?;
        self.wait(|step| matches!(step, Step::Stopped(_)))
            .context("the oracle did not stop")
    }

    /// Tells it of `pages` more behind its memory, which must be there, and zero.
    pub fn plug(&mut self, pages: u32) -> Result<()> {
        let config = self.ledger.config();
        let more = config.more + pages;
        self.configure(&Config { more, ..config })
    }

    /// Has all its vCPUs write the last `pages` pages of its memory again and again while `delete` deletes them.
    /// Then none of them may reach one.
    pub fn lose(
        &mut self,
        pages: u32,
        delete: impl FnOnce(&mut Host, VmId) -> Result<()>,
    ) -> Result<()> {
        self.host.type_line(self.vm, &format!("lose {pages}"))?;
        self.wait(|step| step == Step::Losing)
            .context("the oracle did not begin to lose memory")?;
        delete(&mut self.host, self.vm)?;
        self.host.client.type_input(self.vm, b" ")?;
        self.wait(|step| step == Step::Ok)
            .context("the oracle did not lose memory")?;
        let config = self.ledger.config();
        let more = config.more - pages;
        self.configure(&Config { more, ..config })
    }

    /// Takes in what it says meanwhile.
    pub fn listen(&mut self) -> Result<Vec<Step>> {
        self.host.look()?;
        let text = self.host.heard(self.vm);
        self.ledger.push(&text)
    }

    /// Listens until it says what `wanted` is true for.
    pub fn wait(&mut self, wanted: impl Fn(Step) -> bool) -> Result<()> {
        let mut heard = Instant::now();
        loop {
            let steps = self.listen()?;
            if !steps.is_empty() {
                heard = Instant::now();
            }
            if steps.into_iter().any(&wanted) {
                return Ok(());
            }
            if let Err(ran_out) = self
                .host
                .clocks
                .left(heard.max(self.host.line.heard_text()))
            {
                bail!("{ran_out} while waiting for the oracle");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_reads_words_across_pages() {
        let mut copy = Copy::default();
        copy.pages.insert(Gfn(1), vec![0x11; 4096]);
        copy.pages.insert(Gfn(2), vec![0x22; 4096]);
        let across = BTreeMap::from([(0x1ffc, 0x2222_2222_1111_1111), (0x3000, 0)]);
        copy.check(&across).expect("right");
        assert!(copy.check(&BTreeMap::from([(0x1000, 0)])).is_err());
    }
}
