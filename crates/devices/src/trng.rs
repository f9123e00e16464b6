//! A guest's entropy source: the True Random Number Generator Firmware Interface 1.0 (DEN 0098).
//!
//! [`decode`] names what a call asks for; the caller has the random bytes, and
//! [`Request::answer`] puts as many bits of them as were asked for where the guest looks for
//! them. Pure functions, no concurrency. Any register contents decode.

use crate::status::Status;

/// TRNG_VERSION: 1.0.
pub const VERSION: u64 = 0x1_0000;
/// TRNG_GET_UUID: which generator this is. Not all ones in its first word, which would be an error.
pub const UUID: [u32; 4] = [0x7469_6465, 0x4d41_526b, 0x8b5c_2f1e, 0x6e67_0001];

mod id {
    pub const VERSION: u32 = 0x8400_0050;
    pub const FEATURES: u32 = 0x8400_0051;
    pub const GET_UUID: u32 = 0x8400_0052;
    pub const RND32: u32 = 0x8400_0053;
    pub const RND64: u32 = 0xc400_0053;
}

/// Whether the guest gets entropy by these calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Write these to x0 to x3.
    Answer([u64; 4]),
    /// Give random bits: [`Request::answer`].
    Random(Request),
}

/// A checked request for bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    bits: u32,
    /// Bits of a register of this call's convention: 32 or 64.
    width: u32,
}

/// Bytes that the largest request takes.
pub const LARGEST: usize = 24;

impl Request {
    fn new(bits: u64, width: u32) -> Option<Self> {
        let bits = u32::try_from(bits).ok()?;
        (1..=3 * width)
            .contains(&bits)
            .then_some(Self { bits, width })
    }

    /// The registers of the answer: the lowest bits in x3, then x2, then x1 (DEN 0098, 2.5). Bits
    /// that were not asked for are zero.
    pub fn answer(self, random: [u8; LARGEST]) -> [u64; 4] {
        let mut words = random.chunks_exact(8).map(|bytes| {
            let bytes = bytes.first_chunk().copied().unwrap_or_default();
            u64::from_le_bytes(bytes)
        });
        let mut left = self.bits;
        let mut next = || {
            let bits = left.min(self.width);
            left -= bits;
            // Shifted in two steps: all 64 are no shift that there is.
            words.next().unwrap_or(0) & !(!0 << (bits / 2) << (bits - bits / 2))
        };
        let (x3, x2, x1) = (next(), next(), next());
        [Status::Success.register(), x1, x2, x3]
    }
}

/// Decodes a call by its function identifier and its first argument; `None` where it is none of these.
pub fn decode(function: u32, first: u64) -> Option<Call> {
    let error = |status: Status| Call::Answer([status.register(), 0, 0, 0]);
    let random =
        |width| Request::new(first, width).map_or(error(Status::InvalidParameters), Call::Random);
    Some(match function {
        id::VERSION => Call::Answer([VERSION, 0, 0, 0]),
        id::FEATURES => match first as u32 {
            id::VERSION | id::FEATURES | id::GET_UUID | id::RND32 | id::RND64 => {
                Call::Answer([0; 4])
            }
            _ => error(Status::NotSupported),
        },
        id::GET_UUID => Call::Answer(UUID.map(u64::from)),
        id::RND32 => random(32),
        id::RND64 => random(64),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOT_SUPPORTED: [u64; 4] = [-1i64 as u64, 0, 0, 0];
    const INVALID: [u64; 4] = [-2i64 as u64, 0, 0, 0];

    #[test]
    fn fixed_answers() {
        for (function, first, answer) in [
            (0x8400_0050, 0, [0x1_0000, 0, 0, 0]),
            (0x8400_0051, 0x8400_0050, [0; 4]),
            (0x8400_0051, 0x8400_0051, [0; 4]),
            (0x8400_0051, 0x8400_0052, [0; 4]),
            (0x8400_0051, 0x8400_0053, [0; 4]),
            (0x8400_0051, 0xc400_0053, [0; 4]),
            (0x8400_0051, 0xc400_0050, NOT_SUPPORTED),
            (0x8400_0051, 0x8400_0000, NOT_SUPPORTED),
            (0x8400_0051, u64::MAX, NOT_SUPPORTED),
            (0x8400_0052, 0, UUID.map(u64::from)),
            (0x8400_0053, 0, INVALID),
            (0x8400_0053, 97, INVALID),
            (0x8400_0053, 0xffff_ffff, INVALID),
            (0xc400_0053, 0, INVALID),
            (0xc400_0053, 193, INVALID),
            (0xc400_0053, 1 << 32 | 8, INVALID),
            (0xc400_0053, u64::MAX, INVALID),
        ] {
            assert_eq!(decode(function, first), Some(Call::Answer(answer)));
        }
        for function in [0x8400_004f, 0x8400_0054, 0xc400_0050, 0xc400_0052, 0] {
            assert_eq!(decode(function, 1), None, "{function:#x}");
        }
        assert_ne!(UUID[0], u32::MAX);
    }

    /// As many bits as were asked for, from the bottom of x3 up, and none beside them.
    #[test]
    fn bits_are_where_the_guest_looks_for_them() {
        for (function, width) in [(0x8400_0053, 32), (0xc400_0053, 64)] {
            for bits in 1..=3 * width {
                let Some(Call::Random(request)) = decode(function, bits) else {
                    panic!("{bits} bits are refused");
                };
                let [status, x1, x2, x3] = request.answer([0xff; LARGEST]);
                assert_eq!(status, 0);
                for (place, word) in [x3, x2, x1].into_iter().enumerate() {
                    let here = bits.saturating_sub(place as u64 * width).min(width);
                    let wanted = if here == 64 { !0 } else { (1 << here) - 1 };
                    assert_eq!(word, wanted, "{bits} bits by {width}, word {place}");
                }
                assert_eq!(request.answer([0; LARGEST]), [0; 4]);
            }
        }
    }
}
