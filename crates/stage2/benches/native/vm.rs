//! A VM of 64 GiB under a log, the guest that writes to it and the host that takes its dirty pages.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemark_stage2::{
    Access, Engine, Epoch, Error, Extent, Features, Granularity, Ipa, Leaves, PAGE_SIZE, Pa,
    Progress, SlotId, Stage2, Support, Table, Tlbi, Vmid, VmidWidth,
};

use crate::memory::Memory;

/// 64 GiB.
pub const PAGES: u64 = 16 << 20;
/// Pages in a 2 MiB block.
pub const BLOCK: u64 = 512;
/// 2 MiB blocks in the VM.
pub const BLOCKS: u64 = PAGES / BLOCK;

const SLOT: SlotId = SlotId(0);
const IPA_BITS: u8 = 40;
const START: u64 = 1 << 30;
/// Aligned to 2 MiB and to no more, so that this is the largest leaf.
const RAM: Pa = Pa::new(BLOCK * PAGE_SIZE);

/// Everything that is there on a large machine of today.
const FEATURES: Features = Features {
    dbm: Support::Present,
    bbm2: Support::Absent,
    fwb: Support::Present,
    tlb_range: Support::Present,
    ttl: Support::Present,
    tlbi: Tlbi::Twice,
    leaves: Leaves::Blocks,
    vmid: VmidWidth::Sixteen,
    pa_bits: 48,
};

/// The bits of a descriptor that the hardware's walker looks at when a guest writes.
const VALID: u64 = 1;
const TABLE: u64 = 1 << 1;
const WRITE: u64 = 1 << 7;
const DBM: u64 = 1 << 51;
const OUTPUT: u64 = 0x0000_ffff_ffff_f000;

pub type Result<T> = std::result::Result<T, Error>;

pub struct Vm {
    stage2: Stage2<Memory>,
    epoch: AtomicU64,
}

impl Vm {
    /// Makes a VM of `pages` pages in machine memory that is contiguous, mapped by 2 MiB blocks.
    pub fn new(pages: u64, tables: usize) -> Result<Self> {
        let vmid = Vmid::new(1, FEATURES.vmid).expect("one is a VMID");
        let stage2 = Stage2::new(Memory::new(tables), IPA_BITS, vmid, FEATURES)?;
        let ram = Extent { pa: RAM, pages };
        let base = Ipa::new(START).gfn();
        stage2.add_slot(SLOT, base, pages, Access::ReadWrite, &[ram])?;
        let mut from = 0;
        while let Progress::More { done, .. } = stage2.map_ahead(SLOT, from)? {
            from = done;
        }
        assert_eq!(stage2.mappings().blocks_2m, pages / BLOCK);
        Ok(Self {
            stage2,
            epoch: AtomicU64::new(0),
        })
    }

    /// Starts a log by the hardware's dirty state.
    pub fn start(&self, granularity: Granularity) -> Result<()> {
        while self.stage2.start_log(Engine::Dbm, granularity)? != Progress::Done {}
        Ok(())
    }

    /// Stops it: what was split is put together.
    pub fn stop(&self) -> Result<()> {
        while self.stage2.stop_log()? != Progress::Done {}
        Ok(())
    }

    /// Names the next epoch.
    pub fn next_epoch(&self) -> Epoch {
        Epoch(self.epoch.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Takes an epoch, or a part of it while others take the rest.
    pub fn take(&self, epoch: Epoch) -> Result<()> {
        while self.stage2.take(epoch)? != Progress::Done {}
        Ok(())
    }

    /// Settles an epoch that was taken, after a look at whether it holds `pages` pages.
    pub fn settle(&self, epoch: Epoch, pages: u64) -> Result<()> {
        let taken: u64 = self
            .stage2
            .taken(epoch)?
            .iter()
            .map(|slot| slot.dirty_pages)
            .sum();
        assert_eq!(taken, pages, "dirty pages of epoch {epoch}");
        self.stage2.commit(epoch)
    }

    /// Asserts that an epoch holds exactly `pages`, which are sorted.
    pub fn verify(&self, epoch: Epoch, pages: &[u64]) -> Result<()> {
        let words = self.stage2.in_flight(SLOT, epoch)?;
        let mut expected = vec![0u64; words.len()];
        for page in pages {
            expected[(page / 64) as usize] |= 1 << (page % 64);
        }
        let same = |(word, expected): (&AtomicU64, &u64)| word.load(Ordering::Relaxed) == *expected;
        assert!(
            words.iter().zip(&expected).all(same),
            "bitmap of epoch {epoch}"
        );
        Ok(())
    }

    /// The guest writes to pages: the hardware's walker finds the clean leaf and makes it dirty.
    pub fn write(&self, pages: &[u64]) {
        for page in pages {
            let leaf = self.leaf(*page);
            let seen = leaf.load(Ordering::Relaxed);
            assert_eq!(
                seen & (VALID | DBM),
                VALID | DBM,
                "page {page} is not tracked"
            );
            leaf.fetch_or(WRITE, Ordering::Relaxed);
        }
    }

    /// Returns the level-3 tables, which lie side by side.
    pub fn page_tables(&self) -> &[Table] {
        let run = self.page_table_run();
        assert_eq!(
            run.len() as u64,
            BLOCKS,
            "level-3 tables do not lie side by side"
        );
        self.stage2.hardware().tables(run)
    }

    fn page_table_run(&self) -> Range<usize> {
        let number = |block: u64| {
            let ipa = START + block * BLOCK * PAGE_SIZE;
            let table = self.table(self.table(self.root(), ipa >> 30), ipa >> 21 & 511);
            Memory::index(table)
        };
        let numbers = (0..BLOCKS).map(number);
        let first = numbers.clone().min().unwrap_or(0);
        first..numbers.max().unwrap_or(0) + 1
    }

    fn root(&self) -> Pa {
        Pa::new(self.stage2.vttbr() & OUTPUT)
    }

    /// Returns entry `index` of the table at `pa`, or of those that follow it side by side.
    fn entry(&self, pa: Pa, index: u64) -> &AtomicU64 {
        let first = Memory::index(pa) + (index / 512) as usize;
        let [table] = self.stage2.hardware().tables(first..first + 1) else {
            unreachable!("a run of one")
        };
        &table.entries()[(index % 512) as usize]
    }

    fn table(&self, pa: Pa, index: u64) -> Pa {
        Pa::new(self.entry(pa, index).load(Ordering::Relaxed) & OUTPUT)
    }

    fn leaf(&self, page: u64) -> &AtomicU64 {
        let ipa = START + page * PAGE_SIZE;
        let level2 = self.table(self.root(), ipa >> 30);
        let entry = self.entry(level2, ipa >> 21 & 511);
        let seen = entry.load(Ordering::Relaxed);
        if seen & TABLE == 0 {
            return entry;
        }
        self.entry(Pa::new(seen & OUTPUT), ipa >> 12 & 511)
    }
}
