//! The page size that an arm64 kernel is built for, and whether a CPU has it.
//!
//! A kernel finds out for itself, before it can print anything, and then waits for ever. Its header says it beforehand
//! (Linux, Documentation/arch/arm64/booting.rst), and so both ends can tell.

use core::fmt;

/// Where the header's magic number is, and what it is.
const MAGIC: (usize, &[u8; 4]) = (0x38, b"ARM\x64");
/// Where its flags are, 64 bits.
const FLAGS: usize = 24;

/// A translation granule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Granule {
    /// 4 KiB.
    K4,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl fmt::Display for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::K4 => "4 KiB",
            Self::K16 => "16 KiB",
            Self::K64 => "64 KiB",
        })
    }
}

impl Granule {
    /// What an Image's header says; `None` for what is no Image, or says nothing.
    #[must_use]
    pub fn of_image(image: &[u8]) -> Option<Self> {
        let (at, magic) = MAGIC;
        if image.get(at..)?.get(..magic.len())? != magic {
            return None;
        }
        let flags = image.get(FLAGS..)?.first_chunk()?;
        match u64::from_le_bytes(*flags) >> 1 & 3 {
            1 => Some(Self::K4),
            2 => Some(Self::K16),
            3 => Some(Self::K64),
            _ => None,
        }
    }

    /// Whether a CPU with this ID_AA64MMFR0_EL1 has it at stage 1 (Arm ARM, D24.2.74).
    #[must_use]
    pub fn is_in(self, mmfr0: u64) -> bool {
        let field = |from: u32| mmfr0 >> from & 0xf;
        match self {
            // TGran4 and TGran64 are signed: 0xf is none. TGran16 is not: 0 is none.
            Self::K4 => field(28) != 0xf,
            Self::K16 => field(20) != 0,
            Self::K64 => field(24) != 0xf,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn headers_say_the_page_size() {
        let mut image = vec![0; 64];
        assert_eq!(Granule::of_image(&image), None);
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        // With the bits around them set too.
        for (bits, granule) in [
            (0, None),
            (1, Some(Granule::K4)),
            (2, Some(Granule::K16)),
            (3, Some(Granule::K64)),
        ] {
            image[FLAGS] = bits << 1 | 0b1001;
            assert_eq!(Granule::of_image(&image), granule);
        }
        for len in 0..64 {
            let cut = Granule::of_image(&image[..len]);
            assert!(cut.is_none() || len >= 0x3c, "{len}");
        }
    }

    #[test]
    fn cpus_say_what_they_have() {
        // Cortex-A72: 4 and 64 KiB. Cortex-A76: all.
        let (a72, a76) = (0x1124, 0x10_1122);
        let has = |mmfr0| [Granule::K4, Granule::K16, Granule::K64].map(|g| g.is_in(mmfr0));
        assert_eq!(has(a72), [true, false, true]);
        assert_eq!(has(a76), [true, true, true]);
        assert_eq!(has(0xff00_0000), [false, false, false]);
    }
}
