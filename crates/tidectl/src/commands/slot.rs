//! `slot add`, `slot delete`.

use super::{Context, VmArg};
use crate::client::Client;
use crate::units::{parse_address, parse_size, size};
use crate::{Error, Result};
use clap::Args;
use serde_json::json;
use tidemark_wire::message::{SlotId, SlotInfo, VmSummary};
use tidemark_wire::{HOT_SLOT_BYTES_MAX, HOT_SLOT_FIRST, HOT_SLOT_LAST, HOT_SLOT_UNIT, PAGE_SIZE};

/// What to add.
#[derive(Debug, Args)]
#[command(after_help = "\
The memory is taken from what no guest has, and is zero. Nothing is announced to the guest: this is for guests
that know, or are told by other means, where it is. A dirty log that runs reports all of the slot once, and
then what is written. Slots stay when the VM is restarted.

Examples:
  tidectl slot add debian --size 64MiB
  tidectl slot add debian --size 512MiB --base 0x80000000 --slot 5")]
pub struct AddArgs {
    #[command(flatten)]
    vm: VmArg,
    /// How much: a multiple of 2 MiB, up to 512 MiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: u64,
    /// Where the guest sees it, a multiple of 2 MiB; without this, behind all its other memory.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    base: Option<u64>,
    /// Its number, 3 to 18; without this, the lowest that is free.
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u16>,
}

/// What to delete.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest must have stopped using it: what touches it from now on gets an external abort. Its content is gone,
and so is what a dirty log knows of it; what is still wanted of an epoch must be read before.

Example:
  tidectl slot delete debian 3")]
pub struct DeleteArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Its number, as `tidectl info` shows it.
    slot: u16,
}

pub(super) fn add(context: &mut Context, args: &AddArgs) -> Result<()> {
    let sizes = HOT_SLOT_UNIT..=HOT_SLOT_BYTES_MAX;
    if !sizes.contains(&args.size) || !args.size.is_multiple_of(HOT_SLOT_UNIT) {
        return Err(Error::Usage(format!(
            "--size {} is not possible; it may be a multiple of {}, up to {}; for more, add several slots",
            size(args.size),
            size(HOT_SLOT_UNIT),
            size(HOT_SLOT_BYTES_MAX)
        )));
    }
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let slots = client.info(vm.id)?.slots;
    let id = match args.slot {
        Some(id) => SlotId(id),
        None => free_number(&vm, &slots)?,
    };
    let base = args.base.unwrap_or_else(|| behind(&slots));
    let bar = context.ui.bar("adding a memory slot");
    client.add_slot(vm.id, id, base, args.size, &mut |done, total| {
        bar.set(done, total)
    })?;
    drop(bar);
    let more = format!(": {base:#x}, {}", size(args.size));
    show(context, client, &vm, (id, "added", &more))
}

/// The lowest number that is free.
fn free_number(vm: &VmSummary, slots: &[SlotInfo]) -> Result<SlotId> {
    let mut numbers = (HOT_SLOT_FIRST..=HOT_SLOT_LAST).map(SlotId);
    let free = numbers.find(|id| slots.iter().all(|slot| slot.id != *id));
    free.ok_or_else(|| {
        Error::Usage(format!(
            "{} has slots {HOT_SLOT_FIRST} to {HOT_SLOT_LAST}, and there are no more; `tidectl slot delete` one",
            vm.name
        ))
    })
}

/// The first address behind all memory where a slot may begin.
fn behind(slots: &[SlotInfo]) -> u64 {
    let end = |slot: &SlotInfo| {
        slot.base_ipa
            .saturating_add(slot.pages.saturating_mul(PAGE_SIZE))
    };
    let last = slots.iter().map(end).max().unwrap_or(0);
    last.checked_next_multiple_of(HOT_SLOT_UNIT).unwrap_or(last)
}

pub(super) fn delete(context: &mut Context, args: &DeleteArgs) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let id = SlotId(args.slot);
    let bar = context.ui.bar("deleting a memory slot");
    client.delete_slot(vm.id, id, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    show(context, client, &vm, (id, "deleted", ""))
}

fn show(
    context: &mut Context,
    mut client: Client,
    vm: &VmSummary,
    (id, what, more): (SlotId, &str, &str),
) -> Result<()> {
    let slots = client.info(vm.id)?.slots;
    client.close();
    let json = json!({
        "schema": 1,
        "vm": { "id": vm.id.0, "name": vm.name },
        "slot": id.0,
        "slots": slots.iter().map(super::inspect::slot_json).collect::<Vec<_>>(),
    });
    context
        .ui
        .done(&json, || format!("{}: slot {id} {what}{more}\n", vm.name))
}
