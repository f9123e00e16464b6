//! Lets one program at a time onto a line that is already being read.
//!
//! The scripts read the console all the time, and `tidectl` wants the same line for
//! its frames. So the harness owns the line and offers a Unix socket: whoever connects
//! sees every byte of the machine from then on and may send whole frames. The client
//! library is thereby used exactly as a user would use it, `--port unix:PATH`.
//!
//! Concurrency: one thread accepts and copies towards the machine; each connection
//! has one writer thread fed by a queue, so that a client that stops reading never
//! stops the console.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

/// Where bytes for the machine go: shared by the scripts and the relay, one `send` at a
/// time.
pub type ToMachine = Arc<Mutex<Box<dyn Write + Send>>>;

/// Damages one byte in so many, by a seed.
#[derive(Clone, Debug)]
pub struct Damage {
    random: u64,
    one_in: u64,
}

impl Damage {
    /// The damage of `seed`; one byte in `one_in` is another one afterwards.
    #[must_use]
    pub fn new(seed: u64, one_in: u64) -> Self {
        // Zero would stay zero.
        let random = seed | 1;
        Self {
            random,
            one_in: one_in.max(1),
        }
    }

    fn next(&mut self) -> u64 {
        // Marsaglia's xorshift64.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn spoil(&mut self, bytes: &[u8]) -> Vec<u8> {
        let spoilt =
            bytes.iter().map(
                |&byte| match (self.next() >> 11).is_multiple_of(self.one_in) {
                    true => byte ^ (1 << (self.next() >> 13 & 7)),
                    false => byte,
                },
            );
        spoilt.collect()
    }
}

/// The client that is connected now.
type Tap = Arc<Mutex<Option<Connected>>>;

struct Connected {
    /// What it is still to be sent.
    queue: Sender<Vec<u8>>,
    /// Its socket, for cutting it off.
    socket: UnixStream,
}

/// What is wrong with the line between the machine and clients, each way.
type SharedDamage = Arc<Mutex<Option<[Damage; 2]>>>;

/// The listening end.
#[derive(Clone)]
pub struct Relay {
    tap: Tap,
    damage: SharedDamage,
    ears: Arc<Mutex<Vec<Sender<Vec<u8>>>>>,
}

impl Relay {
    /// Listens at `path` and copies what clients send to `machine`.
    pub fn listen(path: &Path, machine: ToMachine) -> Result<Self> {
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot listen at {}", path.display()))?;
        let tap: Tap = Arc::default();
        let for_thread = Arc::clone(&tap);
        let damage = SharedDamage::default();
        let on_the_way = Arc::clone(&damage);
        std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || {
                // Ends with the process; a harness has a handful of these at most.
                for client in listener.incoming().flatten() {
                    serve(client, &for_thread, &machine, &on_the_way);
                }
            })?;
        Ok(Self {
            tap,
            damage,
            ears: Arc::default(),
        })
    }

    /// From now on the line to clients damages what it carries, each way; `None` mends it. Who listens in this process
    /// is not concerned.
    pub fn damage(&self, damage: Option<Damage>) {
        *lock(&self.damage) = damage.map(|damage| {
            let back = Damage::new(!damage.random, damage.one_in);
            [damage, back]
        });
    }

    /// Gives every byte of the machine from now on to a receiver in this process.
    #[must_use]
    pub fn listen_in(&self) -> Receiver<Vec<u8>> {
        let (queue, bytes) = channel();
        lock(&self.ears).push(queue);
        bytes
    }

    /// Hands bytes of the machine to whoever listens.
    pub fn forward(&self, bytes: &[u8]) {
        lock(&self.ears).retain(|ear| ear.send(bytes.to_vec()).is_ok());
        let bytes = match &mut *lock(&self.damage) {
            Some([to_client, _]) => to_client.spoil(bytes),
            None => bytes.to_vec(),
        };
        let mut tap = lock(&self.tap);
        if let Some(client) = tap.as_ref()
            && client.queue.send(bytes).is_err()
        {
            *tap = None;
        }
    }

    /// Cuts the client off in the middle of whatever it is doing, as a pulled cable would.
    pub fn cut(&self) {
        if let Some(client) = lock(&self.tap).take() {
            let _ = client.socket.shutdown(Shutdown::Both);
        }
    }
}

/// Serves one client until it hangs up.
fn serve(client: UnixStream, tap: &Tap, machine: &ToMachine, damage: &SharedDamage) {
    let (Ok(writer), Ok(socket)) = (client.try_clone(), client.try_clone()) else {
        return;
    };
    let (queue, bytes) = channel();
    *lock(tap) = Some(Connected { queue, socket });
    let thread = std::thread::spawn(move || drain(bytes, writer));
    copy_frames(client, machine, damage);
    *lock(tap) = None;
    let _ = thread.join();
}

/// Writes the queue to the client until either end closes.
fn drain(bytes: Receiver<Vec<u8>>, mut writer: UnixStream) {
    for chunk in bytes {
        if writer.write_all(&chunk).is_err() {
            break;
        }
    }
    let _ = writer.shutdown(Shutdown::Both);
}

/// Copies from the client to the machine, never splitting a frame: text typed at the
/// same time must not land inside one.
fn copy_frames(mut client: UnixStream, machine: &ToMachine, damage: &SharedDamage) {
    let mut splitter = Splitter::default();
    let mut buffer = [0; 4096];
    while let Ok(count) = client.read(&mut buffer) {
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        for piece in splitter.push(bytes) {
            let piece = match &mut *lock(damage) {
                Some([_, to_machine]) => to_machine.spoil(&piece),
                None => piece,
            };
            let mut machine = lock(machine);
            if machine
                .write_all(&piece)
                .and_then(|()| machine.flush())
                .is_err()
            {
                return;
            }
        }
    }
    // A client that dies in the middle of a frame is one of the cases under test, so
    // what it did send is delivered.
    let rest = splitter.rest();
    if !rest.is_empty() {
        let _ = lock(machine).write_all(&rest);
    }
}

/// Cuts a client's bytes into text and whole frames, by the rule of
/// [`tidemark_wire::frame`]: after a 00, a byte of 2..=7 begins a frame, anything else
/// is text.
#[derive(Default)]
struct Splitter {
    held: Vec<u8>,
}

impl Splitter {
    /// Takes in bytes and gives out the pieces that are complete.
    fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        for &byte in bytes {
            let opened = self.held.first() == Some(&0);
            let inside = opened && self.held.len() > 1;
            match byte {
                0 if inside => {
                    self.held.push(0);
                    pieces.push(std::mem::replace(&mut self.held, vec![0]));
                }
                0 if opened => {}
                0 => {
                    if !self.held.is_empty() {
                        pieces.push(std::mem::take(&mut self.held));
                    }
                    self.held.push(0);
                }
                2..=7 => self.held.push(byte),
                _ if opened && !inside => {
                    // The 00 that closed the last frame was only that.
                    self.held.clear();
                    self.held.push(byte);
                }
                _ => self.held.push(byte),
            }
        }
        if self.held.first().is_some_and(|&first| first != 0) {
            pieces.push(std::mem::take(&mut self.held));
        }
        pieces
    }

    /// What is left of an unfinished frame.
    fn rest(self) -> Vec<u8> {
        if self.held.len() > 1 {
            self.held
        } else {
            Vec::new()
        }
    }
}

/// Locks whatever another thread did: the data is a plain option or a writer, valid at
/// every step.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(chunks: &[&[u8]]) -> (Vec<Vec<u8>>, Vec<u8>) {
        let mut splitter = Splitter::default();
        let mut pieces = Vec::new();
        for chunk in chunks {
            pieces.extend(splitter.push(chunk));
        }
        (pieces, splitter.rest())
    }

    #[test]
    fn a_frame_in_pieces_comes_out_whole() {
        let (pieces, rest) = all(&[b"\x00\x02b", b"cd", b"\x00"]);
        assert_eq!(pieces, [b"\x00\x02bcd\x00".to_vec()]);
        assert!(rest.is_empty());
    }

    #[test]
    fn text_is_not_held_back() {
        let (pieces, rest) = all(&[b"he", b"lp\n\x00\x03x\x00lis", b"t"]);
        let text = |bytes: &[u8]| bytes.to_vec();
        assert_eq!(
            pieces,
            [
                text(b"he"),
                text(b"lp\n"),
                text(b"\x00\x03x\x00"),
                text(b"lis"),
                text(b"t")
            ]
        );
        assert!(rest.is_empty());
    }

    #[test]
    fn two_frames_keep_their_borders() {
        let (pieces, rest) = all(&[b"\x00\x02a\x00\x00\x02b\x00"]);
        assert_eq!(
            pieces,
            [b"\x00\x02a\x00".to_vec(), b"\x00\x02b\x00".to_vec()]
        );
        assert!(rest.is_empty());
    }

    #[test]
    fn frames_may_share_a_delimiter() {
        let (pieces, _) = all(&[b"\x00\x02a\x00\x02b\x00"]);
        assert_eq!(
            pieces,
            [b"\x00\x02a\x00".to_vec(), b"\x00\x02b\x00".to_vec()]
        );
    }

    #[test]
    fn half_a_frame_is_the_rest() {
        let (pieces, rest) = all(&[b"\x00\x02bc"]);
        assert!(pieces.is_empty());
        assert_eq!(rest, b"\x00\x02bc");
    }
}
