//! `list`, `info`, `pause`, `resume`, `reset`, `stop`, `power-off`.

use super::{Context, VmArg, vm_json};
use crate::Result;
use crate::client::Client;
use crate::output::table;
use crate::units::size;
use serde_json::{Value, json};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{Hold, SlotAccess, SlotInfo, VmId, VmInfo, VmState};

pub(super) fn list(context: &mut Context) -> Result<()> {
    let mut client = context.connect()?;
    let vms = client.list()?;
    // Why it failed is what one looks here for.
    let reasons = vms
        .iter()
        .map(|vm| match vm.state {
            VmState::Failed => Ok(client.info(vm.id)?.reason),
            _ => Ok(String::new()),
        })
        .collect::<Result<Vec<String>>>()?;
    let image = client.image().to_string();
    client.close();
    let json = json!({
        "schema": 1,
        "image": image,
        "vms": vms.iter().zip(&reasons).map(|(vm, reason)| {
            let mut json = vm_json(vm);
            if let Some(object) = json.as_object_mut() {
                object.insert("reason".into(), json!(reason));
            }
            json
        }).collect::<Vec<_>>(),
    });
    context.ui.data(&json, || {
        let mut rows = vec![
            ["ID", "NAME", "STATE", "VCPUS", "MEMORY", "REASON"]
                .map(String::from)
                .to_vec(),
        ];
        rows.extend(vms.iter().zip(&reasons).map(|(vm, reason)| {
            vec![
                vm.id.to_string(),
                vm.name.clone(),
                vm.state.to_string(),
                vm.vcpus.to_string(),
                size(vm.memory_bytes),
                reason.clone(),
            ]
        }));
        if reasons.iter().all(String::is_empty) {
            rows.iter_mut().for_each(|row| row.truncate(5));
        }
        table(&rows)
    })
}

pub(super) fn info(context: &mut Context, arg: &VmArg) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&arg.vm)?;
    let info = client.info(vm.id)?;
    client.close();
    context.ui.data(&info_json(&info), || info_text(&info))
}

pub(super) fn slot_json(slot: &SlotInfo) -> Value {
    let extents: Vec<Value> = slot
        .extents
        .iter()
        .map(|extent| json!({ "ipa": extent.ipa, "pa": extent.pa, "pages": extent.pages }))
        .collect();
    json!({
        "id": slot.id.0,
        "base_ipa": slot.base_ipa,
        "pages": slot.pages,
        "read_only": slot.access == SlotAccess::ReadOnly,
        "extents": extents,
        "more_extents": slot.more_extents,
    })
}

fn info_json(info: &VmInfo) -> Value {
    let (features, mappings, counters) = (&info.features, &info.mappings, &info.counters);
    json!({
        "schema": 1,
        "vm": vm_json(&info.summary),
        "reason": info.reason,
        "restarts": info.restarts,
        "slots": info.slots.iter().map(slot_json).collect::<Vec<_>>(),
        "features": {
            "hafdbs": features.hafdbs,
            "dbm_usable": features.dbm_usable,
            "bbm2": features.bbm2,
            "fwb": features.fwb,
            "tlb_range": features.tlb_range,
            "ttl": features.ttl,
            "lse": features.lse,
            "vmid16": features.vmid16,
            "ipa_bits": features.ipa_bits,
            "cpus": features.cpus,
        },
        "mappings": {
            "blocks_1g": mappings.blocks_1g,
            "blocks_2m": mappings.blocks_2m,
            "pages_4k": mappings.pages_4k,
        },
        "counters": {
            "exits": counters.exits,
            "hypercalls": counters.hypercalls,
            "mmio": counters.mmio,
            "wfi": counters.wfi,
            "irqs": counters.irqs,
            "translation_faults": counters.translation_faults,
            "write_faults": counters.write_faults,
            "splits": counters.splits,
            "collapses": counters.collapses,
            "tlbis": counters.tlbis,
        },
    })
}

fn info_text(info: &VmInfo) -> String {
    let vm = &info.summary;
    let mut out = format!(
        "VM {} {:?}: {}, {} vCPUs, {}, restarted {} times\n",
        vm.id,
        vm.name,
        vm.state,
        vm.vcpus,
        size(vm.memory_bytes),
        info.restarts
    );
    if !info.reason.is_empty() {
        out.push_str(&format!("reason: {}\n", info.reason));
    }
    for slot in &info.slots {
        let bytes = slot.pages.saturating_mul(PAGE_SIZE);
        let access = match slot.access {
            SlotAccess::ReadWrite => "read-write",
            SlotAccess::ReadOnly => "read-only",
        };
        let end = slot.base_ipa.saturating_add(bytes);
        out.push_str(&format!(
            "slot {}: {:#x}..{end:#x}, {}, {access}\n",
            slot.id,
            slot.base_ipa,
            size(bytes)
        ));
        for extent in &slot.extents {
            let bytes = size(extent.pages.saturating_mul(PAGE_SIZE));
            out.push_str(&format!(
                "  {:#x} is at {:#x}, {bytes}\n",
                extent.ipa, extent.pa
            ));
        }
        if slot.more_extents > 0 {
            out.push_str(&format!("  and {} more extents\n", slot.more_extents));
        }
    }
    let m = &info.mappings;
    out.push_str(&format!(
        "mapped by: {} x 1 GiB, {} x 2 MiB, {} x 4 KiB\n",
        m.blocks_1g, m.blocks_2m, m.pages_4k
    ));
    let f = &info.features;
    let present = [
        (f.dbm_usable, "DBM"),
        (f.bbm2, "BBM2"),
        (f.fwb, "FWB"),
        (f.tlb_range, "TLBIRANGE"),
        (f.ttl, "TTL"),
        (f.lse, "LSE"),
        (f.vmid16, "VMID16"),
    ];
    let names: Vec<&str> = present
        .iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| *name)
        .collect();
    out.push_str(&format!(
        "machine: {} CPUs, {}-bit guest addresses, HAFDBS={}, usable: {}\n",
        f.cpus,
        f.ipa_bits,
        f.hafdbs,
        if names.is_empty() {
            "none".into()
        } else {
            names.join(" ")
        }
    ));
    let c = &info.counters;
    out.push_str(&format!(
        "exits {}: hypercalls {}, mmio {}, wfi {}, interrupts {}\n\
         stage 2: translation faults {}, write faults {}, splits {}, collapses {}, TLBIs {}\n",
        c.exits,
        c.hypercalls,
        c.mmio,
        c.wfi,
        c.irqs,
        c.translation_faults,
        c.write_faults,
        c.splits,
        c.collapses,
        c.tlbis
    ));
    out
}

pub(super) fn pause(context: &mut Context, arg: &VmArg) -> Result<()> {
    change(context, arg, |client, vm| {
        client.pause(vm, Hold::Lasting).map(|()| VmState::Paused)
    })
}

pub(super) fn resume(context: &mut Context, arg: &VmArg) -> Result<()> {
    change(context, arg, |client, vm| client.resume(vm, Hold::Lasting))
}

pub(super) fn reset(context: &mut Context, arg: &VmArg) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&arg.vm)?;
    let starting = vm.state == VmState::Starting;
    let state = client.reset(vm.id)?;
    client.close();
    let json = json!({
        "schema": 1,
        "vm": { "id": vm.id.0, "name": vm.name, "state": state.to_string() },
        "was_starting": starting,
    });
    context.ui.done(&json, || {
        let why = match starting {
            true => " already, and anew: this reset adds no other start",
            false => "",
        };
        format!("{}: {state}{why}", vm.name)
    })
}

pub(super) fn stop(context: &mut Context, arg: &VmArg) -> Result<()> {
    change(context, arg, Client::stop)
}

fn change(
    context: &mut Context,
    arg: &VmArg,
    how: impl FnOnce(&mut Client, VmId) -> Result<VmState>,
) -> Result<()> {
    let mut client = context.connect()?;
    let vm = client.find(&arg.vm)?;
    let state = how(&mut client, vm.id)?;
    client.close();
    let json = json!({
        "schema": 1,
        "vm": { "id": vm.id.0, "name": vm.name, "state": state.to_string() },
    });
    context.ui.done(&json, || format!("{}: {state}", vm.name))
}

pub(super) fn power_off(context: &mut Context) -> Result<()> {
    let mut client = context.connect()?;
    client.power_off()?;
    context
        .ui
        .done(&json!({ "schema": 1, "powered_off": true }), || {
            "powered off".into()
        })
}
