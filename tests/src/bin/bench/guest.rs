//! The rows that the bench guest counts itself, with the host setting the dirty log as
//! each phase wants it.

use anyhow::{Context, Result, bail, ensure};
use tidemark_guests::report::Line;
use tidemark_tests::clocks::Clocks;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::rows::Report;
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::message::{EngineChoice, Granularity, Task, VmId};

use crate::log::Longest;

/// Holds the 256 MiB that the loops write, and the program.
const MEMORY: Mib = Mib(448);

/// The guest's phases that a run is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// What exits and tracked writes cost the guest; two CPUs.
    Guest,
    /// What EL2 does for the host around them. One CPU, because where instructions are counted every
    /// CPU's count for all.
    El2,
}

/// Measures all rows of the bench guest.
pub fn measure(report: &mut Report) -> Result<()> {
    eprintln!("bench: exits and tracked writes");
    run("guest", |script| guest_rows(script, report))?;
    report.derive_loops()
}

/// Measures the rows of what EL2 does around the bench guest.
pub fn measure_el2(report: &mut Report, longest: &mut Longest) -> Result<()> {
    eprintln!("bench: harvests, splits, first touch");
    run("guest-el2", |script| el2_rows(script, report, longest))
}

fn run(name: &str, body: impl FnOnce(&mut Script) -> Result<()>) -> Result<()> {
    let clocks = Clocks::usual()
        .with_boot(60)
        .with_silence(60)
        .with_total(300);
    let mut script = Script::new("bench", name, clocks)?;
    let result = body(&mut script);
    script.conclude(result)
}

fn guest_rows(script: &mut Script, report: &mut Report) -> Result<()> {
    let bundle = guests::pack([guests::bench(2, MEMORY)?])?;
    let target = script.start_tidemark("virt-icount", &bundle, "leaves=blocks")?;
    let host = drive(target, Part::Guest, |_, _, name, value| match name {
        "touch_256m" => Ok(()),
        _ => report.add(name, value),
    })?;
    host.finish();
    target.still_on()
}

fn el2_rows(script: &mut Script, report: &mut Report, longest: &mut Longest) -> Result<()> {
    let bundle = guests::pack([guests::bench(1, MEMORY)?])?;
    let target = script.start_tidemark("virt-smp1-icount", &bundle, "leaves=blocks")?;
    let mut harvests = Vec::new();
    let mut host = drive(target, Part::El2, |host, vm, name, value| {
        match name {
            "touch_256m" => {
                report.add(name, value)?;
                first_touch(host, value, report)?;
            }
            "loop_64m_dbm" | "loop_64m_wp" => harvests.push(harvest(host, vm)?),
            "loop_64m_blocks" => splits(host, vm, report)?,
            "longest_exit" => {
                report.add(name, value)?;
                longest.exit(value);
            }
            _ => {}
        }
        Ok(())
    })?;
    // Either engine may be asked for, so the dearer one counts.
    let dearer = |of: fn(&Harvested) -> f64| harvests.iter().map(of).fold(0.0, f64::max);
    report.add("harvest_clean", dearer(|harvest| harvest.clean))?;
    report.add("harvest_dirty", dearer(|harvest| harvest.dirty))?;
    longest.machine("the bench guest", &host.costs()?)?;
    host.finish();
    target.still_on()
}

/// Goes through the guest's phases as `part` wants them; `row` gets what it measures.
fn drive(
    target: &mut Target,
    part: Part,
    mut row: impl FnMut(&mut Host, VmId, &str, f64) -> Result<()>,
) -> Result<Host> {
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("bench")?;
    host.attach(vm)?;
    loop {
        let line = host
            .expect(vm, "\n")
            .context("the bench guest stopped talking")?;
        match Line::parse(&line).map_err(|error| anyhow::anyhow!("{error}"))? {
            Line::Row(measured) => {
                row(&mut host, vm, measured.name, measured.value as f64)
                    .with_context(|| format!("row {}", measured.name))?;
            }
            Line::Phase("blocks" | "longest") if part == Part::Guest => {
                host.client().type_input(vm, b"s")?;
            }
            Line::Phase(phase) => {
                prepare(&mut host, vm, phase).with_context(|| format!("phase {phase}"))?;
                host.client().type_input(vm, b"g")?;
            }
            Line::Over => return Ok(host),
            Line::Fail(what) | Line::Error(what) => bail!("the bench guest says: {what}"),
            _ => {}
        }
    }
}

/// Sets the log as `phase` is to find it: every page clean and tracked by itself, so that
/// each store of the loop is the first to its page. In phase `blocks` every block is.
///
/// The finest granularity is asked for on purpose. With blocks, one fault would pass for
/// five hundred and twelve.
fn prepare(host: &mut Host, vm: VmId, phase: &str) -> Result<()> {
    let (engine, granularity) = match phase {
        "tracked_off" => return Ok(()),
        "dbm" => (EngineChoice::Dbm, Granularity::Page),
        "wp" | "longest" => (EngineChoice::WriteProtect, Granularity::Page),
        "blocks" => (EngineChoice::Dbm, Granularity::Adaptive),
        other => bail!("the guest asks for a phase `{other}` that nobody knows"),
    };
    host.dirty_stop(vm)?;
    host.dirty_start(vm, engine, granularity)?;
    let harvest = host.take(vm)?;
    host.commit(vm, &harvest)
}

/// What a harvest costs for a page.
struct Harvested {
    clean: f64,
    dirty: f64,
}

/// Harvests what a tracked loop left, and once more with nothing dirty.
fn harvest(host: &mut Host, vm: VmId) -> Result<Harvested> {
    let pages = host.info(vm)?.mappings.pages_4k as f64;
    ensure!(pages > 65_536.0, "only {pages} pages are mapped as pages");
    let (loaded, dirty) = cost_of_take(host, vm)?;
    let (idle, few) = cost_of_take(host, vm)?;
    ensure!(
        dirty >= 16_384.0 && few < 64.0,
        "{dirty} pages were dirty after the loop and {few} then; it writes 16384"
    );
    let clean = idle / pages;
    Ok(Harvested {
        clean,
        dirty: (loaded - clean * (pages - dirty)) / dirty,
    })
}

/// Takes an epoch and commits it; returns its instructions and its pages.
fn cost_of_take(host: &mut Host, vm: VmId) -> Result<(f64, f64)> {
    let before = host.costs()?;
    let harvest = host.take(vm)?;
    let after = host.costs()?;
    host.commit(vm, &harvest)?;
    Ok((
        after.since(&before, Task::LogTake)?,
        harvest.pages.len() as f64,
    ))
}

/// A harvest that finds blocks dirty and splits them. All of it is counted as theirs.
fn splits(host: &mut Host, vm: VmId, report: &mut Report) -> Result<()> {
    let before = host.dirty_status(vm)?.splits;
    let (cost, pages) = cost_of_take(host, vm)?;
    let blocks = (host.dirty_status(vm)?.splits - before) as f64;
    ensure!(
        blocks >= 32.0 && pages >= blocks * 512.0,
        "{blocks} blocks were split and {pages} pages reported; the loop writes 32 blocks"
    );
    report.add("split_2m", cost / blocks)
}

/// The guest's memory is cleared and mapped before it starts; so a first touch is that, and the
/// guest's own loop.
fn first_touch(host: &mut Host, touch: f64, report: &mut Report) -> Result<()> {
    let costs = host.costs()?;
    let (clear, map) = (costs.of(Task::Clear)?, costs.of(Task::Map)?);
    let pages = (MEMORY.bytes() >> 12) as f64;
    let ahead = (clear.ticks + map.ticks) as f64 / pages;
    report.add("first_touch", ahead + touch / 65_536.0)
}
