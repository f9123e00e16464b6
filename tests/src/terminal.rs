//! The person's terminal, attached to a machine: keys go through at once, and Ctrl-A
//! is the way out.

use std::io::{IsTerminal, Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::{Context, Result};

use crate::line::Line;

/// Raw mode for as long as this lives.
///
/// `stty` does it: the alternative is a dependency on termios bindings for two calls.
#[derive(Debug)]
pub struct RawMode {
    before: Option<String>,
}

impl RawMode {
    /// Switches the terminal of standard input to raw mode, if it is one.
    pub fn enter() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self { before: None });
        }
        let before = stty(&["-g"])?;
        stty(&["raw", "-echo"])?;
        Ok(Self {
            before: Some(before.trim().to_owned()),
        })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = stty(&[before]);
        }
    }
}

fn stty(arguments: &[&str]) -> Result<String> {
    let output = Command::new("stty")
        .args(arguments)
        .stdin(Stdio::inherit())
        .output()
        .context("cannot run stty")?;
    anyhow::ensure!(
        output.status.success(),
        "stty: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Why the terminal was let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Ctrl-A x.
    Asked,
    /// The machine is off.
    MachineOff,
}

/// The key that begins a command to the terminal itself.
const ESCAPE: u8 = 0x01;

/// What typed bytes come to.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// Sorts typed bytes into what the machine gets, and whether to leave.
    fn push(&mut self, typed: &[u8], machine: &mut Vec<u8>) -> Option<Left> {
        for &key in typed {
            if std::mem::take(&mut self.escaped) {
                match key {
                    b'x' | b'X' => return Some(Left::Asked),
                    // Ctrl-A twice is one Ctrl-A.
                    ESCAPE => machine.push(ESCAPE),
                    _ => machine.extend([ESCAPE, key]),
                }
            } else if key == ESCAPE {
                self.escaped = true;
            } else if key != 0 {
                // 00 opens a frame on this line, so no keyboard may send it.
                machine.push(key);
            }
        }
        None
    }
}

/// Connects standard input and output to `line` until someone leaves.
///
/// The threads are not joined: reading standard input cannot be interrupted, and the
/// caller ends the machine, the line and the process right after.
pub fn attach(line: &Arc<Line>) -> Result<Left> {
    let _raw = RawMode::enter()?;
    let (gone, left) = channel();
    let (for_output, off) = (Arc::clone(line), gone.clone());
    std::thread::spawn(move || {
        show(&for_output);
        let _ = off.send(Ok(Left::MachineOff));
    });
    let for_input = Arc::clone(line);
    std::thread::spawn(move || {
        if let Some(end) = type_to(&for_input).transpose() {
            let _ = gone.send(end);
        }
    });
    left.recv().context("the terminal ended")?
}

/// Prints all text of the line until it closes.
fn show(line: &Line) {
    let mut shown = 0;
    let mut out = std::io::stdout();
    while let Some(text) = line.follow(shown) {
        shown += text.len();
        if out.write_all(&text).and_then(|()| out.flush()).is_err() {
            break;
        }
    }
}

/// Sends all keys to the line until one says to leave, or standard input ends.
fn type_to(line: &Line) -> Result<Option<Left>> {
    let mut input = std::io::stdin();
    let mut buffer = [0; 256];
    let mut keys = Keys::default();
    loop {
        let count = input.read(&mut buffer)?;
        let typed = buffer.get(..count).unwrap_or_default();
        if typed.is_empty() {
            // No more keys, but the machine may have more to say.
            return Ok(None);
        }
        let mut machine = Vec::new();
        let left = keys.push(typed, &mut machine);
        line.send_bytes(&machine)?;
        if left.is_some() {
            return Ok(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(chunks: &[&[u8]]) -> (Vec<u8>, Option<Left>) {
        let mut keys = Keys::default();
        let mut machine = Vec::new();
        let mut left = None;
        for chunk in chunks {
            left = left.or(keys.push(chunk, &mut machine));
        }
        (machine, left)
    }

    #[test]
    fn keys_go_through_and_ctrl_a_x_leaves() {
        assert_eq!(typed(&[b"ls\r"]), (b"ls\r".to_vec(), None));
        assert_eq!(typed(&[b"a\x01", b"xb"]).1, Some(Left::Asked));
    }

    #[test]
    fn ctrl_a_twice_is_one_and_zero_is_none() {
        assert_eq!(typed(&[b"\x01\x01\x00z"]), (b"\x01z".to_vec(), None));
        assert_eq!(typed(&[b"\x01b"]), (b"\x01b".to_vec(), None));
    }
}
