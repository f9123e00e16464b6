//! One stage-2 descriptor: its bits, its states, and nothing that touches memory.
//!
//! Layout (VMSAv8-64 stage 2, 4 KiB granule, DS = 0; Arm ARM D8.3, VTCR_EL2 in D24.2):
//!
//! ```text
//!  63    59 58 57 56 55 54 53 52  51 50  48 47                    12 11 10 9  8 7   6 5     2 1 0
//! +--------+--+--+--+--+-----+---+---+-----+------------------------+--+--+----+-----+-------+-+-+
//! |   0    |0 |0 |B |T | XN  |Ctg|DBM|  0  | output address         |0 |AF| SH | W R |MemAttr|t|v|
//! +--------+--+--+--+--+-----+---+---+-----+------------------------+--+--+----+-----+-------+-+-+
//! ```
//!
//! * `v` valid; `t` 1 for a table (L0-L2) or a page (L3), 0 for a block.
//! * `W`, `R` are S2AP; `W` is what the hardware sets on a write when `DBM` is set (D8.5.3).
//! * `T` *tracked*, software bit 55: this leaf belongs to a dirty log.
//! * `B` *busy*, software bit 56, only in an invalid descriptor: a break-before-make is under way and
//!   whoever meets it retries.
//! * Bit 58 stays clear: it becomes AssuredOnly on some machines. `Ctg` stays clear: a contiguous
//!   group would have to be harvested as a whole (R_JKCXG).
//!
//! States of a valid leaf:
//!
//! | state | T | DBM | W | meaning |
//! |---|---|---|---|---|
//! | NW | 0 | 0 | 0 | read-only for good |
//! | RW | 0 | 0 | 1 | writable, untracked |
//! | WC | 1 | engine | 0 | tracked, clean since the last harvest |
//! | WD | 1 | engine | 1 | tracked, written since the last harvest |
//!
//! `T` is set under both engines. So "writable once cleaned" is one bit test everywhere, and no
//! harvest, arm or fault path can mistake NW for WC, whichever engine made it (invariant 8). Telling
//! WC by DBM alone works only while every leaf is on one engine; telling it by the slot's flags was
//! rejected because the fault path would have to trust something outside the descriptor.

use crate::types::{Engine, Level, Pa};

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const MEM_ATTR_SHIFT: u32 = 2;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const OUTPUT: u64 = 0x0000_ffff_ffff_f000;
const DBM: u64 = 1 << 51;
const TRACKED: u64 = 1 << 55;
const BUSY: u64 = 1 << 56;

const _: () =
    assert!((VALID | TABLE_OR_PAGE | READ | WRITE | ACCESSED | DBM | TRACKED | BUSY) & OUTPUT == 0);
const _: () = assert!((TRACKED | BUSY) & !(0xf << 55) == 0);

/// Clears the write permission and touches nothing else: what a harvest ANDs into a leaf.
///
/// Harmless on whatever a racing split may have put there instead: tables, busy markers and empty
/// entries never have this bit set.
pub(crate) const CLEAR_WRITE: u64 = !WRITE;

/// Normal memory, cacheable, whatever the guest says in stage 1 or together with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MemAttr {
    /// Normal Write-Back, the encoding without FEAT_S2FWB.
    WriteBack,
    /// Normal Write-Back forced, the encoding with HCR_EL2.FWB set.
    ForcedWriteBack,
}

impl MemAttr {
    const fn bits(self) -> u64 {
        let encoding = match self {
            MemAttr::WriteBack => 0xf,
            MemAttr::ForcedWriteBack => 6,
        };
        encoding << MEM_ATTR_SHIFT
    }
}

/// What a leaf lets the guest do, and who wants to know about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Permission {
    /// NW.
    ReadOnly,
    /// RW.
    Untracked,
    /// WC.
    Clean(Engine),
    /// WD.
    Dirty(Engine),
}

impl Permission {
    const MASK: u64 = WRITE | DBM | TRACKED;

    const fn bits(self) -> u64 {
        match self {
            Permission::ReadOnly => 0,
            Permission::Untracked => WRITE,
            Permission::Clean(Engine::WriteProtect) => TRACKED,
            Permission::Clean(Engine::Dbm) => TRACKED | DBM,
            Permission::Dirty(Engine::WriteProtect) => TRACKED | WRITE,
            Permission::Dirty(Engine::Dbm) => TRACKED | DBM | WRITE,
        }
    }
}

/// What a descriptor is at the level it was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Nothing there.
    Empty,
    /// A break-before-make is under way.
    Busy,
    /// Points to a table of the next level.
    Table(Pa),
    /// Maps memory.
    Leaf,
}

/// A descriptor value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pte(pub(crate) u64);

impl Pte {
    pub(crate) const EMPTY: Pte = Pte(0);
    pub(crate) const BUSY: Pte = Pte(BUSY);

    /// Makes the descriptor of a table of the next level.
    pub(crate) const fn table(pa: Pa) -> Pte {
        Pte((pa.raw() & OUTPUT) | TABLE_OR_PAGE | VALID)
    }

    /// Makes a leaf: Normal Write-Back, Inner Shareable, accessed, executable, as `permission` says.
    pub(crate) const fn leaf(level: Level, pa: Pa, attr: MemAttr, permission: Permission) -> Pte {
        let shape = match level {
            Level::L3 => TABLE_OR_PAGE,
            _ => 0,
        };
        let fixed = ACCESSED | INNER_SHAREABLE | READ | attr.bits() | shape | VALID;
        Pte((pa.raw() & OUTPUT) | fixed | permission.bits())
    }

    pub(crate) const fn kind(self, level: Level) -> Kind {
        if self.0 & VALID == 0 {
            if self.0 & BUSY != 0 {
                Kind::Busy
            } else {
                Kind::Empty
            }
        } else if self.0 & TABLE_OR_PAGE != 0 && !matches!(level, Level::L3) {
            Kind::Table(Pa::new(self.0 & OUTPUT))
        } else {
            Kind::Leaf
        }
    }

    /// Is it a leaf of a dirty log (WC or WD)? False for whatever is no leaf.
    pub(crate) const fn is_tracked(self) -> bool {
        self.0 & (TRACKED | VALID) == TRACKED | VALID
    }

    /// WD.
    pub(crate) const fn is_dirty(self) -> bool {
        self.0 & (TRACKED | WRITE | VALID) == TRACKED | WRITE | VALID
    }

    /// [`is_dirty`](Self::is_dirty) as a number, for the harvest's branch-free pass over a table.
    pub(crate) const fn dirty_bit(self) -> u64 {
        (self.0 >> TRACKED.trailing_zeros()) & (self.0 >> WRITE.trailing_zeros()) & 1
    }

    /// WC.
    pub(crate) const fn is_clean(self) -> bool {
        self.0 & (TRACKED | WRITE | VALID) == TRACKED | VALID
    }

    /// RW.
    pub(crate) const fn is_untracked_writable(self) -> bool {
        self.0 & (TRACKED | WRITE | VALID) == WRITE | VALID
    }

    /// May the guest write now, without the hardware or anyone else changing the leaf first?
    pub(crate) const fn is_writable(self) -> bool {
        self.0 & (WRITE | VALID) == WRITE | VALID
    }

    pub(crate) const fn engine(self) -> Engine {
        if self.0 & DBM != 0 {
            Engine::Dbm
        } else {
            Engine::WriteProtect
        }
    }

    pub(crate) const fn output(self) -> Pa {
        Pa::new(self.0 & OUTPUT)
    }

    /// Returns the leaf with the access flag set. A WD leaf without it never exists (invariant 9).
    pub(crate) const fn accessed(self) -> Pte {
        Pte(self.0 | ACCESSED)
    }

    /// Was it accessed since its flag was taken away?
    pub(crate) const fn is_accessed(self) -> bool {
        self.0 & (ACCESSED | VALID) == ACCESSED | VALID
    }

    /// Returns the leaf without the access flag: not for WD.
    pub(crate) const fn unaccessed(self) -> Pte {
        Pte(self.0 & !ACCESSED)
    }

    /// Returns the leaf in another state, every other bit as it was.
    pub(crate) const fn with(self, permission: Permission) -> Pte {
        Pte(self.0 & !Permission::MASK | permission.bits())
    }

    /// Returns child `index` of this block, split to `below`, in state `permission`.
    ///
    /// Everything but the output address, the permission and the block/page bit is inherited, also
    /// bits this crate does not know: rebuilding a child from defaults is how the 2014 KVM patch lost
    /// its attributes.
    pub(crate) const fn child(self, below: Level, index: usize, permission: Permission) -> Pte {
        let shape = match below {
            Level::L3 => TABLE_OR_PAGE,
            _ => 0,
        };
        let inherited = self.0 & !OUTPUT & !TABLE_OR_PAGE;
        let output = (self.0 & OUTPUT) + index as u64 * below.size();
        Pte(inherited | output | shape).with(permission)
    }

    /// Returns the block of `level` that would stand for 512 children starting with this one.
    pub(crate) const fn parent(self) -> Pte {
        Pte(self.0 & !TABLE_OR_PAGE)
    }
}
