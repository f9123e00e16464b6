//! A guest that does what no guest may: it gets the architected exceptions, and EL2 stays.
//!
//! The guest judges for itself (`crates/guests`, `hostile`); here is checked that it judged everything
//! and that the machine, the other guests and the host notice nothing of it.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use tidemark_guests::pattern::{Config, Gfn, Seed};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::oracle::{self, Pages};
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::message::{EngineChoice, Granularity, VmId, VmInfo, VmState};

use crate::case::Case;

/// Fewer cases than this are not the whole list.
const AT_LEAST: usize = 58;
/// The same of those that a guest with firmware has.
const FIRMWARE_AT_LEAST: usize = 9;

/// The bank of flash that holds variables, and a sector of it, in pages.
const VARIABLES: Range<u64> = 0x4000..0x8000;
const SECTOR: u64 = 0x40;

pub fn cases() -> Vec<Case> {
    let judged = vec![
        Case::new("hostile_max", 60, |script| hostile(script, "virt", None)),
        Case::new("hostile_a76", 60, |script| {
            hostile(script, "virt-a76", None)
        }),
        Case::new("hostile_a72", 60, |script| {
            hostile(script, "virt-a72", None)
        }),
        // Both vCPUs on one CPU: each case is switched out and in.
        Case::new("hostile_max_one_cpu", 120, |script| {
            hostile(script, "virt-smp1", None)
        }),
        // The same while its memory is tracked: faults of its own and of the log's meet.
        Case::new("hostile_max_tracked_by_dbm", 60, |script| {
            hostile(script, "virt", Some(EngineChoice::Dbm))
        }),
        Case::new("hostile_a76_tracked_by_wp", 60, |script| {
            hostile(script, "virt-a76", Some(EngineChoice::WriteProtect))
        }),
    ];
    let by_firmware = [
        Case::new("hostile_firmware_max", 120, |script| {
            firmware(script, "virt", EngineChoice::Dbm)
        }),
        Case::new("hostile_firmware_a72", 120, |script| {
            firmware(script, "virt-a72", EngineChoice::WriteProtect)
        }),
        Case::new("hostile_firmware_one_cpu", 180, |script| {
            firmware(script, "virt-smp1", EngineChoice::Auto)
        }),
        Case::new("flash_in_the_log_by_dbm", 60, |script| {
            flash_in_the_log(script, "virt", EngineChoice::Dbm)
        }),
        Case::new("flash_in_the_log_by_wp", 60, |script| {
            flash_in_the_log(script, "virt-a72", EngineChoice::WriteProtect)
        }),
    ];
    let why = "an older one hangs in the case timer_virtual";
    let judged = judged.into_iter().map(|case| case.needs_newer_qemu(why));
    let aarch32 = Case::new("hostile_aarch32_ends_that_vm_alone", 60, aarch32);
    judged.chain(by_firmware).chain([aarch32]).collect()
}

fn hostile(script: &mut Script, machine: &str, engine: Option<EngineChoice>) -> Result<()> {
    let seed = script.seed();
    let bundle = guests::pack([guests::hostile(2, Mib(64))?])?;
    let target = script.start_tidemark(machine, &bundle, "leaves=blocks")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("hostile")?;
    host.until_running(vm)?;
    host.attach(vm)?;
    host.expect(vm, "hostile: ready")?;
    host.expect(vm, "vcpus=2 el=1")?;
    if let Some(engine) = engine {
        host.dirty_start(vm, engine, Granularity::Page)?;
    }
    host.type_line(vm, &format!("run {seed}"))?;
    let said = host.expect(vm, "hostile: done ")?;
    let verdict = host.expect(vm, "\n")?;
    judge(&said, &verdict, AT_LEAST)?;
    let info = until_over(&mut host, vm)?;
    ensure!(
        info.summary.state == VmState::Stopped,
        "it turned itself off and is {}: {}",
        info.summary.state,
        info.reason
    );
    host.finish();
    answers(target, "stopped")
}

/// Every case has its line, and none failed.
fn judge(said: &str, verdict: &str, at_least: usize) -> Result<()> {
    let (mut judged, mut failures) = (0, Vec::new());
    for line in said.lines() {
        let Some(case) = line.strip_prefix("case ") else {
            continue;
        };
        let words: Vec<&str> = case.split_whitespace().collect();
        match words.as_slice() {
            [number, _, "ok" | "skip", ..] => {
                judged += 1;
                ensure!(
                    *number == judged.to_string(),
                    "case {number} came after {} others: {line}",
                    judged - 1
                );
            }
            _ => failures.push(line.trim()),
        }
        if let [_, _, "FAIL", .., "checks"] = words.as_slice() {
            judged += 1;
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    ensure!(judged >= at_least, "only {judged} cases were run:\n{said}");
    let wanted = format!("{judged} 0");
    ensure!(verdict.trim() == wanted, "`done {verdict}`, not `{wanted}`");
    Ok(())
}

/// Waits until a VM is no more.
fn until_over(host: &mut Host, vm: VmId) -> Result<VmInfo> {
    let began = Instant::now();
    loop {
        let info = host.info(vm)?;
        if matches!(info.summary.state, VmState::Stopped | VmState::Failed) {
            return Ok(info);
        }
        if began.elapsed() > tidemark_tests::clocks::scaled(10) {
            bail!(
                "it is still {} after {:?}",
                info.summary.state,
                began.elapsed()
            );
        }
        host.look()?;
    }
}

/// EL2's shell answers, and nothing looks like a crash.
fn answers(target: &mut Target, state: &str) -> Result<()> {
    let list = target.shell_until("list", state)?;
    let says = |line: &str| line.contains("hostile") && line.contains(state);
    ensure!(
        list.lines().any(says),
        "`list` does not say that it is {state}: {list:?}"
    );
    target.still_on()
}

/// Flash and `fw_cfg`, while the log is on; another guest and its log notice nothing.
fn firmware(script: &mut Script, machine: &str, engine: EngineChoice) -> Result<()> {
    let seed = script.seed();
    let config = Config {
        seed: Seed(seed),
        vcpus: 1,
        pages: 100,
        blocks: 0,
        more: 0,
    };
    let guests = [
        guests::hostile_by_firmware(2, Mib(64))?,
        guests::oracle(1, Mib(32))?,
    ];
    let target = script.start_tidemark(machine, &guests::pack(guests)?, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let hostile = guest.host.vm("hostile")?;
    guest.host.attach(hostile)?;
    guest.host.expect(hostile, "vcpus=2 el=1")?;
    for vm in [hostile, guest.vm] {
        guest.host.dirty_start(vm, engine, Granularity::Page)?;
    }
    guest.host.type_line(hostile, &format!("firmware {seed}"))?;
    let said = guest.host.expect(hostile, "hostile: done ")?;
    let verdict = guest.host.expect(hostile, "\n")?;
    judge(&said, &verdict, FIRMWARE_AT_LEAST)?;
    let info = until_over(&mut guest.host, hostile)?;
    ensure!(
        info.summary.state == VmState::Stopped,
        "it turned itself off and is {}: {}",
        info.summary.state,
        info.reason
    );
    works_on(&mut guest)?;
    guest.host.finish();
    answers(target, "stopped")
}

/// What flash programs and erases is in the log, and nothing else of it is: what was not written to is not told.
fn flash_in_the_log(script: &mut Script, machine: &str, engine: EngineChoice) -> Result<()> {
    let bundle = guests::pack([guests::hostile_by_firmware(1, Mib(64))?])?;
    let target = script.start_tidemark(machine, &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("hostile")?;
    host.attach(vm)?;
    host.expect(vm, "el=1")?;
    host.dirty_start(vm, engine, Granularity::Page)?;
    let mut harvest = |command: &str, said: &str| -> Result<Pages> {
        host.type_line(vm, command)?;
        host.expect(vm, said)?;
        let harvest = host.take(vm)?;
        host.commit(vm, &harvest)?;
        let of_flash = |page: &Gfn| page.0 < VARIABLES.end;
        Ok(harvest.pages.into_iter().filter(of_flash).collect())
    };
    for first in [0, 5, 200, 488] {
        let programmed = harvest(&format!("program {first}"), "flash: programmed")?;
        let written = (0..8).map(|index| Gfn(VARIABLES.start + first + 3 * index));
        ensure!(
            programmed == written.collect(),
            "eight pages from {first:#x} on were programmed, the log has {programmed:x?}"
        );
        let erased = harvest(&format!("erase {first}"), "flash: erased")?;
        let sector = VARIABLES.start + first / SECTOR * SECTOR;
        ensure!(
            erased == (sector..sector + SECTOR).map(Gfn).collect(),
            "the sector at page {sector:#x} was erased, the log has {erased:x?}"
        );
    }
    host.finish();
    target.still_on()
}

/// A guest writes, and its log has that and nothing else.
fn works_on(guest: &mut OracleGuest) -> Result<()> {
    let iteration = guest.step()?;
    let written = guest.ledger.written_in(iteration);
    let harvest = guest.host.take(guest.vm)?;
    oracle::check_superset(&written, &harvest.pages)?;
    oracle::check_exact(&written, guest.ledger.own(), &harvest.pages)?;
    guest.host.commit(guest.vm, &harvest)
}

/// AArch32 cannot be kept from a guest whose CPU has it: it is that guest's end, and only its.
fn aarch32(script: &mut Script) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 1,
        pages: 100,
        blocks: 0,
        more: 0,
    };
    let bundle = guests::pack([guests::hostile(1, Mib(32))?, guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let hostile = guest.host.vm("hostile")?;
    guest.host.attach(hostile)?;
    guest.host.expect(hostile, "el=1")?;
    guest
        .host
        .dirty_start(guest.vm, EngineChoice::Auto, Granularity::Page)?;
    guest.host.type_line(hostile, "aarch32")?;
    guest.host.expect(hostile, "aarch32: entered")?;
    let info = until_over(&mut guest.host, hostile)?;
    ensure!(
        info.summary.state == VmState::Failed && info.reason.contains("AArch32"),
        "it is {} because of {:?}",
        info.summary.state,
        info.reason
    );
    // The other one works on, and so does its log.
    works_on(&mut guest)?;
    guest.host.finish();
    answers(target, "failed")
}
