//! What a pause does to a guest's time: nothing, or, if the guest is to notice, all of it.
//!
//! No timing decides: what the guest saw pass is compared with its real-time clock, which goes on, and a pause is at least as long as
//! the script sleeps.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::script::Script;
use tidemark_wire::bundle::Clock;
use tidemark_wire::message::{Hold, VmId};

use crate::case::Case;

/// How long the pauses are at least: longer than the guest's timers are set ahead.
const PAUSE: Duration = Duration::from_secs(8);
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
    ]
}

fn pause(host: &mut Host, vm: VmId) -> Result<()> {
    host.client().pause(vm, Hold::Lasting)?;
    thread::sleep(PAUSE);
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
        pause(&mut host, vm)?;
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
