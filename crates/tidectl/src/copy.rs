//! Copying a guest's memory while it runs, and verifying the copy.
//!
//! log on -> all memory once -> rounds of {take, copy what is dirty, commit} -> pause -> one
//! last round -> resume -> verify.
//!
//! Verified while the guest runs ([`Verify::Running`]): EL2 sums each page (CRC-32C), then an
//! epoch is taken and given back. A page that is not in that epoch was not written since the
//! last round, or was a moment ago: the hardware's dirty bit may become visible after the store,
//! until its CPU's next DSB (R_RZYCN). So where sums differ outside the epoch, the guest is
//! paused for a moment, which has such a DSB on each of its CPUs, and one more epoch is taken
//! and given back. A page that is in neither is what EL2 summed and what was copied, and the
//! sums must be equal. Pages that are in one are not judged, and counted. What this finds is a
//! write that was not tracked and a page that was copied wrongly; that two contents have the
//! same sum has a chance of 1 in 2^32.
//!
//! Verified while it is paused ([`Verify::Paused`]): SHA-256 of each slot at both ends before
//! the resume, and one more take, which must be empty.
//!
//! A guest that has ended writes nothing: it is copied once, without a log, and every page
//! verified.
//!
//! Invariants: the log is on before the first byte is read, so whatever changes behind the
//! copy's back is in the next bitmap. An epoch is committed only once its pages are written.
//! Whatever fails, the guest is left as it was found: running if it ran, not logged if it was
//! not. If this program dies or the line is cut, the target sees to that: pause and log are
//! the session's. The image's files are synced once, before success is reported; a copy that did not
//! finish is worth nothing, so its rounds are not synced one by one.

use crate::bitmaps::{Bitmaps, Run, SlotBitmap};
use crate::client::{Client, Ending};
use crate::image::{Before, Contents, Image, SlotImage, hex};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::checksum::crc32c;
use tidemark_wire::message::{
    EngineChoice, Granularity, Hold, SlotAccess, SlotId, TakeReport, VmId, VmInfo, VmState,
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
    /// When the copy is verified.
    pub verify: Verify,
    /// What becomes of the guest.
    pub after: After,
}

/// When a copy is verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verify {
    /// After the guest was let go: what it writes meanwhile is not judged.
    Running,
    /// Before that, all of it, however long that takes.
    Paused,
}

/// What becomes of the guest after the last round.
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
    /// No page differs.
    Verified(Verified),
}

/// What was verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verified {
    /// Pages that are the same at both ends.
    pub pages: u64,
    /// Pages written since the last round, which say nothing.
    pub written: u64,
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
    /// Each slot, its copy, and the copy's SHA-256.
    pub slots: Vec<(SlotId, PathBuf, [u8; 32])>,
    /// From the beginning to the end of verification.
    pub total_time: Duration,
    /// From the pause to the resume, or until all that was to be done while it was paused was done.
    pub downtime: Duration,
    /// Spent verifying, in the downtime or after it.
    pub verify_time: Duration,
    /// What was verified.
    pub verified: Verified,
}

/// Copies a guest. `watch` must not wait for anybody: the guest may be paused.
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
    if matches!(before.summary.state, VmState::Stopped | VmState::Failed) {
        let image = Image::create(&plan.image_dir, &before.slots)?;
        return Copy {
            client,
            vm,
            plan,
            image,
            watch,
        }
        .run_ended(&before);
    }
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
        let hashed = Instant::now();
        let hashes = match self.plan.verify {
            Verify::Paused => Some(self.verify_paused()?),
            Verify::Running => None,
        };
        let hashed = hashed.elapsed();
        if self.plan.after == After::AsBefore {
            let vm = self.vm;
            self.client.undisturbed(|client| client.let_go(vm))?;
        }
        let downtime = paused.elapsed();
        let (verified, verify_time) = match hashes {
            Some(verified) => (verified, hashed),
            None => {
                let verifying = Instant::now();
                (self.verify_running()?, verifying.elapsed())
            }
        };
        self.report(begun, rounds, downtime, verified, verify_time)
    }

    /// Copies a guest that has ended.
    fn run_ended(mut self, before: &VmInfo) -> Result<Report> {
        let begun = Instant::now();
        let rounds = vec![self.whole()?];
        let verifying = Instant::now();
        let differing = self.differing()?;
        let verify_time = verifying.elapsed();
        let now = self.client.info(self.vm)?;
        if (now.summary.state, now.restarts) != (before.summary.state, before.restarts) {
            let what = "the VM was started while it was copied; copy it once more".into();
            return Err(Error::Cancelled(what));
        }
        let verified = self.judge(&differing, &[])?;
        self.report(begun, rounds, Duration::ZERO, verified, verify_time)
    }

    fn report(
        self,
        begun: Instant,
        rounds: Vec<Round>,
        downtime: Duration,
        verified: Verified,
        verify_time: Duration,
    ) -> Result<Report> {
        (self.watch)(Step::Verified(verified));
        let slots = self.image.slots().iter();
        let slots = slots
            .map(|slot| Ok((slot.info.id, slot.path.clone(), slot.sha256()?)))
            .collect::<Result<_>>()?;
        self.image.finish()?;
        Ok(Report {
            rounds,
            slots,
            total_time: begun.elapsed(),
            downtime,
            verify_time,
            verified,
        })
    }

    /// Copies all memory once.
    fn whole(&mut self) -> Result<Round> {
        let begun = Instant::now();
        let total = self.pages();
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
    fn verify_paused(&mut self) -> Result<Verified> {
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
        }
        let empty = |_: &mut Client, report: &TakeReport| match report.dirty_pages {
            0 => Ok(()),
            pages => Err(still_dirty(pages)),
        };
        self.client
            .harvest(self.vm, Ending::Commit, &mut |_, _| {}, empty)?;
        self.judge(&[], &[])
    }

    /// Compares sums of pages, and then learns which of them the guest has written meanwhile.
    fn verify_running(&mut self) -> Result<Verified> {
        let differing = self.differing()?;
        let since = self.written()?;
        if self.plan.after == After::Paused {
            return match since.dirty_pages() {
                0 => self.judge(&differing, &since.slots),
                pages => Err(still_dirty(pages)),
            };
        }
        if self.wrong(&differing, &since.slots).is_empty() {
            return self.judge(&differing, &since.slots);
        }
        self.settle()?;
        // What was given back is in it again.
        let settled = self.written()?;
        let known = |(id, page)| is_in(&settled.slots, id, page) || is_in(&since.slots, id, page);
        let rest: Vec<_> = differing.into_iter().filter(|&at| !known(at)).collect();
        self.judge(&rest, &settled.slots)
    }

    /// What the guest has written since the last round. It is not this copy's: whoever goes on with the log gets it.
    fn written(&mut self) -> Result<Bitmaps> {
        let vm = self.vm;
        let read = |client: &mut Client, report: &TakeReport| {
            client.read_bitmaps(vm, report, &mut |_, _| {})
        };
        self.client
            .harvest(vm, Ending::GiveBack, &mut |_, _| {}, read)
    }

    /// Has each CPU of the guest leave it once: what it has stored is visible in the tables then.
    fn settle(&mut self) -> Result<()> {
        let vm = self.vm;
        match self.client.pause(vm, Hold::Session) {
            // It has left them all for good.
            Ok(()) | Err(Error::VmGone { .. }) => {}
            Err(error) => return Err(error),
        }
        self.client.undisturbed(|client| client.let_go(vm))
    }

    /// The pages whose sum at EL2 is not the copy's.
    fn differing(&mut self) -> Result<Vec<(SlotId, u64)>> {
        let total = self.pages();
        let mut done = 0;
        let mut found = Vec::new();
        let mut ours = Vec::new();
        for slot in self.image.slots() {
            let (id, base) = (slot.info.id, slot.info.base_ipa);
            let watch = &mut *self.watch;
            self.client
                .page_sums(self.vm, id, slot.info.pages, |first, sums| {
                    ours.resize(sums.len() * PAGE_SIZE as usize, 0);
                    slot.read(base + first * PAGE_SIZE, &mut ours)?;
                    let pages = ours.chunks(PAGE_SIZE as usize).zip(sums).zip(first..);
                    let differ = pages.filter(|((page, sum), _)| crc32c(page) != **sum);
                    found.extend(differ.map(|(_, page)| (id, page)));
                    done += sums.len() as u64;
                    let what = "comparing checksums";
                    watch(Step::Working { what, done, total });
                    Ok(())
                })?;
        }
        Ok(found)
    }

    /// Judges the pages that differ by what was written since the last round.
    fn judge(&self, differing: &[(SlotId, u64)], written: &[SlotBitmap]) -> Result<Verified> {
        let wrong = self.wrong(differing, written);
        if !wrong.is_empty() {
            let first = wrong.get(..DIFFERENCES_NAMED).unwrap_or(&wrong).join(" ");
            return Err(Error::Mismatch(format!(
                "{} pages are not what the guest has, which has not written them since; first {first}",
                wrong.len()
            )));
        }
        let written = written.iter().map(SlotBitmap::dirty_pages).sum();
        Ok(Verified {
            pages: self.pages().saturating_sub(written),
            written,
        })
    }

    /// The addresses of those that differ and were not written.
    fn wrong(&self, differing: &[(SlotId, u64)], written: &[SlotBitmap]) -> Vec<String> {
        let unwritten = differing
            .iter()
            .filter(|(id, page)| !is_in(written, *id, *page));
        unwritten
            .filter_map(|(id, page)| {
                let slot = self.image.slot(*id)?;
                Some(format!("{:#x}", slot.info.base_ipa + page * PAGE_SIZE))
            })
            .collect()
    }

    fn pages(&self) -> u64 {
        self.image.slots().iter().map(|slot| slot.info.pages).sum()
    }
}

fn is_in(bitmaps: &[SlotBitmap], slot: SlotId, page: u64) -> bool {
    let bits = bitmaps.iter().find(|bits| bits.slot == slot);
    bits.is_some_and(|bits| bits.get(page))
}

fn still_dirty(pages: u64) -> Error {
    Error::Mismatch(format!(
        "{pages} pages dirty after the last round, though the guest is paused"
    ))
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
        SlotAccess::ReadOnly => " (a read-only slot, which only EL2 writes)",
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
