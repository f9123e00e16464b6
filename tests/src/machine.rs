//! Machine files (`qemu/*.toml`): what QEMU is told about the machine, and nothing
//! about what runs on it.
//!
//! One file a machine, named as the tests name it. Adding a CPU model or a board
//! that QEMU knows is adding a file.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// One machine, as its file describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The file's stem.
    #[serde(skip)]
    pub name: String,
    /// One line for a person who lists the machines.
    pub about: String,
    /// QEMU's `-M`.
    pub machine: String,
    /// QEMU's `-cpu`.
    pub cpu: String,
    /// How many CPUs.
    pub cpus: u32,
    /// QEMU's `-m`.
    pub memory: String,
    /// QEMU's `-accel`.
    pub accel: String,
    /// Anything else, argument by argument.
    #[serde(default)]
    pub extra: Vec<String>,
}

/// Where the machine's RAM lives on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamBacking {
    /// QEMU's own anonymous memory.
    Private,
    /// A file that the host can read while the machine runs.
    File,
}

impl Machine {
    /// Reads `NAME.toml` from `dir`.
    pub fn load(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(format!("{name}.toml"));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("no machine file {}", path.display()))?;
        let mut machine: Self = toml::from_str(&text)
            .with_context(|| format!("{} is not a machine file", path.display()))?;
        machine.name = name.to_owned();
        Ok(machine)
    }

    /// QEMU's arguments for this machine, with `ram` as the file behind its RAM if
    /// there is to be one.
    ///
    /// No display and no network card: the default card needs a ROM file that small
    /// QEMU packages lack.
    #[must_use]
    pub fn arguments(&self, ram: Option<&Path>) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: OsString| {
            arguments.push(name.into());
            arguments.push(value);
        };
        let board = match ram {
            Some(_) => format!("{},memory-backend=ram", self.machine),
            None => self.machine.clone(),
        };
        add("-M", board.into());
        add("-cpu", self.cpu.clone().into());
        add("-smp", self.cpus.to_string().into());
        add("-m", self.memory.clone().into());
        add("-accel", self.accel.clone().into());
        if let Some(path) = ram {
            let mut object = OsString::from(format!(
                "memory-backend-file,id=ram,share=on,size={},mem-path=",
                self.memory
            ));
            object.push(path);
            add("-object", object);
        }
        add("-nic", "none".into());
        add("-display", "none".into());
        add("-monitor", "none".into());
        arguments.extend(self.extra.iter().map(OsString::from));
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifacts::machines_dir;

    #[test]
    fn every_machine_file_reads() {
        let mut seen = 0;
        for entry in std::fs::read_dir(machines_dir()).expect("machine files") {
            let path = entry.expect("entry").path();
            if path.extension().is_none_or(|end| end != "toml") {
                continue;
            }
            let name = path.file_stem().and_then(|stem| stem.to_str());
            let machine = Machine::load(&machines_dir(), name.expect("name")).expect("reads");
            assert!(!machine.about.is_empty(), "{name:?} says what it is");
            assert!(machine.cpus >= 1);
            seen += 1;
        }
        assert!(seen >= 4, "only {seen} machine files");
    }

    #[test]
    fn a_file_behind_ram_names_the_same_size_twice() {
        let machine = Machine::load(&machines_dir(), "virt").expect("reads");
        let with = machine.arguments(Some(Path::new("/x/ram")));
        let text: Vec<_> = with.iter().filter_map(|word| word.to_str()).collect();
        let text = text.join(" ");
        assert!(text.contains("memory-backend=ram"), "{text}");
        assert!(text.contains("size=1G,mem-path=/x/ram"), "{text}");
        let without = machine.arguments(None);
        assert!(!without.iter().any(|word| word == "-object"));
    }

    #[test]
    fn a_misspelt_field_is_refused() {
        let text = "about='x'\nmachine='virt'\ncpu='max'\ncpuz=2\nmemory='1G'\naccel='tcg'";
        assert!(toml::from_str::<Machine>(text).is_err());
    }
}
