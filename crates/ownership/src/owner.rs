//! What a frame can be, how that is packed, and what it may become.
//!
//! ```text
//!  63                              28 27            14 13         4 3    0
//! +----------------------------------+----------------+------------+------+
//! |        guest frame number        |   generation   |     VM     | kind |
//! +----------------------------------+----------------+------------+------+
//! ```
//!
//! Kinds without a guest have zeros there.

use core::fmt;

/// A machine address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Pa(pub u64);

impl fmt::Display for Pa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

const VM_SHIFT: u32 = 4;
const GENERATION_SHIFT: u32 = 14;
const GFN_SHIFT: u32 = 28;
const KIND_MASK: u64 = (1 << VM_SHIFT) - 1;

/// A VM's number, below 1024.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct VmId(u16);

impl VmId {
    /// Checks a number.
    pub const fn new(raw: u16) -> Option<Self> {
        if raw < 1 << (GENERATION_SHIFT - VM_SHIFT) {
            Some(Self(raw))
        } else {
            None
        }
    }

    /// Returns the number.
    pub const fn raw(self) -> u16 {
        self.0
    }
}

/// One life of a VM, from a start to the next reset.
///
/// Fourteen bits, then it begins again: a generation's frames are cleaned before its number returns,
/// because a VM may only be reset when the one before the last has no frames left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Generation(u16);

impl Generation {
    /// The first life.
    pub const FIRST: Generation = Generation(0);

    /// Returns the life after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self((self.0 + 1) & ((1 << (GFN_SHIFT - GENERATION_SHIFT)) - 1))
    }

    /// Returns the number.
    pub const fn raw(self) -> u16 {
        self.0
    }
}

/// Whose guest memory a frame is, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Guest {
    /// The VM.
    pub vm: VmId,
    /// Its life.
    pub generation: Generation,
    gfn: u64,
}

impl Guest {
    /// Names a guest frame; `None` if the number does not fit 36 bits (48-bit addresses).
    pub const fn new(vm: VmId, generation: Generation, gfn: u64) -> Option<Self> {
        if gfn >> (64 - GFN_SHIFT) == 0 {
            Some(Self {
                vm,
                generation,
                gfn,
            })
        } else {
            None
        }
    }

    /// Returns the guest frame number.
    pub const fn gfn(self) -> u64 {
        self.gfn
    }

    const fn bits(self) -> u64 {
        (self.vm.0 as u64) << VM_SHIFT
            | (self.generation.0 as u64) << GENERATION_SHIFT
            | self.gfn << GFN_SHIFT
    }

    const fn unpack(bits: u64) -> Self {
        let vm = VmId((bits >> VM_SHIFT & 0x3ff) as u16);
        let generation = Generation((bits >> GENERATION_SHIFT & 0x3fff) as u16);
        Self {
            vm,
            generation,
            gfn: bits >> GFN_SHIFT,
        }
    }
}

/// What a frame is used for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Not ours to use: firmware's, a hole, or not released yet.
    Reserved = 0,
    /// Nobody's.
    Free = 1,
    /// EL2's code, data, heap and stacks.
    Hypervisor = 2,
    /// A translation table of a VM.
    Table = 3,
    /// The bundle the guests came in.
    Bundle = 4,
    /// A guest's memory.
    GuestRam = 5,
    /// A guest's memory whose VM or slot is gone; not scrubbed yet.
    Dying = 6,
    /// Part of a range that is moving at this moment.
    InTransit = 7,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 8] = [
        Kind::Reserved,
        Kind::Free,
        Kind::Hypervisor,
        Kind::Table,
        Kind::Bundle,
        Kind::GuestRam,
        Kind::Dying,
        Kind::InTransit,
    ];

    /// The table of transitions. What is not here does not happen.
    ///
    /// | from | to | when |
    /// |---|---|---|
    /// | Reserved | Free, Hypervisor, Bundle | boot sorts memory |
    /// | Free | Hypervisor, Table, GuestRam | allocation |
    /// | Hypervisor | Free | given back |
    /// | Table | Free | after the TLB invalidation |
    /// | GuestRam | Dying | VM reset or end, slot deleted: no new translation to it |
    /// | Dying | Free | scrubbed, and no old translation left |
    /// | Dying | GuestRam | scrubbed early, for the VM's next life, at the same place |
    ///
    /// The bundle stays: any guest may be reset from it.
    pub const fn may_become(self, to: Kind) -> bool {
        use Kind::{Bundle, Dying, Free, GuestRam, Hypervisor, InTransit, Reserved, Table};
        match self {
            Reserved => matches!(to, Free | Hypervisor | Bundle),
            Free => matches!(to, Hypervisor | Table | GuestRam),
            Hypervisor | Table => matches!(to, Free),
            GuestRam => matches!(to, Dying),
            Dying => matches!(to, Free | GuestRam),
            Bundle | InTransit => false,
        }
    }
}

/// Who owns a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// See [`Kind::Reserved`].
    Reserved,
    /// See [`Kind::Free`].
    Free,
    /// See [`Kind::Hypervisor`].
    Hypervisor,
    /// See [`Kind::Table`].
    Table(VmId),
    /// See [`Kind::Bundle`].
    Bundle,
    /// See [`Kind::GuestRam`].
    GuestRam(Guest),
    /// See [`Kind::Dying`]; whose it was.
    Dying(Guest),
    /// See [`Kind::InTransit`].
    InTransit,
}

impl Owner {
    /// Returns what the frame is used for.
    pub const fn kind(self) -> Kind {
        match self {
            Owner::Reserved => Kind::Reserved,
            Owner::Free => Kind::Free,
            Owner::Hypervisor => Kind::Hypervisor,
            Owner::Table(_) => Kind::Table,
            Owner::Bundle => Kind::Bundle,
            Owner::GuestRam(_) => Kind::GuestRam,
            Owner::Dying(_) => Kind::Dying,
            Owner::InTransit => Kind::InTransit,
        }
    }

    /// May a frame of this owner go to `to`? The kinds must allow it, and guest memory keeps its name
    /// on the way: it dies as what it was, and comes back only for a later life of the same VM at the
    /// same place.
    pub fn may_become(self, to: Owner) -> bool {
        let names_agree = match (self, to) {
            (Owner::GuestRam(was), Owner::Dying(is)) => was == is,
            (Owner::Dying(was), Owner::GuestRam(is)) => {
                was.vm == is.vm && was.gfn == is.gfn && was.generation != is.generation
            }
            _ => true,
        };
        names_agree && self.kind().may_become(to.kind())
    }

    /// Returns the owner of frame `index` of a range whose first is this one's.
    pub(crate) fn nth(self, index: u64) -> Option<Owner> {
        let moved =
            |guest: Guest| Guest::new(guest.vm, guest.generation, guest.gfn.checked_add(index)?);
        Some(match self {
            Owner::GuestRam(guest) => Owner::GuestRam(moved(guest)?),
            Owner::Dying(guest) => Owner::Dying(moved(guest)?),
            other => other,
        })
    }

    pub(crate) const fn pack(self) -> u64 {
        let rest = match self {
            Owner::Table(vm) => (vm.0 as u64) << VM_SHIFT,
            Owner::GuestRam(guest) | Owner::Dying(guest) => guest.bits(),
            _ => 0,
        };
        self.kind() as u64 | rest
    }

    /// Unpacks an entry. A word nobody could have packed reads as reserved: such a frame can be
    /// claimed by nothing that runs after boot.
    pub(crate) const fn unpack(bits: u64) -> Owner {
        let guest = Guest::unpack(bits);
        match bits & KIND_MASK {
            1 => Owner::Free,
            2 => Owner::Hypervisor,
            3 => Owner::Table(guest.vm),
            4 => Owner::Bundle,
            5 => Owner::GuestRam(guest),
            6 => Owner::Dying(guest),
            7 => Owner::InTransit,
            _ => Owner::Reserved,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Reserved => f.write_str("reserved"),
            Owner::Free => f.write_str("free"),
            Owner::Hypervisor => f.write_str("the hypervisor's"),
            Owner::Table(vm) => write!(f, "a translation table of VM {}", vm.0),
            Owner::Bundle => f.write_str("part of the bundle"),
            Owner::GuestRam(guest) => write!(f, "memory of {guest}"),
            Owner::Dying(guest) => write!(f, "dying memory of {guest}"),
            Owner::InTransit => f.write_str("being moved by another CPU"),
        }
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "VM {} (life {}) at guest frame {:#x}",
            self.vm.0, self.generation.0, self.gfn
        )
    }
}
