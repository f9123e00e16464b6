//! What the machine said and what it was told, line by line, with the time of each.
//!
//! The text is kept in memory for the scripts and written to a file as it comes, so
//! that a test that is killed leaves its evidence too.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

/// The text of one line, and the file it is logged to.
#[derive(Debug)]
pub struct Transcript {
    /// All text so far, frames taken out. Only grows.
    text: Vec<u8>,
    /// The line of the log that is not complete yet.
    open: Vec<u8>,
    log: File,
    start: Instant,
}

/// Longer lines are broken in the log: a binary stream must not grow one for ever.
const LONGEST_LINE: usize = 1000;

impl Transcript {
    /// Starts an empty transcript that is written to `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let log = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            text: Vec::new(),
            open: Vec::new(),
            log,
            start: Instant::now(),
        })
    }

    /// Takes in what the machine sent as text.
    pub fn push(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(' '),
                b'\r' => {}
                _ => self.open.push(byte),
            }
            if self.open.len() >= LONGEST_LINE {
                self.end_line(' ');
            }
        }
    }

    /// Notes something that the machine did not say: what was typed, a step, a guest's
    /// console that came in frames. `mark` tells the kinds apart in the log.
    pub fn note(&mut self, mark: char, text: &str) {
        if !self.open.is_empty() {
            self.end_line(' ');
        }
        for line in text.lines() {
            self.open.extend_from_slice(line.as_bytes());
            self.end_line(mark);
        }
    }

    /// The text so far.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// The last `lines` lines, for a message.
    #[must_use]
    pub fn tail(&self, lines: usize) -> String {
        let text = String::from_utf8_lossy(&self.text);
        let all: Vec<&str> = text.lines().collect();
        let from = all.len().saturating_sub(lines);
        all.get(from..).unwrap_or_default().join("\n")
    }

    /// Writes the open line with its time. Losing a log line is no reason to fail a
    /// test, so errors are dropped here.
    fn end_line(&mut self, mark: char) {
        let at = self.start.elapsed().as_secs_f64();
        let line = String::from_utf8_lossy(&self.open);
        let _ = writeln!(
            self.log,
            "{at:10.3} {mark} {}",
            line.escape_default_but_text()
        );
        self.open.clear();
    }
}

impl Drop for Transcript {
    fn drop(&mut self) {
        if !self.open.is_empty() {
            self.end_line(' ');
        }
    }
}

/// Makes control characters visible, and leaves everything readable as it is.
trait EscapeControl {
    fn escape_default_but_text(&self) -> String;
}

impl EscapeControl for str {
    fn escape_default_but_text(&self) -> String {
        let mut out = String::with_capacity(self.len());
        for letter in self.chars() {
            if letter.is_control() && letter != '\t' {
                out.extend(letter.escape_default());
            } else {
                out.push(letter);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(fill: impl FnOnce(&mut Transcript)) -> String {
        let dir = crate::work::Scratch::create("transcript").expect("dir");
        let path = dir.join("serial.log");
        let mut transcript = Transcript::create(&path).expect("create");
        fill(&mut transcript);
        drop(transcript);
        std::fs::read_to_string(&path).expect("log")
    }

    #[test]
    fn each_line_gets_a_time_and_a_mark() {
        let text = logged(|to| {
            to.push(b"one\r\ntw");
            to.push(b"o\n");
            to.note('>', "typed");
        });
        let lines: Vec<&str> = text.lines().map(|line| &line[11..]).collect();
        assert_eq!(lines, ["  one", "  two", "> typed"]);
    }

    #[test]
    fn an_open_line_is_not_lost() {
        let text = logged(|to| to.push(b"tidemark> "));
        assert!(text.ends_with("tidemark> \n"), "{text:?}");
    }

    #[test]
    fn control_characters_are_shown() {
        let text = logged(|to| to.push(b"\x1b[6n\n"));
        assert!(text.contains("\\u{1b}[6n"), "{text:?}");
    }
}
