//! A machine that is switched on: QEMU with an image, or a board on a port.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use tidectl::link::{Closer, Link, Port};

use crate::artifacts::machines_dir;
use crate::clocks::{Clocks, Running};
use crate::line::{Found, Line};
use crate::machine::Machine;
use crate::qemu::{Payload, Qemu};
use crate::work::Work;

/// EL2's own prompt.
pub const PROMPT: &str = "tidemark> ";

/// How EL2 ends a clean power-off.
pub const VERDICT_OK: &str = "tidemark: verdict ok";

/// Whether the machine was switched on for this script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It was: everything it ever said is in the transcript, and its guests are new.
    Fresh,
    /// It was running before: a board, on which other scripts have been.
    Running,
}

/// A machine that runs, with everything needed to talk to it and to explain it.
pub struct Target {
    line: Arc<Line>,
    qemu: Option<Qemu>,
    clocks: Running,
    port: PathBuf,
    arrival: Arrival,
    _closer: Option<Closer>,
    // Dropped last: the sockets and the RAM file live in it.
    work: Work,
}

impl Target {
    /// Switches on the machine of `qemu/MACHINE.toml` with `payload`.
    pub fn start(work: Work, machine: &str, payload: &Payload, clocks: Clocks) -> Result<Self> {
        let machine = Machine::load(&machines_dir(), machine)?;
        let running = Running::start(clocks);
        let (qemu, stream) = Qemu::start(&work, &machine, payload)
            .with_context(|| format!("machine {}", machine.name))?;
        let port = work.socket("port");
        let line = Line::open(
            Box::new(stream.try_clone()?),
            Box::new(stream),
            &work.path("serial.log"),
            &port,
        )?;
        Ok(Self {
            line: Arc::new(line),
            qemu: Some(qemu),
            clocks: running,
            port,
            arrival: Arrival::Fresh,
            _closer: None,
            work,
        })
    }

    /// Goes to a machine that runs already, such as a board.
    pub fn attach(work: Work, at: &Port, clocks: Clocks) -> Result<Self> {
        let link = Link::open(at)?;
        let port = work.socket("port");
        let log = work.path("serial.log");
        let line = Line::open(link.reader, link.writer, &log, &port)?;
        Ok(Self {
            line: Arc::new(line),
            qemu: None,
            clocks: Running::start(clocks),
            port,
            arrival: Arrival::Running,
            _closer: Some(link.closer),
            work,
        })
    }

    /// How the machine came to this script.
    #[must_use]
    pub fn arrival(&self) -> Arrival {
        self.arrival
    }

    /// The line.
    #[must_use]
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// The run's directory.
    #[must_use]
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// The clocks.
    #[must_use]
    pub fn clocks(&self) -> &Running {
        &self.clocks
    }

    /// Where `tidectl --port` reaches this machine.
    #[must_use]
    pub fn port(&self) -> String {
        format!("unix:{}", self.port.display())
    }

    /// The file behind the machine's RAM, if it was asked for.
    #[must_use]
    pub fn ram_file(&self) -> PathBuf {
        self.work.path("ram")
    }

    /// Waits for `text` and returns what came before it.
    pub fn expect(&self, text: &str) -> Result<String> {
        Ok(self.line.expect(&[text], &self.clocks)?.before)
    }

    /// Waits for one of `texts`.
    pub fn expect_any(&self, texts: &[&str]) -> Result<Found> {
        self.line.expect(texts, &self.clocks)
    }

    /// Waits for the end of the line that is being said and returns it.
    pub fn rest_of_line(&self) -> Result<String> {
        Ok(self.expect("\n")?.trim().to_owned())
    }

    /// Types `text` and Enter.
    pub fn type_line(&self, text: &str) -> Result<()> {
        self.line.send(&format!("{text}\r"))
    }

    /// Stops the boot clock: the first thing that counts as up has been seen.
    pub fn booted(&mut self) {
        self.clocks.booted();
    }

    /// Waits for EL2's prompt and returns everything said on the way to it.
    pub fn to_prompt(&mut self) -> Result<String> {
        if self.arrival == Arrival::Running {
            // Its prompt was said to somebody else.
            self.type_line("")?;
        }
        let said = self
            .expect(PROMPT)
            .context("EL2 did not get to its prompt")?;
        self.booted();
        Ok(said)
    }

    /// Types a command into EL2's shell and returns its answer.
    pub fn shell(&self, command: &str) -> Result<String> {
        self.type_line(command)?;
        let said = self
            .expect(PROMPT)
            .with_context(|| format!("no answer to `{command}`"))?;
        // The first line is the echo of what was typed.
        let answer = said.split_once('\n').map_or("", |(_, answer)| answer);
        Ok(answer.replace('\r', ""))
    }

    /// Brings script and shell together after input that was no command: forgets the line
    /// that may have been begun, and passes over every prompt up to the answer to a word
    /// that only this script can have typed.
    pub fn settle_shell(&self) -> Result<()> {
        // Enter comes first: right after a frame, Ctrl-C would be taken for the beginning of
        // another (`tidemark_wire::frame`).
        const FORGET_LINE: &str = "\r\u{3}";
        self.line.send(FORGET_LINE)?;
        self.type_line("settle")?;
        self.expect("settle: no such command")
            .context("the shell is gone")?;
        self.expect(PROMPT)?;
        Ok(())
    }

    /// Asks EL2's shell until its answer contains `wanted`: guests start, and logs are
    /// written, while the shell already answers.
    pub fn shell_until(&self, command: &str, wanted: &str) -> Result<String> {
        let began = Instant::now();
        loop {
            let answer = self.shell(command)?;
            if answer.contains(wanted) {
                return Ok(answer);
            }
            if self.clocks.left(began).is_err() {
                bail!("`{command}` never says `{wanted}`, last: {answer:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the machine is off and checks all signs of a good end: EL2's
    /// verdict, QEMU's status, and no sign of a crash anywhere.
    pub fn powered_off(&mut self) -> Result<()> {
        self.line
            .expect(&[VERDICT_OK], &self.clocks)
            .context("no good verdict at power-off")?;
        self.line.wait_closed(&self.clocks)?;
        self.line.look_for_failure()?;
        if let Some(qemu) = &mut self.qemu {
            let status = qemu.wait(self.clocks.left_in_total())?;
            if !status.success() {
                bail!("QEMU ended with {status}: {}", qemu.own_words());
            }
        }
        Ok(())
    }

    /// Waits until QEMU has ended, whatever it says, and returns the unread text.
    pub fn ended(&mut self) -> Result<String> {
        self.line.wait_closed(&self.clocks)?;
        if let Some(qemu) = &mut self.qemu {
            qemu.wait(self.clocks.left_in_total())?;
        }
        Ok(self.line.unread())
    }

    /// Is it still on? A test that ends with the machine running checks this last.
    pub fn still_on(&mut self) -> Result<()> {
        self.line.look_for_failure()?;
        if let Some(qemu) = &mut self.qemu
            && let Some(status) = qemu.ended()?
        {
            bail!("QEMU ended early with {status}: {}", qemu.own_words());
        }
        Ok(())
    }

    /// Leaves everything that explains a failure in the run's directory.
    pub fn keep_evidence(&mut self, error: &anyhow::Error) {
        let mut text = format!("{error:#}\n\nafter {:?}\n", self.clocks.elapsed());
        let (frames, bad) = self.line.frames();
        text += &format!("frames from the machine: {frames} good, {bad} bad\n");
        if let Some(qemu) = &mut self.qemu {
            match qemu.ended() {
                Ok(Some(status)) => text += &format!("QEMU ended: {status}\n"),
                _ => {
                    if let Ok(registers) = qemu.registers() {
                        let _ = std::fs::write(self.work.path("registers.txt"), registers);
                    }
                }
            }
            text += &qemu.own_words();
        }
        let _ = std::fs::write(self.work.path("failure.txt"), text);
    }

    /// The directory of the run, for messages.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.work.dir()
    }
}
