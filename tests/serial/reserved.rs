//! Memory that the devicetree reserves: no guest gets it, however many ranges there are.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use dtoolkit::model::{DeviceTreeNode, DeviceTreeProperty};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::devicetree;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;

use crate::case::Case;

/// Where `virt` has its RAM.
const RAM: u64 = 0x4000_0000;
const PAGE: u64 = 4096;
/// Behind all that QEMU loads.
const FIRST: u64 = RAM + (192 << 20) + 0x12_3000;
/// So that between two of them there is a block of 2 MiB, of which guests' memory is made.
const STRIDE: u64 = 4 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("reserved_200_ranges_stay_as_they_are", 90, stay_as_they_are),
        Case::new("reserved_unreadable_is_refused", 30, unreadable),
        Case::new("reserved_too_many_are_refused", 30, too_many),
    ]
}

/// The machine's own devicetree with `ranges` reserved, each of `cells` in its `reg`.
fn reserving(script: &Script, ranges: impl Iterator<Item = Vec<u32>>) -> Result<Payload> {
    let mut tree = devicetree::of_machine("virt", &script.path("own.dtb")?)?;
    let word = |name: &str, value: u32| DeviceTreeProperty::new_unchecked(name, value);
    let mut reserved = DeviceTreeNode::new_unchecked("reserved-memory");
    reserved.add_property(word("#address-cells", 2));
    reserved.add_property(word("#size-cells", 2));
    reserved.add_property(DeviceTreeProperty::new_unchecked("ranges", ""));
    for (n, cells) in ranges.enumerate() {
        let mut node = DeviceTreeNode::new_unchecked(format!("firmware-{n}"));
        let bytes: Vec<u8> = cells.into_iter().flat_map(u32::to_be_bytes).collect();
        node.add_property(DeviceTreeProperty::new_unchecked("reg", bytes.as_slice()));
        reserved.add_child(node);
    }
    tree.root.add_child(reserved);
    let path = script.path("reserved.dtb")?;
    std::fs::write(&path, tree.to_dtb())?;
    Ok(Payload::kernel(Artifact::Image.path()?).devicetree(path))
}

fn page(address: u64) -> Vec<u32> {
    vec![0, address as u32, 0, PAGE as u32]
}

/// Each reserved page has a content of its own before the machine is switched on. Guests' memory is zeroed, so
/// what had been given to one would show.
fn stay_as_they_are(script: &mut Script) -> Result<()> {
    let places: Vec<u64> = (0..200).map(|n| FIRST + n * STRIDE).collect();
    let bundle = script.path("guests.bundle")?;
    std::fs::write(&bundle, guests::pack([guests::oracle(1, Mib(512))?])?)?;
    let payload = reserving(script, places.iter().copied().map(page))?
        .initrd(bundle)
        .ram_in_file();
    let ram = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(script.path("ram")?)?;
    ram.set_len(1 << 30)?;
    let content = |place: u64| place.to_le_bytes().repeat(PAGE as usize / 8);
    for &place in &places {
        ram.write_all_at(&content(place), place - RAM)?;
    }
    let target = script.start("virt", &payload)?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    host.until_running(vm)?;
    host.finish();
    let mut changed = Vec::new();
    let mut now = vec![0; PAGE as usize];
    for (n, &place) in places.iter().enumerate() {
        ram.read_exact_at(&mut now, place - RAM)
            .context("the machine's RAM")?;
        if now != content(place) {
            changed.push(n);
        }
    }
    ensure!(
        changed.is_empty(),
        "reserved memory was written: ranges {changed:?}"
    );
    target.still_on()
}

/// Boots on a devicetree that is refused, and returns why.
fn refused(script: &mut Script, ranges: impl Iterator<Item = Vec<u32>>) -> Result<String> {
    let payload = reserving(script, ranges)?;
    script.start("virt", &payload)?.ended()
}

fn unreadable(script: &mut Script) -> Result<()> {
    let ranges = [page(FIRST), vec![0, FIRST as u32, 0]];
    let said = refused(script, ranges.into_iter())?;
    ensure!(
        said.contains("/reserved-memory/firmware-1: its reg does not fit"),
        "it says {said:?}"
    );
    Ok(())
}

fn too_many(script: &mut Script) -> Result<()> {
    let ranges = (0..1025).map(|n| page(FIRST + 2 * n * PAGE));
    let said = refused(script, ranges)?;
    ensure!(
        said.contains("reserves 1025 ranges of memory, more than 1024; join neighbours"),
        "it says {said:?}"
    );
    Ok(())
}
