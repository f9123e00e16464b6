//! A guest's memory and the caches before it.
//!
//! The worst case, as with TLBs: the caches hold every line from the beginning on and give none up by themselves.

use super::{Event, Machine, lock};
use crate::hardware::Support;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::raw;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;
use std::vec::Vec;

/// Words in a line.
const LINE: usize = 8;

/// How a guest accesses its memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Caching {
    /// Through the caches.
    WriteBack,
    /// Past them: its MMU is off, or it maps the page so.
    Bypass,
}

/// The memory of one guest.
pub struct Ram {
    memory: Vec<AtomicU64>,
    /// What the caches hold: all that EL2 and a guest with caches on ever see.
    cached: Vec<AtomicU64>,
    /// The same as it came from memory: where it differs, EL2 has stored.
    filled: Vec<AtomicU64>,
    /// Lines with what the guest stored and memory does not have yet.
    dirty: Mutex<BTreeSet<usize>>,
}

impl Ram {
    fn new(words: usize) -> Self {
        let zeroes = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Self {
            memory: zeroes(),
            cached: zeroes(),
            filled: zeroes(),
            dirty: Mutex::default(),
        }
    }

    /// The words of a line.
    fn line(&self, line: usize) -> Range<usize> {
        line * LINE..self.cached.len().min((line + 1) * LINE)
    }

    /// `DC CIVAC`.
    fn clean_invalidate(&self, line: usize) {
        let by_el2 = |word| value(&self.cached[word]) != value(&self.filled[word]);
        if lock(&self.dirty).remove(&line) || self.line(line).any(by_el2) {
            for word in self.line(line) {
                raw(&self.memory[word]).store(value(&self.cached[word]), Ordering::SeqCst);
            }
        }
        for word in self.line(line) {
            for copy in [&self.cached, &self.filled] {
                raw(&copy[word]).store(value(&self.memory[word]), Ordering::SeqCst);
            }
        }
    }
}

fn value(word: &AtomicU64) -> u64 {
    raw(word).load(Ordering::SeqCst)
}

impl Machine {
    /// Gives the machine memory for a guest. Said once.
    pub fn add_ram(&self, words: usize) {
        let first = self.ram.set(Ram::new(words));
        assert!(first.is_ok(), "the machine has its memory already");
    }

    fn ram(&self) -> &Ram {
        self.ram.get().expect("a machine with memory for a guest")
    }

    /// Returns it as EL2 has it mapped.
    pub fn words(&self) -> &[AtomicU64] {
        &self.ram().cached
    }

    /// FEAT_S2FWB leaves the guest no choice.
    fn effective(&self, caching: Caching) -> Caching {
        let features = self.features.get();
        match features.is_some_and(|features| features.fwb == Support::Present) {
            true => Caching::WriteBack,
            false => caching,
        }
    }

    /// A store by the guest.
    pub fn store(&self, word: usize, value: u64, caching: Caching) {
        let ram = self.ram();
        match self.effective(caching) {
            Caching::Bypass => ram.memory[word].store(value, Ordering::SeqCst),
            Caching::WriteBack => {
                ram.cached[word].store(value, Ordering::SeqCst);
                lock(&ram.dirty).insert(word / LINE);
            }
        }
    }

    /// A load by the guest.
    pub fn load(&self, word: usize, caching: Caching) -> u64 {
        let ram = self.ram();
        let from = match self.effective(caching) {
            Caching::Bypass => &ram.memory,
            Caching::WriteBack => &ram.cached,
        };
        from[word].load(Ordering::SeqCst)
    }

    pub(super) fn maintain(&self, words: &[AtomicU64]) {
        self.note(Event::CleanInvalidate(words.len()));
        let Some(ram) = self.ram.get() else { return };
        let at = |word: &AtomicU64| std::ptr::from_ref(word).addr();
        let (Some(base), Some(first)) = (ram.cached.first(), words.first()) else {
            return;
        };
        let first = (at(first) - at(base)) / size_of::<AtomicU64>();
        for line in first / LINE..=(first + words.len() - 1) / LINE {
            ram.clean_invalidate(line);
        }
    }
}
