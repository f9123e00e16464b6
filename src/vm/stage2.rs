//! What `crates/stage2` needs of the hardware, and what it is told about it.

use crate::arch::features::{DirtyState, Features};
use crate::arch::{barrier, cache, cpu, tlb};
use crate::mm::frames::{self, Run};
use crate::platform::options::DirtyEngine;
use core::sync::atomic::AtomicU64;
use spin::Once;
use tidemark_stage2::{
    self as stage2, GuestVa, Hardware, IpaOperand, Leaves, Pa, RangeOperand, Support, Table,
    TableAt, TablePages, Tlbi, VmidWidth, Vmids,
};

/// The machine, as one VM's stage 2 uses it.
#[derive(Debug, Clone, Copy)]
pub struct Hw {
    /// Whose tables it allocates.
    pub vm: u16,
}

impl Hardware for Hw {
    #[inline]
    fn cpu(&self) -> usize {
        cpu::index()
    }

    fn cpus(&self) -> usize {
        cpu::count()
    }

    #[inline]
    fn table(&self, at: TableAt<Self>) -> &Table {
        // SAFETY: a `TableAt<Hw>` is of what an `Hw` allocated, below: mapped, inner-shareable write-back memory,
        // aligned to 4 KiB, that nothing else uses until `free_tables`; a Table is 512
        // atomics, for which any content is valid, and the hardware's walks and updates
        // are single-copy atomic accesses to them.
        unsafe { &*(at.pa().raw() as *const Table) }
    }

    fn alloc_tables(&self, count: usize) -> Option<Pa> {
        let run = Run::take(count, frames::table_of(self.vm))?;
        run.zero(0, count);
        Some(Pa::new(run.leak()))
    }

    fn alloc_unwritten(&self) -> Option<Pa> {
        let run = Run::take(1, frames::table_of(self.vm))?;
        Some(Pa::new(run.leak()))
    }

    fn free_tables(&self, pages: TablePages<Self>) {
        // SAFETY: a `TablePages<Hw>` is a run that an `Hw` took and leaked, above, and is the only one of it.
        drop(unsafe { Run::from_leaked(pages.first().raw(), pages.count()) });
    }

    #[inline]
    fn prefetch(&self, entries: &[AtomicU64; 64]) {
        cache::prefetch(entries);
    }

    #[inline]
    fn dsb_ishst(&self) {
        barrier::dsb_ishst();
    }

    #[inline]
    fn dsb_ish(&self) {
        barrier::dsb_ish();
    }

    #[inline]
    fn dsb_nsh(&self) {
        barrier::dsb_nsh();
    }

    #[inline]
    fn isb(&self) {
        barrier::isb();
    }

    fn clean_invalidate(&self, words: &[AtomicU64]) {
        cache::clean_invalidate(words.as_ptr() as usize, size_of_val(words));
    }

    #[inline]
    fn select(&self, vttbr: u64) -> u64 {
        tlb::select(vttbr)
    }

    #[inline]
    fn restore(&self, previous: u64) {
        tlb::restore(previous);
    }

    fn tlbi_ipas2e1is(&self, operand: IpaOperand) {
        tlb::ipas2e1is(operand.bits());
    }

    fn tlbi_ripas2e1is(&self, operand: RangeOperand) {
        tlb::ripas2e1is(operand.bits());
    }

    fn tlbi_vmalle1is(&self) {
        tlb::vmalle1is();
    }

    fn tlbi_vmalls12e1is(&self) {
        tlb::vmalls12e1is();
    }

    fn tlbi_vale2is(&self) {
        tlb::vale2is(0);
    }

    fn tlbi_ipas2e1(&self, operand: IpaOperand) {
        tlb::ipas2e1(operand.bits());
    }

    #[inline]
    fn tlbi_vaae1(&self, va: GuestVa) {
        tlb::vaae1(va.operand());
    }

    fn tlbi_vmalle1(&self) {
        tlb::vmalle1();
    }
}

static VMIDS: Once<Result<Vmids, stage2::Error>> = Once::new();

/// The numbers that guests' translations are tagged with.
///
/// # Errors
///
/// Too few of them for the CPUs.
pub fn vmids() -> Result<&'static Vmids, stage2::Error> {
    match VMIDS.get() {
        Some(vmids) => vmids.as_ref().map_err(|error| *error),
        None => Err(stage2::Error::OutOfMemory),
    }
}

static FEATURES: Once<(stage2::Features, u8)> = Once::new();

/// The widest address space that guests get: enough for 1 TiB, and one lookup less than 48
/// bits would need.
const IPA_BITS: u8 = 40;

/// Tells stage 2 what the CPUs have in common, and the largest VMID to use if not all are to be. Once,
/// when all CPUs have come up and before the first VM.
///
/// The dirty state of a part that is not known is used only if `told` says so, by name.
pub fn init(cpus: &Features, told: DirtyEngine, leaves: Leaves, last_vmid: Option<u16>) {
    let support = |present: bool| {
        if present {
            Support::Present
        } else {
            Support::Absent
        }
    };
    FEATURES.call_once(|| {
        let features = stage2::Features {
            dbm: support(match cpus.dirty_state() {
                DirtyState::Sound => true,
                DirtyState::Unknown => told == DirtyEngine::Dbm,
                DirtyState::Absent | DirtyState::Broken(_) => false,
            }),
            bbm2: support(cpus.bbm >= 2),
            fwb: support(cpus.fwb >= 1),
            tlb_range: support(cpus.tlb >= 2),
            ttl: support(cpus.ttl >= 1),
            tlbi: if cpus.errata.broadcast_tlbi.is_sound() {
                Tlbi::Once
            } else {
                Tlbi::Twice
            },
            leaves,
            vmid: if cpus.vmid_bits == 16 {
                VmidWidth::Sixteen
            } else {
                VmidWidth::Eight
            },
            pa_bits: cpus.pa_bits,
        };
        (features, cpus.pa_bits.min(IPA_BITS))
    });
    let width = features().0.vmid;
    let last = u64::from(last_vmid.unwrap_or(u16::MAX));
    VMIDS.call_once(|| Vmids::with_numbers(width, last, cpu::count()));
}

/// What the CPUs have in common, and the width of guests' address spaces.
pub fn features() -> (stage2::Features, u8) {
    FEATURES
        .get()
        .copied()
        .unwrap_or((stage2::Features::BASELINE, 32))
}

/// VTCR_EL2 for every CPU: all guests' spaces have one shape.
///
/// # Errors
///
/// The CPUs' features do not go together.
pub fn vtcr() -> Result<u64, stage2::Error> {
    let (features, ipa_bits) = features();
    stage2::vtcr(ipa_bits, &features)
}
