//! Putting a guest's files into its memory: a job of bounded steps.
//!
//! Fresh memory is cleared first, once: its last owner's data is nobody's business. At a
//! restart the guest's own memory stays as it is, as on a board, and only the files are
//! laid anew. Each file's CRC is computed as it is copied; a guest whose files are damaged
//! does not start.

mod clearing;

use self::clearing::Clearing;
use super::{bundle, kept, tree, work};
use crate::arch::crc::Crc32c;
use crate::mm::PAGE;
use crate::mm::frames::Run;
use crate::task::meter::metered;
use crate::vm::flash::Flash;
use crate::vm::memory::{GuestMemory, Slot, Slots};
use crate::vm::{Vm, id_registers, random};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Relaxed, Release};
use log::{debug, info};
use tidemark_devices::virt::{FLASH_BASE, FLASH_SIZE, RAM_BASE};
use tidemark_stage2::Access;
use tidemark_wire::bundle::{Blob, Boot};
use tidemark_wire::granule::Granule;
use tidemark_wire::message::Task;

/// Bytes copied in one step.
const COPY_STEP: usize = 4 * 1024;
/// Frames of RAM cleared, or of any memory renewed, in one step: 256 KiB.
const CLEAR_STEP: usize = 64;
/// Frames of flash erased in one step: no block operation writes ones.
const ERASE_STEP: usize = 8;
/// Where the bundle says that RAM is, and where it is.
const _: () = assert!(RAM_BASE == tidemark_wire::bundle::RAM_BASE);

/// A file, or a part of one, and where it goes.
struct Piece {
    what: &'static str,
    from: &'static [u8],
    /// `None`: it stays in the bundle, from where firmware asks for it. Only its CRC is computed.
    to: Option<u64>,
    /// Bytes of memory that it takes: past the file they are zero.
    size: u64,
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
    /// By as many jobs as there are CPUs; this one waits for them.
    Clear(Arc<Clearing>),
    Map {
        slot: usize,
        page: u64,
    },
    Copy {
        piece: usize,
        done: usize,
        crc: Crc32c,
    },
    Zero {
        piece: usize,
        done: u64,
    },
    /// The devicetree, and then its seeds, by number.
    Tree,
    Seed(usize),
    Start,
}

/// What the memory is like that files are laid into.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// All zero but for them.
    Cleared,
    /// As the guest left it.
    Used,
}

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Its PC, an IPA.
    pub entry: u64,
    /// Its x0.
    pub context: u64,
}

/// How far a guest is.
#[derive(Debug)]
pub enum Progress {
    /// There is more to do.
    Again,
    /// There is more to do, but not for this CPU at the moment.
    Later,
    /// All of it is in its place.
    Loaded(Start),
    /// It cannot be loaded.
    Failed(String),
}

/// The state of the job.
pub struct Loader {
    vm: &'static Vm,
    pieces: Vec<Piece>,
    entry: u64,
    /// Where the devicetree goes.
    tree: Option<u64>,
    memory: Memory,
    phase: Phase,
}

impl Loader {
    /// Collects what goes where, as the bundle says it; that all of it is in the guest's memory
    /// was checked when the bundle was read.
    ///
    /// # Errors
    ///
    /// Says what is not there.
    pub fn new(vm: &'static Vm) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut piece = |what, file: Option<Blob>, to, size| {
            let (from, crc32c) = match file {
                Some(file) => (blob(file)?, file.crc32c),
                None => (&[][..], Crc32c::new().finish()),
            };
            pieces.push(Piece {
                what,
                from,
                to,
                size,
                crc32c,
            });
            Ok::<(), String>(())
        };
        let (entry, tree) = match &vm.spec.boot {
            Boot::Firmware(firmware) => {
                let image = firmware.image;
                piece("firmware", Some(image), Some(FLASH_BASE), image.len)?;
                let fresh = vm.flash.as_ref().is_some_and(Flash::is_fresh);
                if let Some(file) = firmware.variables.filter(|_| fresh) {
                    let to = FLASH_BASE + FLASH_SIZE;
                    piece("variables", Some(file), Some(to), file.len)?;
                }
                if let Some(payload) = &firmware.kernel {
                    piece("kernel", Some(payload.kernel), None, 0)?;
                    if let Some(initrd) = payload.initrd {
                        piece("initrd", Some(initrd), None, 0)?;
                    }
                }
                (FLASH_BASE, Some(RAM_BASE))
            }
            Boot::Kernel(kernel) => {
                for segment in &kernel.segments {
                    if let Some(file) = segment.file
                        && let Some(granule) = Granule::of_image(blob(file)?)
                        && !granule.is_in(id_registers::read(7, 0, 0))
                    {
                        // It would find out before it can print, and wait for ever.
                        return Err(format!(
                            "the kernel is built for pages of {granule}, which these CPUs do not have; use one for pages of 4 KiB"
                        ));
                    }
                    piece("kernel", segment.file, Some(segment.address), segment.size)?;
                }
                if let Some(initrd) = &kernel.initrd {
                    let (to, size) = (Some(initrd.address), initrd.file.len);
                    piece("initrd", Some(initrd.file), to, size)?;
                }
                (kernel.entry, kernel.devicetree)
            }
        };
        Ok(Self {
            vm,
            pieces,
            entry,
            tree,
            memory: Memory::Cleared,
            phase: Phase::Wait,
        })
    }

    /// One bounded step.
    pub fn step(&mut self) -> Progress {
        if let Phase::Clear(clearing) = &self.phase
            && !clearing.is_over()
        {
            return Progress::Later;
        }
        let task = match self.phase {
            Phase::Renew { .. } => Task::Clear,
            Phase::Map { .. } => Task::Map,
            Phase::Copy { .. } | Phase::Zero { .. } => Task::Load,
            Phase::Wait | Phase::Clear(_) | Phase::Tree | Phase::Seed(_) | Phase::Start => {
                Task::Start
            }
        };
        match metered(task, || self.try_step()) {
            Ok(progress) => progress,
            Err(reason) => Progress::Failed(reason),
        }
    }

    fn try_step(&mut self) -> Result<Progress, String> {
        let memory = &self.vm.memory;
        match &mut self.phase {
            Phase::Wait => {
                if work::is_changing_slots(self.vm) {
                    return Ok(Progress::Later);
                }
                let (slot, run, page) = (0, 0, 0);
                self.phase = if self.vm.cleared.load(Relaxed) {
                    self.memory = Memory::Used;
                    Phase::Renew { slot, run, page }
                } else {
                    Phase::Clear(Clearing::begin(self.vm))
                };
            }
            Phase::Clear(clearing) => {
                if !clearing.is_over() {
                    return Ok(Progress::Later);
                }
                clearing.result().map_err(|_| "its memory is in no slot")?;
                self.vm.cleared.store(true, Release);
                self.phase = Phase::Map { slot: 0, page: 0 };
            }
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
                    self.phase = Phase::Tree;
                    return Ok(Progress::Again);
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
                    let (piece, done) = (*piece, current.from.len() as u64);
                    self.phase = Phase::Zero { piece, done };
                } else {
                    crc.update(now);
                    if let Some(to) = current.to {
                        write(memory, current.what, to + *done as u64, now)?;
                    }
                    *done += now.len();
                }
            }
            Phase::Zero { piece, done } => {
                let current = self
                    .pieces
                    .get(*piece)
                    .filter(|_| self.memory == Memory::Used);
                let left = current.map_or(0, |current| current.size.saturating_sub(*done));
                match current.filter(|_| left > 0) {
                    None => {
                        self.phase = Phase::Copy {
                            piece: *piece + 1,
                            done: 0,
                            crc: Crc32c::new(),
                        };
                    }
                    Some(current) => {
                        static ZEROS: [u8; COPY_STEP] = [0; COPY_STEP];
                        let zeros = &ZEROS[..left.min(COPY_STEP as u64) as usize];
                        if let Some(to) = current.to {
                            write(memory, current.what, to + *done, zeros)?;
                        }
                        *done += zeros.len() as u64;
                    }
                }
            }
            Phase::Tree => {
                self.lay_tree()?;
                self.phase = Phase::Seed(0);
            }
            Phase::Seed(next) => {
                let next = *next;
                self.phase = match self.lay_seed(next)? {
                    Some(()) => Phase::Seed(next + 1),
                    None => Phase::Start,
                };
            }
            Phase::Start => return self.finish(),
        }
        Ok(Progress::Again)
    }

    fn tree(&self) -> Result<&'static tree::Tree, String> {
        match kept(self.vm).tree.get() {
            Some(Ok(tree)) => Ok(tree),
            Some(Err(error)) => Err(format!("building its devicetree: {error:?}")),
            None => Err("its devicetree was not built".into()),
        }
    }

    /// Where its devicetree goes, if there is room.
    fn tree_place(&self, tree: &tree::Tree) -> Option<u64> {
        self.tree
            .filter(|&at| self.has_room(at, tree.blob().len() as u64))
    }

    fn lay_tree(&self) -> Result<(), String> {
        let tree = self.tree()?;
        match self.tree_place(tree) {
            Some(at) => write(&self.vm.memory, "devicetree", at, tree.blob())?,
            // As QEMU does it with a program that is where its devicetree would be.
            None => info!(
                "{}: no room for its devicetree; it gets none",
                self.vm.name()
            ),
        }
        Ok(())
    }

    /// Lays one seed into the devicetree, a step each: hashes are long. `None` if there is none of that number.
    fn lay_seed(&self, number: usize) -> Result<Option<()>, String> {
        if number == 0 {
            *self.vm.random.lock() = random::for_start();
        }
        let tree = self.tree()?;
        let Some(seed) = tree.seeds().nth(number) else {
            return Ok(None);
        };
        let mut bytes = [0; tree::LARGEST_SEED];
        self.vm.random.lock().fill(&mut bytes);
        let len = seed.len().min(bytes.len());
        if let Some(at) = self.tree_place(tree) {
            let at = at + seed.start as u64;
            write(&self.vm.memory, "devicetree", at, &bytes[..len])?;
        }
        Ok(Some(()))
    }

    fn finish(&self) -> Result<Progress, String> {
        if let Some(flash) = &self.vm.flash {
            flash.set_laid();
        }
        let place = self.tree_place(self.tree()?);
        crate::arch::cache::invalidate_instructions();
        debug!(
            "{}: entry {:#x}, devicetree {place:x?}",
            self.vm.name(),
            self.entry
        );
        Ok(Progress::Loaded(Start {
            entry: self.entry,
            context: place.unwrap_or(0),
        }))
    }

    /// Whether the devicetree at this address would be over nothing that was loaded.
    fn has_room(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        self.pieces
            .iter()
            .filter_map(|piece| Some((piece.to?, piece.size)))
            .all(|(to, size)| end <= to || to.saturating_add(size) <= at)
    }
}

/// Makes the devicetree of a guest. Once, at boot: it is the same at every start, and takes longer than a step may.
pub fn make_tree(vm: &'static Vm) {
    kept(vm).tree.call_once(|| tree::build(vm));
}

/// How many frames of a slot one step cares for.
fn step(of: &Slot) -> usize {
    match of.access {
        Access::ReadWrite => CLEAR_STEP,
        Access::ReadOnly | Access::None => ERASE_STEP,
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
    bundle::get()
        .and_then(|bundle| bundle.unchecked_blob(blob))
        .ok_or_else(|| "its files are not in the bundle".into())
}
