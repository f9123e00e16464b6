//! tidectl: see the library for what it does.
#![forbid(unsafe_code)]

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tidectl::commands::{self, Cli};
use tidectl::output::report;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let interrupt = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
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
