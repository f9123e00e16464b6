//! The commands the oracle takes, one a line. Read from the console, so anything may come: what cannot be read is
//! an error that says what can.

use core::fmt;

use crate::pattern::{BLOCK_PAGES, Config, Seed};

/// What [`Command::Help`] prints.
pub const HELP: &str = "\
cfg [seed=N] [vcpus=N] [pages=N] [blocks=N]  what the next iterations write; prints what is set
cfg [more=N]         N pages behind the RAM are memory too; those that were not are zero, or this fails
lose N               all vCPUs write the last N pages of memory until they are gone; a byte ends it
step                 one iteration
free N [quiet]       N iterations without waiting, 0: until a byte comes; quiet: no `w` lines
own                  pages this guest writes for itself
map                  pages the pattern never writes
fill                 zero every page the pattern may write
sum                  FNV-1a over every page the pattern may write
off | reset          PSCI SYSTEM_OFF | SYSTEM_RESET";

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Change the configuration.
    Configure(Config),
    /// One iteration.
    Step,
    /// Many.
    Free(Rounds, Detail),
    /// Say which pages the guest writes for itself.
    Own,
    /// Say which pages are never written by the pattern.
    Map,
    /// Zero the pages the pattern may write.
    Fill,
    /// Sum them up.
    Sum,
    /// Write so many pages at the end of memory until they are gone.
    Lose(u64),
    /// PSCI SYSTEM_OFF
    Off,
    /// PSCI SYSTEM_RESET
    Reset,
    /// Say what there is.
    Help,
}

/// How many iterations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// So many.
    Count(u64),
    /// Until a byte comes in.
    UntilInput,
}

/// What is said about each iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Which pages were written.
    Runs,
    /// That it began and is done.
    Quiet,
}

/// Why a line is not a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// No such word.
    Unknown,
    /// `cfg` with something else than `key=number`, or a key there is not.
    Setting,
    /// More vCPUs than came up, or none.
    Vcpus(u8),
    /// More pages than allowed.
    Pages,
    /// More memory than the map has room for, or no whole blocks of it.
    More,
    /// `lose` of no pages, or of more than were added.
    Lose,
    /// `free` without a number.
    Count,
    /// Words after the end.
    Surplus,
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown command; try help"),
            Self::Setting => {
                f.write_str("cfg takes seed=N vcpus=N pages=N blocks=N more=N, decimal")
            }
            Self::Vcpus(up) => write!(f, "vcpus must be 1 to {up}, as many as came up"),
            Self::Pages => write!(f, "pages must be at most {}", Config::MAX_PAGES),
            Self::More => write!(
                f,
                "more must be a multiple of {BLOCK_PAGES}, and at most {}",
                Config::MAX_PAGES
            ),
            Self::Lose => f.write_str("lose takes a number of pages, at most what `more` is"),
            Self::Count => f.write_str(
                "free takes a number of iterations, 0 for until a byte comes, then maybe quiet",
            ),
            Self::Surplus => f.write_str("too many words; try help"),
        }
    }
}

impl core::error::Error for CommandError {}

impl Command {
    /// Reads a line. `config` is what is set now, `up` the number of vCPUs there are.
    ///
    /// # Errors
    ///
    /// See [`CommandError`].
    pub fn parse(line: &str, config: Config, up: u8) -> Result<Self, CommandError> {
        let mut words = line.split_ascii_whitespace();
        let command = match words.next() {
            Some("cfg") => return configure(words, config, up).map(Self::Configure),
            Some("free") => {
                let count = words
                    .next()
                    .and_then(|word| word.parse().ok())
                    .ok_or(CommandError::Count)?;
                let detail = match words.next() {
                    None => Detail::Runs,
                    Some("quiet") => Detail::Quiet,
                    Some(_) => return Err(CommandError::Count),
                };
                Self::Free(
                    if count == 0 {
                        Rounds::UntilInput
                    } else {
                        Rounds::Count(count)
                    },
                    detail,
                )
            }
            Some("lose") => {
                let count = words.next().and_then(|word| word.parse().ok());
                let fits = |count: &u64| (1..=u64::from(config.more)).contains(count);
                Self::Lose(count.filter(fits).ok_or(CommandError::Lose)?)
            }
            Some("step") => Self::Step,
            Some("own") => Self::Own,
            Some("map") => Self::Map,
            Some("fill") => Self::Fill,
            Some("sum") => Self::Sum,
            Some("off") => Self::Off,
            Some("reset") => Self::Reset,
            Some("help") => Self::Help,
            _ => return Err(CommandError::Unknown),
        };
        match words.next() {
            None => Ok(command),
            Some(_) => Err(CommandError::Surplus),
        }
    }
}

fn configure<'a>(
    words: impl Iterator<Item = &'a str>,
    mut config: Config,
    up: u8,
) -> Result<Config, CommandError> {
    for word in words {
        let (key, value) = word.split_once('=').ok_or(CommandError::Setting)?;
        let value: u64 = value.parse().map_err(|_| CommandError::Setting)?;
        match key {
            "seed" => config.seed = Seed(value),
            "vcpus" => match u8::try_from(value) {
                Ok(vcpus) if (1..=up).contains(&vcpus) => config.vcpus = vcpus,
                _ => return Err(CommandError::Vcpus(up)),
            },
            "pages" => match u32::try_from(value) {
                Ok(pages) if pages <= Config::MAX_PAGES => config.pages = pages,
                _ => return Err(CommandError::Pages),
            },
            "more" => match u32::try_from(value) {
                Ok(more) if more <= Config::MAX_PAGES && value.is_multiple_of(BLOCK_PAGES) => {
                    config.more = more;
                }
                _ => return Err(CommandError::More),
            },
            "blocks" => config.blocks = u32::try_from(value).map_err(|_| CommandError::Setting)?,
            _ => return Err(CommandError::Setting),
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, CommandError> {
        Command::parse(line, Config::default(), 4)
    }

    #[test]
    fn commands() {
        assert_eq!(parse("step"), Ok(Command::Step));
        assert_eq!(
            parse(" free 3 "),
            Ok(Command::Free(Rounds::Count(3), Detail::Runs))
        );
        assert_eq!(
            parse("free 0 quiet"),
            Ok(Command::Free(Rounds::UntilInput, Detail::Quiet))
        );
        let set = Config {
            seed: Seed(u64::MAX),
            vcpus: 2,
            pages: 9,
            blocks: 1,
            more: 1024,
        };
        assert_eq!(
            parse("cfg seed=18446744073709551615 vcpus=2 pages=9 blocks=1 more=1024"),
            Ok(Command::Configure(set))
        );
        assert_eq!(Command::parse("lose 1024", set, 4), Ok(Command::Lose(1024)));
        assert_eq!(parse("cfg"), Ok(Command::Configure(Config::default())));
        for word in HELP
            .lines()
            .filter_map(|line| line.split_ascii_whitespace().next())
        {
            assert_ne!(parse(word), Err(CommandError::Unknown), "help names {word}");
        }
    }

    #[test]
    fn what_is_not_a_command_says_why() {
        for (line, why) in [
            ("", CommandError::Unknown),
            ("stpe", CommandError::Unknown),
            ("step 2", CommandError::Surplus),
            ("free", CommandError::Count),
            ("free x", CommandError::Count),
            ("free 1 loud", CommandError::Count),
            ("cfg seed", CommandError::Setting),
            ("cfg seed=-1", CommandError::Setting),
            ("cfg sed=1", CommandError::Setting),
            ("cfg vcpus=0", CommandError::Vcpus(4)),
            ("cfg vcpus=5", CommandError::Vcpus(4)),
            ("cfg vcpus=258", CommandError::Vcpus(4)),
            ("cfg pages=65537", CommandError::Pages),
            ("cfg more=511", CommandError::More),
            ("cfg more=66048", CommandError::More),
            ("lose", CommandError::Lose),
            ("lose 1", CommandError::Lose),
        ] {
            assert_eq!(parse(line), Err(why), "{line}");
        }
    }
}
