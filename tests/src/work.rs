//! The directory of one run: logs, sockets, RAM file, and what is kept of them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::artifacts::target_dir;

/// `target/tests/NAME/` and a short-named directory for sockets beside it.
///
/// Sockets live in the system's temporary directory because their paths may not be
/// longer than about a hundred bytes, and a source tree may be deep.
#[derive(Debug)]
pub struct Work {
    dir: PathBuf,
    sockets: Scratch,
}

impl Work {
    /// Empties and makes the directory for the run called `name` under `kind` (`tests`,
    /// `bench`, ...).
    pub fn create(kind: &str, name: &str) -> Result<Self> {
        Self::at(target_dir().join(kind).join(name))
    }

    /// Empties and makes `dir`.
    pub fn at(dir: PathBuf) -> Result<Self> {
        if dir.exists() {
            std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot empty {}", dir.display()))?;
        }
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let sockets = Scratch::create("s")?;
        Ok(Self { dir, sockets })
    }

    /// Where logs and results go.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the run's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A path for a socket.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(name)
    }
}

impl Drop for Work {
    /// The RAM file goes in any case (as the sockets do): it is as large as the machine's
    /// memory and explains nothing that the transcript does not.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.dir.join("ram"));
    }
}

/// A directory under the system's temporary one, removed when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a fresh one; `purpose` shows in its name.
    pub fn create(purpose: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("tidemark-{purpose}-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        if dir.exists() {
            // A left-over of a process that had the same number and was killed.
            std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot empty {}", dir.display()))?;
        }
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// A path in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use crate::artifacts::root;

    #[test]
    fn make_clean_knows_every_directory_that_runs_leave() {
        let makefile = std::fs::read_to_string(root().join("Makefile")).expect("it is there");
        let (_, clean) = makefile
            .split_once("\nclean:")
            .expect("there is such a target");
        for kind in ["tests", "bench", "demo", "shell"] {
            let named = clean.split_whitespace().any(|word| word == kind);
            assert!(named, "`make clean` leaves {kind}/");
        }
    }
}
