//! One VM's stage 2: the struct, its making and its end, counters.
//!
//! Two kinds of lock. Whoever looks at slots or tables holds its own CPU's copy of the layout
//! ([`readers`](crate::readers)): faults, walks, splits and harvests, which change entries by
//! compare-and-swap and share no cache line but the entries. Whoever changes slots, switches a log on
//! or off, or takes tables away holds the control mutex ([`control`](crate::control)), changes the
//! copies one by one, and frees what readers may have found only after each has left. The mutex comes
//! first. Nothing is held while a guest runs.

use crate::config::{Shape, vttbr};
use crate::control::{Control, LogStage, LogStatus, Phase};
use crate::error::Error;
use crate::hardware::{Features, Hardware};
use crate::harvest::Carried;
use crate::readers::Replicas;
use crate::slot::Layout;
use crate::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use crate::sync::mutex::SpinMutex;
use crate::sync::rwlock::RwLockReadGuard;
use crate::tlb::Tlb;
use crate::types::{Level, Pa, Progress, Vmid};
use crate::vmid::{Flush, Tag, VmVmid, Vmids};

/// The stage-2 tables, slots and dirty log of one VM.
pub struct Stage2<H: Hardware> {
    pub(crate) hw: H,
    pub(crate) features: Features,
    pub(crate) shape: Shape,
    pub(crate) root: Pa,
    tag: Tag,
    pub(crate) control: SpinMutex<Control>,
    pub(crate) layouts: Replicas<Layout>,
    /// A harvest is all given out, and waits for those who are at a stretch of it.
    pub(crate) drained: AtomicBool,
    pub(crate) counters: Counts,
    leaves: [AtomicI64; 4],
    tables: AtomicI64,
}

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) translation_faults: AtomicU64,
    pub(crate) write_faults: AtomicU64,
    pub(crate) spurious_faults: AtomicU64,
    pub(crate) splits: AtomicU64,
    pub(crate) collapses: AtomicU64,
    pub(crate) tlbis: AtomicU64,
    pub(crate) harvests: AtomicU64,
    pub(crate) leaves_read: AtomicU64,
}

/// What happened since the VM was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Faults that mapped something.
    pub translation_faults: u64,
    /// Faults that made a clean leaf dirty.
    pub write_faults: u64,
    /// Faults that found nothing to do.
    pub spurious_faults: u64,
    /// Blocks split.
    pub splits: u64,
    /// Tables collapsed to a block.
    pub collapses: u64,
    /// TLBI instructions.
    pub tlbis: u64,
    /// Epochs taken.
    pub harvests: u64,
    /// Level-3 leaves that harvests looked at one by one. Under write protection they look at none: the
    /// live bits name the pages.
    pub leaves_read: u64,
}

/// What is mapped, by size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mappings {
    /// 1 GiB leaves.
    pub blocks_1g: u64,
    /// 2 MiB leaves.
    pub blocks_2m: u64,
    /// 4 KiB leaves.
    pub pages_4k: u64,
    /// Table pages, roots included.
    pub tables: u64,
}

impl<H: Hardware> Stage2<H> {
    /// Makes an empty stage 2 for an IPA space of `ipa_bits` (32 to 48), whose translations are tagged
    /// with a number that no other VM has.
    ///
    /// # Errors
    ///
    /// [`Error::IpaBits`], [`Error::PaBits`], [`Error::OutOfTables`].
    pub fn new(hw: H, ipa_bits: u8, vmid: Vmid, features: Features) -> Result<Self, Error> {
        Self::tagged(hw, ipa_bits, Tag::Own(vmid), features)
    }

    /// The same with numbers from `vmids`, of which there may be fewer than VMs. A CPU that is about to
    /// run the VM calls [`load`](Self::load).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_vmids(
        hw: H,
        ipa_bits: u8,
        vmids: &'static Vmids,
        features: Features,
    ) -> Result<Self, Error> {
        Self::tagged(hw, ipa_bits, Tag::Lent(vmids, VmVmid::new()), features)
    }

    fn tagged(hw: H, ipa_bits: u8, tag: Tag, features: Features) -> Result<Self, Error> {
        let shape = Shape::new(ipa_bits, &features)?;
        let layouts = Replicas::new(hw.cpus(), || Layout::EMPTY)?;
        let root = hw.alloc_tables(shape.roots).ok_or(Error::OutOfTables)?;
        Ok(Self {
            hw,
            features,
            shape,
            root,
            tag,
            control: SpinMutex::new(Control::new()),
            layouts,
            drained: AtomicBool::new(false),
            counters: Counts::default(),
            leaves: [const { AtomicI64::new(0) }; 4],
            tables: AtomicI64::new(shape.roots as i64),
        })
    }

    /// Returns VTTBR_EL2 for this VM. With numbers from [`Vmids`] there is none in it: then
    /// [`load`](Self::load) says what to write.
    pub const fn vttbr(&self) -> u64 {
        match &self.tag {
            Tag::Own(vmid) => vttbr(self.root, *vmid),
            Tag::Lent(..) => self.root.raw(),
        }
    }

    /// CPU `cpu`, which calls, is about to run the VM and nothing else any more: returns what to write to
    /// VTTBR_EL2, and what to do then. What must be complete before, [`Vmids::load`] says. `None` if there
    /// is no such CPU.
    #[inline]
    pub fn load(&self, cpu: usize) -> Option<(u64, Flush)> {
        match &self.tag {
            Tag::Own(vmid) => Some((vttbr(self.root, *vmid), Flush::None)),
            Tag::Lent(vmids, vm) => {
                let loaded = vmids.load(cpu, vm)?;
                Some((vttbr(self.root, loaded.vmid), loaded.flush))
            }
        }
    }

    /// Returns VTCR_EL2 for this VM, the same on every CPU for its whole life.
    ///
    /// HA and HD are set whenever the hardware's dirty state is usable, log or no log: which engine
    /// tracks a leaf is said by the leaf. So switching engines changes no register that TLBs may have
    /// cached (invariant 14).
    pub const fn vtcr(&self) -> u64 {
        self.shape.vtcr
    }

    /// Returns the hardware it was made with.
    pub const fn hardware(&self) -> &H {
        &self.hw
    }

    /// Returns the features it was made with.
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// Returns the size of the IPA space in bits.
    pub const fn ipa_bits(&self) -> u8 {
        self.shape.ipa_bits
    }

    /// Returns what is mapped, by size.
    pub fn mappings(&self) -> Mappings {
        let [_, blocks_1g, blocks_2m, pages_4k] = &self.leaves;
        let read = |count: &AtomicI64| count.load(Ordering::Relaxed).max(0).unsigned_abs();
        Mappings {
            blocks_1g: read(blocks_1g),
            blocks_2m: read(blocks_2m),
            pages_4k: read(pages_4k),
            tables: read(&self.tables),
        }
    }

    /// Returns what happened so far.
    pub fn counters(&self) -> Counters {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counters;
        Counters {
            translation_faults: read(&counts.translation_faults),
            write_faults: read(&counts.write_faults),
            spurious_faults: read(&counts.spurious_faults),
            splits: read(&counts.splits),
            collapses: read(&counts.collapses),
            tlbis: read(&counts.tlbis),
            harvests: read(&counts.harvests),
            leaves_read: read(&counts.leaves_read),
        }
    }

    /// Returns what the log is doing.
    pub fn log_status(&self) -> LogStatus {
        let control = self.control.lock();
        let carried = if control.taking.is_none() && control.stale.is_none() {
            Carried::Yes
        } else {
            Carried::No
        };
        LogStatus {
            stage: match control.phase {
                Phase::Off => LogStage::Off,
                Phase::Starting(_) => LogStage::Starting,
                Phase::On => LogStage::On,
                Phase::Stopping(_) => LogStage::Stopping,
            },
            mode: control.mode,
            outstanding: control.taking.map(|taking| taking.epoch),
            last_committed: control.last_committed,
            live_pages: self.layout().live_pages(carried),
        }
    }

    pub(crate) fn tlb(&self) -> Tlb<'_, H> {
        Tlb {
            hw: &self.hw,
            root: self.root,
            tag: &self.tag,
            features: &self.features,
            issued: &self.counters.tlbis,
        }
    }

    /// Reads the slots and the log, and keeps the tables from being freed.
    #[inline]
    pub(crate) fn layout(&self) -> RwLockReadGuard<'_, Layout> {
        self.layouts.read(self.hw.cpu())
    }

    /// What a step answers when another CPU is in one.
    pub(crate) fn somebody_else_steps(&self) -> Progress {
        Progress::More { done: 0, total: 0 }
    }

    pub(crate) fn count_leaves(&self, level: Level, change: i64) {
        if let Some(count) = self.leaves.get(usize::from(level.number())) {
            count.fetch_add(change, Ordering::Relaxed);
        }
    }

    pub(crate) fn count_tables(&self, change: i64) {
        self.tables.fetch_add(change, Ordering::Relaxed);
    }
}

impl<H: Hardware> Drop for Stage2<H> {
    /// Frees the tables. No CPU may run the VM any more, nor have its VTTBR_EL2 loaded. To bound the
    /// work, delete the slots first.
    fn drop(&mut self) {
        self.free_tree();
        self.free_tables(self.root, self.shape.roots);
    }
}
