//! A CPU's view of stage 2: its TLB, its walker and its hardware update of dirty state.

use super::Machine;
use crate::fault::{Fault, FaultAccess, FaultKind};
use crate::hardware::Hardware;
use crate::types::{GuestVa, Ipa, Pa};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a guest runs with: the two registers.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// VTCR_EL2.
    pub vtcr: u64,
    /// VTTBR_EL2.
    pub vttbr: u64,
}

/// A stage-2 abort as the simulated CPU takes it.
pub type Abort = Fault;

/// An invalidation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Ipa { ipa: u64, ttl: u8, broadcast: bool },
    Range { start: u64, end: u64, ttl: u8 },
    Va { va: u64 },
    Combined { broadcast: bool },
    Everything,
}

impl Op {
    pub(super) fn is_broadcast(&self) -> bool {
        match self {
            Op::Ipa { broadcast, .. } | Op::Combined { broadcast } => *broadcast,
            Op::Range { .. } | Op::Everything => true,
            Op::Va { .. } => false,
        }
    }
}

/// A cached leaf.
#[derive(Clone, Copy, Debug)]
struct Cached {
    pte: u64,
    level: u32,
}

/// A TLB that never evicts.
#[derive(Default)]
pub(super) struct Pe {
    /// By level and the leaf's number at that level.
    stage2: HashMap<(u32, u64), Cached>,
    /// By the page of the guest's address, which in the fake is the same number as the IPA.
    combined: HashMap<u64, Cached>,
}

impl Pe {
    /// Looks an address up. Where there are several entries the largest counts: it is the stale one.
    fn lookup(&self, ipa: u64) -> Option<Cached> {
        let of = |level| self.stage2.get(&(level, ipa >> shift(level)));
        let combined = self.combined.get(&(ipa >> 12));
        combined
            .or_else(|| of(1))
            .or_else(|| of(2))
            .or_else(|| of(3))
            .copied()
    }

    fn fill(&mut self, ipa: u64, cached: Cached) {
        self.stage2
            .insert((cached.level, ipa >> shift(cached.level)), cached);
        self.combined.insert(ipa >> 12, cached);
    }

    fn forget(&mut self, ipa: u64, level: u32) {
        self.stage2.remove(&(level, ipa >> shift(level)));
        self.combined.remove(&(ipa >> 12));
    }

    pub(super) fn invalidate<'a>(&mut self, ops: impl Iterator<Item = &'a Op> + Clone) {
        // Between invalidations that one DSB completes there is no order. As bad as it gets is that
        // combined entries went first and were made again from the stage-2 ones: that is, stayed.
        let others = ops
            .clone()
            .any(|op| matches!(op, Op::Ipa { .. } | Op::Range { .. }));
        for op in ops {
            match *op {
                Op::Combined { .. } if others => {}
                Op::Combined { .. } => self.combined.clear(),
                Op::Everything => {
                    self.stage2.clear();
                    self.combined.clear();
                }
                Op::Va { va } => {
                    self.combined.remove(&(va >> 12));
                }
                Op::Ipa { ipa, ttl, .. } => {
                    for level in (1..=3).filter(|level| hint_fits(ttl, *level)) {
                        self.stage2.remove(&(level, ipa >> shift(level)));
                    }
                }
                Op::Range { start, end, ttl } => {
                    let ttl = if ttl == 0 { 0 } else { 4 | ttl };
                    self.stage2.retain(|(level, number), _| {
                        let (from, to) = (number << shift(*level), (number + 1) << shift(*level));
                        !(from < end && to > start && hint_fits(ttl, *level))
                    });
                }
            }
        }
    }
}

fn hint_fits(ttl: u8, level: u32) -> bool {
    ttl == 0 || u32::from(ttl) == 4 | level
}

fn shift(level: u32) -> u32 {
    12 + 9 * (3 - level)
}

const VALID: u64 = 1;
const WRITE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 10;
const DBM: u64 = 1 << 51;

impl Machine {
    /// Lets CPU `pe` access `ipa` as the guest would, and calls `then` with the machine address while
    /// the access is going on: no invalidation completes before it returns.
    ///
    /// # Errors
    ///
    /// The abort EL2 gets instead.
    pub fn access<R>(
        &self,
        pe: usize,
        guest: Guest,
        ipa: u64,
        access: FaultAccess,
        then: impl FnOnce(Pa) -> R,
    ) -> Result<R, Abort> {
        let mut pe = super::lock(&self.pes[pe]);
        let abort = |kind| Fault {
            ipa: Ipa::new(ipa),
            access,
            kind,
            va: Some(GuestVa::new(ipa)),
        };
        loop {
            let mut cached = match pe.lookup(ipa) {
                Some(cached) => cached,
                None => {
                    let (entry, level) = self.walk(guest, ipa);
                    let pte = entry.load(Ordering::SeqCst);
                    if pte & VALID == 0 {
                        return Err(abort(FaultKind::Translation));
                    }
                    if pte & ACCESSED == 0 {
                        return Err(abort(FaultKind::AccessFlag));
                    }
                    let cached = Cached { pte, level };
                    pe.fill(ipa, cached);
                    cached
                }
            };
            // A hit makes a combined entry and never a stage-2 one: what an invalidation by IPA took
            // does not come back from a combined entry it left.
            pe.combined.insert(ipa >> 12, cached);
            if access == FaultAccess::Write && cached.pte & WRITE == 0 {
                let hardware_dirty = guest.vtcr >> 21 & 3 == 3;
                if cached.pte & DBM == 0 || !hardware_dirty {
                    return Err(abort(FaultKind::Permission));
                }
                // The update is a compare-and-swap on what memory holds now; if that is not what was
                // cached, the walk begins anew (R_SGJBL, I_YZSVV).
                let (entry, level) = self.walk(guest, ipa);
                let dirty = cached.pte | WRITE;
                let same = level == cached.level
                    && entry
                        .compare_exchange(cached.pte, dirty, Ordering::SeqCst, Ordering::SeqCst)
                        .is_ok();
                if !same {
                    pe.forget(ipa, cached.level);
                    continue;
                }
                cached = Cached { pte: dirty, level };
                pe.fill(ipa, cached);
            }
            let mask = (1u64 << shift(cached.level)) - 1;
            let base = cached.pte & 0x0000_ffff_ffff_f000 & !mask;
            return Ok(then(Pa::new(base | (ipa & mask & !0xfff))));
        }
    }

    /// Walks as the hardware does. Returns the descriptor that decides and its level.
    pub fn walk(&self, guest: Guest, ipa: u64) -> (&AtomicU64, u32) {
        let bits = 64 - (guest.vtcr & 0x3f);
        let start: u32 = match guest.vtcr >> 6 & 3 {
            0 => 2,
            1 => 1,
            2 => 0,
            other => panic!("SL0 {other} is reserved"),
        };
        let resolved = u64::from(shift(start)) + 9;
        assert!(bits <= resolved + 4, "more than 16 concatenated tables");
        assert!(ipa >> bits == 0, "{ipa:#x} is outside the IPA space");
        let mut table = guest.vttbr & 0x0000_ffff_ffff_fffe;
        table += (ipa >> resolved) * 4096;
        let mut level = start;
        loop {
            let entry = &self.table(Pa::new(table)).entries()[(ipa >> shift(level) & 511) as usize];
            let pte = entry.load(Ordering::SeqCst);
            if level < 3 && pte & 3 == 3 {
                table = pte & 0x0000_ffff_ffff_f000;
                level += 1;
                continue;
            }
            return (entry, level);
        }
    }
}
