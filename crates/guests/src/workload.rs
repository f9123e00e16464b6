//! What `load` writes: which page is next, and what its arguments mean. Pure, so that it can be tested where it is built.

use core::fmt;

use crate::pattern::Random;

/// How to call it.
pub const USAGE: &str = "\
usage: load MEBIBYTES seq|random|hot [LIMIT [SECONDS]]
  writes one word to page after page of MEBIBYTES MiB
  seq     in order, over and over
  random  anywhere
  hot     nine writes in ten to the first tenth, the others anywhere
  LIMIT   MiB of pages written a second; 0 (the default) for as fast as it goes
  SECONDS how long; 0 (the default) for ever";

/// Pages in a MiB.
pub const PAGES_A_MIB: u64 = 256;

/// The order of the writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// In order, over and over.
    Sequential,
    /// Anywhere.
    Random,
    /// Nine in ten to the first tenth, the others anywhere.
    Hot,
}

/// Arguments, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Pages to write.
    pub pages: u64,
    /// In which order.
    pub order: Order,
    /// Pages a second; `None` for as fast as it goes.
    pub limit: Option<u64>,
    /// For how long; `None` for ever.
    pub seconds: Option<u64>,
}

/// An argument that is missing or is not understood; [`USAGE`] helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadArgument {
    /// MEBIBYTES, 1 to 2^20
    Mebibytes,
    /// The order
    Order,
    /// LIMIT
    Limit,
    /// SECONDS
    Seconds,
    /// More than there are
    Surplus,
}

impl fmt::Display for BadArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mebibytes => "MEBIBYTES must be a number from 1 to 1048576",
            Self::Order => "the order must be seq, random or hot",
            Self::Limit => "LIMIT must be a number of MiB a second, at most 1048576",
            Self::Seconds => "SECONDS must be a number, at most 1048576",
            Self::Surplus => "there are too many arguments",
        })
    }
}

impl core::error::Error for BadArgument {}

impl Options {
    /// Reads the arguments, the program's name not among them.
    ///
    /// # Errors
    ///
    /// The first that is not understood.
    pub fn parse<'a>(mut arguments: impl Iterator<Item = &'a [u8]>) -> Result<Self, BadArgument> {
        let mebibytes = arguments
            .next()
            .and_then(number)
            .filter(|n| *n > 0)
            .ok_or(BadArgument::Mebibytes)?;
        let order = match arguments.next() {
            Some(b"seq") => Order::Sequential,
            Some(b"random") => Order::Random,
            Some(b"hot") => Order::Hot,
            _ => return Err(BadArgument::Order),
        };
        let limit = arguments
            .next()
            .map_or(Some(0), number)
            .ok_or(BadArgument::Limit)?;
        let seconds = arguments
            .next()
            .map_or(Some(0), number)
            .ok_or(BadArgument::Seconds)?;
        if arguments.next().is_some() {
            return Err(BadArgument::Surplus);
        }
        Ok(Self {
            pages: mebibytes * PAGES_A_MIB,
            order,
            limit: (limit > 0).then_some(limit * PAGES_A_MIB),
            seconds: (seconds > 0).then_some(seconds),
        })
    }

    /// How many more pages may be written now, `nanoseconds` after the start, having written `written`.
    #[must_use]
    pub fn allowance(&self, nanoseconds: u64, written: u64) -> u64 {
        match self.limit {
            None => u64::MAX,
            Some(limit) => {
                let by_now = u128::from(nanoseconds) * u128::from(limit) / 1_000_000_000;
                u64::try_from(by_now)
                    .unwrap_or(u64::MAX)
                    .saturating_sub(written)
            }
        }
    }
}

fn number(text: &[u8]) -> Option<u64> {
    let number = core::str::from_utf8(text).ok()?.parse().ok()?;
    (number <= 1 << 20).then_some(number)
}

/// The pages to write, one after another; never ends.
#[derive(Clone, Debug)]
pub struct Choice {
    order: Order,
    pages: u64,
    next: u64,
    random: Random,
}

impl Choice {
    /// For these options.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self {
            order: options.order,
            pages: options.pages,
            next: 0,
            random: Random(1),
        }
    }

    /// The page to write now, counted from the first.
    pub fn page(&mut self) -> u64 {
        match self.order {
            Order::Sequential => {
                let page = self.next;
                self.next = if page + 1 < self.pages { page + 1 } else { 0 };
                page
            }
            Order::Random => self.random.below(self.pages),
            Order::Hot => match self.random.below(10) {
                0 => self.random.below(self.pages),
                _ => self.random.below((self.pages / 10).max(1)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, BadArgument> {
        Options::parse(line.split_ascii_whitespace().map(str::as_bytes))
    }

    #[test]
    fn arguments() {
        let all = Options {
            pages: 16384,
            order: Order::Hot,
            limit: Some(512),
            seconds: Some(3),
        };
        assert_eq!(parse("64 hot 2 3"), Ok(all));
        assert_eq!(parse("64 hot 0 3"), Ok(Options { limit: None, ..all }));
        assert_eq!(
            parse("64 seq"),
            Ok(Options {
                order: Order::Sequential,
                limit: None,
                seconds: None,
                ..all
            })
        );
        for (line, why) in [
            ("", BadArgument::Mebibytes),
            ("0 seq", BadArgument::Mebibytes),
            ("1048577 seq", BadArgument::Mebibytes),
            ("-1 seq", BadArgument::Mebibytes),
            ("1", BadArgument::Order),
            ("1 sequential", BadArgument::Order),
            ("1 seq x", BadArgument::Limit),
            ("1 seq 1 1.5", BadArgument::Seconds),
            ("1 seq 1 1 1", BadArgument::Surplus),
        ] {
            assert_eq!(parse(line), Err(why), "{line}");
        }
    }

    #[test]
    fn orders_do_what_their_names_say() {
        let options = |order| Options {
            pages: 1000,
            order,
            limit: None,
            seconds: None,
        };
        let count = |order| {
            let mut choice = Choice::new(&options(order));
            let mut times = [0_u32; 1000];
            (0..10_000).for_each(|_| times[choice.page() as usize] += 1);
            times
        };
        assert!(count(Order::Sequential).iter().all(|times| *times == 10));
        let random = count(Order::Random);
        assert!(random.iter().filter(|times| **times > 0).count() > 990);
        assert!(random.iter().all(|times| *times < 40));
        let hot: u32 = count(Order::Hot)[..100].iter().sum();
        assert!((8900..9300).contains(&hot), "{hot}");
    }

    #[test]
    fn the_allowance_is_the_rate() {
        let options = parse("1 seq 2").expect("good arguments");
        assert_eq!(options.allowance(500_000_000, 0), 256);
        assert_eq!(options.allowance(500_000_000, 250), 6);
        assert_eq!(options.allowance(500_000_000, 300), 0);
        assert_eq!(
            options.allowance(u64::MAX, 0),
            (u128::from(u64::MAX) * 512 / 1_000_000_000) as u64
        );
        assert_eq!(
            parse("1 seq").expect("good arguments").allowance(0, 9),
            u64::MAX
        );
    }
}
