//! What a test is: a name, its clocks, where it can run, and a script.

use anyhow::Result;
use tidectl::link::Port;
use tidemark_tests::clocks::Clocks;
use tidemark_tests::qemu;
use tidemark_tests::script::Script;

/// The body of a test.
pub type Body = fn(&mut Script) -> Result<()>;

/// Where a test makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a machine of its own, which it switches on as it needs it.
    Qemu,
    /// Only on a machine that runs already.
    Board,
    /// On either.
    Anywhere,
}

/// One test.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, plain.
    pub name: String,
    /// Where it can run.
    pub place: Place,
    /// Its total clock, in seconds.
    pub seconds: u64,
    /// How long the machine may say nothing, in seconds, if longer than usual.
    pub silence: Option<u64>,
    /// Why it needs [`qemu::WANTED`], if it does.
    pub newer_qemu: Option<&'static str>,
    /// What it does.
    pub body: Body,
}

impl Case {
    /// A test on a machine of its own, that may take `seconds`.
    pub fn new(name: &str, seconds: u64, body: Body) -> Self {
        Self {
            name: name.to_owned(),
            place: Place::Qemu,
            seconds,
            silence: None,
            newer_qemu: None,
            body,
        }
    }

    /// The same test, which on a QEMU older than [`qemu::WANTED`] fails for a reason of QEMU's.
    pub fn needs_newer_qemu(mut self, why: &'static str) -> Self {
        self.newer_qemu = Some(why);
        self
    }

    /// The same test of something that says nothing for longer: up to `seconds`.
    pub fn silent(mut self, seconds: u64) -> Self {
        self.silence = Some(seconds);
        self
    }

    /// The same test somewhere else.
    pub fn at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    /// Runs it, on the machine at `port` if there is one.
    pub fn run(&self, port: Option<Port>) -> Result<()> {
        if let (Some(why), None) = (self.newer_qemu, &port) {
            qemu::require_wanted(why)?;
        }
        let mut clocks = Clocks::usual().with_total(self.seconds);
        if let Some(seconds) = self.silence {
            clocks = clocks.with_silence(seconds);
        }
        let mut script = Script::new("tests", &self.name, clocks)?.on(port);
        let result = (self.body)(&mut script);
        script.conclude(result)
    }
}
