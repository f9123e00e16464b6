//! The machine as this crate sees it: table memory, barriers, TLB invalidation.
//!
//! Whoever implements the trait owns the unsafe parts (turning an address into a reference, executing `TLBI`), and
//! the engine above can be `forbid(unsafe_code)`. A recording implementation is in `fake`, so tests assert the exact
//! sequence of barriers and invalidations.
//!
//! # Why the trait is safe
//!
//! No address becomes a reference by somebody's saying so. [`Hardware::table`] takes a [`TableAt`] and
//! [`Hardware::free_tables`] a [`TablePages`], which only the engine makes: of what `alloc_tables` of a machine *of the
//! same type* gave it, or of a descriptor that it wrote itself to such a table. An `unsafe` block in an implementation
//! may rely on that. An `unsafe trait` was rejected: it says that an implementation can be wrong, and leaves every
//! caller free to hand it any address.
//!
//! An address is none:
//!
//! ```compile_fail,E0308
//! # use tidemark_stage2::{fake::Machine, Hardware, Pa};
//! let machine = Machine::new(1, 1);
//! let table = machine.table(Pa::new(0x4000_0000));
//! ```
//!
//! ```compile_fail,E0308
//! # use tidemark_stage2::{fake::Machine, Hardware, Pa};
//! let machine = Machine::new(1, 1);
//! machine.free_tables(Pa::new(0x4000_0000));
//! ```
//!
//! and becomes none:
//!
//! ```compile_fail,E0624
//! # use tidemark_stage2::{fake::Machine, Pa, TableAt};
//! let at = TableAt::<Machine>::new(Pa::new(0x4000_0000));
//! ```
//!
//! ```compile_fail,E0624
//! # use tidemark_stage2::{fake::Machine, Pa, TablePages};
//! let pages = TablePages::<Machine>::new(Pa::new(0x4000_0000), 1);
//! ```
//!
//! Nor does that of one machine serve for another:
//!
//! ```compile_fail,E0308
//! # use tidemark_stage2::{Hardware, TableAt};
//! fn read<A: Hardware, B: Hardware>(mine: &A, theirs: TableAt<B>) -> usize {
//!     mine.table(theirs).entries().len()
//! }
//! ```
//!
//! Pages go back once:
//!
//! ```compile_fail,E0382
//! # use tidemark_stage2::{Hardware, TablePages};
//! fn free<H: Hardware>(machine: &H, pages: TablePages<H>) {
//!     machine.free_tables(pages);
//!     machine.free_tables(pages);
//! }
//! ```

use crate::sync::atomic::AtomicU64;
use crate::tlb::{IpaOperand, RangeOperand};
use crate::types::{GuestVa, Pa, VmidWidth};
use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;

/// One translation table: 512 descriptors, each shared with the hardware walker.
///
/// All-zero memory is a valid, empty table.
#[repr(C, align(4096))]
pub struct Table(pub(crate) [AtomicU64; 512]);

impl Table {
    /// Makes an empty table.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }

    /// Returns the descriptors, for dumps and simulators of the hardware.
    pub fn entries(&self) -> &[AtomicU64; 512] {
        &self.0
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

/// Where one table is that the engine has of a machine of type `H`.
pub struct TableAt<H: ?Sized> {
    pa: Pa,
    of: PhantomData<fn() -> H>,
}

impl<H: ?Sized> TableAt<H> {
    /// For what [`Hardware::alloc_tables`] gave, or a descriptor in a table of that.
    #[inline]
    pub(crate) const fn new(pa: Pa) -> Self {
        Self {
            pa,
            of: PhantomData,
        }
    }

    /// Its address, a multiple of 4 KiB.
    #[inline]
    pub const fn pa(&self) -> Pa {
        self.pa
    }
}

impl<H: ?Sized> Clone for TableAt<H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H: ?Sized> Copy for TableAt<H> {}

impl<H: ?Sized> fmt::Debug for TableAt<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableAt({})", self.pa)
    }
}

/// Tables side by side that go back to a machine of type `H`: allocated together, and nobody has them.
pub struct TablePages<H: ?Sized> {
    first: Pa,
    count: usize,
    of: PhantomData<fn() -> H>,
}

impl<H: ?Sized> TablePages<H> {
    /// For what [`Hardware::alloc_tables`] gave, once neither software nor any TLB can reach it.
    pub(crate) const fn new(first: Pa, count: usize) -> Self {
        Self {
            first,
            count,
            of: PhantomData,
        }
    }

    /// The address of the first, aligned to the size of all.
    pub const fn first(&self) -> Pa {
        self.first
    }

    /// How many.
    pub const fn count(&self) -> usize {
        self.count
    }
}

impl<H: ?Sized> fmt::Debug for TablePages<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TablePages({}, {})", self.first, self.count)
    }
}

/// Does the machine have a feature (on every CPU, and not ruled out by an erratum)?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// Usable.
    Present,
    /// Missing or not to be trusted.
    Absent,
}

impl Support {
    pub(crate) const fn is_present(self) -> bool {
        matches!(self, Support::Present)
    }
}

/// How often a broadcast TLBI and its DSB are needed until the accesses are over that other CPUs made through
/// what was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tlbi {
    /// Once, as the architecture says (D8.16.5).
    Once,
    /// One more of whichever kind must follow (CVE-2025-10263 and older errata).
    Twice,
}

/// The largest leaves that memory is mapped with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leaves {
    /// Blocks of 1 GiB and 2 MiB where the memory allows them: fewest tables, shortest walks, furthest reach of a TLB.
    Blocks,
    /// Pages alone. For CPUs on which an invalidation of one address drops what is cached of the whole block around
    /// it: QEMU's take the larger of the two stages' leaves for that, and a kernel that changes its own pages
    /// one by one then walks anew for all it has.
    Pages,
}

/// What stage 2 needs to know about the CPUs: the least common denominator over all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// FEAT_HAFDBS with dirty state, and no erratum against it. Sets VTCR_EL2.{HA,HD}.
    pub dbm: Support,
    /// FEAT_BBM level 2: a block may be replaced by an equivalent table without invalidating first.
    pub bbm2: Support,
    /// FEAT_S2FWB with HCR_EL2.FWB set: MemAttr has the other encoding.
    pub fwb: Support,
    /// FEAT_TLBIRANGE.
    pub tlb_range: Support,
    /// FEAT_TTL: level hints in TLBI operands.
    pub ttl: Support,
    /// What completes a broadcast invalidation, on the worst of the CPUs.
    pub tlbi: Tlbi,
    /// Which leaves suit the CPUs.
    pub leaves: Leaves,
    /// VMID bits.
    pub vmid: VmidWidth,
    /// Physical address bits (ID_AA64MMFR0_EL1.PARange): 32, 36, 40, 42, 44, 48 or 52.
    pub pa_bits: u8,
}

impl Features {
    /// An Armv8.0 machine with nothing optional.
    pub const BASELINE: Features = Features {
        dbm: Support::Absent,
        bbm2: Support::Absent,
        fwb: Support::Absent,
        tlb_range: Support::Absent,
        ttl: Support::Absent,
        tlbi: Tlbi::Once,
        leaves: Leaves::Blocks,
        vmid: VmidWidth::Eight,
        pa_bits: 40,
    };
}

/// Everything the engine asks of the machine.
///
/// TLBI operations act on the VMID in VTTBR_EL2. The engine brackets them with
/// [`select`](Hardware::select) and [`restore`](Hardware::restore), so they may be issued from a CPU
/// that runs another VM or none.
pub trait Hardware: Sync {
    /// Returns the number of the CPU that this runs on, below [`cpus`](Hardware::cpus). Only for
    /// speed: two CPUs that give the same number share a cache line.
    fn cpu(&self) -> usize;

    /// Returns how many CPUs there are.
    fn cpus(&self) -> usize;

    /// Returns the table there. The memory is Inner Shareable Write-Back, else hardware updates are not atomic
    /// (R_WLTNL).
    fn table(&self, at: TableAt<Self>) -> &Table;

    /// Allocates `count` (1, 2, 4, 8 or 16) zeroed, contiguous tables, aligned to their total size. Nothing else
    /// uses that memory until [`free_tables`](Hardware::free_tables).
    fn alloc_tables(&self, count: usize) -> Option<Pa>;

    /// Allocates one table with anything in it: every entry is written before the table can be reached.
    fn alloc_unwritten(&self) -> Option<Pa> {
        self.alloc_tables(1)
    }

    /// Takes back tables that neither software nor any TLB can reach any more.
    fn free_tables(&self, pages: TablePages<Self>);

    /// `PRFM PLDL1KEEP` of every line: these entries will be read or written soon. Nothing but speed depends on it.
    #[inline]
    fn prefetch(&self, _entries: &[AtomicU64; 64]) {}

    /// `DSB ISHST`: earlier descriptor writes are visible to every walker.
    fn dsb_ishst(&self);
    /// `DSB ISH`: earlier broadcast invalidations are complete on every CPU.
    fn dsb_ish(&self);
    /// `DSB NSH`: earlier local invalidations are complete.
    fn dsb_nsh(&self);
    /// `ISB`.
    fn isb(&self);

    /// `DC CIVAC` for each line that `words` of guest memory touch, and `DSB SY`: memory holds what was in the
    /// caches, and they nothing. `words` are at least one. Only called without FEAT_S2FWB.
    fn clean_invalidate(&self, words: &[AtomicU64]);

    /// Makes `vttbr` current (with the ISB that needs) and returns what was. Cheap when it already is.
    fn select(&self, vttbr: u64) -> u64;
    /// Puts back what [`select`](Hardware::select) returned. Cheap when nothing changed.
    fn restore(&self, previous: u64);

    /// `TLBI IPAS2E1IS, Xt`.
    fn tlbi_ipas2e1is(&self, operand: IpaOperand);
    /// `TLBI RIPAS2E1IS, Xt`. Only called when [`Features::tlb_range`] says so.
    fn tlbi_ripas2e1is(&self, operand: RangeOperand);
    /// `TLBI VMALLE1IS`: combined and stage-1 entries of the VMID, on every CPU.
    fn tlbi_vmalle1is(&self);
    /// `TLBI VMALLS12E1IS`: everything of the VMID, on every CPU.
    fn tlbi_vmalls12e1is(&self);
    /// `TLBI VALE2IS, XZR`: broadcast as the others are, and drops nothing of a guest. Only called when
    /// [`Features::tlbi`] says so.
    fn tlbi_vale2is(&self);
    /// `TLBI IPAS2E1, Xt`, this CPU only.
    fn tlbi_ipas2e1(&self, operand: IpaOperand);
    /// `TLBI VAAE1, Xt` with [`GuestVa::operand`]: one guest address, all ASIDs, this CPU only.
    fn tlbi_vaae1(&self, va: GuestVa);
    /// `TLBI VMALLE1`, this CPU only.
    fn tlbi_vmalle1(&self);
}

/// A reference, an `Arc` or a `Box` of a machine is that machine.
impl<P: Deref<Target: Hardware> + Sync> Hardware for P {
    fn cpu(&self) -> usize {
        (**self).cpu()
    }
    fn cpus(&self) -> usize {
        (**self).cpus()
    }
    fn table(&self, at: TableAt<Self>) -> &Table {
        (**self).table(TableAt::new(at.pa))
    }
    fn alloc_tables(&self, count: usize) -> Option<Pa> {
        (**self).alloc_tables(count)
    }
    fn alloc_unwritten(&self) -> Option<Pa> {
        (**self).alloc_unwritten()
    }
    #[inline]
    fn prefetch(&self, entries: &[AtomicU64; 64]) {
        (**self).prefetch(entries);
    }
    fn free_tables(&self, pages: TablePages<Self>) {
        (**self).free_tables(TablePages::new(pages.first, pages.count));
    }
    fn dsb_ishst(&self) {
        (**self).dsb_ishst();
    }
    fn dsb_ish(&self) {
        (**self).dsb_ish();
    }
    fn dsb_nsh(&self) {
        (**self).dsb_nsh();
    }
    fn isb(&self) {
        (**self).isb();
    }
    fn clean_invalidate(&self, words: &[AtomicU64]) {
        (**self).clean_invalidate(words);
    }
    fn select(&self, vttbr: u64) -> u64 {
        (**self).select(vttbr)
    }
    fn restore(&self, previous: u64) {
        (**self).restore(previous);
    }
    fn tlbi_ipas2e1is(&self, operand: IpaOperand) {
        (**self).tlbi_ipas2e1is(operand);
    }
    fn tlbi_ripas2e1is(&self, operand: RangeOperand) {
        (**self).tlbi_ripas2e1is(operand);
    }
    fn tlbi_vmalle1is(&self) {
        (**self).tlbi_vmalle1is();
    }
    fn tlbi_vmalls12e1is(&self) {
        (**self).tlbi_vmalls12e1is();
    }
    fn tlbi_vale2is(&self) {
        (**self).tlbi_vale2is();
    }
    fn tlbi_ipas2e1(&self, operand: IpaOperand) {
        (**self).tlbi_ipas2e1(operand);
    }
    fn tlbi_vaae1(&self, va: GuestVa) {
        (**self).tlbi_vaae1(va);
    }
    fn tlbi_vmalle1(&self) {
        (**self).tlbi_vmalle1();
    }
}
