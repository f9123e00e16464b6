//! The throttle: a guest that writes hard keeps to its quota, and can be handled all the same.
//!
//! What is counted decides: pages, stalls, and how long the target says that vCPUs waited. The host's
//! clock only says how many intervals there can have been at most, so that a slow machine, where there
//! are more, fails nothing.

use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use tidectl::Error;
use tidemark_guests::pattern::{Config, Iteration, Seed};
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::oracle::Step;
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::message::{
    DirtyStatus, EngineChoice, ErrorReply, Granularity, Hold, Quota, Stalls, VmState,
};

use crate::case::Case;

const VCPUS: u8 = 2;

/// So few that nobody gets anywhere with it.
const NEXT_TO_NOTHING: Quota = Quota {
    pages: 1,
    interval_ms: 1000,
};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("quota_holds_under_wp", 90, holds_under_wp),
        Case::new("quota_holds_under_dbm", 120, holds_under_dbm),
        Case::new("quota_a_stalled_guest_is_handled_wp", 120, |script| {
            a_stalled_guest_is_handled(script, EngineChoice::WriteProtect)
        }),
        Case::new("quota_a_stalled_guest_is_handled_dbm", 120, |script| {
            a_stalled_guest_is_handled(script, EngineChoice::Dbm)
        }),
        Case::new("quota_linux_goes_on", 150, linux_goes_on),
        Case::new("quota_out_of_bounds_is_refused", 60, out_of_bounds),
    ]
}

/// How many intervals there can have been at most: parts of one at both ends.
fn intervals(quota: Quota, time: Duration) -> u64 {
    let interval = Duration::from_millis(quota.interval_ms.into());
    (time.as_nanos() / interval.as_nanos()) as u64 + 2
}

fn oracle(script: &mut Script, pages: u32) -> Result<(&mut Target, OracleGuest)> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: VCPUS,
        pages,
        blocks: 0,
        more: 0,
    };
    let bundle = guests::pack([guests::oracle(VCPUS, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, "leaves=blocks")?;
    target.to_prompt()?;
    let guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    Ok((target, guest))
}

impl Throttled for OracleGuest {
    fn quota(&mut self, quota: Option<Quota>) -> Result<()> {
        Ok(self.host.client().set_quota(self.vm, quota)?)
    }

    fn status(&mut self) -> Result<DirtyStatus> {
        self.host.dirty_status(self.vm)
    }

    fn listen(&mut self) -> Result<()> {
        self.listen().map(drop)
    }
}

/// What these tests do to a guest beside what others do.
trait Throttled {
    fn quota(&mut self, quota: Option<Quota>) -> Result<()>;
    fn status(&mut self) -> Result<DirtyStatus>;
    fn listen(&mut self) -> Result<()>;

    fn stalls(&mut self) -> Result<Stalls> {
        Ok(self.status()?.stalls)
    }

    /// Waits until a vCPU waits for its quota: it began to, and the time it has waited grows.
    fn until_stalled(&mut self, since: Stalls) -> Result<()> {
        loop {
            let (one, two) = (self.stalls()?, self.stalls()?);
            if one.count > since.count && two.time_us > one.time_us {
                return Ok(());
            }
            self.listen()?;
        }
    }

    /// Nobody waits: neither number grows while the target's clock goes on.
    fn nobody_waits(&mut self) -> Result<()> {
        let one = self.stalls()?;
        for _ in 0..5 {
            let now = self.stalls()?;
            ensure!(
                (now.count, now.time_us) == (one.count, one.time_us),
                "a vCPU waits for its quota: {one:?}, then {now:?}"
            );
        }
        Ok(())
    }
}

/// Each write costs a fault, and is counted: `n` intervals see no more than `n` quotas.
fn holds_under_wp(script: &mut Script) -> Result<()> {
    const QUOTA: Quota = Quota {
        pages: 20,
        interval_ms: 100,
    };
    const ENOUGH: u64 = 500;
    let (target, mut guest) = oracle(script, 2000)?;
    let vm = guest.vm;
    let (engine, granularity) = (EngineChoice::WriteProtect, Granularity::Page);
    guest.host.dirty_start(vm, engine, granularity)?;
    let before = guest.status()?;
    ensure!(before.quota.is_none() && before.stalls == Stalls::default());
    guest.quota(Some(QUOTA))?;
    // Before the first page that counts, so there are no fewer intervals than this says.
    let begun = Instant::now();
    let faults = guest.status()?.write_faults;
    guest.start_free(1)?;
    let (now, time) = loop {
        let now = guest.status()?;
        if now.write_faults - faults >= ENOUGH {
            break (now, begun.elapsed());
        }
        guest.listen()?;
    };
    let dirtied = now.write_faults - faults;
    let most = u64::from(QUOTA.pages) * u64::from(VCPUS) * intervals(QUOTA, time);
    ensure!(
        dirtied <= most,
        "{dirtied} pages were dirtied in {time:?}, where {most} is the most"
    );
    ensure!(now.quota == Some(QUOTA), "the quota is {:?}", now.quota);
    ensure!(
        now.stalls.count > 0 && now.stalls.time_us > 0,
        "nobody waited: {:?}",
        now.stalls
    );
    // Let go, it comes to its end, and says the truth about what it wrote.
    guest.quota(None)?;
    guest.nobody_waits()?;
    guest.wait(|step| step == Step::Done(Iteration(1)))?;
    guest.host.dirty_stop(vm)?;
    guest.host.finish();
    target.still_on()
}

/// Nothing faults. What harvests find comes down to the quota, and stays there.
fn holds_under_dbm(script: &mut Script) -> Result<()> {
    const INTERVAL: u32 = 100;
    /// Harvests that are judged together.
    const HARVESTS: usize = 12;
    let (target, mut guest) = oracle(script, 4)?;
    let vm = guest.vm;
    let (engine, granularity) = (EngineChoice::Dbm, Granularity::Page);
    guest.host.dirty_start(vm, engine, granularity)?;
    guest.start_free(0)?;
    // How fast it is when nobody holds it, as pages in an interval.
    let free = Harvests::take(&mut guest, 4, INTERVAL)?;
    ensure!(guest.stalls()?.count == 0, "it waited without a quota");
    let fast = free.pages / free.intervals;
    let quota = Quota {
        pages: (fast / u64::from(VCPUS) / 5).max(1) as u32,
        interval_ms: INTERVAL,
    };
    guest.quota(Some(quota))?;
    // The first begins when it was not held yet.
    Harvests::take(&mut guest, 2, INTERVAL)?;
    let held = Harvests::take(&mut guest, HARVESTS, INTERVAL)?;
    let now = guest.status()?;
    ensure!(
        now.stalls.count > 0 && now.stalls.time_us > 0,
        "nobody waited: {:?}",
        now.stalls
    );
    let aim = u64::from(quota.pages) * u64::from(VCPUS) * held.intervals;
    ensure!(
        held.pages <= 2 * aim,
        "{} pages were dirtied where {aim} is the aim; unheld it were {fast} in an interval",
        held.pages
    );
    ensure!(now.write_faults == 0, "{} write faults", now.write_faults);
    guest.quota(None)?;
    guest.nobody_waits()?;
    guest.stop_free()?;
    guest.host.dirty_stop(vm)?;
    guest.host.finish();
    target.still_on()
}

/// What several harvests found, and in how many intervals at most.
struct Harvests {
    pages: u64,
    intervals: u64,
}

impl Harvests {
    /// Takes so many, each of some intervals.
    fn take(guest: &mut OracleGuest, harvests: usize, interval_ms: u32) -> Result<Self> {
        let begun = Instant::now();
        let mut pages = 0;
        for _ in 0..harvests {
            guest.host.client().idle(Duration::from_millis(300))?;
            let harvest = guest.host.take(guest.vm)?;
            guest.host.commit(guest.vm, &harvest)?;
            pages += harvest.pages.len() as u64;
            Throttled::listen(guest)?;
        }
        let quota = Quota {
            pages: 1,
            interval_ms,
        };
        let intervals = intervals(quota, begun.elapsed());
        Ok(Self { pages, intervals })
    }
}

/// A guest whose vCPUs wait is paused, let go on, restarted and stopped like any other.
fn a_stalled_guest_is_handled(script: &mut Script, engine: EngineChoice) -> Result<()> {
    let (target, mut guest) = oracle(script, 2000)?;
    let vm = guest.vm;
    guest.host.dirty_start(vm, engine, Granularity::Page)?;
    guest.quota(Some(NEXT_TO_NOTHING))?;
    guest.start_free(0)?;
    let harvest = |guest: &mut OracleGuest| -> Result<()> {
        // Under DBM it is a harvest that begins it, and one of an interval at least.
        for _ in 0..if engine == EngineChoice::Dbm { 2 } else { 0 } {
            guest.host.client().idle(Duration::from_millis(1100))?;
            let harvest = guest.host.take(vm)?;
            guest.host.commit(vm, &harvest)?;
        }
        Ok(())
    };
    harvest(&mut guest)?;
    let none = Stalls::default();
    guest.until_stalled(none).context("before the pause")?;

    guest.host.client().pause(vm, Hold::Lasting)?;
    // A pause is not the quota's doing.
    guest.nobody_waits().context("paused")?;
    let paused = guest.stalls()?;
    guest.host.client().resume(vm, Hold::Lasting)?;
    guest.until_stalled(paused).context("after the pause")?;

    // Neither is what comes before the next start.
    let restarts = guest.host.info(vm)?.restarts;
    guest.host.client().reset(vm)?;
    // Until it has begun, it runs as well.
    while guest.host.until_running(vm)?.restarts != restarts + 1 {
        Throttled::listen(&mut guest)?;
    }
    guest.quota(None)?;
    guest.nobody_waits().context("let go")?;
    guest.wait(|step| step == Step::Ready)?;

    guest.quota(Some(NEXT_TO_NOTHING))?;
    let restarted = guest.stalls()?;
    guest.host.type_line(vm, "free 0 quiet")?;
    harvest(&mut guest)?;
    guest
        .until_stalled(restarted)
        .context("after the restart")?;
    let state = guest.host.client().stop(vm)?;
    ensure!(state == VmState::Stopped, "it is {state}");
    guest.nobody_waits().context("stopped")?;
    guest.host.dirty_stop(vm)?;
    guest.host.finish();
    target.still_on()
}

/// A Linux that writes hard has both its vCPUs held, and still takes its timer's and its console's
/// interrupts, sends its own, and gets everything done that was begun.
fn linux_goes_on(script: &mut Script) -> Result<()> {
    const QUOTA: Quota = Quota {
        pages: 300,
        interval_ms: 50,
    };
    let bundle = guests::pack([guests::linux("linux", VCPUS, Mib(256))?])?;
    let target = script.start_tidemark("virt", &bundle, "leaves=blocks")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("linux")?;
    host.attach(vm)?;
    host.expect(vm, LINUX_PROMPT).context("no shell")?;
    for vcpu in [1, 2] {
        host.type_line(
            vm,
            &format!("taskset {vcpu} load 32 random 600 0 >/tmp/load{vcpu} &"),
        )?;
        host.expect(vm, LINUX_PROMPT)?;
    }
    host.type_line(
        vm,
        "until grep -q ready /tmp/load1 && grep -q ready /tmp/load2; do sleep 0.1; done; echo is $((40 + 2))",
    )?;
    host.expect(vm, "is 42").context("the load does not run")?;
    for engine in [EngineChoice::WriteProtect, EngineChoice::Dbm] {
        host.dirty_start(vm, engine, Granularity::Page)?;
        host.client().set_quota(vm, Some(QUOTA))?;
        for round in 1..=6 {
            let harvest = host.take(vm)?;
            host.commit(vm, &harvest)?;
            host.type_line(vm, &format!("sleep 0.2; echo slept $((100 * {round}))"))?;
            host.expect(vm, &format!("slept {}", 100 * round))
                .with_context(|| format!("{engine:?}, round {round}"))?;
        }
        let stalls = host.dirty_status(vm)?.stalls;
        ensure!(stalls.count > 0, "{engine:?}: nobody waited");
        host.client().set_quota(vm, None)?;
        host.dirty_stop(vm)?;
    }
    let timers = |host: &mut Host| -> Result<Vec<u64>> {
        host.type_line(
            vm,
            "grep arch_timer /proc/interrupts; echo the $((40 + 2)) are",
        )?;
        let said = host.expect(vm, "the 42 are")?;
        let line = said.lines().find(|line| line.contains("GIC"));
        let words = line.unwrap_or_default().split_whitespace();
        Ok(words.filter_map(|word| word.parse().ok()).take(2).collect())
    };
    let before = timers(&mut host)?;
    host.type_line(vm, "sleep 1; echo slept again $((40 + 2))")?;
    host.expect(vm, "again 42")?;
    let after = timers(&mut host)?;
    ensure!(
        before.len() == 2
            && before
                .iter()
                .zip(&after)
                .all(|(before, after)| before < after),
        "a vCPU has lost its timer: {before:?}, then {after:?}"
    );
    host.finish();
    target.still_on()
}

fn out_of_bounds(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, "leaves=blocks")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    for (pages, interval_ms) in [(0, 100), (1, 9), (1, 1001), (u32::MAX, u32::MAX), (0, 0)] {
        let quota = Quota { pages, interval_ms };
        match host.client().set_quota(vm, Some(quota)) {
            Err(Error::Target {
                reply: ErrorReply::BadQuota,
                ..
            }) => {}
            other => anyhow::bail!("{quota:?} was answered by {other:?}"),
        }
        let status = host.dirty_status(vm)?;
        ensure!(status.quota.is_none(), "{:?} is in force", status.quota);
    }
    for (pages, interval_ms) in [(1, 10), (u32::MAX, 1000), (7, 33)] {
        let quota = Some(Quota { pages, interval_ms });
        host.client().set_quota(vm, quota)?;
        ensure!(host.dirty_status(vm)?.quota == quota, "{quota:?} is lost");
    }
    // It has nothing to do with a session.
    host.finish();
    let mut host = Host::connect(target)?;
    ensure!(
        host.dirty_status(vm)?.quota.is_some(),
        "it went with the host"
    );
    host.finish();
    target.still_on()
}
