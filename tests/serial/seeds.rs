//! What a guest's devicetree says: QEMU's, but for what is listed here; and its random seeds.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode};
use dtoolkit::{Node, Property};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::devicetree;
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;
use tidemark_wire::bundle::{Boot, Bundle};
use tidemark_wire::message::{VmId, VmState};

use crate::case::Case;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("devicetree_is_qemus_but_for_what_is_listed", 60, as_qemus),
        Case::new("seeds_differ_at_each_start_by_rndr", 60, |script| {
            fresh(script, "virt", "random: RNDR")
        }),
        Case::new("seeds_differ_at_each_start_by_boot_seed", 60, |script| {
            fresh(script, "virt-a72", "random: the boot loader's seed")
        }),
        Case::new("seeds_without_entropy", 60, without_entropy),
        Case::new(
            "linux_on_a72_is_shuffled_and_has_entropy_at_once",
            120,
            linux,
        ),
    ]
}

/// A path that ends in `*` is a node with all that is in it.
const DIFFERENCES: [(&str, &str); 23] = [
    ("/:model", "whose board it is"),
    ("/:interrupt-parent", "QEMU numbers the CPUs first"),
    ("/intc@8000000:phandle", "QEMU numbers the CPUs first"),
    (
        "/cpus/cpu-map*",
        "flat: each vCPU is a core of one cluster, which is what no map means",
    ),
    (
        "/cpus/cpu@0:phandle",
        "the map that refers to it is left out",
    ),
    (
        "/cpus/cpu@1:phandle",
        "the map that refers to it is left out",
    ),
    ("/cpus/cpu@0:compatible", "the machine's CPU may be any"),
    ("/cpus/cpu@1:compatible", "the machine's CPU may be any"),
    ("/psci:migrate", "MIGRATE is not served"),
    (
        "/intc@8000000:reg",
        "redistributors of the vCPUs there are, not of 123",
    ),
    ("/intc@8000000:ranges", "nothing is behind it"),
    ("/intc@8000000/its@8080000*", "no ITS: no device sends MSIs"),
    ("/chosen:bootargs", "QEMU writes it only with a kernel"),
    ("/chosen:rng-seed", "random"),
    ("/chosen:kaslr-seed", "random"),
    ("/pmu*", "guests see no PMU"),
    ("/pcie@10000000*", "no PCI"),
    ("/platform-bus@c000000*", "nothing is ever on it"),
    (
        "/pl061@9030000*",
        "no GPIO: a guest is stopped by its host, not by a key",
    ),
    (
        "/gpio-keys*",
        "no GPIO: a guest is stopped by its host, not by a key",
    ),
    ("/fw-cfg@9020000*", "not for kernels"),
    ("/flash@0*", "not for kernels"),
    ("/virtio_mmio@*", "the transports are empty"),
];

/// Properties by path: `/node:property`. Nodes count as empty properties without a name.
fn flat(tree: &DeviceTree) -> BTreeMap<String, Vec<u8>> {
    fn walk(node: &DeviceTreeNode, path: &str, out: &mut BTreeMap<String, Vec<u8>>) {
        let name = if path.is_empty() { "/" } else { path };
        out.insert(format!("{name}:"), Vec::new());
        for property in node.properties() {
            let value = property.value().to_vec();
            out.insert(format!("{name}:{}", property.name()), value);
        }
        for child in node.children() {
            walk(child, &format!("{path}/{}", child.name()), out);
        }
    }
    let mut out = BTreeMap::new();
    walk(&tree.root, "", &mut out);
    out
}

fn is_listed(path: &str, entry: &str) -> bool {
    match entry.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => path == entry,
    }
}

/// The devicetree of a guest of `bundle`, out of its memory.
fn read(host: &mut Host, vm: VmId, bundle: &[u8]) -> Result<Vec<u8>> {
    let bundle = Bundle::parse(bundle).map_err(|error| anyhow::anyhow!("{error}"))?;
    let spec = bundle.manifest().vms.get(usize::from(vm.0));
    let Some(Boot::Kernel(kernel)) = spec.map(|spec| &spec.boot) else {
        anyhow::bail!("not a kernel");
    };
    let at = kernel.devicetree.context("it has no devicetree")?;
    let mut bytes = vec![0; 64 << 10];
    host.client()
        .read_memory(vm, [(at, bytes.len() as u64)], |from, part| {
            let start = usize::try_from(from - at).unwrap_or(usize::MAX);
            if let Some(place) = bytes
                .get_mut(start..)
                .and_then(|rest| rest.get_mut(..part.len()))
            {
                place.copy_from_slice(part);
            }
            Ok(())
        })?;
    ensure!(
        bytes.starts_with(&[0xd0, 0x0d, 0xfe, 0xed]),
        "no devicetree at {at:#x}: {:02x?}",
        bytes.get(..64)
    );
    let size = bytes.get(4..).and_then(|rest| rest.first_chunk());
    let size = u32::from_be_bytes(*size.context("no header")?);
    bytes.truncate(usize::try_from(size)?);
    Ok(bytes)
}

fn as_qemus(script: &mut Script) -> Result<()> {
    const MEMORY: Mib = Mib(64);
    let bundle = guests::pack([guests::oracle(2, MEMORY)?])?;
    let file = script.path("qemu.dtb")?;
    // The same machine under no hypervisor, with as much memory as the guest.
    let qemus = devicetree::of_changed_machine("virt-el1", &file, |machine| {
        machine.memory = format!("{}M", MEMORY.0);
    })?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    host.until_running(vm)?;
    let ours = devicetree::read(&read(&mut host, vm, &bundle)?)?;
    host.finish();
    let (ours, qemus) = (flat(&ours), flat(&qemus));
    let mut used = vec![false; DIFFERENCES.len()];
    let mut unlisted = Vec::new();
    let only_theirs = qemus.keys().filter(|path| !ours.contains_key(*path));
    for path in ours.keys().chain(only_theirs) {
        if ours.get(path) == qemus.get(path) {
            continue;
        }
        let entry = DIFFERENCES
            .iter()
            .position(|(entry, _)| is_listed(path, entry));
        match entry.and_then(|entry| used.get_mut(entry)) {
            Some(used) => *used = true,
            None => unlisted.push(format!(
                "{path}: {:02x?} here, {:02x?} in QEMU",
                ours.get(path),
                qemus.get(path)
            )),
        }
    }
    ensure!(
        unlisted.is_empty(),
        "unlisted differences:\n{}",
        unlisted.join("\n")
    );
    let listed = DIFFERENCES.iter().zip(used);
    let needless: Vec<&str> = listed
        .filter(|(_, used)| !used)
        .map(|((entry, _), _)| *entry)
        .collect();
    ensure!(
        needless.is_empty(),
        "listed, and there is no such difference: {needless:?}"
    );
    target.still_on()
}

/// A guest's kaslr-seed and rng-seed.
fn seeds(tree: &[u8]) -> Result<[Option<Vec<u8>>; 2]> {
    let fdt = Fdt::new(tree).map_err(|error| anyhow::anyhow!("{error}"))?;
    let chosen = fdt.find_node("/chosen").context("no /chosen")?;
    let seed = |name| chosen.property(name).map(|seed| seed.value().to_vec());
    Ok([seed("kaslr-seed"), seed("rng-seed")])
}

fn restart(host: &mut Host, vm: VmId, restarts: u32) -> Result<()> {
    host.client().reset(vm)?;
    for _ in 0..600 {
        let info = host.info(vm)?;
        if info.summary.state == VmState::Running && info.restarts == restarts {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    anyhow::bail!("it did not start again")
}

fn fresh(script: &mut Script, machine: &str, source: &str) -> Result<()> {
    let mut second = guests::oracle(1, Mib(32))?;
    second.name = "second".into();
    let bundle = guests::pack([guests::oracle(1, Mib(32))?, second])?;
    let target = script.start_tidemark(machine, &bundle, "")?;
    let said = target.to_prompt()?;
    ensure!(
        said.contains(source),
        "the log does not say {source:?}: {said}"
    );
    let mut host = Host::connect(target)?;
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for name in ["oracle", "second"] {
        let vm = host.vm(name)?;
        host.until_running(vm)?;
        for start in 0..3 {
            if start > 0 {
                restart(&mut host, vm, start)?;
            }
            let [kaslr, rng] = seeds(&read(&mut host, vm, &bundle)?)?;
            let kaslr = kaslr.context("no kaslr-seed")?;
            let rng = rng.context("no rng-seed")?;
            ensure!(
                (kaslr.len(), rng.len()) == (8, 32),
                "{kaslr:02x?}, {rng:02x?}"
            );
            for part in kaslr.chunks(8).chain(rng.chunks(8)) {
                ensure!(part.iter().any(|&byte| byte != 0), "{name}: zeros");
                ensure!(
                    !seen.iter().any(|old| old == part),
                    "{name}: {part:02x?} twice"
                );
                seen.push(part.to_vec());
            }
        }
    }
    host.finish();
    target.still_on()
}

/// No instruction, no firmware, no seed: the log says so, and no guest is told that it has entropy.
fn without_entropy(script: &mut Script) -> Result<()> {
    const MACHINE: &str = "virt-a72";
    let bundle = guests::pack([guests::oracle(1, Mib(32))?])?;
    let (file, tree) = (script.path("guests.bundle")?, script.path("machine.dtb")?);
    std::fs::write(&file, &bundle)?;
    let mut edited = devicetree::of_machine(MACHINE, &tree)?;
    let chosen = edited.find_node_mut("/chosen").context("no /chosen")?;
    for name in ["rng-seed", "kaslr-seed"] {
        chosen.remove_property(name).context(name)?;
    }
    std::fs::write(&tree, edited.to_dtb())?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(file)
        .devicetree(tree);
    let target = script.start(MACHINE, &payload)?;
    let said = target.to_prompt()?;
    ensure!(
        said.contains("jitter alone"),
        "the log does not say so: {said}"
    );
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    host.until_running(vm)?;
    let [kaslr, rng] = seeds(&read(&mut host, vm, &bundle)?)?;
    ensure!(kaslr.is_some() && rng.is_none(), "{kaslr:02x?}, {rng:02x?}");
    host.finish();
    target.still_on()
}

fn linux(script: &mut Script) -> Result<()> {
    let bundle = guests::pack([guests::linux("linux", 1, Mib(512))?])?;
    let target = script.start_tidemark("virt-a72", &bundle, "console=linux poweroff=idle")?;
    target
        .expect("Booting Linux")
        .context("the kernel did not start")?;
    target.booted();
    target.expect(LINUX_PROMPT).context("no shell")?;
    target.type_line("dmesg | grep -E 'KASLR|crng|random:'")?;
    let said = target.expect(LINUX_PROMPT)?;
    ensure!(said.contains("KASLR enabled"), "not shuffled: {said}");
    let ready = said.lines().find(|line| line.contains("crng init done"));
    let ready = ready.with_context(|| format!("no entropy yet: {said}"))?;
    ensure!(ready.contains("[    0.000000]"), "it had to wait: {ready}");
    target.type_line("poweroff -f")?;
    target.powered_off()
}
