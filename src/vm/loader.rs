//! Putting a guest's files into its memory: a job of bounded steps.
//!
//! Fresh memory is cleared first, once: its last owner's data is nobody's business. At a
//! restart the guest's own memory stays as it is, as on a board, and only the files are
//! laid anew. Each file's CRC is computed as it is copied; a guest whose files are damaged
//! does not start.

use super::memory::{GuestMemory, Slot, Slots};
use super::tree::{self, Initrd};
use super::{Vm, lifecycle, work};
use crate::arch::crc::Crc32c;
use crate::memory::PAGE;
use crate::memory::frames::Run;
use crate::sched::job::Step;
use crate::sched::meter::metered;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use log::debug;
use tidemark_devices::virt::{FLASH_BASE, RAM_BASE};
use tidemark_stage2::Access;
use tidemark_wire::bundle::{Blob, Boot};
use tidemark_wire::message::Task;

/// Bytes copied in one step.
const COPY_STEP: usize = 4 * 1024;
/// Frames of RAM cleared, or of any memory renewed, in one step: 256 KiB.
const CLEAR_STEP: usize = 64;
/// Frames of flash erased in one step: no block operation writes ones.
const ERASE_STEP: usize = 8;
/// A kernel goes this far into the RAM; the devicetree stands before it.
const KERNEL_OFFSET: u64 = 2 << 20;
/// The largest devicetree that Linux maps.
const LARGEST_TREE: u64 = 2 << 20;
const BLOCK: u64 = 2 << 20;

struct Piece {
    what: &'static str,
    from: &'static [u8],
    to: u64,
    crc32c: u32,
}

enum Phase {
    /// A slot is being added or deleted. No other change begins while the VM is starting.
    Wait,
    Renew {
        slot: usize,
        run: usize,
        page: usize,
    },
    Clear {
        slot: usize,
        run: usize,
        page: usize,
    },
    Map {
        slot: usize,
        page: u64,
    },
    Copy {
        piece: usize,
        done: usize,
        crc: Crc32c,
    },
    Start,
}

/// The state of the job.
pub struct Loader {
    vm: &'static Vm,
    pieces: Vec<Piece>,
    initrd: Option<Initrd>,
    entry: u64,
    phase: Phase,
}

/// What an arm64 Image header says (Linux Documentation/arch/arm64/booting.rst).
struct Image {
    text_offset: u64,
    size: u64,
}

impl Image {
    /// `None` where it is none: then it is a flat binary, loaded and entered at its start.
    fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if bytes.get(0x38..0x3c)? != b"ARM\x64" {
            return None;
        }
        Some(Self {
            text_offset: word(8)?,
            size: word(16)?,
        })
    }
}

impl Loader {
    /// Plans where everything goes.
    ///
    /// # Errors
    ///
    /// Says what does not fit, or is not there.
    pub fn new(vm: &'static Vm) -> Result<Self, String> {
        let mut loader = Self {
            vm,
            pieces: Vec::new(),
            initrd: None,
            entry: 0,
            phase: Phase::Wait,
        };
        let ram_end = RAM_BASE + vm.spec.memory_bytes;
        match &vm.spec.boot {
            Boot::Firmware { image } => {
                loader.piece("firmware", *image, FLASH_BASE)?;
                loader.entry = FLASH_BASE;
            }
            Boot::Kernel { kernel, initrd, .. } => {
                let bytes = blob(*kernel)?;
                let header = Image::read(bytes).unwrap_or(Image {
                    text_offset: 0,
                    size: 0,
                });
                let start = (RAM_BASE + KERNEL_OFFSET)
                    .checked_add(header.text_offset)
                    .filter(|start| start.is_multiple_of(PAGE as u64))
                    .ok_or("the kernel's text_offset is no multiple of 4 KiB, or out of range")?;
                let end = start
                    .checked_add(header.size.max(kernel.len))
                    .filter(|&end| end <= ram_end)
                    .ok_or_else(|| {
                        format!(
                            "the kernel needs {} MiB, more than its {} MiB of memory: raise `memory` in the manifest",
                            header.size.max(kernel.len).saturating_add(KERNEL_OFFSET) >> 20,
                            vm.spec.memory_bytes >> 20
                        )
                    })?;
                loader.piece("kernel", *kernel, start)?;
                loader.entry = start;
                if let Some(initrd) = initrd {
                    let start = end.next_multiple_of(BLOCK);
                    let end = start
                        .checked_add(initrd.len)
                        .filter(|&end| end <= ram_end)
                        .ok_or(
                            "the initrd does not fit behind the kernel: raise `memory` in the manifest",
                        )?;
                    loader.piece("initrd", *initrd, start)?;
                    loader.initrd = Some(Initrd { start, end });
                }
            }
        }
        Ok(loader)
    }

    fn piece(&mut self, what: &'static str, blob_: Blob, to: u64) -> Result<(), String> {
        self.pieces.push(Piece {
            what,
            from: blob(blob_)?,
            to,
            crc32c: blob_.crc32c,
        });
        Ok(())
    }

    /// One bounded step.
    pub fn step(&mut self) -> Step {
        let task = match self.phase {
            Phase::Clear { .. } | Phase::Renew { .. } => Task::Clear,
            Phase::Map { .. } => Task::Map,
            Phase::Copy { .. } => Task::Load,
            Phase::Wait | Phase::Start => Task::Start,
        };
        match metered(task, || self.try_step()) {
            Ok(step) => step,
            Err(reason) => {
                lifecycle::failed(self.vm, reason);
                Step::Done
            }
        }
    }

    fn try_step(&mut self) -> Result<Step, String> {
        let memory = &self.vm.memory;
        match &mut self.phase {
            Phase::Wait => {
                if work::is_changing_slots(self.vm) {
                    return Ok(Step::Later);
                }
                let (slot, run, page) = (0, 0, 0);
                self.phase = if self.vm.cleared.load(Relaxed) {
                    Phase::Renew { slot, run, page }
                } else {
                    Phase::Clear { slot, run, page }
                };
            }
            Phase::Clear { slot, run, page } => match next_frames(&memory.slots(), slot, run, page)
            {
                None => {
                    self.vm.cleared.store(true, Relaxed);
                    self.phase = Phase::Map { slot: 0, page: 0 };
                }
                Some((of, base, frames, first)) => memory
                    .clear(of, base, frames, first, step(of))
                    .map_err(|_| "its memory is in no slot")?,
            },
            Phase::Renew { slot, run, page } => match next_frames(&memory.slots(), slot, run, page)
            {
                None => {
                    let mut life = self.vm.life.lock();
                    *life = life.next();
                    self.phase = Phase::Map { slot: 0, page: 0 };
                }
                Some((of, base, frames, first)) => frames
                    .next_generation(
                        first,
                        step(of),
                        self.vm.id.0,
                        *self.vm.life.lock(),
                        base / PAGE as u64,
                    )
                    .map_err(|error| format!("its memory: {error}"))?,
            },
            Phase::Map { slot, page } => match memory.slots().get(*slot) {
                None => {
                    self.phase = Phase::Copy {
                        piece: 0,
                        done: 0,
                        crc: Crc32c::new(),
                    };
                }
                Some(of) => match memory.stage2().map_ahead(of.id, *page) {
                    Ok(tidemark_stage2::Progress::More { done, .. }) => *page = done,
                    Ok(tidemark_stage2::Progress::Done) => {
                        *slot += 1;
                        *page = 0;
                    }
                    Err(error) => return Err(format!("mapping its memory: {error}")),
                },
            },
            Phase::Copy { piece, done, crc } => {
                let Some(current) = self.pieces.get(*piece) else {
                    self.phase = Phase::Start;
                    return Ok(Step::Again);
                };
                let rest = &current.from[(*done).min(current.from.len())..];
                let now = &rest[..rest.len().min(COPY_STEP)];
                if now.is_empty() {
                    if core::mem::replace(crc, Crc32c::new()).finish() != current.crc32c {
                        return Err(format!(
                            "its {} is damaged (CRC-32C): pack the bundle again",
                            current.what
                        ));
                    }
                    *piece += 1;
                    *done = 0;
                } else {
                    crc.update(now);
                    let to = current.to + *done as u64;
                    write(memory, current.what, to, now)?;
                    *done += now.len();
                }
            }
            Phase::Start => {
                self.start()?;
                return Ok(Step::Done);
            }
        }
        Ok(Step::Again)
    }

    fn start(&self) -> Result<(), String> {
        let tree = match self.vm.tree.get() {
            Some(Ok(tree)) => tree,
            Some(Err(error)) => return Err(format!("building its devicetree: {error:?}")),
            None => return Err("its devicetree was not built".into()),
        };
        if tree.len() as u64 > LARGEST_TREE.min(KERNEL_OFFSET) {
            return Err("its devicetree is larger than 2 MiB".into());
        }
        write(&self.vm.memory, "devicetree", RAM_BASE, tree)?;
        crate::arch::cache::invalidate_instructions();
        debug!("{}: entry {:#x}", self.vm.name(), self.entry);
        lifecycle::loaded(self.vm, self.entry, RAM_BASE);
        Ok(())
    }
}

/// Makes the devicetree of a guest. Once, at boot: it is the same at every start, and takes longer than a step may.
pub fn make_tree(vm: &'static Vm) {
    // Where nothing can be loaded, the start will say so.
    if let Ok(loader) = Loader::new(vm) {
        vm.tree.call_once(|| tree::build(vm, loader.initrd));
    }
}

/// How many frames of a slot one step cares for.
fn step(of: &Slot) -> usize {
    match of.access {
        Access::ReadWrite => CLEAR_STEP,
        Access::ReadOnly => ERASE_STEP,
    }
}

/// The next frames of a walk over all of a guest's memory, a step's worth of them: the
/// slot, the address of their run, the run, and the first frame in it.
fn next_frames<'m>(
    slots: &'m Slots,
    slot: &mut usize,
    run: &mut usize,
    page: &mut usize,
) -> Option<(&'m Slot, u64, &'m Run, usize)> {
    // At most one empty turn a slot and a run.
    while let Some(of) = slots.get(*slot) {
        match of.runs.get(*run) {
            None => {
                *slot += 1;
                *run = 0;
            }
            Some((_, frames)) if *page >= frames.pages() => {
                *run += 1;
                *page = 0;
            }
            Some((base, frames)) => {
                let first = *page;
                *page += step(of);
                return Some((of, *base, frames, first));
            }
        }
    }
    None
}

fn write(memory: &GuestMemory, what: &str, to: u64, bytes: &[u8]) -> Result<(), String> {
    memory
        .write(to, bytes)
        .map_err(|_| format!("its {what} does not fit its memory"))?;
    // The guest's first instructions run with its caches off.
    memory.clean(to, bytes.len() as u64);
    Ok(())
}

fn blob(blob: Blob) -> Result<&'static [u8], String> {
    super::bundle::get()
        .and_then(|bundle| bundle.unchecked_blob(blob))
        .ok_or_else(|| "its files are not in the bundle".into())
}
