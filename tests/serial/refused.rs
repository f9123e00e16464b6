//! What the machine cannot do, or does only once: it says so, and goes on.

use anyhow::{Result, bail, ensure};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::script::Script;
use tidemark_wire::bundle::VmDraft;
use tidemark_wire::message::{ErrorReply, Request, Response, VmId, VmState};
use tidemark_wire::{CONSOLE_WRITE_MAX, PROTOCOL};

use crate::bad_input::{errors_about, no_guest_runs, put, shell_answers, start_oracle};
use crate::case::Case;
use crate::raw::Raw;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel_of_pages_that_the_cpus_lack", 40, kernel_of_pages),
        Case::new("vm_without_memory_is_named", 60, vm_without_memory),
        Case::new("console_input_too_long", 60, console_input_too_long),
        Case::new(
            "resets_of_a_starting_guest_add_nothing",
            120,
            resets_while_starting,
        ),
    ]
}

/// A kernel built for pages of 16 KiB, on a Cortex-A72, which has none.
fn kernel_of_pages(script: &mut Script) -> Result<()> {
    let mut kernel = vec![0; 8192];
    put(&mut kernel, 24, &[0b1100])?;
    put(&mut kernel, 0x38, b"ARM\x64")?;
    let kernel = guests::of_kernel("sixteen", 1, Mib(32), (kernel, None), "")?;
    let target = script.start_tidemark("virt-a72", &guests::pack([kernel])?, "")?;
    target.to_prompt()?;
    let list = target.shell_until("list", "failed")?;
    ensure!(list.contains("pages of 16 KiB"), "{list}");
    no_guest_runs(target)
}

/// What the machine has no memory for is in the list, with what it lacks, and keeps its number.
fn vm_without_memory(script: &mut Script) -> Result<()> {
    let large = VmDraft {
        name: "large".into(),
        ..guests::oracle(1, Mib(64 << 10))?
    };
    let bundle = guests::pack([large, guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let list = target.shell_until("list", "running")?;
    ensure!(
        list.contains("65536 MiB are not free"),
        "the list does not say what it lacks: {list}"
    );
    ensure!(
        errors_about(target, "large: 65536 MiB are not free") == 1,
        "the log does not say it once"
    );
    let mut host = Host::connect(target)?;
    let vm = host.vm("large")?;
    ensure!(vm == VmId(0), "it is VM {vm}");
    let info = host.info(vm)?;
    ensure!(
        info.summary.state == VmState::Failed && info.reason.contains("65536 MiB"),
        "it is {}: {}",
        info.summary.state,
        info.reason
    );
    match host.client().reset(vm) {
        Err(tidectl::Error::Target {
            reply: ErrorReply::BadState(VmState::Failed),
            ..
        }) => {}
        other => bail!("a VM without memory was reset: {other:?}"),
    }
    host.finish();
    let said = target.shell("start large")?;
    ensure!(
        said.contains("65536 MiB are not free"),
        "`start` does not say why: {said}"
    );
    shell_answers(target)
}

/// No more console input is taken at once than is documented.
fn console_input_too_long(script: &mut Script) -> Result<()> {
    let target = start_oracle(script)?;
    let mut raw = Raw::connect(target, 0x2727);
    raw.works(&["oracle"])?;
    let data = [b' '; CONSOLE_WRITE_MAX + 1];
    for len in [data.len(), CONSOLE_WRITE_MAX] {
        let request = Request::ConsoleWrite {
            vm: VmId(0),
            offset: 0,
            data: data.get(..len).unwrap_or_default(),
        };
        raw.ask(&request, |response| match response {
            Response::Error(ErrorReply::OutOfRange) if len > CONSOLE_WRITE_MAX => Ok(()),
            Response::ConsoleAccepted { next_offset } if next_offset == len as u64 => Ok(()),
            other => bail!("{len} bytes of input were answered {other:?}"),
        })?;
    }
    raw.close()?;
    shell_answers(target)
}

/// A guest that is being started begins anew as it is.
fn resets_while_starting(script: &mut Script) -> Result<()> {
    // Large enough for the requests to come while it is cleared.
    let bundle = guests::pack([guests::oracle(1, Mib(256))?])?;
    let target = script.start_tidemark("virt", &bundle, "autostart=no")?;
    target.to_prompt()?;
    target.shell("start oracle")?;
    let mut raw = Raw::connect(target, 0x2828);
    raw.hello(PROTOCOL)?
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    for _ in 0..3 {
        let reset = Request::Reset {
            vm: VmId(0),
            restarts: 0,
        };
        raw.ask(&reset, |response| match response {
            Response::State(VmState::Starting) => Ok(()),
            other => bail!("the reset was answered {other:?}: it came too late"),
        })?;
    }
    raw.close()?;
    target.shell_until("list", "running")?;
    let info = target.shell("info oracle")?;
    ensure!(info.contains("restarted 0 times"), "{info}");
    shell_answers(target)
}
