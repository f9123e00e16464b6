//! A guest's memory as EL2 sees it.
//!
//! EL2 maps it Normal Write-Back. Without FEAT_S2FWB a guest may store past the caches, with its MMU off or through
//! memory that it maps Non-cacheable or Device, while EL2's loads are served by a line from before; a line that was
//! only speculated is enough (Arm ARM B2.16, mismatched attributes). The page would be reported and the host be given
//! its old bytes. So lines go to memory and out of the caches before EL2 looks. Invalidating alone would lose what the
//! guest stored through the caches. A line that comes back meanwhile holds what memory holds by then.
//!
//! It is the same before EL2 changes part of a line, which else becomes dirty with old bytes beside the new ones.

use crate::hardware::{Hardware, Support};
use crate::stage2::Stage2;
use crate::sync::atomic::AtomicU64;

impl<H: Hardware> Stage2<H> {
    /// Returns words of guest memory with what the guest stored by now, to be loaded or changed in part.
    ///
    /// Costs one cache operation a line where there is no FEAT_S2FWB: as many words as are wanted, not more.
    pub fn coherent<'a>(&self, words: &'a [AtomicU64]) -> &'a [AtomicU64] {
        self.to_memory(words);
        words
    }

    /// Sees to it that a guest whose caches are off finds what EL2 stored.
    pub fn stored(&self, words: &[AtomicU64]) {
        self.to_memory(words);
    }

    fn to_memory(&self, words: &[AtomicU64]) {
        if self.features().fwb == Support::Absent && !words.is_empty() {
            self.hardware().clean_invalidate(words);
        }
    }
}
