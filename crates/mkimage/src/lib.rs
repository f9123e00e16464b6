//! Turns what the linker made into what a boot loader takes.
//!
//! - [`image`] makes the hypervisor's flat arm64 Image: the loadable segments at their
//!   places, the header checked, and the function names written into the room that the
//!   linker script reserved for them.
//! - [`mod@flat`] only flattens, which is all that the bare-metal guests need.
//! - [`initramfs`] packs a directory as a Linux initial file system.
//!
//! Everything is a pure function from bytes to bytes (the directory walk apart), so the
//! same input always gives the same output, and `src/main.rs` is only arguments and files.

#![forbid(unsafe_code)]

pub mod elf;
pub mod flat;
pub mod header;
pub mod initramfs;
pub mod symbols;

use elf::Elf;
use flat::Flat;

pub use elf::Error as ElfError;

/// What went wrong, in words that name the thing and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input is not an ELF this tool takes.
    #[error(transparent)]
    Elf(#[from] elf::Error),
    /// The segments cannot be laid out flat.
    #[error(transparent)]
    Flat(#[from] flat::Error),
    /// The arm64 Image header is missing or wrong.
    #[error(transparent)]
    Header(#[from] header::Error),
    /// The function names cannot be put into the image.
    #[error(transparent)]
    Symbols(#[from] symbols::Error),
}

/// A finished image, with what was left out of it.
#[derive(Debug)]
pub struct Image {
    /// What goes into the file.
    pub bytes: Vec<u8>,
    /// How the function names fitted.
    pub symbols: symbols::Fit,
}

/// Makes the hypervisor's image: flat, header checked, function names filled in.
///
/// # Errors
///
/// When the ELF is not what the image's loader code can run; see [`Error`].
pub fn image(elf_bytes: &[u8]) -> Result<Image, Error> {
    let elf = Elf::parse(elf_bytes)?;
    let mut flat = Flat::new(&elf)?;
    header::check(&flat)?;
    let symbols = symbols::fill(&elf, &mut flat)?;
    Ok(Image {
        bytes: flat.into_bytes(),
        symbols,
    })
}

/// Flattens only. If there is an arm64 Image header, it must be right; a payload
/// without one is loaded by address and needs none.
///
/// # Errors
///
/// When the ELF cannot be laid out flat, or its Image header is wrong.
pub fn flat(elf_bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let elf = Elf::parse(elf_bytes)?;
    let flat = Flat::new(&elf)?;
    match header::check(&flat) {
        Ok(()) | Err(header::Error::NoMagic { .. }) => Ok(flat.into_bytes()),
        Err(error) => Err(error.into()),
    }
}
