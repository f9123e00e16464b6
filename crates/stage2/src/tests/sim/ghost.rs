//! Invariant 1, watched from outside: for each page what it holds, what the host has of it, and
//! whether anything knows that these differ.
//!
//! What may know:
//!
//! * the leaf is dirty, or the hardware's update that makes it dirty is under way: the store may be
//!   visible before it (R_RZYCN). Such an update is good until the CPU's next DSB, at which it arrives.
//!   So it counts while guests run; it cannot count after they stopped, because a stop is a DSB on each
//!   of their CPUs (invariant 13), and a harvest that is the last one without it fails here, when the
//!   copy is compared with the memory;
//! * the page's bit among the live ones;
//! * its bit in the epoch that is being taken, is with the host and not copied yet, or was aborted. Not
//!   after the commit, and not for what was written after the host copied it: the commit will forget
//!   the bit;
//! * an operation under way, that took one of these away itself, or the table it is in. Only until it
//!   returns.
//!
//! A write-protected page of the log that is writable is none of them: no harvest looks at a leaf of that kind
//! without the page's bit. A block is, whatever its kind.
//!
//! And invariant 5's second half: when a take is asked for first, the pages that the host lacks are noted.
//! Those that no operation is at, and the hardware neither, are in the epoch when it is done, whoever is
//! at them by then.

use super::rules::{Scope, is_dirty_leaf, is_table, needs_a_bit};
use crate::control::Part;
use crate::dirty::Dirty;
use crate::fake::traced::{How, Write};
use crate::fake::{Guest, Machine};
use crate::types::{Epoch, PAGE_SIZE};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::format;
use std::string::String;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::vec::Vec;

/// A page's content is the time of its last write.
#[derive(Clone, Copy, Default, Debug)]
struct Page {
    content: u64,
    /// What the host has, in all epochs it committed.
    committed: Option<u64>,
    /// What it copied in the epoch it has now.
    copied: Option<u64>,
}

struct Slot {
    start: u64,
    pages: u64,
    dirty: Arc<Dirty>,
    /// The bits of the epoch that mean something, by word.
    in_flight: HashMap<usize, u64>,
}

/// A word of a slot's bitmaps.
enum Word {
    Live(usize),
    InFlight(usize),
}

impl Slot {
    fn end(&self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }

    fn word(&self, address: usize) -> Option<Word> {
        let index = |words: &[crate::sync::atomic::AtomicU64]| {
            let offset = address.checked_sub(words.as_ptr().addr())?;
            (offset < size_of_val(words)).then_some(offset / 8)
        };
        index(self.dirty.live())
            .map(Word::Live)
            .or_else(|| index(self.dirty.in_flight()).map(Word::InFlight))
    }
}

#[derive(Default)]
pub struct Ghost {
    on: bool,
    pages: BTreeMap<u64, Page>,
    slots: BTreeMap<u16, Slot>,
    /// By CPU: what the operation it is in took away, as ranges of addresses.
    held: HashMap<usize, Vec<(u64, u64)>>,
    owed: Option<Owed>,
}

/// What an epoch must hold when it is done. Nothing any more, once it was.
struct Owed {
    epoch: Epoch,
    pages: BTreeSet<u64>,
}

impl Ghost {
    /// A slot the host knows of. If a log is on, it copies all of it now.
    pub fn add_slot(&mut self, id: u16, start: u64, dirty: Arc<Dirty>, pages: u64) {
        let words = dirty.in_flight().iter().enumerate();
        let in_flight = words
            .map(|(index, word)| (index, crate::sync::raw(word).load(Ordering::SeqCst)))
            .collect();
        let slot = Slot {
            start,
            pages,
            dirty,
            in_flight,
        };
        let (first, end) = (slot.start, slot.end());
        self.slots.insert(id, slot);
        let on = self.on;
        for (_, page) in self.pages.range_mut(first..end) {
            page.committed = on.then_some(page.content);
            page.copied = None;
        }
    }

    /// A slot that goes, and what was known about it with it.
    pub fn remove_slot(&mut self, id: u16) {
        let Some(slot) = self.slots.remove(&id) else {
            return;
        };
        for (_, page) in self.pages.range_mut(slot.start..slot.end()) {
            (page.committed, page.copied) = (None, None);
        }
        self.owes_no_more(slot.start, slot.end());
    }

    /// The log has said that it is on: the host copies everything.
    pub fn start(&mut self) {
        self.on = true;
        self.owed = None;
        for (ipa, page) in &mut self.pages {
            let known = self
                .slots
                .values()
                .any(|slot| (slot.start..slot.end()).contains(ipa));
            page.committed = known.then_some(page.content);
            page.copied = None;
        }
        for slot in self.slots.values_mut() {
            slot.in_flight.clear();
        }
    }

    /// The log has said that it is on, and that the host has nothing.
    pub fn start_all_dirty(&mut self) {
        self.start();
        for page in self.pages.values_mut() {
            page.committed = page.committed.map(|_| u64::MAX);
        }
    }

    /// Nothing is promised any more.
    pub fn stop(&mut self) {
        self.on = false;
    }

    fn page(&mut self, ipa: u64) -> &mut Page {
        let ipa = ipa & !(PAGE_SIZE - 1);
        let known = self.on
            && self
                .slots
                .values()
                .any(|slot| (slot.start..slot.end()).contains(&ipa));
        self.pages.entry(ipa).or_insert_with(|| Page {
            content: 0,
            // The host had it before anybody wrote it.
            committed: known.then_some(0),
            copied: None,
        })
    }

    /// Somebody wrote the page.
    pub fn stored(&mut self, ipa: u64, content: u64) {
        self.page(ipa).content = content;
    }

    /// The host copies a page of the epoch it has. One whose slot goes or went is no concern of it.
    pub fn copy(&mut self, ipa: u64) {
        if self.slot_of(ipa).is_none() {
            return;
        }
        let page = self.page(ipa);
        page.copied = Some(page.content);
    }

    pub fn commit(&mut self) {
        for page in self.pages.values_mut() {
            page.committed = page.copied.take().or(page.committed);
        }
        for slot in self.slots.values_mut() {
            slot.in_flight.clear();
        }
    }

    /// What was copied counts no more.
    pub fn abort(&mut self) {
        for page in self.pages.values_mut() {
            page.copied = None;
        }
    }

    /// What the host lacks: empty once everything was taken from guests that stand still.
    pub fn missing(&self) -> BTreeSet<u64> {
        let lacks = |(_, page): &(&u64, &Page)| {
            page.committed
                .is_some_and(|committed| committed != page.content)
        };
        self.pages
            .iter()
            .filter(lacks)
            .map(|(ipa, _)| *ipa)
            .collect()
    }

    /// What the host has.
    pub fn copied(&self) -> BTreeMap<u64, u64> {
        let copied = |(ipa, page): (&u64, &Page)| Some((*ipa, page.committed?));
        self.pages.iter().filter_map(copied).collect()
    }

    /// An epoch of `part`, or of everything, is about to be asked for, for the first time or again.
    pub fn take_asked(
        &mut self,
        machine: &Machine,
        guest: Guest,
        epoch: Epoch,
        part: Option<Part>,
    ) {
        if !self.on || self.owed.as_ref().is_some_and(|owed| owed.epoch >= epoch) {
            return;
        }
        let within = match part {
            None => 0..u64::MAX,
            Some(part) => match self.slots.get(&part.slot.0) {
                Some(slot) => {
                    let first = slot.start + part.first * PAGE_SIZE;
                    first..first + part.pages * PAGE_SIZE
                }
                None => return,
            },
        };
        let lacks = |page: &Page| {
            page.committed
                .is_some_and(|committed| committed != page.content)
        };
        let pages = self.pages.range(within);
        let owed = pages.filter(|(ipa, page)| {
            lacks(page) && !self.is_held(**ipa) && !has_late_update(machine, guest, **ipa)
        });
        let pages = owed.map(|(ipa, _)| *ipa).collect();
        self.owed = Some(Owed { epoch, pages });
    }

    /// It is done, says somebody.
    pub fn take_done(&mut self, epoch: Epoch) -> Result<(), String> {
        let owed = self.owed.as_mut().filter(|owed| owed.epoch == epoch);
        let pages = owed.map(|owed| std::mem::take(&mut owed.pages));
        let lost: Vec<u64> = pages
            .into_iter()
            .flatten()
            .filter(|ipa| self.slot_of(*ipa).is_some() && !self.in_flight(*ipa))
            .collect();
        match lost.as_slice() {
            [] => Ok(()),
            lost => Err(format!(
                "{lost:x?} were written before the take of {epoch:?}, and are not in it"
            )),
        }
    }

    fn owes_no_more(&mut self, start: u64, end: u64) {
        if let Some(owed) = &mut self.owed {
            owed.pages.retain(|ipa| !(start..end).contains(ipa));
        }
    }

    /// A bitmap's word was written.
    pub fn bitmap(&mut self, cpu: usize, write: Write) {
        for slot in self.slots.values_mut() {
            let (index, gone) = match slot.word(write.address) {
                None => continue,
                Some(Word::Live(index)) => (index, write.old & !write.new),
                Some(Word::InFlight(index)) => {
                    let word = slot.in_flight.entry(index).or_default();
                    let before = *word;
                    *word = match write.how {
                        How::And(mask) => *word & mask,
                        How::Or(mask) => *word | mask,
                        How::Store | How::Exchange | How::Add => write.new,
                    };
                    (index, before & !*word)
                }
            };
            let start = slot.start;
            let held = self.held.entry(cpu).or_default();
            for bit in crate::dirty::Bits(gone) {
                let ipa = start + (index as u64 * 64 + u64::from(bit)) * PAGE_SIZE;
                held.push((ipa, ipa + PAGE_SIZE));
            }
            return;
        }
    }

    /// A descriptor was written.
    pub fn descriptor(&mut self, cpu: usize, scope: Scope, write: Write) {
        // What hangs on a table that is broken off may be dirty, and is while the table may come back.
        let gone =
            |is: fn(u64, u32) -> bool| is(write.old, scope.level) && !is(write.new, scope.level);
        // And until a page that needs its bit has it.
        let made =
            |is: fn(u64, u32) -> bool| !is(write.old, scope.level) && is(write.new, scope.level);
        if gone(is_dirty_leaf) || gone(is_table) || made(needs_a_bit) || made(is_table) {
            let held = self.held.entry(cpu).or_default();
            held.push((scope.start, scope.end));
        }
    }

    /// `cpu` is about to write the page itself, and to say so.
    pub fn hold(&mut self, cpu: usize, ipa: u64) {
        let start = ipa & !(PAGE_SIZE - 1);
        self.held
            .entry(cpu)
            .or_default()
            .push((start, start + PAGE_SIZE));
    }

    /// The operation that `cpu` was in has returned. Returns the pages it had something to do with.
    pub fn release(&mut self, cpu: usize) -> Vec<u64> {
        let held = self.held.remove(&cpu).unwrap_or_default();
        let pages = held
            .into_iter()
            .flat_map(|(start, end)| self.pages.range(start..end).map(|(ipa, _)| *ipa));
        let pages: BTreeSet<u64> = pages.collect();
        pages.into_iter().collect()
    }

    /// Every page there is.
    pub fn all(&self) -> Vec<u64> {
        self.pages.keys().copied().collect()
    }

    /// Is the page's state known to whoever must know it?
    pub fn check(&self, machine: &Machine, guest: Guest, ipa: u64) -> Result<(), String> {
        let ipa = ipa & !(PAGE_SIZE - 1);
        let Some(page) = self.pages.get(&ipa).filter(|_| self.on) else {
            return Ok(());
        };
        let owed = |copy: Option<u64>| copy.is_some_and(|copy| copy != page.content);
        // Whether the host commits or aborts, it must hear of the page again, if it changed since.
        let (if_committed, if_aborted) = (owed(page.copied), owed(page.committed));
        if !if_committed && !if_aborted {
            return Ok(());
        }
        let by_epoch = page.copied.is_none() && self.in_flight(ipa);
        if by_epoch || self.leaf_or_live(machine, guest, ipa) || self.is_held(ipa) {
            return Ok(());
        }
        if !if_committed && self.in_flight(ipa) {
            // The copy is up to date; only an abort would need the bit, and it is there.
            return Ok(());
        }
        Err(format!(
            "{ipa:#x} was written (at {}) after the host had it ({:?}, now {:?}), and nothing knows",
            page.content, page.committed, page.copied
        ))
    }

    fn slot_of(&self, ipa: u64) -> Option<&Slot> {
        let holds = |slot: &&Slot| (slot.start..slot.end()).contains(&ipa);
        self.slots.values().find(holds)
    }

    fn in_flight(&self, ipa: u64) -> bool {
        self.slot_of(ipa).is_some_and(|slot| {
            let page = (ipa - slot.start) / PAGE_SIZE;
            let word = slot.in_flight.get(&((page / 64) as usize));
            word.is_some_and(|word| word >> (page % 64) & 1 == 1)
        })
    }

    fn leaf_or_live(&self, machine: &Machine, guest: Guest, ipa: u64) -> bool {
        let live = self.slot_of(ipa).is_some_and(|slot| {
            let page = (ipa - slot.start) / PAGE_SIZE;
            let word = slot.dirty.live().get((page / 64) as usize);
            word.is_some_and(|word| {
                crate::sync::raw(word).load(Ordering::SeqCst) >> (page % 64) & 1 == 1
            })
        });
        if live {
            return true;
        }
        let (entry, level) = machine.walk(guest, ipa);
        let pte = crate::sync::raw(entry).load(Ordering::SeqCst);
        // Of a block the bit is another page's, perhaps.
        let by_itself = is_dirty_leaf(pte, level) && !(level == 3 && needs_a_bit(pte, level));
        by_itself || has_late_update(machine, guest, ipa)
    }

    fn is_held(&self, ipa: u64) -> bool {
        let mut held = self.held.values().flatten();
        held.any(|(start, end)| (*start..*end).contains(&ipa))
    }
}

fn has_late_update(machine: &Machine, guest: Guest, ipa: u64) -> bool {
    let (entry, _) = machine.walk(guest, ipa);
    let place = machine.locate(std::ptr::from_ref(entry).addr());
    place.is_some_and(|place| machine.has_late_update(place))
}
