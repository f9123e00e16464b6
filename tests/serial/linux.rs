//! Programs nobody here wrote: Debian's kernel to a shell, reset and off; U-Boot.

use anyhow::{Context, Result, ensure};
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;

use crate::case::Case;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("linux_two_vcpus_to_shell", 90, two_vcpus_to_shell),
        Case::new("linux_reset_and_off", 120, reset_and_off),
        Case::new("more_vcpus_than_cpus", 150, more_vcpus_than_cpus),
        Case::new("uboot_to_prompt", 60, uboot_to_prompt),
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
    let said = said.split_once('\n').map_or("", |(_, said)| said);
    Ok(said.replace('\r', ""))
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

fn uboot_to_prompt(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::uboot()?])?;
    let target = script.start_tidemark("virt", &bundle, "console=uboot poweroff=idle")?;
    target.expect("U-Boot 20").context("U-Boot did not start")?;
    target.booted();
    target
        .expect("Hit any key to stop autoboot")
        .context("U-Boot did not get that far")?;
    target.line().send(" ")?;
    target.expect("=> ").context("no U-Boot prompt")?;
    target.type_line("bdinfo")?;
    let said = target.expect("=> ")?;
    ensure!(
        said.contains("0x0000000040000000"),
        "U-Boot sees no RAM at 0x40000000: {said:?}"
    );
    target.type_line("poweroff")?;
    target.powered_off()
}
