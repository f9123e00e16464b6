//! Tests that switch a machine on and talk to it over its serial line.
//!
//! One machine a test. A failed test leaves `target/tests/NAME/` behind: the transcript
//! with times, QEMU's command line, the seed, the reason, and where every CPU was.
//!
//! `cargo test -p tidemark-tests --test serial -- [FILTER] [--list] [--port PORT]`.
//! With `--port` (or `TIDEMARK_PORT`) no QEMU is started: the tests that make sense
//! on a machine that already runs are run against that one.

mod bad_input;
mod boot;
mod case;
mod linux;
mod raw;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::case::Case;

fn main() {
    let mut arguments = Arguments::from_args();
    // Each machine has two CPU threads of its own, so more tests at once than half the
    // CPUs here only make the clocks run out.
    if arguments.test_threads.is_none() {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        arguments.test_threads = Some((cpus / 2).max(1));
    }
    let cases = [boot::cases(), linux::cases(), bad_input::cases()].concat();
    let trials = cases.into_iter().map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

/// One case as the test runner wants it.
fn trial(case: Case) -> Trial {
    Trial::test(case.name.clone(), move || {
        case.run()
            .map_err(|error| Failed::from(format!("{error:#}")))
    })
}
