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

const USAGE: &str = "\
usage: bench [--gate] [PART]...
  --gate  exit 1 when a row is over its limit
parts, of which all are measured if none is named:
  exits   what exits and tracked writes cost a guest
  work    what harvests, splits and a first touch cost EL2
  log     what a host's requests cost EL2
  linux   booting Linux
example: make bench ARGS='--gate work log'
";

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Exits,
    Work,
    Log,
    Linux,
}

impl Part {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Exits, "exits"),
        (Self::Work, "work"),
        (Self::Log, "log"),
        (Self::Linux, "linux"),
    ];

    fn named(name: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|(_, other)| *other == name).map(|(part, _)| part)
    }

    fn measure(self, report: &mut Report, longest: &mut log::Longest) -> Result<()> {
        match self {
            Self::Exits => guest::measure(report).context("exits and tracked writes"),
            Self::Work => {
                guest::measure_el2(report, longest).context("harvests, splits, first touch")
            }
            Self::Log => log::measure(report, longest).context("the dirty log"),
            Self::Linux => linux::measure(report).context("Linux boots"),
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let mut limits = Limits::Shown;
    let mut asked = Vec::new();
    for argument in arguments {
        match argument.as_str() {
            "--gate" => limits = Limits::Gate,
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            name => match Part::named(name) {
                Some(part) => asked.push(part),
                None => bail!("`{name}` is neither an option nor a part\n{USAGE}"),
            },
        }
    }
    let parts = Part::ALL.map(|(part, _)| part);
    let chosen = |part: &Part| asked.is_empty() || asked.contains(part);
    let mut report = Report::default();
    let mut longest = log::Longest::default();
    let mut failures = Vec::new();
    // One part failing must not hide the other's figures.
    for part in parts.into_iter().filter(chosen) {
        failures.extend(part.measure(&mut report, &mut longest).err());
    }
    failures.extend(longest.report(&mut report).err());
    let path = target_dir().join("bench").join("el2.json");
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    report.write(&path)?;
    print!("{}", report.table());
    println!("written to {}", path.display());

    let mut failed = false;
    for error in failures {
        eprintln!("bench: {error:#}");
        failed = true;
    }
    let missing = report.missing();
    if asked.is_empty() && !missing.is_empty() {
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
