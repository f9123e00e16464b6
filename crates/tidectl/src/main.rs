//! tidectl: see the library for what it does.
#![forbid(unsafe_code)]

use clap::Parser;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tidectl::Error;
use tidectl::commands::{self, Cli};
use tidectl::output::{Format, report};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let interrupt = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if is_ignored(signal) {
            continue;
        }
        // The second one ends the process at once, the first lets it put things back. Without
        // handlers (which should not happen) the first one ends it, which is safe as well.
        let _ = flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupt));
        let _ = flag::register(signal, Arc::clone(&interrupt));
    }
    match commands::run(&cli, interrupt) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error, commands::format(&cli));
            ExitCode::from(error.exit_code())
        }
    }
}

/// The command line makes no sense, or asks for help: says so as everything else is said.
fn refuse(error: &clap::Error) -> ExitCode {
    let arguments = std::env::args_os().skip(1).take_while(|word| word != "--");
    let asked_for_json = arguments.into_iter().any(|word| word == "--json");
    // Help and the version are no failures, and are text.
    if !error.use_stderr() || !asked_for_json {
        // Nobody is left to tell when this fails.
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    }
    let words = error.render().to_string();
    // What is wrong; how it should be is a page that `help` shows.
    let problem = words.split("\n\n").next().unwrap_or_default();
    let problem = problem.trim_start_matches("error: ").trim_end();
    let error = Error::Usage(problem.into());
    report(&error, Format::Json);
    ExitCode::from(error.exit_code())
}

/// Whether whoever started this wants the signal to do nothing, as `nohup` does: a handler would undo that.
///
/// SIGPIPE needs none: the standard library ignores it, and writing to what nobody reads is an error like any other.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
