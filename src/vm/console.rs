//! A guest's console: what it wrote, kept for whoever looks later, and what was typed for
//! it and is not read yet.

use crate::arch::lock::{Mutex, MutexGuard, rank};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::AtomicBool;

/// Bytes of output that are kept.
const HISTORY: usize = 64 * 1024;
/// Bytes of input that wait.
const INPUT: usize = 4096;
/// A line on a shared terminal; longer ones are cut.
const LINE: usize = 512;

/// Output by position in its stream, from the VM's making on.
#[derive(Debug)]
pub struct History {
    bytes: VecDeque<u8>,
    /// Position past the last byte.
    pub end: u64,
    /// Position up to which an attached host was told.
    pub sent: u64,
    /// Position up to which a plain terminal was shown it.
    shown: u64,
}

impl History {
    /// Position of the oldest byte kept.
    pub fn oldest(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Copies bytes from position `from` on; gives the position of the first one, and how
    /// many. What is too old is skipped.
    pub fn read(&self, from: u64, out: &mut [u8]) -> (u64, usize) {
        let from = from.clamp(self.oldest(), self.end);
        let skip = (from - self.oldest()) as usize;
        let mut len = 0;
        for (place, &byte) in out.iter_mut().zip(self.bytes.iter().skip(skip)) {
            *place = byte;
            len += 1;
        }
        (from, len)
    }

    /// The next byte for a plain terminal.
    pub fn next_to_show(&mut self) -> Option<u8> {
        let from = self.shown.max(self.oldest());
        let byte = *self.bytes.get((from - self.oldest()) as usize)?;
        self.shown = from + 1;
        Some(byte)
    }

    /// A plain terminal is shown what comes from now on.
    pub fn show_from_now(&mut self) {
        self.shown = self.end;
    }

    fn push(&mut self, byte: u8) {
        if self.bytes.len() == HISTORY {
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
        self.end += 1;
    }
}

/// What was typed, and how far the present session's input has come.
#[derive(Debug)]
struct Input {
    waiting: VecDeque<u8>,
    /// Bytes taken in this session.
    taken: u64,
}

/// Both directions.
pub struct GuestConsole {
    history: Mutex<History, { rank::HISTORY }>,
    input: Mutex<Input, { rank::INPUT }>,
    line: Mutex<Vec<u8>, { rank::LINE }>,
    /// A host wants the output as events.
    pub attached: AtomicBool,
}

impl GuestConsole {
    /// Empty.
    pub fn new() -> Self {
        Self {
            history: Mutex::new(History {
                // All at once: what a guest writes must not make EL2 allocate.
                bytes: VecDeque::with_capacity(HISTORY),
                end: 0,
                sent: 0,
                shown: 0,
            }),
            input: Mutex::new(Input {
                waiting: VecDeque::with_capacity(INPUT),
                taken: 0,
            }),
            line: Mutex::new(Vec::with_capacity(LINE)),
            attached: AtomicBool::new(false),
        }
    }

    /// Keeps a byte of output.
    pub fn put(&self, byte: u8) {
        self.history.lock().push(byte);
    }

    /// What was written.
    pub fn history(&self) -> MutexGuard<'_, History, { rank::HISTORY }> {
        self.history.lock()
    }

    /// Takes input; gives how many bytes there was room for.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut input = self.input.lock();
        let room = INPUT.saturating_sub(input.waiting.len());
        let taken = room.min(bytes.len());
        input.waiting.extend(bytes.iter().take(taken));
        taken
    }

    /// Takes a session's input from `offset` of its stream on. What was taken before is
    /// skipped, so that asking twice types once. Gives where the stream goes on.
    pub fn type_at(&self, offset: u64, bytes: &[u8]) -> u64 {
        let mut input = self.input.lock();
        let Some(known) = input.taken.checked_sub(offset) else {
            // A gap: something before it was lost.
            return input.taken;
        };
        let new = bytes
            .get(known.min(bytes.len() as u64) as usize..)
            .unwrap_or_default();
        let taken = INPUT.saturating_sub(input.waiting.len()).min(new.len());
        input.waiting.extend(new.iter().take(taken));
        input.taken += taken as u64;
        input.taken
    }

    /// A session begins: its input counts from 0.
    pub fn restart_input(&self) {
        self.input.lock().taken = 0;
    }

    /// The next byte for the guest to read.
    pub fn next_input(&self) -> Option<u8> {
        self.input.lock().waiting.pop_front()
    }

    /// Forgets what waits to be read: a new run does not see the last one's.
    pub fn forget_input(&self) {
        self.input.lock().waiting.clear();
    }

    /// Collects output into lines for a shared terminal; `show` gets each whole one.
    pub fn whole_line(&self, byte: u8, show: impl FnOnce(&[u8])) {
        let mut line = self.line.lock();
        match byte {
            b'\r' => {}
            b'\n' => {
                show(&line);
                line.clear();
            }
            _ if line.len() < LINE => line.push(byte),
            _ => {}
        }
    }
}
