//! Addresses, levels and names, each a type of its own.
//!
//! A guest's physical address and a machine's physical address are both sixty-four bits, and mixing
//! them up is the classic way to hand a guest somebody else's memory. Here they cannot be mixed, and
//! whatever can overflow returns an `Option`.

use core::fmt;

/// Bytes in a page, the smallest leaf (4 KiB granule).
pub const PAGE_SIZE: u64 = 4096;
pub(crate) const PAGE_SHIFT: u32 = 12;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw address.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// Returns the raw address.
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// Adds a byte count, or `None` past the end of sixty-four bits.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// Is the address a multiple of `size`, a power of two?
            pub const fn is_aligned(self, size: u64) -> bool {
                self.0 & (size - 1) == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// An intermediate physical address: what the guest believes is physical.
    Ipa
}
address! {
    /// A physical address of the machine.
    Pa
}
address! {
    /// A virtual address of the guest, as FAR_EL2 reports it.
    GuestVa
}

impl Ipa {
    /// Returns the number of the page the address lies in.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// Rounds down to a multiple of `size`, a power of two.
    pub const fn align_down(self, size: u64) -> Self {
        Self(self.0 & !(size - 1))
    }
}

impl GuestVa {
    /// Returns the operand of `TLBI VAAE1`: VA\[55:12\] in bits 43:0, level hint "any".
    pub const fn operand(self) -> u64 {
        (self.0 >> PAGE_SHIFT) & ((1 << 44) - 1)
    }
}

/// A guest frame number: an IPA in pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Gfn(u64);

impl Gfn {
    /// Wraps a frame number, or `None` if its address would not fit sixty-four bits.
    pub const fn new(raw: u64) -> Option<Self> {
        if raw > u64::MAX >> PAGE_SHIFT {
            None
        } else {
            Some(Self(raw))
        }
    }

    /// Returns the raw number.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Returns the address of the frame's first byte.
    pub const fn ipa(self) -> Ipa {
        Ipa(self.0 << PAGE_SHIFT)
    }
}

/// A level of the walk. Leaves are 1 GiB at L1, 2 MiB at L2 and 4 KiB at L3; there is no leaf at L0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    /// 512 GiB an entry.
    L0,
    /// 1 GiB an entry.
    L1,
    /// 2 MiB an entry.
    L2,
    /// 4 KiB an entry.
    L3,
}

impl Level {
    /// Returns the level's number in the architecture.
    pub const fn number(self) -> u8 {
        match self {
            Level::L0 => 0,
            Level::L1 => 1,
            Level::L2 => 2,
            Level::L3 => 3,
        }
    }

    pub(crate) const fn shift(self) -> u32 {
        PAGE_SHIFT + 9 * (3 - self.number() as u32)
    }

    /// Returns the bytes one entry of this level covers.
    pub const fn size(self) -> u64 {
        1 << self.shift()
    }

    /// Returns the pages one entry of this level covers.
    pub const fn pages(self) -> u64 {
        self.size() >> PAGE_SHIFT
    }

    /// Returns the next level of the walk, or `None` after L3.
    pub const fn below(self) -> Option<Level> {
        match self {
            Level::L0 => Some(Level::L1),
            Level::L1 => Some(Level::L2),
            Level::L2 => Some(Level::L3),
            Level::L3 => None,
        }
    }

    /// Returns the index of `ipa` in a table of this level.
    pub(crate) const fn index(self, ipa: u64) -> usize {
        ((ipa >> self.shift()) & 511) as usize
    }
}

/// How many VMID bits VTTBR_EL2 has (ID_AA64MMFR1_EL1.VMIDBits).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmidWidth {
    /// Eight bits.
    Eight,
    /// Sixteen bits; VTCR_EL2.VS is set.
    Sixteen,
}

/// The tag of one VM's translations. Zero is never used: it is what the hardware has out of reset.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Vmid(u16);

impl Vmid {
    /// Checks a VMID against the width the machine has.
    pub const fn new(raw: u16, width: VmidWidth) -> Option<Self> {
        match (raw, width) {
            (0, _) => None,
            (raw, VmidWidth::Eight) if raw > 255 => None,
            (raw, _) => Some(Self(raw)),
        }
    }

    /// Returns the raw tag.
    pub const fn raw(self) -> u16 {
        self.0
    }
}

/// The name of a memory slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotId(pub u16);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of one harvest, chosen by the host and only ever growing as long as the VM lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a guest may do with a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read, write and execute.
    ReadWrite,
    /// Read and execute: flash, firmware. Never becomes writable, never tracked.
    ReadOnly,
    /// Nothing: a device stands in front of the memory, as flash does that shows its status. Faults are
    /// answered "not memory". What EL2 writes there is noted all the same.
    None,
}

/// A run of machine memory behind a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte, page-aligned.
    pub pa: Pa,
    /// Length in pages.
    pub pages: u64,
}

/// How dirty pages are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    /// Clean leaves are read-only; the first write faults and is noted.
    WriteProtect,
    /// The hardware sets S2AP\[1\] itself (FEAT_HAFDBS); a harvest reads it.
    Dbm,
}

/// How fine the log is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Granularity {
    /// 4 KiB from the first round: every block is split before logging counts as started.
    Page,
    /// Blocks as they stand; one that is found dirty is reported whole and split for the next round.
    Adaptive,
    /// Blocks as they stand, never split.
    Block,
}

/// How far a bounded operation got. Call it again until it says `Done`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// There is more; in pages of the operation's current pass.
    More {
        /// Pages behind.
        done: u64,
        /// Pages in all.
        total: u64,
    },
    /// Finished.
    Done,
}
