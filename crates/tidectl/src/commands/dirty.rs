//! `dirty start`, `dirty stop`, `dirty status`, `dirty engine`.

use super::{Context, EngineArg, LogArgs, VmArg};
use crate::Result;
use crate::client::Client;
use clap::Args;
use serde_json::{Value, json};
use tidemark_wire::message::{DirtyStatus, Mappings, VmSummary};

/// How to start.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tidectl dirty start debian
  tidectl dirty start debian --engine wp --granularity adaptive")]
pub struct StartArgs {
    #[command(flatten)]
    vm: VmArg,
    #[command(flatten)]
    log: LogArgs,
}

/// How to change the engine.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tidectl dirty engine debian wp
  tidectl dirty engine debian auto")]
pub struct EngineArgs {
    #[command(flatten)]
    vm: VmArg,
    /// How writes are noticed from now on.
    #[arg(value_enum)]
    engine: EngineArg,
}

pub(super) fn start(context: &mut Context, args: &StartArgs) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let bar = context.ui.bar("starting the dirty log");
    let (engine, granularity) = (args.log.engine.into(), args.log.granularity.into());
    client.start_log(vm.id, engine, granularity, &mut |done, total| {
        bar.set(done, total)
    })?;
    drop(bar);
    print_status(context, client, &vm)
}

pub(super) fn engine(context: &mut Context, args: &EngineArgs) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let bar = context.ui.bar("changing the dirty engine");
    client.set_engine(vm.id, args.engine.into(), &mut |done, total| {
        bar.set(done, total)
    })?;
    drop(bar);
    print_status(context, client, &vm)
}

pub(super) fn status(context: &mut Context, arg: &VmArg) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&arg.vm)?;
    print_status(context, client, &vm)
}

fn print_status(context: &mut Context, mut client: Client, vm: &VmSummary) -> Result<()> {
    let status = client.log_status(vm.id)?;
    client.close();
    context
        .ui
        .data(&status_json(vm, &status), || status_text(vm, &status))
}

fn status_json(vm: &VmSummary, status: &DirtyStatus) -> Value {
    json!({
        "schema": 1,
        "vm": { "id": vm.id.0, "name": vm.name },
        "logging": status.logging.map(|log| json!({
            "engine": log.engine.to_string(),
            "granularity": log.granularity.to_string(),
        })),
        "outstanding_epoch": status.outstanding.map(|epoch| epoch.0),
        "last_taken_epoch": status.last_taken.0,
        "last_committed_epoch": status.last_committed.0,
        "live_pages_hint": status.live_pages_hint,
        "write_faults": status.write_faults,
        "splits": status.splits,
        "harvests": status.harvests,
        "entries_read": status.entries_read,
    })
}

fn status_text(vm: &VmSummary, status: &DirtyStatus) -> String {
    let Some(log) = status.logging else {
        return format!("{}: dirty log off", vm.name);
    };
    let outstanding = match status.outstanding {
        Some(epoch) => format!(", epoch {epoch} outstanding"),
        None => String::new(),
    };
    format!(
        "{}: dirty log on, engine {}, granularity {}{outstanding}\n\
         at least {} pages dirty; {} write faults, {} splits, {} harvests since the start, \
         which read {} entries",
        vm.name,
        log.engine,
        log.granularity,
        status.live_pages_hint,
        status.write_faults,
        status.splits,
        status.harvests,
        status.entries_read
    )
}

pub(super) fn stop(context: &mut Context, arg: &VmArg) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&arg.vm)?;
    let before = client.info(vm.id)?.mappings;
    let bar = context.ui.bar("putting blocks back");
    client.stop_log(vm.id, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    let after = client.info(vm.id)?.mappings;
    client.close();
    let json = json!({
        "schema": 1,
        "vm": { "id": vm.id.0, "name": vm.name },
        "mappings_before": mappings_json(&before),
        "mappings_after": mappings_json(&after),
    });
    context.ui.data(&json, || {
        let text = |m: &Mappings| {
            format!(
                "{} x 1 GiB, {} x 2 MiB, {} x 4 KiB",
                m.blocks_1g, m.blocks_2m, m.pages_4k
            )
        };
        format!(
            "{}: dirty log off\nmapped by {}\n   before {}",
            vm.name,
            text(&after),
            text(&before)
        )
    })
}

fn mappings_json(mappings: &Mappings) -> Value {
    json!({
        "blocks_1g": mappings.blocks_1g,
        "blocks_2m": mappings.blocks_2m,
        "pages_4k": mappings.pages_4k,
    })
}
