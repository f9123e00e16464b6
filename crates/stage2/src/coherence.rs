//! A guest's memory as EL2 sees it.
//!
//! EL2 maps it Normal Write-Back. Without FEAT_S2FWB a guest may store past the caches, with its MMU off or through
//! memory that it maps Non-cacheable or Device, while EL2's loads are served by a line from before; a line that was
//! only speculated is enough (Arm ARM B2.16, mismatched attributes). The page would be reported and the host be given
//! its old bytes. So lines go to memory and out of the caches before EL2 looks. Invalidating alone would lose what the
//! guest stored through the caches. A line that comes back meanwhile holds what memory holds by then.
//!
//! It is the same before EL2 changes part of a line, which else becomes dirty with old bytes beside the new ones; and
//! after it, for a guest whose caches are off.

use crate::error::Error;
use crate::hardware::{Hardware, Support};
use crate::stage2::Stage2;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::types::Ipa;

impl<H: Hardware> Stage2<H> {
    /// Returns words of guest memory with what the guest stored by now, to be loaded.
    ///
    /// Costs one cache operation a line where there is no FEAT_S2FWB: as many words as are wanted, not more.
    pub fn coherent<'a>(&self, words: &'a [AtomicU64]) -> &'a [AtomicU64] {
        self.to_memory(words);
        words
    }

    /// Stores `bytes` at `ipa`, as far as `words` go, and says so to the dirty log. Returns how many it stored: at least
    /// one, if there are bytes and words. `words` are the memory behind `ipa`, from the word around it on.
    ///
    /// # Errors
    ///
    /// As [`mark_dirty`](Self::mark_dirty), after they are stored.
    pub fn store(&self, ipa: Ipa, words: &[AtomicU64], bytes: &[u8]) -> Result<usize, Error> {
        let inside = (ipa.raw() % 8) as usize;
        let most = (words.len() * 8).saturating_sub(inside);
        let bytes = bytes.get(..most).unwrap_or(bytes);
        if bytes.is_empty() {
            return Ok(0);
        }
        let touched = (inside + bytes.len()).div_ceil(8);
        let words = words.get(..touched).unwrap_or(words);
        self.coherent(words);
        let first = Ipa::new(ipa.raw() - inside as u64);
        self.overwrite(first, words, || put(words, inside, bytes))?;
        Ok(bytes.len())
    }

    /// Lets `fill` store to all of `words`, which are whole lines, or coherent, and the memory behind `ipa`; and says so
    /// to the dirty log.
    ///
    /// # Errors
    ///
    /// As [`mark_dirty`](Self::mark_dirty), after `fill`.
    pub fn overwrite(
        &self,
        ipa: Ipa,
        words: &[AtomicU64],
        fill: impl FnOnce(),
    ) -> Result<(), Error> {
        fill();
        self.to_memory(words);
        self.mark_dirty(ipa, size_of_val(words) as u64)
    }

    fn to_memory(&self, words: &[AtomicU64]) {
        if self.features().fwb == Support::Absent && !words.is_empty() {
            self.hardware().clean_invalidate(words);
        }
    }
}

/// Puts `bytes` into words from byte `inside` of the first one on; what is beside them stays.
fn put(words: &[AtomicU64], inside: usize, bytes: &[u8]) {
    let mut words = words.iter();
    let (head, rest) = bytes.split_at(bytes.len().min((8 - inside) % 8));
    if !head.is_empty() {
        put_part(words.next(), inside, head);
    }
    let (eights, tail) = rest.as_chunks::<8>();
    for (&eight, word) in eights.iter().zip(&mut words) {
        word.store(u64::from_le_bytes(eight), Ordering::Relaxed);
    }
    if !tail.is_empty() {
        put_part(words.next(), 0, tail);
    }
}

/// Puts `bytes` into a word from its byte `from` on.
fn put_part(word: Option<&AtomicU64>, from: usize, bytes: &[u8]) {
    let Some(word) = word else { return };
    let mut whole = word.load(Ordering::Relaxed).to_le_bytes();
    for (to, &byte) in whole.iter_mut().skip(from).zip(bytes) {
        *to = byte;
    }
    word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
}
