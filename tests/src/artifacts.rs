//! Where the things under test are, and what to run when one is missing.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// What the build puts under `target/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Artifact {
    /// The EL2 image as a boot loader takes it.
    Image,
    /// Debian's kernel.
    Kernel,
    /// Busybox, `/init`, and the load program.
    Initramfs,
    /// Debian's U-Boot for `virt`.
    UBoot,
    /// Debian's EDK2 for `virt`.
    Edk2,
    /// The guest that writes pages and says which.
    Oracle,
    /// The guest that measures.
    Bench,
    /// The guest that does what no guest may.
    Hostile,
    /// The host's tool, for what only a process of its own can have happen to it.
    Tidectl,
}

impl Artifact {
    /// Its path under `target/`.
    fn relative(self) -> &'static str {
        match self {
            Self::Image => "image/tidemark.img",
            Self::Kernel => "guests/Image",
            Self::Initramfs => "guests/initramfs.cpio.gz",
            Self::UBoot => "guests/u-boot.bin",
            Self::Edk2 => "guests/QEMU_EFI.fd",
            Self::Oracle => "guests/oracle.img",
            Self::Bench => "guests/bench.img",
            Self::Hostile => "guests/hostile.img",
            Self::Tidectl => "debug/tidectl",
        }
    }

    /// What makes it.
    fn maker(self) -> &'static str {
        match self {
            Self::Image => "make image",
            Self::Tidectl => "make tools",
            _ => "make guests",
        }
    }

    /// Its path, if it has been built. `TIDEMARK_IMAGE` names another image to be tested.
    pub fn path(self) -> Result<PathBuf> {
        let other = std::env::var_os("TIDEMARK_IMAGE").filter(|_| self == Self::Image);
        let path = target_dir().join(other.unwrap_or_else(|| self.relative().into()));
        if !path.is_file() {
            bail!(
                "{} is not there yet; `{}` makes it",
                path.display(),
                self.maker()
            );
        }
        Ok(path)
    }
}

/// The root of the source tree this was built from.
#[must_use]
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where the machine files are.
#[must_use]
pub fn machines_dir() -> PathBuf {
    root().join("qemu")
}

/// Where artefacts are read from and results are written to: `TIDEMARK_TARGET`, else
/// `target/` of the source tree.
#[must_use]
pub fn target_dir() -> PathBuf {
    match std::env::var_os("TIDEMARK_TARGET") {
        Some(path) if !path.is_empty() => PathBuf::from(path),
        _ => root().join("target"),
    }
}
