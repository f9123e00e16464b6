//! The guests that scripts run, packed into bundles.

use std::path::Path;

use anyhow::{Context, Result};
use tidectl::kernel;
use tidemark_wire::bundle::{
    BootFiles, Builder, Clock, Firmware, MachineOptions, Payload, VmDraft, WhenAllStopped,
};

use crate::artifacts::Artifact;

/// The command line of every Linux guest, so that boots are comparable.
pub const LINUX_COMMAND_LINE: &str = "console=ttyAMA0";

/// The prompt of the Linux guests' shell.
pub const LINUX_PROMPT: &str = "/ # ";

/// A guest's memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mib(pub u64);

impl Mib {
    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 << 20
    }
}

/// Debian's kernel with busybox.
pub fn linux(name: &str, vcpus: u8, memory: Mib) -> Result<VmDraft> {
    linux_with(name, vcpus, memory, LINUX_COMMAND_LINE)
}

/// The same with another command line.
pub fn linux_with(name: &str, vcpus: u8, memory: Mib, command_line: &str) -> Result<VmDraft> {
    let files = (
        read(&Artifact::Kernel.path()?)?,
        Some(read(&Artifact::Initramfs.path()?)?),
    );
    of_kernel(name, vcpus, memory, files, command_line)
}

/// A guest of any kernel that `tidectl bundle` takes, with its initrd.
pub fn of_kernel(
    name: &str,
    vcpus: u8,
    memory: Mib,
    (kernel, initrd): (Vec<u8>, Option<Vec<u8>>),
    command_line: &str,
) -> Result<VmDraft> {
    let laid_out = kernel::lay_out(kernel, initrd, command_line.to_owned(), memory.bytes());
    let (_, kernel) = laid_out.with_context(|| format!("the kernel of {name}"))?;
    Ok(draft(name, vcpus, memory, BootFiles::Kernel(kernel)))
}

/// The guest that writes pages and says which.
pub fn oracle(vcpus: u8, memory: Mib) -> Result<VmDraft> {
    payload("oracle", Artifact::Oracle, vcpus, memory)
}

/// The guest that measures.
pub fn bench(vcpus: u8, memory: Mib) -> Result<VmDraft> {
    payload("bench", Artifact::Bench, vcpus, memory)
}

/// The guest that does what no guest may.
pub fn hostile(vcpus: u8, memory: Mib) -> Result<VmDraft> {
    payload("hostile", Artifact::Hostile, vcpus, memory)
}

/// The same, started by firmware, so that it has a flash and `fw_cfg`.
pub fn hostile_by_firmware(vcpus: u8, memory: Mib) -> Result<VmDraft> {
    let payload = read(&Artifact::Hostile.path()?)?;
    let boot = BootFiles::Firmware(Firmware {
        image: starter(payload),
        variables: None,
        kernel: None,
    });
    Ok(draft("hostile", vcpus, memory, boot))
}

/// The least firmware there can be: copies the Image that is behind it to RAM, and starts it as the boot protocol has it.
fn starter(image: Vec<u8>) -> Vec<u8> {
    const IMAGE: usize = 0x1000;
    // ldp and stp move 16 bytes.
    let size = image.len().next_multiple_of(16);
    let code: [u32; 18] = [
        0x1000_8001, //     adr  x1, IMAGE
        0xd2a8_0402, //     mov  x2, #0x40200000
        0x5800_0203, //     ldr  x3, size
        0x8b01_0063, //     add  x3, x3, x1
        0xaa02_03e6, //     mov  x6, x2
        0xa8c1_1424, // 1:  ldp  x4, x5, [x1], #16
        0xa881_1444, //     stp  x4, x5, [x2], #16
        0xeb03_003f, //     cmp  x1, x3
        0x54ff_ffa3, //     b.lo 1b
        0xd503_3f9f, //     dsb  sy
        0xd508_751f, //     ic   iallu
        0xd503_3f9f, //     dsb  sy
        0xd503_3fdf, //     isb
        0xd2a8_0000, //     mov  x0, #0x40000000: the devicetree
        0xaa1f_03e1, //     mov  x1, xzr
        0xaa1f_03e2, //     mov  x2, xzr
        0xaa1f_03e3, //     mov  x3, xzr
        0xd61f_00c0, //     br   x6
    ];
    let mut firmware: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    firmware.extend((size as u64).to_le_bytes());
    firmware.resize(IMAGE, 0);
    firmware.extend(image);
    firmware.resize(IMAGE + size, 0);
    firmware
}

/// Firmware alone.
fn firmware(artifact: Artifact) -> Result<Firmware<Vec<u8>>> {
    Ok(Firmware {
        image: read(&artifact.path()?)?,
        variables: None,
        kernel: None,
    })
}

/// Debian's kernel with busybox, started by Debian's EDK2.
pub fn linux_by_edk2() -> Result<VmDraft> {
    let boot = BootFiles::Firmware(Firmware {
        kernel: Some(Payload {
            kernel: read(&Artifact::Kernel.path()?)?,
            initrd: Some(read(&Artifact::Initramfs.path()?)?),
            cmdline: LINUX_COMMAND_LINE.to_owned(),
        }),
        ..firmware(Artifact::Edk2)?
    });
    Ok(draft("edk2", 2, Mib(512), boot))
}

/// Debian's U-Boot.
pub fn uboot() -> Result<VmDraft> {
    let boot = BootFiles::Firmware(firmware(Artifact::UBoot)?);
    Ok(draft("uboot", 1, Mib(128), boot))
}

/// Debian's U-Boot, with these variables in its environment and no others.
pub fn uboot_with(variables: &[&str]) -> Result<VmDraft> {
    // CONFIG_ENV_SIZE of qemu_arm64: a CRC of the rest, then strings that end with zero, and zeros.
    const SIZE: usize = 0x4_0000;
    let mut strings = variables.join("\0").into_bytes();
    strings.resize(SIZE - size_of::<u32>(), 0);
    let mut crc = flate2::Crc::new();
    crc.update(&strings);
    let mut environment = crc.sum().to_le_bytes().to_vec();
    environment.extend(strings);
    let boot = BootFiles::Firmware(Firmware {
        variables: Some(environment),
        ..firmware(Artifact::UBoot)?
    });
    Ok(draft("uboot", 1, Mib(128), boot))
}

/// Debian's EDK2.
pub fn edk2() -> Result<VmDraft> {
    let boot = BootFiles::Firmware(firmware(Artifact::Edk2)?);
    Ok(draft("edk2", 1, Mib(128), boot))
}

fn payload(name: &str, artifact: Artifact, vcpus: u8, memory: Mib) -> Result<VmDraft> {
    of_kernel(name, vcpus, memory, (read(&artifact.path()?)?, None), "")
}

fn draft(name: &str, vcpus: u8, memory: Mib, boot: BootFiles) -> VmDraft {
    VmDraft {
        name: name.to_owned(),
        vcpus,
        memory_bytes: memory.bytes(),
        autostart: true,
        boot,
        clock: Clock::Stop,
    }
}

/// Reads a file, and names it if it cannot.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Packs `vms` as `tidectl bundle` does.
pub fn pack(vms: impl IntoIterator<Item = VmDraft>) -> Result<Vec<u8>> {
    let mut builder = Builder::new(MachineOptions {
        when_all_stopped: WhenAllStopped::StayUp,
    });
    for vm in vms {
        builder.vm(vm);
    }
    builder.finish().map_err(|error| anyhow::anyhow!("{error}"))
}
