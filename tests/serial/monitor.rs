//! `tidectl monitor` as people run it, where the line is bad.

use anyhow::{Context, Result, ensure};
use std::process::{Command, Stdio};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::relay::Damage;
use tidemark_tests::script::Script;

use crate::case::Case;

/// One byte in so many is another one at the other end.
const ONE_IN: u64 = 1000;

pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "monitor_on_a_damaged_line",
        240,
        on_a_damaged_line,
    )]
}

/// What it prints is what the guest printed, from the first byte on, and the damage is named.
fn on_a_damaged_line(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::linux("linux", 1, Mib(256))?])?;
    let damage = Damage::new(script.seed(), ONE_IN);
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    target.line().damage(Some(damage));
    let output = Command::new(Artifact::Tidectl.path()?)
        .args(["--port", &target.port(), "monitor", "linux", "--history"])
        .args(["--until", LINUX_PROMPT, "--deadline", "200s"])
        .stdin(Stdio::null())
        .output()
        .context("tidectl")?;
    target.line().damage(None);
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "it ended with {}: {words}",
        output.status
    );

    // The same again, over a line that is good.
    target.settle_shell()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("linux")?;
    let mut printed = Vec::new();
    loop {
        let (offset, data) = host.client().read_console(vm, printed.len() as u64)?;
        ensure!(
            offset == printed.len() as u64,
            "the machine has forgotten what the guest said first"
        );
        if data.is_empty() {
            break;
        }
        printed.extend(data);
    }
    let differ = output.stdout.iter().zip(&printed).position(|(a, b)| a != b);
    ensure!(
        printed.starts_with(&output.stdout),
        "of {} bytes, the one at {differ:?} is not the guest's",
        output.stdout.len()
    );
    ensure!(
        words.contains("frames came damaged"),
        "it does not name the damage: {words}"
    );
    let shown = String::from_utf8_lossy(&output.stdout);
    for line in shown.lines().map(str::trim).filter(|line| line.len() > 20) {
        ensure!(!words.contains(line), "it prints {line:?} twice: {words}");
    }
    host.finish();
    target.still_on()
}
