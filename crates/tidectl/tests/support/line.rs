//! The line to the fake target: its socket, and what a bad line does to frames.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use tidemark_wire::REQUEST_PAYLOAD_MAX;
use tidemark_wire::frame::{Decoder, Header, Item, Session, buffer_len, encode};
use tidemark_wire::message::{ErrorReply, Response};

use super::rng::Rng;
use super::{Target, lock};

/// How bad the line is, in percent of frames, each way.
#[derive(Clone, Default)]
pub struct Faults {
    pub seed: u64,
    pub drop: u64,
    pub flip: u64,
    pub cut: u64,
    pub double: u64,
    pub text: u64,
    /// Close the line after this many frames sent.
    pub vanish_after: Option<u64>,
    /// Lose just the request of this number.
    pub lose_request: Option<u64>,
    /// Before each answer, send one of a session that is no more.
    pub stale_answers: bool,
}

/// Serves one connection until it ends.
pub fn serve(target: &Mutex<Target>, mut stream: UnixStream, faults: &Faults) {
    let mut decoder = Decoder::<{ buffer_len(REQUEST_PAYLOAD_MAX) }>::new();
    let mut rng = Rng::new(faults.seed);
    let mut buffer = [0; 4096];
    let (mut sent, mut heard) = (0, 0);
    loop {
        let Ok(got @ 1..) = stream.read(&mut buffer) else {
            return;
        };
        for &byte in &buffer[..got] {
            let replies = match decoder.push(byte) {
                Some(Item::Frame(frame)) => {
                    heard += 1;
                    if faults.lose_request == Some(heard) {
                        continue;
                    }
                    // The way to the target is bad too.
                    if rng.percent(faults.drop + faults.flip) {
                        continue;
                    }
                    let mut replies = lock(target).frame(&frame);
                    if rng.percent(faults.double) {
                        replies.extend(lock(target).frame(&frame));
                    }
                    replies
                }
                Some(Item::Text(byte)) => {
                    let text = lock(target).text(byte);
                    if stream.write_all(&text).is_err() {
                        return;
                    }
                    continue;
                }
                Some(Item::Bad(_)) | None => continue,
            };
            for (header, payload) in replies {
                if faults.vanish_after.is_some_and(|after| sent >= after) {
                    return;
                }
                sent += 1;
                lock(target).frames_sent += 1;
                let mut bytes = Vec::new();
                if faults.stale_answers {
                    let session = Session(!header.session.0);
                    let stale = Header { session, ..header };
                    let refusal = Response::Error(ErrorReply::NoSuchVm);
                    let mut buffer = [0; 8];
                    let payload = refusal.encode(&mut buffer).expect("it fits");
                    encode(&stale, payload, &mut |part: &[u8]| {
                        bytes.extend_from_slice(part)
                    })
                    .expect("it fits");
                }
                encode(&header, &payload, &mut |part: &[u8]| {
                    bytes.extend_from_slice(part)
                })
                .expect("it fits");
                if stream.write_all(&worsen(bytes, &mut rng, faults)).is_err() {
                    return;
                }
            }
        }
    }
}

/// What a bad line makes of a frame.
fn worsen(mut bytes: Vec<u8>, rng: &mut Rng, faults: &Faults) -> Vec<u8> {
    if rng.percent(faults.drop) {
        return Vec::new();
    }
    if rng.percent(faults.flip) {
        let at = rng.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << rng.below(8);
    }
    if rng.percent(faults.cut) {
        bytes.truncate(rng.below(bytes.len() as u64) as usize);
    }
    if rng.percent(faults.text) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        bytes.splice(at..at, b"[   12.3] EL2 says hello\r\n".iter().copied());
    }
    if rng.percent(faults.double) {
        bytes.extend(bytes.clone());
    }
    bytes
}

/// Connects to a target of its own thread.
pub fn connect(target: &Arc<Mutex<Target>>, faults: Faults) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let target = Arc::clone(target);
    thread::spawn(move || serve(&target, theirs, &faults));
    ours
}

/// Serves one connection after the other at a socket, as QEMU does. The socket's name is
/// short whatever the target directory is, as it must be.
pub fn listen(target: &Arc<Mutex<Target>>, name: &str, faults: Faults) -> Socket {
    let path = std::env::temp_dir().join(format!("tidectl-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let target = Arc::clone(target);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            serve(&target, stream, &faults);
        }
    });
    Socket(path)
}

/// A socket's name, removed with the test that made it.
pub struct Socket(pub PathBuf);

impl Socket {
    pub fn port(&self) -> String {
        format!("unix:{}", self.0.display())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
