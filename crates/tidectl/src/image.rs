//! A copy of a guest's memory on this machine, and where its contents come from.
//!
//! One file a slot, `slot-<id>.bin`, each page at its own place: the copy's size is bounded
//! however many rounds there are, and a page that is copied again overwrites itself. Until the
//! copy is whole and verified its name ends in `.partial`, and an older copy stays as it is.

use crate::bitmaps::Run;
use crate::client::Client;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{SlotId, SlotInfo, VmId};

/// Bytes moved at a time from a memory file or through a hash.
const CHUNK: usize = 1 << 20;

/// A copy of a guest's memory.
pub struct Image {
    dir: PathBuf,
    slots: Vec<SlotImage>,
}

/// A copy of one slot.
pub struct SlotImage {
    /// The slot as the target describes it.
    pub info: SlotInfo,
    /// The file, once it is finished.
    pub path: PathBuf,
    /// What it is called until then.
    partial: PathBuf,
    file: File,
}

/// What a part of the image held before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// Nothing: zeros need not be written.
    Zeros,
    /// An older copy.
    Contents,
}

/// Where page contents come from.
pub enum Contents {
    /// Over the line, request by request.
    Channel,
    /// From the file that is the machine's memory
    /// (`-object memory-backend-file,share=on,mem-path=...`).
    MemoryFile(MemoryFile),
}

/// The file that is a machine's memory.
pub struct MemoryFile {
    file: File,
    path: PathBuf,
    base: u64,
    len: u64,
}

impl MemoryFile {
    /// Opens a file whose first byte is the machine's physical address `base`.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn open(path: &Path, base: u64) -> Result<Self> {
        let file = File::open(path).map_err(Error::file(path))?;
        let len = file.metadata().map_err(Error::file(path))?.len();
        Ok(Self {
            file,
            path: path.into(),
            base,
            len,
        })
    }

    /// Reads a slot's memory from `start` (in bytes from its base), by its extents.
    fn read(
        &self,
        slot: &SlotInfo,
        start: u64,
        len: u64,
        keep: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let (mut at, end) = (slot.base_ipa + start, slot.base_ipa + start + len);
        while at < end {
            let (offset, left) = self.locate(slot, at)?;
            let step = left.min(end - at).min(CHUNK as u64);
            let part = buffer.get_mut(..step as usize).unwrap_or(&mut []);
            self.file
                .read_exact_at(part, offset)
                .map_err(Error::file(&self.path))?;
            keep(at, part)?;
            at += step;
        }
        Ok(())
    }

    /// Finds the file offset of a guest address, and how many bytes follow it there.
    fn locate(&self, slot: &SlotInfo, ipa: u64) -> Result<(u64, u64)> {
        let found = slot.extents.iter().find_map(|extent| {
            let into = ipa.checked_sub(extent.ipa)?;
            let len = extent.pages.checked_mul(PAGE_SIZE)?;
            let left = len.checked_sub(into).filter(|&left| left > 0)?;
            Some((extent.pa.checked_add(into)?, left))
        });
        let problem = match found {
            None if slot.more_extents > 0 => format!(
                "slot {} lies in too many pieces for the target to list; leave out --memory-file \
                 to copy over the line",
                slot.id
            ),
            None => format!("the target does not say where guest address {ipa:#x} is"),
            Some((pa, left)) => match pa.checked_sub(self.base) {
                Some(offset) if offset < self.len => {
                    return Ok((offset, left.min(self.len - offset)));
                }
                _ => format!(
                    "physical address {pa:#x} is not in it; --memory-base is {:#x}, its length {:#x}",
                    self.base, self.len
                ),
            },
        };
        Err(Error::Input {
            path: self.path.clone(),
            problem,
        })
    }
}

impl Contents {
    /// Reads runs of pages of a slot, handing parts on by guest address.
    ///
    /// # Errors
    /// Those of the line or the file, and whatever `keep` says.
    pub fn read(
        &self,
        client: &mut Client,
        vm: VmId,
        slot: &SlotInfo,
        runs: impl IntoIterator<Item = Run>,
        mut keep: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Channel => {
                let ranges = runs
                    .into_iter()
                    .map(|run| (slot.base_ipa + run.start * PAGE_SIZE, run.len * PAGE_SIZE));
                client.read_memory(vm, ranges, keep)
            }
            Self::MemoryFile(file) => {
                for run in runs {
                    client.check_interrupt()?;
                    file.read(slot, run.start * PAGE_SIZE, run.len * PAGE_SIZE, &mut keep)?;
                }
                Ok(())
            }
        }
    }
}

impl Image {
    /// Makes an empty image of these slots in `dir`, which is made too; its parents are not, as
    /// they would be of a path that was mistyped.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Protocol`] for a slot that cannot be.
    pub fn create(dir: &Path, slots: &[SlotInfo]) -> Result<Self> {
        if !dir.is_dir() {
            fs::create_dir(dir).map_err(Error::file(dir))?;
        }
        let mut images = Vec::new();
        for info in slots {
            let len = info
                .pages
                .checked_mul(PAGE_SIZE)
                .filter(|&len| info.base_ipa.checked_add(len).is_some());
            let len = len.ok_or_else(|| Error::Protocol {
                during: "making an image".into(),
                problem: format!("slot {} of {} pages", info.id, info.pages),
            })?;
            let path = dir.join(format!("slot-{}.bin", info.id));
            let partial = dir.join(format!("slot-{}.bin.partial", info.id));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&partial)
                .and_then(|file| file.set_len(len).map(|()| file))
                .map_err(Error::file(&partial))?;
            images.push(SlotImage {
                info: info.clone(),
                path,
                partial,
                file,
            });
        }
        Ok(Self {
            dir: dir.into(),
            slots: images,
        })
    }

    /// Its slots.
    #[must_use]
    pub fn slots(&self) -> &[SlotImage] {
        &self.slots
    }

    /// The slot of that id.
    #[must_use]
    pub fn slot(&self, id: SlotId) -> Option<&SlotImage> {
        self.slots.iter().find(|slot| slot.info.id == id)
    }

    /// Puts the copy on the disk and gives it its name, slot by slot: it is whole.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn finish(&self) -> Result<()> {
        for slot in &self.slots {
            slot.file.sync_all().map_err(Error::file(&slot.partial))?;
        }
        for slot in &self.slots {
            fs::rename(&slot.partial, &slot.path).map_err(Error::file(&slot.path))?;
        }
        // The names too.
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(Error::file(&self.dir))
    }
}

impl SlotImage {
    /// Writes `bytes` at a guest address.
    ///
    /// # Errors
    /// [`Error::File`], also for an address outside the slot.
    pub fn write(&self, ipa: u64, bytes: &[u8], before: Before) -> Result<()> {
        if before == Before::Zeros && bytes.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        let len = self.info.pages * PAGE_SIZE;
        let inside = ipa.checked_sub(self.info.base_ipa).filter(|offset| {
            offset
                .checked_add(bytes.len() as u64)
                .is_some_and(|end| end <= len)
        });
        inside
            .ok_or_else(|| io::Error::other(format!("guest address {ipa:#x} is outside the slot")))
            .and_then(|offset| self.file.write_all_at(bytes, offset))
            .map_err(Error::file(&self.partial))
    }

    /// Reads `buffer` from a guest address inside the slot.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn read(&self, ipa: u64, buffer: &mut [u8]) -> Result<()> {
        let offset = ipa.saturating_sub(self.info.base_ipa);
        self.file
            .read_exact_at(buffer, offset)
            .map_err(Error::file(&self.partial))
    }

    /// SHA-256 of the whole slot.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn sha256(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let (mut at, end) = (0, self.info.pages * PAGE_SIZE);
        while at < end {
            let step = (end - at).min(CHUNK as u64);
            let part = buffer.get_mut(..step as usize).unwrap_or(&mut []);
            self.file
                .read_exact_at(part, at)
                .map_err(Error::file(&self.partial))?;
            hash.update(part);
            at += step;
        }
        Ok(hash.finalize().into())
    }
}

/// Writes a hash as people compare it.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
