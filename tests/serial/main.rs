//! Tests that switch a machine on and talk to it over its serial line.
//!
//! One machine a test. A failed test leaves `target/tests/NAME/` behind: the transcript
//! with times, QEMU's command line, the seed, the reason, and where every CPU was.
//!
//! ```text
//! cargo test -p tidemark-tests --test serial -- [FILTER] [--list]
//! cargo test -p tidemark-tests --test serial -- --port PORT [FILTER]
//! cargo test -p tidemark-tests --test serial -- --board-bundle FILE
//! ```
//!
//! With `--port` (or `TIDEMARK_PORT`) no QEMU is started: the tests that make sense on a
//! machine that runs already are run against that one, one after the other. It must have
//! been started with the bundle that `--board-bundle` writes.

mod bad_input;
mod baseline;
mod boot;
mod case;
mod clocks;
mod copy;
mod firmware;
mod handover;
mod hostile;
mod kernels;
mod linux;
mod monitor;
mod oracle;
mod quota;
mod raw;
mod refused;
mod reserved;
mod seeds;
mod sessions;
mod slots;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use libtest_mimic::{Arguments, Failed, Trial};
use tidectl::link::Port;
use tidemark_tests::filter::{self, Exact};
use tidemark_tests::guests::{self, Mib};

use crate::case::{Case, Place};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("serial: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is asked for beside what every test runner takes.
#[derive(Default)]
struct Options {
    port: Option<Port>,
    board_bundle: Option<String>,
    rest: Vec<String>,
}

impl Options {
    fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut options = Self::default();
        let mut port = std::env::var("TIDEMARK_PORT")
            .ok()
            .filter(|port| !port.is_empty());
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{argument} needs a value"))
            };
            match argument.as_str() {
                "--port" => port = Some(value()?),
                "--board-bundle" => options.board_bundle = Some(value()?),
                _ => options.rest.push(argument),
            }
        }
        options.port = port
            .map(|port| port.parse().map_err(anyhow::Error::msg))
            .transpose()?;
        Ok(options)
    }
}

fn run() -> Result<ExitCode> {
    let options = Options::parse(std::env::args())?;
    if let Some(path) = &options.board_bundle {
        let bundle = guests::pack([guests::oracle(4, Mib(64))?])?;
        std::fs::write(path, bundle).with_context(|| format!("cannot write {path}"))?;
        println!("{path}: boot the machine with it, then run this with --port");
        return Ok(ExitCode::SUCCESS);
    }
    let mut arguments = Arguments::from_iter(&options.rest);
    let cases = [
        boot::cases(),
        handover::cases(),
        reserved::cases(),
        linux::cases(),
        kernels::cases(),
        firmware::cases(),
        seeds::cases(),
        oracle::cases(),
        slots::cases(),
        copy::cases(),
        sessions::cases(),
        monitor::cases(),
        quota::cases(),
        bad_input::cases(),
        refused::cases(),
        clocks::cases(),
        baseline::cases(),
        hostile::cases(),
    ]
    .concat();
    let trials = match &options.port {
        // One for each CPU: a machine has more CPU threads than one, but waits for its line, for its timers or for
        // the script most of the time.
        None => {
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            arguments.test_threads.get_or_insert(cpus);
            let cases = cases.into_iter().filter(|case| case.place != Place::Board);
            cases.map(|case| trial(case, None)).collect()
        }
        // One machine, one line.
        Some(port) => {
            if arguments.test_threads.is_some_and(|threads| threads > 1) {
                bail!("a machine has one line: --test-threads cannot be more than 1 with --port");
            }
            arguments.test_threads = Some(1);
            let cases = cases.into_iter().filter(|case| case.place != Place::Qemu);
            cases.map(|case| trial(case, Some(port.clone()))).collect()
        }
    };
    let trials: Vec<Trial> = trials;
    let exact = match arguments.exact {
        true => Exact::Whole,
        false => Exact::Part,
    };
    let names = trials.iter().map(Trial::name);
    filter::check(arguments.filter.as_deref(), exact, names).map_err(anyhow::Error::msg)?;
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}

/// One case as the test runner wants it.
fn trial(case: Case, port: Option<Port>) -> Trial {
    Trial::test(case.name.clone(), move || {
        case.run(port)
            .map_err(|error| Failed::from(format!("{error:#}")))
    })
}
