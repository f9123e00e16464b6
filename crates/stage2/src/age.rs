//! Which pages were accessed, by the access flag, and without a word to the dirty log.
//!
//! A query tells which leaves have the flag and takes it away, so that the next one tells what was
//! accessed since. With hardware management of the flag (VTCR_EL2.HA) setting it again costs the guest
//! nothing, without it one fault a leaf ([`FaultKind::AccessFlag`](crate::FaultKind)).
//!
//! The write permission and DBM are never touched, and a dirty leaf keeps its flag: one without it is
//! none that the hardware would make (I_DSHLJ), and none that software may (invariant 9). So a page that
//! was written is young until a harvest took it. The change is a compare-and-swap, not a fetch-and-clear,
//! because the hardware may make the leaf dirty between a look and a change.
//!
//! A block's flag is that of all its pages. The query that reaches the block's end takes it away; one of
//! an earlier part only tells. So pieces asked for in order all hear of it.
//!
//! # Concurrency
//!
//! Any number of CPUs, beside everything else; nothing is locked but this CPU's copy of the layout. Two
//! that ask for the same pages share what there is to hear. Accesses through stale translations before the
//! invalidation at the end are of pages that were told.

use crate::error::Error;
use crate::hardware::Hardware;
use crate::pte::{Kind, Pte};
use crate::slot::Slot;
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::tlb::Pending;
use crate::types::{Level, PAGE_SHIFT, PAGE_SIZE, SlotId};

/// Pages in a query at most: 16 KiB of tables, or half a block of 1 GiB.
const PAGES: u64 = 2048;

impl<H: Hardware> Stage2<H> {
    /// Tells which of `pages` pages of a slot, from page `first` on, were accessed since it was asked
    /// last, as bits of `young` from bit 0 of word 0 on. Returns how many pages were looked at, which is
    /// at most what `young` has bits for; ask for the rest.
    ///
    /// `first` and `pages` are multiples of 64, or the range ends with the slot. What is not mapped was
    /// not accessed; an entry that another CPU is changing counts as accessed. A fresh leaf counts as
    /// accessed once.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSlot`], [`Error::PageRange`].
    pub fn test_and_clear_young(
        &self,
        slot: SlotId,
        first: u64,
        pages: u64,
        young: &mut [u64],
    ) -> Result<u64, Error> {
        let layout = self.layout();
        let slot = layout.slot(slot).ok_or(Error::NoSuchSlot(slot))?;
        slot.require_range(first, pages)?;
        let pages = pages.min(PAGES).min(young.len() as u64 * 64);
        let mut query = Query {
            slot,
            first,
            end: first + pages,
            young,
            pending: Pending::new(),
        };
        query.young.fill(0);
        let mut page = first;
        while page < query.end {
            let place = self.descend(slot.start() + (page << PAGE_SHIFT));
            page = match (place.kind, place.level) {
                (Kind::Leaf, Level::L3) => {
                    query.table(page, place.table.0.iter().skip(place.index))
                }
                (kind, level) => query.above(page, kind, level, place.entry()),
            };
        }
        self.tlb().pending(&mut query.pending);
        Ok(pages)
    }
}

struct Query<'a> {
    slot: &'a Slot,
    first: u64,
    end: u64,
    young: &'a mut [u64],
    pending: Pending,
}

impl Query<'_> {
    /// Asks the leaves of a level-3 table from `page` on. Returns the page behind them.
    fn table<'e>(&mut self, mut page: u64, entries: impl Iterator<Item = &'e AtomicU64>) -> u64 {
        for entry in entries {
            if page >= self.end {
                break;
            }
            match take_flag(entry, Level::L3) {
                Flag::Taken => {
                    self.note(page, page + 1);
                    let ipa = self.slot.start() + (page << PAGE_SHIFT);
                    self.pending.push(ipa, Level::L3);
                }
                Flag::Kept => self.note(page, page + 1),
                Flag::Clear => {}
            }
            page += 1;
        }
        page
    }

    /// Asks a block, or passes a hole, at `page`. Returns the page behind it.
    fn above(&mut self, page: u64, kind: Kind, level: Level, entry: &AtomicU64) -> u64 {
        let base = (self.slot.start() + page * PAGE_SIZE) & !(level.size() - 1);
        // A hole may reach out of the slot; a block does not.
        let behind = (base + level.size()).min(self.slot.end());
        let behind = (behind - self.slot.start()) >> PAGE_SHIFT;
        let young = match kind {
            Kind::Leaf if behind <= self.end => match take_flag(entry, level) {
                Flag::Taken => {
                    self.pending.push(base, level);
                    true
                }
                Flag::Kept => true,
                Flag::Clear => false,
            },
            Kind::Leaf => Pte(entry.load(Ordering::Relaxed)).is_accessed(),
            Kind::Busy => true,
            Kind::Empty | Kind::Table(_) => false,
        };
        if young {
            self.note(page, behind);
        }
        behind
    }

    fn note(&mut self, from: u64, to: u64) {
        for page in from..to.min(self.end) {
            let at = page - self.first;
            if let Some(word) = self.young.get_mut((at / 64) as usize) {
                *word |= 1 << (at % 64);
            }
        }
    }
}

/// What became of a leaf's flag.
enum Flag {
    /// It was set and is not any more.
    Taken,
    /// It is set and stays.
    Kept,
    /// It was not set, or there is no leaf.
    Clear,
}

fn take_flag(entry: &AtomicU64, level: Level) -> Flag {
    let asked = entry.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |seen| {
        let seen = Pte(seen);
        let young = seen.kind(level) == Kind::Leaf && seen.is_accessed();
        (young && !seen.is_dirty()).then_some(seen.unaccessed().0)
    });
    match asked {
        Ok(_) => Flag::Taken,
        Err(seen) if Pte(seen).kind(level) == Kind::Leaf && Pte(seen).is_accessed() => Flag::Kept,
        Err(_) => Flag::Clear,
    }
}
