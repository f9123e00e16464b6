//! Guest memory as bytes: runs of one repeated word, and literal words.
//!
//! Purpose: most guest memory is zero or one pattern repeated. A run costs 2 or 10 bytes
//! however long it is; other words go as they are (+0.03 %). Nothing is compressed further
//! at EL2: that is the host's business.
//!
//! A sequence of items, each a little-endian `u16` header, bits 0-1 the kind and bits 2-15
//! the number of words (1..=16383):
//!
//! | kind | after it |
//! |---|---|
//! | 0 literal | that many words, 8 bytes each, as they lie in memory |
//! | 1 repeat | one word, 8 bytes |
//! | 2 zero | nothing |
//!
//! Invariants: what the encoder writes of a word is one reading of it, because a guest may change it
//! meanwhile; it stops when `out` is full and says how many words it covered, at least one
//! when `out` has [`ROOM_MIN`] bytes. The decoder accepts only what fills its buffer exactly.

use core::fmt;

/// Room in which [`encode`] always covers at least one word.
pub const ROOM_MIN: usize = 10;

const KIND_LITERAL: u16 = 0;
const KIND_REPEAT: u16 = 1;
const KIND_ZERO: u16 = 2;
/// Most words in one item.
const COUNT_MAX: u16 = (1 << 14) - 1;
/// Shortest run of an ordinary word that is cheaper as a run (10 bytes, and 2 more for the
/// literal that may follow).
const REPEAT_MIN: u16 = 3;

/// What [`encode`] wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Encoded {
    /// Words covered, from the first one.
    pub words: usize,
    /// Bytes of the buffer used.
    pub len: usize,
}

/// Encodes `words` (as `read` gives them: in memory order, as `u64::from_ne_bytes` of a word's bytes
/// on a little-endian machine) into `out`, as many as fit.
pub fn encode<W>(words: &[W], read: impl Fn(&W) -> u64, out: &mut [u8]) -> Encoded {
    let mut encoder = Encoder {
        out,
        len: 0,
        covered: 0,
        literal: None,
    };
    let mut rest = words;
    // A run costs the same however long, but literal words may not fit: stop reading as soon as
    // nothing more can.
    while let Some((first, after)) = rest.split_first()
        && encoder.room() >= 2
    {
        let value = read(first);
        rest = after;
        let mut count = 1;
        // Most of what is asked for is zero, and long: eight words a look.
        while value == 0
            && count + 8 <= COUNT_MAX
            && let Some((eight, after)) = rest.split_first_chunk::<8>()
            && eight.iter().fold(0, |any, word| any | read(word)) == 0
        {
            rest = after;
            count += 8;
        }
        while count < COUNT_MAX
            && let Some((next, after)) = rest.split_first()
            && read(next) == value
        {
            rest = after;
            count += 1;
        }
        if encoder.flush(value, count).is_none() {
            break;
        }
        let alone = encoder.put_literals(rest, &read);
        rest = rest.get(alone..).unwrap_or_default();
    }
    encoder.result()
}

struct Encoder<'o> {
    out: &'o mut [u8],
    len: usize,
    covered: usize,
    /// The literal item being extended: where its header is, and its words.
    literal: Option<(usize, u16)>,
}

impl Encoder<'_> {
    fn room(&self) -> usize {
        self.out.len().saturating_sub(self.len)
    }

    fn result(mut self) -> Encoded {
        self.end_literal();
        Encoded {
            words: self.covered,
            len: self.len,
        }
    }

    /// Writes a run of `count` equal words, in the cheapest form; `None` when full, with the
    /// part that did fit counted as covered.
    fn flush(&mut self, value: u64, count: u16) -> Option<()> {
        if value == 0 {
            self.put(&header(KIND_ZERO, count))?;
            self.end_literal();
            self.covered += usize::from(count);
        } else if count >= REPEAT_MIN && self.room() >= ROOM_MIN {
            self.put(&header(KIND_REPEAT, count))?;
            self.put(&value.to_le_bytes())?;
            self.end_literal();
            self.covered += usize::from(count);
        } else {
            for _ in 0..count {
                self.put_literal(value)?;
            }
        }
        Some(())
    }

    fn put_literal(&mut self, value: u64) -> Option<()> {
        let (at, count) = match self.literal {
            Some((at, count)) if count < COUNT_MAX && self.room() >= 8 => (at, count),
            Some(_) | None if self.room() >= ROOM_MIN => {
                self.end_literal();
                let at = self.len;
                self.put(&header(KIND_LITERAL, 0))?;
                (at, 0)
            }
            _ => return None,
        };
        self.put(&value.to_le_bytes())?;
        self.literal = Some((at, count + 1));
        self.covered += 1;
        Some(())
    }

    /// Goes on with an open literal, if there is one, as long as no word is zero or like the one after it:
    /// the short way for memory that is neither. Returns how many words that were.
    fn put_literals<W>(&mut self, words: &[W], read: &impl Fn(&W) -> u64) -> usize {
        let (Some((_, count)), Some((first, rest))) = (&mut self.literal, words.split_first())
        else {
            return 0;
        };
        let places = self.out.get_mut(self.len..).unwrap_or_default();
        let places = places.as_chunks_mut::<8>().0;
        let most = usize::from(COUNT_MAX - *count);
        let mut value = read(first);
        let mut alone = 0;
        for (place, next) in places.iter_mut().zip(rest).take(most) {
            let next = read(next);
            if value == 0 || value == next {
                break;
            }
            *place = value.to_le_bytes();
            value = next;
            alone += 1;
        }
        *count += alone as u16;
        self.len += alone * 8;
        self.covered += alone;
        alone
    }

    /// Writes the header of the open literal item: its place was kept.
    fn end_literal(&mut self) {
        if let Some((at, count)) = self.literal.take()
            && let Some(place) = self.out.get_mut(at..at + 2)
        {
            place.copy_from_slice(&header(KIND_LITERAL, count));
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.len.checked_add(bytes.len())?;
        self.out.get_mut(self.len..end)?.copy_from_slice(bytes);
        self.len = end;
        Some(())
    }
}

fn header(kind: u16, count: u16) -> [u8; 2] {
    (kind | count << 2).to_le_bytes()
}

/// Why an encoding was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PagesError {
    /// An item ends before its words do.
    Truncated,
    /// An item of no words.
    EmptyItem,
    /// An item of a kind nobody defined.
    Kind,
    /// More words than the range has.
    TooMany,
    /// Fewer words than the range has.
    TooFew,
    /// The range is not a whole number of words.
    Buffer,
}

impl fmt::Display for PagesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "memory encoding cut short",
            Self::EmptyItem => "memory encoding with an item of no words",
            Self::Kind => "memory encoding with an unknown item",
            Self::TooMany => "memory encoding longer than its range",
            Self::TooFew => "memory encoding shorter than its range",
            Self::Buffer => "memory range is not a whole number of 8-byte words",
        })
    }
}

impl core::error::Error for PagesError {}

/// Decodes into `out`, which must be filled exactly.
///
/// # Errors
/// Any encoding that does not describe exactly `out.len()` bytes; `out` is then unspecified.
pub fn decode(encoding: &[u8], out: &mut [u8]) -> Result<(), PagesError> {
    if !out.len().is_multiple_of(8) {
        return Err(PagesError::Buffer);
    }
    let mut rest = encoding;
    let mut left = out;
    // Each turn consumes at least the header.
    while let Some((head, tail)) = rest.split_first_chunk::<2>() {
        let head = u16::from_le_bytes(*head);
        let bytes = usize::from(head >> 2) * 8;
        if bytes == 0 {
            return Err(PagesError::EmptyItem);
        }
        let (place, beyond) = core::mem::take(&mut left)
            .split_at_mut_checked(bytes)
            .ok_or(PagesError::TooMany)?;
        rest = match head & 3 {
            KIND_LITERAL => {
                let (data, tail) = tail.split_at_checked(bytes).ok_or(PagesError::Truncated)?;
                place.copy_from_slice(data);
                tail
            }
            KIND_REPEAT => {
                let (word, tail) = tail.split_first_chunk::<8>().ok_or(PagesError::Truncated)?;
                place.as_chunks_mut::<8>().0.fill(*word);
                tail
            }
            KIND_ZERO => {
                place.fill(0);
                tail
            }
            _ => return Err(PagesError::Kind),
        };
        left = beyond;
    }
    match (rest, left) {
        ([], []) => Ok(()),
        ([], _) => Err(PagesError::TooFew),
        _ => Err(PagesError::Truncated),
    }
}
