//! `monitor`: a VM's console, for people and for scripts.

use super::Context;
use crate::client::{Client, Output};
use crate::error::DAMAGED;
use crate::terminal::{Keyboard, LEAVE, RawMode, inject_stdin, with_returns};
use crate::units::parse_duration;
use crate::{Error, Result};
use clap::Args;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use tidemark_wire::message::{ConsoleFrom, VmId, VmState, VmSummary};

/// Longest wait for output before the clocks are looked at.
const TICK: Duration = Duration::from_millis(200);

/// Pause before input is offered again to a guest that did not take it.
const INPUT_PAUSE: Duration = Duration::from_millis(10);

/// Quiet after the end of piped input that ends the command.
const LINGER: Duration = Duration::from_secs(1);

/// Bytes kept of broken frames: a crash report.
const WRECK_KEPT: usize = 8192;

/// Which console, and for how long.
#[derive(Debug, Args)]
#[command(after_help = "\
On a terminal every key goes to the guest; Ctrl-] leaves. With input from a pipe, it is typed, and the
command ends when the guest has been quiet for a second, or with --until when that text came; exit
code 5 if the VM ends before that.
Console output goes to standard output, the hypervisor's own words to standard error.

Examples:
  tidectl monitor debian
  echo uname -a | tidectl monitor debian
  tidectl monitor debian --history --until 'login:' --deadline 60s < /dev/null")]
pub struct MonitorArgs {
    /// Name or id; not needed if there is only one.
    vm: Option<String>,
    /// Begin with the output that the target still has.
    #[arg(long)]
    history: bool,
    /// End as soon as the guest has printed this.
    #[arg(long, value_name = "TEXT")]
    until: Option<String>,
    /// With --until: fail (exit code 6) when it has not come by then.
    #[arg(long, value_name = "TIME", requires = "until", value_parser = parse_duration)]
    deadline: Option<Duration>,
}

/// What came, in the order it came.
enum Seen {
    Console(Vec<u8>),
    Words(Vec<u8>),
    /// Text outside frames, as it was cut by the line.
    Text(Vec<u8>),
    Wreck(Vec<u8>),
    Damage,
    State(VmId, VmState),
    Typed(Vec<u8>),
    TypedEnd,
}

/// Why it is over.
enum Over {
    Left,
    Said,
    Quiet,
    Ended(VmState),
}

pub(super) fn run(context: &mut Context, args: &MonitorArgs) -> Result<()> {
    let (sender, seen) = mpsc::channel();
    let sink = Box::new(move |output: Output<'_>| {
        let seen = match output {
            Output::Console { data, .. } => Seen::Console(data.to_vec()),
            Output::Log(text) => Seen::Words(text.to_vec()),
            Output::Text(text) => Seen::Text(text.to_vec()),
            Output::Wreck(text) => Seen::Wreck(text.to_vec()),
            Output::Missed { bytes, .. } => {
                Seen::Words(format!("\n[{bytes} bytes of output were missed]\n").into_bytes())
            }
            Output::VmState { vm, state } => Seen::State(vm, state),
            Output::Injected(bytes) => Seen::Typed(bytes.to_vec()),
            Output::InjectedEnd => Seen::TypedEnd,
            Output::BadFrame(_) => Seen::Damage,
        };
        // The receiver lives as long as the client.
        let _ = sender.send(seen);
    });
    let mut client = context.connect_with(sink)?;
    let vm = choose(&mut client, args.vm.as_deref())?;
    let (raw, keyboard) = RawMode::enter()?;
    if keyboard == Keyboard::Terminal {
        context.ui.say(&format!("[{}: Ctrl-] leaves]\r", vm.name));
    }
    inject_stdin(client.injector())?;
    let from = if args.history {
        ConsoleFrom::Oldest
    } else {
        ConsoleFrom::Now
    };
    client.attach(vm.id, from)?;
    let mut monitor = Monitor {
        context,
        client,
        vm,
        keyboard,
        seen,
        pending: Vec::new(),
        outside: Outside::default(),
        input: Input::Open,
        ended: None,
        heard: Instant::now(),
        matcher: args
            .until
            .as_deref()
            .map(|text| Matcher::new(text.as_bytes())),
    };
    let over = monitor.run(args.deadline).and_then(|over| match over {
        Over::Ended(state) if args.until.is_some() => Err(Error::VmGone {
            vm: monitor.vm.name.clone(),
            state: state.to_string(),
            reason: "it has not printed what --until waits for".into(),
        }),
        over => Ok(over),
    });
    if over.is_err() {
        // Nothing whole came after it: this may be how the machine crashed.
        monitor.words(&monitor.outside.wreck);
    }
    drop(raw);
    let Monitor {
        client,
        vm,
        context,
        ..
    } = monitor;
    let damaged = client.stats().bad_frames;
    client.close();
    if damaged > 0 {
        context.ui.say(&format!(
            "\n[{damaged} frames came damaged and were asked for again; {DAMAGED}]"
        ));
    }
    match over? {
        Over::Left => context.ui.say("\n[left]"),
        Over::Ended(state) => context.ui.say(&format!("\n[{} {state}]", vm.name)),
        Over::Said | Over::Quiet => {}
    }
    Ok(())
}

/// The VM of that name, or the one that can be meant.
fn choose(client: &mut Client, name: Option<&str>) -> Result<VmSummary> {
    if let Some(name) = name {
        return client.find(name);
    }
    let mut vms = client.list()?;
    match (vms.len(), vms.pop()) {
        (1, Some(vm)) => Ok(vm),
        (_, last) => Err(Error::NoSuchVm {
            asked: String::new(),
            known: vms.into_iter().chain(last).map(|vm| vm.name).collect(),
        }),
    }
}

/// What stands outside of whole frames: the hypervisor's words, and what is left of frames that came broken.
#[derive(Default)]
struct Outside {
    line: LineIs,
    /// What is readable of frames that came broken since the last whole one.
    wreck: Vec<u8>,
}

/// How the line was last.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum LineIs {
    #[default]
    Whole,
    /// A frame came broken, and no output of the guest since.
    Damaged,
}

impl Outside {
    /// Tells whether text is the hypervisor's words; keeps it if it may be of a broken frame. A frame that lost its
    /// beginning is text to the decoder, and comes in as many parts as the line cuts it into: the first has the header,
    /// and the others look like words.
    fn are_words(&mut self, text: &[u8]) -> bool {
        if !is_readable(text) {
            self.line = LineIs::Damaged;
        }
        if self.line == LineIs::Damaged {
            self.keep(text);
        }
        self.line == LineIs::Whole
    }

    fn keep(&mut self, wreck: &[u8]) {
        if self.wreck.len() < WRECK_KEPT {
            self.wreck.extend_from_slice(wreck);
        }
    }

    /// Output of the guest came whole.
    fn mended(&mut self) {
        self.line = LineIs::Whole;
        self.wreck.clear();
    }
}

/// Whether text is what a person was meant to read: what the hypervisor says has none of the control characters that
/// every frame has.
fn is_readable(text: &[u8]) -> bool {
    let is_fine =
        |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x08 | 0x1b | b' '..=0x7e | 0x80..);
    text.iter().all(is_fine) && std::str::from_utf8(text).is_ok()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    Open,
    Ended,
}

/// What is still to be read of a guest that has ended: the news of that overtakes its last words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastWords {
    ToCome,
    Read,
}

struct Monitor<'c> {
    context: &'c mut Context,
    client: Client,
    vm: VmSummary,
    keyboard: Keyboard,
    seen: Receiver<Seen>,
    /// Typed, but not taken by the guest yet.
    pending: Vec<u8>,
    outside: Outside,
    input: Input,
    ended: Option<(VmState, LastWords)>,
    /// When the guest last printed or took something.
    heard: Instant,
    matcher: Option<Matcher>,
}

impl Monitor<'_> {
    fn run(&mut self, deadline: Option<Duration>) -> Result<Over> {
        let begun = Instant::now();
        loop {
            if let Some(over) = self.handle()? {
                return Ok(over);
            }
            match self.ended {
                Some((state, LastWords::Read)) => return Ok(Over::Ended(state)),
                Some((state, LastWords::ToCome)) => {
                    if self.has_last_words()? {
                        self.ended = Some((state, LastWords::Read));
                    }
                    continue;
                }
                None => {}
            }
            self.type_pending()?;
            if let Some(after) = deadline.filter(|&deadline| begun.elapsed() >= deadline) {
                let what = "the guest has not printed what --until waits for".into();
                return Err(Error::TooSlow { what, after });
            }
            let spent = self.input == Input::Ended && self.pending.is_empty();
            if spent && self.matcher.is_none() && self.heard.elapsed() >= LINGER {
                return Ok(Over::Quiet);
            }
            self.client.poll(if self.pending.is_empty() {
                TICK
            } else {
                INPUT_PAUSE
            })?;
        }
    }

    /// Reads the last words of a guest that has ended, or some of them. True when there are no more.
    fn has_last_words(&mut self) -> Result<bool> {
        match self.client.catch_up(self.vm.id) {
            // The machine may have gone with its last guest.
            Err(Error::Closed { .. } | Error::NoAnswer { .. }) => Ok(true),
            other => other,
        }
    }

    /// Handles all that came.
    fn handle(&mut self) -> Result<Option<Over>> {
        while let Ok(seen) = self.seen.try_recv() {
            match seen {
                Seen::Console(data) => {
                    self.outside.mended();
                    self.heard = Instant::now();
                    self.context.ui.bytes(&data)?;
                    if self
                        .matcher
                        .as_mut()
                        .is_some_and(|matcher| matcher.feed(&data))
                    {
                        return Ok(Some(Over::Said));
                    }
                }
                Seen::Damage => self.outside.line = LineIs::Damaged,
                Seen::Words(text) => self.words(&text),
                Seen::Text(text) if self.outside.are_words(&text) => self.words(&text),
                Seen::Text(_) => {}
                Seen::Wreck(text) => self.outside.keep(&text),
                Seen::State(vm, state) if vm == self.vm.id => match state {
                    VmState::Stopped | VmState::Failed => {
                        self.ended = Some((state, LastWords::ToCome));
                    }
                    state => {
                        self.ended = None;
                        self.words(format!("[{} {state}]\n", self.vm.name).as_bytes());
                    }
                },
                Seen::State(..) => {}
                Seen::Typed(bytes) => {
                    self.heard = Instant::now();
                    let leave = bytes.iter().position(|&byte| byte == LEAVE);
                    match leave.filter(|_| self.keyboard == Keyboard::Terminal) {
                        Some(_) => return Ok(Some(Over::Left)),
                        None => self.pending.extend_from_slice(&bytes),
                    }
                }
                Seen::TypedEnd if self.keyboard == Keyboard::Terminal => {
                    return Ok(Some(Over::Left));
                }
                Seen::TypedEnd => {
                    self.input = Input::Ended;
                    self.heard = Instant::now();
                }
            }
        }
        Ok(None)
    }

    /// The hypervisor's words, beside the data.
    fn words(&self, text: &[u8]) {
        let text = match self.keyboard {
            Keyboard::Terminal => with_returns(text),
            Keyboard::Stream => text.to_vec(),
        };
        // A closed standard error is no reason to stop.
        let _ = io::stderr().write_all(&text);
    }

    /// Offers what was typed; stops as soon as the guest takes no more.
    fn type_pending(&mut self) -> Result<()> {
        while !self.pending.is_empty() {
            let taken = self.client.offer_input(self.vm.id, &self.pending)?;
            if taken == 0 {
                break;
            }
            self.heard = Instant::now();
            self.pending.drain(..taken);
        }
        Ok(())
    }
}

/// Looks for a text in a stream, also across the edges of its parts.
struct Matcher {
    text: Vec<u8>,
    tail: Vec<u8>,
}

impl Matcher {
    fn new(text: &[u8]) -> Self {
        Self {
            text: text.to_vec(),
            tail: Vec::new(),
        }
    }

    fn feed(&mut self, data: &[u8]) -> bool {
        self.tail.extend_from_slice(data);
        let found = self.text.is_empty()
            || self
                .tail
                .windows(self.text.len())
                .any(|window| window == self.text);
        let keep = self.text.len().saturating_sub(1);
        self.tail.drain(..self.tail.len().saturating_sub(keep));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_across_parts() {
        let mut matcher = Matcher::new(b"login:");
        assert!(!matcher.feed(b"debian lo"));
        assert!(!matcher.feed(b"gin"));
        assert!(matcher.feed(b": "));
        let mut matcher = Matcher::new(b"aab");
        assert!(matcher.feed(b"aaab"));
    }

    #[test]
    fn a_frame_without_its_beginning_is_no_words_however_it_is_cut() {
        let frame = b"X\x02\x01\x03\x01\x01\x01 Linux version 6.1\nMachine model: Tidemark\n";
        for cut in 2..frame.len() {
            let mut outside = Outside::default();
            assert!(outside.are_words(b"INFO  cpu0 linux: running\n"));
            let (first, rest) = frame.split_at(cut);
            assert!(!outside.are_words(first), "{cut}");
            assert!(!outside.are_words(rest), "{cut}");
            assert_eq!(outside.wreck, frame, "{cut}");
            outside.mended();
            assert!(outside.are_words(b"INFO  cpu0 linux: stopped\n"));
        }
    }
}
