//! The sending side: one pass of checksum and COBS, through a small buffer of blocks into the sink.

use super::{HEADER_LEN, Header, VERSION};
use crate::checksum::Crc32c;
use core::fmt;

/// A payload that does not fit the header's length field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PayloadTooLong(pub usize);

impl fmt::Display for PayloadTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a frame carries at most 65535 bytes, not {}", self.0)
    }
}

impl core::error::Error for PayloadTooLong {}

/// Writes one frame, both delimiters included, to `sink` in slices of at most 512 bytes.
///
/// # Errors
/// [`PayloadTooLong`], before anything was written.
pub fn encode(
    header: &Header,
    payload: &[u8],
    sink: &mut impl FnMut(&[u8]),
) -> Result<(), PayloadTooLong> {
    let mut frame = Encoder::begin(header, payload.len(), sink)?;
    frame.push(payload, sink);
    frame.finish(sink);
    Ok(())
}

/// A frame whose payload comes in parts: what EL2 makes a long one with, in steps.
pub struct Encoder {
    crc: Crc32c,
    blocks: Blocks,
}

impl Encoder {
    /// Begins a frame whose parts will be `len` bytes together. Another length is for the receiver to refuse.
    ///
    /// # Errors
    /// [`PayloadTooLong`], before anything was written.
    pub fn begin(
        header: &Header,
        len: usize,
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<Self, PayloadTooLong> {
        let len = u16::try_from(len).map_err(|_| PayloadTooLong(len))?;
        let mut frame = Self {
            crc: Crc32c::new(),
            blocks: Blocks::new(),
        };
        sink(&[0]);
        frame.push(&header_bytes(header, len), sink);
        Ok(frame)
    }

    /// Adds a part of the payload.
    pub fn push(&mut self, part: &[u8], sink: &mut impl FnMut(&[u8])) {
        self.crc.update(part);
        self.blocks.push(part, sink);
    }

    /// Ends the frame.
    pub fn finish(mut self, sink: &mut impl FnMut(&[u8])) {
        let crc = self.crc.finish();
        self.blocks.push(&crc.to_le_bytes(), sink);
        self.blocks.finish(sink);
        sink(&[0]);
    }
}

fn header_bytes(header: &Header, len: u16) -> [u8; HEADER_LEN] {
    let [seq0, seq1] = header.seq.0.to_le_bytes();
    let [len0, len1] = len.to_le_bytes();
    let [session0, session1] = header.session.0.to_le_bytes();
    let kind = header.kind.to_byte();
    [
        VERSION, kind, 0, 0, seq0, seq1, 0, 0, len0, len1, session0, session1,
    ]
}

/// COBS blocks under construction: whole ones, and an open one from its code on.
struct Blocks {
    out: [u8; OUT],
    /// Where the open block's code goes.
    code: usize,
    /// Bytes of `out` in use, that code's place included.
    used: usize,
    /// Whether the block before the open one was full, so that an empty one may be left out.
    after: After,
}

/// Longest COBS block, its code included.
const BLOCK: usize = 255;
/// From here on, whole blocks go to the sink.
const ENOUGH: usize = 256;
const OUT: usize = ENOUGH + BLOCK + 1;

#[derive(PartialEq, Eq)]
enum After {
    FullBlock,
    Zero,
}

impl Blocks {
    fn new() -> Self {
        Self {
            out: [0; OUT],
            code: 0,
            used: 1,
            after: After::Zero,
        }
    }

    /// The places are kept in registers meanwhile: EL2 does this with nobody looking for an interrupt.
    fn push(&mut self, bytes: &[u8], sink: &mut impl FnMut(&[u8])) {
        let (mut code, mut used) = (self.code, self.used);
        for &byte in bytes {
            if byte != 0 {
                // Always in range: a block that began before `ENOUGH` ends before `OUT`.
                self.out[used % OUT] = byte;
                used = used.wrapping_add(1);
                if used.wrapping_sub(code) != BLOCK {
                    continue;
                }
                self.after = After::FullBlock;
            } else {
                self.after = After::Zero;
            }
            // The open block ends here, and the next one begins.
            self.out[code % OUT] = used.wrapping_sub(code) as u8;
            if used >= ENOUGH {
                sink(&self.out[..used]);
                used = 0;
            }
            code = used;
            used += 1;
        }
        (self.code, self.used) = (code, used);
    }

    fn finish(&mut self, sink: &mut impl FnMut(&[u8])) {
        let open = self.used - self.code;
        if open > 1 || self.after == After::Zero {
            self.out[self.code] = open as u8;
        } else {
            self.used = self.code;
        }
        sink(&self.out[..self.used]);
    }
}
