//! What a pause does to a guest's time: nothing, or, if the guest is to notice, all of it.
//!
//! No timing decides: what the guest saw pass is compared with its real-time clock, which goes on, and a pause is at least as long as
//! the script sleeps.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::script::Script;
use tidemark_wire::bundle::Clock;
use tidemark_wire::message::{Hold, VmId};

use crate::case::Case;
use crate::linux;

/// How long the pauses are at least: longer than the guest's timers are set ahead.
const PAUSE: Duration = Duration::from_secs(8);
/// The same of Linux: longer than it waits until it complains.
const LONG_PAUSE: Duration = Duration::from_secs(12);
/// Linux waits 10 s for a CPU to pass through RCU, and as long for its watchdog's task: less than the pause, and more than a busy
/// machine keeps it from running.
const LINUX_COMPLAINS: &str = "rcupdate.rcu_cpu_stall_timeout=10 watchdog_thresh=5";
/// What two readings of a clock in whole seconds may be wrong by.
const ROUNDING: u64 = 2;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("pause_stops_all_clocks_but_one", 120, |script| {
            counters(script, "virt", Clock::Stop)
        }),
        Case::new("pause_stops_all_clocks_on_one_cpu", 180, |script| {
            counters(script, "virt-smp1", Clock::Stop)
        }),
        Case::new("pause_with_running_clocks", 120, |script| {
            counters(script, "virt", Clock::Run)
        }),
        Case::new("linux_does_not_notice_a_pause", 180, |script| {
            linux(script, Clock::Stop)
        }),
        Case::new("linux_with_running_clock_notices_a_pause", 180, |script| {
            linux(script, Clock::Run)
        }),
    ]
}

fn pause(host: &mut Host, vm: VmId, time: Duration) -> Result<()> {
    host.client().pause(vm, Hold::Lasting)?;
    thread::sleep(time);
    host.client().resume(vm, Hold::Lasting)?;
    Ok(())
}

/// The number after `name` in what was said.
fn number(said: &str, name: &str) -> Result<u64> {
    let mut words = said.split_whitespace().skip_while(|word| *word != name);
    let value = words
        .nth(1)
        .with_context(|| format!("no {name}: {said:?}"))?;
    value.parse().with_context(|| format!("{name} {value:?}"))
}

/// Checks what passed by a clock that stands still in a pause or does not, beside the real one. In seconds.
fn judge(clock: Clock, what: &str, passed: u64, real: u64) -> Result<()> {
    let away = real.saturating_sub(passed);
    match clock {
        Clock::Stop => ensure!(
            away + ROUNDING >= PAUSE.as_secs(),
            "{what} went on for {passed} s of {real} s, {PAUSE:?} of them a pause"
        ),
        Clock::Run => ensure!(
            away <= ROUNDING && passed + ROUNDING >= PAUSE.as_secs(),
            "{what} went on for {passed} s of {real} s"
        ),
    }
    Ok(())
}

/// Counters and timers of a guest that looks at them all the time, and of one that waits; twice, so that offsets add up.
fn counters(script: &mut Script, machine: &str, clock: Clock) -> Result<()> {
    let mut guest = guests::hostile(2, Mib(64))?;
    guest.clock = clock;
    let target = script.start_tidemark(machine, &guests::pack([guest])?, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("hostile")?;
    host.until_running(vm)?;
    host.attach(vm)?;
    host.expect(vm, "el=1")?;
    for command in ["clocks", "clocks-waiting", "clocks"] {
        host.type_line(vm, command)?;
        host.expect(vm, "clocks: armed")?;
        pause(&mut host, vm, PAUSE)?;
        host.expect(vm, "clocks: ")?;
        let said = host.expect(vm, "done")?;
        let real = number(&said, "real")?;
        for counter in ["virtual", "physical"] {
            judge(clock, counter, number(&said, counter)? / 1000, real)?;
        }
        for fault in ["early", "behind"] {
            ensure!(number(&said, fault)? == 0, "{command}: {said}");
        }
    }
    host.finish();
    target.still_on()
}

/// A Linux that is paused while it works on both vCPUs. Its watchdogs see nothing of it, or, with a clock that runs on, do.
fn linux(script: &mut Script, clock: Clock) -> Result<()> {
    let options = format!("{} {LINUX_COMPLAINS}", guests::LINUX_COMMAND_LINE);
    let mut guest = guests::linux_with("linux", 2, Mib(256), &options)?;
    guest.clock = clock;
    let target = script.start_tidemark("virt", &guests::pack([guest])?, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("linux")?;
    host.attach(vm)?;
    host.expect(vm, LINUX_PROMPT).context("no shell")?;
    for (file, seconds) in [
        (
            "/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout",
            "10",
        ),
        ("/proc/sys/kernel/watchdog_thresh", "5"),
    ] {
        let said = linux::said(&mut host, vm, &format!("cat {file}"))?;
        ensure!(said.trim() == seconds, "{file} is {said:?}");
    }
    // Processes come and go on each vCPU, so that RCU always waits for one.
    let work = "for n in 1 2; do taskset $n sh -c 'while :; do ( : ); done' & done";
    linux::said(&mut host, vm, work)?;
    linux::said(&mut host, vm, "dmesg -c >/dev/null")?;
    if clock == Clock::Run {
        // Its complaints on the console are for whoever does not expect them.
        linux::said(&mut host, vm, "echo 0 >/proc/sys/kernel/printk")?;
    }
    // The real clock is read first and last, so that a guest that is kept waiting in between seems the longer away.
    let before = linux::said(&mut host, vm, &format!("{REAL}; cat /proc/uptime"))?;
    pause(&mut host, vm, LONG_PAUSE)?;
    let after = linux::said(&mut host, vm, &format!("cat /proc/uptime; {REAL}"))?;
    let (before, after) = (words(&before)?, words(&after)?);
    let (real, passed) = (after[2] - before[0], after[0] - before[1]);
    let paused = LONG_PAUSE.as_secs_f64();
    ensure!(
        real + WHOLE >= paused,
        "the real-time clock went on for {real} s in {LONG_PAUSE:?}"
    );
    // A watchdog looks again within its time.
    let complaints = "sleep 6; dmesg | grep -ciE 'stall|lockup|hung|bug:|warn'";
    let complaints = linux::said(&mut host, vm, complaints)?;
    match clock {
        Clock::Stop => {
            ensure!(
                real - passed + WHOLE >= paused,
                "Linux was up for {passed} s of {real} s, {LONG_PAUSE:?} of them a pause"
            );
            ensure!(
                complaints.trim() == "0",
                "Linux has {complaints:?} complaints"
            );
        }
        Clock::Run => {
            ensure!(
                passed >= paused,
                "Linux was up for {passed} s, and the pause alone took {LONG_PAUSE:?}"
            );
            ensure!(
                complaints.trim() != "0",
                "Linux does not complain, so it would not of a clock that is to stand still"
            );
        }
    }
    host.finish();
    target.still_on()
}

/// What the difference of two readings in whole seconds may be wrong by.
const WHOLE: f64 = 1.0;
/// Prints the real-time clock's seconds.
const REAL: &str = "cat /sys/class/rtc/rtc0/since_epoch";

/// Three numbers.
fn words(said: &str) -> Result<[f64; 3]> {
    let mut numbers = [0.0; 3];
    let mut words = said.split_whitespace();
    for number in &mut numbers {
        let word = words
            .next()
            .with_context(|| format!("no three numbers: {said:?}"))?;
        *number = word
            .parse()
            .with_context(|| format!("{word:?} of {said:?}"))?;
    }
    Ok(numbers)
}
