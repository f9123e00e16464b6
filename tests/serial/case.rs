//! What a test is: a name, its clocks, and a script.

use anyhow::Result;
use tidemark_tests::clocks::Clocks;
use tidemark_tests::script::Script;

/// The body of a test.
pub type Body = fn(&mut Script) -> Result<()>;

/// One test.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, plain.
    pub name: String,
    /// Its total clock, in seconds.
    pub seconds: u64,
    /// What it does.
    pub body: Body,
}

impl Case {
    /// A test that may take `seconds`.
    pub fn new(name: &str, seconds: u64, body: Body) -> Self {
        Self {
            name: name.to_owned(),
            seconds,
            body,
        }
    }

    /// Runs it.
    pub fn run(&self) -> Result<()> {
        let clocks = Clocks::usual().with_total(self.seconds);
        let mut script = Script::new("tests", &self.name, clocks)?;
        let result = (self.body)(&mut script);
        script.conclude(result)
    }
}
