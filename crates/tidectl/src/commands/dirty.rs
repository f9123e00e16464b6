//! `dirty start`, `dirty stop`, `dirty status`, `dirty engine`, `dirty quota`.

use super::{Context, EngineArg, LogArgs, VmArg};
use crate::client::Client;
use crate::output::seconds;
use crate::units::{self, parse_duration};
use crate::{Error, Result};
use clap::Args;
use serde_json::{Value, json};
use std::time::Duration;
use tidemark_wire::message::{DirtyStatus, Engine, Hold, Mappings, Quota, VmSummary};
use tidemark_wire::{QUOTA_INTERVAL_MS_MAX, QUOTA_INTERVAL_MS_MIN};

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
    client.start_log(
        vm.id,
        engine,
        granularity,
        Hold::Lasting,
        &mut |done, total| bar.set(done, total),
    )?;
    drop(bar);
    tell_status(context, client, &vm)
}

pub(super) fn engine(context: &mut Context, args: &EngineArgs) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let bar = context.ui.bar("changing the dirty engine");
    client.set_engine(vm.id, args.engine.into(), &mut |done, total| {
        bar.set(done, total)
    })?;
    drop(bar);
    tell_status(context, client, &vm)
}

/// What each vCPU may dirty.
#[derive(Debug, Args)]
#[command(after_help = "\
A vCPU that has dirtied so many pages waits for the next interval. Under write protection each
page counts; under DBM vCPUs get the share of time that the last harvest's rate allows, so
harvest now and then. The quota stays until it is lifted, and does nothing without a log.

Examples:
  tidectl dirty quota debian --pages 1000 --per 100ms
  tidectl dirty quota debian --off")]
pub struct QuotaArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Pages of 4 KiB that each vCPU may dirty in an interval.
    #[arg(long, value_name = "N", required_unless_present = "off", conflicts_with = "off",
        value_parser = clap::value_parser!(u32).range(1..))]
    pages: Option<u32>,
    /// The interval, 10ms to 1s.
    #[arg(long, value_name = "TIME", default_value = "100ms", conflicts_with = "off", value_parser = parse_duration)]
    per: Duration,
    /// Lift the quota.
    #[arg(long)]
    off: bool,
}

impl QuotaArgs {
    fn quota(&self) -> Result<Option<Quota>> {
        let Some(pages) = self.pages else {
            return Ok(None);
        };
        let shortest = Duration::from_millis(QUOTA_INTERVAL_MS_MIN.into());
        let longest = Duration::from_millis(QUOTA_INTERVAL_MS_MAX.into());
        if !(shortest..=longest).contains(&self.per) {
            return Err(Error::Usage(format!(
                "--per {} is not possible; it may be {} to {}",
                units::duration(self.per),
                units::duration(shortest),
                units::duration(longest)
            )));
        }
        let interval_ms = self.per.as_millis() as u32;
        Ok(Some(Quota { pages, interval_ms }))
    }
}

pub(super) fn quota(context: &mut Context, args: &QuotaArgs) -> Result<()> {
    let quota = args.quota()?;
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    client.set_quota(vm.id, quota)?;
    tell_status(context, client, &vm)
}

pub(super) fn status(context: &mut Context, arg: &VmArg) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&arg.vm)?;
    let status = client.log_status(vm.id)?;
    client.close();
    context
        .ui
        .data(&status_json(&vm, &status), || status_text(&vm, &status))
}

/// What was changed is told by how it is now.
fn tell_status(context: &mut Context, mut client: Client, vm: &VmSummary) -> Result<()> {
    let status = client.log_status(vm.id)?;
    client.close();
    context
        .ui
        .done(&status_json(vm, &status), || status_text(vm, &status))
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
        "quota": status.quota.map(|quota| json!({
            "pages": quota.pages,
            "interval_ms": quota.interval_ms,
        })),
        "stalls": {
            "count": status.stalls.count,
            "seconds": seconds(Duration::from_micros(status.stalls.time_us)),
            "percent": status.stalls.percent,
        },
    })
}

fn status_text(vm: &VmSummary, status: &DirtyStatus) -> String {
    let throttle = throttle_text(status);
    let Some(log) = status.logging else {
        return format!("{}: dirty log off{throttle}", vm.name);
    };
    let outstanding = match status.outstanding {
        Some(epoch) => format!(", epoch {epoch} outstanding"),
        None => String::new(),
    };
    // What the hardware marked is in the descriptors until somebody reads them.
    let not_yet = match log.engine {
        Engine::Dbm => " so far, the next harvest reads the hardware's dirty bits",
        Engine::WriteProtect => "",
    };
    format!(
        "{}: dirty log on, engine {}, granularity {}{outstanding}\n\
         {} pages noted{not_yet}; {} write faults, {} splits, {} harvests since the start, \
         which read {} entries{throttle}",
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

/// A line about the quota, where there is one or was.
fn throttle_text(status: &DirtyStatus) -> String {
    let limit = match status.quota {
        Some(quota) => format!(
            "each vCPU may dirty {} pages in {} ms",
            quota.pages, quota.interval_ms
        ),
        None if status.stalls.count > 0 => "no quota any more".into(),
        None => return String::new(),
    };
    let stalls = &status.stalls;
    format!(
        "\n{limit}; {} stalls of {} in all, {} % of the time now",
        stalls.count,
        units::duration(Duration::from_micros(stalls.time_us)),
        stalls.percent
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
    context.ui.done(&json, || {
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
