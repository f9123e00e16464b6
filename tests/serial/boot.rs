//! The image alone: it comes up on each machine, knows what the CPUs can do, and talks
//! to a person on a plain terminal.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::message::{Engine, EngineChoice, Features, Granularity, Mappings, SlotId};

use crate::case::{Case, Place};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("boots_on_max", 60, boots_on_max),
        Case::new("boots_on_a76_dbm_without_bbm2", 60, boots_on_a76),
        Case::new("boots_on_a72_write_protect_chosen", 60, boots_on_a72),
        Case::new("boots_on_a57", 60, boots_on_a57),
        Case::new(
            "boots_on_an_unknown_core_write_protect",
            60,
            boots_on_an_unknown_core,
        ),
        Case::new(
            "boots_on_an_unknown_core_dbm_as_told",
            60,
            boots_on_an_unknown_core_as_told,
        ),
        Case::new("leaves_are_blocks_as_told", 60, leaves_are_as_told),
        Case::new("leaves_are_pages_on_qemu", 60, leaves_are_pages_on_qemu),
        Case::new("boots_without_a_bundle", 40, boots_without_a_bundle),
        Case::new("entered_at_el1", 30, entered_at_el1),
        Case::new("a_start_clears_all_memory", 90, clears_all_memory),
        Case::new("plain_terminal_shell_help", 60, plain_terminal_shell_help).at(Place::Anywhere),
    ]
}

/// Boots `machine` with a small guest and returns what the CPUs can do and which engine
/// is chosen when nobody asks for one.
fn features_and_choice(
    script: &mut Script,
    machine: &str,
    command_line: &str,
) -> Result<(Features, Engine)> {
    let bundle = guests::pack([guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark(machine, &bundle, command_line)?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    let info = host.until_running(vm)?;
    ensure!(
        info.features.cpus == 2,
        "{} of 2 CPUs are up",
        info.features.cpus
    );
    host.dirty_start(vm, EngineChoice::Auto, Granularity::Adaptive)?;
    let logging = host.dirty_status(vm)?.logging.context("no log runs")?;
    host.dirty_stop(vm)?;
    host.finish();
    // The features are one line of the log, for whoever reads a transcript.
    ensure!(
        target.line().text().contains("HAFDBS"),
        "the features are not in the log"
    );
    target.still_on()?;
    Ok((info.features, logging.engine))
}

/// Boots with a small guest and returns how its memory is mapped.
fn mapped<'s>(script: &'s mut Script, command_line: &str) -> Result<(&'s mut Target, Mappings)> {
    let bundle = guests::pack([guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, command_line)?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    let mappings = host.until_running(vm)?.mappings;
    host.finish();
    Ok((target, mappings))
}

/// Blocks if they are asked for.
fn leaves_are_as_told(script: &mut Script) -> Result<()> {
    let (target, mappings) = mapped(script, "leaves=blocks")?;
    ensure!(
        (mappings.blocks_2m, mappings.pages_4k) == (16, 0),
        "not in blocks, as told: {mappings:?}"
    );
    target.still_on()
}

/// QEMU's CPUs are measured to drop a block with each of its pages.
fn leaves_are_pages_on_qemu(script: &mut Script) -> Result<()> {
    let (target, mappings) = mapped(script, "")?;
    ensure!(
        (mappings.blocks_2m, mappings.pages_4k) == (0, 8192),
        "not in pages: {mappings:?}"
    );
    ensure!(
        target.line().text().contains("memory is mapped in pages"),
        "the log does not say so"
    );
    target.still_on()
}

fn boots_on_max(script: &mut Script) -> Result<()> {
    let (features, engine) = features_and_choice(script, "virt", "")?;
    let all =
        features.dbm_usable && features.bbm2 && features.fwb && features.tlb_range && features.lse;
    ensure!(
        all && features.hafdbs >= 2,
        "on the newest CPU: {features:?}"
    );
    ensure!(engine == Engine::Dbm, "{engine} was chosen");
    Ok(())
}

fn boots_on_a76(script: &mut Script) -> Result<()> {
    let (features, engine) = features_and_choice(script, "virt-a76", "")?;
    ensure!(
        features.dbm_usable && features.hafdbs == 2,
        "no dirty bit: {features:?}"
    );
    ensure!(
        !features.bbm2 && !features.fwb && !features.tlb_range,
        "features it has not: {features:?}"
    );
    ensure!(engine == Engine::Dbm, "{engine} was chosen");
    Ok(())
}

fn boots_on_a72(script: &mut Script) -> Result<()> {
    let (features, engine) = features_and_choice(script, "virt-a72", "")?;
    ensure!(
        !features.dbm_usable && features.hafdbs == 0,
        "a dirty bit it has not: {features:?}"
    );
    ensure!(!features.lse, "atomics it has not: {features:?}");
    ensure!(engine == Engine::WriteProtect, "{engine} was chosen");
    Ok(())
}

/// A core that nobody looked at: its dirty bit is used by who says that it can be.
fn boots_on_an_unknown_core(script: &mut Script) -> Result<()> {
    let (features, engine) = features_and_choice(script, "virt-unknown", "")?;
    ensure!(
        features.hafdbs >= 2 && !features.dbm_usable,
        "its dirty bit is trusted: {features:?}"
    );
    ensure!(engine == Engine::WriteProtect, "{engine} was chosen");
    Ok(())
}

fn boots_on_an_unknown_core_as_told(script: &mut Script) -> Result<()> {
    let (features, engine) = features_and_choice(script, "virt-unknown", "dirty=dbm")?;
    ensure!(features.dbm_usable, "not as told: {features:?}");
    ensure!(engine == Engine::Dbm, "{engine} was chosen");
    Ok(())
}

/// Every load from a device is first looked up in stage 1 (erratum 834220).
fn boots_on_a57(script: &mut Script) -> Result<()> {
    let (features, engine) = features_and_choice(script, "virt-a57", "")?;
    ensure!(features.hafdbs == 0, "a dirty bit it has not: {features:?}");
    ensure!(engine == Engine::WriteProtect, "{engine} was chosen");
    Ok(())
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

/// All CPUs clear a guest's memory, and leave out none of it: the machine's RAM has a content of its own before it
/// is switched on.
fn clears_all_memory(script: &mut Script) -> Result<()> {
    const RAM: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;
    // Behind all that QEMU loads.
    const FILLED: u64 = 192 * MIB;
    // The guest's image, and what it writes by itself.
    const ITS_OWN: usize = 16 << 8;
    let bundle = script.path("guests.bundle")?;
    std::fs::write(&bundle, guests::pack([guests::oracle(1, Mib(512))?])?)?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(bundle)
        .ram_in_file();
    let machine = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(script.path("ram")?)?;
    machine.set_len(RAM)?;
    let filling = vec![0xa5; MIB as usize];
    for at in (FILLED..RAM).step_by(filling.len()) {
        machine.write_all_at(&filling, at)?;
    }
    let target = script.start("virt", &payload)?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    let info = host.until_running(vm)?;
    host.finish();
    let ram = info.slots.iter().find(|slot| slot.id == SlotId(0));
    let mut pages = 0;
    let mut left = 0;
    let mut tree = 0;
    let mut content = vec![0; 4096];
    for extent in &ram.context("no RAM")?.extents {
        for n in 0..extent.pages {
            pages += 1;
            machine.read_exact_at(&mut content, extent.pa + n * 4096 - RAM)?;
            // The devicetree is where QEMU would put it.
            if let [0xd0, 0x0d, 0xfe, 0xed, a, b, c, d, ..] = content[..] {
                tree = u32::from_be_bytes([a, b, c, d]).div_ceil(4096);
            }
            if tree > 0 {
                tree -= 1;
            } else if pages > ITS_OWN && content.iter().any(|&byte| byte != 0) {
                left += 1;
            }
        }
    }
    ensure!(pages == 512 << 8, "{pages} pages are the guest's");
    ensure!(left == 0, "{left} pages were not cleared");
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
    let list = target.shell_until("list", "running")?;
    ensure!(list.contains("oracle"), "`list` says {list:?}");
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
