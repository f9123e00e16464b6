//! Rounds of dirty tracking: wait, take, keep, commit, tell.
//!
//! Invariant: a round's bitmap is on the disk before its epoch is committed, so a demo
//! that is killed has lost nothing that the machine has forgotten.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tidectl::bitmaps::Bitmaps;
use tidectl::heatmap::Heatmap;
use tidemark_tests::host::Host;
use tidemark_tests::work::Work;
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{DirtyStatus, Engine, EngineChoice, Granularity, VmId};

use crate::table;

/// Rounds by each engine.
pub const USUAL: u32 = 8;

/// What the guest is given between two rounds.
const INTERVAL: Duration = Duration::from_millis(1000);

/// How often the wait between two rounds is shown.
const TICK: Duration = Duration::from_millis(100);

/// What to track, and how often.
pub struct Tracked {
    /// Which VM.
    pub vm: VmId,
    /// By which engine.
    pub engine: EngineChoice,
    /// How many rounds.
    pub count: u32,
}

/// One round, as measured.
pub struct Round {
    /// By which engine.
    pub engine: Engine,
    /// Its number, from 1 with each engine.
    pub number: u32,
    /// Since the round before was taken.
    pub time: Duration,
    /// To take it and read its bitmap.
    pub harvest_time: Duration,
    /// Dirty pages.
    pub pages: u64,
    /// Write faults taken meanwhile.
    pub faults: u64,
    /// Blocks split meanwhile.
    pub splits: u64,
    /// Payload bytes that came over the line meanwhile.
    pub line_bytes: u64,
}

impl Round {
    /// MiB that were dirtied a second, counting whole pages.
    pub fn rate(&self) -> f64 {
        let mebibytes = (self.pages * PAGE_SIZE) as f64 / f64::from(1 << 20);
        mebibytes / self.time.as_secs_f64()
    }
}

/// The files of all rounds.
pub struct Rounds {
    guest: String,
    log: File,
    bitmap: PathBuf,
    sidecar: PathBuf,
    jsonl: PathBuf,
    heatmap: PathBuf,
    picture: Option<Heatmap>,
}

impl Rounds {
    /// Begins the files.
    pub fn begin(work: &Work, guest: &str) -> Result<Self> {
        let jsonl = work.path("rounds.jsonl");
        Ok(Self {
            guest: guest.to_owned(),
            log: File::create(&jsonl).context("rounds.jsonl")?,
            bitmap: work.path("bitmap.bin"),
            sidecar: work.path("bitmap.json"),
            heatmap: work.path("heatmap.png"),
            jsonl,
            picture: None,
        })
    }

    /// Tracks for some rounds by one engine.
    pub fn track(&mut self, host: &mut Host, tracked: &Tracked) -> Result<()> {
        let &Tracked { vm, engine, count } = tracked;
        let begun = Instant::now();
        host.dirty_start(vm, engine, Granularity::Adaptive)
            .context("the log does not start")?;
        let logging = host.dirty_status(vm)?.logging.context("no log runs")?;
        println!(
            "   log started in {:.1} ms: {}, {} granularity",
            begun.elapsed().as_secs_f64() * 1e3,
            logging.engine,
            logging.granularity
        );
        table::head();
        let mut faults = 0;
        let mut before = Before::look(host, vm)?;
        for number in 1..=count {
            wait(host, number, count)?;
            let round = self.round(host, vm, logging.engine, number, &mut before);
            let round = round.with_context(|| format!("round {number}"))?;
            ensure!(
                round.pages > 0,
                "round {number} found no dirty page under a load"
            );
            faults += round.faults;
        }
        match logging.engine {
            Engine::Dbm => ensure!(faults == 0, "{faults} write faults under the dirty bit"),
            Engine::WriteProtect => ensure!(faults > 0, "write protection without a fault"),
        }
        let begun = Instant::now();
        host.dirty_stop(vm).context("the log does not stop")?;
        let mappings = host.info(vm)?.mappings;
        println!(
            "   log stopped in {:.1} ms; the guest is mapped by {} blocks of 1 GiB, {} of 2 MiB, {} pages again",
            begun.elapsed().as_secs_f64() * 1e3,
            mappings.blocks_1g,
            mappings.blocks_2m,
            mappings.pages_4k
        );
        Ok(())
    }

    fn round(
        &mut self,
        host: &mut Host,
        vm: VmId,
        engine: Engine,
        number: u32,
        before: &mut Before,
    ) -> Result<Round> {
        let begun = Instant::now();
        let harvest = host.take(vm)?;
        let harvest_time = begun.elapsed();
        self.keep(&harvest.bitmaps)?;
        host.commit(vm, &harvest)?;
        let after = Before::look(host, vm)?;
        let round = Round {
            engine,
            number,
            time: begun.duration_since(before.at),
            harvest_time,
            pages: harvest.bitmaps.dirty_pages(),
            faults: after
                .status
                .write_faults
                .saturating_sub(before.status.write_faults),
            splits: after.status.splits.saturating_sub(before.status.splits),
            line_bytes: after.line_bytes.saturating_sub(before.line_bytes),
        };
        *before = Before { at: begun, ..after };
        table::row(&round, &harvest.bitmaps);
        self.log(&round)?;
        Ok(round)
    }

    /// Puts a round's bitmap where it outlives the machine's.
    fn keep(&mut self, bitmaps: &Bitmaps) -> Result<()> {
        let mut file = File::create(&self.bitmap).context("bitmap.bin")?;
        file.write_all(&bitmaps.to_bytes()).context("bitmap.bin")?;
        file.sync_all().context("bitmap.bin")?;
        let about = serde_json::to_string_pretty(&bitmaps.describe())?;
        std::fs::write(&self.sidecar, about + "\n").context("bitmap.json")?;
        let picture = self
            .picture
            .get_or_insert_with(|| Heatmap::for_slots(&self.guest, &bitmaps.slots));
        picture.add(bitmaps);
        Ok(())
    }

    fn log(&mut self, round: &Round) -> Result<()> {
        let line = json!({
            "schema": 1,
            "event": "round",
            "engine": round.engine.to_string(),
            "n": round.number,
            "seconds": round.time.as_secs_f64(),
            "harvest_seconds": round.harvest_time.as_secs_f64(),
            "dirty_pages": round.pages,
            "dirty_bytes": round.pages * PAGE_SIZE,
            "dirty_bytes_per_second": (round.rate() * f64::from(1 << 20)).round(),
            "write_faults": round.faults,
            "splits": round.splits,
            "line_bytes": round.line_bytes,
        });
        writeln!(self.log, "{line}").context("rounds.jsonl")
    }

    /// Draws the picture and names all files.
    pub fn finish(self) -> Result<Vec<PathBuf>> {
        let picture = self.picture.context("no round was taken")?;
        std::fs::write(&self.heatmap, picture.to_png()?).context("heatmap.png")?;
        self.log.sync_all().context("rounds.jsonl")?;
        Ok(vec![self.jsonl, self.bitmap, self.sidecar, self.heatmap])
    }
}

/// The counters at the beginning of a round.
struct Before {
    at: Instant,
    status: DirtyStatus,
    line_bytes: u64,
}

impl Before {
    fn look(host: &mut Host, vm: VmId) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            status: host.dirty_status(vm)?,
            line_bytes: host.client().stats().payload_bytes,
        })
    }
}

/// Gives the guest its time, and shows that it passes.
fn wait(host: &mut Host, number: u32, count: u32) -> Result<()> {
    let begun = Instant::now();
    while let Some(left) = INTERVAL.checked_sub(begun.elapsed()) {
        table::progress(
            number,
            count,
            begun.elapsed().as_secs_f64() / INTERVAL.as_secs_f64(),
        );
        host.client().idle(left.min(TICK))?;
    }
    table::clear_progress();
    Ok(())
}
