//! `shell`: the hypervisor's own text shell, over the bare line. No frame is sent, but one
//! delimiter first: a program that was cut off in the middle of a frame would otherwise have
//! the target take what is typed for the rest of it.

use super::Context;
use crate::link::Link;
use crate::output::Ui;
use crate::terminal::{Keyboard, LEAVE, RawMode, with_returns};
use crate::units::parse_duration;
use crate::{Error, Result};
use clap::Args;
use std::io::{self, Read, Write};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::Duration;
use tidemark_wire::RESPONSE_PAYLOAD_MAX;
use tidemark_wire::frame::{Decoder, Item, buffer_len};

/// How often Ctrl-C is looked for.
const GLANCE: Duration = Duration::from_millis(100);

/// How long to listen.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// With input from a pipe: quiet after its end that ends the command.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    linger: Duration,
}

enum Came {
    Text(Vec<u8>),
    Closed,
    Typed(Vec<u8>),
    TypedEnd,
}

pub(super) fn run(context: &mut Context, args: &ShellArgs) -> Result<()> {
    let Link {
        reader,
        mut writer,
        closer,
        pace: _,
    } = context.link()?;
    let (sender, came) = mpsc::sync_channel(64);
    let typed = sender.clone();
    let spawned = thread::Builder::new()
        .name("tidectl-reader".into())
        .spawn(move || read_text(reader, &sender))
        .and_then(|_| {
            let body = move || read_keys(&typed);
            thread::Builder::new()
                .name("tidectl-stdin".into())
                .spawn(body)
        });
    spawned.map_err(|source| Error::Local {
        what: "starting a thread",
        source,
    })?;
    let closed = || Error::Closed {
        during: "talking to the shell".into(),
    };
    writer.write_all(&[0]).map_err(|_| closed())?;
    let (raw, keyboard) = RawMode::enter()?;
    if keyboard == Keyboard::Terminal {
        context
            .ui
            .say("[plain terminal: Ctrl-] leaves, `help` helps]\r");
    }
    let mut quiet = Duration::ZERO;
    let mut ended = false;
    let outcome = loop {
        if context.interrupt.load(Ordering::Relaxed) {
            break Err(Error::Interrupted);
        }
        match came.recv_timeout(GLANCE) {
            Ok(Came::Text(text)) => {
                quiet = Duration::ZERO;
                show(&mut context.ui, keyboard, &text)?;
            }
            Ok(Came::Closed) | Err(RecvTimeoutError::Disconnected) => {
                break Err(closed());
            }
            Ok(Came::Typed(bytes)) => {
                let leave = bytes.iter().position(|&byte| byte == LEAVE);
                if keyboard == Keyboard::Terminal && leave.is_some() {
                    break Ok(());
                }
                let sent = writer.write_all(&bytes).and_then(|()| writer.flush());
                if sent.is_err() {
                    break Err(closed());
                }
            }
            Ok(Came::TypedEnd) if keyboard == Keyboard::Terminal => break Ok(()),
            Ok(Came::TypedEnd) => {
                ended = true;
                quiet = Duration::ZERO;
            }
            Err(RecvTimeoutError::Timeout) => quiet += GLANCE,
        }
        if ended && quiet >= args.linger {
            break Ok(());
        }
    };
    drop(raw);
    drop(closer);
    outcome
}

fn show(ui: &mut Ui, keyboard: Keyboard, text: &[u8]) -> Result<()> {
    match keyboard {
        Keyboard::Terminal => ui.bytes(&with_returns(text)),
        Keyboard::Stream => ui.bytes(text),
    }
}

/// Frames may still come if somebody's session was never closed; only text is shown.
fn read_text(mut reader: Box<dyn Read + Send>, to: &SyncSender<Came>) {
    let mut decoder = Box::new(Decoder::<{ buffer_len(RESPONSE_PAYLOAD_MAX) }>::new());
    let mut buffer = [0; 4096];
    loop {
        let got = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let mut text = Vec::new();
        for &byte in buffer.iter().take(got) {
            match decoder.push(byte) {
                Some(Item::Text(byte)) => text.push(byte),
                Some(Item::Bad(bad)) => text.extend_from_slice(bad.text),
                Some(Item::Frame(_)) | None => {}
            }
        }
        if !text.is_empty() && to.send(Came::Text(text)).is_err() {
            return;
        }
    }
    let _ = to.send(Came::Closed);
}

fn read_keys(to: &SyncSender<Came>) {
    let mut buffer = [0; 1024];
    loop {
        match io::stdin().lock().read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => {
                let bytes = buffer.get(..got).unwrap_or(&[]).to_vec();
                if to.send(Came::Typed(bytes)).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = to.send(Came::TypedEnd);
}
