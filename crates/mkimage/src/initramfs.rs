//! A directory as a Linux initial file system: cpio in the "newc" form
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Written here rather than with cpio(1), which is not installed everywhere, cannot make
//! device nodes without root, and stores times and inode numbers that differ from build
//! to build. Here everything belongs to root, the time is zero and the order is by name.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// Why a directory cannot be packed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something in it cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A socket, a pipe, a device.
    #[error(
        "{0} is neither file, directory nor link; the device nodes that /init needs are added here, take it out"
    )]
    Kind(PathBuf),
    /// A name that is not text.
    #[error("{0:?}: a name in the initramfs must be valid UTF-8; rename it")]
    Name(PathBuf),
    /// More than the format's 32-bit length can say.
    #[error("{0} is 4 GiB or longer, which an initramfs cannot hold")]
    TooLong(PathBuf),
}

/// A character device: what the kernel's console and the shell need before devtmpfs.
struct Device {
    name: &'static str,
    mode: u32,
    major: u32,
    minor: u32,
}

/// The kernel opens /dev/console for /init before anything could make it.
const DEVICES: [Device; 2] = [
    Device {
        name: "dev/console",
        mode: 0o600,
        major: 5,
        minor: 1,
    },
    Device {
        name: "dev/null",
        mode: 0o666,
        major: 1,
        minor: 3,
    },
];

/// Packs `directory`, uncompressed, with the device nodes.
///
/// # Errors
///
/// When something in it cannot be read or cannot be in an initramfs.
pub fn pack(directory: &Path) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::default();
    add_directory(&mut archive, directory, "")?;
    if !directory.join("dev").is_dir() {
        archive.entry("dev", DIRECTORY | 0o755, (0, 0), b"");
    }
    for device in &DEVICES {
        archive.entry(
            device.name,
            CHARACTER | device.mode,
            (device.major, device.minor),
            b"",
        );
    }
    Ok(archive.finish())
}

fn add_directory(archive: &mut Archive, directory: &Path, prefix: &str) -> Result<(), Error> {
    let reading = |error| Error::Read {
        path: directory.to_path_buf(),
        error,
    };
    let mut paths = fs::read_dir(directory)
        .map_err(reading)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(reading)?;
    paths.sort();
    for path in paths {
        let reading = |error| Error::Read {
            path: path.clone(),
            error,
        };
        let file_name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| Error::Name(path.clone()))?;
        let name = format!("{prefix}{file_name}");
        let metadata = fs::symlink_metadata(&path).map_err(reading)?;
        let kind = metadata.file_type();
        // Only "may be run" is taken from the file: the rest depends on the builder's umask.
        let mode = match metadata.permissions().mode() & 0o100 {
            0 => 0o644,
            _ => 0o755,
        };
        if kind.is_dir() {
            archive.entry(&name, DIRECTORY | 0o755, (0, 0), b"");
            add_directory(archive, &path, &format!("{name}/"))?;
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(reading)?;
            let target = target.to_str().ok_or_else(|| Error::Name(path.clone()))?;
            archive.entry(&name, LINK | 0o777, (0, 0), target.as_bytes());
        } else if kind.is_file() {
            let data = fs::read(&path).map_err(reading)?;
            if u32::try_from(data.len()).is_err() {
                return Err(Error::TooLong(path));
            }
            archive.entry(&name, FILE | mode, (0, 0), &data);
        } else {
            return Err(Error::Kind(path));
        }
    }
    Ok(())
}

/// A newc archive under construction.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds one entry. `data` is shorter than 4 GiB.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            u32::try_from(data.len()).unwrap_or(u32::MAX),
            0, // devmajor of the file system
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0, // checksum: not in this form
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    /// Names and contents end on a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        // As cpio(1) does: up to a block of 512.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}
