//! `monitor`: a VM's console, for people and for scripts.

use super::Context;
use crate::client::{After, Client, Output};
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
    Text(After, Vec<u8>),
    Wreck(Vec<u8>),
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
            Output::Text(after, text) => Seen::Text(after, text.to_vec()),
            Output::Wreck(text) => Seen::Wreck(text.to_vec()),
            Output::Missed { bytes, .. } => {
                Seen::Words(format!("\n[{bytes} bytes of output were missed]\n").into_bytes())
            }
            Output::VmState { vm, state } => Seen::State(vm, state),
            Output::Injected(bytes) => Seen::Typed(bytes.to_vec()),
            Output::InjectedEnd => Seen::TypedEnd,
            // What is readable of it comes beside it.
            Output::BadFrame(_) => return,
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
        ending: Ending::AsMeant,
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
        monitor.ending = Ending::CutShort;
    }
    monitor.last_words();
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
///
/// A frame that lost its beginning is text to the decoder, and most of what it carries looks like words. So the text
/// between two delimiters is judged in one piece: a frame's end has its checksum.
#[derive(Default)]
struct Outside {
    /// Text since the last delimiter, and when it began: nobody waits longer than a [`TICK`] for a delimiter.
    held: Vec<u8>,
    since: Option<Instant>,
    judged: Judged,
    /// The last [`WRECK_KEPT`] bytes that are readable of frames that came broken, since the guest's last output.
    wreck: Vec<u8>,
}

/// What the text since the last delimiter is, as far as it was judged.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Judged {
    #[default]
    Words,
    /// Of a frame that came broken.
    Wreck,
}

impl Outside {
    /// Takes a piece of text. Gives the words that ended before it.
    fn take(&mut self, after: After, text: &[u8]) -> Vec<u8> {
        let words = match after {
            After::Text => Vec::new(),
            After::Delimiter | After::BadFrame => self.judge(),
        };
        match after {
            After::Text => {}
            After::Delimiter => self.judged = Judged::Words,
            After::BadFrame => self.judged = Judged::Wreck,
        }
        self.held.extend_from_slice(text);
        self.since.get_or_insert_with(Instant::now);
        words
    }

    /// Gives the words that no delimiter has ended for a while.
    fn overdue(&mut self) -> Vec<u8> {
        match self.since {
            Some(since) if since.elapsed() >= TICK => self.judge(),
            _ => Vec::new(),
        }
    }

    /// Gives what is held if it is words; keeps it otherwise.
    fn judge(&mut self) -> Vec<u8> {
        self.since = None;
        let held = std::mem::take(&mut self.held);
        if !is_readable(&held) {
            self.judged = Judged::Wreck;
        }
        if self.judged == Judged::Words {
            return held;
        }
        self.keep(&held);
        Vec::new()
    }

    fn keep(&mut self, wreck: &[u8]) {
        self.wreck.extend_from_slice(wreck);
        // A crash is what came last.
        let too_much = self.wreck.len().saturating_sub(WRECK_KEPT);
        self.wreck.drain(..too_much);
    }
}

/// Whether text is what a person was meant to read: what the hypervisor says has none of the control characters that
/// every frame has. A character may be cut at either end.
fn is_readable(text: &[u8]) -> bool {
    let is_fine =
        |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x08 | 0x1b | b' '..=0x7e | 0x80..);
    let cut = text.iter().take(3);
    let cut = cut.take_while(|byte| matches!(byte, 0x80..=0xbf)).count();
    let whole = text.get(cut..).unwrap_or_default();
    let is_utf8 = str::from_utf8(whole).map_or_else(|at| at.error_len().is_none(), |_| true);
    is_utf8 && whole.iter().all(is_fine)
}

/// How the command ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    AsMeant,
    /// By an error, or with a machine that answers no more.
    CutShort,
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
    ending: Ending,
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
            let words = self.outside.overdue();
            self.words(&words);
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
            Err(Error::Closed { .. } | Error::NoAnswer { .. }) => {
                self.ending = Ending::CutShort;
                Ok(true)
            }
            other => other,
        }
    }

    /// Handles all that came.
    fn handle(&mut self) -> Result<Option<Over>> {
        while let Ok(seen) = self.seen.try_recv() {
            if let Seen::Console(_) | Seen::Words(_) | Seen::Wreck(_) | Seen::State(..) = seen {
                // Of a frame, whose delimiter ended the text before it.
                let words = self.outside.judge();
                self.words(&words);
            }
            match seen {
                Seen::Console(data) => {
                    self.outside.wreck.clear();
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
                Seen::State(vm, state) if vm == self.vm.id => match state {
                    VmState::Stopped | VmState::Failed => {
                        self.ended = Some((state, LastWords::ToCome));
                    }
                    state => {
                        self.ended = None;
                        self.words(format!("[{} {state}]\n", self.vm.name).as_bytes());
                    }
                },
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
                seen => self.beside(seen),
            }
        }
        Ok(None)
    }

    /// What is left to say at the end. If that is none that was meant, what came last may be how the machine crashed.
    fn last_words(&mut self) {
        if self.ending == Ending::CutShort {
            // All that came before. How it ends is known.
            let _ = self.handle();
        }
        while let Ok(seen) = self.seen.try_recv() {
            self.beside(seen);
        }
        let words = self.outside.judge();
        self.words(&words);
        let is_shown = |byte: &u8| matches!(byte, b'\t' | b'\n' | b' '..=0x7e | 0x80..);
        let shown: Vec<u8> = self
            .outside
            .wreck
            .iter()
            .copied()
            .filter(is_shown)
            .collect();
        if self.ending == Ending::CutShort && !shown.is_empty() {
            self.words(b"\n[what can be read of the last that came, which is damaged:]\n");
            self.words(String::from_utf8_lossy(&shown).as_bytes());
            self.words(b"\n");
        }
    }

    /// Handles the hypervisor's words and what is left of broken frames, and nothing else.
    fn beside(&mut self, seen: Seen) {
        match seen {
            Seen::Words(text) => self.words(&text),
            Seen::Text(after, text) => {
                let words = self.outside.take(after, &text);
                self.words(&words);
            }
            Seen::Wreck(text) => self.outside.keep(&text),
            _ => {}
        }
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

    /// The end of a frame with this payload.
    const FRAME: &[u8] =
        b"X\x02\x01\x03\x01\x01\x01 Linux version 6.1\nMachine model: Tidemark\n\x9c\x07\xa5\xf1";
    const WORDS: &[u8] = b"INFO  cpu0 linux: running\n";

    /// What is shown of pieces, and then a delimiter.
    fn shown(outside: &mut Outside, pieces: &[(After, &[u8])]) -> Vec<u8> {
        let mut shown = Vec::new();
        for (after, piece) in pieces {
            shown.extend(outside.take(*after, piece));
        }
        shown.extend(outside.take(After::Delimiter, b""));
        shown
    }

    #[test]
    fn a_frame_without_its_beginning_is_no_words_however_it_is_cut() {
        for lost in [0, 1, 7, 20] {
            let frame = FRAME.get(lost..).expect("so long");
            for cut in 0..frame.len() {
                let (first, rest) = frame.split_at(cut);
                let mut outside = Outside::default();
                let pieces = [
                    (After::Delimiter, WORDS),
                    (After::Delimiter, first),
                    (After::Text, rest),
                    (After::Delimiter, WORDS),
                ];
                assert_eq!(
                    shown(&mut outside, &pieces),
                    WORDS.repeat(2),
                    "{lost} {cut}"
                );
                assert_eq!(outside.wreck, frame);
            }
        }
    }

    #[test]
    fn the_rest_of_a_broken_frame_is_no_words_and_what_follows_is() {
        let pieces = [
            (After::BadFrame, b"Machine model: Tidemark\n".as_slice()),
            (After::Text, b"Linux version 6.1\n"),
            (After::Delimiter, WORDS),
            (After::Text, WORDS),
        ];
        assert_eq!(shown(&mut Outside::default(), &pieces), WORDS.repeat(2));
    }

    /// A bell, and a character that is cut in two: another guest's, which a shared terminal shows.
    #[test]
    fn what_cannot_be_read_costs_no_words_behind_it() {
        let pieces = [
            (
                After::Text,
                b"end of a frame of an earlier session\x01\x02".as_slice(),
            ),
            (After::Delimiter, b"\x07ping\n"),
            (After::Delimiter, "EL2 panic: gr\u{fc}n".as_bytes()),
        ];
        assert_eq!(
            shown(&mut Outside::default(), &pieces),
            "EL2 panic: gr\u{fc}n".as_bytes()
        );
        let (first, rest) = "gr\u{fc}n".as_bytes().split_at(3);
        assert!(is_readable(first) && is_readable(rest));
        assert!(!is_readable(b"\x01") && !is_readable(b"gr\xfcn"));
    }

    #[test]
    fn of_a_long_wreck_the_end_is_kept() {
        let mut outside = Outside::default();
        (0..3).for_each(|_| outside.keep(&[b'.'; WRECK_KEPT]));
        outside.keep(b"EL2 panic");
        assert_eq!(outside.wreck.len(), WRECK_KEPT);
        assert!(outside.wreck.ends_with(b"EL2 panic"));
    }
}
