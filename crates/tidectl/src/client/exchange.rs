//! Requests and their answers: retries, several in flight, and what arrives between them.

use super::threads::{BEAT, Incoming, Outgoing};
use super::{Beat, Client, Heed, Line, Output};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};
use tidemark_wire::frame::{BadReason, Header, Kind, Seq, encode};
use tidemark_wire::message::{ErrorReply, Event, Request, Response};
use tidemark_wire::{CONSOLE_WRITE_MAX, PATIENCE_MS_MAX, PATIENCE_MS_MIN, REQUEST_PAYLOAD_MAX};

/// How often a wait looks at the interrupt flag.
const GLANCE: Duration = Duration::from_millis(100);

/// Pause before asking a busy target again.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Pause before asking again for what came damaged, so that a line with nothing whole on it is not filled with
/// requests.
const DAMAGE_PAUSE: Duration = Duration::from_millis(5);

/// Most that the silence before sending again grows.
const RETRY_GROWTH: u32 = 4;

/// A request whose answer has not come.
struct Flight<T> {
    seq: Seq,
    frame: Vec<u8>,
    work: T,
    sent: Instant,
}

/// What a wait for an answer came to.
enum Awaited {
    Answer(Header, Vec<u8>),
    /// A frame came damaged, which may have been it.
    Damage,
    /// Nothing of the kind came for a while.
    Silence,
}

/// When an exchange last heard something.
struct Clock {
    /// An answer to one of its requests, or its start.
    answer: Instant,
    /// Anything at all: a line busy with console output has not lost a request.
    anything: Instant,
    /// An answer, or requests sent again.
    moved: Instant,
    /// Frames that had come damaged when it started.
    damaged: u64,
    /// Silence after which requests are sent again; grows while nothing answers, so that a
    /// slow target is not buried.
    retry: Duration,
}

impl Client {
    /// Sends one request and reads its answer. `read` has nothing for an
    /// answer it did not expect.
    ///
    /// # Errors
    /// The target's refusal, a silent or closed line, an answer that makes no sense.
    pub fn call<T>(
        &mut self,
        during: &str,
        request: &Request<'_>,
        read: impl FnOnce(Response<'_>) -> Option<T>,
    ) -> Result<T> {
        let mut read = Some(read);
        let mut answer = None;
        self.pipeline(
            during,
            [()],
            |()| request.clone(),
            |(), response| {
                let Some(read) = read.take() else {
                    return Ok(None);
                };
                let kind = kind(&response);
                answer = Some(read(response).ok_or_else(|| unexpected(during, kind))?);
                Ok(None)
            },
        )?;
        answer.ok_or_else(|| Error::Protocol {
            during: during.into(),
            problem: "no answer was read".into(),
        })
    }

    /// Sends a request for each piece of `work`, several in flight, in order. `got` reads an
    /// answer and returns what is still to be asked of that piece.
    ///
    /// # Errors
    /// As [`Client::call`]; the first one ends the exchange.
    pub fn pipeline<'r, T>(
        &mut self,
        during: &str,
        work: impl IntoIterator<Item = T>,
        mut ask: impl FnMut(&T) -> Request<'r>,
        mut got: impl FnMut(T, Response<'_>) -> Result<Option<T>>,
    ) -> Result<()> {
        let mut work = work.into_iter();
        let mut again: VecDeque<T> = VecDeque::new();
        let mut flights: VecDeque<Flight<T>> = VecDeque::new();
        let now = Instant::now();
        let retry = self.options.retry;
        let mut clock = Clock {
            answer: now,
            anything: now,
            moved: now,
            damaged: self.stats.bad_frames,
            retry,
        };
        loop {
            while flights.len() < self.options.window.max(1) {
                let Some(piece) = again.pop_front().or_else(|| work.next()) else {
                    break;
                };
                let flight = self.launch(during, piece, &mut ask)?;
                flights.push_back(flight);
            }
            if flights.is_empty() {
                return Ok(());
            }
            let (header, payload) = match self.await_answer(during, &mut clock)? {
                Awaited::Answer(header, payload) => (header, payload),
                // It can only have been this one's answer, or something that is sent but once.
                Awaited::Damage if flights.len() == 1 => {
                    thread::sleep(DAMAGE_PAUSE);
                    self.resend_first(during, &mut flights, 1)?;
                    continue;
                }
                Awaited::Damage | Awaited::Silence => {
                    self.resend_after_silence(during, &mut flights, &mut clock)?;
                    continue;
                }
            };
            let Some(place) = flights.iter().position(|flight| flight.seq == header.seq) else {
                // The second answer to a request that was sent twice.
                continue;
            };
            let Some(flight) = flights.remove(place) else {
                continue;
            };
            clock.answer = Instant::now();
            clock.moved = clock.answer;
            clock.retry = self.options.retry;
            // Requests of a kind are answered in their order: what was sent before this one has been lost.
            self.resend_first(during, &mut flights, place)?;
            let response = Response::decode(&payload).map_err(|error| Error::Protocol {
                during: during.into(),
                problem: error.to_string(),
            })?;
            match response {
                Response::Error(ErrorReply::VersionMismatch { target }) => {
                    return Err(Error::Version { target });
                }
                Response::Error(ErrorReply::Busy) if self.still_patient(&flight) => {
                    thread::sleep(BUSY_PAUSE);
                    let again = self.launch(during, flight.work, &mut ask)?;
                    // Its patience counts from the first time.
                    flights.push_back(Flight {
                        sent: flight.sent,
                        ..again
                    });
                }
                Response::Error(reply) => {
                    return Err(Error::Target {
                        during: during.into(),
                        reply,
                    });
                }
                response => again.extend(got(flight.work, response)?),
            }
        }
    }

    /// Asks the same until the answer is final, telling `progress` how far it is.
    ///
    /// # Errors
    /// As [`Client::call`], and [`Error::TooSlow`] when nothing moves for six timeouts.
    pub(super) fn ask_until_done<T>(
        &mut self,
        during: &str,
        request: &Request<'_>,
        progress: &mut dyn FnMut(u64, u64),
        mut read: impl FnMut(Response<'_>) -> Option<T>,
    ) -> Result<T> {
        enum Step<T> {
            Progress(u64, u64),
            Done(T),
        }
        let patience = self.options.timeout * 6;
        let mut last = (u64::MAX, Instant::now());
        let mut pause = Duration::from_millis(1);
        loop {
            let step = self.call(during, request, |response| match response {
                Response::Progress { done, total } => Some(Step::Progress(done, total)),
                response => read(response).map(Step::Done),
            })?;
            match step {
                Step::Done(value) => return Ok(value),
                Step::Progress(done, total) => {
                    progress(done, total);
                    if done != last.0 {
                        last = (done, Instant::now());
                    } else if last.1.elapsed() > patience {
                        return Err(Error::TooSlow {
                            what: during.into(),
                            after: patience,
                        });
                    }
                    thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
            }
        }
    }

    /// Runs `tidy`, which puts something back, even when interrupted.
    pub(crate) fn undisturbed<T>(&mut self, tidy: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.heed, Heed::Nothing);
        let value = tidy(self);
        self.heed = before;
        value
    }

    /// Fails if Ctrl-C was pressed.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn check_interrupt(&self) -> Result<()> {
        if self.heed == Heed::Interrupt && self.options.interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    fn launch<'r, T>(
        &mut self,
        during: &str,
        work: T,
        ask: &mut impl FnMut(&T) -> Request<'r>,
    ) -> Result<Flight<T>> {
        let seq = self.seq;
        self.seq = match seq.next() {
            BEAT => BEAT.next(),
            next => next,
        };
        let frame = self.encode(during, seq, &ask(&work))?;
        self.send(during, Outgoing::Frame(frame.clone()))?;
        Ok(Flight {
            seq,
            frame,
            work,
            sent: Instant::now(),
        })
    }

    /// Has the target hear of this session as long as this process lives, whatever it is busy with: from the first
    /// thing on that the session holds.
    pub(super) fn stay_alive(&mut self) -> Result<()> {
        if self.beat == Beat::Going {
            return Ok(());
        }
        let during = "asking to be waited for";
        let least = Duration::from_millis(u64::from(PATIENCE_MS_MIN));
        let most = Duration::from_millis(u64::from(PATIENCE_MS_MAX));
        let patience = self.options.patience.clamp(least, most);
        let request = Request::KeepAlive {
            patience_ms: patience.as_millis() as u32,
        };
        self.call(during, &request, |response| {
            matches!(response, Response::Ok).then_some(())
        })?;
        let frame = self.encode(during, BEAT, &request)?;
        // One of them may be lost, and the next one late.
        self.send(during, Outgoing::Beat(frame, patience / 4))?;
        self.beat = Beat::Going;
        Ok(())
    }

    fn encode(&self, during: &str, seq: Seq, request: &Request<'_>) -> Result<Vec<u8>> {
        let header = Header {
            kind: Kind::Request,
            seq,
            session: self.session,
        };
        let mut buffer = [0; REQUEST_PAYLOAD_MAX];
        let mut frame = Vec::new();
        request
            .encode(&mut buffer)
            .ok()
            .and_then(|payload| {
                encode(&header, payload, &mut |part: &[u8]| frame.extend_from_slice(part)).ok()
            })
            .ok_or_else(|| Error::Usage(format!(
                "a request while {during} is too long; console input goes {CONSOLE_WRITE_MAX} bytes at a time"
            )))?;
        Ok(frame)
    }

    fn send(&mut self, during: &str, what: Outgoing) -> Result<()> {
        let sent = self.outgoing.as_ref().map(|outgoing| outgoing.send(what));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(self.closed(during)),
        }
    }

    fn closed(&mut self, during: &str) -> Error {
        self.line = Line::Closed;
        Error::Closed {
            during: during.into(),
        }
    }

    /// Tells whether a busy target may be asked once more.
    fn still_patient<T>(&self, flight: &Flight<T>) -> bool {
        flight.sent.elapsed() < self.options.timeout
    }

    /// Waits for an answer of this session, for a while.
    fn await_answer(&mut self, during: &str, clock: &mut Clock) -> Result<Awaited> {
        let until = Instant::now() + clock.retry;
        loop {
            self.check_interrupt()?;
            let after = self.patience();
            if clock.answer.elapsed() >= after {
                if self.line == Line::Open {
                    self.line = Line::Silent;
                }
                return Err(Error::NoAnswer {
                    after,
                    damaged: self.stats.bad_frames.saturating_sub(clock.damaged),
                    during: during.into(),
                });
            }
            let left = until.saturating_duration_since(Instant::now()).min(GLANCE);
            if left.is_zero() {
                return Ok(Awaited::Silence);
            }
            match self.incoming.recv_timeout(left) {
                Ok(Incoming::Frame(header, payload)) if header.kind == Kind::Response => {
                    clock.anything = Instant::now();
                    self.count(&payload);
                    if header.session == self.session {
                        if self.line == Line::Silent {
                            self.line = Line::Open;
                        }
                        return Ok(Awaited::Answer(header, payload));
                    }
                }
                Ok(other) => {
                    clock.anything = Instant::now();
                    let damage = matches!(other, Incoming::Bad(..));
                    self.take_in(during, other)?;
                    if damage {
                        return Ok(Awaited::Damage);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.closed(during)),
            }
        }
    }

    /// Passes on what is not an answer.
    fn take_in(&mut self, during: &str, incoming: Incoming) -> Result<()> {
        match incoming {
            Incoming::Frame(header, payload) => {
                if header.kind == Kind::Event && header.session == self.session {
                    self.count(&payload);
                    // An event that cannot be read is as good as lost, which is provided for.
                    if let Ok(event) = Event::decode(&payload) {
                        self.event(&event);
                    }
                }
            }
            Incoming::Text(after, text) => (self.sink)(Output::Text(after, &text)),
            Incoming::Bad(reason, text) => {
                // One that was under way when the line was closed is not the line's fault.
                if reason != BadReason::Ended {
                    self.stats.bad_frames += 1;
                }
                (self.sink)(Output::BadFrame(reason));
                if !text.is_empty() {
                    (self.sink)(Output::Wreck(&text));
                }
            }
            Incoming::Injected(bytes) => (self.sink)(Output::Injected(&bytes)),
            Incoming::InjectedEnd => (self.sink)(Output::InjectedEnd),
            Incoming::Closed => return Err(self.closed(during)),
        }
        Ok(())
    }

    fn count(&mut self, payload: &[u8]) {
        self.stats.frames += 1;
        self.stats.payload_bytes += payload.len() as u64;
    }

    /// Handles what arrives without a request, for `time` or until something has.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Interrupted`].
    pub(super) fn take_in_for(&mut self, during: &str, time: Duration) -> Result<Heard> {
        let until = Instant::now() + time;
        loop {
            self.check_interrupt()?;
            let left = until.saturating_duration_since(Instant::now());
            match self.incoming.recv_timeout(left.min(GLANCE)) {
                Ok(first) => {
                    self.take_in(during, first)?;
                    while let Ok(more) = self.incoming.try_recv() {
                        self.take_in(during, more)?;
                    }
                    return Ok(Heard::Something);
                }
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(Heard::Nothing),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.closed(during)),
            }
        }
    }

    fn resend_after_silence<T>(
        &mut self,
        during: &str,
        flights: &mut VecDeque<Flight<T>>,
        clock: &mut Clock,
    ) -> Result<()> {
        let quiet = clock.anything.elapsed() >= clock.retry;
        // Console output without end must not hide that an answer was lost.
        let overdue = clock.moved.elapsed() >= clock.retry * 4;
        if !quiet && !overdue {
            return Ok(());
        }
        clock.moved = Instant::now();
        clock.retry = (clock.retry * 2).min(self.options.retry * RETRY_GROWTH);
        let all = flights.len();
        self.resend_first(during, flights, all)
    }

    /// Sends the first `count` flights again.
    fn resend_first<T>(
        &mut self,
        during: &str,
        flights: &mut VecDeque<Flight<T>>,
        count: usize,
    ) -> Result<()> {
        for _ in 0..count {
            let Some(flight) = flights.pop_front() else {
                break;
            };
            self.stats.retransmits += 1;
            self.send(during, Outgoing::Frame(flight.frame.clone()))?;
            flights.push_back(flight);
        }
        Ok(())
    }
}

/// Whether anything arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// It did, and has been handled.
    Something,
    /// It did not.
    Nothing,
}

/// An answer of the wrong kind.
pub(super) fn unexpected(during: &str, kind: &str) -> Error {
    Error::Protocol {
        during: during.into(),
        problem: format!("an answer of kind {kind}"),
    }
}

/// What an answer is, for the message that it should not have been.
pub(super) fn kind(response: &Response<'_>) -> &'static str {
    match response {
        Response::Ok => "ok",
        Response::Error(_) => "error",
        Response::Hello { .. } => "hello",
        Response::Vms(_) => "vms",
        Response::Info(_) => "info",
        Response::State(_) => "state",
        Response::Progress { .. } => "progress",
        Response::HashDone { .. } => "hash",
        Response::DirtyStatus(_) => "dirty status",
        Response::TakeDone(_) => "harvest",
        Response::Bitmap { .. } => "bitmap",
        Response::Memory { .. } => "memory",
        Response::ConsoleData { .. } => "console data",
        Response::ConsoleAccepted { .. } => "console input",
        Response::Costs { .. } => "costs",
        Response::PageSums { .. } => "page sums",
    }
}
