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
}

/// What a guest starts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Boot {
    /// An arm64 `Image`, as a boot loader would start it.
    Kernel {
        /// The image.
        kernel: Blob,
        /// Its initial RAM disk.
        initrd: Option<Blob>,
        /// Its command line.
        cmdline: String,
    },
    /// Firmware, read-only at address 0, where the reset vector is.
    Firmware {
        /// The image.
        image: Blob,
    },
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
            let mut files = 0u64;
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
                files = files.saturating_add(blob.len);
            }
            if files > vm.memory_bytes {
                return Err(BundleError::TooBig(vm.name.clone(), files));
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
            Boot::Kernel { cmdline, .. }
                if cmdline.len() > COMMAND_LINE_MAX || cmdline.contains('\0') =>
            {
                Err(BundleError::CommandLine(self.name.clone()))
            }
            _ => Ok(()),
        }
    }
}

impl Boot {
    /// The files it needs.
    pub fn blobs(&self) -> impl Iterator<Item = Blob> + use<> {
        let (first, second) = match self {
            Self::Kernel { kernel, initrd, .. } => (*kernel, *initrd),
            Self::Firmware { image } => (*image, None),
        };
        core::iter::once(first).chain(second)
    }
}

/// Digits alone would be taken for an id.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=NAME_MAX).contains(&name.len())
        && name.chars().all(allowed)
        && !name.chars().all(|c| c.is_ascii_digit())
}
