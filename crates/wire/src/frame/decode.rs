//! The receiving side: bytes from an untrusted line in, frames and text out.

use super::{CRC_LEN, Frame, HEADER_LEN, Header, Kind, MUST_UNDERSTAND, Seq, Session, VERSION};
use crate::checksum::{Crc32c, RESIDUE};
use core::fmt;

/// Shortest run of printable bytes in a bad frame that is taken for text. Binary payload
/// has printable bytes too; four in a row are rare enough there and short enough here.
const TEXT_RUN_MIN: usize = 4;

/// What a byte completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Item<'a> {
    /// A whole, checked frame.
    Frame(Frame<'a>),
    /// A byte outside any frame.
    Text(u8),
    /// Something between two delimiters that is not a frame.
    Bad(Bad<'a>),
}

/// A frame that is not one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bad<'a> {
    /// Why.
    pub reason: BadReason,
    /// What a person could read in it (printable runs, joined).
    pub text: &'a [u8],
}

/// Why a frame was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum BadReason {
    /// More bytes than any frame the receiver agreed to.
    TooLong,
    /// Fewer bytes than a header and a CRC.
    TooShort,
    /// A COBS code points past the end.
    Stuffing,
    /// The CRC does not match.
    Crc,
    /// The CRC matches, but the frame layout is another version.
    Version(u8),
    /// The CRC matches, but the kind is not known.
    Kind(u8),
    /// The CRC matches, but a must-understand flag is not known.
    Flags(u8),
    /// The CRC matches, but the length field does not.
    Length,
    /// The stream ended inside the frame.
    Ended,
}

impl fmt::Display for BadReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => f.write_str("frame longer than agreed"),
            Self::TooShort => f.write_str("frame shorter than a header"),
            Self::Stuffing => f.write_str("frame cut short or overwritten (COBS)"),
            Self::Crc => f.write_str("frame damaged (CRC-32C)"),
            Self::Version(v) => write!(f, "frame layout version {v}, this end knows {VERSION}"),
            Self::Kind(k) => write!(f, "frame of unknown kind {k}"),
            Self::Flags(b) => write!(f, "frame flags {b:#04x} must be understood and are not"),
            Self::Length => f.write_str("frame length field does not match"),
            Self::Ended => f.write_str("stream ended inside a frame"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Bytes are text until the next 00.
    Text,
    /// A 00 was the last byte: a frame may begin.
    Begin,
    /// Bytes go to the buffer until the next 00.
    Inside,
    /// The frame was too long: printable bytes are text, the rest is dropped.
    Skip,
}

/// Decoder with room for `N` bytes between delimiters; see [`super::buffer_len`].
pub struct Decoder<const N: usize> {
    raw: [u8; N],
    len: usize,
    decoded: [u8; N],
    state: State,
}

impl<const N: usize> Default for Decoder<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Decoder<N> {
    /// Starts in text.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            raw: [0; N],
            len: 0,
            decoded: [0; N],
            state: State::Text,
        }
    }

    /// Takes one byte and returns what it completed.
    pub fn push(&mut self, byte: u8) -> Option<Item<'_>> {
        match (self.state, byte) {
            (State::Text | State::Begin | State::Skip, 0) => {
                self.state = State::Begin;
                self.len = 0;
                None
            }
            (State::Text, _) => Some(Item::Text(byte)),
            (State::Skip, _) => is_printable(byte).then_some(Item::Text(byte)),
            (State::Begin, 2..=7) => {
                self.state = State::Inside;
                self.len = 0;
                self.keep(byte)
            }
            (State::Begin, _) => {
                self.state = State::Text;
                Some(Item::Text(byte))
            }
            (State::Inside, 0) => {
                self.state = State::Begin;
                Some(self.complete())
            }
            (State::Inside, _) => self.keep(byte),
        }
    }

    /// Tells that the stream has ended; returns what was left inside an open frame.
    pub fn finish(&mut self) -> Option<Item<'_>> {
        let open = self.state == State::Inside;
        self.state = State::Text;
        open.then(|| self.bad(BadReason::Ended))
    }

    /// Forgets an open frame and starts in text.
    pub fn reset(&mut self) {
        self.state = State::Text;
        self.len = 0;
    }

    fn keep(&mut self, byte: u8) -> Option<Item<'_>> {
        if let Some(place) = self.raw.get_mut(self.len) {
            *place = byte;
            self.len += 1;
            None
        } else {
            self.state = State::Skip;
            Some(self.bad(BadReason::TooLong))
        }
    }

    fn complete(&mut self) -> Item<'_> {
        match self.unstuff() {
            Ok((header, payload_len)) => {
                // `unstuff` checked that header, payload and CRC are in `decoded`.
                let payload = self.decoded.get(HEADER_LEN..HEADER_LEN + payload_len);
                Item::Frame(Frame {
                    header,
                    payload: payload.unwrap_or(&[]),
                })
            }
            Err(reason) => self.bad(reason),
        }
    }

    /// Undoes COBS into `decoded` and checks all there is to check.
    fn unstuff(&mut self) -> Result<(Header, usize), BadReason> {
        let mut rest = self.raw.get(..self.len).unwrap_or(&[]);
        let mut len = 0;
        let mut crc = Crc32c::new();
        // Each turn consumes at least the code byte.
        while let Some((&code, tail)) = rest.split_first() {
            let run = usize::from(code)
                .checked_sub(1)
                .ok_or(BadReason::Stuffing)?;
            let (data, tail) = tail.split_at_checked(run).ok_or(BadReason::Stuffing)?;
            let zero: &[u8] = if code != 255 && !tail.is_empty() {
                &[0]
            } else {
                &[]
            };
            for part in [data, zero] {
                let place = self.decoded.get_mut(len..len + part.len());
                place.ok_or(BadReason::TooLong)?.copy_from_slice(part);
                crc.update(part);
                len += part.len();
            }
            rest = tail;
        }
        if len < HEADER_LEN + CRC_LEN {
            return Err(BadReason::TooShort);
        }
        if crc.finish() != RESIDUE {
            return Err(BadReason::Crc);
        }
        let head: &[u8; HEADER_LEN] = self.decoded.first_chunk().ok_or(BadReason::TooShort)?;
        let &[version, kind, flags, _channel, s0, s1, _, _, l0, l1, i0, i1] = head;
        if version != VERSION {
            return Err(BadReason::Version(version));
        }
        if flags & MUST_UNDERSTAND != 0 {
            return Err(BadReason::Flags(flags));
        }
        let kind = Kind::from_byte(kind).ok_or(BadReason::Kind(kind))?;
        let payload_len = usize::from(u16::from_le_bytes([l0, l1]));
        if payload_len != len - HEADER_LEN - CRC_LEN {
            return Err(BadReason::Length);
        }
        let seq = Seq(u16::from_le_bytes([s0, s1]));
        let session = Session(u16::from_le_bytes([i0, i1]));
        Ok((Header { kind, seq, session }, payload_len))
    }

    /// Reports the bytes held as bad, with their printable runs gathered in `decoded`.
    fn bad(&mut self, reason: BadReason) -> Item<'_> {
        let raw = self.raw.get(..self.len).unwrap_or(&[]);
        let mut kept = 0;
        for run in raw.split(|&byte| !is_printable(byte)) {
            if run.len() >= TEXT_RUN_MIN
                && let Some(place) = self.decoded.get_mut(kept..kept + run.len())
            {
                place.copy_from_slice(run);
                kept += run.len();
            }
        }
        Item::Bad(Bad {
            reason,
            text: self.decoded.get(..kept).unwrap_or(&[]),
        })
    }
}

/// Tells whether a terminal shows `byte` as it is.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t')
}
