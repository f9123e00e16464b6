//! `dirty rate`: how fast a VM dirties pages.

use super::{Context, LogArgs, VmArg};
use crate::client::{Client, Ending};
use crate::output::{Format, seconds};
use crate::units::{mib_per_second, parse_duration};
use crate::{Error, Result};
use clap::Args;
use serde_json::json;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{Hold, VmId, VmSummary};

/// How to measure.
#[derive(Debug, Args)]
#[command(after_help = "\
A page counts once an interval however often it is written, so a longer interval shows a lower rate.
One line (with --json one object) an interval.

Examples:
  tidectl dirty rate debian             every second until Ctrl-C
  tidectl dirty rate debian 500ms 20 -T")]
pub struct RateArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Time between harvests.
    #[arg(default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
    /// How many; without it, until Ctrl-C.
    count: Option<u32>,
    /// Begin each line with the time.
    #[arg(short = 'T', long)]
    timestamp: bool,
    /// Use a log that is running, though what it has found is then lost to whoever runs it.
    #[arg(long)]
    discard: bool,
    #[command(flatten)]
    log: LogArgs,
}

/// One interval.
struct Sample {
    pages: u64,
    time: Duration,
    write_faults: u64,
}

pub(super) fn run(context: &mut Context, args: &RateArgs) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let running = client.log_status(vm.id)?.logging;
    if running.is_some() && !args.discard {
        return Err(Error::Usage(format!(
            "{}'s dirty log is running, and measuring would take from it; stop it, or pass --discard",
            vm.name
        )));
    }
    if running.is_none() {
        let (engine, granularity) = (args.log.engine.into(), args.log.granularity.into());
        client.start_log(vm.id, engine, granularity, Hold::Session, &mut |_, _| {})?;
    }
    let measured = measure(context, args, &mut client, &vm);
    if running.is_none() {
        let stopped = client.undisturbed(|client| client.stop_log(vm.id, &mut |_, _| {}));
        // Ctrl-C is how an endless measurement ends.
        return match measured {
            Err(Error::Interrupted) if args.count.is_none() => stopped,
            measured => measured.and(stopped),
        };
    }
    measured
}

fn measure(
    context: &mut Context,
    args: &RateArgs,
    client: &mut Client,
    vm: &VmSummary,
) -> Result<()> {
    let mut faults = client.log_status(vm.id)?.write_faults;
    // The first harvest only marks the beginning.
    harvest(client, vm.id)?;
    let mut since = Instant::now();
    if context.ui.format == Format::Human {
        let stamp = if args.timestamp { "unix time     " } else { "" };
        context.ui.line(&format!(
            "{stamp}     pages      MiB/s   write faults   seconds"
        ))?;
    }
    let mut number = 0;
    while args.count.is_none_or(|count| number < count) {
        number += 1;
        client.idle(args.interval.saturating_sub(since.elapsed()))?;
        let pages = harvest(client, vm.id)?;
        let time = since.elapsed();
        since = Instant::now();
        let now = client.log_status(vm.id)?.write_faults;
        let sample = Sample {
            pages,
            time,
            write_faults: now.saturating_sub(faults),
        };
        faults = now;
        print(context, args, vm, number, &sample)?;
    }
    Ok(())
}

fn harvest(client: &mut Client, vm: VmId) -> Result<u64> {
    client.harvest(vm, Ending::Commit, &mut |_, _| {}, |_, report| {
        Ok(report.dirty_pages)
    })
}

fn print(
    context: &mut Context,
    args: &RateArgs,
    vm: &VmSummary,
    number: u32,
    sample: &Sample,
) -> Result<()> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let rate = mib_per_second(sample.pages * PAGE_SIZE, sample.time);
    let json = json!({
        "schema": 1,
        "vm": vm.name,
        "n": number,
        "unix_seconds": seconds(now),
        "interval_seconds": seconds(sample.time),
        "unique_pages": sample.pages,
        "granule_bytes": PAGE_SIZE,
        "dirty_mib_per_second": (rate * 1000.0).round() / 1000.0,
        "write_faults": sample.write_faults,
    });
    context.ui.data(&json, || {
        let stamp = if args.timestamp {
            format!("{:.3}", now.as_secs_f64())
        } else {
            String::new()
        };
        format!(
            "{stamp}{:>10} {rate:>10.2} {:>14} {:>9.3}",
            sample.pages,
            sample.write_faults,
            sample.time.as_secs_f64()
        )
    })
}
