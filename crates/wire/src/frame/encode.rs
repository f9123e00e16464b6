//! The sending side: COBS through one 255-byte block, straight into the sink.

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

/// Writes one frame, both delimiters included, to `sink` in slices of at most 255 bytes.
///
/// # Errors
/// [`PayloadTooLong`], before anything was written.
pub fn encode(
    header: &Header,
    payload: &[u8],
    sink: &mut impl FnMut(&[u8]),
) -> Result<(), PayloadTooLong> {
    let len = u16::try_from(payload.len()).map_err(|_| PayloadTooLong(payload.len()))?;
    let head = header_bytes(header, len);
    let mut crc = Crc32c::new();
    crc.update(&head);
    crc.update(payload);

    sink(&[0]);
    let mut blocks = Blocks::new(sink);
    blocks.push(&head);
    blocks.push(payload);
    blocks.push(&crc.finish().to_le_bytes());
    blocks.finish();
    sink(&[0]);
    Ok(())
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

/// One COBS block under construction: `block[0]` is left for the code.
struct Blocks<'s, S: FnMut(&[u8])> {
    sink: &'s mut S,
    block: [u8; 255],
    /// Bytes of `block` in use, the code included.
    used: usize,
    /// Whether the block before this one was full, so that an empty one may be left out.
    after_full: After,
}

#[derive(PartialEq, Eq)]
enum After {
    FullBlock,
    Zero,
}

impl<'s, S: FnMut(&[u8])> Blocks<'s, S> {
    fn new(sink: &'s mut S) -> Self {
        Self {
            sink,
            block: [0; 255],
            used: 1,
            after_full: After::Zero,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == 0 {
                self.flush(After::Zero);
            } else {
                self.block[self.used] = byte;
                self.used += 1;
                if self.used == 255 {
                    self.flush(After::FullBlock);
                }
            }
        }
    }

    fn flush(&mut self, next: After) {
        // `used` is at most 255: the full block is flushed as soon as it is full.
        self.block[0] = self.used as u8;
        (self.sink)(&self.block[..self.used]);
        self.used = 1;
        self.after_full = next;
    }

    fn finish(mut self) {
        if self.used > 1 || self.after_full == After::Zero {
            self.flush(After::Zero);
        }
    }
}
