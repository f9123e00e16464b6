//! A CPU's view of stage 2: its TLB, its walker and its hardware updates of descriptors.
//!
//! Arm ARM D8.2 (walks), D8.5.2, D8.5.3 (updates of AF and of the dirty state), D8.14 (TLBs).

use super::tlb::{ACCESSED, DBM, Leaf, Tlb, VALID, WRITE, shift};
use super::{Entry, Late, Machine, Whims, lock};
use crate::fault::{Fault, FaultAccess, FaultKind};
use crate::sync::atomic::AtomicU64;
use crate::types::{GuestVa, Ipa, Pa};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::vec::Vec;

/// What a guest runs with: the two registers.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// VTCR_EL2.
    pub vtcr: u64,
    /// VTTBR_EL2.
    pub vttbr: u64,
}

impl Guest {
    fn vmid(&self) -> u16 {
        (self.vttbr >> 48) as u16
    }

    fn ipa_bits(&self) -> u64 {
        64 - (self.vtcr & 0x3f)
    }

    /// VTCR_EL2.HA: the hardware sets the access flag.
    fn ha(&self) -> bool {
        self.vtcr >> 21 & 1 == 1
    }

    /// VTCR_EL2.HD, which does nothing without HA.
    fn hd(&self) -> bool {
        self.vtcr >> 21 & 3 == 3
    }

    /// Are the tables Inner- or Outer-Shareable and Write-Back? Else updates need not be atomic
    /// (R_WLTNL).
    fn is_coherent(&self) -> bool {
        let write_back = |field: u64| matches!(field & 3, 0b01 | 0b11);
        write_back(self.vtcr >> 8) && write_back(self.vtcr >> 10) && self.vtcr >> 13 & 1 == 1
    }
}

/// A stage-2 abort as the simulated CPU takes it.
pub type Abort = Fault;

/// A simulated CPU.
pub(super) struct Pe {
    pub(super) number: usize,
    pub(super) tlb: Tlb,
    /// By the CPU whose invalidation dropped them: leaves through which stores are under way that its DSB
    /// did not wait for (CVE-2025-10263).
    pub(super) in_flight: BTreeMap<usize, Tlb>,
}

impl Pe {
    /// Returns the entry that it uses for the address, if it has any.
    fn cached(
        &self,
        vmid: u16,
        va: Option<u64>,
        ipa: u64,
        whims: Option<&mut Whims>,
    ) -> Option<Leaf> {
        let mut found = self.tlb.lookup(vmid, va, ipa);
        let Some(whims) = whims else {
            return found.next();
        };
        let found: Vec<Leaf> = found.collect();
        (!found.is_empty()).then(|| found[whims.choose(found.len())])
    }

    /// Returns the leaf by which a store is still under way that was begun before the leaf was dropped.
    fn in_flight(&self, vmid: u16, va: Option<u64>, ipa: u64) -> Option<Leaf> {
        let mut dropped = self.in_flight.values();
        dropped.find_map(|tlb| tlb.lookup(vmid, va, ipa).next())
    }
}

/// Where a walk ended.
struct Found<'a> {
    entry: &'a AtomicU64,
    place: Entry,
    level: u32,
    pte: u64,
}

/// An access to translate.
#[derive(Clone, Copy)]
struct Request {
    guest: Guest,
    ipa: u64,
    /// `None` for the table walk of stage 1.
    va: Option<u64>,
    access: FaultAccess,
}

/// A guest's own tables: what stage 1 makes of an address, and in which page the descriptor lies.
/// The flags of the descriptor are updated by the hardware, which writes to that page (R_BDJJL).
#[derive(Default)]
pub struct Stage1 {
    pages: Mutex<BTreeMap<u64, Mapping>>,
}

#[derive(Clone, Copy)]
struct Mapping {
    ipa: u64,
    table: u64,
    accessed: bool,
    dirty: bool,
}

impl Stage1 {
    /// Maps the page of `va` to that of `ipa` by a descriptor in the guest's page `table`, neither
    /// accessed nor dirty yet.
    pub fn map(&self, va: u64, ipa: u64, table: u64) {
        let mapping = Mapping {
            ipa: ipa & !0xfff,
            table: table & !0xfff,
            accessed: false,
            dirty: false,
        };
        lock(&self.pages).insert(va >> 12, mapping);
    }

    fn get(&self, va: u64) -> Mapping {
        let mapping = lock(&self.pages).get(&(va >> 12)).copied();
        mapping.expect("a guest address its stage 1 maps")
    }

    fn set(&self, va: u64, change: impl FnOnce(&mut Mapping)) {
        if let Some(mapping) = lock(&self.pages).get_mut(&(va >> 12)) {
            change(mapping);
        }
    }
}

impl Machine {
    /// Lets CPU `pe` access `ipa` as the guest would, with stage 1 off, and calls `then` with the
    /// machine address while the access is going on: no invalidation completes before it returns.
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
        let request = Request {
            guest,
            ipa,
            va: Some(ipa),
            access,
        };
        let mut pe = lock(&self.cpus[pe].pe);
        self.whimsical(&mut pe, request);
        let leaf = self.translate(&mut pe, request)?;
        Ok(then(Pa::new(leaf.output(ipa))))
    }

    /// Lets CPU `pe` access the guest's address `va` through `stage1`, and calls `wrote` with every
    /// machine page that is written: the page itself, and those of descriptors whose flags change.
    ///
    /// # Errors
    ///
    /// The abort EL2 gets instead.
    pub fn access_va(
        &self,
        pe: usize,
        guest: Guest,
        stage1: &Stage1,
        va: u64,
        access: FaultAccess,
        mut wrote: impl FnMut(Pa),
    ) -> Result<(), Abort> {
        let mut pe = lock(&self.cpus[pe].pe);
        let write = access == FaultAccess::Write;
        let mapping = stage1.get(va);
        let of_the_table = |access| Request {
            guest,
            ipa: mapping.table,
            va: None,
            access,
        };
        let cached = pe.tlb.stage1(guest.vmid(), va).is_some();
        if !cached {
            self.translate(&mut pe, of_the_table(FaultAccess::Read))?;
        }
        if !mapping.accessed || write && !mapping.dirty {
            let leaf = self.translate(&mut pe, of_the_table(FaultAccess::Write))?;
            wrote(Pa::new(leaf.output(mapping.table)));
            stage1.set(va, |mapping| {
                mapping.accessed = true;
                mapping.dirty |= write;
            });
        }
        pe.tlb.insert_stage1(guest.vmid(), va, mapping.ipa);
        let request = Request {
            guest,
            ipa: mapping.ipa | va & 0xfff,
            va: Some(va),
            access,
        };
        let leaf = self.translate(&mut pe, request)?;
        if write {
            wrote(Pa::new(leaf.output(mapping.ipa)));
        }
        Ok(())
    }

    /// What a CPU does besides what it is asked for.
    fn whimsical(&self, pe: &mut Pe, request: Request) {
        let Some(mut whims) = self.whims() else {
            return;
        };
        let vmid = request.guest.vmid();
        if whims.update_arrives() {
            let mut late = lock(&self.late);
            if !late.is_empty() {
                let which = whims.choose(late.len());
                self.arrive(&late.swap_remove(which));
            }
        }
        if whims.evicts() {
            let which = whims.choose(3);
            if which != 0 {
                pe.tlb.evict_combined(vmid, request.va);
            }
            if which != 1 {
                pe.tlb.evict_stage2(vmid, request.ipa);
            }
        }
        let near = request.ipa ^ (whims.choose(1024) as u64) << 12;
        let ahead = whims.prefetches() && near >> request.guest.ipa_bits() == 0;
        let speculates = whims.speculates();
        drop(whims);
        let unasked = |ipa, access| Request {
            ipa,
            va: Some(ipa),
            access,
            ..request
        };
        if ahead {
            let _ = self.translate(pe, unasked(near, FaultAccess::Read));
        }
        if speculates {
            let _ = self.translate(pe, unasked(request.ipa, FaultAccess::Write));
        }
    }

    fn translate(&self, pe: &mut Pe, request: Request) -> Result<Leaf, Abort> {
        let mut whims = self.whims();
        self.translate_with(pe, request, whims.as_deref_mut())
            .map_err(|kind| Fault {
                ipa: Ipa::new(request.ipa),
                access: request.access,
                kind,
                va: request.va.map(GuestVa::new),
            })
    }

    fn translate_with(
        &self,
        pe: &mut Pe,
        request: Request,
        mut whims: Option<&mut Whims>,
    ) -> Result<Leaf, FaultKind> {
        let Request {
            guest,
            ipa,
            va,
            access,
        } = request;
        let vmid = guest.vmid();
        let write = access == FaultAccess::Write;
        if write && let Some(leaf) = pe.in_flight(vmid, va, ipa) {
            return Ok(leaf);
        }
        // After a change under it a walk begins anew; each time it finds something newer.
        for _ in 0..64 {
            self.check_conflict(pe, guest, va, ipa);
            let leaf = match pe.cached(vmid, va, ipa, whims.as_deref_mut()) {
                Some(leaf) => leaf,
                None => {
                    let found = self.walk_for(pe, guest, ipa, whims.as_deref_mut());
                    if found.pte & VALID == 0 {
                        return Err(FaultKind::Translation);
                    }
                    if found.pte & ACCESSED == 0 {
                        if !guest.ha() {
                            return Err(FaultKind::AccessFlag);
                        }
                        self.set_flags(&found, write, &guest, whims.as_deref_mut());
                        continue;
                    }
                    let leaf = Leaf {
                        pte: found.pte,
                        level: found.level,
                        hd: guest.hd(),
                    };
                    pe.tlb.insert(vmid, va, ipa, leaf);
                    leaf
                }
            };
            pe.tlb.combine(vmid, va, ipa, leaf);
            if !write || leaf.pte & WRITE != 0 {
                return Ok(leaf);
            }
            if leaf.pte & DBM == 0 || !leaf.hd {
                return Err(FaultKind::Permission);
            }
            match self.make_dirty(pe, request, leaf, whims.as_deref_mut()) {
                Some(dirty) => {
                    pe.tlb.insert(vmid, va, ipa, dirty);
                    return Ok(dirty);
                }
                None => pe.tlb.forget(vmid, va, ipa, leaf),
            }
        }
        panic!("the walk for {ipa:#x} finds something else each time");
    }

    /// Sets AF in the descriptor, and the dirty state with it if that is how this CPU does it.
    fn set_flags(&self, found: &Found<'_>, write: bool, guest: &Guest, whims: Option<&mut Whims>) {
        let once = whims.is_none_or(|whims| !whims.updates_twice());
        let mut flags = ACCESSED;
        if write && found.pte & DBM != 0 && guest.hd() && once {
            flags |= WRITE;
        }
        self.settle(found.place);
        // Whether or not memory still holds that: the walk begins anew.
        let _ = self.exchange(found.entry, found.pte, found.pte | flags);
    }

    /// Makes the leaf dirty by a compare-and-swap on what memory holds now. If that is not what was
    /// cached the answer is `None`, and the walk begins anew (R_SGJBL, I_YZSVV).
    fn make_dirty(
        &self,
        pe: &mut Pe,
        request: Request,
        leaf: Leaf,
        mut whims: Option<&mut Whims>,
    ) -> Option<Leaf> {
        let guest = request.guest;
        // By way of the pointers to tables that the CPU has cached: the table may be broken off by now.
        let mut found = self.walk_for(pe, guest, request.ipa, None);
        let mut expected = leaf.pte;
        if leaf.is_contiguous() {
            // Any member of the group may be the one that says so (R_JKCXG).
            let group = found.place.index & !15;
            let member = match &mut whims {
                Some(whims) => group + whims.choose(16),
                None => group + 15 - (found.place.index & 15),
            };
            found.place.index = member;
            found.entry = &self.tables[found.place.table].entries()[member];
            expected = crate::sync::raw(found.entry).load(SeqCst);
        }
        self.settle(found.place);
        let now = crate::sync::raw(found.entry).load(SeqCst);
        if found.level != leaf.level || now != expected || now & VALID == 0 {
            return None;
        }
        let dirty = Leaf {
            pte: leaf.pte | WRITE,
            ..leaf
        };
        let update = Late {
            place: found.place,
            expected,
            dirty: expected | WRITE,
            atomic: guest.is_coherent(),
            pe: pe.number,
        };
        if !update.atomic || whims.is_some_and(Whims::updates_late) {
            lock(&self.late).push(update);
            return Some(dirty);
        }
        self.exchange(found.entry, expected, update.dirty)
            .then_some(dirty)
    }

    fn exchange(&self, entry: &AtomicU64, from: u64, to: u64) -> bool {
        let entry = crate::sync::raw(entry);
        entry.compare_exchange(from, to, SeqCst, SeqCst).is_ok()
    }

    /// A TLB may be filled at any time, by a walk that nobody asked for. If what it would find now must
    /// not be in one TLB with what is there already, break-before-make was left out.
    fn check_conflict(&self, pe: &Pe, guest: Guest, va: Option<u64>, ipa: u64) {
        let Some(bbm2) = self.features.get().map(|features| features.bbm2) else {
            return;
        };
        let found = self.walk_to(guest, ipa);
        if found.pte & VALID == 0 {
            return;
        }
        let fresh = Leaf {
            pte: found.pte,
            level: found.level,
            hd: guest.hd(),
        };
        for cached in pe.tlb.lookup(guest.vmid(), va, ipa) {
            let fine = match bbm2.is_present() {
                true => cached.is_equivalent(&fresh, ipa),
                false => cached.agrees(&fresh, ipa),
            };
            assert!(
                fine,
                "TLB conflict at {ipa:#x}: {:#x} of level {} is cached and the tables say {:#x} of level {}",
                cached.pte, cached.level, fresh.pte, fresh.level
            );
        }
    }

    /// Walks as the hardware does. Returns the descriptor that decides and its level.
    pub fn walk(&self, guest: Guest, ipa: u64) -> (&AtomicU64, u32) {
        let found = self.walk_to(guest, ipa);
        (found.entry, found.level)
    }

    /// Walks through memory as it is.
    fn walk_to(&self, guest: Guest, ipa: u64) -> Found<'_> {
        let (table, level) = root(guest, ipa);
        self.walk_from(table, level, ipa, |_, value| value, |_, _| ())
    }

    /// Walks as `pe` sees memory, and remembers where tables are.
    fn walk_for(
        &self,
        pe: &mut Pe,
        guest: Guest,
        ipa: u64,
        mut whims: Option<&mut Whims>,
    ) -> Found<'_> {
        let vmid = guest.vmid();
        let (mut table, mut level) = root(guest, ipa);
        for deeper in (level..3).rev() {
            if let Some(below) = pe.tlb.table(vmid, deeper, ipa) {
                (table, level) = (below, deeper + 1);
                break;
            }
        }
        let number = pe.number;
        let tlb = &mut pe.tlb;
        self.walk_from(
            table,
            level,
            ipa,
            |place, value| self.seen(number, place, value, whims.as_deref_mut()),
            |level, below| tlb.insert_table(vmid, level, ipa, below),
        )
    }

    fn walk_from(
        &self,
        mut table: u64,
        mut level: u32,
        ipa: u64,
        mut see: impl FnMut(Entry, u64) -> u64,
        mut passed: impl FnMut(u32, u64),
    ) -> Found<'_> {
        loop {
            let place = Entry {
                table: self.index(Pa::new(table)),
                index: (ipa >> shift(level) & 511) as usize,
            };
            let entry = &self.table_of(Pa::new(table)).entries()[place.index];
            let value = crate::sync::raw(entry).load(SeqCst);
            let pte = see(place, value);
            if level < 3 && pte & 3 == 3 {
                table = pte & 0x0000_ffff_ffff_f000;
                passed(level, table);
                level += 1;
                continue;
            }
            return Found {
                entry,
                place,
                level,
                pte,
            };
        }
    }
}

/// Decodes VTCR_EL2 and VTTBR_EL2: the table a walk begins at, and its level.
fn root(guest: Guest, ipa: u64) -> (u64, u32) {
    let bits = guest.ipa_bits();
    let start: u32 = match guest.vtcr >> 6 & 3 {
        0 => 2,
        1 => 1,
        2 => 0,
        other => panic!("SL0 {other} is reserved"),
    };
    let resolved = u64::from(shift(start)) + 9;
    assert!(bits <= resolved + 4, "more than 16 concatenated tables");
    assert!(ipa >> bits == 0, "{ipa:#x} is outside the IPA space");
    let roots = guest.vttbr & 0x0000_ffff_ffff_fffe;
    (roots + (ipa >> resolved) * 4096, start)
}
