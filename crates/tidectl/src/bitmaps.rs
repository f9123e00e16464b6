//! Dirty bitmaps on this side: KVM's layout in memory and in files.
//!
//! One little-endian `u64` bitmap a slot, bit 0 = the slot's first page; slots follow one
//! another in the order of their ids. Bits past a slot's last page are 0.

use crate::{Error, Result};
use serde_json::{Value, json};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{Epoch, SlotId};

/// log2 of the bytes a bit stands for.
pub const GRANULE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// Largest slot this side will hold a bitmap for: 64 TiB, more than any 48-bit machine maps
/// for one guest, and a bitmap of 2 GiB.
const PAGES_MAX: u64 = 1 << 34;

/// The bitmaps of one epoch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmaps {
    /// Which.
    pub epoch: Epoch,
    /// Each logged slot's, by id.
    pub slots: Vec<SlotBitmap>,
}

/// One slot's bitmap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotBitmap {
    /// Which slot.
    pub slot: SlotId,
    /// Where the guest sees it.
    pub base_ipa: u64,
    /// Its size.
    pub pages: u64,
    words: Vec<u64>,
}

/// Pages `start..start + len` of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first.
    pub start: u64,
    /// How many.
    pub len: u64,
}

impl SlotBitmap {
    /// Starts clean.
    ///
    /// # Errors
    /// When the target claims a slot no machine has.
    pub fn new(slot: SlotId, base_ipa: u64, pages: u64) -> Result<Self> {
        let end = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|bytes| base_ipa.checked_add(bytes));
        if pages > PAGES_MAX || end.is_none() {
            return Err(Error::Protocol {
                during: "reading a bitmap".into(),
                problem: format!("slot {slot} of {pages} pages at {base_ipa:#x}"),
            });
        }
        let words = vec![0; pages.div_ceil(64) as usize];
        Ok(Self {
            slot,
            base_ipa,
            pages,
            words,
        })
    }

    /// Its words.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The words of `pages` pages from `first`, a multiple of 64.
    pub fn words_mut(&mut self, first: u64, pages: u32) -> Option<&mut [u64]> {
        let end = first.checked_add(u64::from(pages))?;
        if !first.is_multiple_of(64) || end > self.pages {
            return None;
        }
        let (start, end) = (
            usize::try_from(first / 64).ok()?,
            usize::try_from(end.div_ceil(64)).ok()?,
        );
        self.words.get_mut(start..end)
    }

    /// Marks a page dirty; pages outside the slot are none.
    pub fn set(&mut self, page: u64) {
        if page < self.pages
            && let Some(word) = self.words.get_mut((page / 64) as usize)
        {
            *word |= 1 << (page % 64);
        }
    }

    /// Tells whether a page is dirty.
    #[must_use]
    pub fn get(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Dirty pages.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Runs of dirty pages, in order, each as long as it is.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.find(at, |word| word)?;
            let end = self.find(start, |word| !word).unwrap_or(self.pages);
            at = end;
            Some(Run {
                start,
                len: end - start,
            })
        })
    }

    /// The first page from `from` on whose bit is set after `view`.
    fn find(&self, from: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        let mut index = (from / 64) as usize;
        let mut word = view(*self.words.get(index)?) & u64::MAX << (from % 64);
        while word == 0 {
            index += 1;
            word = view(*self.words.get(index)?);
        }
        let page = index as u64 * 64 + u64::from(word.trailing_zeros());
        (page < self.pages).then_some(page)
    }

    /// Its words as KVM has them, little-endian.
    pub fn to_bytes(&self) -> impl Iterator<Item = u8> + '_ {
        self.words.iter().flat_map(|word| word.to_le_bytes())
    }

    /// Reads what [`SlotBitmap::to_bytes`] wrote.
    ///
    /// # Errors
    /// A sentence: the wrong length, or bits past the last page.
    pub fn from_bytes(
        slot: SlotId,
        base_ipa: u64,
        pages: u64,
        bytes: &[u8],
    ) -> std::result::Result<Self, String> {
        let mut bits = Self::new(slot, base_ipa, pages).map_err(|error| error.to_string())?;
        let (words, rest) = bytes.as_chunks::<8>();
        if words.len() != bits.words.len() || !rest.is_empty() {
            let wanted = bits.words.len() * 8;
            return Err(format!(
                "slot {slot}: {} bytes where {wanted} belong",
                bytes.len()
            ));
        }
        for (place, word) in bits.words.iter_mut().zip(words) {
            *place = u64::from_le_bytes(*word);
        }
        let past = match (pages % 64, bits.words.last()) {
            (0, _) | (_, None) => 0,
            (tail, Some(last)) => last >> tail,
        };
        if past != 0 {
            return Err(format!("slot {slot}: a bit is set past its last page"));
        }
        Ok(bits)
    }
}

impl Bitmaps {
    /// Dirty pages of all slots.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.slots.iter().map(SlotBitmap::dirty_pages).sum()
    }

    /// All slots' bitmaps in KVM's layout, one after the other.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.slots.iter().flat_map(SlotBitmap::to_bytes).collect()
    }

    /// What belongs beside [`Bitmaps::to_bytes`]: where each slot's part is and what it means.
    #[must_use]
    pub fn describe(&self) -> Value {
        let mut offset = 0;
        let slots: Vec<Value> = self
            .slots
            .iter()
            .map(|slot| {
                let len = slot.words.len() as u64 * 8;
                let value = json!({
                    "id": slot.slot.0,
                    "base_ipa": slot.base_ipa,
                    "pages": slot.pages,
                    "dirty_pages": slot.dirty_pages(),
                    "offset_bytes": offset,
                    "length_bytes": len,
                });
                offset += len;
                value
            })
            .collect();
        json!({
            "schema": 1,
            "epoch": self.epoch.0,
            "granule_shift": GRANULE_SHIFT,
            "dirty_pages": self.dirty_pages(),
            "dirty_bytes": self.dirty_pages() * PAGE_SIZE,
            "slots": slots,
        })
    }

    /// The same as ranges of guest addresses.
    #[must_use]
    pub fn ranges(&self) -> Value {
        let slots: Vec<Value> = self
            .slots
            .iter()
            .map(|slot| {
                let ranges: Vec<Value> = slot
                    .runs()
                    .map(|run| {
                        let ipa = slot.base_ipa + run.start * PAGE_SIZE;
                        json!({ "ipa": ipa, "pages": run.len })
                    })
                    .collect();
                json!({
                    "id": slot.slot.0,
                    "base_ipa": slot.base_ipa,
                    "pages": slot.pages,
                    "dirty_pages": slot.dirty_pages(),
                    "ranges": ranges,
                })
            })
            .collect();
        json!({
            "schema": 1,
            "epoch": self.epoch.0,
            "granule_shift": GRANULE_SHIFT,
            "dirty_pages": self.dirty_pages(),
            "dirty_bytes": self.dirty_pages() * PAGE_SIZE,
            "slots": slots,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bits(pages: u64, set: &[u64]) -> SlotBitmap {
        let mut bits = SlotBitmap::new(SlotId(0), 0x4000_0000, pages).expect("a possible slot");
        set.iter().for_each(|&page| bits.set(page));
        bits
    }

    #[test]
    fn layout_is_kvms() {
        let bitmaps = Bitmaps {
            epoch: Epoch(3),
            slots: vec![
                bits(65, &[0, 9, 64]),
                SlotBitmap {
                    base_ipa: 0,
                    ..bits(2, &[1])
                },
            ],
        };
        let mut wanted = vec![0; 24];
        wanted[0] = 0x01;
        wanted[1] = 0x02;
        wanted[8] = 0x01;
        wanted[16] = 0x02;
        assert_eq!(bitmaps.to_bytes(), wanted);
        let described = bitmaps.describe();
        assert_eq!(described["dirty_pages"], 4);
        assert_eq!(described["slots"][1]["offset_bytes"], 16);
        assert_eq!(described["slots"][1]["length_bytes"], 8);
        let ranges = bitmaps.ranges();
        assert_eq!(
            ranges["slots"][0]["ranges"][1],
            json!({ "ipa": 0x4000_9000, "pages": 1 })
        );
    }

    #[test]
    fn pages_outside_are_none() {
        let bits = bits(65, &[65, 66, 1 << 40]);
        assert_eq!(bits.dirty_pages(), 0);
        assert!(!bits.get(1 << 40));
    }

    #[test]
    fn windows_stay_inside() {
        let mut bits = bits(130, &[]);
        assert_eq!(bits.words_mut(0, 130).map(|w| w.len()), Some(3));
        assert_eq!(bits.words_mut(64, 64).map(|w| w.len()), Some(1));
        assert_eq!(bits.words_mut(128, 2).map(|w| w.len()), Some(1));
        assert!(bits.words_mut(128, 3).is_none());
        assert!(bits.words_mut(1, 1).is_none());
        assert!(bits.words_mut(u64::MAX - 63, 64).is_none());
    }

    #[test]
    fn impossible_slots_are_refused() {
        assert!(SlotBitmap::new(SlotId(0), 0, PAGES_MAX + 1).is_err());
        assert!(SlotBitmap::new(SlotId(0), u64::MAX, 1).is_err());
    }

    #[test]
    fn foreign_bytes_are_checked() {
        let read = |pages, bytes: &[u8]| SlotBitmap::from_bytes(SlotId(1), 0, pages, bytes);
        assert!(read(64, &[0; 7]).is_err());
        assert!(read(64, &[0; 16]).is_err());
        assert!(read(63, &[0, 0, 0, 0, 0, 0, 0, 0x80]).is_err());
        assert!(read(64, &[0, 0, 0, 0, 0, 0, 0, 0x80]).is_ok_and(|b| b.get(63)));
    }

    proptest! {
        #[test]
        fn runs_are_the_set_pages(
            pages in 1..400u64, set in prop::collection::btree_set(0..400u64, 0..200),
        ) {
            let set: Vec<u64> = set.into_iter().filter(|&page| page < pages).collect();
            let bits = bits(pages, &set);
            let runs: Vec<Run> = bits.runs().collect();
            let flat: Vec<u64> = runs.iter().flat_map(|r| r.start..r.start + r.len).collect();
            prop_assert_eq!(flat, set);
            prop_assert!(runs.windows(2).all(|w| w[0].start + w[0].len < w[1].start));
            let bytes: Vec<u8> = bits.to_bytes().collect();
            prop_assert_eq!(SlotBitmap::from_bytes(SlotId(0), 0x4000_0000, pages, &bytes), Ok(bits));
        }
    }
}
