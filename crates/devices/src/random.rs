//! Random bytes for guests, made of whatever entropy there is.
//!
//! A [`Generator`] is SHA-256 keyed with a 256-bit secret: each request hashes the secret with a
//! counter for its output and then, under another label, for the next secret (fast key erasure),
//! so that what was given out cannot be found again from what is kept. What is hashed for output
//! has one length, which leaves no room for extension. Seeding hashes the old secret
//! with the new material: entropy is only ever added.
//!
//! No concurrency: its owner holds it behind a lock. It is as good as its seeds; where they come
//! from is the owner's affair, and so is saying it.

use sha2::{Digest, Sha256};

/// Bytes of a secret, and of one block of output.
const BLOCK: usize = 32;

/// What a hash is for: no two uses can give the same output.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Label {
    Seed,
    Output,
    Next,
}

/// A deterministic generator.
pub struct Generator {
    secret: [u8; BLOCK],
}

impl Generator {
    /// One that nobody has seeded: its output is known to all.
    pub const fn new() -> Self {
        Self { secret: [0; BLOCK] }
    }

    fn hash(&self, label: Label, rest: &[u8]) -> [u8; BLOCK] {
        Sha256::new()
            .chain_update([label as u8])
            .chain_update(self.secret)
            .chain_update(rest)
            .finalize()
            .into()
    }

    /// Mixes material in, whatever it is worth.
    pub fn seed(&mut self, material: &[u8]) {
        self.secret = self.hash(Label::Seed, material);
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        for (number, part) in out.chunks_mut(BLOCK).enumerate() {
            let block = self.hash(Label::Output, &(number as u64).to_le_bytes());
            for (to, from) in part.iter_mut().zip(block) {
                *to = from;
            }
        }
        self.secret = self.hash(Label::Next, &[]);
    }

    /// So many bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        self.fill(&mut out);
        out
    }
}

impl Default for Generator {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeded(material: &[u8]) -> Generator {
        let mut generator = Generator::new();
        generator.seed(material);
        generator
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_no_other_does() {
        assert_eq!(seeded(b"a").bytes::<100>(), seeded(b"a").bytes::<100>());
        assert_ne!(seeded(b"a").bytes::<16>(), seeded(b"b").bytes::<16>());
        let mut again = seeded(b"a");
        again.seed(b"");
        assert_ne!(again.bytes::<16>(), seeded(b"a").bytes::<16>());
    }

    /// Known answers, by hashlib: SHA-256 of (label, secret, rest).
    #[test]
    fn known_answers() {
        let hex = |bytes: [u8; 40]| bytes.map(|byte| std::format!("{byte:02x}")).concat();
        let mut generator = seeded(b"tidemark");
        assert_eq!(hex(generator.bytes()), FIRST);
        assert_eq!(hex(generator.bytes()), SECOND);
    }

    const FIRST: &str =
        "b8dd23f4d6f47350cd905dc95a23c93163f05bf183f55abb9e3aa33515ada029acd409394ede4585";
    const SECOND: &str =
        "86e7b2b3e6f099abca848e3a0e4acb825d4b0a6e6eb09bfc47490ea96aae2a058c98bac9d8863604";

    #[test]
    fn no_output_repeats() {
        let mut generator = seeded(b"x");
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            for block in generator.bytes::<64>().chunks(8) {
                assert!(seen.insert(block.to_vec()));
            }
            // The secret is never what was given out.
            assert!(!seen.contains(&generator.secret[..8]));
        }
    }

    /// 64 KiB with as many ones as zeros, within six deviations.
    #[test]
    fn bits_are_balanced() {
        let ones: u32 = (0..1024)
            .scan(seeded(b"y"), |generator, _| Some(generator.bytes::<64>()))
            .flatten()
            .map(u8::count_ones)
            .sum();
        assert!(ones.abs_diff(1 << 18) < 6 * 362, "{ones}");
    }
}
