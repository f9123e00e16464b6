//! The rows that the bench guest counts itself, with the host setting the dirty log as
//! each phase wants it.

use anyhow::{Context, Result, bail};
use tidemark_guests::report::Line;
use tidemark_tests::clocks::Clocks;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::rows::Report;
use tidemark_tests::script::Script;
use tidemark_wire::message::{EngineChoice, Granularity, VmId};

/// Holds the 64 MiB that the tracked loops write, and the program.
const MEMORY: Mib = Mib(192);

/// Measures all rows of the bench guest.
pub fn measure(report: &mut Report) -> Result<()> {
    eprintln!("bench: exits and tracked writes");
    let clocks = Clocks::usual()
        .with_boot(60)
        .with_silence(60)
        .with_total(300);
    let mut script = Script::new("bench", "guest", clocks)?;
    let result = drive(&mut script, report);
    script.conclude(result)?;
    report.derive_loops()
}

fn drive(script: &mut Script, report: &mut Report) -> Result<()> {
    let bundle = guests::pack([guests::bench(MEMORY)?])?;
    let target = script.start_tidemark("virt-icount", &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("bench")?;
    host.attach(vm)?;
    loop {
        let line = host
            .expect(vm, "\n")
            .context("the bench guest stopped talking")?;
        match Line::parse(&line).map_err(|error| anyhow::anyhow!("{error}"))? {
            Line::Row(row) => report.add(row.name, row.value as f64)?,
            Line::Phase(phase) => {
                prepare(&mut host, vm, phase).with_context(|| format!("phase {phase}"))?;
                host.client().type_input(vm, b"g")?;
            }
            Line::Over => break,
            Line::Fail(what) | Line::Error(what) => bail!("the bench guest says: {what}"),
            _ => {}
        }
    }
    host.finish();
    target.still_on()
}

/// Sets the log as `phase` is to find it: every page clean and tracked by itself, so that
/// each store of the loop is the first to its page.
///
/// The finest granularity is asked for on purpose. With blocks, one fault would pass for
/// five hundred and twelve.
fn prepare(host: &mut Host, vm: VmId, phase: &str) -> Result<()> {
    let engine = match phase {
        "tracked_off" => return Ok(()),
        "dbm" => EngineChoice::Dbm,
        "wp" => EngineChoice::WriteProtect,
        other => bail!("the guest asks for a phase `{other}` that nobody knows"),
    };
    host.dirty_stop(vm)?;
    host.dirty_start(vm, engine, Granularity::Page)?;
    let harvest = host.take(vm)?;
    host.commit(vm, &harvest)
}
