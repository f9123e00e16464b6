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

/// Encodes the first `pages` bits of a bitmap, or as many of them as fit into `out`.
///
/// `word(i)` is the bitmap's word `i` of the piece. It may be read twice and must not change
/// in between (the in-flight bitmap of an epoch does not). Returns `None` when not even one
/// word fits.
pub fn encode(pages: u32, word: impl Fn(usize) -> u64, out: &mut [u8]) -> Option<Encoded> {
    let masked = |index: usize| word(index) & word_mask(pages, index);
    let runs = encode_runs(pages, &masked, out);
    let raw = raw_fit(pages, out.len());
    let best = match (runs, raw) {
        (Some(runs), Some(raw)) if runs.pages > raw.pages => runs,
        (Some(runs), Some(raw)) if runs.pages == raw.pages && runs.len <= raw.len => runs,
        (Some(runs), None) => runs,
        (_, Some(raw)) => {
            write_raw(raw, &masked, out)?;
            raw
        }
        (None, None) => return None,
    };
    Some(best)
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

fn raw_fit(pages: u32, room: usize) -> Option<Encoded> {
    let words = words_for(pages).min(room.checked_sub(1)? / 8);
    let covered = u32::try_from(words * 64).map_or(pages, |bits| bits.min(pages));
    (words > 0 || pages == 0).then_some(Encoded {
        pages: covered,
        len: 1 + words * 8,
    })
}

fn write_raw(fit: Encoded, word: &impl Fn(usize) -> u64, out: &mut [u8]) -> Option<()> {
    let (tag, rest) = out.split_first_mut()?;
    *tag = RAW;
    let words = rest.chunks_exact_mut(8).take(words_for(fit.pages));
    for (index, place) in words.enumerate() {
        place.copy_from_slice(&word(index).to_le_bytes());
    }
    Some(())
}

/// Runs written so far, and the one still open.
#[derive(Clone, Copy)]
struct Runs {
    len: usize,
    value: Bit,
    open: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Bit {
    Clear,
    Set,
}

/// Encodes as empty, full or runs: one pass, undone to the last whole word when full.
fn encode_runs(pages: u32, word: &impl Fn(usize) -> u64, out: &mut [u8]) -> Option<Encoded> {
    let mut done = Runs {
        len: 1,
        value: Bit::Clear,
        open: 0,
    };
    let mut covered = 0;
    out.first()?;
    let mut index = 0;
    while index < words_for(pages) {
        // Words that go on with the open run, which are most. It may need all the room of a varint at the end.
        if out.len() - done.len >= VARINT_MAX {
            let same = words_like(done.value, word, index..(pages / 64) as usize);
            done.open += same as u32 * 64;
            covered += same as u32 * 64;
            index += same;
            if index == words_for(pages) {
                break;
            }
        }
        let bits = (pages - covered).min(64);
        let Some(next) = add_word(done, word(index), bits, out) else {
            break;
        };
        done = next;
        covered += bits;
        index += 1;
    }
    if covered == 0 && pages > 0 {
        return None;
    }
    let (tag, len) = match done {
        Runs {
            len: 1,
            value: Bit::Clear,
            ..
        } => (EMPTY, 1),
        // A first clear run of 0 and the open run are all there is.
        Runs {
            len: 2,
            value: Bit::Set,
            open,
        } if open == covered => (FULL, 1),
        Runs { len, open, .. } => (RLE, len + put_varint(open, out.get_mut(len..)?)?),
    };
    *out.first_mut()? = tag;
    Some(Encoded {
        pages: covered,
        len,
    })
}

/// How many words from the start of `range` on are all `value`.
fn words_like(value: Bit, word: &impl Fn(usize) -> u64, range: Range<usize>) -> usize {
    let all = match value {
        Bit::Clear => 0,
        Bit::Set => u64::MAX,
    };
    range.take_while(|&index| word(index) == all).count()
}

/// Adds one word's runs; `None` when they, and the run left open, do not fit.
fn add_word(mut runs: Runs, word: u64, bits: u32, out: &mut [u8]) -> Option<Runs> {
    let mut left = bits;
    let mut word = word;
    while left > 0 {
        let same = match runs.value {
            Bit::Clear => word.trailing_zeros(),
            Bit::Set => word.trailing_ones(),
        };
        let same = same.min(left);
        runs.open += same;
        left -= same;
        word = word.checked_shr(same).unwrap_or(0);
        if left > 0 {
            runs.len += put_varint(runs.open, out.get_mut(runs.len..)?)?;
            runs.open = 0;
            runs.value = match runs.value {
                Bit::Clear => Bit::Set,
                Bit::Set => Bit::Clear,
            };
        }
    }
    let room = out.len().checked_sub(runs.len)?;
    (varint_len(runs.open) <= room).then_some(runs)
}

/// Bytes of the longest varint.
const VARINT_MAX: usize = 5;

fn varint_len(value: u32) -> usize {
    (32 - value.leading_zeros()).div_ceil(7).max(1) as usize
}

fn put_varint(mut value: u32, out: &mut [u8]) -> Option<usize> {
    let len = varint_len(value);
    for place in out.get_mut(..len)?.iter_mut() {
        *place = (value & 0x7F) as u8 | 0x80;
        value >>= 7;
    }
    *out.get_mut(len - 1)? &= 0x7F;
    Some(len)
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
