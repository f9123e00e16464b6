//! A guest with memory on the fake machine, and a host that takes its dirty pages.

use crate::dirty::Dirty;
use crate::fake::{Guest, Machine};
use crate::pte::{Kind, Pte};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::*;
use crate::{Error, Fault, FaultAccess, FaultKind, Features, Outcome, Support, Translation};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::vec::Vec;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
/// Pages in 2 MiB and in 1 GiB.
pub const P2M: u64 = 512;
pub const P1G: u64 = 512 * 512;
/// Where the machine's memory behind guests lies, 1 GiB aligned.
pub const RAM: u64 = 0x20_0000_0000;

pub struct World {
    pub machine: Arc<Machine>,
    pub stage2: Stage2<Arc<Machine>>,
    pub guest: Guest,
    /// What each machine page holds: the time of its last write.
    pub ram: Mutex<HashMap<u64, u64>>,
    pub clock: AtomicU64,
    next_epoch: AtomicU64,
}

pub fn dbm() -> Features {
    Features {
        dbm: Support::Present,
        ..Features::BASELINE
    }
}

pub fn vmid() -> Vmid {
    Vmid::new(7, VmidWidth::Eight).unwrap()
}

/// Every engine with the features it needs, with and without BBM level 2.
pub fn engines() -> Vec<(Engine, Features)> {
    let bbm2 = Features {
        bbm2: Support::Present,
        ..dbm()
    };
    std::vec![
        (Engine::WriteProtect, Features::BASELINE),
        (Engine::WriteProtect, dbm()),
        (Engine::WriteProtect, Machine::everything()),
        (Engine::Dbm, dbm()),
        (Engine::Dbm, bbm2),
        (Engine::Dbm, Machine::everything()),
    ]
}

impl World {
    pub fn new(features: Features) -> Self {
        Self::sized(features, 40, 64, 2)
    }

    pub fn sized(features: Features, ipa_bits: u8, tables: usize, pes: usize) -> Self {
        let machine = Arc::new(Machine::new(tables, pes));
        machine.assume(&features);
        let stage2 = Stage2::new(Arc::clone(&machine), ipa_bits, vmid(), features).unwrap();
        let guest = Guest {
            vtcr: stage2.vtcr(),
            vttbr: stage2.vttbr(),
        };
        Self {
            machine,
            stage2,
            guest,
            ram: Mutex::default(),
            clock: AtomicU64::new(0),
            next_epoch: AtomicU64::new(1),
        }
    }

    /// Adds slot `id` of `pages` pages at `ipa`, backed by contiguous memory at `pa`.
    pub fn slot(&self, id: u16, ipa: u64, pages: u64, access: Access, pa: u64) {
        let extent = Extent {
            pa: Pa::new(pa),
            pages,
        };
        self.stage2
            .add_slot(SlotId(id), Ipa::new(ipa).gfn(), pages, access, &[extent])
            .unwrap();
    }

    pub fn map_all(&self, id: u16) {
        let (mut from, mut still) = (0, 0);
        while let Progress::More { done, .. } = self.stage2.map_ahead(SlotId(id), from).unwrap() {
            // A guest that maps the same page at this moment is faster.
            still = if done > from { 0 } else { still + 1 };
            assert!(still < 10_000, "map_ahead stood still at {from}");
            from = done;
        }
    }

    /// One access by the guest. Returns how many aborts EL2 took for it, or the abort's outcome if it
    /// was not to be had.
    pub fn access(&self, pe: usize, ipa: u64, access: FaultAccess) -> Result<usize, Outcome> {
        self.machine.become_pe(pe);
        for aborts in 0..100_000 {
            let then = |pa: Pa| {
                let expected = self
                    .stage2
                    .translate(Ipa::new(ipa))
                    .map(|t| t.pa.raw() & !0xfff);
                assert_eq!(Some(pa.raw()), expected, "{ipa:#x} reached foreign memory");
                if access == FaultAccess::Write {
                    self.store(pa.raw());
                }
            };
            match self.machine.access(pe, self.guest, ipa, access, then) {
                Ok(()) => return Ok(aborts),
                Err(abort) => match self.stage2.handle_fault(abort) {
                    Outcome::Resume | Outcome::Dirtied(_) => {}
                    // Whoever is changing the entry may be a thread that waits for this core.
                    Outcome::Retry => std::thread::yield_now(),
                    other => return Err(other),
                },
            }
        }
        panic!("the guest faults for ever at {ipa:#x}");
    }

    /// A write by the guest that does `then` when it happens.
    pub fn access_then(&self, pe: usize, ipa: u64, then: impl Fn()) {
        for _ in 0..100_000 {
            let store = |_| then();
            match self
                .machine
                .access(pe, self.guest, ipa, FaultAccess::Write, store)
            {
                Ok(()) => return,
                Err(abort) => {
                    let outcome = self.stage2.handle_fault(abort);
                    assert!(matches!(
                        outcome,
                        Outcome::Resume | Outcome::Dirtied(_) | Outcome::Retry
                    ));
                    std::thread::yield_now();
                }
            }
        }
        panic!("the guest faults for ever at {ipa:#x}");
    }

    fn store(&self, pa: u64) {
        let now = self.clock.fetch_add(1, Ordering::SeqCst) + 1;
        self.ram.lock().unwrap().insert(pa & !0xfff, now);
    }

    pub fn write(&self, pe: usize, ipa: u64) -> usize {
        self.access(pe, ipa, FaultAccess::Write).unwrap()
    }

    pub fn touch(&self, pe: usize, ipa: u64) {
        self.write(pe, ipa);
    }

    pub fn read(&self, pe: usize, ipa: u64) -> usize {
        self.access(pe, ipa, FaultAccess::Read).unwrap()
    }

    /// A write by EL2, as emulation does it.
    pub fn el2_write(&self, ipa: u64) {
        let Translation { pa, .. } = self.stage2.translate(Ipa::new(ipa)).unwrap();
        self.store(pa.raw() & !0xfff);
        self.stage2.mark_dirty(Ipa::new(ipa), 8).unwrap();
    }

    pub fn start(&self, engine: Engine, granularity: Granularity) {
        finish(|| self.stage2.start_log(engine, granularity)).unwrap();
    }

    pub fn stop(&self) {
        finish(|| self.stage2.stop_log()).unwrap();
    }

    pub fn delete(&self, id: u16) {
        finish(|| self.stage2.delete_slot(SlotId(id))).unwrap();
    }

    pub fn new_epoch(&self) -> Epoch {
        Epoch(self.next_epoch.fetch_add(1, Ordering::SeqCst))
    }

    /// Takes an epoch and returns it with the addresses it holds.
    pub fn take(&self) -> (Epoch, BTreeSet<u64>) {
        let epoch = self.new_epoch();
        finish(|| self.stage2.take(epoch)).unwrap();
        (epoch, self.read_epoch(epoch))
    }

    /// Takes and commits.
    pub fn harvest(&self) -> BTreeSet<u64> {
        let (epoch, pages) = self.take();
        self.stage2.commit(epoch).unwrap();
        pages
    }

    /// Reads what the epoch holds, checking the counts and the tails on the way.
    pub fn read_epoch(&self, epoch: Epoch) -> BTreeSet<u64> {
        let mut pages = Vec::new();
        for slot in self.stage2.taken(epoch).unwrap() {
            let words = self.stage2.in_flight(slot.slot, epoch).unwrap();
            assert_eq!(words.len() as u64, slot.pages.div_ceil(64));
            let before = pages.len();
            for page in pages_of(&words) {
                assert!(
                    page < slot.pages,
                    "bit {page} is past the end of a slot of {}",
                    slot.pages
                );
                pages.push(slot.base.ipa().raw() + page * PAGE_SIZE);
            }
            assert_eq!((pages.len() - before) as u64, slot.dirty_pages);
        }
        pages.into_iter().collect()
    }

    /// The bitmaps of a slot.
    pub fn dirty(&self, id: u16) -> Arc<Dirty> {
        let layout = self.stage2.layout();
        Arc::clone(&layout.slot(SlotId(id)).unwrap().dirty)
    }

    /// The descriptor that decides about `ipa`.
    pub fn pte(&self, ipa: u64) -> (Pte, Level) {
        let (entry, level) = self.machine.walk(self.guest, ipa);
        (Pte(entry.load(Ordering::SeqCst)), LEVELS[level as usize])
    }

    pub fn entry(&self, ipa: u64) -> &AtomicU64 {
        self.machine.walk(self.guest, ipa).0
    }

    /// The entry that points to the level-3 table of `ipa`.
    pub fn parent(&self, ipa: u64) -> &AtomicU64 {
        self.stage2.descend_to(ipa, Level::L2).entry()
    }

    /// The table and index of the entry of `level` on the way to `ipa`.
    pub fn where_is(&self, ipa: u64, level: Level) -> (Pa, usize) {
        let mut table = Pa::new(self.guest.vttbr & 0x0000_ffff_ffff_f000);
        let mut at = Level::L1;
        assert!(self.stage2.ipa_bits() < 40, "one root at level 1");
        while at < level {
            let entry =
                self.machine.table_of(table).entries()[at.index(ipa)].load(Ordering::SeqCst);
            let Kind::Table(below) = Pte(entry).kind(at) else {
                panic!("no table below {at:?}")
            };
            table = below;
            at = at.below().unwrap();
        }
        (table, at.index(ipa))
    }

    /// Every leaf of the VM, as (address, level, descriptor).
    pub fn leaves(&self) -> Vec<(u64, Level, Pte)> {
        let mut leaves = Vec::new();
        for slot in self.stage2.slots() {
            let end = slot.base.ipa().raw() + slot.pages * PAGE_SIZE;
            let mut at = slot.base.ipa().raw();
            while at < end {
                let (pte, level) = self.pte(at);
                if pte.kind(level) == Kind::Leaf {
                    leaves.push((at, level, pte));
                }
                at = (at & !(level.size() - 1)) + level.size();
            }
        }
        leaves
    }
}

pub const LEVELS: [Level; 4] = [Level::L0, Level::L1, Level::L2, Level::L3];

/// Calls a bounded operation until it is done.
pub fn finish(mut step: impl FnMut() -> Result<Progress, Error>) -> Result<(), Error> {
    for _ in 0..1_000_000 {
        if step()? == Progress::Done {
            return Ok(());
        }
    }
    panic!("an operation never finished");
}

pub fn fault(ipa: u64, access: FaultAccess, kind: FaultKind) -> Fault {
    Fault {
        ipa: Ipa::new(ipa),
        access,
        kind,
        va: None,
    }
}

pub fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

/// All pages of `start..start + bytes`.
pub fn span(start: u64, bytes: u64) -> BTreeSet<u64> {
    (start..start + bytes).step_by(PAGE_SIZE as usize).collect()
}

/// The pages of an epoch's bitmap, as one reads it who looks only where there may be any.
pub fn pages_of(words: &crate::Words) -> Vec<u64> {
    let mut pages = Vec::new();
    let mut at = 0;
    while at < words.len() {
        let marked = words.marked(at);
        assert!(at <= marked.start && marked.start <= marked.end);
        let end = marked.end.min(words.len());
        for index in marked.start..end {
            let word = words[index].load(Ordering::Acquire);
            pages.extend(crate::dirty::Bits(word).map(|bit| index as u64 * 64 + u64::from(bit)));
        }
        at = marked.end.max(at + 1);
    }
    pages
}
