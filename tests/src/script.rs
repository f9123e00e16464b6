//! One scripted run: its name, its seed, its machine, and what is kept of it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;

use anyhow::{Context, Result};
use tidectl::link::Port;

use crate::artifacts::Artifact;
use crate::clocks::Clocks;
use crate::qemu::Payload;
use crate::target::Target;
use crate::work::Work;

/// A run in progress.
pub struct Script {
    kind: &'static str,
    name: String,
    seed: u64,
    clocks: Clocks,
    port: Option<Port>,
    work: Option<Work>,
    target: Option<Target>,
}

impl Script {
    /// Prepares the run called `name`; its files go to `target/KIND/NAME/`.
    pub fn new(kind: &'static str, name: &str, clocks: Clocks) -> Result<Self> {
        let work = Work::create(kind, name)?;
        let seed = seed();
        std::fs::write(work.path("seed.txt"), format!("{seed}\n"))?;
        Ok(Self {
            kind,
            name: name.to_owned(),
            seed,
            clocks,
            port: None,
            work: Some(work),
            target: None,
        })
    }

    /// The seed of everything random in this run.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The clocks that a machine of this run is started with.
    #[must_use]
    pub fn clocks(&self) -> Clocks {
        self.clocks
    }

    /// A path among the run's files.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        let work = match (&self.target, &self.work) {
            (Some(target), _) => target.work(),
            (None, Some(work)) => work,
            (None, None) => anyhow::bail!("{} has no directory", self.name),
        };
        Ok(work.path(name))
    }

    /// Switches on the run's machine. A run has one machine; several are several runs.
    pub fn start(&mut self, machine: &str, payload: &Payload) -> Result<&mut Target> {
        let work = self.work.take().context("this run has its machine")?;
        let target = Target::start(work, machine, payload, self.clocks)?;
        Ok(self.target.insert(target))
    }

    /// Has the run use the machine at `port`, which runs already, instead of switching
    /// one on.
    #[must_use]
    pub fn on(mut self, port: Option<Port>) -> Self {
        self.port = port;
        self
    }

    /// Switches on EL2 with `bundle` and `options` as its command line, or goes to the
    /// machine that the run is to use, which has its own.
    pub fn start_tidemark(
        &mut self,
        machine: &str,
        bundle: &[u8],
        options: &str,
    ) -> Result<&mut Target> {
        if let Some(port) = &self.port {
            let work = self.work.take().context("this run has its machine")?;
            return Ok(self.target.insert(Target::attach(work, port, self.clocks)?));
        }
        let initrd = self.path("guests.bundle")?;
        std::fs::write(&initrd, bundle)?;
        let payload = Payload::kernel(Artifact::Image.path()?)
            .initrd(initrd)
            .append(options);
        self.start(machine, &payload)
    }

    /// The run's machine.
    pub fn target(&mut self) -> Result<&mut Target> {
        self.target.as_mut().context("no machine was started")
    }

    /// Ends the run: on success its files go (unless `TIDEMARK_KEEP` is set), on
    /// failure they stay and the error says where they are.
    pub fn conclude(mut self, result: Result<()>) -> Result<()> {
        let dir = crate::artifacts::target_dir()
            .join(self.kind)
            .join(&self.name);
        match result {
            Ok(()) => {
                drop(self.target.take());
                drop(self.work.take());
                if std::env::var_os("TIDEMARK_KEEP").is_none() {
                    let _ = std::fs::remove_dir_all(&dir);
                }
                Ok(())
            }
            Err(error) => {
                if let Some(target) = &mut self.target {
                    target.keep_evidence(&error);
                }
                Err(error.context(format!(
                    "{} failed; evidence in {}; TIDEMARK_SEED={} repeats it",
                    self.name,
                    dir.display(),
                    self.seed
                )))
            }
        }
    }
}

/// The seed asked for with `TIDEMARK_SEED`, else a fresh one.
fn seed() -> u64 {
    let asked = std::env::var("TIDEMARK_SEED").ok();
    asked
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| RandomState::new().build_hasher().finish())
}
