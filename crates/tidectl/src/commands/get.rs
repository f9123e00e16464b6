//! `dirty get`: one epoch's bitmap, safely on this side before the target forgets it.

use super::{Context, VmArg};
use crate::bitmaps::Bitmaps;
use crate::client::{Client, Ending};
use crate::heatmap::Heatmap;
use crate::output::seconds;
use crate::units::size;
use crate::{Error, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::TakeReport;

/// What to fetch and where to put it.
#[derive(Debug, Args)]
#[command(after_help = "\
raw is KVM's layout: little-endian 64-bit words, bit 0 the slot's first page, the slots one after
the other by id; FILE.json beside it says where each begins. The target forgets the pages only once
the files are on the disk; after any failure they are reported again.

Examples:
  tidectl dirty get debian -o round1.bin
  tidectl dirty get debian --format json | jq '.slots[].ranges'
  tidectl dirty get debian -o now.bin --peek --heatmap now.png")]
pub struct GetArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Where to write; JSON goes to standard output without it.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How.
    #[arg(long, value_enum, default_value = "raw")]
    format: GetFormat,
    /// Give the pages back instead of having them forgotten: the next bitmap has them again.
    #[arg(long)]
    peek: bool,
    /// Draw them as well.
    #[arg(long, value_name = "PNG")]
    heatmap: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum GetFormat {
    /// KVM's bitmap, with FILE.json beside it.
    Raw,
    /// Ranges of guest addresses.
    Json,
}

pub(super) fn run(context: &mut Context, args: &GetArgs) -> Result<()> {
    if args.format == GetFormat::Raw && args.output.is_none() {
        let problem = "a raw bitmap needs a file: -o FILE, or ask for --format json";
        return Err(Error::Usage(problem.into()));
    }
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let logging = client.log_status(vm.id)?.logging;
    let begun = Instant::now();
    let ending = if args.peek {
        Ending::GiveBack
    } else {
        Ending::Commit
    };
    let bar = context.ui.bar("taking the dirty bitmap");
    let ui = &mut context.ui;
    let keep = |client: &mut Client, report: &TakeReport| {
        let bitmaps = client.read_bitmaps(vm.id, report, &mut |done, total| {
            bar.stage("reading the dirty bitmap", done, total);
        })?;
        let about = json!({
            "vm": { "id": vm.id.0, "name": vm.name },
            "engine": logging.map(|log| log.engine.to_string()),
            "granularity": logging.map(|log| log.granularity.to_string()),
            "peek": args.peek,
            "taken_unix_seconds": unix_seconds(),
        });
        // All or none: a description of a bitmap that is not there helps nobody.
        let mut files: Vec<(PathBuf, Vec<u8>)> = Vec::new();
        match (args.format, &args.output) {
            (GetFormat::Raw, Some(path)) => {
                let description = pretty(&merged(bitmaps.describe(), &about));
                files.push((path.clone(), bitmaps.to_bytes()));
                files.push((sidecar(path), description.into_bytes()));
            }
            (GetFormat::Json, Some(path)) => {
                let ranges = pretty(&merged(bitmaps.ranges(), &about));
                files.push((path.clone(), ranges.into_bytes()));
            }
            (_, None) => {}
        }
        if let Some(path) = &args.heatmap {
            let mut picture = Heatmap::for_slots(&vm.name, &bitmaps.slots);
            picture.add(&bitmaps);
            files.push((path.clone(), picture.to_png()?));
        }
        let files: Vec<(&Path, &[u8])> = files
            .iter()
            .map(|(path, bytes)| (path.as_path(), bytes.as_slice()))
            .collect();
        write_together(&files)?;
        if args.output.is_none() {
            ui.line(&merged(bitmaps.ranges(), &about).to_string())?;
        }
        Ok(bitmaps)
    };
    let bitmaps = client.harvest(vm.id, ending, &mut |done, total| bar.set(done, total), keep)?;
    drop(bar);
    client.close();
    summarize(context, args, &vm.name, &bitmaps, begun)
}

fn summarize(
    context: &mut Context,
    args: &GetArgs,
    name: &str,
    bitmaps: &Bitmaps,
    begun: Instant,
) -> Result<()> {
    let Some(path) = &args.output else {
        return Ok(());
    };
    let json = json!({
        "schema": 1,
        "vm": name,
        "epoch": bitmaps.epoch.0,
        "dirty_pages": bitmaps.dirty_pages(),
        "dirty_bytes": bitmaps.dirty_pages() * PAGE_SIZE,
        "committed": !args.peek,
        "output": path,
        "sidecar": (args.format == GetFormat::Raw).then(|| sidecar(path)),
        "heatmap": args.heatmap,
        "elapsed_seconds": seconds(begun.elapsed()),
    });
    context.ui.done(&json, || {
        format!(
            "{name}: epoch {}, {} dirty pages ({}) in {}",
            bitmaps.epoch,
            bitmaps.dirty_pages(),
            size(bitmaps.dirty_pages() * PAGE_SIZE),
            path.display()
        )
    })
}

fn sidecar(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

fn merged(mut object: Value, more: &Value) -> Value {
    if let (Some(object), Some(more)) = (object.as_object_mut(), more.as_object()) {
        object.extend(more.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    object
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// Writes a file so that it is either the old one or the new one, and on the disk. What is
/// there and is no regular file (a device, a pipe) is written to and stays what it is.
pub(super) fn write_safely(path: &Path, bytes: &[u8]) -> Result<()> {
    write_together(&[(path, bytes)])
}

/// The same for files that belong together: none has its name before the content of all is on the disk.
pub(super) fn write_together(files: &[(&Path, &[u8])]) -> Result<()> {
    let is_other = |path: &Path| fs::metadata(path).is_ok_and(|there| !there.is_file());
    let (others, regular): (Vec<_>, Vec<_>) = files.iter().partition(|(path, _)| is_other(path));
    let mut parts = Parts(Vec::new());
    for (path, bytes) in regular {
        parts.write(path, bytes)?;
    }
    for (path, bytes) in others {
        File::options()
            .write(true)
            .open(path)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.flush()))
            .map_err(Error::file(path))?;
    }
    parts.publish()
}

/// Files under the names that they have until all are written, and the names they get. What is left when this is
/// dropped was in vain.
struct Parts(Vec<(PathBuf, PathBuf)>);

impl Parts {
    fn write(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(".part");
        let part = PathBuf::from(name);
        self.0.push((part.clone(), path.into()));
        File::create(&part)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .map_err(Error::file(path))
    }

    fn publish(mut self) -> Result<()> {
        let mut dirs = BTreeSet::new();
        while let Some((part, path)) = self.0.first() {
            fs::rename(part, path).map_err(Error::file(path))?;
            dirs.insert(match path.parent() {
                Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
                _ => PathBuf::from("."),
            });
            self.0.remove(0);
        }
        // The names must be on the disk too.
        for dir in dirs {
            File::open(&dir)
                .and_then(|file| file.sync_all())
                .map_err(Error::file(&dir))?;
        }
        Ok(())
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        for (part, _) in &self.0 {
            // The failure to report is the first one.
            let _ = fs::remove_file(part);
        }
    }
}
