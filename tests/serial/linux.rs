//! Programs nobody here wrote: Debian's kernel to a shell, reset and off, and under a hundred logs.

use anyhow::{Context, Result, ensure};
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::message::{EngineChoice, Granularity, VmId};

use crate::case::Case;

/// Logs that are started and stopped one after the other.
const LOGS: u64 = 100;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("linux_two_vcpus_to_shell", 90, two_vcpus_to_shell),
        Case::new("linux_reset_and_off", 120, reset_and_off),
        Case::new("linux_logs_come_and_go", 240, logs_come_and_go),
        Case::new("more_vcpus_than_cpus", 150, more_vcpus_than_cpus),
    ]
}

/// Boots Linux with the plain terminal attached to it and waits for its shell.
fn boot(script: &mut Script, vcpus: u8) -> Result<&mut Target> {
    let bundle = guests::pack([guests::linux("linux", vcpus, Mib(512))?])?;
    let target = script.start_tidemark("virt", &bundle, "console=linux poweroff=idle")?;
    target
        .expect("Booting Linux")
        .context("the kernel did not start")?;
    target.booted();
    target.expect(LINUX_PROMPT).context("no shell")?;
    Ok(target)
}

/// Types a command into Linux and returns what it printed.
fn answer(target: &Target, command: &str) -> Result<String> {
    target.type_line(command)?;
    let said = target
        .expect(LINUX_PROMPT)
        .with_context(|| format!("no answer to `{command}`"))?;
    let said = said.replace('\r', "");
    // The kernel may have had something to say in front of the command's echo.
    let echo = format!("{command}\n");
    let answer = said.split_once(&echo).or_else(|| said.split_once('\n'));
    Ok(answer.map_or("", |(_, answer)| answer).to_owned())
}

fn two_vcpus_to_shell(script: &mut Script) -> Result<()> {
    let target = boot(script, 2)?;
    let count = answer(target, "nproc")?;
    ensure!(count.trim() == "2", "nproc printed {count:?}");
    // The answer is not in what was typed, so an echo cannot pass for it.
    let sum = answer(target, "echo sum $((6 * 7))")?;
    ensure!(sum.contains("sum 42"), "the shell answered {sum:?}");
    // Both vCPUs take their timer interrupts.
    let timers = answer(target, "grep arch_timer /proc/interrupts")?;
    let counts: Vec<u64> = timers
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    ensure!(
        counts.len() >= 2 && counts.iter().take(2).all(|&count| count > 0),
        "{timers:?}"
    );
    target.type_line("poweroff -f")?;
    target.powered_off()
}

fn reset_and_off(script: &mut Script) -> Result<()> {
    let target = boot(script, 2)?;
    // What is written before the reset must be gone after it: the initramfs is new.
    answer(target, "echo here > /before")?;
    target.type_line("reboot -f")?;
    target
        .expect("Booting Linux")
        .context("no second boot after SYSTEM_RESET")?;
    target.expect(LINUX_PROMPT).context("no second shell")?;
    let before = answer(target, "ls /before")?;
    ensure!(
        before.contains("No such file"),
        "the reset kept memory: {before:?}"
    );
    let count = answer(target, "nproc")?;
    ensure!(
        count.trim() == "2",
        "after the reset nproc printed {count:?}"
    );
    target.type_line("poweroff -f")?;
    target.powered_off()
}

/// Linux under load while logs of every kind come and go: what it wrote is found each time, and it does
/// not notice. Whether all of it is found is for the oracle and the copies to say.
fn logs_come_and_go(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::linux("linux", 2, Mib(256))?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("linux")?;
    host.attach(vm)?;
    host.expect(vm, LINUX_PROMPT).context("no shell")?;
    // Between the lines that are compared below the kernel says nothing.
    said(&mut host, vm, "dmesg -n 1")?;
    said(&mut host, vm, "load 32 random 16 >/tmp/load &")?;
    let until_ready = "until grep -q ready /tmp/load; do sleep 0.1; done";
    said(&mut host, vm, until_ready).context("the load does not run")?;
    // Memory that nothing writes while the logs split and join the blocks around it.
    let sum = "dd if=/dev/urandom of=/tmp/file bs=1M count=8 2>/dev/null; md5sum /tmp/file";
    let before = said(&mut host, vm, sum)?;
    ensure!(before.contains("/tmp/file"), "no sum: {before:?}");
    for number in 1..=LOGS {
        let (engine, granularity) = match number % 5 {
            0 => (EngineChoice::Dbm, Granularity::Page),
            1 => (EngineChoice::WriteProtect, Granularity::Adaptive),
            2 => (EngineChoice::Dbm, Granularity::Adaptive),
            3 => (EngineChoice::WriteProtect, Granularity::Page),
            _ => (EngineChoice::Auto, Granularity::Block),
        };
        one_log(&mut host, vm, engine, granularity).with_context(|| format!("log {number}"))?;
    }
    let after = said(&mut host, vm, "md5sum /tmp/file")?;
    ensure!(after == before, "the file was {before:?} and is {after:?}");
    let lines = said(
        &mut host,
        vm,
        "pidof load >/dev/null && echo runs $((40 + 2))",
    )?;
    ensure!(lines.contains("runs 42"), "the load is gone: {lines:?}");
    let complaints = said(&mut host, vm, "dmesg | grep -ciE 'bug:|oops|stall|corrupt'")?;
    ensure!(complaints.trim() == "0", "Linux complains: {complaints:?}");
    host.finish();
    target.still_on()
}

/// A log in which the guest was seen to write.
fn one_log(
    host: &mut Host,
    vm: VmId,
    engine: EngineChoice,
    granularity: Granularity,
) -> Result<()> {
    const TRIES: usize = 100;
    host.dirty_start(vm, engine, granularity)?;
    for _ in 0..TRIES {
        let harvest = host.take(vm)?;
        host.commit(vm, &harvest)?;
        if !harvest.pages.is_empty() {
            return host.dirty_stop(vm);
        }
    }
    anyhow::bail!("{TRIES} harvests found nothing")
}

/// Types a command into Linux over the channel and returns what it printed.
pub fn said(host: &mut Host, vm: VmId, command: &str) -> Result<String> {
    host.type_line(vm, command)?;
    let said = host
        .expect(vm, LINUX_PROMPT)
        .with_context(|| format!("no answer to `{command}`"))?;
    let said = said.split_once('\n').map_or("", |(_, said)| said);
    Ok(said.replace('\r', ""))
}

fn more_vcpus_than_cpus(script: &mut Script) -> Result<()> {
    let target = boot(script, 4)?;
    let count = answer(target, "nproc")?;
    ensure!(count.trim() == "4", "nproc printed {count:?}");
    // Every vCPU spins; the shell and its timer must get their slices all the same.
    answer(
        target,
        "for n in 1 2 3 4; do taskset $((1 << (n - 1))) sh -c 'while :; do :; done' & done",
    )?;
    let said = answer(target, "sleep 1; echo slept $((40 + 2))")?;
    ensure!(said.contains("slept 42"), "the shell answered {said:?}");
    target.type_line("poweroff -f")?;
    target.powered_off()
}
