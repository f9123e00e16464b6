//! The image alone: it comes up on each machine, knows what the CPUs can do, and talks
//! to a person on a plain terminal.

use anyhow::{Context, Result, ensure};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;

use crate::case::Case;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("boots_without_a_bundle", 40, boots_without_a_bundle),
        Case::new("entered_at_el1", 30, entered_at_el1),
        Case::new("plain_terminal_shell_help", 60, plain_terminal_shell_help),
    ]
}

fn boots_without_a_bundle(script: &mut Script) -> Result<()> {
    let payload = Payload::kernel(Artifact::Image.path()?);
    let target = script.start("virt", &payload)?;
    target.to_prompt()?;
    let help = target.shell("help")?;
    ensure!(
        help.contains("list"),
        "`help` does not name `list`: {help:?}"
    );
    target.still_on()
}

fn entered_at_el1(script: &mut Script) -> Result<()> {
    let payload = Payload::kernel(Artifact::Image.path()?);
    let target = script.start("virt-el1", &payload)?;
    let said = target.ended().context("the image does not stop at EL1")?;
    ensure!(
        said.contains("EL1"),
        "it does not say where it was entered: {said:?}"
    );
    ensure!(
        said.contains("virtualization=on"),
        "it does not say what to change: {said:?}"
    );
    let lines = said.lines().filter(|line| !line.trim().is_empty()).count();
    ensure!(lines <= 3, "{lines} lines where one says it: {said:?}");
    Ok(())
}

fn plain_terminal_shell_help(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::oracle(2, Mib(64))?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let help = target.shell("help")?;
    for command in ["list", "info", "dirty"] {
        ensure!(
            help.contains(command),
            "`help` does not name `{command}`: {help:?}"
        );
    }
    let list = target.shell("list")?;
    ensure!(
        list.contains("oracle") && list.contains("running"),
        "`list` says {list:?}"
    );
    let info = target.shell("info oracle")?;
    ensure!(
        info.contains("64 MiB"),
        "`info oracle` does not tell the memory: {info:?}"
    );
    target.shell("dirty status oracle")?;
    let unknown = target.shell("frobnicate")?;
    ensure!(
        unknown.contains("help"),
        "an unknown command does not point to help: {unknown:?}"
    );
    let nobody = target.shell("info nobody")?;
    ensure!(nobody.contains("nobody"), "`info nobody` says {nobody:?}");
    // A person sees text only: nothing binary until a program says Hello.
    let (frames, bad) = target.line().frames();
    ensure!(
        frames == 0 && bad == 0,
        "{frames} frames and {bad} bad ones on a plain terminal"
    );
    ensure!(
        target.line().text().is_ascii(),
        "there are bytes on the line that are not text"
    );
    target.still_on()
}
