//! The fuzzer's targets without a fuzzer: the corpus is replayed, and on request mutated for a time.
//!
//! `TIDEMARK_FUZZ=SECONDS` mutates, from `TIDEMARK_SEED` or the time; what calls the engine in a way that no
//! input of the corpus did is kept for that run. `TIDEMARK_CORPUS`, a directory with one for each target in it, is
//! written the inputs that do all of it, as few and as short as are easily found: the next corpus. An input that
//! fails is printed in hex; put it into `fuzz/corpus/TARGET/` to have it replayed from then on.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fs};
use targets::Seen;

const LENGTH: usize = 600;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Runs one input, and prints it if it fails.
fn try_one(run: fn(&[u8]) -> Seen, input: &[u8]) -> Seen {
    catch_unwind(AssertUnwindSafe(|| run(input))).unwrap_or_else(|cause| {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("it fails on {hex}");
        resume_unwind(cause)
    })
}

/// The same numbers from the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound.max(1)
    }
}

fn mutate(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = match dice.below(8) {
        0 => Vec::new(),
        _ => corpus
            .get(dice.below(corpus.len()))
            .cloned()
            .unwrap_or_default(),
    };
    for _ in 0..1 + dice.below(6) {
        let at = dice.below(input.len());
        match dice.below(5) {
            0 if !input.is_empty() => input[at] = dice.below(256) as u8,
            1 if !input.is_empty() => input[at] ^= 1 << dice.below(8),
            2 if !input.is_empty() => {
                drop(input.drain(at..(at + 1 + dice.below(8)).min(input.len())))
            }
            3 => {
                if let Some(other) = corpus.get(dice.below(corpus.len())) {
                    let from = dice.below(other.len());
                    let part = other.iter().skip(from).take(1 + dice.below(40)).copied();
                    input.splice(at..at, part.collect::<Vec<_>>());
                }
            }
            _ => {
                let more: Vec<u8> = (0..1 + dice.below(24))
                    .map(|_| dice.below(256) as u8)
                    .collect();
                input.splice(at..at, more);
            }
        }
    }
    input.truncate(LENGTH);
    input
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is no number"))
    })
}

fn replay_and_mutate(target: &str, run: fn(&[u8]) -> Seen) {
    let mut corpus = corpus(target);
    assert!(!corpus.is_empty(), "there is nothing to replay");
    let mut seen = Seen::new();
    let mut each: Vec<Seen> = corpus.iter().map(|input| try_one(run, input)).collect();
    each.iter().for_each(|of| seen.extend(of));
    eprintln!(
        "{target}: {} inputs, {} different things seen",
        corpus.len(),
        seen.len()
    );
    let Some(seconds) = number("TIDEMARK_FUZZ") else {
        assert!(seen.len() > 10, "the corpus hardly does anything");
        return;
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seed = number("TIDEMARK_SEED").unwrap_or(now.as_micros() as u64);
    eprintln!("{target}: TIDEMARK_SEED={seed}");
    let mut dice = Dice(seed | 1);
    let (began, mut runs) = (Instant::now(), 0u64);
    while began.elapsed() < Duration::from_secs(seconds) {
        let input = mutate(&mut dice, &corpus);
        let new = try_one(run, &input);
        runs += 1;
        if !new.is_subset(&seen) {
            seen.extend(&new);
            each.push(new);
            corpus.push(input);
        }
    }
    if let Ok(directory) = env::var("TIDEMARK_CORPUS") {
        let directory = Path::new(&directory).join(target);
        for (number, input) in few(run, &corpus, each).iter().enumerate() {
            fs::write(directory.join(format!("{number:04}")), input).unwrap();
        }
    }
    eprintln!(
        "{target}: {runs} runs, {} inputs, {} different things seen",
        corpus.len(),
        seen.len()
    );
}

/// Inputs of `corpus` that do together all that it does, the one that adds most first, and each without what
/// it does not need for that at its end.
fn few(run: fn(&[u8]) -> Seen, corpus: &[Vec<u8>], mut each: Vec<Seen>) -> Vec<Vec<u8>> {
    let mut few = Vec::new();
    while let Some((at, most)) = (0..each.len())
        .map(|at| (at, each[at].len()))
        .max_by_key(|(_, adds)| *adds)
        && most > 0
    {
        let added = each[at].clone();
        let mut input = corpus[at].clone();
        for cut in [64, 16, 4, 1] {
            while input.len() > cut && added.is_subset(&run(&input[..input.len() - cut])) {
                input.truncate(input.len() - cut);
            }
        }
        few.push(input);
        each.iter_mut()
            .for_each(|of| of.retain(|one| !added.contains(one)));
    }
    few
}

#[test]
fn operations() {
    replay_and_mutate("operations", targets::operations);
}

#[test]
fn slots() {
    replay_and_mutate("slots", targets::slots);
}
