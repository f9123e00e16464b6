//! Copying a guest's memory while it runs, and proving that the copy is exact.
//!
//! log on -> all memory once -> rounds of {take, copy what is dirty, commit} -> pause -> one
//! last round -> SHA-256 of each slot at EL2 against the copy -> one more take, which must be
//! empty -> resume.
//!
//! Invariants: the log is on before the first byte is read, so whatever changes behind the
//! copy's back is in the next bitmap. An epoch is committed only once its pages are written.
//! Whatever fails, the guest is left as it was found: running if it ran, not logged if it was
//! not. If this program dies or the line is cut, the target sees to that: pause and log are
//! the session's. The image's files are synced once, before success is reported; a copy that did not
//! finish is worth nothing, so its rounds are not synced one by one.

use crate::bitmaps::{Bitmaps, Run};
use crate::client::{Client, Ending};
use crate::image::{Before, Contents, Image, SlotImage, hex};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{
    EngineChoice, Granularity, Hold, SlotAccess, SlotId, TakeReport, VmId,
};

/// Differing pages named when verification fails.
const DIFFERENCES_NAMED: usize = 8;

/// What to do.
pub struct Plan {
    /// Where the copy goes.
    pub image_dir: PathBuf,
    /// Most rounds while the guest runs.
    pub rounds: u32,
    /// Rounds end early when one finds no more than this.
    pub enough_pages: u64,
    /// Time given to the guest before each round.
    pub interval: Duration,
    /// Where contents come from.
    pub contents: Contents,
    /// How writes are noticed, if the log is not running yet.
    pub engine: EngineChoice,
    /// How finely.
    pub granularity: Granularity,
    /// What becomes of the guest.
    pub after: After,
}

/// What becomes of the guest after the copy has been verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// It goes on, if it ran before.
    AsBefore,
    /// It stays paused.
    Paused,
}

/// What is happening, for whoever watches.
pub enum Step<'a> {
    /// The log is being started or stopped, a harvest taken, memory hashed: part of a whole.
    Working {
        /// What.
        what: &'static str,
        /// Done.
        done: u64,
        /// Of.
        total: u64,
    },
    /// A round's bitmaps have been read.
    Harvested(&'a Bitmaps),
    /// A round is over.
    Round(&'a Round),
    /// The guest has been paused.
    Paused,
    /// The copy is exact.
    Verified,
}

/// When a round was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// All memory, once, the guest running.
    Whole,
    /// What was dirty, the guest running.
    Live,
    /// What was dirty, the guest paused.
    Last,
}

/// A round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// 0 is the whole copy.
    pub number: u32,
    /// When.
    pub phase: Phase,
    /// Pages copied.
    pub pages: u64,
    /// Time to take the epoch and read its bitmap.
    pub harvest_time: Duration,
    /// Time to copy.
    pub copy_time: Duration,
}

/// A finished copy.
pub struct Report {
    /// All rounds, the whole copy first.
    pub rounds: Vec<Round>,
    /// Each slot's hash, the same at both ends.
    pub slots: Vec<(SlotId, PathBuf, [u8; 32])>,
    /// From the beginning to the end of verification.
    pub total_time: Duration,
    /// From the pause to the last page.
    pub downtime: Duration,
    /// Spent hashing at EL2 while paused, which a migration would not.
    pub verify_time: Duration,
}

/// Copies a guest.
///
/// # Errors
/// [`Error::Mismatch`] if the copy is not exact; any failure of the line or of files.
pub fn run(
    client: &mut Client,
    vm: VmId,
    plan: &Plan,
    watch: &mut dyn FnMut(Step<'_>),
) -> Result<Report> {
    let before = client.info(vm)?;
    let logging = client.log_status(vm)?.logging;
    if logging.is_none() {
        let mut tell = working(watch, "starting the dirty log");
        client.start_log(vm, plan.engine, plan.granularity, Hold::Session, &mut tell)?;
    }
    let copied = Image::create(&plan.image_dir, &before.slots).and_then(|image| {
        Copy {
            client,
            vm,
            plan,
            image,
            watch,
        }
        .run()
    });
    // Put back what was changed, even after a failure; its error is the one to report.
    let mut tidied = client.undisturbed(|client| match (&copied, plan.after) {
        // No moment between the two.
        (Ok(_), After::Paused) => client
            .pause(vm, Hold::Lasting)
            .and_then(|()| client.let_go(vm)),
        (Ok(_), After::AsBefore) | (Err(_), _) => client.let_go(vm),
    });
    if logging.is_none() {
        let mut tell = working(watch, "stopping the dirty log");
        let stopped = client.undisturbed(|client| client.stop_log(vm, &mut tell));
        tidied = tidied.and(stopped);
    }
    let report = copied?;
    tidied.map(|()| report)
}

fn working<'w>(
    watch: &'w mut dyn FnMut(Step<'_>),
    what: &'static str,
) -> impl FnMut(u64, u64) + 'w {
    move |done, total| watch(Step::Working { what, done, total })
}

struct Copy<'c> {
    client: &'c mut Client,
    vm: VmId,
    plan: &'c Plan,
    image: Image,
    watch: &'c mut dyn FnMut(Step<'_>),
}

impl Copy<'_> {
    fn run(mut self) -> Result<Report> {
        let begun = Instant::now();
        let mut rounds = vec![self.whole()?];
        for number in 1..=self.plan.rounds {
            self.client.idle(self.plan.interval)?;
            let round = self.round(number, Phase::Live)?;
            rounds.push(round);
            if round.pages <= self.plan.enough_pages {
                break;
            }
        }
        let paused = Instant::now();
        self.client.pause(self.vm, Hold::Session)?;
        (self.watch)(Step::Paused);
        let number = rounds.len() as u32;
        rounds.push(self.round(number, Phase::Last)?);
        let downtime = paused.elapsed();
        let verifying = Instant::now();
        let slots = self.verify()?;
        let verify_time = verifying.elapsed();
        self.image.finish()?;
        (self.watch)(Step::Verified);
        Ok(Report {
            rounds,
            slots,
            total_time: begun.elapsed(),
            downtime,
            verify_time,
        })
    }

    /// Copies all memory once.
    fn whole(&mut self) -> Result<Round> {
        let begun = Instant::now();
        let total: u64 = self.image.slots().iter().map(|slot| slot.info.pages).sum();
        let mut done = 0;
        for slot in self.image.slots() {
            let all = [Run {
                start: 0,
                len: slot.info.pages,
            }];
            self.plan
                .contents
                .read(self.client, self.vm, &slot.info, all, |ipa, part| {
                    done += part.len() as u64;
                    let what = "copying all memory";
                    (self.watch)(Step::Working {
                        what,
                        done: done / PAGE_SIZE,
                        total,
                    });
                    slot.write(ipa, part, Before::Zeros)
                })?;
        }
        let round = Round {
            number: 0,
            phase: Phase::Whole,
            pages: total,
            harvest_time: Duration::ZERO,
            copy_time: begun.elapsed(),
        };
        (self.watch)(Step::Round(&round));
        Ok(round)
    }

    /// Copies what is dirty.
    fn round(&mut self, number: u32, phase: Phase) -> Result<Round> {
        let begun = Instant::now();
        let Self {
            client,
            vm,
            plan,
            image,
            watch,
        } = self;
        let vm = *vm;
        // Progress of the take is not shown: it is over before anybody could read it.
        let round = client.harvest(vm, Ending::Commit, &mut |_, _| {}, |client, report| {
            let bitmaps = client.read_bitmaps(vm, report, &mut |_, _| {})?;
            watch(Step::Harvested(&bitmaps));
            let harvest_time = begun.elapsed();
            let copying = Instant::now();
            let total = bitmaps.dirty_pages();
            let mut done = 0;
            for bits in &bitmaps.slots {
                let slot = image.slot(bits.slot).filter(|slot| {
                    slot.info.pages == bits.pages && slot.info.base_ipa == bits.base_ipa
                });
                let slot = slot.ok_or_else(|| changed(bits.slot))?;
                plan.contents
                    .read(client, vm, &slot.info, bits.runs(), |ipa, part| {
                        done += part.len() as u64;
                        let what = "copying dirty pages";
                        watch(Step::Working {
                            what,
                            done: done / PAGE_SIZE,
                            total,
                        });
                        slot.write(ipa, part, Before::Contents)
                    })?;
            }
            Ok(Round {
                number,
                phase,
                pages: total,
                harvest_time,
                copy_time: copying.elapsed(),
            })
        })?;
        (self.watch)(Step::Round(&round));
        Ok(round)
    }

    /// Compares the hashes of both ends, and sees that nothing is dirty any more.
    fn verify(&mut self) -> Result<Vec<(SlotId, PathBuf, [u8; 32])>> {
        let mut slots = Vec::new();
        for slot in self.image.slots() {
            let id = slot.info.id;
            let mut tell = working(self.watch, "hashing at both ends");
            let theirs = self.client.hash(self.vm, id, &mut tell)?;
            let ours = slot.sha256()?;
            if theirs != ours {
                let pages = differences(self.client, self.vm, &self.plan.contents, slot)?;
                return Err(Error::Mismatch(format!(
                    "slot {id}: the guest has {}, the copy {}; pages that differ: {pages}",
                    hex(&theirs),
                    hex(&ours)
                )));
            }
            slots.push((id, slot.path.clone(), ours));
        }
        let empty = |_: &mut Client, report: &TakeReport| match report.dirty_pages {
            0 => Ok(()),
            pages => Err(Error::Mismatch(format!(
                "{pages} pages dirty after the last round, though the guest is paused"
            ))),
        };
        self.client
            .harvest(self.vm, Ending::Commit, &mut |_, _| {}, empty)?;
        Ok(slots)
    }
}

fn changed(slot: SlotId) -> Error {
    Error::Protocol {
        during: "copying a guest".into(),
        problem: format!("slot {slot} is not what it was when the copy began"),
    }
}

/// Names the first pages that differ, for whoever has to find out why.
fn differences(
    client: &mut Client,
    vm: VmId,
    contents: &Contents,
    slot: &SlotImage,
) -> Result<String> {
    let mut found = BTreeSet::new();
    let all = [Run {
        start: 0,
        len: slot.info.pages,
    }];
    let mut ours = Vec::new();
    contents.read(client, vm, &slot.info, all, |ipa, theirs| {
        ours.resize(theirs.len(), 0);
        slot.read(ipa, &mut ours)?;
        let words = (ipa..).step_by(8).zip(theirs.chunks(8).zip(ours.chunks(8)));
        found.extend(
            words
                .filter(|(_, (a, b))| a != b)
                .map(|(at, _)| at / PAGE_SIZE * PAGE_SIZE),
        );
        Ok(())
    })?;
    let note = match slot.info.access {
        SlotAccess::ReadOnly => " (a read-only slot, which is never logged)",
        SlotAccess::ReadWrite => "",
    };
    let first: Vec<String> = found
        .iter()
        .take(DIFFERENCES_NAMED)
        .map(|page| format!("{page:#x}"))
        .collect();
    Ok(match found.len() {
        0 => format!("none when read again{note}"),
        count => format!("{count}, first {}{note}", first.join(" ")),
    })
}
