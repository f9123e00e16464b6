//! The terminal as a plain pipe, for as long as a console is open on it.

use crate::client::Injector;
use crate::{Error, Result};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io::{self, Read};
use std::thread;

/// Ctrl-], which leaves.
pub const LEAVE: u8 = 0x1D;

/// What keystrokes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keyboard {
    /// A terminal: Ctrl-] leaves, all other keys go to the guest.
    Terminal,
    /// A file or a pipe: every byte goes to the guest, its end is the end.
    Stream,
}

/// Raw mode of standard input's terminal; put back when dropped.
pub struct RawMode(Option<Termios>);

impl RawMode {
    /// Enters raw mode if standard input is a terminal.
    ///
    /// # Errors
    /// [`Error::Local`].
    pub fn enter() -> Result<(Self, Keyboard)> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok((Self(None), Keyboard::Stream));
        }
        let wrap = |error: rustix::io::Errno| Error::Local {
            what: "terminal",
            source: error.into(),
        };
        let before = tcgetattr(&stdin).map_err(wrap)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(wrap)?;
        Ok((Self(Some(before)), Keyboard::Terminal))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The terminal may be gone; there is nobody to tell.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Hands standard input to `injector` from a thread of its own, until it ends.
///
/// The thread is left behind blocked in its read when the command ends first; the process
/// ends with it.
///
/// # Errors
/// [`Error::Local`] if there can be no thread.
pub fn inject_stdin(injector: Injector) -> Result<()> {
    let body = move || {
        let mut buffer = [0; 1024];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => {
                    if injector.send(buffer.get(..got).unwrap_or(&[])).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let _ = injector.end();
    };
    thread::Builder::new()
        .name("tidectl-stdin".into())
        .spawn(body)
        .map(drop)
        .map_err(|source| Error::Local {
            what: "starting a thread",
            source,
        })
}

/// Ends lines as a terminal in raw mode needs it: a bare line feed gets its return.
#[must_use]
pub fn with_returns(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 8);
    let mut before = 0;
    for &byte in text {
        if byte == b'\n' && before != b'\r' {
            out.push(b'\r');
        }
        out.push(byte);
        before = byte;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_line_feeds_get_their_return() {
        assert_eq!(with_returns(b"a\nb\r\nc"), b"a\r\nb\r\nc");
    }
}
