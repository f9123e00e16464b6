//! Unpacking: on arm64 that is the boot loader's work, so it is done before the bundle is made.

use super::KernelError;
use std::io::Read;

/// The most that comes out, as in QEMU: what unpacks to more is no kernel.
pub const LARGEST: u64 = 256 << 20;

/// Unpacks gzip, zstd and EFI zboot; what is neither comes back as it is.
///
/// # Errors
/// It is packed otherwise, broken, or too large.
pub fn unpack(file: Vec<u8>) -> Result<Vec<u8>, KernelError> {
    if let Some(zboot) = Zboot::read(&file) {
        let unpacked = zboot.unpack()?;
        return match unpacked.get(0x38..0x3c) {
            Some(b"ARM\x64") => Ok(unpacked),
            _ => Err(KernelError::OtherZboot),
        };
    }
    match Packing::of(&file) {
        None => Ok(file),
        Some(packing) => {
            let unpacked = packing.unpack(&file)?;
            match Packing::of(&unpacked) {
                None => Ok(unpacked),
                Some(again) => Err(KernelError::Packed(again.name(), "it was packed twice")),
            }
        }
    }
}

/// Unpacks gzip, as QEMU does for firmware, and zstd; what is neither comes back as it is: EFI zboot is a program that
/// unpacks itself, and firmware may know what to do with others.
///
/// # Errors
/// It is broken, or too large.
pub fn unpack_for_firmware(file: Vec<u8>) -> Result<Vec<u8>, KernelError> {
    match Packing::of(&file) {
        Some(packing @ (Packing::Gzip | Packing::Zstd)) => packing.unpack(&file),
        _ => Ok(file),
    }
}

/// How a file begins that is packed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Packing {
    Gzip,
    Zstd,
    Xz,
    Lzma,
    Bzip2,
    Lz4,
    Lzo,
}

impl Packing {
    const MAGICS: [(&'static [u8], Self); 8] = [
        (&[0x1f, 0x8b], Self::Gzip),
        (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], Self::Xz),
        (&[0x5d, 0, 0], Self::Lzma),
        (b"BZh", Self::Bzip2),
        (&[0x04, 0x22, 0x4d, 0x18], Self::Lz4),
        (&[0x02, 0x21, 0x4c, 0x18], Self::Lz4),
        (&[0x89, b'L', b'Z', b'O'], Self::Lzo),
    ];

    fn of(bytes: &[u8]) -> Option<Self> {
        let found = |(magic, _): &&(&[u8], Self)| bytes.starts_with(magic);
        Self::MAGICS.iter().find(found).map(|&(_, packing)| packing)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lz4 => "lz4",
            Self::Lzo => "lzo",
        }
    }

    /// Unpacks the first stream in `bytes`. What follows it is no part of it: zboot puts the
    /// unpacked length there, and boot loaders pad.
    fn unpack(self, bytes: &[u8]) -> Result<Vec<u8>, KernelError> {
        let by_hand = |command| Err(KernelError::Packed(self.name(), command));
        match self {
            Self::Gzip => self.drain(flate2::read::GzDecoder::new(bytes)),
            Self::Zstd => {
                let stream = ruzstd::decoding::StreamingDecoder::new(bytes);
                let stream =
                    stream.map_err(|error| KernelError::Damaged(self.name(), error.to_string()))?;
                self.drain(stream)
            }
            Self::Xz => by_hand("xz -dc FILE > Image"),
            Self::Lzma => by_hand("lzma -dc FILE > Image"),
            Self::Bzip2 => by_hand("bzip2 -dc FILE > Image"),
            Self::Lz4 => by_hand("lz4 -dc FILE > Image"),
            Self::Lzo => by_hand("lzop -dc FILE > Image"),
        }
    }

    fn drain(self, stream: impl Read) -> Result<Vec<u8>, KernelError> {
        let mut out = Vec::new();
        // One byte more than allowed tells "too large" from "just fits".
        stream
            .take(LARGEST + 1)
            .read_to_end(&mut out)
            .map_err(|error| KernelError::Damaged(self.name(), error.to_string()))?;
        if out.len() as u64 > LARGEST {
            return Err(KernelError::TooLarge);
        }
        Ok(out)
    }
}

/// An EFI program with a kernel packed in it (Linux, `drivers/firmware/efi/libstub/zboot-header.S`).
struct Zboot<'a> {
    payload: Option<&'a [u8]>,
    packing: &'a [u8],
}

impl<'a> Zboot<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        const LINUX_PE_MAGIC: [u8; 4] = [0xcd, 0x23, 0x82, 0x81];
        let is = |at: usize, magic: &[u8]| bytes.get(at..at + magic.len()) == Some(magic);
        if !is(0, b"MZ") || !is(4, b"zimg") || !is(0x38, &LINUX_PE_MAGIC) {
            return None;
        }
        let word = |at: usize| {
            let bytes = bytes.get(at..)?.first_chunk()?;
            usize::try_from(u32::from_le_bytes(*bytes)).ok()
        };
        let payload = || {
            let start = word(8)?;
            bytes.get(start..start.checked_add(word(12)?)?)
        };
        Some(Self {
            payload: payload(),
            packing: bytes.get(24..56)?.split(|&byte| byte == 0).next()?,
        })
    }

    fn unpack(&self) -> Result<Vec<u8>, KernelError> {
        const BY_HAND: &str = "take the Image that the kernel's build leaves beside it";
        let packing = match self.packing {
            b"gzip" => Packing::Gzip,
            b"zstd" | b"zstd22" => Packing::Zstd,
            b"xz" | b"xzkern" => return Err(KernelError::Packed("xz", BY_HAND)),
            b"lzma" => return Err(KernelError::Packed("lzma", BY_HAND)),
            b"lz4" => return Err(KernelError::Packed("lz4", BY_HAND)),
            b"lzo" => return Err(KernelError::Packed("lzo", BY_HAND)),
            _ => return Err(KernelError::Packed("an unknown packer", BY_HAND)),
        };
        let payload = self.payload.ok_or_else(|| {
            KernelError::Damaged("EFI zboot", "the packed part is not all there".into())
        })?;
        packing.unpack(payload)
    }
}
