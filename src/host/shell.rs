//! EL2's own shell, for a person on a plain terminal.

use super::{attach_terminal, attach_terminal_to_all, commands};
use crate::arch::cpu;
use crate::arch::lock::{Mutex, rank};
use crate::control::lifecycle;
use crate::control::work;
use crate::mm::{frames, heap};
use crate::platform::console::print;
use crate::sched;
use crate::task::job::Step;
use crate::vm::{self, Vm};
use alloc::boxed::Box;
use alloc::string::String;
use tidemark_ownership::{Census, Kind};
use tidemark_sched::{Hold, State, Transition};

const LONGEST: usize = 128;
/// Frames counted in one step.
const CENSUS_STEP: usize = 1024;
const PROMPT: &str = "tidemark> ";

static LINE: Mutex<String, { rank::SHELL }> = Mutex::new(String::new());

const HELP: &str = "\
list                  the guests and how they are
info VM               all about one: memory, mappings, what it has cost
dirty status VM       its dirty log
console VM            go to its console; Ctrl-] comes back
console all           show every guest's lines behind its name
start VM, stop VM     start one that does not run; end one
pause VM, resume VM   hold one; let it go on
reset VM              restart one
machine               CPUs and memory
log LEVEL             error, warn, info, debug or trace
poweroff              end the machine
help                  this list
VM is a name or a number. Programs speak frames instead: tidectl.
";

const LEVELS: &str = "log: error, warn, info, debug or trace\n";

/// Asks for a command.
pub fn prompt() {
    print(format_args!("{PROMPT}"));
}

/// A byte was typed.
pub fn typed(byte: u8) {
    let mut line = LINE.lock();
    match byte {
        b'\r' | b'\n' => {
            print(format_args!("\n"));
            let command = core::mem::take(&mut *line);
            drop(line);
            run(command.trim());
        }
        0x08 | 0x7f if line.pop().is_some() => print(format_args!("\u{8} \u{8}")),
        // Ctrl-C and Ctrl-U forget the line.
        0x03 | 0x15 => {
            line.clear();
            print(format_args!("\n{PROMPT}"));
        }
        0x20..0x7f if line.len() < LONGEST => {
            line.push(char::from(byte));
            print(format_args!("{}", char::from(byte)));
        }
        _ => {}
    }
}

fn run(command: &str) {
    let mut words = command.split_ascii_whitespace();
    let (verb, rest): (_, [Option<&str>; 2]) = (words.next(), [words.next(), words.next()]);
    match (verb, rest) {
        (None, _) => {}
        (Some("help" | "?"), _) => print(format_args!("{HELP}")),
        (Some("list"), _) => list(),
        (Some("machine"), _) => return machine(),
        (Some("poweroff"), _) => {
            super::tell();
            lifecycle::power_off()
        }
        (Some("log"), [Some(level), _]) => match level.parse() {
            Ok(level) => log::set_max_level(level),
            Err(_) => print(format_args!("{LEVELS}")),
        },
        (Some("console"), [Some("all"), _]) => attach_terminal_to_all(),
        (Some("console"), [Some(name), _]) => {
            if let Some(vm) = find(name) {
                print(format_args!("{}: Ctrl-] comes back\n", vm.name()));
                attach_terminal(vm);
                return;
            }
        }
        (Some("dirty"), [Some("status"), Some(name)]) => {
            if let Some(vm) = find(name) {
                dirty(vm);
            }
        }
        (
            Some(verb @ ("info" | "start" | "stop" | "pause" | "resume" | "reset")),
            [Some(name), _],
        ) => {
            if let Some(vm) = find(name) {
                change(verb, vm);
            }
        }
        (
            Some(verb @ ("info" | "start" | "stop" | "pause" | "resume" | "reset" | "console")),
            _,
        ) => {
            print(format_args!("{verb}: of which VM? `list` names them\n"));
        }
        (Some("dirty"), _) => print(format_args!("it is `dirty status VM`\n")),
        (Some("log"), _) => print(format_args!("{LEVELS}")),
        (Some(verb), _) => print(format_args!("{verb}: no such command; `help` lists them\n")),
    }
    prompt();
}

fn find(name: &str) -> Option<&'static Vm> {
    let vm = vm::by_name(name);
    if vm.is_none() {
        print(format_args!("{name}: no such guest; `list` names them\n"));
    }
    vm
}

fn list() {
    if vm::all().is_empty() {
        print(format_args!("no guests\n"));
    }
    for vm in vm::all() {
        let status = vm.status().clone();
        print(format_args!(
            "{:3} {:16} {:9} {:2} vCPUs {:6} MiB  {}\n",
            vm.id,
            vm.name(),
            status.state,
            vm.spec.vcpus,
            vm.spec.memory_bytes >> 20,
            status.reason
        ));
    }
}

fn machine() {
    let (used, total) = heap::usage();
    print(format_args!(
        "{} CPUs, {} MiB of memory free, heap {} of {} KiB in use\n",
        cpu::count(),
        frames::free_pages() >> 8,
        used >> 10,
        total >> 10
    ));
    // A machine has millions of frames.
    let mut census = Census::default();
    let mut next = 0;
    sched::submit(Box::new(move || {
        if let Some(on) = frames::count(next, CENSUS_STEP, &mut census) {
            next = on;
            return Step::Again;
        }
        print(format_args!("frames:"));
        for kind in Kind::ALL {
            if census.of(kind) != 0 {
                print(format_args!(" {} {kind:?}", census.of(kind)));
            }
        }
        print(format_args!("\n"));
        prompt();
        Step::Done
    }));
}

fn dirty(vm: &'static Vm) {
    let status = work::status(vm);
    match status.logging {
        None => print(format_args!("{}: no dirty log\n", vm.name())),
        Some(logging) => print(format_args!(
            "{}: dirty log by {}, granularity {}; {} write faults, {} splits, {} harvests, {} entries read; committed epoch {}\n",
            vm.name(),
            logging.engine,
            logging.granularity,
            status.write_faults,
            status.splits,
            status.harvests,
            status.entries_read,
            status.last_committed
        )),
    }
    if let Some(quota) = status.quota {
        print(format_args!(
            "{}: a vCPU may dirty {} pages in {} ms; {} stalls, {} ms in all, {} % of the time now\n",
            vm.name(),
            quota.pages,
            quota.interval_ms,
            status.stalls.count,
            status.stalls.time_us / 1000,
            status.stalls.percent
        ));
    }
}

fn resume(vm: &'static Vm) -> Result<(), State> {
    lifecycle::resume(vm, Hold::Lasting)?;
    if vm.status().holds.has(Hold::Session) {
        print(format_args!(
            "{}: the host's session still holds it\n",
            vm.name()
        ));
    }
    Ok(())
}

fn change(verb: &str, vm: &'static Vm) {
    let result = match verb {
        "info" => {
            commands::describe(vm);
            Ok(())
        }
        "start" => {
            lifecycle::start(vm);
            if !vm.memory.is_there() {
                print(format_args!("{}: {}\n", vm.name(), vm.status().reason));
            }
            Ok(())
        }
        "stop" => lifecycle::request(vm, Transition::Stop, "stopped from the shell"),
        "pause" => lifecycle::pause(vm, Hold::Lasting),
        "resume" => resume(vm),
        _ => {
            if vm.status().state == State::Starting {
                print(format_args!("{}: it is starting already\n", vm.name()));
            }
            lifecycle::restart(vm, "the host restarted it")
        }
    };
    if let Err(state) = result {
        print(format_args!(
            "{}: it is {state}; that does not go with {verb}\n",
            vm.name()
        ));
    }
}
