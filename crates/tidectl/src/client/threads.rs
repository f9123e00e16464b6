//! The two threads of a link: one decodes what comes, one writes what goes.

use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::Duration;
use std::{io, thread};
use tidemark_wire::RESPONSE_PAYLOAD_MAX;
use tidemark_wire::frame::{BadReason, Decoder, Header, Item, Kind, Seq, buffer_len};

/// Items the reader may be ahead of the client; then the line's own flow control holds.
const AHEAD: usize = 256;

/// What stood before a piece of text that came outside of frames. The line cuts text into pieces as it likes; what ends
/// it is a delimiter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// The text of the piece before it, or the beginning.
    Text,
    /// A delimiter.
    Delimiter,
    /// A frame that was refused: if a delimiter arose in its middle, the rest of it looks like text.
    BadFrame,
}

/// What arrives at the client.
pub(super) enum Incoming {
    Frame(Header, Vec<u8>),
    Text(After, Vec<u8>),
    Bad(BadReason, Vec<u8>),
    Closed,
    Injected(Vec<u8>),
    InjectedEnd,
}

/// Puts bytes of another thread, such as keystrokes, among a client's outputs.
#[derive(Clone)]
pub struct Injector(SyncSender<Incoming>);

/// The client is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClientGone;

impl Injector {
    /// Hands `bytes` over.
    ///
    /// # Errors
    /// [`ClientGone`].
    pub fn send(&self, bytes: &[u8]) -> Result<(), ClientGone> {
        self.0
            .send(Incoming::Injected(bytes.to_vec()))
            .map_err(|_| ClientGone)
    }

    /// Tells that there will be no more.
    ///
    /// # Errors
    /// [`ClientGone`].
    pub fn end(&self) -> Result<(), ClientGone> {
        self.0.send(Incoming::InjectedEnd).map_err(|_| ClientGone)
    }
}

pub(super) struct Threads {
    pub(super) incoming: Receiver<Incoming>,
    pub(super) injector: Injector,
    pub(super) outgoing: Sender<Outgoing>,
}

/// What the writer is given.
pub(super) enum Outgoing {
    /// To be sent.
    Frame(Vec<u8>),
    /// To be sent whenever nothing else was for so long.
    Beat(Vec<u8>, Duration),
    /// No more of that.
    NoBeat,
}

/// The number of a beat's request, which no other has: its answer means nothing and may come at any time.
pub(super) const BEAT: Seq = Seq(u16::MAX);

/// Starts both threads. They end when the stream ends or the client is dropped.
pub(super) fn start(
    reader: Box<dyn Read + Send>,
    writer: Box<dyn Write + Send>,
) -> io::Result<Threads> {
    let (to_client, incoming) = mpsc::sync_channel(AHEAD);
    let (outgoing, from_client) = mpsc::channel();
    let injector = Injector(to_client.clone());
    let write_failed = to_client.clone();
    thread::Builder::new()
        .name("tidectl-reader".into())
        .spawn(move || read(reader, &to_client))?;
    thread::Builder::new()
        .name("tidectl-writer".into())
        .spawn(move || write(writer, &from_client, &write_failed))?;
    Ok(Threads {
        incoming,
        injector,
        outgoing,
    })
}

fn write(
    mut writer: Box<dyn Write + Send>,
    from_client: &Receiver<Outgoing>,
    failed: &SyncSender<Incoming>,
) {
    let mut beat: Option<(Vec<u8>, Duration)> = None;
    loop {
        let next = match &beat {
            Some((_, every)) => from_client.recv_timeout(*every),
            None => from_client.recv().map_err(RecvTimeoutError::from),
        };
        let bytes = match (next, &beat) {
            (Ok(Outgoing::Frame(bytes)), _) => bytes,
            (Ok(Outgoing::Beat(bytes, every)), _) => {
                beat = Some((bytes, every));
                continue;
            }
            (Ok(Outgoing::NoBeat), _) => {
                beat = None;
                continue;
            }
            (Err(RecvTimeoutError::Timeout), Some((bytes, _))) => bytes.clone(),
            (Err(_), _) => return,
        };
        if writer
            .write_all(&bytes)
            .and_then(|()| writer.flush())
            .is_err()
        {
            // Not waited for: the reader usually says it first.
            let _ = failed.try_send(Incoming::Closed);
            return;
        }
    }
}

fn read(mut reader: Box<dyn Read + Send>, to_client: &SyncSender<Incoming>) {
    let mut decoder = Box::new(Decoder::<{ buffer_len(RESPONSE_PAYLOAD_MAX) }>::new());
    let mut buffer = vec![0; 65536];
    let mut text = Text {
        after: After::Text,
        bytes: Vec::new(),
    };
    loop {
        let got = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for &byte in buffer.iter().take(got) {
            let (before_text, said) = match decoder.push(byte) {
                None if byte != 0 => continue,
                Some(Item::Text(byte)) => {
                    text.bytes.push(byte);
                    continue;
                }
                None => (After::Delimiter, None),
                Some(Item::Frame(frame))
                    if frame.header.kind == Kind::Response && frame.header.seq == BEAT =>
                {
                    (After::Delimiter, None)
                }
                Some(item @ Item::Bad(_)) => (After::BadFrame, Some(owned(item))),
                Some(item) => (After::Delimiter, Some(owned(item))),
            };
            if text.flush(to_client).is_err()
                || said.is_some_and(|said| to_client.send(said).is_err())
            {
                return;
            }
            text.after = before_text;
        }
        if text.flush(to_client).is_err() {
            return;
        }
    }
    if let Some(item) = decoder.finish() {
        let _ = to_client.send(owned(item));
    }
    let _ = to_client.send(Incoming::Closed);
}

fn owned(item: Item<'_>) -> Incoming {
    match item {
        Item::Frame(frame) => Incoming::Frame(frame.header, frame.payload.to_vec()),
        Item::Bad(bad) => Incoming::Bad(bad.reason, bad.text.to_vec()),
        Item::Text(byte) => Incoming::Text(After::Text, vec![byte]),
    }
}

/// Text gathered so far, and what stood before it.
struct Text {
    after: After,
    bytes: Vec<u8>,
}

impl Text {
    /// Sends it, so that it keeps its place among the frames.
    fn flush(&mut self, to_client: &SyncSender<Incoming>) -> Result<(), ClientGone> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let after = std::mem::replace(&mut self.after, After::Text);
        to_client
            .send(Incoming::Text(after, std::mem::take(&mut self.bytes)))
            .map_err(|_| ClientGone)
    }
}
