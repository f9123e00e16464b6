//! A log that is over leaves no trace: the guest's memory is in the same blocks as before, and what a guest does
//! takes it as long. Counted in instructions, so that the load of the machine does not count.

use anyhow::{Context, Result, ensure};
use tidemark_guests::report::Line;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::script::Script;
use tidemark_wire::message::{EngineChoice, Granularity, Mappings, VmId};

use crate::case::Case;

/// The phase in which the guest stores to each page of 64 MiB, as often as it is asked to.
const PHASE: &str = "tracked_off";
const ROW: &str = "loop_64m_untracked";

pub fn cases() -> Vec<Case> {
    let case = Case::new("a_log_leaves_no_trace", 120, leaves_no_trace);
    vec![case.needs_newer_qemu("on an older one its two counts differ")]
}

fn leaves_no_trace(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::bench(1, Mib(448))?])?;
    let target = script.start_tidemark("virt-smp1-icount", &bundle, "leaves=blocks")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("bench")?;
    host.attach(vm)?;
    while next(&mut host, vm)? != Said::Ready {}
    let before = mappings(&mut host, vm)?;
    ensure!(
        before.blocks_2m + before.blocks_1g > 0,
        "no blocks to begin with: {before:?}"
    );
    let baseline = stores(&mut host, vm)?;
    for engine in [EngineChoice::WriteProtect, EngineChoice::Dbm] {
        host.dirty_start(vm, engine, Granularity::Page)?;
        let logged = mappings(&mut host, vm)?;
        ensure!(
            logged.pages_4k >= 16_384,
            "under a log of pages the memory is in {logged:?}"
        );
        let tracked = stores_once(&mut host, vm)?;
        let harvest = host.take(vm)?;
        ensure!(
            harvest.pages.len() >= 16_384,
            "{} of the pages that the guest wrote are dirty",
            harvest.pages.len()
        );
        host.commit(vm, &harvest)?;
        host.dirty_stop(vm)?;
        let after = mappings(&mut host, vm)?;
        ensure!(after == before, "{before:?} became {after:?}");
        let faults_before = faults(&mut host, vm)?;
        let again = stores(&mut host, vm)?;
        let faults_after = faults(&mut host, vm)?;
        ensure!(
            faults_after == faults_before,
            "stores after the log faulted: {faults_before:?} became {faults_after:?}"
        );
        eprintln!("{engine:?}: {baseline} before, {tracked} logged, {again} after");
        ensure!(
            again.abs_diff(baseline) <= baseline / 100,
            "{baseline} instructions before the log, {again} after"
        );
        if engine == EngineChoice::WriteProtect {
            ensure!(tracked > 10 * baseline, "nothing was tracked: {tracked}");
        }
    }
    host.finish();
    target.still_on()
}

#[derive(PartialEq, Eq)]
enum Said {
    /// It waits to be told to go on.
    Ready,
    /// The loop took so many instructions.
    Took(u64),
    Other,
}

fn next(host: &mut Host, vm: VmId) -> Result<Said> {
    let line = host
        .expect(vm, "\n")
        .context("the bench guest stopped talking")?;
    let line = Line::parse(&line).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(match line {
        Line::Phase(PHASE) => Said::Ready,
        Line::Row(row) if row.name == ROW => Said::Took(row.value),
        _ => Said::Other,
    })
}

/// How many instructions the guest's stores take, at the least of a few times: what the host says to EL2 meanwhile, as
/// that it is still there, interrupts some of them. What stays behind for good is in all of them; what the first heals is a fault.
fn stores(host: &mut Host, vm: VmId) -> Result<u64> {
    const TIMES: usize = 3;
    let mut least = u64::MAX;
    for _ in 0..TIMES {
        least = least.min(stores_once(host, vm)?);
    }
    Ok(least)
}

/// Has the guest do its stores once, and returns how many instructions they took. It waits before and after.
fn stores_once(host: &mut Host, vm: VmId) -> Result<u64> {
    // `a`: and ask again.
    host.client().type_input(vm, b"a")?;
    let mut took = None;
    loop {
        match next(host, vm)? {
            Said::Took(instructions) => took = Some(instructions),
            Said::Ready => return took.context("the guest did not say how long it took"),
            Said::Other => {}
        }
    }
}

/// Translation faults and write faults so far.
fn faults(host: &mut Host, vm: VmId) -> Result<(u64, u64)> {
    let counters = host.info(vm)?.counters;
    Ok((counters.translation_faults, counters.write_faults))
}

/// How the guest's memory is mapped.
fn mappings(host: &mut Host, vm: VmId) -> Result<Mappings> {
    Ok(host.info(vm)?.mappings)
}
