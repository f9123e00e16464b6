//! The manifest and what must hold for it.

use super::{BLOB_ALIGN, BundleError};
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Longest VM name.
pub const NAME_MAX: usize = 31;

/// Most vCPUs of a VM.
pub const VCPUS_MAX: u8 = 16;

/// Longest command line, as Linux on arm64 takes it.
const COMMAND_LINE_MAX: usize = 2047;

/// Memory comes in blocks of this.
const MEMORY_UNIT: u64 = 2 << 20;

/// Most parts of a program.
pub const SEGMENTS_MAX: usize = 32;

/// Where a guest's RAM begins, as on QEMU's `virt`.
pub const RAM_BASE: u64 = 0x4000_0000;

/// The most of an image in flash: a bank of QEMU's `virt`.
pub const FLASH_MAX: u64 = 64 << 20;

/// Most VMs: the list of them must fit the shortest answer.
pub const VMS_MAX: usize = 16;

/// All a bundle describes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// About the machine.
    pub machine: MachineOptions,
    /// The guests, in the order of their ids.
    pub vms: Vec<VmSpec>,
}

/// What the bundle asks of the machine. EL2's command line overrides it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MachineOptions {
    /// What to do when the last VM has stopped.
    pub when_all_stopped: WhenAllStopped,
}

/// What to do when the last VM has stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum WhenAllStopped {
    /// Go on answering the shell and the host.
    #[default]
    StayUp,
    /// Power the machine off.
    PowerOff,
}

/// One guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmSpec {
    /// Unique, printable, at most [`NAME_MAX`] bytes.
    pub name: String,
    /// 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// A multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Whether it starts with the machine.
    pub autostart: bool,
    /// What it starts.
    pub boot: Boot,
    /// What its counters do while it is paused.
    pub clock: Clock,
}

/// What a guest's counters do while it is paused. Its real-time clock goes on in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Clock {
    /// They stand still: it notices nothing.
    #[default]
    Stop,
    /// They run on: it sees that time has passed.
    Run,
}

/// What a guest starts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Boot {
    /// A program in RAM.
    Kernel(Kernel<Blob>),
    /// Firmware, read-only at address 0, where the reset vector is.
    Firmware(Firmware<Blob>),
}

/// Firmware in flash, as on QEMU's `virt`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Firmware<File> {
    /// The image, at most [`FLASH_MAX`] bytes.
    pub image: File,
    /// What its variables are at the first start, at most as much. `None`: erased.
    pub variables: Option<File>,
    /// What it is given to start, by `fw_cfg`. `None`: that is its own matter.
    pub kernel: Option<Payload<File>>,
}

/// What firmware is given to start. It is not laid out in RAM: firmware asks for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Payload<File> {
    /// The kernel: for EDK2 an EFI program.
    pub kernel: File,
    /// Its initial RAM disk.
    pub initrd: Option<File>,
    /// Its command line.
    pub cmdline: String,
}

impl<File> Firmware<File> {
    /// The same with other files.
    pub fn map<Other>(self, mut other: impl FnMut(File) -> Other) -> Firmware<Other> {
        Firmware {
            image: other(self.image),
            variables: self.variables.map(&mut other),
            kernel: self.kernel.map(|payload| Payload {
                kernel: other(payload.kernel),
                initrd: payload.initrd.map(&mut other),
                cmdline: payload.cmdline,
            }),
        }
    }
}

impl Firmware<Blob> {
    fn check(&self, name: &str) -> Result<(), BundleError> {
        match &self.kernel {
            Some(payload) => check_command_line(name, &payload.cmdline),
            None => Ok(()),
        }
    }

    /// Checks that each bank of flash holds what goes there, of files that are in the bundle.
    fn check_flash(&self, name: &str) -> Result<(), BundleError> {
        let variables = self.variables.map(|variables| ("variables", variables));
        for (what, file) in core::iter::once(("firmware", self.image)).chain(variables) {
            if file.len > FLASH_MAX {
                return Err(BundleError::Flash(String::from(name), what, file.len));
            }
        }
        Ok(())
    }
}

fn check_command_line(name: &str, text: &str) -> Result<(), BundleError> {
    if text.len() > COMMAND_LINE_MAX || text.contains('\0') {
        return Err(BundleError::CommandLine(String::from(name)));
    }
    Ok(())
}

/// A program, laid out in a guest's RAM: what goes where, and where it is entered. `File` is a
/// [`Blob`], or the bytes themselves until they are packed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kernel<File> {
    /// Where the first vCPU begins, an address inside a segment.
    pub entry: u64,
    /// Its parts, 1 to [`SEGMENTS_MAX`], none over another.
    pub segments: Vec<Segment<File>>,
    /// Its initial RAM disk.
    pub initrd: Option<Initrd<File>>,
    /// Where its devicetree goes, whose address is in x0. `None`: there is no room for one.
    pub devicetree: Option<u64>,
    /// Its command line.
    pub cmdline: String,
}

/// A part of a program.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Segment<File> {
    /// Its first address.
    pub address: u64,
    /// Bytes of memory that it takes, not 0. Those past the file are zero at each start.
    pub size: u64,
    /// What is at its beginning.
    pub file: Option<File>,
}

/// An initial RAM disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Initrd<File> {
    /// Its first address.
    pub address: u64,
    /// The file.
    pub file: File,
}

impl<File> Kernel<File> {
    /// The same with other files.
    pub fn map<Other>(self, mut other: impl FnMut(File) -> Other) -> Kernel<Other> {
        let segments = self.segments.into_iter().map(|segment| Segment {
            address: segment.address,
            size: segment.size,
            file: segment.file.map(&mut other),
        });
        Kernel {
            entry: self.entry,
            segments: segments.collect(),
            initrd: self.initrd.map(|initrd| Initrd {
                address: initrd.address,
                file: other(initrd.file),
            }),
            devicetree: self.devicetree,
            cmdline: self.cmdline,
        }
    }
}

impl Kernel<Blob> {
    /// What it takes of the RAM: each range's name, first address and size.
    pub fn ranges(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        let segments = self.segments.iter();
        let segments = segments.map(|segment| ("segment", segment.address, segment.size));
        let initrd = self.initrd.as_ref();
        segments.chain(initrd.map(|initrd| ("initrd", initrd.address, initrd.file.len)))
    }

    /// Checks that everything is in a RAM of so many bytes, and nothing over anything else.
    fn check(&self, name: &str, memory_bytes: u64) -> Result<(), BundleError> {
        let name = || String::from(name);
        check_command_line(&name(), &self.cmdline)?;
        if self.segments.is_empty() || self.segments.len() > SEGMENTS_MAX {
            return Err(BundleError::Segments(name(), self.segments.len()));
        }
        let in_ram = |address: u64, size: u64| {
            let offset = address.checked_sub(RAM_BASE);
            let end = offset.and_then(|offset| offset.checked_add(size));
            address.checked_add(size).is_some() && end.is_some_and(|end| end <= memory_bytes)
        };
        for (index, (what, address, size)) in self.ranges().enumerate() {
            if size == 0 || !in_ram(address, size) {
                return Err(BundleError::Place(name(), what, address, size));
            }
            // Both ranges were found to end in RAM: neither sum wraps.
            let over =
                |&(_, other, len): &(_, u64, u64)| address < other + len && other < address + size;
            if let Some((other, at, _)) = self.ranges().take(index).find(over) {
                return Err(BundleError::Overlap(name(), (what, address), (other, at)));
            }
        }
        for segment in &self.segments {
            if let Some(file) = &segment.file
                && file.len > segment.size
            {
                return Err(BundleError::Segment(name(), segment.address));
            }
        }
        let inside = |segment: &Segment<Blob>| {
            self.entry
                .checked_sub(segment.address)
                .is_some_and(|offset| offset < segment.size)
        };
        if !self.entry.is_multiple_of(4) || !self.segments.iter().any(inside) {
            return Err(BundleError::Entry(name(), self.entry));
        }
        match self.devicetree {
            Some(address) if !address.is_multiple_of(8) || !in_ram(address, 8) => {
                Err(BundleError::Place(name(), "devicetree", address, 8))
            }
            _ => Ok(()),
        }
    }
}

/// A file inside the bundle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Blob {
    /// From the start of the bundle, a multiple of [`BLOB_ALIGN`].
    pub offset: u64,
    /// Its length, not 0.
    pub len: u64,
    /// CRC-32C of its bytes.
    pub crc32c: u32,
}

impl Manifest {
    /// Checks everything that does not need the files' bytes.
    pub(super) fn check(&self, manifest_end: u64, total: u64) -> Result<(), BundleError> {
        if self.vms.is_empty() {
            return Err(BundleError::NoVms);
        }
        if self.vms.len() > VMS_MAX {
            return Err(BundleError::TooManyVms(self.vms.len()));
        }
        for (index, vm) in self.vms.iter().enumerate() {
            vm.check()?;
            if self
                .vms
                .iter()
                .take(index)
                .any(|other| other.name == vm.name)
            {
                return Err(BundleError::DuplicateName(vm.name.clone()));
            }
            for blob in vm.boot.blobs() {
                let inside = blob.len > 0
                    && blob.offset >= manifest_end
                    && blob.offset.is_multiple_of(BLOB_ALIGN)
                    && blob
                        .offset
                        .checked_add(blob.len)
                        .is_some_and(|end| end <= total);
                if !inside {
                    return Err(BundleError::BlobRange(vm.name.clone(), blob));
                }
            }
            if let Boot::Firmware(firmware) = &vm.boot {
                firmware.check_flash(&vm.name)?;
            }
        }
        Ok(())
    }
}

impl VmSpec {
    /// Checks what concerns this VM alone, its files' places excepted.
    pub(super) fn check(&self) -> Result<(), BundleError> {
        if !is_name(&self.name) {
            return Err(BundleError::Name(self.name.chars().take(64).collect()));
        }
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return Err(BundleError::Vcpus(self.name.clone(), self.vcpus));
        }
        if self.memory_bytes == 0 || !self.memory_bytes.is_multiple_of(MEMORY_UNIT) {
            return Err(BundleError::Memory(self.name.clone(), self.memory_bytes));
        }
        match &self.boot {
            Boot::Kernel(kernel) => kernel.check(&self.name, self.memory_bytes),
            Boot::Firmware(firmware) => firmware.check(&self.name),
        }
    }
}

impl Boot {
    /// The files it needs.
    pub fn blobs(&self) -> impl Iterator<Item = Blob> {
        let (kernel, firmware) = match self {
            Self::Kernel(kernel) => (Some(kernel), None),
            Self::Firmware(firmware) => (None, Some(firmware)),
        };
        let files = kernel.into_iter().flat_map(|kernel| {
            let segments = kernel.segments.iter().filter_map(|segment| segment.file);
            segments.chain(kernel.initrd.as_ref().map(|initrd| initrd.file))
        });
        let of_firmware = firmware.into_iter().flat_map(|firmware| {
            let payload = firmware.kernel.as_ref();
            let payload =
                payload.map(|payload| core::iter::once(payload.kernel).chain(payload.initrd));
            core::iter::once(firmware.image)
                .chain(firmware.variables)
                .chain(payload.into_iter().flatten())
        });
        files.chain(of_firmware)
    }
}

/// Digits alone would be taken for an id.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=NAME_MAX).contains(&name.len())
        && name.chars().all(allowed)
        && !name.chars().all(|c| c.is_ascii_digit())
}
