//! Packing: the host's side of the bundle.

use super::manifest::{
    Blob, Boot, Clock, FLASH_MAX, Firmware, Kernel, MachineOptions, Manifest, VmSpec,
};
use super::{BLOB_ALIGN, Bundle, BundleError, FORMAT, HEADER_LEN, MAGIC};
use crate::checksum::crc32c;
use alloc::string::String;
use alloc::vec::Vec;

/// A guest as its owner describes it, with its files' contents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmDraft {
    /// Its name.
    pub name: String,
    /// Its vCPUs.
    pub vcpus: u8,
    /// Its memory.
    pub memory_bytes: u64,
    /// Whether it starts with the machine.
    pub autostart: bool,
    /// What it starts.
    pub boot: BootFiles,
    /// What its counters do while it is paused.
    pub clock: Clock,
}

/// What a guest starts, with contents in place of blobs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BootFiles {
    /// See [`Boot::Kernel`].
    Kernel(Kernel<Vec<u8>>),
    /// See [`Boot::Firmware`].
    Firmware(Firmware<Vec<u8>>),
}

/// What of an image for flash is packed: not what only fills a bank up. Debian's images are 64 MiB, of which 62 are
/// zero. Whole sectors of zeros at the end of an image of a bank's size, and of ones at the end of any, are what erased
/// flash is as good as; nothing is left of an image of nothing else.
#[must_use]
pub fn flash_contents(mut image: &[u8]) -> &[u8] {
    const SECTOR: usize = 256 << 10;
    let is_bank = image.len() as u64 == FLASH_MAX;
    while let Some(from) = image
        .len()
        .checked_sub(1)
        .map(|last| last / SECTOR * SECTOR)
    {
        let (front, rest) = image.split_at(from);
        let all = |wanted: u8| rest.iter().all(|byte| *byte == wanted);
        if !(all(0xff) || is_bank && all(0)) {
            break;
        }
        image = front;
    }
    image
}

fn unpadded(mut image: Vec<u8>) -> Vec<u8> {
    let len = flash_contents(&image).len();
    image.truncate(len);
    image
}

/// Collects guests and packs them.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    machine: MachineOptions,
    vms: Vec<VmSpec>,
    /// Distinct files with their CRC; guests that share a kernel share its bytes.
    files: Vec<(u32, Vec<u8>)>,
}

impl Builder {
    /// Starts without guests.
    #[must_use]
    pub fn new(machine: MachineOptions) -> Self {
        Self {
            machine,
            vms: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Adds a guest; its id is the number of guests before it.
    pub fn vm(&mut self, draft: VmDraft) {
        let boot = match draft.boot {
            BootFiles::Kernel(kernel) => Boot::Kernel(kernel.map(|bytes| self.file(bytes))),
            BootFiles::Firmware(mut firmware) => {
                firmware.image = unpadded(firmware.image);
                firmware.variables = firmware.variables.map(unpadded);
                firmware.variables.take_if(|bytes| bytes.is_empty());
                Boot::Firmware(firmware.map(|bytes| self.file(bytes)))
            }
        };
        self.vms.push(VmSpec {
            name: draft.name,
            vcpus: draft.vcpus,
            memory_bytes: draft.memory_bytes,
            autostart: draft.autostart,
            boot,
            clock: draft.clock,
        });
    }

    /// Keeps a file; until the layout is known, `offset` is its index.
    fn file(&mut self, bytes: Vec<u8>) -> Blob {
        let crc = crc32c(&bytes);
        let len = bytes.len() as u64;
        let known = self
            .files
            .iter()
            .position(|(c, other)| *c == crc && *other == bytes);
        let index = known.unwrap_or_else(|| {
            self.files.push((crc, bytes));
            self.files.len() - 1
        });
        Blob {
            offset: index as u64,
            len,
            crc32c: crc,
        }
    }

    /// Packs everything, and parses the result as the image will.
    ///
    /// # Errors
    /// What the image would say to it.
    pub fn finish(self) -> Result<Vec<u8>, BundleError> {
        // The manifest's length depends on the offsets it holds (varints), and they on it.
        // Each turn can only grow it, to at most a few bytes more per blob, so this ends.
        let mut manifest_len = 0;
        let (manifest, offsets, total) = loop {
            let (manifest, offsets, total) = self.lay_out(manifest_len);
            let bytes = postcard::to_allocvec(&manifest).map_err(|_| BundleError::Manifest)?;
            if bytes.len() <= manifest_len {
                break (bytes, offsets, total);
            }
            manifest_len = bytes.len();
        };
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        let len = u32::try_from(manifest.len()).map_err(|_| BundleError::Manifest)?;
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&total.to_le_bytes());
        out.extend_from_slice(&crc32c(&manifest).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&manifest);
        for ((_, file), offset) in self.files.iter().zip(offsets) {
            out.resize(
                usize::try_from(offset).map_err(|_| BundleError::Manifest)?,
                0,
            );
            out.extend_from_slice(file);
        }
        Bundle::parse(&out)?;
        Ok(out)
    }

    /// Gives every blob its offset behind a manifest of `manifest_len` bytes.
    fn lay_out(&self, manifest_len: usize) -> (Manifest, Vec<u64>, u64) {
        let mut at = (HEADER_LEN + manifest_len) as u64;
        let mut offsets = Vec::new();
        for (_, file) in &self.files {
            at = at.next_multiple_of(BLOB_ALIGN);
            offsets.push(at);
            at += file.len() as u64;
        }
        let place = |blob: Blob| {
            let index = usize::try_from(blob.offset).ok();
            let offset = index.and_then(|index| offsets.get(index)).copied();
            Blob {
                offset: offset.unwrap_or(0),
                ..blob
            }
        };
        let mut vms = self.vms.clone();
        for vm in &mut vms {
            vm.boot = match &vm.boot {
                Boot::Kernel(kernel) => Boot::Kernel(kernel.clone().map(place)),
                Boot::Firmware(firmware) => Boot::Firmware(firmware.clone().map(place)),
            };
        }
        (
            Manifest {
                machine: self.machine,
                vms,
            },
            offsets,
            at,
        )
    }
}
