//! `dirty copy`: see [`crate::copy`].

use super::{Context, LogArgs, VmArg};
use crate::copy::{self, After, Phase, Plan, Report, Round, Step, Verified, Verify};
use crate::heatmap::Heatmap;
use crate::image::{Contents, MemoryFile, hex};
use crate::output::{Format, seconds};
use crate::units::{duration, parse_address, parse_duration, rate, size};
use crate::{Error, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tidemark_wire::PAGE_SIZE;

/// What to copy, how and where to.
#[derive(Debug, Args)]
#[command(after_help = "\
Copies everything once, then what was written meanwhile, round after round, then pauses the VM for
one last round. The VM then runs on if it ran before, and the copy is compared, page by page, with
checksums that EL2 computes; pages that the VM writes meanwhile are left out and counted. With
--verify paused it stays paused until SHA-256 of all its memory has been compared, which is counted
as downtime. Exit code 7 if a page differs. A VM that has ended is copied without a log.

Examples:
  tidectl dirty copy small --image-dir copy
  tidectl dirty copy debian --image-dir copy --rounds 8 \\
      --memory-file target/demo/ram --memory-base 0x40000000")]
pub struct CopyArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Where the copy goes: one slot-ID.bin a slot, called slot-ID.bin.partial until it is verified.
    #[arg(long, value_name = "DIR")]
    image_dir: PathBuf,
    /// Most rounds while the VM runs.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Stop the rounds early when one finds no more than this.
    #[arg(long, value_name = "PAGES", default_value_t = 0)]
    enough_pages: u64,
    /// Time given to the VM before each round.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_duration)]
    interval: Duration,
    /// Read contents from this file, which is the machine's memory, not over the line.
    #[arg(long, value_name = "FILE")]
    memory_file: Option<PathBuf>,
    /// Physical address of the file's first byte.
    #[arg(long, value_name = "PA", default_value = "0x40000000", requires = "memory_file", value_parser = parse_address)]
    memory_base: u64,
    /// When the copy is compared with the VM's memory.
    #[arg(long, value_enum, default_value = "running", value_name = "WHEN")]
    verify: VerifyArg,
    /// Leave the VM paused.
    #[arg(long)]
    leave_paused: bool,
    /// Use a log that is running, though what it has found is then lost to whoever runs it.
    #[arg(long)]
    discard: bool,
    /// Draw how often each page was copied.
    #[arg(long, value_name = "PNG")]
    heatmap: Option<PathBuf>,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum VerifyArg {
    /// While the VM runs again: what it writes meanwhile is left out.
    Running,
    /// All of it while the VM is paused.
    Paused,
}

pub(super) fn run(context: &mut Context, args: &CopyArgs) -> Result<()> {
    let contents = match &args.memory_file {
        Some(path) => Contents::MemoryFile(MemoryFile::open(path, args.memory_base)?),
        None => Contents::Channel,
    };
    let plan = Plan {
        image_dir: args.image_dir.clone(),
        rounds: args.rounds,
        enough_pages: args.enough_pages,
        interval: args.interval,
        contents,
        engine: args.log.engine.into(),
        granularity: args.log.granularity.into(),
        verify: match args.verify {
            VerifyArg::Running => Verify::Running,
            VerifyArg::Paused => Verify::Paused,
        },
        after: if args.leave_paused {
            After::Paused
        } else {
            After::AsBefore
        },
    };
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    if client.log_status(vm.id)?.logging.is_some() && !args.discard {
        return Err(Error::Usage(format!(
            "{}'s dirty log is running, and copying would take from it; stop it, or pass --discard",
            vm.name
        )));
    }
    let bar = context.ui.bar("copying");
    let mut picture: Option<Heatmap> = None;
    // Rounds are words beside the result; with JSON they are in it anyway.
    let format = context.ui.format;
    let say = |words: String| {
        if format == Format::Human {
            bar.say(words);
        }
    };
    let report = copy::run(&mut client, vm.id, &plan, &mut |step| match step {
        Step::Working { what, done, total } => bar.stage(what, done, total),
        Step::Harvested(bitmaps) if args.heatmap.is_some() => picture
            .get_or_insert_with(|| Heatmap::for_slots(&vm.name, &bitmaps.slots))
            .add(bitmaps),
        Step::Harvested(_) => {}
        Step::Round(round) => say(round_text(round)),
        Step::Paused => say("paused for the last round".into()),
        Step::Verified(verified) => say(verified_text(verified)),
    })?;
    drop(bar);
    let stats = client.stats();
    client.close();
    if let (Some(path), Some(picture)) = (&args.heatmap, &picture) {
        super::get::write_safely(path, &picture.to_png()?)?;
    }
    let mut json = report_json(&report);
    if let Some(object) = json.as_object_mut() {
        object.insert("vm".into(), json!({ "id": vm.id.0, "name": vm.name }));
        object.insert("retransmits".into(), json!(stats.retransmits));
        object.insert("bad_frames".into(), json!(stats.bad_frames));
    }
    context.ui.data(&json, || report_text(&report))
}

fn round_text(round: &Round) -> String {
    let what = match round.phase {
        Phase::Whole => "all memory".into(),
        Phase::Live => format!("round {:>3}", round.number),
        Phase::Last => "last round".into(),
    };
    let bytes = round.pages * PAGE_SIZE;
    let speed = match bytes {
        0 => String::new(),
        bytes => format!(" ({})", rate(bytes, round.copy_time)),
    };
    format!(
        "{what}: {} pages ({}), harvest {}, copy {}{speed}",
        round.pages,
        size(bytes),
        duration(round.harvest_time),
        duration(round.copy_time),
    )
}

fn verified_text(verified: Verified) -> String {
    match verified {
        Verified { pages, written: 0 } => format!("verified: all {pages} pages"),
        Verified { pages, written } => format!(
            "verified: {pages} of {} pages; the VM has written the others since the last round",
            pages + written
        ),
    }
}

fn report_text(report: &Report) -> String {
    let mut out: String = report
        .slots
        .iter()
        .map(|(_, path, hash)| format!("{}  {}\n", hex(hash), path.display()))
        .collect();
    // What was not compared is not called exact.
    let what = match report.verified.written {
        0 => "exact after",
        _ => "copied in",
    };
    out.push_str(&format!(
        "{what} {} rounds: {} in all, down for {}, {} of {} pages verified in {}",
        report.rounds.len(),
        duration(report.total_time),
        duration(report.downtime),
        report.verified.pages,
        report.verified.pages + report.verified.written,
        duration(report.verify_time)
    ));
    out
}

fn report_json(report: &Report) -> Value {
    let rounds: Vec<Value> = report
        .rounds
        .iter()
        .map(|round| {
            json!({
                "n": round.number,
                "phase": match round.phase {
                    Phase::Whole => "whole",
                    Phase::Live => "live",
                    Phase::Last => "last",
                },
                "pages": round.pages,
                "bytes": round.pages * PAGE_SIZE,
                "harvest_seconds": seconds(round.harvest_time),
                "copy_seconds": seconds(round.copy_time),
            })
        })
        .collect();
    let slots: Vec<Value> = report
        .slots
        .iter()
        .map(|(id, path, hash)| json!({ "id": id.0, "file": path, "sha256": hex(hash) }))
        .collect();
    json!({
        "schema": 1,
        "status": "completed",
        "verified": true,
        "verified_pages": report.verified.pages,
        "written_meanwhile_pages": report.verified.written,
        "rounds": rounds,
        "slots": slots,
        "total_seconds": seconds(report.total_time),
        "downtime_seconds": seconds(report.downtime),
        "verify_seconds": seconds(report.verify_time),
    })
}
