//! How the bundle comes to the image: by U-Boot's `booti`, by QEMU's `-initrd`, under a
//! reservation, and where it cannot be.

use anyhow::{Context, Result, ensure};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::devicetree::{self, Reservation};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::message::VmState;

use crate::case::Case;

const MACHINE: &str = "virt";
/// Where QEMU puts an initrd: 128 MiB into RAM.
const INITRD: u64 = 0x4800_0000;
/// Where QEMU puts the image: 2 MiB into RAM.
const IMAGE: u64 = 0x4020_0000;
/// Where U-Boot finds the image, the bundle, and QEMU's devicetree.
const LOADED_IMAGE: u64 = 0x4400_0000;
const LOADED_BUNDLE: u64 = 0x4800_0000;
const LOADED_DEVICETREE: u64 = 0x4000_0000;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("handover_by_uboot_booti", 90, |script| {
            by_uboot(script, Reservation::Entry)
        }),
        Case::new("handover_by_uboot_booti_in_a_reserved_node", 90, |script| {
            by_uboot(script, Reservation::Node)
        }),
        Case::new("handover_under_memreserve", 60, |script| {
            reserved(script, Reservation::Entry)
        }),
        Case::new("handover_under_a_reserved_node", 60, |script| {
            reserved(script, Reservation::Node)
        }),
        Case::new("handover_under_no_map", 60, no_map),
        Case::new("handover_over_the_image", 60, |script| {
            misplaced(
                script,
                IMAGE..IMAGE + 0x1000,
                "overlaps the hypervisor's image",
            )
        }),
        Case::new("handover_over_the_devicetree", 60, |script| {
            // QEMU puts the devicetree where an initrd would end.
            misplaced(script, INITRD..INITRD + 0x1000, "overlaps the devicetree")
        }),
        Case::new("handover_past_the_end_of_memory", 60, |script| {
            misplaced(script, 0x7fff_f000..0x8000_1000, "is not all memory")
        }),
    ]
}

/// The guest runs, starts again from the same bundle, and the bundle is nobody's memory.
fn guest_runs_twice(target: &mut Target) -> Result<()> {
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("oracle")?;
    host.until_running(vm)?;
    // Its files are read again, and their CRCs compared, after its memory was cleared.
    host.client().reset(vm)?;
    for _ in 0..600 {
        let info = host.info(vm)?;
        if info.summary.state == VmState::Running && info.restarts == 1 {
            host.finish();
            return target.still_on();
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    anyhow::bail!("it did not start again")
}

fn by_uboot(script: &mut Script, how: Reservation) -> Result<()> {
    // Most of the machine's memory: frames of the bundle, if they were free, would be in it.
    let bundle = guests::pack([guests::oracle(1, Mib(512))?])?;
    let size = bundle.len();
    let file = script.path("guests.bundle")?;
    std::fs::write(&file, bundle)?;
    let loaded = vec![
        (Artifact::Image.path()?, LOADED_IMAGE),
        (file, LOADED_BUNDLE),
    ];
    let payload = Payload::firmware(Artifact::UBoot.path()?, loaded);
    let target = script.start(MACHINE, &payload)?;
    target
        .expect("Hit any key to stop autoboot")
        .context("U-Boot did not start")?;
    target.line().send(" ")?;
    target.expect("=> ").context("no U-Boot prompt")?;
    let command = |line: &str| {
        target.type_line(line)?;
        target
            .expect("=> ")
            .with_context(|| format!("U-Boot: {line}"))
    };
    if how == Reservation::Node {
        // The bundle stays where it is, and a node says so too.
        for line in [
            "setenv initrd_high 0xffffffffffffffff",
            &format!("fdt addr {LOADED_DEVICETREE:x}"),
            "fdt resize 1000",
            "fdt mknode / reserved-memory",
            "fdt set /reserved-memory \\#address-cells <2>",
            "fdt set /reserved-memory \\#size-cells <2>",
            "fdt set /reserved-memory ranges",
            &format!("fdt mknode /reserved-memory initrd@{LOADED_BUNDLE:x}"),
            &format!(
                "fdt set /reserved-memory/initrd@{LOADED_BUNDLE:x} reg <0 {LOADED_BUNDLE:#x} 0 {size:#x}>"
            ),
        ] {
            let said = command(line)?;
            ensure!(
                !said.contains("libfdt") && !said.contains("Usage"),
                "U-Boot: {line}: {said}"
            );
        }
    }
    target.type_line(&format!(
        "booti {LOADED_IMAGE:x} {LOADED_BUNDLE:x}:{size:x} {LOADED_DEVICETREE:x}"
    ))?;
    target.expect("Starting kernel")?;
    guest_runs_twice(target)
}

/// QEMU starts the image with a bundle and this devicetree.
fn reserved(script: &mut Script, how: Reservation) -> Result<()> {
    let target = start_reserved(script, how)?;
    guest_runs_twice(target)
}

fn start_reserved(script: &mut Script, how: Reservation) -> Result<&mut Target> {
    let bundle = guests::pack([guests::oracle(1, Mib(512))?])?;
    let size = bundle.len() as u64;
    let (file, tree) = (script.path("guests.bundle")?, script.path("machine.dtb")?);
    std::fs::write(&file, bundle)?;
    let mut edited = devicetree::of_machine(MACHINE, &tree)?;
    devicetree::reserve(&mut edited, how, INITRD, size)?;
    std::fs::write(&tree, edited.to_dtb())?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(file)
        .devicetree(tree);
    script.start(MACHINE, &payload)
}

fn no_map(script: &mut Script) -> Result<()> {
    let target = start_reserved(script, Reservation::NoMap)?;
    refused(target, "is reserved with `no-map`")
}

/// The devicetree says that the initrd is where it cannot be.
fn misplaced(script: &mut Script, place: std::ops::Range<u64>, why: &str) -> Result<()> {
    let tree = script.path("machine.dtb")?;
    let mut edited = devicetree::of_machine(MACHINE, &tree)?;
    devicetree::set_initrd(&mut edited, place)?;
    std::fs::write(&tree, edited.to_dtb())?;
    let payload = Payload::kernel(Artifact::Image.path()?).devicetree(tree);
    let target = script.start(MACHINE, &payload)?;
    refused(target, why)
}

/// One line says why, and the shell is there.
fn refused(target: &mut Target, why: &str) -> Result<()> {
    let said = target.to_prompt()?;
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("ERROR")).collect();
    ensure!(
        errors.len() == 1 && errors.iter().all(|line| line.contains(why)),
        "it should say that the bundle {why}: {errors:?}"
    );
    let list = target.shell("list")?;
    ensure!(!list.contains("running"), "a guest was started: {list:?}");
    target.still_on()
}
