//! `cargo bench -p tidemark-stage2`: how fast the engine is, as ratios within one run.
//!
//! The yardstick is one core that reads the same table memory, the least that any harvest by the
//! hardware's dirty state has to do. It is measured in turns with what it is compared to, each right
//! after the same writes of the guest, so that load, clock and caches are alike; the median of the
//! pairs counts. What was taken is checked against what was written.
//!
//! Writes `bench/native.json` in the target directory and prints the table. A row that misses its
//! limit is shown as such, and fails only with `--gate`: a timing never decides a test.

mod heap;
mod memory;
mod rows;
mod vm;

use std::cell::RefCell;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, measurement::WallTime};
use tidemark_stage2::{Granularity, Table};

use rows::Report;
use vm::{BLOCK, BLOCKS, PAGES, Result, Vm};

/// Tables that are no level-3 tables, and then some.
const SPARE: usize = 256;

fn main() -> ExitCode {
    let gate = std::env::args().any(|argument| argument == "--gate");
    // Criterion refuses arguments it does not know; a gate wants every row anyway.
    let criterion = match gate {
        true => Criterion::default(),
        false => Criterion::default().configure_from_args(),
    };
    let mut report = Report::default();
    if let Err(error) = measure(criterion, &mut report) {
        eprintln!("bench: {error}");
        return ExitCode::FAILURE;
    }
    print!("\n{}", report.table());
    let missing = report.missing();
    if !missing.is_empty() {
        println!("not all rows were measured, nothing written");
        return ExitCode::SUCCESS;
    }
    match report.write() {
        Ok(path) => println!("written to {}", path.display()),
        Err(error) => {
            eprintln!("bench: cannot write the rows: {error}");
            return ExitCode::FAILURE;
        }
    }
    let missed = report.missed();
    if !missed.is_empty() {
        eprintln!("bench: rows that miss their limit: {}", missed.join(", "));
        if gate {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn measure(mut criterion: Criterion, report: &mut Report) -> Result<()> {
    report.add("log_bits_per_page", log_bits_per_page()?);

    let mut group = criterion.benchmark_group("native");
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(5))
        .throughput(Throughput::Elements(PAGES));

    let paged = Vm::new(PAGES, BLOCKS as usize + SPARE)?;
    paged.start(Granularity::Page)?;
    let mut random = Random(0x7469_6465);
    harvest(&mut group, report, &paged, &CLEAN, &[])?;
    harvest(
        &mut group,
        report,
        &paged,
        &RUNS,
        &random.runs(PAGES / 100, 16),
    )?;
    harvest(
        &mut group,
        report,
        &paged,
        &RANDOM,
        &random.runs(PAGES / 100, 1),
    )?;
    two_threads(&mut group, report, &paged)?;

    let blocks = Vm::new(PAGES, BLOCKS as usize / 10 + SPARE)?;
    adaptive(
        &mut group,
        report,
        &paged,
        &blocks,
        &random.blocks(BLOCKS / 100),
    )?;
    enable(&mut group, report, &blocks, &random.blocks(BLOCKS / 100))?;
    group.finish();
    Ok(())
}

/// What a harvest finds, and the rows that come of it.
struct Scene {
    name: &'static str,
    ratio: &'static str,
}

const CLEAN: Scene = Scene {
    name: "harvest_clean",
    ratio: "harvest_clean_over_read",
};
const RUNS: Scene = Scene {
    name: "harvest_runs",
    ratio: "harvest_runs_over_read",
};
const RANDOM: Scene = Scene {
    name: "harvest_random",
    ratio: "harvest_random_over_read",
};

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Times measured in turns: the yardstick and what is compared to it.
#[derive(Default)]
struct Pairs(RefCell<Vec<(Duration, Duration)>>);

impl Pairs {
    /// Lets criterion measure `compared` as often as it wants, each time after `yardstick`.
    fn measure(
        &self,
        group: &mut Group<'_>,
        name: &str,
        mut yardstick: impl FnMut() -> Duration,
        mut compared: impl FnMut() -> Duration,
    ) {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|turns| {
                let mut spent = Duration::ZERO;
                for _ in 0..turns {
                    let pair = (yardstick(), compared());
                    spent += pair.1;
                    self.0.borrow_mut().push(pair);
                }
                spent
            });
        });
    }

    /// The median of `of` over the pairs, if there are any: criterion may have been told to skip them.
    fn median(&self, of: impl Fn(f64, f64) -> f64) -> Option<f64> {
        let pairs = self.0.borrow();
        let value = |(a, b): &(Duration, Duration)| of(a.as_secs_f64(), b.as_secs_f64());
        let mut values: Vec<f64> = pairs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

/// A harvest of the whole VM against a read of its level-3 tables.
fn harvest(
    group: &mut Group<'_>,
    report: &mut Report,
    vm: &Vm,
    scene: &Scene,
    pages: &[u64],
) -> Result<()> {
    let tables = vm.page_tables();
    let dirty = pages.len() as u64;
    vm.write(pages);
    let epoch = vm.next_epoch();
    vm.take(epoch)?;
    vm.verify(epoch, pages)?;
    vm.settle(epoch, dirty)?;

    let pairs = Pairs::default();
    pairs.measure(
        group,
        scene.name,
        || {
            vm.write(pages);
            timed(|| read(tables)).0
        },
        || {
            vm.write(pages);
            let epoch = vm.next_epoch();
            let (spent, taken) = timed(|| vm.take(epoch));
            taken
                .and_then(|()| vm.settle(epoch, dirty))
                .expect("harvest");
            spent
        },
    );
    let an_entry = 1e9 / PAGES as f64;
    if let Some(ratio) = pairs.median(|read, take| read / take) {
        report.add(scene.ratio, ratio);
    }
    if let Some(take) = pairs.median(|_, take| take * an_entry) {
        report.add(scene.name, take);
    }
    if let (true, Some(read)) = (dirty == 0, pairs.median(|read, _| read * an_entry)) {
        report.add("read", read);
    }
    Ok(())
}

/// Two threads that take one epoch against the same two that read half of the tables each.
fn two_threads(group: &mut Group<'_>, report: &mut Report, vm: &Vm) -> Result<()> {
    let (low, high) = vm.page_tables().split_at(BLOCKS as usize / 2);
    let pairs = Pairs::default();
    pairs.measure(
        group,
        "harvest_two_threads",
        || together(|| read(low), || read(high)),
        || {
            let epoch = vm.next_epoch();
            let take = || vm.take(epoch).expect("harvest");
            let spent = together(take, take);
            vm.settle(epoch, 0).expect("harvest");
            spent
        },
    );
    if let Some(ratio) = pairs.median(|read, take| read / take) {
        report.add("harvest_two_threads", ratio);
    }
    Ok(())
}

/// The time until both are through, which begin at the same moment.
fn together<T>(mine: impl FnOnce() -> T, others: impl FnOnce() -> T + Send) -> Duration {
    let begin = Barrier::new(2);
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            begin.wait();
            black_box(others());
            Instant::now()
        });
        begin.wait();
        let start = Instant::now();
        black_box(mine());
        let end = Instant::now();
        let end = other.join().map_or(end, |other| end.max(other));
        end - start
    })
}

/// The first harvest of blocks, some written, against the harvest of as many pages after the same
/// writes.
fn adaptive(
    group: &mut Group<'_>,
    report: &mut Report,
    paged: &Vm,
    blocks: &Vm,
    pages: &[u64],
) -> Result<()> {
    let dirty = pages.len() as u64;
    // Reported whole once, then by the page.
    blocks.start(Granularity::Adaptive)?;
    for expected in [dirty * BLOCK, dirty] {
        blocks.write(pages);
        let epoch = blocks.next_epoch();
        blocks.take(epoch)?;
        blocks.settle(epoch, expected)?;
    }
    blocks.stop()?;

    let pairs = Pairs::default();
    pairs.measure(
        group,
        "harvest_adaptive",
        || {
            paged.write(pages);
            let epoch = paged.next_epoch();
            let (spent, taken) = timed(|| paged.take(epoch));
            taken
                .and_then(|()| paged.settle(epoch, dirty))
                .expect("page");
            spent
        },
        || {
            blocks.start(Granularity::Adaptive).expect("start");
            blocks.write(pages);
            let epoch = blocks.next_epoch();
            let (spent, taken) = timed(|| blocks.take(epoch));
            taken
                .and_then(|()| blocks.settle(epoch, dirty * BLOCK))
                .and_then(|()| blocks.stop())
                .expect("adaptive");
            spent
        },
    );
    if let Some(ratio) = pairs.median(|page, adaptive| page / adaptive) {
        report.add("adaptive_over_page", ratio);
    }
    Ok(())
}

/// Starting a log on blocks, after one that found dirty pages and left some.
fn enable(group: &mut Group<'_>, report: &mut Report, vm: &Vm, pages: &[u64]) -> Result<()> {
    let pairs = Pairs::default();
    pairs.measure(
        group,
        "enable_64g",
        || Duration::ZERO,
        || {
            let (spent, started) = timed(|| vm.start(Granularity::Adaptive));
            started.expect("start");
            vm.write(pages);
            let epoch = vm.next_epoch();
            vm.take(epoch)
                .and_then(|()| vm.settle(epoch, pages.len() as u64 * BLOCK))
                .and_then(|()| vm.stop())
                .expect("log");
            spent
        },
    );
    if let Some(spent) = pairs.median(|_, spent| spent * 1e6) {
        report.add("enable_64g_us", spent);
    }
    Ok(())
}

/// The heap that 64 GiB need for a slot and a log more than 2 MiB do, tables not counted.
fn log_bits_per_page() -> Result<f64> {
    let cost = |pages: u64| -> Result<usize> {
        let before = heap::held();
        let vm = Vm::new(pages, SPARE)?;
        let tables = SPARE * size_of::<Table>();
        vm.start(Granularity::Adaptive)?;
        let epoch = vm.next_epoch();
        vm.take(epoch)?;
        let cost = heap::held() - before - tables;
        vm.settle(epoch, 0)?;
        Ok(cost)
    };
    let bytes = cost(PAGES)? - cost(BLOCK)?;
    Ok(bytes as f64 * 8.0 / (PAGES - BLOCK) as f64)
}

/// Reads tables as fast as this core can: plainly, in order, with whatever vectors the compiler takes.
///
/// Wider vectors and several streams at once were slower.
#[inline(never)]
fn read(tables: &[Table]) -> u64 {
    let tables = black_box(tables);
    let entries = tables.as_ptr().cast::<u64>();
    // SAFETY: a table is nothing but 512 of them, `AtomicU64` has the layout of `u64`, and while this
    // runs nobody writes to these.
    let entries = unsafe { std::slice::from_raw_parts(entries, size_of_val(tables) / 8) };
    const { assert!(size_of::<Table>() == 512 * size_of::<AtomicU64>()) };
    black_box(entries.iter().fold(0, |all, entry| all | entry))
}

/// A small generator (xorshift), the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// `count` different pages of the VM in runs of `length`, sorted.
    fn runs(&mut self, count: u64, length: u64) -> Vec<u64> {
        let mut starts: Vec<u64> = Vec::new();
        while (starts.len() as u64) < count / length {
            let more = count / length - starts.len() as u64;
            starts.extend((0..more).map(|_| self.below(PAGES / length)));
            starts.sort_unstable();
            starts.dedup();
        }
        let run = |start| start * length..(start + 1) * length;
        starts.into_iter().flat_map(run).collect()
    }

    /// One page in each of `count` blocks, sorted.
    fn blocks(&mut self, count: u64) -> Vec<u64> {
        let mut blocks: Vec<u64> = Vec::new();
        while (blocks.len() as u64) < count {
            let more = count - blocks.len() as u64;
            blocks.extend((0..more).map(|_| self.below(BLOCKS)));
            blocks.sort_unstable();
            blocks.dedup();
        }
        let mut page = |block| block * BLOCK + self.below(BLOCK);
        blocks.into_iter().map(&mut page).collect()
    }
}
