//! The command line: what can be said, and who does it.

mod bundle;
mod copy;
mod costs;
mod dirty;
mod get;
mod hash;
mod inspect;
mod monitor;
mod rate;
mod shell;
mod slot;

use crate::client::{Client, Options, Sink};
use crate::link::{Link, Port};
use crate::output::{Chatter, Format, Ui};
use crate::units::parse_duration;
use crate::{Error, Result};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tidemark_wire::message::{EngineChoice, Granularity};

/// The host's hand on Tidemark: VMs, consoles, dirty bitmaps.
///
/// Data goes to standard output, words to standard error. Exit codes: 0 done, 1 something on
/// this machine, 2 usage, 3 link, 4 protocol, 5 refused or no such VM, 6 not done in time,
/// 7 verification mismatch, 8 cancelled, 130 Ctrl-C.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  export TIDECTL_PORT=unix:PATH     # `make shell` prints its own; on a board it is /dev/ttyUSB0
  tidectl list
  tidectl monitor debian
  tidectl dirty start debian && tidectl dirty get debian -o round1.bin"
)]
pub struct Cli {
    /// What all commands know.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What all commands know.
#[derive(Debug, Args)]
pub struct Global {
    /// Where the target is: unix:PATH, tcp:HOST:PORT or a serial device (/dev/ttyUSB0@115200).
    #[arg(long, global = true, env = "TIDECTL_PORT", value_name = "PORT")]
    pub port: Option<Port>,
    /// Print data, and failures, as JSON ("schema": 1); not in `monitor` and `shell`.
    #[arg(long, global = true)]
    pub json: bool,
    /// Print nothing but errors, and data that was asked for.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Silence after which the target counts as gone, and this tool for the target: what it
    /// paused for its own work then runs on.
    #[arg(long, global = true, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the VMs.
    #[command(after_help = "Example:\n  tidectl list --json | jq '.vms[].name'")]
    List,
    /// Show all about a VM: memory map, mappings, features, counters.
    #[command(after_help = "Example:\n  tidectl info debian")]
    Info(VmArg),
    /// Open a VM's console. Ctrl-] leaves.
    Monitor(monitor::MonitorArgs),
    /// Pause a VM and wait until it is. It stays so until it is resumed.
    #[command(
        after_help = "Example:\n  tidectl pause debian && tidectl hash debian && tidectl resume debian"
    )]
    Pause(VmArg),
    /// Let a paused VM run.
    #[command(after_help = "Example:\n  tidectl resume debian")]
    Resume(VmArg),
    /// Restart a VM from its bundle.
    #[command(after_help = "Example:\n  tidectl reset debian")]
    Reset(VmArg),
    /// Stop a VM; `reset` starts it again.
    #[command(after_help = "Example:\n  tidectl stop debian")]
    Stop(VmArg),
    /// Power the machine off.
    #[command(after_help = "Example:\n  tidectl power-off")]
    PowerOff,
    /// Hash a paused VM's memory at EL2: SHA-256 of each slot.
    Hash(hash::HashArgs),
    /// Track which pages a VM writes.
    #[command(subcommand)]
    Dirty(DirtyCommand),
    /// Add memory to a VM, or take it away, while it runs.
    #[command(subcommand)]
    Slot(SlotCommand),
    /// Show what EL2's own work has cost, and how long it went without looking for an interrupt.
    #[command(after_help = "Example:\n  tidectl costs --json | jq '.costs[] | {task, longest_us}'")]
    Costs,
    /// Talk to the hypervisor's own text shell, as a plain terminal would. Ctrl-] leaves.
    #[command(after_help = "Examples:\n  tidectl shell\n  echo help | tidectl shell")]
    Shell(shell::ShellArgs),
    /// Pack guests into the bundle that the boot loader hands over.
    Bundle(bundle::BundleArgs),
    /// Print completions for a shell.
    #[command(
        after_help = "Example:\n  tidectl completions bash > ~/.local/share/bash-completion/completions/tidectl"
    )]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// What can be done about dirty pages.
#[derive(Debug, Subcommand)]
pub enum DirtyCommand {
    /// Start the log.
    Start(dirty::StartArgs),
    /// Stop the log and put blocks back.
    #[command(after_help = "Example:\n  tidectl dirty stop debian")]
    Stop(VmArg),
    /// Show the log's state.
    #[command(after_help = "Example:\n  tidectl dirty status debian --json")]
    Status(VmArg),
    /// Change how writes are noticed while the log runs; nothing is lost by it.
    Engine(dirty::EngineArgs),
    /// Limit how many pages each vCPU may dirty while the log is on.
    Quota(dirty::QuotaArgs),
    /// Fetch the bitmap of what was written since the last one.
    Get(get::GetArgs),
    /// Measure how fast a VM dirties pages.
    Rate(rate::RateArgs),
    /// Copy a VM's memory while it runs, and prove the copy exact.
    Copy(copy::CopyArgs),
}

/// What can be done about memory slots.
#[derive(Debug, Subcommand)]
pub enum SlotCommand {
    /// Give a VM more memory.
    Add(slot::AddArgs),
    /// Take away memory that was added.
    Delete(slot::DeleteArgs),
}

/// A VM.
#[derive(Debug, Args)]
pub struct VmArg {
    /// Name or id, as `tidectl list` shows them.
    pub vm: String,
}

/// How writes are noticed, on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum EngineArg {
    /// What the image finds best, after each harvest anew.
    Auto,
    /// Write protection.
    Wp,
    /// The hardware's dirty bit.
    Dbm,
}

impl From<EngineArg> for EngineChoice {
    fn from(engine: EngineArg) -> Self {
        match engine {
            EngineArg::Auto => Self::Auto,
            EngineArg::Wp => Self::WriteProtect,
            EngineArg::Dbm => Self::Dbm,
        }
    }
}

/// How finely writes are noticed, on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum GranularityArg {
    /// 4 KiB from the first round.
    Page,
    /// Blocks as they stand; those found dirty are split for the next round.
    Adaptive,
    /// Blocks as they stand.
    Block,
}

impl From<GranularityArg> for Granularity {
    fn from(granularity: GranularityArg) -> Self {
        match granularity {
            GranularityArg::Page => Self::Page,
            GranularityArg::Adaptive => Self::Adaptive,
            GranularityArg::Block => Self::Block,
        }
    }
}

/// How a log is started.
#[derive(Clone, Copy, Debug, Args)]
pub struct LogArgs {
    /// How writes are noticed.
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineArg,
    /// How finely.
    #[arg(long, value_enum, default_value = "page")]
    pub granularity: GranularityArg,
}

/// What a command works with.
pub struct Context {
    port: Option<Port>,
    timeout: Duration,
    interrupt: Arc<AtomicBool>,
    /// Where data and words go.
    pub ui: Ui,
}

impl Context {
    /// Reads it off the command line; `interrupt` is set by Ctrl-C.
    #[must_use]
    pub fn new(cli: &Cli, interrupt: Arc<AtomicBool>) -> Self {
        let global = &cli.global;
        let chatter = if global.quiet {
            Chatter::Quiet
        } else {
            Chatter::Normal
        };
        let (port, timeout) = (global.port.clone(), global.timeout);
        Self {
            port,
            timeout,
            interrupt,
            ui: Ui::new(format(cli), chatter),
        }
    }

    fn link(&self) -> Result<Link> {
        let port = self.port.as_ref().ok_or_else(|| {
            Error::Usage("no port; give --port unix:PATH, or set TIDECTL_PORT".into())
        })?;
        Link::open(port)
    }

    fn connect(&self) -> Result<Client> {
        self.connect_with(Box::new(|_| {}))
    }

    fn connect_with(&self, sink: Sink) -> Result<Client> {
        let link = self.link()?;
        let options = Options {
            timeout: self.timeout,
            // It is the same question from the other end.
            patience: self.timeout,
            interrupt: Arc::clone(&self.interrupt),
            ..Options::for_pace(link.pace)
        };
        Client::open_with(link, options, sink)
    }
}

/// How data, and a failure, are printed. A console's data is what the guest prints, so no
/// object may be mixed with it.
#[must_use]
pub fn format(cli: &Cli) -> Format {
    match cli.command {
        Command::Monitor(_) | Command::Shell(_) => Format::Human,
        _ if cli.global.json => Format::Json,
        _ => Format::Human,
    }
}

/// Does what the command line says.
///
/// # Errors
/// Whatever fails.
pub fn run(cli: &Cli, interrupt: Arc<AtomicBool>) -> Result<()> {
    let mut context = Context::new(cli, interrupt);
    let context = &mut context;
    match &cli.command {
        Command::List => inspect::list(context),
        Command::Info(vm) => inspect::info(context, vm),
        Command::Monitor(args) => monitor::run(context, args),
        Command::Pause(vm) => inspect::pause(context, vm),
        Command::Resume(vm) => inspect::resume(context, vm),
        Command::Reset(vm) => inspect::reset(context, vm),
        Command::Stop(vm) => inspect::stop(context, vm),
        Command::PowerOff => inspect::power_off(context),
        Command::Hash(args) => hash::run(context, args),
        Command::Dirty(DirtyCommand::Start(args)) => dirty::start(context, args),
        Command::Dirty(DirtyCommand::Stop(vm)) => dirty::stop(context, vm),
        Command::Dirty(DirtyCommand::Status(vm)) => dirty::status(context, vm),
        Command::Dirty(DirtyCommand::Engine(args)) => dirty::engine(context, args),
        Command::Dirty(DirtyCommand::Quota(args)) => dirty::quota(context, args),
        Command::Dirty(DirtyCommand::Get(args)) => get::run(context, args),
        Command::Dirty(DirtyCommand::Rate(args)) => rate::run(context, args),
        Command::Dirty(DirtyCommand::Copy(args)) => copy::run(context, args),
        Command::Slot(SlotCommand::Add(args)) => slot::add(context, args),
        Command::Slot(SlotCommand::Delete(args)) => slot::delete(context, args),
        Command::Costs => costs::run(context),
        Command::Shell(args) => shell::run(context, args),
        Command::Bundle(args) => bundle::run(context, args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "tidectl", &mut script);
            context.ui.bytes(&script)
        }
    }
}

/// The VM part of every JSON object.
fn vm_json(vm: &tidemark_wire::message::VmSummary) -> serde_json::Value {
    json!({
        "id": vm.id.0,
        "name": vm.name,
        "state": vm.state.to_string(),
        "vcpus": vm.vcpus,
        "memory_bytes": vm.memory_bytes,
    })
}
