//! A piece of a dirty bitmap as bytes: `{empty, full, raw, rle}`, whichever says most in
//! the room there is.
//!
//! Purpose: pieces are encoded one by one and can be asked for again one by one, so a lost
//! frame costs one piece. Layout of the bitmap itself is KVM's: `u64` words, bit 0 = first
//! page.
//!
//! | tag | after it |
//! |---|---|
//! | 0 empty | nothing |
//! | 1 full | nothing |
//! | 2 raw | the words, little-endian; bits past the last page are 0 |
//! | 3 rle | LEB128 lengths of runs, clear and set by turns, the first one clear and maybe 0; they add up to the pages |
//!
//! Invariants: the encoder covers a prefix, a multiple of 64 pages unless it reaches the
//! end of what was asked for, and always at least one word when it has 16 bytes of room;
//! the decoder accepts nothing that does not describe exactly the pages it was told,
//! set bits past the end included.

use core::fmt;
use core::ops::Range;

const EMPTY: u8 = 0;
const FULL: u8 = 1;
const RAW: u8 = 2;
const RLE: u8 = 3;

/// Returns the words that hold `pages` bits.
#[must_use]
pub const fn words_for(pages: u32) -> usize {
    pages.div_ceil(64) as usize
}

/// What [`encode`] wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Encoded {
    /// Pages covered, from the first one.
    pub pages: u32,
    /// Bytes of the buffer used.
    pub len: usize,
}

/// Encodes the first `pages` bits of the bitmap in `words`, or as many of them as fit into `out`.
///
/// `read` gives a word's value. A word may be read twice and should not change in between (the in-flight bitmap
/// of an epoch does not); if it does, the encoding is still one. Returns `None` when not even one word fits.
pub fn encode<W>(
    words: &[W],
    read: impl Fn(&W) -> u64,
    pages: u32,
    out: &mut [u8],
) -> Option<Encoded> {
    encode_marked(words, read, |word| word..usize::MAX, pages, out)
}

/// As [`encode`], without looking at words that are known to be zero: `marked` gives the first run of words from
/// one on that may not be, which is empty and behind all words if there is none.
pub fn encode_marked<W>(
    words: &[W],
    read: impl Fn(&W) -> u64,
    marked: impl Fn(usize) -> Range<usize>,
    pages: u32,
    out: &mut [u8],
) -> Option<Encoded> {
    let words = words.get(..words_for(pages)).unwrap_or(words);
    let there = u32::try_from(words.len() * 64).unwrap_or(u32::MAX);
    let pages = pages.min(there);
    let runs = encode_runs(words, &read, marked, pages, out);
    if runs.is_some_and(|runs| runs.pages == pages && runs.len <= RAW_MIN) {
        return runs;
    }
    let raw = raw_fit(pages, out.len());
    match (runs, raw) {
        (Some(runs), Some(raw)) if runs.pages > raw.pages => Some(runs),
        (Some(runs), Some(raw)) if runs.pages == raw.pages && runs.len <= raw.len => Some(runs),
        (runs, None) => runs,
        (_, Some(raw)) => {
            write_raw(words, &read, raw, out)?;
            Some(raw)
        }
    }
}

/// The bits of word `index` that stand for pages.
fn word_mask(pages: u32, index: usize) -> u64 {
    let before = (index as u64) * 64;
    match u64::from(pages).saturating_sub(before) {
        0 => 0,
        bits @ 1..=63 => (1 << bits) - 1,
        _ => u64::MAX,
    }
}

/// Shortest encoding as words: of one.
const RAW_MIN: usize = 1 + 8;

fn raw_fit(pages: u32, room: usize) -> Option<Encoded> {
    let words = words_for(pages).min(room.checked_sub(1)? / 8);
    let covered = u32::try_from(words * 64).map_or(pages, |bits| bits.min(pages));
    (words > 0 || pages == 0).then_some(Encoded {
        pages: covered,
        len: 1 + words * 8,
    })
}

fn write_raw<W>(
    words: &[W],
    read: &impl Fn(&W) -> u64,
    fit: Encoded,
    out: &mut [u8],
) -> Option<()> {
    let (tag, rest) = out.get_mut(..fit.len)?.split_first_mut()?;
    *tag = RAW;
    let words = words.get(..rest.len() / 8)?;
    // Stores of whole words may be had only where the compiler knows of their alignment: not in `out`.
    let mut staged = [[0; 8]; 64];
    for (place, some) in rest
        .chunks_mut(staged.as_flattened().len())
        .zip(words.chunks(64))
    {
        for (bytes, word) in staged.iter_mut().zip(some) {
            *bytes = read(word).to_le_bytes();
        }
        let bytes = staged.as_flattened().get(..place.len())?;
        place.copy_from_slice(bytes);
    }
    let places = rest.as_chunks_mut::<8>().0;
    if let Some((place, index)) = places.last_mut().zip(words_for(fit.pages).checked_sub(1)) {
        let mask = word_mask(fit.pages, index);
        *place = (u64::from_le_bytes(*place) & mask).to_le_bytes();
    }
    Some(())
}

/// Longest encoding by runs: a run costs as much as several words, and this bounds them.
const RUNS_MAX: usize = 2048;
/// By so much runs may be longer than the words that they stand for, before they are given up.
const RUNS_LOSS: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Bit {
    Clear,
    Set,
}

impl Bit {
    /// A word of it.
    fn word(self) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => !0,
        }
    }
}

/// Encodes as empty, full or runs, in one pass: as many words as fit whole.
fn encode_runs<W>(
    words: &[W],
    read: &impl Fn(&W) -> u64,
    marked: impl Fn(usize) -> Range<usize>,
    pages: u32,
    out: &mut [u8],
) -> Option<Encoded> {
    // The open run is written last, and has the room of the longest varint.
    let most = out.len().min(RUNS_MAX).saturating_sub(VARINT_MAX);
    let mut value = Bit::Clear;
    // Where the open run began, and the bytes before it.
    let (mut start, mut len) = (0, 1);
    let mut index = 0;
    // Up to where words must be looked at.
    let mut end = 0;
    while index < words.len() {
        if value == Bit::Clear && index >= end {
            let next = marked(index);
            index = next.start.clamp(index, words.len());
            end = next.end.clamp(index, words.len());
        }
        let Some(word) = words.get(index).map(read) else {
            break;
        };
        if word == value.word() {
            index += 1;
            let like = match value {
                Bit::Clear => words.get(index..end),
                Bit::Set => words.get(index..),
            };
            index += words_like(value, like.unwrap_or_default(), read);
            continue;
        }
        let room = out.get_mut(..most.min(index * 8 + RUNS_LOSS))?;
        let first = index as u32 * 64;
        let before = value.word() & 1;
        let edges = (word ^ (word << 1 | before)) & word_mask(pages, index);
        let Some(fits) = put_runs(edges, first, (start, len), room) else {
            break;
        };
        (start, len) = fits;
        value = if word >> 63 == 0 {
            Bit::Clear
        } else {
            Bit::Set
        };
        index += 1;
    }
    if index == 0 && pages > 0 {
        return None;
    }
    let covered = pages.min(index as u32 * 64);
    let (tag, len) = match (start, len) {
        // No run has ended, or only the clear one that comes first, and had no page.
        (_, 1) => (EMPTY, 1),
        (0, 2) => (FULL, 1),
        _ => (RLE, len + put_varint(covered - start, out.get_mut(len..)?)?),
    };
    *out.first_mut()? = tag;
    Some(Encoded {
        pages: covered,
        len,
    })
}

/// How many words at the front are all `value`.
fn words_like<W>(value: Bit, words: &[W], read: &impl Fn(&W) -> u64) -> usize {
    let (eights, _) = words.as_chunks::<8>();
    // One loop for each value: a word costs its reading and one more instruction.
    let same = match value {
        Bit::Clear => eights
            .iter()
            .take_while(|eight| eight.iter().fold(0, |any, word| any | read(word)) == 0)
            .count(),
        Bit::Set => eights
            .iter()
            .take_while(|eight| eight.iter().fold(!0, |all, word| all & read(word)) == !0)
            .count(),
    };
    let mut rest = words.get(same * 8..).unwrap_or_default();
    while let Some((word, behind)) = rest.split_first()
        && read(word) == value.word()
    {
        rest = behind;
    }
    words.len() - rest.len()
}

/// Ends a run at each bit of `edges`, bit 0 being page `first`; `None` when they do not fit.
fn put_runs(
    mut edges: u64,
    first: u32,
    (mut start, mut len): (u32, usize),
    out: &mut [u8],
) -> Option<(u32, usize)> {
    while edges != 0 {
        let page = first + edges.trailing_zeros();
        edges &= edges - 1;
        let run = page - start;
        if run < 0x80 {
            *out.get_mut(len)? = run as u8;
            len += 1;
        } else {
            len += put_varint(run, out.get_mut(len..)?)?;
        }
        start = page;
    }
    Some((start, len))
}

/// Bytes of the longest varint.
const VARINT_MAX: usize = 5;

fn put_varint(mut value: u32, out: &mut [u8]) -> Option<usize> {
    let mut len = 0;
    while value >= 0x80 {
        *out.get_mut(len)? = value as u8 | 0x80;
        value >>= 7;
        len += 1;
    }
    *out.get_mut(len)? = value as u8;
    Some(len + 1)
}

/// Why an encoding was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitmapError {
    /// No tag at all.
    NoTag,
    /// A tag nobody defined.
    Tag(u8),
    /// Bytes left over, or missing, for the pages it should describe.
    Length,
    /// Runs that are empty, over-long or do not add up to the pages.
    Runs,
    /// A bit set past the last page.
    PastEnd,
    /// The caller's buffer is not the one for these pages.
    Buffer,
}

impl fmt::Display for BitmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTag => f.write_str("bitmap piece without a tag"),
            Self::Tag(tag) => write!(f, "bitmap piece with unknown tag {tag}"),
            Self::Length => f.write_str("bitmap piece of the wrong length"),
            Self::Runs => f.write_str("bitmap runs do not add up to the piece"),
            Self::PastEnd => f.write_str("bitmap piece with a bit set past its last page"),
            Self::Buffer => f.write_str("buffer does not match the bitmap piece"),
        }
    }
}

impl core::error::Error for BitmapError {}

/// Decodes a piece of `pages` pages into `out`, which has exactly [`words_for`] of them.
///
/// # Errors
/// Any encoding that does not describe exactly these pages; `out` is then unspecified.
pub fn decode(encoding: &[u8], pages: u32, out: &mut [u64]) -> Result<(), BitmapError> {
    if out.len() != words_for(pages) {
        return Err(BitmapError::Buffer);
    }
    let (&tag, body) = encoding.split_first().ok_or(BitmapError::NoTag)?;
    match tag {
        EMPTY | FULL if !body.is_empty() => Err(BitmapError::Length),
        EMPTY => {
            out.fill(0);
            Ok(())
        }
        FULL => {
            out.fill(0);
            set_run(out, 0, pages);
            Ok(())
        }
        RAW => decode_raw(body, pages, out),
        RLE => decode_runs(body, pages, out),
        _ => Err(BitmapError::Tag(tag)),
    }
}

fn decode_raw(body: &[u8], pages: u32, out: &mut [u64]) -> Result<(), BitmapError> {
    let (words, rest) = body.as_chunks::<8>();
    if words.len() != out.len() || !rest.is_empty() {
        return Err(BitmapError::Length);
    }
    for (index, (place, bytes)) in out.iter_mut().zip(words).enumerate() {
        *place = u64::from_le_bytes(*bytes);
        if *place & !word_mask(pages, index) != 0 {
            return Err(BitmapError::PastEnd);
        }
    }
    Ok(())
}

fn decode_runs(mut body: &[u8], pages: u32, out: &mut [u64]) -> Result<(), BitmapError> {
    out.fill(0);
    let mut at = 0u32;
    let mut value = Bit::Clear;
    let mut first = true;
    // Each turn consumes at least one byte.
    while !body.is_empty() {
        let (run, rest) = take_varint(body).ok_or(BitmapError::Runs)?;
        if run == 0 && !first || run > pages - at {
            return Err(BitmapError::Runs);
        }
        if value == Bit::Set {
            set_run(out, at, run);
        }
        at += run;
        value = if value == Bit::Set {
            Bit::Clear
        } else {
            Bit::Set
        };
        first = false;
        body = rest;
    }
    if at == pages {
        Ok(())
    } else {
        Err(BitmapError::Runs)
    }
}

fn take_varint(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let mut value = 0u64;
    for (index, &byte) in bytes.iter().enumerate().take(5) {
        value |= u64::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((u32::try_from(value).ok()?, bytes.get(index + 1..)?));
        }
    }
    None
}

/// Sets `count` bits from bit `first`; bits outside `words` are left alone.
fn set_run(words: &mut [u64], first: u32, count: u32) {
    let mut at = first;
    let end = first.saturating_add(count);
    while at < end {
        let bit = at % 64;
        let bits = (64 - bit).min(end - at);
        let mask = if bits == 64 {
            u64::MAX
        } else {
            ((1 << bits) - 1) << bit
        };
        if let Some(word) = words.get_mut((at / 64) as usize) {
            *word |= mask;
        }
        at += bits;
    }
}
