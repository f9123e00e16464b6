//! Frames on a line that people also read.
//!
//! Purpose: `00 | COBS(header, payload, CRC-32C LE) | 00`. Text never contains 00, so what
//! lies outside a valid frame is console text and is passed through byte by byte.
//!
//! Header, 12 bytes, little-endian: `version u8, kind u8, flags u8, channel u8, seq u16,
//! ack u16, len u16, session u16`. The CRC covers header and payload.
//!
//! Invariants:
//! - After every 00 a frame may begin; neither end counts delimiters. A lost or inserted 00
//!   therefore costs the frame it fell into, never the ones after it, and two neighbouring
//!   frames may share one 00.
//! - A frame begins with a COBS code of 2..=7 (the version is not zero, the acknowledgement
//!   is). Any other byte after a 00 is text at once, so nobody waits for text that merely
//!   follows a frame.
//! - The decoder's memory is bounded by its const parameter; an over-long frame is given up.
//! - A bad frame yields its reason and what a person could read in it: text that was
//!   written into the middle of a frame is not lost.
//!
//! Concurrency: the encoder is a function, the decoder a value with one owner.

mod decode;
mod encode;

pub use decode::{Bad, BadReason, Decoder, Item};
pub use encode::{Encoder, PayloadTooLong, encode};

use core::fmt;

/// Version of the frame layout itself (the messages have their own, [`crate::PROTOCOL`]).
pub const VERSION: u8 = 1;

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

/// Bytes of the CRC that ends a frame.
pub const CRC_LEN: usize = 4;

/// Flags a receiver must refuse if it does not know them (none is defined yet).
pub const MUST_UNDERSTAND: u8 = 0xF0;

/// Returns the bytes between the delimiters of a frame with `payload` bytes, at most:
/// the buffer a [`Decoder`] needs for it.
#[must_use]
pub const fn buffer_len(payload: usize) -> usize {
    let plain = HEADER_LEN + payload + CRC_LEN;
    plain + plain.div_ceil(254)
}

/// A conversation between one host program and the target; never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Session(pub u16);

/// Number of a request within its session, repeated by its response. Events count alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Seq(pub u16);

impl Seq {
    /// Returns the number after this one; it wraps.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// Host to target: a [`crate::message::Request`].
    Request,
    /// Target to host: the one [`crate::message::Response`] to a request.
    Response,
    /// Target to host, unasked: a [`crate::message::Event`].
    Event,
}

impl Kind {
    /// Returns the byte that stands for it.
    #[must_use]
    pub const fn to_byte(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Event => 3,
        }
    }

    /// Reads the byte that stands for it.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Request),
            2 => Some(Self::Response),
            3 => Some(Self::Event),
            _ => None,
        }
    }
}

/// The header less what the codec fills in itself (version and length), and less the
/// fields that are always 0 in this version (flags, channel, acknowledgement).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// Which request it is or answers.
    pub seq: Seq,
    /// Whose it is.
    pub session: Session,
}

/// A frame that arrived whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Its payload: one postcard message.
    pub payload: &'a [u8],
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}
