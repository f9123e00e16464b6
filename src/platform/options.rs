//! EL2's own command line: `/chosen/bootargs`, words of the form `name=value`.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use log::LevelFilter;

/// Which engine finds dirty pages, where a request does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyEngine {
    /// By the CPUs: the hardware's dirty bit where it can be trusted.
    #[default]
    Auto,
    /// Write protection, whatever the CPUs have.
    WriteProtect,
    /// The hardware's dirty bit.
    Dbm,
}

/// With which leaves guests' memory is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LeafSize {
    /// With those that suit the machine, which is measured.
    #[default]
    Auto,
    /// Blocks where they fit.
    Blocks,
    /// Pages alone.
    Pages,
}

/// What happens when the last guest has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenIdle {
    /// Stay, for the host and the shell.
    #[default]
    Stay,
    /// Power the machine off.
    PowerOff,
}

/// Whom a plain terminal talks to at the start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Terminal {
    /// EL2's shell.
    #[default]
    Shell,
    /// The console of the VM with this name.
    Vm(String),
    /// EL2's shell, with every VM's lines shown behind its name.
    All,
}

/// Whether guests start by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Autostart {
    /// As their manifest says.
    #[default]
    Manifest,
    /// None of them.
    Never,
}

/// The command line, taken apart.
#[derive(Debug, Default)]
pub struct Options {
    /// `log=error|warn|info|debug|trace`.
    pub log: Option<LevelFilter>,
    /// `dirty=auto|wp|dbm`.
    pub dirty: DirtyEngine,
    /// `leaves=auto|blocks|pages`.
    pub leaves: LeafSize,
    /// `poweroff=idle|never`; without it, what the manifest says.
    pub when_idle: Option<WhenIdle>,
    /// `console=shell|all|NAME`.
    pub terminal: Terminal,
    /// `autostart=yes|no`.
    pub autostart: Autostart,
    /// `selftest=NAME`: provoke a failure on purpose, for the tests of the crash console.
    pub selftest: Option<String>,
    /// `vmids=N`: use no VMID beyond N, for tests of what happens when they run out.
    pub last_vmid: Option<u16>,
    /// Words that mean nothing here, for a warning.
    pub unknown: Vec<String>,
}

/// The names that a word can have.
pub const NAMES: &str =
    "log=, dirty=, leaves=, poweroff=, console=, autostart=, vmids= and selftest=";

/// What a word's name takes, for a warning about its value.
pub fn values(word: &str) -> Option<&'static str> {
    match word.split_once('=')?.0 {
        "log" => Some("error, warn, info, debug, trace or off"),
        "dirty" => Some("auto, wp or dbm"),
        "leaves" => Some("auto, blocks or pages"),
        "poweroff" => Some("idle or never"),
        "autostart" => Some("yes or no"),
        "vmids" => Some("the largest VMID to use"),
        _ => None,
    }
}

impl Options {
    /// Takes a command line apart. Never fails: what it does not know it lists.
    pub fn parse(line: &str) -> Self {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            if !options.apply(word) {
                options.unknown.push(word.to_string());
            }
        }
        options
    }

    fn apply(&mut self, word: &str) -> bool {
        let Some((name, value)) = word.split_once('=') else {
            return false;
        };
        match (name, value) {
            ("log", level) => match level.parse() {
                Ok(level) => self.log = Some(level),
                Err(_) => return false,
            },
            ("dirty", "auto") => self.dirty = DirtyEngine::Auto,
            ("dirty", "wp") => self.dirty = DirtyEngine::WriteProtect,
            ("dirty", "dbm") => self.dirty = DirtyEngine::Dbm,
            ("leaves", "auto") => self.leaves = LeafSize::Auto,
            ("leaves", "blocks") => self.leaves = LeafSize::Blocks,
            ("leaves", "pages") => self.leaves = LeafSize::Pages,
            ("poweroff", "idle") => self.when_idle = Some(WhenIdle::PowerOff),
            ("poweroff", "never") => self.when_idle = Some(WhenIdle::Stay),
            ("autostart", "yes") => self.autostart = Autostart::Manifest,
            ("autostart", "no") => self.autostart = Autostart::Never,
            ("console", "shell") => self.terminal = Terminal::Shell,
            ("console", "all") => self.terminal = Terminal::All,
            ("console", name) => self.terminal = Terminal::Vm(name.to_string()),
            ("vmids", number) => match number.parse() {
                Ok(number) => self.last_vmid = Some(number),
                Err(_) => return false,
            },
            ("selftest", name) => self.selftest = Some(name.to_string()),
            _ => return false,
        }
        true
    }
}
