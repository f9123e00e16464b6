//! A host's copy of a running guest, made only of what dirty tracking told it, is exact.
//!
//! `tidectl`'s copy does the work as a user would have it done; what it claims is then
//! checked again here, with another hash of the files and another harvest.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::time::Duration;
use tidectl::copy::{self, After, Phase, Plan, Step, Verify};
use tidectl::image::{Contents, MemoryFile};
use tidemark_guests::pattern::{Config, Seed};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;
use tidemark_wire::message::{EngineChoice, Granularity, Hold, SlotId, VmId, VmState};

use crate::case::{Case, Place};

/// Where `virt` has its RAM: the first byte of the file behind it.
const RAM_BASE: u64 = 0x4000_0000;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("copy_16m_over_channel_wp", 240, |script| {
            copy_16m(script, EngineChoice::WriteProtect)
        })
        .at(Place::Anywhere),
        Case::new("copy_16m_over_channel_dbm", 240, |script| {
            copy_16m(script, EngineChoice::Dbm)
        }),
        Case::new("copy_of_flash_that_is_programmed", 240, copy_flash),
        Case::new("copy_512m_linux_from_ram_file", 240, copy_512m_linux),
    ]
}

fn copy_16m(script: &mut Script, engine: EngineChoice) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: 1000,
        blocks: 16,
        more: 0,
    };
    let bundle = guests::pack([guests::oracle(2, Mib(16))?])?;
    let dir = script.path("copy")?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let vm = guest.vm;
    guest.host.dirty_start(vm, engine, Granularity::Adaptive)?;
    // Until a byte comes: it writes all the time the copy is made.
    guest.start_free(0)?;
    let plan = Plan {
        image_dir: dir,
        rounds: 4,
        enough_pages: 0,
        interval: Duration::from_millis(200),
        contents: Contents::Channel,
        engine,
        granularity: Granularity::Adaptive,
        verify: Verify::Running,
        after: After::Paused,
    };
    copy_and_check(&mut guest.host, vm, &plan)?;
    let taken = guest.host.take(vm)?;
    guest.host.commit(vm, &taken)?;
    // Once more, verified while the guest writes again.
    guest.host.client().resume(vm, Hold::Lasting)?;
    let plan = Plan {
        granularity: Granularity::Page,
        after: After::AsBefore,
        ..plan
    };
    copy_running(&mut guest.host, vm, &plan)?;
    let plan = Plan {
        verify: Verify::Paused,
        after: After::Paused,
        ..plan
    };
    copy_and_check(&mut guest.host, vm, &plan)?;
    // The guest goes on as if nothing had been: it ends its run in order when told.
    guest.host.dirty_stop(vm)?;
    guest.host.client().resume(vm, Hold::Lasting)?;
    guest.stop_free()?;
    guest.command("sum")?;
    guest.host.finish();
    target.still_on()
}

/// The slot of the flash bank that firmware may write.
const VARIABLES: SlotId = SlotId(2);

/// A guest with firmware that programs and erases its flash all the time.
fn copy_flash(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::hostile_by_firmware(1, Mib(16))?])?;
    let (dir, seed) = (script.path("copy")?, script.seed());
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("hostile")?;
    host.attach(vm)?;
    host.expect(vm, "el=1")?;
    let engine = EngineChoice::Auto;
    host.dirty_start(vm, engine, Granularity::Page)?;
    host.type_line(vm, &format!("program-on {seed}"))?;
    host.expect(vm, "flash: goes on")?;
    let plan = Plan {
        image_dir: dir,
        rounds: 4,
        enough_pages: 0,
        interval: Duration::from_millis(200),
        contents: Contents::Channel,
        engine,
        granularity: Granularity::Page,
        verify: Verify::Paused,
        after: After::Paused,
    };
    copy_and_check(&mut host, vm, &plan)?;
    // What was copied did change all the time.
    let copied = host.client().hash(vm, VARIABLES, &mut |_, _| {})?;
    host.client().resume(vm, Hold::Lasting)?;
    std::thread::sleep(Duration::from_secs(1));
    host.client().pause(vm, Hold::Lasting)?;
    let later = host.client().hash(vm, VARIABLES, &mut |_, _| {})?;
    ensure!(copied != later, "nobody programs the flash");
    host.client().resume(vm, Hold::Lasting)?;
    host.type_line(vm, "end")?;
    host.expect(vm, "flash: ended")
        .context("the guest did not go on")?;
    host.finish();
    target.still_on()
}

fn copy_512m_linux(script: &mut Script) -> Result<()> {
    let bundle = script.path("guests.bundle")?;
    std::fs::write(
        &bundle,
        guests::pack([guests::linux("linux", 2, Mib(512))?])?,
    )?;
    let dir = script.path("copy")?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(bundle)
        .ram_in_file();
    let target = script.start("virt", &payload)?;
    target.to_prompt()?;
    let memory = MemoryFile::open(&target.ram_file(), RAM_BASE)?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("linux")?;
    host.attach(vm)?;
    host.expect(vm, LINUX_PROMPT).context("no shell")?;
    host.type_line(vm, "load 128 random 60 0 >/tmp/load &")?;
    host.expect(vm, LINUX_PROMPT)?;
    host.type_line(
        vm,
        "until grep -q ready /tmp/load; do sleep 0.1; done; echo is $((40 + 2))",
    )?;
    host.expect(vm, "is 42").context("the load does not run")?;
    host.dirty_start(vm, EngineChoice::Auto, Granularity::Adaptive)?;
    let plan = Plan {
        image_dir: dir,
        rounds: 4,
        enough_pages: 0,
        interval: Duration::from_millis(500),
        contents: Contents::MemoryFile(memory),
        engine: EngineChoice::Auto,
        granularity: Granularity::Adaptive,
        verify: Verify::Running,
        after: After::AsBefore,
    };
    copy_running(&mut host, vm, &plan)?;
    let plan = Plan {
        verify: Verify::Paused,
        after: After::Paused,
        ..plan
    };
    copy_and_check(&mut host, vm, &plan)?;
    host.dirty_stop(vm)?;
    host.client().resume(vm, Hold::Lasting)?;
    host.type_line(vm, "echo alive $((40 + 2))")?;
    host.expect(vm, "alive 42")
        .context("the guest did not go on")?;
    host.finish();
    target.still_on()
}

/// Runs the plan, which lets the guest go before it verifies: pages that it has not written again are judged, and the downtime
/// holds the last round and nothing else.
fn copy_running(host: &mut Host, vm: VmId, plan: &Plan) -> Result<()> {
    let report = copy::run(host.client(), vm, plan, &mut |_| {})?;
    let (pages, written) = (report.verified.pages, report.verified.written);
    println!(
        "down for {:?}, verified {pages} pages in {:?}, {written} written meanwhile",
        report.downtime, report.verify_time
    );
    ensure!(
        written > 0,
        "the guest wrote nothing meanwhile: was it let go?"
    );
    ensure!(pages > 0, "no page could be judged");
    let info = host.info(vm)?;
    ensure!(
        info.summary.state == VmState::Running,
        "the guest is {} after the copy",
        info.summary.state
    );
    Ok(())
}

/// Runs the plan, which leaves the guest paused, and checks what it claims.
fn copy_and_check(host: &mut Host, vm: VmId, plan: &Plan) -> Result<()> {
    let mut verified = false;
    let report = copy::run(host.client(), vm, plan, &mut |step| {
        verified |= matches!(step, Step::Verified(_));
    })?;
    println!(
        "{:?}: down for {:?}, verified in {:?}",
        plan.verify, report.downtime, report.verify_time
    );
    ensure!(verified, "the copy was reported without being verified");
    let live = report
        .rounds
        .iter()
        .filter(|round| round.phase == Phase::Live);
    let racing = live.filter(|round| round.pages > 0).count();
    ensure!(
        racing >= 2,
        "the guest wrote in {racing} rounds only: nothing was raced"
    );
    ensure!(!report.slots.is_empty(), "no slot was copied");
    for (slot, path, _) in &report.slots {
        let theirs = host.client().hash(vm, *slot, &mut |_, _| {})?;
        let ours = sha256_of(path)?;
        ensure!(
            theirs == ours,
            "slot {slot}: the file is not what EL2 hashes"
        );
    }
    // The guest has been paused since the last round: nothing can be dirty.
    let again = host.take(vm)?;
    ensure!(
        again.pages.is_empty(),
        "{} pages in a harvest after the last",
        again.pages.len()
    );
    host.commit(vm, &again)
}

fn sha256_of(path: &std::path::Path) -> Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        match buffer.get(..count) {
            Some([]) => break,
            Some(part) => hash.update(part),
            None => bail!("read more than there was room for"),
        }
    }
    Ok(hash.finalize().into())
}
