//! `make bench`: what the hypervisor costs, counted inside the guests, and by EL2 for what it does itself.
//!
//! Under `-icount shift=0,sleep=off` an emulated instruction is a nanosecond of guest
//! time, so the load of the machine does not count. The loops repeat closely; Linux boots
//! vary by about one in a hundred (`linux`). What people feel is measured too, as a ratio
//! of two wall times within one run.
//!
//! Writes `target/bench/el2.json` and prints the table. A row that is missing is a
//! failure; a row over its limit is shown as such, and fails only with `--gate`.

mod guest;
mod linux;
mod log;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tidemark_tests::artifacts::target_dir;
use tidemark_tests::rows::Report;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What an exceeded limit leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Limits {
    Shown,
    Gate,
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let mut limits = Limits::Shown;
    for argument in arguments {
        match argument.as_str() {
            "--gate" => limits = Limits::Gate,
            "--help" | "-h" => {
                println!("usage: bench [--gate]\n  --gate  exit 1 when a row is over its limit");
                return Ok(ExitCode::SUCCESS);
            }
            other => bail!("`{other}` is not an option; --gate is the only one"),
        }
    }
    let mut report = Report::default();
    let mut longest = log::Longest::default();
    // One part failing must not hide the other's figures.
    let parts = [
        guest::measure(&mut report).context("exits and tracked writes"),
        guest::measure_el2(&mut report, &mut longest).context("harvests, splits, first touch"),
        log::measure(&mut report, &mut longest).context("the dirty log"),
        longest.report(&mut report),
        linux::measure(&mut report).context("Linux boots"),
    ];
    let path = target_dir().join("bench").join("el2.json");
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    report.write(&path)?;
    print!("{}", report.table());
    println!("written to {}", path.display());

    let mut failed = false;
    for error in parts.into_iter().filter_map(Result::err) {
        eprintln!("bench: {error:#}");
        failed = true;
    }
    let missing = report.missing();
    if !missing.is_empty() {
        eprintln!("bench: rows missing: {}", missing.join(", "));
        failed = true;
    }
    let exceeded: Vec<&str> = report.exceeded().iter().map(|row| row.name).collect();
    if !exceeded.is_empty() {
        eprintln!("bench: rows over their limits: {}", exceeded.join(", "));
        failed |= limits == Limits::Gate;
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
