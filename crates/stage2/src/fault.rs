//! Stage-2 faults: the path to keep short.
//!
//! Runs on any number of CPUs at once, with nothing locked but this CPU's own copy of the layout, and
//! allocates nothing but table pages.
//! Under write protection the order is: compare-and-swap WC to WD, then set the bit. So a WD page has
//! its bit set or a CPU on its way to set it, and a harvest in between takes it one round later. A block
//! has the bit of the page that was written first; it stands for the block.
//! Setting the bit first was rejected: a harvest between the two would take the bit, find the leaf
//! clean, and the leaf would then become WD with no bit.

use crate::hardware::Hardware;
use crate::map::{Mapped, Touch};
use crate::pte::{Kind, Permission, Pte};
use crate::slot::{Layout, LeavesOf, Slot};
use crate::stage2::Stage2;
use crate::sync::atomic::Ordering;
use crate::types::{Access, GuestVa, Ipa, Level, PAGE_SIZE};
use crate::walk::Place;

/// What the guest was doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultAccess {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Fetching an instruction.
    Execute,
}

/// What the hardware complained about (ESR_EL2.xFSC without the level).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// No valid descriptor.
    Translation,
    /// A descriptor that does not allow the access.
    Permission,
    /// A descriptor without the access flag.
    AccessFlag,
}

/// One stage-2 abort.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The address: HPFAR_EL2, with the page offset from FAR_EL2 if it is known.
    pub ipa: Ipa,
    /// What the guest was doing. A permission fault of a stage-1 walk is a write: the walker can
    /// always read RAM, so it was after a descriptor's flags.
    pub access: FaultAccess,
    /// The complaint.
    pub kind: FaultKind,
    /// FAR_EL2, when it is valid and the abort is not on a stage-1 walk: then it is the address whose
    /// TLB entry is stale.
    pub va: Option<GuestVa>,
}

/// What to do about a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Handled: return to the guest.
    Resume,
    /// Handled, and a leaf of this level that the log follows became dirty by it.
    Dirtied(Level),
    /// Somebody is changing this very entry: return to the guest, which faults again or does not.
    Retry,
    /// No memory slot there: a device, or an abort for the guest.
    NotMemory,
    /// A write to a read-only slot.
    ReadOnly,
    /// No memory for a table: stop that VM, or free some and return to the guest.
    OutOfTables,
}

/// How often a compare-and-swap on one leaf is tried. The hardware changes a leaf once in a round and
/// other CPUs agree with us about it, so this is never reached but bounds the loop.
const ATTEMPTS: usize = 8;

impl<H: Hardware> Stage2<H> {
    /// Handles a stage-2 abort of the VM, on the CPU that took it, with the VM's VTTBR_EL2 current.
    pub fn handle_fault(&self, fault: Fault) -> Outcome {
        let layout = self.layout();
        let Some(slot) = layout.slot_at(fault.ipa) else {
            return Outcome::NotMemory;
        };
        let write = fault.access == FaultAccess::Write;
        match slot.access {
            Access::ReadWrite => {}
            Access::ReadOnly if !write => {}
            Access::ReadOnly => return Outcome::ReadOnly,
            Access::None => return Outcome::NotMemory,
        }
        let place = self.descend(fault.ipa.raw());
        match place.kind {
            Kind::Leaf => self.fault_on_leaf(&layout, slot, &fault, &place),
            Kind::Empty => {
                self.counters
                    .translation_faults
                    .fetch_add(1, Ordering::Relaxed);
                let touch = if write { Touch::Write } else { Touch::Other };
                match self.map(&layout, slot, fault.ipa.raw(), touch) {
                    Mapped::Leaf { level, .. } if write && layout.tracking(slot).is_some() => {
                        Outcome::Dirtied(level)
                    }
                    Mapped::Leaf { .. } => Outcome::Resume,
                    Mapped::Raced => Outcome::Retry,
                    Mapped::NoTables => Outcome::OutOfTables,
                }
            }
            Kind::Busy | Kind::Table(_) => Outcome::Retry,
        }
    }

    pub(crate) fn fault_on_leaf(
        &self,
        layout: &Layout,
        slot: &Slot,
        fault: &Fault,
        place: &Place<'_>,
    ) -> Outcome {
        let entry = place.entry();
        let page = fault.ipa.raw() & !(PAGE_SIZE - 1);
        let write = fault.access == FaultAccess::Write;
        let mut pte = place.pte;
        for _ in 0..ATTEMPTS {
            if pte.kind(place.level) != Kind::Leaf {
                return Outcome::Retry;
            }
            let wanted = if write && pte.is_clean() {
                // With no log any more this is what a stop has not come to yet.
                let state = match layout.tracking(slot) {
                    Some(_) => Permission::Dirty(pte.engine()),
                    None => Permission::Untracked,
                };
                pte.with(state).accessed()
            } else {
                pte.accessed()
            };
            if wanted == pte {
                return self.spurious(slot, fault, page, place.level, pte);
            }
            match entry.compare_exchange(pte.0, wanted.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    let dirtied = wanted.is_dirty() && pte.is_clean();
                    if dirtied {
                        slot.dirty.mark(slot.page(page));
                    }
                    if fault.kind == FaultKind::Permission {
                        self.counters.write_faults.fetch_add(1, Ordering::Relaxed);
                        self.tlb().relaxed(page, place.level, fault.va);
                    }
                    return if dirtied {
                        Outcome::Dirtied(place.level)
                    } else {
                        Outcome::Resume
                    };
                }
                Err(now) => pte = Pte(now),
            }
        }
        Outcome::Retry
    }

    /// The leaf allows the access by now: another CPU was faster, or this one's TLB is stale.
    #[cold]
    fn spurious(&self, slot: &Slot, fault: &Fault, page: u64, level: Level, pte: Pte) -> Outcome {
        if fault.access == FaultAccess::Write && !pte.is_writable() {
            // A slot that is becoming writable still has a read-only leaf here, about to go.
            return match slot.leaves {
                LeavesOf::Older => Outcome::Retry,
                LeavesOf::ItsAccess => Outcome::ReadOnly,
            };
        }
        self.counters
            .spurious_faults
            .fetch_add(1, Ordering::Relaxed);
        // A faulting entry may be cached when the fault is of permission, and only then. The guest's
        // address alone was not enough the first time round, so everything combined goes.
        if fault.kind == FaultKind::Permission {
            self.tlb().relaxed(page, level, None);
        }
        Outcome::Resume
    }
}
