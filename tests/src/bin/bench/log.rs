//! The rows of what EL2 does for the host: by its own counter, and read with `Costs`.
//!
//! The guests are oracles that wait for a command, so that nothing is dirty but what they need to wait. Then
//! everything that a host can ask for is asked for once, for the sake of the longest of it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_guests::pattern::{Gfn, PageRun};
use tidemark_tests::clocks::Clocks;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Costs, Host};
use tidemark_tests::rows::Report;
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::bundle::VmDraft;
use tidemark_wire::message::{EngineChoice, Granularity, Hold, SlotId, Task, VmId};

/// A slot at the end of 64 GiB of addresses, and its pages: 32 MiB.
const FAR: SlotId = SlotId(9);
const FAR_PAGES: u64 = 32 << 8;

const ENGINES: [EngineChoice; 2] = [EngineChoice::Dbm, EngineChoice::WriteProtect];

/// The longest time that EL2 went without a look for an interrupt.
#[derive(Debug, Default)]
pub struct Longest(f64);

impl Longest {
    /// An exit, as its guest saw it.
    pub fn exit(&mut self, ticks: f64) {
        self.0 = self.0.max(ticks);
    }

    /// All that EL2 did on a machine beside exits.
    pub fn machine(&mut self, name: &str, costs: &Costs) -> Result<()> {
        eprintln!("bench: EL2's own work for {name}: {costs}");
        self.0 = self.0.max(costs.longest()?);
        Ok(())
    }

    /// Makes the row, if anything was measured.
    pub fn report(&self, report: &mut Report) -> Result<()> {
        if self.0 == 0.0 {
            return Ok(());
        }
        report.add("longest_el2", self.0)
    }
}

/// Measures all rows of the dirty log.
pub fn measure(report: &mut Report, longest: &mut Longest) -> Result<()> {
    eprintln!("bench: the dirty log");
    let clocks = Clocks::usual()
        .with_boot(60)
        .with_silence(60)
        .with_total(300);
    let mut script = Script::new("bench", "log", clocks)?;
    let result = drive(&mut script, report, longest);
    script.conclude(result)
}

fn drive(script: &mut Script, report: &mut Report, longest: &mut Longest) -> Result<()> {
    let sizes = [("small", Mib(64)), ("large", Mib(256)), ("tiny", Mib(8))];
    let guests = sizes.map(|(name, memory)| {
        guests::oracle(1, memory).map(|guest| VmDraft {
            name: name.to_owned(),
            ..guest
        })
    });
    let bundle = guests::pack(guests.into_iter().collect::<Result<Vec<_>>>()?)?;
    let target =
        script.start_tidemark("virt-smp1-icount", &bundle, "autostart=no leaves=blocks")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let (small, large, tiny) = (host.vm("small")?, host.vm("large")?, host.vm("tiny")?);
    // One after the other, and paused: a guest that waits for a command takes most of the CPU.
    for vm in [small, large, tiny] {
        host.client().reset(vm)?;
        host.attach(vm)?;
        host.expect(vm, "ready")?;
        host.client().pause(vm, Hold::Lasting)?;
    }
    report.add("log_get_64m", get(&mut host, small)?)?;
    report.add("log_enable_256m", enable(&mut host, large)?)?;
    everything(&mut host, target, small, tiny)?;
    longest.machine("the host", &host.costs()?)?;
    host.finish();
    target.still_on()
}

/// Take and copy out, by write protection, with next to nothing dirty: what KVM's get does, which copies the bitmap.
fn get(host: &mut Host, vm: VmId) -> Result<f64> {
    host.dirty_start(vm, EngineChoice::WriteProtect, Granularity::Page)?;
    let first = host.take(vm)?;
    host.commit(vm, &first)?;
    // A clean bitmap would not be copied at all: the guest writes a page or two when it is spoken to.
    host.client().resume(vm, Hold::Lasting)?;
    host.type_line(vm, "help")?;
    host.expect(vm, "ok")?;
    host.client().pause(vm, Hold::Lasting)?;
    let before = host.costs()?;
    let harvest = host.take(vm)?;
    let after = host.costs()?;
    let pages = harvest.pages.len();
    ensure!(
        (1..16).contains(&pages),
        "the guest wrote {pages} pages to say what it can"
    );
    host.commit(vm, &harvest)?;
    host.dirty_stop(vm)?;
    Ok(after.since(&before, Task::LogTake)? + after.since(&before, Task::BitmapRead)?)
}

/// Starts the log on blocks, by the dearer engine.
fn enable(host: &mut Host, vm: VmId) -> Result<f64> {
    let mut dearest: f64 = 0.0;
    for engine in ENGINES {
        let mappings = host.info(vm)?.mappings;
        ensure!(
            mappings.pages_4k == 0,
            "{} pages are no blocks",
            mappings.pages_4k
        );
        let before = host.costs()?;
        host.dirty_start(vm, engine, Granularity::Adaptive)?;
        let after = host.costs()?;
        host.dirty_stop(vm)?;
        dearest = dearest.max(after.since(&before, Task::LogStart)?);
    }
    Ok(dearest)
}

/// All that a host, or a person at the shell, can ask for.
fn everything(host: &mut Host, target: &Target, vm: VmId, tiny: VmId) -> Result<()> {
    // Memory up to the end of an address space of 64 GiB, for all that follows.
    let far = PageRun {
        first: Gfn((64 << 30 >> 12) - FAR_PAGES),
        count: FAR_PAGES,
    };
    host.add_slot(vm, FAR, far)?;
    for engine in ENGINES {
        for granularity in [Granularity::Page, Granularity::Adaptive, Granularity::Block] {
            host.dirty_start(vm, engine, granularity)?;
            let harvest = host.take(vm)?;
            host.abort(vm, &harvest)?;
            let harvest = host.take(vm)?;
            host.commit(vm, &harvest)?;
            host.dirty_stop(vm)?;
        }
    }
    host.delete_slot(vm, FAR)?;
    let ram = host.info(vm)?.slots.first().map(|slot| slot.base_ipa);
    let ram = ram.context("a guest without memory")?;
    // The kernel is what compresses worst.
    host.client()
        .read_memory(vm, vec![(ram, 4 << 20)], |_, _| Ok(()))?;
    host.client().hash(tiny, SlotId(0), &mut |_, _| {})?;
    for command in [
        "help",
        "list",
        "info small",
        "dirty status small",
        "machine",
        "log info",
        "nonsense",
    ] {
        target.type_line(command)?;
        host.client().poll(Duration::from_millis(200))?;
    }
    host.client().reset(tiny)?;
    host.client().resume(tiny, Hold::Lasting)?;
    host.until_running(tiny)?;
    host.client().stop(tiny)?;
    Ok(())
}
