//! `hash`: SHA-256 of a VM's memory, computed at EL2.

use super::{Context, VmArg};
use crate::Result;
use crate::image::hex;
use clap::Args;
use serde_json::json;
use tidemark_wire::message::SlotId;

/// What to hash.
#[derive(Debug, Args)]
#[command(after_help = "\
The VM must be paused; memory that changes has no hash.

Examples:
  tidectl pause debian && tidectl hash debian
  tidectl hash debian --slot 1 --json")]
pub struct HashArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Only this slot.
    #[arg(long)]
    slot: Option<u16>,
}

pub(super) fn run(context: &mut Context, args: &HashArgs) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&args.vm.vm)?;
    let slots: Vec<SlotId> = match args.slot {
        Some(slot) => vec![SlotId(slot)],
        None => client
            .info(vm.id)?
            .slots
            .iter()
            .map(|slot| slot.id)
            .collect(),
    };
    let mut hashes = Vec::new();
    let bar = context.ui.bar("hashing at EL2");
    for slot in slots {
        let hash = client.hash(vm.id, slot, &mut |done, total| bar.set(done, total))?;
        hashes.push((slot, hash));
    }
    drop(bar);
    client.close();
    let json = json!({
        "schema": 1,
        "vm": { "id": vm.id.0, "name": vm.name },
        "slots": hashes.iter().map(|(slot, hash)| json!({
            "id": slot.0,
            "sha256": hex(hash),
        })).collect::<Vec<_>>(),
    });
    context.ui.data(&json, || {
        hashes
            .iter()
            .map(|(slot, hash)| format!("{}  slot-{slot}\n", hex(hash)))
            .collect()
    })
}
