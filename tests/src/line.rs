//! The machine's one serial line: read all the time, waited on by scripts, shared
//! with clients.
//!
//! The line carries console text and frames. A thread takes every byte as it comes,
//! hands the raw bytes to a client if one is connected (`crate::relay`), takes the
//! frames out, and appends the text to the transcript. Scripts wait on the text.
//!
//! Invariant: the cursor only moves forward, and no text is skipped unread: each byte
//! is searched for signs of a crash exactly when a script passes over it, and what is
//! left at the end is searched by [`Line::look_for_failure`].

use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Result, bail};
use tidemark_wire::RESPONSE_PAYLOAD_MAX;
use tidemark_wire::frame::{Decoder, Item, buffer_len};

use crate::clocks::Running;
use crate::relay::{Damage, Relay, ToMachine};
use crate::transcript::Transcript;

/// Text that means the machine or its guest is beyond hope, whatever is awaited.
pub const FAILURES: &[&str] = &[
    "EL2 exception:",
    "EL2 panic:",
    "tidemark: verdict failed",
    "Kernel panic - not syncing",
    "Unable to handle kernel",
    "Internal error: ",
    "BUG: ",
    "rcu: INFO: rcu_",
    "Synchronous Abort\" handler",
];

/// The serial line of one machine.
pub struct Line {
    shared: Arc<Shared>,
    machine: ToMachine,
    relay: Relay,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    transcript: Transcript,
    cursor: usize,
    /// When any byte came.
    heard: Instant,
    /// When text came: frames are also answers to a host that asks while it waits.
    heard_text: Instant,
    frames: u64,
    bad_frames: u64,
    closed: bool,
}

/// What was found, and what came before it.
#[derive(Debug)]
pub struct Found {
    /// Which of the wanted texts.
    pub which: usize,
    /// The text between the last find and this one.
    pub before: String,
}

impl Line {
    /// Starts reading. `log` is where the transcript goes, `relay` where clients connect.
    pub fn open(
        reader: Box<dyn Read + Send>,
        writer: Box<dyn Write + Send>,
        log: &Path,
        relay: &Path,
    ) -> Result<Self> {
        let machine: ToMachine = Arc::new(Mutex::new(writer));
        let relay = Relay::listen(relay, Arc::clone(&machine))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                transcript: Transcript::create(log)?,
                cursor: 0,
                heard: Instant::now(),
                heard_text: Instant::now(),
                frames: 0,
                bad_frames: 0,
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let for_thread = (Arc::clone(&shared), relay.clone());
        std::thread::Builder::new()
            .name("serial line".into())
            .spawn(move || listen(reader, &for_thread.0, &for_thread.1))?;
        Ok(Self {
            shared,
            machine,
            relay,
        })
    }

    /// Types text to the machine.
    pub fn send(&self, text: &str) -> Result<()> {
        self.lock().transcript.note('>', text);
        self.send_bytes(text.as_bytes())
    }

    /// Sends bytes as they are; for frames that are broken on purpose.
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<()> {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine.write_all(bytes)?;
        machine.flush()?;
        Ok(())
    }

    /// Every byte of the machine from now on, frames and all.
    #[must_use]
    pub fn listen_in(&self) -> Receiver<Vec<u8>> {
        self.relay.listen_in()
    }

    /// Cuts off the client that is connected through the relay, in the middle of whatever
    /// it is doing.
    pub fn cut_client(&self) {
        self.relay.cut();
    }

    /// From now on the line between the machine and clients damages what it carries.
    pub fn damage(&self, damage: Option<Damage>) {
        self.relay.damage(damage);
    }

    /// Writes a remark into the transcript.
    pub fn note(&self, text: &str) {
        self.lock().transcript.note('#', text);
    }

    /// Writes what a guest said in frames into the transcript.
    pub fn note_guest(&self, text: &str) {
        self.lock().transcript.note('|', text);
    }

    /// Waits until the machine says one of `wanted`, and moves past it.
    ///
    /// Fails when a clock runs out, when the line closes, or as soon as a sign of a
    /// crash shows before the wanted text.
    pub fn expect(&self, wanted: &[&str], clocks: &Running) -> Result<Found> {
        self.expect_despite(wanted, FAILURES, clocks)
    }

    /// The same with the signs of failure given; for scripts that provoke one.
    pub fn expect_despite(
        &self,
        wanted: &[&str],
        failures: &[&str],
        clocks: &Running,
    ) -> Result<Found> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            let new = state.new_text();
            let found = first_of(new, wanted);
            let until = found.map_or(new.len(), |(at, _)| at);
            let passed = new.get(..until).unwrap_or_default();
            if let Some((at, which)) = first_of(passed, failures) {
                let line = line_at(new, at);
                let sign = failures.get(which).copied().unwrap_or_default();
                bail!(
                    "the machine said `{line}` (a sign of failure: `{sign}`) while waiting for {}",
                    list(wanted)
                );
            }
            if let Some((at, which)) = found {
                let before = String::from_utf8_lossy(passed).into_owned();
                let length = wanted.get(which).map_or(0, |text| text.len());
                state.cursor += at + length;
                return Ok(Found { which, before });
            }
            if state.closed {
                bail!(
                    "the line closed while waiting for {}; last lines:\n{}",
                    list(wanted),
                    state.transcript.tail(8)
                );
            }
            match clocks.left(state.heard.max(began)) {
                Ok(left) => {
                    let waited = self.shared.changed.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Err(ran_out) => bail!(
                    "{ran_out} while waiting for {}; last lines:\n{}",
                    list(wanted),
                    state.transcript.tail(8)
                ),
            }
        }
    }

    /// Fails if anything not yet passed over is a sign of a crash.
    pub fn look_for_failure(&self) -> Result<()> {
        let state = self.lock();
        if let Some((at, _)) = first_of(state.new_text(), FAILURES) {
            bail!("the machine said `{}`", line_at(state.new_text(), at));
        }
        Ok(())
    }

    /// Waits until the line closes: everything the machine said is in the transcript.
    pub fn wait_closed(&self, clocks: &Running) -> Result<()> {
        let mut state = self.lock();
        while !state.closed {
            let left = clocks.left_in_total();
            if left.is_zero() {
                bail!("the line is still open when the total clock ran out");
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Waits for text beyond byte `from` of all text and returns it; `None` once the line
    /// is closed and everything has been returned. For showing the text as it comes: it
    /// moves no cursor.
    #[must_use]
    pub fn follow(&self, from: usize) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            let new = state.transcript.text().get(from..).unwrap_or_default();
            if !new.is_empty() {
                return Some(new.to_vec());
            }
            if state.closed {
                return None;
            }
            let waited = self.shared.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// When the machine last said anything as text.
    #[must_use]
    pub fn heard_text(&self) -> Instant {
        self.lock().heard_text
    }

    /// All text so far, passed over or not.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.lock().transcript.text()).into_owned()
    }

    /// The text that no script has passed over yet.
    #[must_use]
    pub fn unread(&self) -> String {
        String::from_utf8_lossy(self.lock().new_text()).into_owned()
    }

    /// Valid frames and bad ones so far, as seen on the line.
    #[must_use]
    pub fn frames(&self) -> (u64, u64) {
        let state = self.lock();
        (state.frames, state.bad_frames)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.relay.cut();
    }
}

impl State {
    fn new_text(&self) -> &[u8] {
        self.transcript
            .text()
            .get(self.cursor..)
            .unwrap_or_default()
    }
}

/// Reads the line until it closes.
fn listen(mut reader: Box<dyn Read + Send>, shared: &Shared, relay: &Relay) {
    let mut decoder = Box::new(Decoder::<{ buffer_len(RESPONSE_PAYLOAD_MAX) }>::new());
    let mut buffer = vec![0; 16 * 1024];
    let mut text = Vec::new();
    loop {
        let count = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            // A serial device reports its read time-out as an error.
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::TimedOut
                        | std::io::ErrorKind::WouldBlock
                        | std::io::ErrorKind::Interrupted
                ) =>
            {
                continue;
            }
            Err(_) => break,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        relay.forward(bytes);
        text.clear();
        let (mut frames, mut bad) = (0, 0);
        for &byte in bytes {
            match decoder.push(byte) {
                None => {}
                Some(Item::Text(byte)) => text.push(byte),
                Some(Item::Frame(_)) => frames += 1,
                Some(Item::Bad(broken)) => {
                    bad += 1;
                    // A crash message may have cut into a frame; it must not be missed.
                    text.extend_from_slice(broken.text);
                }
            }
        }
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.heard = Instant::now();
        if !text.is_empty() {
            state.heard_text = state.heard;
        }
        state.frames += frames;
        state.bad_frames += bad;
        state.transcript.push(&text);
        shared.changed.notify_all();
    }
    relay.cut();
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    state.closed = true;
    shared.changed.notify_all();
}

/// Where the first of `wanted` begins in `text`, and which it is.
fn first_of(text: &[u8], wanted: &[&str]) -> Option<(usize, usize)> {
    let finds = wanted.iter().enumerate().filter_map(|(which, wanted)| {
        let wanted = wanted.as_bytes();
        let at = text.windows(wanted.len()).position(|part| part == wanted)?;
        Some((at, which))
    });
    finds.min()
}

/// The line of `text` around `at`.
fn line_at(text: &[u8], at: usize) -> String {
    let from = text
        .get(..at)
        .and_then(|before| before.iter().rposition(|&byte| byte == b'\n'));
    let line = text.get(from.map_or(0, |newline| newline + 1)..);
    let line = line.and_then(|rest| rest.split(|&byte| byte == b'\n').next());
    String::from_utf8_lossy(line.unwrap_or_default())
        .trim()
        .to_owned()
}

/// The wanted texts for a message.
fn list(wanted: &[&str]) -> String {
    let quoted: Vec<String> = wanted.iter().map(|text| format!("{text:?}")).collect();
    quoted.join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clocks::Clocks;
    use crate::work::Scratch;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    /// A line whose machine is the test itself.
    fn line() -> (Line, UnixStream, Scratch) {
        let dir = Scratch::create("line").expect("dir");
        let (here, there) = UnixStream::pair().expect("pair");
        let reader = Box::new(here.try_clone().expect("clone"));
        let line = Line::open(
            reader,
            Box::new(here),
            &dir.join("serial.log"),
            &dir.join("port"),
        );
        (line.expect("line"), there, dir)
    }

    fn clocks() -> Running {
        Running::start(Clocks {
            boot: Duration::from_secs(5),
            silence: Duration::from_millis(200),
            total: Duration::from_secs(5),
        })
    }

    #[test]
    fn finds_come_in_order_and_give_what_was_between() {
        let (line, mut machine, _dir) = line();
        machine
            .write_all(b"boot\ntidemark> 42\ntidemark> ")
            .expect("write");
        line.expect(&["tidemark> "], &clocks()).expect("first");
        let second = line.expect(&["tidemark> "], &clocks()).expect("second");
        assert_eq!(second.before, "42\n");
    }

    #[test]
    fn the_earliest_of_several_wins() {
        let (line, mut machine, _dir) = line();
        machine.write_all(b"a login: b shell: ").expect("write");
        let found = line.expect(&["shell:", "login:"], &clocks()).expect("find");
        assert_eq!(found.which, 1);
    }

    #[test]
    fn a_crash_before_the_wanted_text_fails_and_is_quoted() {
        let (line, mut machine, _dir) = line();
        machine
            .write_all(b"x\nEL2 panic: out of tables\ntidemark> ")
            .expect("write");
        let error = line.expect(&["tidemark> "], &clocks()).expect_err("fails");
        assert!(
            error.to_string().contains("EL2 panic: out of tables"),
            "{error}"
        );
    }

    #[test]
    fn a_crash_after_the_wanted_text_is_found_by_whoever_passes_it() {
        let (line, mut machine, _dir) = line();
        machine.write_all(b"ok\nBUG: late\n").expect("write");
        line.expect(&["ok"], &clocks()).expect("found");
        // The two writes may arrive apart.
        std::thread::sleep(Duration::from_millis(50));
        assert!(line.look_for_failure().is_err());
    }

    #[test]
    fn silence_ends_the_waiting() {
        let (line, mut machine, _dir) = line();
        machine.write_all(b"something").expect("write");
        let error = line.expect(&["else"], &clocks()).expect_err("fails");
        assert!(error.to_string().contains("silent"), "{error}");
    }

    #[test]
    fn a_closed_line_ends_the_waiting() {
        let (line, machine, _dir) = line();
        drop(machine);
        let error = line.expect(&["x"], &clocks()).expect_err("fails");
        assert!(error.to_string().contains("closed"), "{error}");
        line.wait_closed(&clocks()).expect("closed");
    }

    #[test]
    fn a_client_sees_the_bytes_and_reaches_the_machine() {
        let (line, mut machine, dir) = line();
        let mut client = UnixStream::connect(dir.join("port")).expect("connect");
        client.write_all(b"\x00\x02bc\x00").expect("write");
        let mut got = [0; 5];
        machine.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"\x00\x02bc\x00");
        machine.write_all(b"reply").expect("write");
        client.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"reply");
        line.expect(&["reply"], &clocks())
            .expect("the script sees it too");
    }
}
