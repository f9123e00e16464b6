//! A host end made by hand, for saying what `tidectl` never would.
//!
//! It writes bytes straight to the machine and listens in on the line.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tidemark_tests::clocks::scaled;
use tidemark_tests::line::Line;
use tidemark_tests::target::Target;
use tidemark_wire::frame::{Decoder, Header, Item, Kind, Seq, Session, buffer_len, encode};
use tidemark_wire::message::{ErrorReply, Request, Response};
use tidemark_wire::{PROTOCOL, REQUEST_PAYLOAD_MAX, RESPONSE_PAYLOAD_MAX};

/// How long a whole, good request may take to be answered.
const ANSWER_SECONDS: u64 = 5;

/// A session spoken by hand.
pub struct Raw {
    line: Arc<Line>,
    bytes: Receiver<Vec<u8>>,
    pending: VecDeque<u8>,
    decoder: Box<Decoder<{ buffer_len(RESPONSE_PAYLOAD_MAX) }>>,
    session: Session,
    seq: Seq,
}

impl Raw {
    /// Listens to `target`; says nothing yet.
    pub fn connect(target: &Target, session: u16) -> Self {
        Self {
            line: Arc::clone(target.line()),
            bytes: target.line().listen_in(),
            pending: VecDeque::new(),
            decoder: Box::new(Decoder::new()),
            session: Session(session),
            seq: Seq(0),
        }
    }

    /// The bytes of `request` as a frame, with the next number.
    pub fn frame(&mut self, request: &Request<'_>) -> Result<Vec<u8>> {
        let mut buffer = [0; REQUEST_PAYLOAD_MAX];
        let payload = request
            .encode(&mut buffer)
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        self.frame_of(payload)
    }

    /// The same with any payload.
    pub fn frame_of(&mut self, payload: &[u8]) -> Result<Vec<u8>> {
        self.seq = self.seq.next();
        let header = Header {
            kind: Kind::Request,
            seq: self.seq,
            session: self.session,
        };
        let mut bytes = Vec::new();
        encode(&header, payload, &mut |part| bytes.extend_from_slice(part))?;
        Ok(bytes)
    }

    /// Sends bytes as they are.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        self.line.send_bytes(bytes)
    }

    /// Sends a request and waits for its response, which `check` gets.
    pub fn ask<T>(
        &mut self,
        request: &Request<'_>,
        check: impl FnOnce(Response<'_>) -> Result<T>,
    ) -> Result<T> {
        let bytes = self.frame(request)?;
        self.send(&bytes)?;
        let payload = self
            .response(scaled(ANSWER_SECONDS))?
            .with_context(|| format!("no answer to {request:?}"))?;
        let response = Response::decode(&payload).map_err(|error| anyhow::anyhow!("{error}"))?;
        check(response)
    }

    /// Waits for the response to the last frame made; `None` when `limit` is over.
    pub fn response(&mut self, limit: Duration) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(byte) = self.pending.pop_front() {
                if let Some(Item::Frame(frame)) = self.decoder.push(byte)
                    && frame.header.kind == Kind::Response
                    && frame.header.seq == self.seq
                    && frame.header.session == self.session
                {
                    return Ok(Some(frame.payload.to_vec()));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.bytes.recv_timeout(left) {
                Ok(bytes) => self.pending.extend(bytes),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => bail!("the line closed"),
            }
        }
    }

    /// Number and session of the last frame made.
    pub fn last(&self) -> (Seq, Session) {
        (self.seq, self.session)
    }

    /// Goes on as another session.
    pub fn become_session(&mut self, session: u16) {
        self.session = Session(session);
    }

    /// Every response up to that to the last frame made, whosever they are.
    pub fn all_responses(&mut self, limit: Duration) -> Result<Vec<(Header, Vec<u8>)>> {
        let deadline = Instant::now() + limit;
        let mut all = Vec::new();
        loop {
            while let Some(byte) = self.pending.pop_front() {
                if let Some(Item::Frame(frame)) = self.decoder.push(byte)
                    && frame.header.kind == Kind::Response
                {
                    all.push((frame.header, frame.payload.to_vec()));
                    if (frame.header.seq, frame.header.session) == (self.seq, self.session) {
                        return Ok(all);
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let bytes = self.bytes.recv_timeout(left);
            self.pending
                .extend(bytes.context("the last answer did not come")?);
        }
    }

    /// Opens the session with `protocol`.
    pub fn hello(&mut self, protocol: u16) -> Result<Result<(), ErrorReply>> {
        let hello = Request::Hello {
            protocol,
            max_payload: 1024,
        };
        self.ask(&hello, |response| match response {
            Response::Hello { .. } => Ok(Ok(())),
            Response::Error(error) => Ok(Err(error)),
            other => bail!("Hello was answered by {other:?}"),
        })
    }

    /// Opens the session as it should be and checks that the machine lists `names`.
    pub fn works(&mut self, names: &[&str]) -> Result<()> {
        self.hello(PROTOCOL)?
            .map_err(|error| anyhow::anyhow!("{error}"))
            .context("a good Hello")?;
        self.ask(&Request::List, |response| match response {
            Response::Vms(vms) => {
                let found: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
                ensure!(found == names, "the machine lists {found:?}, not {names:?}");
                Ok(())
            }
            other => bail!("List was answered by {other:?}"),
        })
    }

    /// Says goodbye, so that the line is plain text again.
    pub fn close(mut self) -> Result<()> {
        self.ask(&Request::Goodbye, |response| {
            ensure!(
                matches!(response, Response::Ok),
                "Goodbye was answered by {response:?}"
            );
            Ok(())
        })
    }
}
