//! The function names that the crash console prints.
//!
//! They are written into room that the linker script reserved (`.symbols`, zeros), after
//! linking, because only then are the addresses known; the room is inside the read-only
//! data, so the image needs no second file to print a backtrace.
//!
//! Layout, all little-endian, offsets counted from the table's first byte:
//!
//! ```text
//! 0   u32  magic "TSYM"
//! 4   u32  count
//! 8   count x { u32 address - image start, u32 offset of the name }, by address
//! ..  names, each NUL-terminated
//! ```
//!
//! A reader takes the last entry at or below its address. So when the room is too small,
//! names are shortened first; if that is not enough the table is cut at an address and
//! closed by an entry [`UNKNOWN`], so that no later function is given an earlier one's name.

use std::collections::BTreeMap;

use crate::elf::{Elf, SectionKind, Symbol, SymbolKind};
use crate::flat::Flat;

/// The table's first four bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"TSYM");
/// The name of everything after a cut.
pub const UNKNOWN: &str = "?";
const HEADER: usize = 8;
const ENTRY: usize = 8;
/// Name lengths tried, in turn, until the table fits.
const NAME_LIMITS: [usize; 7] = [usize::MAX, 192, 128, 96, 64, 48, 32];

/// Why the names cannot be put in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Nothing reserved.
    #[error(
        "no room for function names: the ELF has neither a .symbols section nor __symbols_start/__symbols_end; reserve some in the linker script"
    )]
    NoRoom,
    /// Reserved in memory only.
    #[error(
        ".symbols has no bytes in the file (NOBITS); fill it with zeros in the program, so that it is stored"
    )]
    NotStored,
    /// Not inside the image.
    #[error("the room for function names ({start:#x}..{end:#x}) is not inside a stored segment")]
    Outside {
        /// Link address of its start.
        start: u64,
        /// And of its end.
        end: u64,
    },
    /// Something is there already.
    #[error(
        "the room for function names at {0:#x} is not all zeros; it must be reserved for this table alone"
    )]
    Occupied(u64),
    /// Not even one entry.
    #[error("the room for function names has {have} bytes; the smallest table takes {need}")]
    TooSmall {
        /// Bytes reserved.
        have: usize,
        /// Bytes for the header, one entry and its name.
        need: usize,
    },
    /// No functions.
    #[error(
        "the ELF has no function symbols; link without --strip-all and take the names out of the image here instead"
    )]
    NoSymbols,
}

/// How the names fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Functions that have an entry of their own.
    pub kept: usize,
    /// Functions there are.
    pub total: usize,
    /// Names cut to this many bytes, if any were.
    pub shortened_to: Option<usize>,
    /// Bytes of the room in use.
    pub used: usize,
    /// Bytes of the room.
    pub room: usize,
}

impl Fit {
    /// What to tell the person who builds, if something was left out.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let Self {
            kept, total, room, ..
        } = self;
        if kept < total {
            Some(format!(
                "only {kept} of {total} function names fit into .symbols ({room} bytes), the rest shows as \"{UNKNOWN}\" in a backtrace; make .symbols larger"
            ))
        } else {
            self.shortened_to.map(|limit| {
                format!("function names are cut to {limit} bytes to fit into .symbols ({room} bytes); make .symbols larger for whole ones")
            })
        }
    }
}

/// Writes the table into `image`.
///
/// # Errors
///
/// When there is no usable room for it; see [`enum@Error`].
pub fn fill(elf: &Elf<'_>, image: &mut Flat) -> Result<Fit, Error> {
    let (start, end) = room(elf)?;
    let functions = functions(&elf.code, image);
    let size = end.saturating_sub(start);
    let room = image
        .stored_mut(start, size)
        .ok_or(Error::Outside { start, end })?;
    if room.iter().any(|byte| *byte != 0) {
        return Err(Error::Occupied(start));
    }
    let (table, fit) = table(&functions, room.len())?;
    // `table` never returns more than it was given.
    room[..table.len()].copy_from_slice(&table);
    Ok(fit)
}

/// Link addresses of the reserved room.
fn room(elf: &Elf<'_>) -> Result<(u64, u64), Error> {
    match elf
        .sections
        .iter()
        .find(|section| section.name == ".symbols")
    {
        Some(section) if section.kind == SectionKind::MemoryOnly => Err(Error::NotStored),
        Some(section) => Ok((
            section.address,
            section.address.saturating_add(section.size),
        )),
        None => elf.symbol_room.ok_or(Error::NoRoom),
    }
}

/// One name an address, by offset from the image's start. Where the linker folded equal
/// functions or assembly gave a place several labels, the best witness wins, then the
/// alphabet, so that the same ELF always gives the same table.
fn functions(code: &[Symbol<'_>], image: &Flat) -> Vec<(u32, String)> {
    let mut best: BTreeMap<u32, &Symbol<'_>> = BTreeMap::new();
    for symbol in code {
        let Some(offset) = image
            .offset_of(symbol.address)
            .and_then(|offset| u32::try_from(offset).ok())
        else {
            continue;
        };
        best.entry(offset)
            .and_modify(|have| {
                if rank(symbol) < rank(have) {
                    *have = symbol;
                }
            })
            .or_insert(symbol);
    }
    best.into_iter()
        .map(|(offset, symbol)| {
            (
                offset,
                format!("{:#}", rustc_demangle::demangle(symbol.name)),
            )
        })
        .collect()
}

/// Lower is the better name. The linker script's own marks start with two underscores.
fn rank<'a>(symbol: &Symbol<'a>) -> (SymbolKind, bool, &'a str) {
    (symbol.kind, symbol.name.starts_with("__"), symbol.name)
}

fn table(functions: &[(u32, String)], room: usize) -> Result<(Vec<u8>, Fit), Error> {
    let Some(((_, first), rest)) = functions.split_first() else {
        return Err(Error::NoSymbols);
    };
    let shortest = NAME_LIMITS[NAME_LIMITS.len() - 1];
    let need = HEADER
        + ENTRY
        + cut(first, shortest).len()
        + 1
        + if rest.is_empty() {
            0
        } else {
            ENTRY + UNKNOWN.len() + 1
        };
    if room < need {
        return Err(Error::TooSmall { have: room, need });
    }
    let total = functions.len();
    for limit in NAME_LIMITS {
        let entries = functions
            .iter()
            .map(|(offset, name)| (*offset, cut(name, limit)));
        if let Some(bytes) = encode(entries, room) {
            let shortened = functions.iter().any(|(_, name)| name.len() > limit);
            let fit = Fit {
                kept: total,
                total,
                shortened_to: shortened.then_some(limit),
                used: bytes.len(),
                room,
            };
            return Ok((bytes, fit));
        }
    }
    // The longest prefix that fits together with the entry that closes it. Size only
    // grows with the prefix, so halving finds it.
    let closed = |kept: usize| {
        let (from, _) = functions.get(kept)?;
        let head = functions
            .iter()
            .take(kept)
            .map(|(offset, name)| (*offset, cut(name, shortest)));
        encode(head.chain([(*from, UNKNOWN)]), room)
    };
    let (mut kept, mut too_many) = (1, total);
    while too_many - kept > 1 {
        let middle = kept + (too_many - kept) / 2;
        match closed(middle) {
            Some(_) => kept = middle,
            None => too_many = middle,
        }
    }
    let bytes = closed(kept).ok_or(Error::TooSmall { have: room, need })?;
    let fit = Fit {
        kept,
        total,
        shortened_to: Some(shortest),
        used: bytes.len(),
        room,
    };
    Ok((bytes, fit))
}

/// The table, if it fits into `room`. Equal names (instances of one generic) are stored once.
fn encode<'n>(
    entries: impl Iterator<Item = (u32, &'n str)> + Clone,
    room: usize,
) -> Option<Vec<u8>> {
    let count = u32::try_from(entries.clone().count()).ok()?;
    let names_at = HEADER + ENTRY * count as usize;
    let mut bytes = Vec::with_capacity(names_at);
    bytes.extend_from_slice(&MAGIC.to_le_bytes());
    bytes.extend_from_slice(&count.to_le_bytes());
    let mut names: Vec<u8> = Vec::new();
    let mut known: BTreeMap<&str, u32> = BTreeMap::new();
    for (offset, name) in entries {
        let at = match known.get(name) {
            Some(at) => *at,
            None => {
                let at = u32::try_from(names_at + names.len()).ok()?;
                names.extend_from_slice(name.as_bytes());
                names.push(0);
                known.insert(name, at);
                at
            }
        };
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&at.to_le_bytes());
    }
    bytes.extend_from_slice(&names);
    (bytes.len() <= room).then_some(bytes)
}

/// The first `limit` bytes of a name at most, ending at a character, without the NUL
/// that would end it early.
fn cut(name: &str, limit: usize) -> &str {
    let name = name.split('\0').next().unwrap_or(UNKNOWN);
    let mut end = limit.min(name.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}
