//! Memory that a host adds to a VM and takes away again: what is refused, and what a restart leaves.
//!
//! That a slot is tracked, unmapped and zeroed is judged beside guests that write it, in `oracle`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use tidectl::Error;
use tidemark_guests::pattern::{Config, Gfn, PAGE_BYTES, PageRun, Seed};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;
use tidemark_wire::message::{
    EngineChoice, Epoch, ErrorReply, Granularity, Hold, Request, Response, SlotId, SlotInfo, VmId,
    VmState,
};
use tidemark_wire::{HOT_SLOT_FIRST, HOT_SLOT_LAST, HOT_SLOT_UNIT};

use crate::case::Case;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "slots_are_refused_kept_and_given_back",
        90,
        refused_kept_given_back,
    )]
}

/// A slot that is asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    id: u16,
    base: u64,
    bytes: u64,
}

const fn asked(id: u16, base: u64, bytes: u64) -> Asked {
    Asked { id, base, bytes }
}

fn add(host: &mut Host, vm: VmId, slot: Asked) -> tidectl::Result<()> {
    let Asked { id, base, bytes } = slot;
    host.client()
        .add_slot(vm, SlotId(id), base, bytes, &mut |_, _| {})
}

fn delete(host: &mut Host, vm: VmId, id: u16) -> tidectl::Result<()> {
    host.client().delete_slot(vm, SlotId(id), &mut |_, _| {})
}

fn refusal(result: tidectl::Result<()>) -> Result<ErrorReply> {
    match result {
        Err(Error::Target { reply, .. }) => Ok(reply),
        Err(error) => Err(error.into()),
        Ok(()) => bail!("it was done, which should have been refused"),
    }
}

fn slots(host: &mut Host, vm: VmId) -> Result<Vec<SlotInfo>> {
    Ok(host.info(vm)?.slots)
}

fn refused_kept_given_back(script: &mut Script) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        ..Config::default()
    };
    let bundle = script.path("guests.bundle")?;
    std::fs::write(&bundle, guests::pack([guests::oracle(1, Mib(32))?])?)?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(bundle)
        .ram_in_file();
    let target = script.start("virt", &payload)?;
    target.to_prompt()?;
    let machine = File::open(target.ram_file())?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let (vm, before) = (guest.vm, slots(&mut guest.host, guest.vm)?);
    refused(&mut guest.host, vm)?;
    ensure!(
        slots(&mut guest.host, vm)? == before,
        "something refused is there"
    );
    scrubbed(&mut guest, &machine)?;
    under_a_log(&mut guest)?;
    restarted_meanwhile(&mut guest.host, vm)?;
    kept(&mut guest)?;
    all_there_are(&mut guest.host, vm)?;
    let after = slots(&mut guest.host, vm)?;
    ensure!(after == before, "{after:?} is left of {before:?}");
    guest.host.finish();
    target.still_on()
}

/// What cannot be is refused by name.
fn refused(host: &mut Host, vm: VmId) -> Result<()> {
    let (first, end) = (GIB, 1 << host.info(vm)?.features.ipa_bits);
    let ram = GIB;
    let behind = 2 * GIB;
    let overlap = ErrorReply::SlotOverlap { slot: SlotId(0) };
    let place = ErrorReply::SlotPlace { first, end };
    let wrong = [
        (asked(0, behind, 2 * MIB), ErrorReply::SlotNumber),
        (asked(2, behind, 2 * MIB), ErrorReply::SlotNumber),
        (
            asked(HOT_SLOT_LAST + 1, behind, 2 * MIB),
            ErrorReply::SlotNumber,
        ),
        (asked(u16::MAX, behind, 2 * MIB), ErrorReply::SlotNumber),
        (asked(3, behind + 4096, 2 * MIB), ErrorReply::SlotSize),
        (asked(3, behind, 2 * MIB + 4096), ErrorReply::SlotSize),
        (asked(3, behind, 0), ErrorReply::SlotSize),
        (asked(3, behind, 514 * MIB), ErrorReply::SlotSize),
        (
            asked(3, behind, 0u64.wrapping_sub(2 * MIB)),
            ErrorReply::SlotSize,
        ),
        // The UART, and the firmware's flash.
        (asked(3, 0x0900_0000 & !(2 * MIB - 1), 2 * MIB), place),
        (asked(3, 0, 2 * MIB), place),
        (asked(3, ram - 2 * MIB, 4 * MIB), place),
        (asked(3, end - 2 * MIB, 4 * MIB), place),
        (asked(3, 0u64.wrapping_sub(2 * MIB), 2 * MIB), place),
        (asked(3, ram, 2 * MIB), overlap),
        (asked(3, ram + 30 * MIB, 4 * MIB), overlap),
    ];
    for (slot, reply) in wrong {
        let said = refusal(add(host, vm, slot)).with_context(|| format!("{slot:x?}"))?;
        ensure!(said == reply, "{slot:x?} was answered by {said:?}");
    }
    for (id, reply) in [
        (0, ErrorReply::SlotNumber),
        (1, ErrorReply::SlotNumber),
        (HOT_SLOT_LAST + 1, ErrorReply::SlotNumber),
        (3, ErrorReply::NoSuchSlot),
    ] {
        let said = refusal(delete(host, vm, id)).with_context(|| format!("slot {id}"))?;
        ensure!(said == reply, "slot {id} was answered by {said:?}");
    }
    // What is there is not added again, elsewhere or larger; and as it is, it is there.
    let slot = asked(5, behind, 4 * MIB);
    add(host, vm, slot)?;
    add(host, vm, slot)?;
    for other in [asked(5, behind, 2 * MIB), asked(5, 3 * GIB, 4 * MIB)] {
        let said = refusal(add(host, vm, other))?;
        ensure!(said == ErrorReply::SlotExists, "{other:x?}: {said:?}");
    }
    let said = refusal(add(host, vm, asked(6, behind + 2 * MIB, 2 * MIB)))?;
    let reply = ErrorReply::SlotOverlap { slot: SlotId(5) };
    ensure!(said == reply, "an overlap was answered by {said:?}");
    delete(host, vm, 5)?;
    delete(host, vm, 5)?;
    // More than the machine has, slot by slot.
    let free = |host: &mut Host| -> Result<u64> {
        for id in HOT_SLOT_FIRST..=HOT_SLOT_LAST {
            let base = 4 * GIB + u64::from(id) * GIB;
            match add(host, vm, asked(id, base, 512 * MIB)) {
                Ok(()) => {}
                Err(Error::Target {
                    reply: ErrorReply::NotEnoughMemory { free_bytes },
                    ..
                }) => {
                    for id in (HOT_SLOT_FIRST..id).rev() {
                        delete(host, vm, id)?;
                    }
                    return Ok(free_bytes);
                }
                Err(error) => return Err(error.into()),
            }
        }
        bail!("a machine of 1 GiB gave 8 GiB");
    };
    let left = free(host)?;
    ensure!(left < 513 * MIB, "{left} bytes are not enough for 512 MiB");
    ensure!(free(host)? == left, "some of it did not come back");
    Ok(())
}

/// Nothing is left in the machine's memory of what a guest had in a slot, once that is deleted.
fn scrubbed(guest: &mut OracleGuest, machine: &File) -> Result<()> {
    const PAGES: u32 = 1024;
    let run = PageRun::new(guest.ledger.memory().end(), PAGES.into());
    guest.host.add_slot(guest.vm, SlotId(3), run)?;
    let all = slots(&mut guest.host, guest.vm)?;
    let slot = all.into_iter().find(|slot| slot.id == SlotId(3));
    let slot = slot.context("the slot is not there")?;
    let pages: u64 = slot.extents.iter().map(|extent| extent.pages).sum();
    ensure!(
        pages == u64::from(PAGES),
        "its extents are {:?}",
        slot.extents
    );
    let written = || -> Result<usize> {
        let mut written = 0;
        for extent in &slot.extents {
            let mut content = vec![0; usize::try_from(extent.pages * PAGE_BYTES)?];
            machine.read_exact_at(&mut content, extent.pa - GIB)?;
            let pages = content.chunks(PAGE_BYTES as usize);
            written += pages
                .filter(|page| page.iter().any(|byte| *byte != 0))
                .count();
        }
        Ok(written)
    };
    guest.plug(PAGES)?;
    guest.lose(PAGES, |host, vm| {
        ensure!(
            written()? == PAGES as usize,
            "the guest's memory is elsewhere"
        );
        host.delete_slot(vm, SlotId(3))
    })?;
    let left = written()?;
    ensure!(left == 0, "{left} pages still hold what the guest wrote");
    Ok(())
}

/// A slot that is added under a log is dirty as a whole, once; one that is deleted is in no harvest, and the bits
/// that the host has not read yet are gone with it.
fn under_a_log(guest: &mut OracleGuest) -> Result<()> {
    let (vm, base) = (guest.vm, 2 * GIB);
    let host = &mut guest.host;
    host.dirty_start(vm, EngineChoice::Auto, Granularity::Page)?;
    add(host, vm, asked(3, base, 4 * MIB))?;
    for pages in [1024, 0] {
        let harvest = host.take(vm)?;
        let of_it = harvest.pages.range(Gfn(base >> 12)..);
        let found = of_it.count();
        ensure!(found == pages, "{found} pages of a new slot are dirty");
        host.commit(vm, &harvest)?;
    }
    add(host, vm, asked(4, 3 * GIB, 2 * MIB))?;
    let report = host.client().take(vm, &mut |_, _| {})?;
    ensure!(report.slots.iter().any(|slot| slot.slot == SlotId(4)));
    delete(host, vm, 4)?;
    let gone = host.client().read_bitmaps(vm, &report, &mut |_, _| {});
    ensure!(
        matches!(
            gone,
            Err(Error::Target {
                reply: ErrorReply::NoSuchSlot,
                ..
            })
        ),
        "a slot that is gone has a bitmap: {gone:?}"
    );
    // The rest of the epoch is what it was.
    host.client().abort(vm, report.epoch)?;
    let again = host.take(vm)?;
    ensure!(again.epoch == Epoch(report.epoch.0 + 1));
    host.commit(vm, &again)?;
    host.dirty_stop(vm)?;
    delete(host, vm, 3)?;
    Ok(())
}

/// A guest is restarted while a slot is being added, and while it is being deleted: it starts when that is over.
fn restarted_meanwhile(host: &mut Host, vm: VmId) -> Result<()> {
    let (slot, base_ipa, bytes) = (SlotId(9), 2 * GIB, 512 * MIB);
    let add = Request::SlotAdd {
        vm,
        slot,
        base_ipa,
        bytes,
    };
    let delete = Request::SlotDelete { vm, slot };
    for (request, there) in [(add, 2), (delete, 1)] {
        let restarts = host.info(vm)?.restarts;
        let begin = |response: Response<'_>| match response {
            Response::Progress { .. } => Some(()),
            _ => None,
        };
        host.client().call("changing slots", &request, begin)?;
        let state = |response: Response<'_>| match response {
            Response::State(state) => Some(state),
            _ => None,
        };
        let reset = Request::Reset { vm, restarts };
        host.client().call("restarting", &reset, state)?;
        let after = host.until_running(vm)?;
        ensure!(
            after.restarts == restarts + 1 && after.slots.len() == there,
            "{request:?}, then a restart: {:?}",
            after.slots
        );
        let done = |response: Response<'_>| match response {
            Response::Ok => Some(()),
            _ => None,
        };
        host.client().call("asking again", &request, done)?;
    }
    Ok(())
}

/// What is added stays when the guest is restarted or ends, with what is in it. None comes or goes while it starts.
fn kept(guest: &mut OracleGuest) -> Result<()> {
    let vm = guest.vm;
    add(&mut guest.host, vm, asked(7, 2 * GIB, 2 * MIB))?;
    let there = slots(&mut guest.host, vm)?;
    let restarts = guest.host.info(vm)?.restarts;
    guest.host.type_line(vm, "reset")?;
    while guest.host.info(vm)?.restarts == restarts {
        guest.host.look()?;
    }
    guest.host.until_running(vm)?;
    ensure!(
        slots(&mut guest.host, vm)? == there,
        "a restart lost a slot"
    );
    guest.host.client().pause(vm, Hold::Lasting)?;
    guest.host.client().hash(vm, SlotId(7), &mut |_, _| {})?;
    // Also of a guest that is paused, or over.
    delete(&mut guest.host, vm, 7)?;
    add(&mut guest.host, vm, asked(8, 2 * GIB, HOT_SLOT_UNIT))?;
    guest.host.client().stop(vm)?;
    while guest.host.info(vm)?.summary.state != VmState::Stopped {
        guest.host.look()?;
    }
    delete(&mut guest.host, vm, 8)?;
    Ok(())
}

/// As many as there are numbers for, and all is said of them.
fn all_there_are(host: &mut Host, vm: VmId) -> Result<()> {
    let ids = HOT_SLOT_FIRST..=HOT_SLOT_LAST;
    for id in ids.clone() {
        add(
            host,
            vm,
            asked(id, 2 * GIB + u64::from(id) * 64 * MIB, 2 * MIB),
        )?;
    }
    ensure!(slots(host, vm)?.len() == ids.len() + 1);
    for id in ids {
        delete(host, vm, id)?;
    }
    Ok(())
}
