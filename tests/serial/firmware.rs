//! Firmware that nobody here wrote, from its flash: U-Boot and EDK2, and what they keep there over a reset.

use anyhow::{Context, Result, ensure};
use tidemark_tests::guests::{self, LINUX_PROMPT};
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::bundle::VmDraft;

use crate::case::Case;

const UBOOT_PROMPT: &str = "=> ";
const SHELL_PROMPT: &str = "Shell> ";

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("uboot_to_prompt", 60, uboot_to_prompt),
        Case::new("uboot_keeps_its_environment", 120, uboot_keeps),
        Case::new("uboot_is_given_its_environment", 120, uboot_is_given),
        Case::new(
            "uboot_finds_nothing_behind_fw_cfg",
            120,
            uboot_finds_nothing,
        ),
        // EDK2's release build says its name and then nothing until it has made and saved its variables.
        Case::new("edk2_to_shell", 180, edk2_to_shell).silent(60),
        Case::new("edk2_keeps_its_variables", 300, edk2_keeps).silent(60),
        // And while it reads 35 MB by eights.
        Case::new("edk2_starts_linux", 300, edk2_starts_linux).silent(120),
    ]
}

/// Waits for U-Boot's prompt.
fn uboot_prompt(target: &Target) -> Result<()> {
    target.expect("U-Boot 20").context("U-Boot did not start")?;
    target
        .expect("Hit any key to stop autoboot")
        .context("U-Boot did not get that far")?;
    target.line().send(" ")?;
    target.expect(UBOOT_PROMPT).context("no U-Boot prompt")?;
    Ok(())
}

/// Types a command and returns what was said until the next prompt.
fn said(target: &Target, command: &str, prompt: &str) -> Result<String> {
    target.type_line(command)?;
    target
        .expect(prompt)
        .with_context(|| format!("no answer to `{command}`"))
}

fn uboot(script: &mut Script, guest: VmDraft) -> Result<&mut Target> {
    let bundle = guests::pack([guest])?;
    let target = script.start_tidemark("virt", &bundle, "console=uboot poweroff=idle")?;
    uboot_prompt(target)?;
    target.booted();
    Ok(target)
}

fn uboot_to_prompt(script: &mut Script) -> Result<()> {
    let target = uboot(script, guests::uboot()?)?;
    let said = said(target, "bdinfo", UBOOT_PROMPT)?;
    ensure!(
        said.contains("0x0000000040000000"),
        "U-Boot sees no RAM at 0x40000000: {said:?}"
    );
    target.type_line("poweroff")?;
    target.powered_off()
}

/// U-Boot finds both banks, and what it writes into the second is there after a reset; the first is its own code.
fn uboot_keeps(script: &mut Script) -> Result<()> {
    let target = uboot(script, guests::uboot()?)?;
    let banks = said(target, "flinfo 1; flinfo 2", UBOOT_PROMPT)?;
    ensure!(
        banks
            .matches("Intel Extended command set, Manufacturer ID: 0x89")
            .count()
            == 2,
        "U-Boot does not find two banks: {banks:?}"
    );
    // U-Boot does not look at the chips' errors, so what it says of this is nothing to go by.
    let write = "protect off all; cp.b 40000000 100000 100";
    said(target, write, UBOOT_PROMPT)?;
    let code = said(target, "md.l 100000 1", UBOOT_PROMPT)?;
    ensure!(code.contains("ffffffff"), "its code was written: {code:?}");
    let saved = said(target, "setenv tide kept$?42; saveenv", UBOOT_PROMPT)?;
    ensure!(
        saved.contains("Erased 2 sectors") && !saved.contains("Failed"),
        "the environment was not saved: {saved:?}"
    );
    target.type_line("reset")?;
    uboot_prompt(target)?;
    let kept = said(target, "printenv tide", UBOOT_PROMPT)?;
    ensure!(kept.contains("tide=kept"), "it was not kept: {kept:?}");
    target.type_line("poweroff")?;
    target.powered_off()
}

/// Variables that come with the bundle are there at the first start; what U-Boot makes of them is there at the next.
fn uboot_is_given(script: &mut Script) -> Result<()> {
    // Without a command to boot by it would not wait for a key.
    let variables = ["bootdelay=2", "bootcmd=true", "tide=given"];
    let guest = guests::uboot_with(&variables)?;
    let target = uboot(script, guest)?;
    let given = said(target, "printenv tide", UBOOT_PROMPT)?;
    ensure!(given.contains("tide=given"), "it was not given: {given:?}");
    said(target, "setenv tide kept; saveenv", UBOOT_PROMPT)?;
    target.type_line("reset")?;
    uboot_prompt(target)?;
    let kept = said(target, "printenv tide", UBOOT_PROMPT)?;
    ensure!(kept.contains("tide=kept"), "it was not kept: {kept:?}");
    target.type_line("poweroff")?;
    target.powered_off()
}

/// The rest of the page that `fw_cfg` begins is nothing.
fn uboot_finds_nothing(script: &mut Script) -> Result<()> {
    let target = uboot(script, guests::uboot()?)?;
    let last = said(target, "md.l 9020014 1", UBOOT_PROMPT)?;
    ensure!(last.contains("09020014: "), "no fw_cfg: {last:?}");
    target.type_line("md.l 9020018 1")?;
    target
        .expect("\"Synchronous Abort\" handler")
        .context("something answers behind fw_cfg")?;
    uboot_prompt(target)?;
    target.type_line("poweroff")?;
    target.powered_off()
}

/// EDK2 up to its shell.
fn edk2(script: &mut Script) -> Result<&mut Target> {
    let bundle = guests::pack([guests::edk2()?])?;
    let target = script.start_tidemark("virt", &bundle, "console=edk2 poweroff=idle")?;
    target
        .expect("UEFI firmware")
        .context("EDK2 did not start")?;
    target.booted();
    target.expect(SHELL_PROMPT).context("no UEFI shell")?;
    Ok(target)
}

fn edk2_to_shell(script: &mut Script) -> Result<()> {
    let target = edk2(script)?;
    let map = said(target, "memmap", SHELL_PROMPT)?;
    ensure!(
        map.contains("0000000004000000-0000000007FFFFFF"),
        "EDK2 does not know the flash of its variables: {map:?}"
    );
    ensure!(
        map.contains("128 MB (134,217,728 Bytes)"),
        "EDK2 does not see its 128 MiB: {map:?}"
    );
    target.type_line("reset -s")?;
    target.powered_off()
}

/// A variable that is to last does, and one that is not does not.
fn edk2_keeps(script: &mut Script) -> Result<()> {
    let target = edk2(script)?;
    said(target, "set tide kept42", SHELL_PROMPT)?;
    said(target, "set -v ebb gone42", SHELL_PROMPT)?;
    let there = said(target, "set ebb", SHELL_PROMPT)?;
    ensure!(there.contains("gone42"), "not set: {there:?}");
    target.type_line("reset")?;
    target
        .expect("UEFI firmware")
        .context("no second start after the reset")?;
    target.expect(SHELL_PROMPT).context("no second shell")?;
    let kept = said(target, "set tide", SHELL_PROMPT)?;
    ensure!(kept.contains("kept42"), "not kept: {kept:?}");
    let gone = said(target, "set ebb", SHELL_PROMPT)?;
    ensure!(!gone.contains("gone42"), "kept: {gone:?}");
    target.type_line("reset -s")?;
    target.powered_off()
}

/// EDK2 asks `fw_cfg` for Debian's kernel and starts it by its EFI stub, with initrd and command line.
fn edk2_starts_linux(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::linux_by_edk2()?])?;
    let target = script.start_tidemark("virt", &bundle, "console=edk2 poweroff=idle")?;
    target
        .expect("UEFI firmware")
        .context("EDK2 did not start")?;
    // What follows takes longer than a boot may.
    target.booted();
    target
        .expect("EFI stub: Exiting boot services")
        .context("EDK2 did not start the kernel")?;
    let log = target.expect(LINUX_PROMPT).context("no shell")?;
    ensure!(
        log.contains("efi: EFI v2.7 by EDK II"),
        "Linux knows nothing of its firmware: {log:?}"
    );
    let count = said(target, "nproc", LINUX_PROMPT)?;
    ensure!(count.contains("\r\n2\r\n"), "nproc printed {count:?}");
    target.type_line("poweroff -f")?;
    target.powered_off()
}
