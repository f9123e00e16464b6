//! What the watchers of this crate's own tests know of the machine besides: where a descriptor is, what it holds,
//! and what TLBs hold that is not that.

use super::{Cpu, Entry, Machine, TABLES, Unsettled, lock, tlb};
use crate::hardware::Table;
use std::ops::Range;

impl Machine {
    /// Returns the descriptor at an address of this process.
    pub(crate) fn locate(&self, address: usize) -> Option<Entry> {
        let first = std::ptr::from_ref(self.tables.first()?).addr();
        let offset = address.checked_sub(first)?;
        let table = offset / size_of::<Table>();
        (table < self.tables.len()).then_some(Entry {
            table,
            index: offset % size_of::<Table>() / 8,
        })
    }

    /// Returns the table at `pa`, if it is one of this machine.
    pub(crate) fn table_at(&self, pa: u64) -> Option<usize> {
        let table = usize::try_from(pa.checked_sub(TABLES)? / 4096).ok()?;
        (table < self.tables.len()).then_some(table)
    }

    /// The current CPU changed a descriptor, and no barrier says so yet.
    pub(crate) fn changed(&self, place: Entry, old: u64) {
        const LOOKS: u32 = 2;
        let change = Unsettled {
            by: self.current_pe(),
            observed: false,
            old,
            looks: LOOKS,
        };
        let mut unsettled = lock(&self.unsettled);
        let known = unsettled.entry(place).or_insert(change);
        if known.by != change.by {
            *known = change;
        }
    }

    /// Returns a CPU that still knows where a table was.
    pub(crate) fn who_knows(&self, table: usize) -> Option<usize> {
        let pa = TABLES + table as u64 * 4096;
        let knows = |cpu: &Cpu| lock(&cpu.pe).tlb.knows_table(pa);
        self.cpus.iter().position(knows)
    }

    /// Returns what a descriptor holds.
    pub(crate) fn descriptor(&self, place: Entry) -> u64 {
        self.value(place.table, place.index)
    }

    /// Is an update under way to the descriptor that makes it dirty?
    pub(crate) fn has_late_update(&self, place: Entry) -> bool {
        lock(&self.late).iter().any(|late| late.place == place)
    }

    /// Returns the CPUs that have cached, for addresses of `start..end`, something else than what a
    /// descriptor says that is about to be made valid there: (CPU, address, what it has).
    pub(crate) fn stale(
        &self,
        vmid: u16,
        start: u64,
        end: u64,
        pte: u64,
        level: u32,
    ) -> Option<(usize, u64, u64)> {
        let made = tlb::Leaf {
            pte,
            level,
            hd: false,
        };
        let bbm2 = self
            .features
            .get()
            .is_some_and(|features| features.bbm2.is_present());
        let is_table = level < 3 && pte & 3 == 3;
        self.cpus.iter().enumerate().find_map(|(number, cpu)| {
            let cached = lock(&cpu.pe).tlb.overlapping(vmid, start, end);
            let stale = cached.into_iter().find(|(at, leaf)| {
                if is_table {
                    // Under FEAT_BBM level 2 it is as good as what the table says there.
                    !bbm2 || !self.leads_to(pte, level + 1, start, at, leaf)
                } else if bbm2 {
                    !leaf.is_equivalent(&made, at.start)
                } else {
                    !leaf.agrees(&made, at.start)
                }
            });
            stale.map(|(at, leaf)| (number, at.start, leaf.pte))
        })
    }

    /// Does the table of `level` for addresses from `base` on lead, at each of `at`, to where the cached leaf
    /// does, or nowhere?
    fn leads_to(
        &self,
        table: u64,
        level: u32,
        base: u64,
        at: &Range<u64>,
        cached: &tlb::Leaf,
    ) -> bool {
        let Some(table) = self.table_at(table & 0x0000_ffff_ffff_f000) else {
            return false;
        };
        let size = 1 << tlb::shift(level);
        (0..512).all(|index| {
            let from = base + index as u64 * size;
            if from >= at.end || from + size <= at.start {
                return true;
            }
            let pte = self.descriptor(Entry { table, index });
            if level < 3 && pte & 3 == 3 {
                return self.leads_to(pte, level + 1, from, at, cached);
            }
            let leaf = tlb::Leaf {
                pte,
                level,
                hd: false,
            };
            pte & tlb::VALID == 0 || cached.is_equivalent(&leaf, from.max(at.start))
        })
    }
}
