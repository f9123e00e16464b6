//! The lines the payloads print, written and read by the same module.
//!
//! One line says one thing: a word, then values separated by single spaces. Page runs are `gfn+count`, both
//! hexadecimal without a prefix; iterations, vCPUs and measurements are decimal; addresses and sums have `0x`.
//!
//! ```text
//! oracle: ready ram=0x40000000+0x10000000 vcpus=2 el=1    once, when commands are taken
//! ok seed=1 vcpus=2 pages=200 blocks=8 more=0 next=1      the answer to `cfg`; plain `ok` to others
//! begin 1                                                 all vCPUs are about to write iteration 1
//! w 1 0 4a31f+1 40000+2 ...                               pages vCPU 0 wrote in it; as many lines as it takes
//! done 1                                                  every `w` line of 1 is out, and the writes before that
//! losing                                                  every vCPU writes the pages that are to be lost
//! stopped 17                                              `free 0` was ended by a byte; the last iteration was 17
//! own 4020b+90                                            pages the guest writes for itself at any time
//! hole 40200+9b 48000+1                                   pages the pattern never writes (the own ones among them)
//! sum 0x6a09e667f3bcc908                                  FNV-1a over every page the pattern may write
//! error unknown command; try help                         the command was not carried out
//! fail ...                                                the guest caught itself or its machine in a fault
//! row hypercall 183                                       a measurement, nanoseconds
//! phase dbm                                               waits for a byte from the host
//! done                                                    the benchmark is over
//! ```
//!
//! The reader takes lines from a guest, so it trusts nothing: a line it knows but cannot read is an error, a line it
//! does not know is [`Line::Other`].

use core::fmt;

use crate::pattern::{Config, Gfn, Iteration, PageRun, Seed, Vcpu};

/// Runs in a line, so that lines stay short enough for any line buffer on the way.
pub const RUNS_A_LINE: usize = 10;

/// A line a payload printed.
#[derive(Clone, Debug, PartialEq)]
pub enum Line<'a> {
    /// `oracle: ready ...` or `bench: ready ...`
    Ready(Ready<'a>),
    /// `ok`, with what `cfg` set if that was asked.
    Ok(Option<Configured>),
    /// `begin`
    Begin(Iteration),
    /// `w`
    Written(Written<'a>),
    /// `done` with its iteration
    Done(Iteration),
    /// `done` without one: the benchmark is over
    Over,
    /// `losing`
    Losing,
    /// `stopped`
    Stopped(Iteration),
    /// `own`
    Own(Runs<'a>),
    /// `hole`
    Hole(Runs<'a>),
    /// `sum`
    Sum(u64),
    /// `row`
    Row(Row<'a>),
    /// `phase`
    Phase(&'a str),
    /// `error`, and why
    Error(&'a str),
    /// `fail`, `panic` or `exception`: what went wrong
    Fail(&'a str),
    /// Anything else.
    Other(&'a str),
}

/// The payload takes commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready<'a> {
    /// Which payload.
    pub payload: &'a str,
    /// RAM, as whole pages.
    pub ram: PageRun,
    /// vCPUs that came up.
    pub vcpus: u8,
    /// The exception level it runs at.
    pub el: u8,
}

/// What `cfg` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Configured {
    /// What is set now.
    pub config: Config,
    /// The number of the next iteration.
    pub next: Iteration,
}

/// Pages that were written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written<'a> {
    /// In which iteration.
    pub iteration: Iteration,
    /// By which vCPU.
    pub vcpu: Vcpu,
    /// Which.
    pub runs: Runs<'a>,
}

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Of what.
    pub name: &'a str,
    /// Nanoseconds; under `-icount shift=0` that is instructions.
    pub value: u64,
}

/// The page runs of a line, each already checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Runs<'a>(&'a str);

impl<'a> Runs<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        text.split_ascii_whitespace()
            .all(|word| run(word).is_some())
            .then_some(Self(text))
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let text = self.0.trim_ascii_start();
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        self.0 = rest;
        run(word)
    }
}

/// A line that begins like one of ours and then is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed<'a>(pub &'a str);

impl fmt::Display for Malformed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the guest's line {:?} cannot be read; were characters lost on the way, or is the guest another version?",
            self.0
        )
    }
}

impl core::error::Error for Malformed<'_> {}

impl<'a> Line<'a> {
    /// Reads a line, with or without its line end.
    ///
    /// # Errors
    ///
    /// The line's first word is one of ours and the rest is not.
    pub fn parse(line: &'a str) -> Result<Self, Malformed<'a>> {
        let line = line.trim_ascii();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let iteration = |text: &str| text.parse().ok().map(Iteration);
        let parsed = match word {
            "oracle:" | "bench:" => match rest.strip_prefix("ready ") {
                Some(rest) => ready(word.trim_end_matches(':'), rest).map(Self::Ready),
                None => Some(Self::Other(line)),
            },
            "ok" if rest.is_empty() => Some(Self::Ok(None)),
            "ok" => configured(rest).map(|configured| Self::Ok(Some(configured))),
            "begin" => iteration(rest).map(Self::Begin),
            "w" => written(rest).map(Self::Written),
            "done" if rest.is_empty() => Some(Self::Over),
            "done" => iteration(rest).map(Self::Done),
            "losing" if rest.is_empty() => Some(Self::Losing),
            "stopped" => iteration(rest).map(Self::Stopped),
            "own" => Runs::parse(rest).map(Self::Own),
            "hole" => Runs::parse(rest).map(Self::Hole),
            "sum" => prefixed(rest).map(Self::Sum),
            "row" => row(rest).map(Self::Row),
            "phase" => (!rest.is_empty()).then_some(Self::Phase(rest)),
            "error" => Some(Self::Error(rest)),
            "fail" | "panic" | "exception" => Some(Self::Fail(line)),
            _ => Some(Self::Other(line)),
        };
        parsed.ok_or(Malformed(line))
    }
}

fn run(word: &str) -> Option<PageRun> {
    let (first, count) = word.split_once('+')?;
    Some(PageRun::new(Gfn(hex(first)?), hex(count)?))
}

fn hex(text: &str) -> Option<u64> {
    // from_str_radix takes a sign; these never have one.
    text.bytes()
        .all(|byte| byte.is_ascii_hexdigit())
        .then(|| u64::from_str_radix(text, 16).ok())?
}

fn prefixed(text: &str) -> Option<u64> {
    hex(text.strip_prefix("0x")?)
}

/// The value of the next word, which must be `key=value`.
fn value<'a>(words: &mut core::str::SplitAsciiWhitespace<'a>, key: &str) -> Option<&'a str> {
    words.next()?.strip_prefix(key)?.strip_prefix('=')
}

fn ready<'a>(payload: &'a str, rest: &'a str) -> Option<Ready<'a>> {
    let mut words = rest.split_ascii_whitespace();
    let (base, size) = value(&mut words, "ram")?.split_once('+')?;
    let ram = PageRun::covering(prefixed(base)?, prefixed(size)?);
    let vcpus = value(&mut words, "vcpus")?.parse().ok()?;
    let el = value(&mut words, "el")?.parse().ok()?;
    Some(Ready {
        payload,
        ram,
        vcpus,
        el,
    })
}

fn configured(rest: &str) -> Option<Configured> {
    let mut words = rest.split_ascii_whitespace();
    let config = Config {
        seed: Seed(value(&mut words, "seed")?.parse().ok()?),
        vcpus: value(&mut words, "vcpus")?.parse().ok()?,
        pages: value(&mut words, "pages")?.parse().ok()?,
        blocks: value(&mut words, "blocks")?.parse().ok()?,
        more: value(&mut words, "more")?.parse().ok()?,
    };
    Some(Configured {
        config,
        next: Iteration(value(&mut words, "next")?.parse().ok()?),
    })
}

fn written(rest: &str) -> Option<Written<'_>> {
    let (iteration, rest) = rest.split_once(' ')?;
    let (vcpu, runs) = rest.split_once(' ')?;
    Some(Written {
        iteration: Iteration(iteration.parse().ok()?),
        vcpu: Vcpu(vcpu.parse().ok()?),
        runs: Runs::parse(runs)?,
    })
}

fn row(rest: &str) -> Option<Row<'_>> {
    let (name, value) = rest.split_once(' ')?;
    Some(Row {
        name,
        value: value.parse().ok()?,
    })
}

impl fmt::Display for Ready<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            payload,
            ram,
            vcpus,
            el,
        } = self;
        let size = ram.count.saturating_mul(crate::pattern::PAGE_BYTES);
        write!(
            f,
            "{payload}: ready ram={:#x}+{size:#x} vcpus={vcpus} el={el}",
            ram.first.ipa()
        )
    }
}

impl fmt::Display for Configured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config {
            seed: Seed(seed),
            vcpus,
            pages,
            blocks,
            more,
        } = self.config;
        write!(
            f,
            "seed={seed} vcpus={vcpus} pages={pages} blocks={blocks} more={more} next={}",
            self.next
        )
    }
}

/// Prints `runs` as lines that each begin with `head`. No runs, no line.
///
/// # Errors
///
/// Those of `out`.
pub fn print_runs(
    out: &mut dyn fmt::Write,
    head: fmt::Arguments<'_>,
    runs: impl Iterator<Item = PageRun>,
) -> fmt::Result {
    let mut in_line = 0;
    for run in runs {
        if in_line == 0 {
            out.write_fmt(head)?;
        }
        write!(out, " {run}")?;
        in_line += 1;
        if in_line == RUNS_A_LINE {
            out.write_str("\n")?;
            in_line = 0;
        }
    }
    if in_line > 0 {
        out.write_str("\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Line<'_> {
        Line::parse(line).expect("a good line")
    }

    #[test]
    fn runs_come_back_as_they_were_printed() {
        let runs: Vec<_> = (0..25)
            .map(|n| PageRun::new(Gfn(0x40000 + n * 0x1f3), n + 1))
            .collect();
        let mut text = String::new();
        print_runs(&mut text, format_args!("w 12 3"), runs.iter().copied())
            .expect("a string takes it");
        assert_eq!(text.lines().count(), 3);
        let mut back = Vec::new();
        for line in text.lines() {
            let Line::Written(written) = parse(line) else {
                panic!("{line}")
            };
            assert_eq!((written.iteration, written.vcpu), (Iteration(12), Vcpu(3)));
            back.extend(written.runs);
        }
        assert_eq!(back, runs);
        assert!(text.lines().all(|line| line.len() < 128));
    }

    #[test]
    fn ready_and_configured_come_back_as_they_were_printed() {
        let ready = Ready {
            payload: "oracle",
            ram: PageRun::new(Gfn(0x40000), 0x10000),
            vcpus: 2,
            el: 1,
        };
        let line = ready.to_string();
        assert_eq!(line, "oracle: ready ram=0x40000000+0x10000000 vcpus=2 el=1");
        assert_eq!(parse(&line), Line::Ready(ready));
        let configured = Configured {
            config: Config {
                seed: Seed(u64::MAX),
                vcpus: 2,
                pages: 7,
                blocks: 0,
                more: 512,
            },
            next: Iteration(9),
        };
        assert_eq!(
            parse(&format!("ok {configured}\r\n")),
            Line::Ok(Some(configured))
        );
    }

    #[test]
    fn the_rest_of_the_lines() {
        assert_eq!(parse("ok"), Line::Ok(None));
        assert_eq!(parse("begin 3\r"), Line::Begin(Iteration(3)));
        assert_eq!(parse("done 3"), Line::Done(Iteration(3)));
        assert_eq!(parse("done"), Line::Over);
        assert_eq!(parse("losing"), Line::Losing);
        assert_eq!(parse("stopped 3"), Line::Stopped(Iteration(3)));
        assert_eq!(parse("sum 0xff"), Line::Sum(255));
        assert_eq!(
            parse("row hypercall 12"),
            Line::Row(Row {
                name: "hypercall",
                value: 12
            })
        );
        assert_eq!(parse("phase dbm"), Line::Phase("dbm"));
        assert_eq!(parse("error no"), Line::Error("no"));
        assert_eq!(parse("exception vcpu 1"), Line::Fail("exception vcpu 1"));
        assert_eq!(
            parse("[    0.0] Booting Linux"),
            Line::Other("[    0.0] Booting Linux")
        );
        assert_eq!(parse(""), Line::Other(""));
        let Line::Own(mut own) = parse("own 1+2 3+4") else {
            panic!("own")
        };
        assert_eq!(own.next(), Some(PageRun::new(Gfn(1), 2)));
        assert_eq!(own.next(), Some(PageRun::new(Gfn(3), 4)));
        assert_eq!(own.next(), None);
    }

    #[test]
    fn a_damaged_line_is_an_error_not_a_shorter_answer() {
        for line in [
            "w 1 0 4a31f+1 4a3",
            "w 1 0 4a31f+",
            "w 1 0 -1+1",
            "w 1 x 1+1",
            "w 1 0",
            "w 1",
            "w",
            "begin",
            "begin x",
            "done 1x",
            "own 12",
            "hole 1+g",
            "sum ff",
            "sum 0x",
            "sum 0x1ffffffffffffffff",
            "row a",
            "row a -1",
            "phase",
            "ok seed=1",
            "oracle: ready ram=0x0",
            "w 1 300 1+1",
        ] {
            assert_eq!(Line::parse(line), Err(Malformed(line)), "{line}");
        }
    }
}
