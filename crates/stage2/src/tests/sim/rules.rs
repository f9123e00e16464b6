//! What may be written to a descriptor that the hardware can see, checked at every single write.
//!
//! | rule | invariant |
//! |---|---|
//! | no plain store | 2 |
//! | a block becomes a table of the same memory, attributes and kind | 6 |
//! | nothing valid becomes something else that is valid without FEAT_BBM level 2 | 6, 7 |
//! | nor, with it, with another output address or memory type | 6, 7 |
//! | nothing is made valid while a TLB holds something else there | 5, 6, 7 |
//! | read-only stays read-only | 8 |
//! | no dirty leaf without the access flag | 9 |
//! | no Contiguous bit | 11 |
//! | a table goes back when nothing points to it and no walker remembers it | 5 |
//!
//! The bits are spelled out here once more: a checker that uses the engine's own would agree with it.

use crate::fake::traced::{How, Write};
use crate::fake::{Entry, Machine};
use std::collections::HashMap;
use std::format;
use std::string::String;
use std::vec::Vec;

const VALID: u64 = 1;
const TABLE: u64 = 2;
const WRITE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 10;
const OUTPUT: u64 = 0x0000_ffff_ffff_f000;
const DBM: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
const TRACKED: u64 = 1 << 55;
const BUSY: u64 = 1 << 56;
const MEMORY_TYPE: u64 = 0xf << 2 | 3 << 8;

/// Where a table hangs.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    pub vmid: u16,
    pub level: u32,
    /// The first address it translates.
    pub base: u64,
    /// The entry that points to it; roots have none.
    parent: Option<Entry>,
}

/// What a descriptor translates.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    pub vmid: u16,
    pub level: u32,
    pub start: u64,
    pub end: u64,
}

/// Is skipping a break allowed, for sizes?
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bbm {
    Needed,
    Level2,
}

pub struct Rules {
    bbm: Bbm,
    placed: HashMap<usize, Placed>,
    /// The block that was broken here, until something else is made.
    broken: HashMap<Entry, u64>,
}

const fn size(level: u32) -> u64 {
    1 << (12 + 9 * (3 - level))
}

pub fn is_table(pte: u64, level: u32) -> bool {
    level < 3 && pte & (VALID | TABLE) == VALID | TABLE
}

fn is_leaf(pte: u64, level: u32) -> bool {
    pte & VALID != 0 && !is_table(pte, level)
}

pub fn is_dirty_leaf(pte: u64, level: u32) -> bool {
    is_leaf(pte, level) && pte & (TRACKED | WRITE) == TRACKED | WRITE
}

/// Is it a dirty page or block that no harvest finds by its leaf alone?
pub fn needs_a_bit(pte: u64, level: u32) -> bool {
    is_dirty_leaf(pte, level) && pte & DBM == 0
}

impl Rules {
    pub fn new(bbm: Bbm) -> Self {
        Self {
            bbm,
            placed: HashMap::new(),
            broken: HashMap::new(),
        }
    }

    /// A VM's root tables, decoded from its registers.
    pub fn root(&mut self, machine: &Machine, vtcr: u64, vttbr: u64) {
        let level: u32 = match vtcr >> 6 & 3 {
            1 => 1,
            2 => 0,
            other => panic!("SL0 {other}"),
        };
        let bits = 64 - (vtcr & 0x3f);
        let one = 12 + 9 * (4 - u64::from(level));
        for root in 0..1 << bits.saturating_sub(one) {
            let pa = (vttbr & 0x0000_ffff_ffff_fffe) + root * 4096;
            let place = Placed {
                vmid: (vttbr >> 48) as u16,
                level,
                base: root << one,
                parent: None,
            };
            self.placed.insert(machine.table_at(pa).unwrap(), place);
        }
    }

    /// What the descriptor translates, if the hardware can reach it.
    pub fn scope(&self, place: Entry) -> Option<Scope> {
        let table = self.placed.get(&place.table)?;
        let start = table.base + place.index as u64 * size(table.level);
        Some(Scope {
            vmid: table.vmid,
            level: table.level,
            start,
            end: start + size(table.level),
        })
    }

    /// The allocator took the table, or gave it.
    pub fn filled(&mut self, machine: &Machine, table: usize) -> Result<(), String> {
        let placed = self.placed.remove(&table);
        self.broken.retain(|place, _| place.table != table);
        if let Some(Placed {
            parent: Some(parent),
            level,
            ..
        }) = placed
        {
            let pte = machine.descriptor(parent);
            if is_table(pte, level - 1) && machine.table_at(pte & OUTPUT) == Some(table) {
                return Err(format!("table {table} was freed while it is linked"));
            }
        }
        match machine.who_knows(table) {
            Some(cpu) => Err(format!(
                "table {table} was freed while CPU {cpu} may walk through it"
            )),
            None => Ok(()),
        }
    }

    pub fn check(&mut self, machine: &Machine, place: Entry, write: Write) -> Result<(), String> {
        let Some(scope) = self.scope(place) else {
            return Ok(());
        };
        let Write { old, new, how, .. } = write;
        let level = scope.level;
        let at = scope.start;
        let refuse = |why: &str| {
            Err(format!(
                "{why}: {old:#x} became {new:#x} at {at:#x}, level {level}"
            ))
        };
        if how == How::Store {
            return refuse("a plain store to a descriptor the hardware can see");
        }
        if new == old {
            return Ok(());
        }
        if is_leaf(new, level) {
            if new & CONTIGUOUS != 0 && old & CONTIGUOUS == 0 {
                return refuse("the Contiguous bit was set");
            }
            if is_dirty_leaf(new, level) && new & ACCESSED == 0 {
                return refuse("dirty and not accessed");
            }
        }
        match (old & VALID != 0, new & VALID != 0) {
            (true, true) => {
                if is_leaf(old, level) && is_leaf(new, level) {
                    let read_only = |pte| pte & (WRITE | TRACKED | DBM) == 0;
                    if read_only(old) && !read_only(new) {
                        return refuse("a read-only leaf became another");
                    }
                    if (old ^ new) & (OUTPUT | MEMORY_TYPE | CONTIGUOUS) != 0 {
                        return refuse("a leaf was changed without a break");
                    }
                } else if self.bbm == Bbm::Needed {
                    return refuse("the size was changed without a break");
                } else if is_table(old, level) && is_table(new, level) {
                    return refuse("a table was exchanged for another");
                } else if is_leaf(old, level) {
                    self.children_of(machine, old, new, level)?;
                }
            }
            (true, false) => {
                // Not what was taken out for good.
                if is_leaf(old, level) && new & BUSY != 0 {
                    self.broken.insert(place, old);
                }
            }
            (false, true) => {
                let stale = machine.stale(scope.vmid, scope.start, scope.end, new, level);
                if let Some((cpu, ipa, cached)) = stale {
                    return refuse(&format!(
                        "CPU {cpu} has {cached:#x} cached for {ipa:#x}, and"
                    ));
                }
                if let Some(block) = self.broken.remove(&place)
                    && is_table(new, level)
                {
                    self.children_of(machine, block, new, level)?;
                }
            }
            (false, false) => {
                if new & BUSY == 0 {
                    self.broken.remove(&place);
                }
            }
        }
        if is_table(new, level)
            && let Some(table) = machine.table_at(new & OUTPUT)
        {
            let below = Placed {
                vmid: scope.vmid,
                level: level + 1,
                base: scope.start,
                parent: Some(place),
            };
            self.placed.insert(table, below);
            self.link_below(machine, table, below);
        }
        Ok(())
    }

    /// A table may come with tables below it already.
    fn link_below(&mut self, machine: &Machine, table: usize, placed: Placed) {
        if placed.level >= 3 {
            return;
        }
        for index in 0..512 {
            let place = Entry { table, index };
            let pte = machine.descriptor(place);
            if is_table(pte, placed.level)
                && let Some(below) = machine.table_at(pte & OUTPUT)
            {
                let child = Placed {
                    level: placed.level + 1,
                    base: placed.base + index as u64 * size(placed.level),
                    parent: Some(place),
                    ..placed
                };
                self.placed.insert(below, child);
                self.link_below(machine, below, child);
            }
        }
    }

    fn children(&self, machine: &Machine, table: u64) -> Vec<u64> {
        let Some(table) = machine.table_at(table & OUTPUT) else {
            return Vec::new();
        };
        (0..512)
            .map(|index| machine.descriptor(Entry { table, index }))
            .collect()
    }

    /// Children inherit everything from the block but where they point to and who logs them.
    fn children_of(
        &self,
        machine: &Machine,
        block: u64,
        table: u64,
        level: u32,
    ) -> Result<(), String> {
        const FREE: u64 = OUTPUT | TABLE | WRITE | DBM | TRACKED;
        let writable = block & (WRITE | TRACKED) != 0;
        for (index, child) in self.children(machine, table).into_iter().enumerate() {
            let output = (block & OUTPUT) + index as u64 * size(level + 1);
            let same = (child ^ block) & !FREE == 0 && child & OUTPUT == output;
            let kept = writable == (child & (WRITE | TRACKED) != 0);
            if !same || !kept {
                return Err(format!(
                    "child {index} of the block {block:#x} of level {level} is {child:#x}"
                ));
            }
        }
        Ok(())
    }
}
