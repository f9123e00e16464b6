//! The devicetree that QEMU makes for a machine, and changes of it.

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dtoolkit::fdt::Fdt;
use dtoolkit::memreserve::MemoryReservation;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

use crate::artifacts::machines_dir;
use crate::machine::Machine;
use crate::qemu;

/// Asks QEMU for the devicetree of `qemu/MACHINE.toml`, which it leaves at `file`.
pub fn of_machine(machine: &str, file: &Path) -> Result<DeviceTree> {
    of_changed_machine(machine, file, |_| ())
}

/// The same of a machine that is changed first.
pub fn of_changed_machine(
    machine: &str,
    file: &Path,
    change: impl FnOnce(&mut Machine),
) -> Result<DeviceTree> {
    let mut machine = Machine::load(&machines_dir(), machine)?;
    change(&mut machine);
    machine.machine = format!("{},dumpdtb={}", machine.machine, file.display());
    let output = Command::new(qemu::program())
        .args(machine.arguments(None))
        .output()
        .context("cannot start QEMU")?;
    ensure!(
        output.status.success(),
        "QEMU writes no devicetree: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    read(&std::fs::read(file)?)
}

/// Reads a devicetree.
pub fn read(bytes: &[u8]) -> Result<DeviceTree> {
    let fdt = Fdt::new(bytes).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(DeviceTree::from_fdt(&fdt))
}

/// How memory is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// An entry of the reservation block, `/memreserve/`.
    Entry,
    /// A child of `/reserved-memory`.
    Node,
    /// The same with `no-map`.
    NoMap,
}

/// Reserves memory.
pub fn reserve(tree: &mut DeviceTree, how: Reservation, address: u64, size: u64) -> Result<()> {
    let property = |name: &str, cells: &[u32]| {
        DeviceTreeProperty::new(name, cells).map_err(|error| anyhow::anyhow!("{name}: {error:?}"))
    };
    let node = |name: &str| {
        DeviceTreeNode::new(name).map_err(|error| anyhow::anyhow!("{name}: {error:?}"))
    };
    if how == Reservation::Entry {
        let entry = MemoryReservation::new(address, size);
        tree.memory_reservations.push(entry);
        return Ok(());
    }
    let mut all = node("reserved-memory")?;
    all.add_property(property("#address-cells", &[2])?);
    all.add_property(property("#size-cells", &[2])?);
    all.add_property(property("ranges", &[])?);
    let mut one = node(&format!("initrd@{address:x}"))?;
    let halves = [address, size].map(|value| [(value >> 32) as u32, value as u32]);
    one.add_property(property("reg", halves.as_flattened())?);
    if how == Reservation::NoMap {
        one.add_property(property("no-map", &[])?);
    }
    all.add_child(one);
    tree.root.add_child(all);
    Ok(())
}

/// Says where the initrd is.
pub fn set_initrd(tree: &mut DeviceTree, place: Range<u64>) -> Result<()> {
    let chosen = tree.find_node_mut("/chosen").context("no /chosen")?;
    for (name, value) in [
        ("linux,initrd-start", place.start),
        ("linux,initrd-end", place.end),
    ] {
        let property = DeviceTreeProperty::new(name, value);
        chosen.add_property(property.map_err(|error| anyhow::anyhow!("{name}: {error:?}"))?);
    }
    Ok(())
}
