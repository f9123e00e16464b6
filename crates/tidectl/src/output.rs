//! What a command prints: data on standard output, words on standard error.
//!
//! Concurrency: one [`Ui`] for one command. Progress, and what is said beside it, goes to standard error by a thread
//! of its own, bars on a terminal only: who works must not wait for a reader (Ctrl-S, a full pipe), because a guest
//! may be paused meanwhile.

use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How data is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// For people.
    Human,
    /// One JSON object, or one a line for commands that go on.
    Json,
}

/// How much is said beside data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chatter {
    /// What is being done, and progress.
    Normal,
    /// Errors, and data that was asked for.
    Quiet,
}

/// Where a command's words and data go.
pub struct Ui {
    /// How data is printed.
    pub format: Format,
    chatter: Chatter,
    stdout: Box<dyn Write>,
}

impl Ui {
    /// Prints to the process's own streams.
    #[must_use]
    pub fn new(format: Format, chatter: Chatter) -> Self {
        Self {
            format,
            chatter,
            stdout: Box::new(io::stdout()),
        }
    }

    /// Prints a line of data.
    ///
    /// # Errors
    /// [`Error::Local`].
    pub fn line(&mut self, line: &str) -> Result<()> {
        self.bytes(format!("{line}\n").as_bytes())
    }

    /// Prints data as it is.
    ///
    /// # Errors
    /// [`Error::Local`].
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stdout
            .write_all(bytes)
            .and_then(|()| self.stdout.flush())
            .map_err(Error::stdout)
    }

    /// Prints an object as one line, if JSON was asked for, or what `human` says.
    ///
    /// # Errors
    /// [`Error::Local`].
    pub fn data(&mut self, json: &Value, human: impl FnOnce() -> String) -> Result<()> {
        match self.format {
            Format::Json => self.line(&json.to_string()),
            Format::Human => self.line(human().trim_end_matches('\n')),
        }
    }

    /// Tells that something was done: as [`Ui::data`], but nothing at all for people who asked for quiet.
    ///
    /// # Errors
    /// [`Error::Local`].
    pub fn done(&mut self, json: &Value, human: impl FnOnce() -> String) -> Result<()> {
        match (self.format, self.chatter) {
            (Format::Human, Chatter::Quiet) => Ok(()),
            _ => self.data(json, human),
        }
    }

    /// Says what is being done.
    pub fn say(&self, words: &str) {
        if self.chatter == Chatter::Normal {
            // A terminal that is gone is no reason to stop, nor to panic.
            let _ = writeln!(io::stderr(), "{words}");
        }
    }

    /// Shows progress of something slow; nothing off a terminal.
    #[must_use]
    pub fn bar(&self, what: &'static str) -> Bar {
        let shown = self.chatter == Chatter::Normal && io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if shown {
                ProgressDrawTarget::stderr_with_hz(10)
            } else {
                ProgressDrawTarget::hidden()
            },
        );
        let style = ProgressStyle::with_template("{msg:28} {wide_bar} {percent:>3}%  {eta}");
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what);
        Bar::new(bar, self.chatter)
    }
}

/// Progress of something slow; it disappears when dropped, which waits until all was drawn and said. Nothing else
/// here waits.
pub struct Bar {
    shared: Arc<Shared>,
    chatter: Chatter,
    /// `None` where no thread could be had: all is said at the end.
    drawer: Option<JoinHandle<()>>,
}

/// Between who works and the thread that draws.
struct Shared {
    to_tell: Mutex<ToTell>,
    more: Condvar,
    bar: ProgressBar,
}

#[derive(Default)]
struct ToTell {
    /// The newest alone is worth drawing.
    progress: Option<(Option<&'static str>, u64, u64)>,
    words: Vec<String>,
    is_over: bool,
}

impl Shared {
    fn to_tell(&self) -> MutexGuard<'_, ToTell> {
        // It is whole between any two statements.
        self.to_tell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: ToTell) {
        for words in what.words {
            // A terminal that is gone is no reason to stop, nor to panic.
            self.bar.suspend(|| drop(writeln!(io::stderr(), "{words}")));
        }
        if let Some((what, done, total)) = what.progress {
            if let Some(what) = what {
                self.bar.set_message(what);
            }
            self.bar.set_length(total);
            self.bar.set_position(done.min(total));
        }
    }

    /// Tells everything until it is over.
    fn draw(&self) {
        let mut to_tell = self.to_tell();
        loop {
            let what = std::mem::take(&mut *to_tell);
            let is_over = what.is_over;
            drop(to_tell);
            self.tell(what);
            if is_over {
                return;
            }
            let none =
                |now: &mut ToTell| now.progress.is_none() && now.words.is_empty() && !now.is_over;
            to_tell = self
                .more
                .wait_while(self.to_tell(), none)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Bar {
    fn new(bar: ProgressBar, chatter: Chatter) -> Self {
        let shared = Arc::new(Shared {
            to_tell: Mutex::default(),
            more: Condvar::new(),
            bar,
        });
        let drawn = Arc::clone(&shared);
        let drawer = thread::Builder::new().name("progress".into());
        Self {
            shared,
            chatter,
            drawer: drawer.spawn(move || drawn.draw()).ok(),
        }
    }

    /// Tells how far it is.
    pub fn set(&self, done: u64, total: u64) {
        let mut to_tell = self.shared.to_tell();
        let what = to_tell.progress.and_then(|(what, ..)| what);
        to_tell.progress = Some((what, done, total));
        self.shared.more.notify_one();
    }

    /// Tells what is being done now, and how far it is.
    pub fn stage(&self, what: &'static str, done: u64, total: u64) {
        self.shared.to_tell().progress = Some((Some(what), done, total));
        self.shared.more.notify_one();
    }

    /// Says something while the bar is out of the way, as [`Ui::say`] does.
    pub fn say(&self, words: String) {
        if self.chatter == Chatter::Normal {
            self.shared.to_tell().words.push(words);
            self.shared.more.notify_one();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.shared.to_tell().is_over = true;
        self.shared.more.notify_one();
        match self.drawer.take() {
            Some(drawer) => drop(drawer.join()),
            None => self.shared.draw(),
        }
        self.shared.bar.finish_and_clear();
    }
}

/// Reports a failure: words on standard error, and an object on standard output if JSON was
/// asked for.
///
/// Nothing when the reader of standard output went away, as `head` does: it knows.
pub fn report(error: &Error, format: Format) {
    if matches!(error, Error::Local { source, .. } if source.kind() == io::ErrorKind::BrokenPipe) {
        return;
    }
    let mut words = format!("tidectl: {error}\n");
    if let Some(hint) = error.hint() {
        words.push_str(&format!("  hint: {hint}\n"));
    }
    // Nobody is left to tell when these fail.
    let _ = io::stderr().write_all(words.as_bytes());
    if format == Format::Json {
        let object = json!({
            "schema": 1,
            "error": {
                "code": error.code(),
                "message": error.to_string(),
                "hint": error.hint(),
                "exit_code": error.exit_code(),
            },
        });
        let _ = writeln!(io::stdout(), "{object}");
    }
}

/// Rounds a time to what is worth printing in JSON.
#[must_use]
pub fn seconds(time: Duration) -> Value {
    json!((time.as_secs_f64() * 1e6).round() / 1e6)
}

/// Lays rows out in columns; the first row is the heading.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["ID".into(), "NAME".into()],
            vec!["10".into(), "a".into()],
        ];
        assert_eq!(table(&rows), "ID  NAME\n10  a\n");
    }

    #[test]
    fn times_are_rounded() {
        assert_eq!(seconds(Duration::from_nanos(1_500_700)), json!(0.001501));
    }
}
