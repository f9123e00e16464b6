//! What a target can do, as typed calls.

use super::Client;
use super::exchange::{kind, unexpected};
use crate::bitmaps::{Bitmaps, SlotBitmap};
use crate::{Error, Result};
use std::thread;
use std::time::{Duration, Instant};
use tidemark_wire::bitmap;
use tidemark_wire::message::{
    Cost, DirtyStatus, EngineChoice, Epoch, ErrorReply, Granularity, Hold, Quota, Request,
    Response, SlotId, TakeReport, VmId, VmInfo, VmState, VmSummary,
};
use tidemark_wire::{BITMAP_READ_PAGES_MAX, MEMORY_READ_MAX, PAGE_SUMS_MAX, pages};

/// How a harvest ends when all went well. When not, it is always given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// The target forgets it.
    Commit,
    /// The target takes it back, as if nothing had been asked.
    GiveBack,
}

/// What is still to be read: the first page or address, and how many pages or bytes.
#[derive(Clone, Copy)]
struct Span {
    at: u64,
    len: u64,
}

/// A piece of one as it came, the front of what was asked for.
struct Piece<'a> {
    at: u64,
    len: u32,
    encoding: &'a [u8],
}

/// Pieces of a kind.
struct Pieces {
    during: &'static str,
    /// What one request may ask for.
    most: u32,
    /// What an answer that covers less is a multiple of.
    grain: u32,
    /// Finds the piece in an answer.
    find: fn(Response<'_>) -> Option<Piece<'_>>,
}

const BITMAP: Pieces = Pieces {
    during: "reading a bitmap",
    most: BITMAP_READ_PAGES_MAX,
    grain: 64,
    find: |response| match response {
        Response::Bitmap {
            first_page: at,
            pages: len,
            encoding,
        } => Some(Piece { at, len, encoding }),
        _ => None,
    },
};

const MEMORY: Pieces = Pieces {
    during: "reading guest memory",
    most: MEMORY_READ_MAX,
    grain: 8,
    find: |response| match response {
        Response::Memory {
            ipa: at,
            covered: len,
            encoding,
        } => Some(Piece { at, len, encoding }),
        _ => None,
    },
};

const SUMS: Pieces = Pieces {
    during: "reading checksums of pages",
    most: PAGE_SUMS_MAX,
    grain: 1,
    find: |response| match response {
        Response::PageSums {
            first_page: at,
            sums,
        } if sums.len().is_multiple_of(4) => Some(Piece {
            at,
            len: u32::try_from(sums.len() / 4).ok()?,
            encoding: sums,
        }),
        _ => None,
    },
};

impl Pieces {
    fn nonsense(&self, problem: String) -> Error {
        Error::Protocol {
            during: self.during.into(),
            problem,
        }
    }
}

fn ok(response: Response<'_>) -> Option<()> {
    match response {
        Response::Ok => Some(()),
        _ => None,
    }
}

fn state(response: Response<'_>) -> Option<VmState> {
    match response {
        Response::State(state) => Some(state),
        _ => None,
    }
}

impl Client {
    /// All VMs.
    ///
    /// # Errors
    /// As [`Client::call`], which holds for all calls here.
    pub fn list(&mut self) -> Result<Vec<VmSummary>> {
        self.call("listing VMs", &Request::List, |response| match response {
            Response::Vms(vms) => Some(vms),
            _ => None,
        })
    }

    /// What EL2's own work has cost since the machine started, and ticks in a second.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn costs(&mut self) -> Result<(u64, Vec<Cost>)> {
        self.call(
            "asking what it costs",
            &Request::Costs,
            |response| match response {
                Response::Costs { frequency, costs } => Some((frequency, costs)),
                _ => None,
            },
        )
    }

    /// The VM of that name or id.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn find(&mut self, name_or_id: &str) -> Result<VmSummary> {
        let vms = self.list()?;
        let id = name_or_id.parse().ok().map(VmId);
        // A name is never digits alone, so the two cannot be confused.
        let found = vms
            .iter()
            .find(|vm| vm.name == name_or_id || Some(vm.id) == id);
        found.cloned().ok_or_else(|| Error::NoSuchVm {
            asked: name_or_id.into(),
            known: vms.into_iter().map(|vm| vm.name).collect(),
        })
    }

    /// All about a VM.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn info(&mut self, vm: VmId) -> Result<VmInfo> {
        self.call(
            "asking about a VM",
            &Request::Info { vm },
            |response| match response {
                Response::Info(info) => Some(info),
                _ => None,
            },
        )
    }

    /// Pauses a VM and waits until it is.
    ///
    /// # Errors
    /// [`Error::TooSlow`], or [`Error::VmGone`] when it has ended.
    pub fn pause(&mut self, vm: VmId, hold: Hold) -> Result<()> {
        if hold == Hold::Session {
            self.stay_alive()?;
        }
        let begun = Instant::now();
        loop {
            match self.call("pausing a VM", &Request::Pause { vm, hold }, state)? {
                VmState::Paused => return Ok(()),
                VmState::Stopped | VmState::Failed => return Err(self.gone(vm)),
                VmState::Running | VmState::Starting => {}
            }
            self.not_too_slow(begun, || format!("pausing VM {vm}"))?;
        }
    }

    fn gone(&mut self, vm: VmId) -> Error {
        match self.info(vm) {
            Ok(info) => Error::VmGone {
                vm: info.summary.name,
                state: info.summary.state.to_string(),
                reason: info.reason,
            },
            Err(error) => error,
        }
    }

    /// Takes a pause back: the VM runs again unless somebody else holds it too.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn resume(&mut self, vm: VmId, hold: Hold) -> Result<VmState> {
        self.call("resuming a VM", &Request::Resume { vm, hold }, state)
    }

    /// Takes this session's pause back; a VM that has ended meanwhile is left alone.
    pub(crate) fn let_go(&mut self, vm: VmId) -> Result<()> {
        match self.resume(vm, Hold::Session) {
            Ok(_) => Ok(()),
            Err(Error::Target {
                reply: ErrorReply::BadState(_),
                ..
            }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets time pass, still passing outputs on and heeding Ctrl-C.
    ///
    /// # Errors
    /// A closed line, Ctrl-C.
    pub fn idle(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while let Some(left) = until
            .checked_duration_since(Instant::now())
            .filter(|t| !t.is_zero())
        {
            self.poll(left)?;
        }
        Ok(())
    }

    /// Restarts a VM.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn reset(&mut self, vm: VmId) -> Result<VmState> {
        let restarts = self.info(vm)?.restarts;
        self.call("resetting a VM", &Request::Reset { vm, restarts }, state)
    }

    /// Stops a VM for good and waits until it has ended. Gives [`VmState::Stopped`], or
    /// [`VmState::Failed`] where a failure came first.
    ///
    /// # Errors
    /// As [`Client::call`]; [`Error::TooSlow`].
    pub fn stop(&mut self, vm: VmId) -> Result<VmState> {
        let mut begun = Instant::now();
        let mut now = self.call("stopping a VM", &Request::Stop { vm }, state)?;
        while !matches!(now, VmState::Stopped | VmState::Failed) {
            if now == VmState::Starting {
                // It ends when it is loaded, however long that takes.
                begun = Instant::now();
            }
            self.not_too_slow(begun, || format!("stopping VM {vm}"))?;
            now = match self.info(vm) {
                Ok(info) => info.summary.state,
                // A machine that goes off with its last VM has stopped it.
                Err(Error::Closed { .. }) => VmState::Stopped,
                Err(error) => return Err(error),
            };
        }
        Ok(now)
    }

    /// Passes a moment of a wait that began then, if there is time left for it.
    fn not_too_slow(&self, begun: Instant, what: impl Fn() -> String) -> Result<()> {
        let after = self.options.timeout;
        if begun.elapsed() > after {
            return Err(Error::TooSlow {
                what: what(),
                after,
            });
        }
        thread::sleep(Duration::from_millis(1));
        Ok(())
    }

    /// Powers the machine off; a line that closes says so as well as an answer.
    ///
    /// # Errors
    /// As [`Client::call`], less that one.
    pub fn power_off(&mut self) -> Result<()> {
        match self.call("powering off", &Request::PowerOff, ok) {
            Err(Error::Closed { .. }) => Ok(()),
            done => done,
        }
    }

    /// SHA-256 of a slot's memory, of a paused VM.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn hash(
        &mut self,
        vm: VmId,
        slot: SlotId,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<[u8; 32]> {
        let request = Request::Hash { vm, slot };
        self.ask_until_done(
            "hashing memory",
            &request,
            progress,
            |response| match response {
                Response::HashDone { sha256, .. } => Some(sha256),
                _ => None,
            },
        )
    }

    /// Starts a VM's dirty log.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn start_log(
        &mut self,
        vm: VmId,
        engine: EngineChoice,
        granularity: Granularity,
        hold: Hold,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        if hold == Hold::Session {
            self.stay_alive()?;
        }
        let request = Request::DirtyStart {
            vm,
            engine,
            granularity,
            hold,
        };
        self.ask_until_done("starting the dirty log", &request, progress, ok)
    }

    /// Changes the engine of a VM's dirty log while it runs.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn set_engine(
        &mut self,
        vm: VmId,
        engine: EngineChoice,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let request = Request::DirtyEngine { vm, engine };
        self.ask_until_done("changing the dirty engine", &request, progress, ok)
    }

    /// Stops a VM's dirty log and waits until its blocks are back.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn stop_log(&mut self, vm: VmId, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let request = Request::DirtyStop { vm };
        self.ask_until_done("stopping the dirty log", &request, progress, ok)
    }

    /// Limits what each vCPU of a VM may dirty while a log is on, or lifts that.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn set_quota(&mut self, vm: VmId, quota: Option<Quota>) -> Result<()> {
        let request = Request::DirtyQuota { vm, quota };
        self.call("setting the dirty quota", &request, ok)
    }

    /// Gives a VM more memory and waits until the guest can have it.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn add_slot(
        &mut self,
        vm: VmId,
        slot: SlotId,
        base_ipa: u64,
        bytes: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let request = Request::SlotAdd {
            vm,
            slot,
            base_ipa,
            bytes,
        };
        self.ask_until_done("adding a memory slot", &request, progress, ok)
    }

    /// Takes memory away that was added, and waits until its content is gone.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn delete_slot(
        &mut self,
        vm: VmId,
        slot: SlotId,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let request = Request::SlotDelete { vm, slot };
        self.ask_until_done("deleting a memory slot", &request, progress, ok)
    }

    /// The state of a VM's dirty log.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn log_status(&mut self, vm: VmId) -> Result<DirtyStatus> {
        let request = Request::DirtyStatus { vm };
        self.call(
            "asking about the dirty log",
            &request,
            |response| match response {
                Response::DirtyStatus(status) => Some(status),
                _ => None,
            },
        )
    }

    /// Takes the next epoch. Whoever calls this must commit or give back; [`Client::harvest`]
    /// does so by itself.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn take(&mut self, vm: VmId, progress: &mut dyn FnMut(u64, u64)) -> Result<TakeReport> {
        let status = self.log_status(vm)?;
        let during = "taking the dirty bitmap";
        let refused = |reply| Error::Target {
            during: during.into(),
            reply,
        };
        if status.logging.is_none() {
            return Err(refused(ErrorReply::NotLogging));
        }
        if let Some(epoch) = status.outstanding {
            return Err(refused(ErrorReply::EpochOutstanding { epoch }));
        }
        let epoch = Epoch(status.last_taken.0.wrapping_add(1));
        let request = Request::DirtyTake { vm, epoch };
        let taken = self.ask_until_done(during, &request, progress, |response| match response {
            Response::TakeDone(report) if report.epoch == epoch => Some(report),
            _ => None,
        });
        if taken.is_err() {
            // It may have begun.
            self.undisturbed(|client| drop(client.abort(vm, epoch)));
        }
        taken
    }

    /// Tells the target to forget an epoch.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn commit(&mut self, vm: VmId, epoch: Epoch) -> Result<()> {
        self.call(
            "committing an epoch",
            &Request::DirtyCommit { vm, epoch },
            ok,
        )
    }

    /// Gives an epoch back to the target.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn abort(&mut self, vm: VmId, epoch: Epoch) -> Result<()> {
        self.call(
            "giving an epoch back",
            &Request::DirtyAbort { vm, epoch },
            ok,
        )
    }

    /// Takes an epoch, has `keep` put it somewhere safe, and ends it as asked; if anything
    /// fails before that, gives it back.
    ///
    /// # Errors
    /// As [`Client::call`], and whatever `keep` says.
    pub fn harvest<T>(
        &mut self,
        vm: VmId,
        ending: Ending,
        progress: &mut dyn FnMut(u64, u64),
        keep: impl FnOnce(&mut Self, &TakeReport) -> Result<T>,
    ) -> Result<T> {
        let report = self.take(vm, progress)?;
        match keep(self, &report) {
            Ok(value) => {
                match ending {
                    // What it stands for is safe: not even Ctrl-C should undo it now.
                    Ending::Commit => self.undisturbed(|client| client.commit(vm, report.epoch))?,
                    Ending::GiveBack => {
                        self.undisturbed(|client| client.abort(vm, report.epoch))?
                    }
                }
                Ok(value)
            }
            Err(error) => {
                // If this fails too, the next session's hello gives it back.
                self.undisturbed(|client| drop(client.abort(vm, report.epoch)));
                Err(error)
            }
        }
    }

    /// Reads the bitmaps of an epoch that was taken.
    ///
    /// # Errors
    /// As [`Client::call`], and [`Error::Protocol`] when bitmap and report disagree.
    pub fn read_bitmaps(
        &mut self,
        vm: VmId,
        report: &TakeReport,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Bitmaps> {
        let total: u64 = report.slots.iter().map(|slot| slot.pages).sum();
        let mut before = 0;
        let mut slots = Vec::new();
        for slot in &report.slots {
            let mut bits = SlotBitmap::new(slot.slot, slot.base_ipa, slot.pages)?;
            // A clean slot needs no reading.
            if slot.dirty_pages > 0 {
                let mut tell = |done| progress(before + done, total);
                self.read_bitmap(vm, report.epoch, &mut bits, &mut tell)?;
            }
            if bits.dirty_pages() != slot.dirty_pages {
                return Err(Error::Protocol {
                    during: "reading a bitmap".into(),
                    problem: format!(
                        "slot {} has {} bits set, but {} pages were reported",
                        slot.slot,
                        bits.dirty_pages(),
                        slot.dirty_pages
                    ),
                });
            }
            before += slot.pages;
            slots.push(bits);
        }
        Ok(Bitmaps {
            epoch: report.epoch,
            slots,
        })
    }

    fn read_bitmap(
        &mut self,
        vm: VmId,
        epoch: Epoch,
        bits: &mut SlotBitmap,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let slot = bits.slot;
        let all = Span {
            at: 0,
            len: bits.pages,
        };
        let ask = |first_page, pages| Request::BitmapRead {
            vm,
            slot,
            epoch,
            first_page,
            pages,
        };
        let mut done = 0;
        self.pull(&BITMAP, [all], ask, |piece| {
            let Piece { at, len, encoding } = piece;
            let words = bits
                .words_mut(at, len)
                .ok_or_else(|| BITMAP.nonsense(format!("{at}+{len} is outside the slot")))?;
            bitmap::decode(encoding, len, words)
                .map_err(|error| BITMAP.nonsense(error.to_string()))?;
            done += u64::from(len);
            progress(done);
            Ok(())
        })
    }

    /// Reads guest memory at the given ranges (address, bytes), handing each part on as it
    /// comes, in no particular order.
    ///
    /// # Errors
    /// As [`Client::call`], and whatever `keep` says.
    pub fn read_memory(
        &mut self,
        vm: VmId,
        ranges: impl IntoIterator<Item = (u64, u64)>,
        mut keep: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let spans = ranges.into_iter().map(|(at, len)| Span { at, len });
        let ask = |ipa, len| Request::ReadMemory { vm, ipa, len };
        let mut buffer = vec![0; MEMORY_READ_MAX as usize];
        self.pull(&MEMORY, spans, ask, |piece| {
            // No more came than was asked for, which is no more than this.
            let part = buffer.get_mut(..piece.len as usize).unwrap_or_default();
            pages::decode(piece.encoding, part)
                .map_err(|error| MEMORY.nonsense(error.to_string()))?;
            keep(piece.at, part)
        })
    }

    /// Reads the CRC-32C of each page of a slot, handing each part on as it comes, in no particular order: its first
    /// page, and the sums.
    ///
    /// # Errors
    /// As [`Client::call`], and whatever `keep` says.
    pub fn page_sums(
        &mut self,
        vm: VmId,
        slot: SlotId,
        pages: u64,
        mut keep: impl FnMut(u64, &[u32]) -> Result<()>,
    ) -> Result<()> {
        let all = Span { at: 0, len: pages };
        let ask = |first_page, pages| Request::PageSums {
            vm,
            slot,
            first_page,
            pages,
        };
        self.pull(&SUMS, [all], ask, |piece| {
            let sums: Vec<u32> = piece
                .encoding
                .as_chunks()
                .0
                .iter()
                .map(|sum| u32::from_le_bytes(*sum))
                .collect();
            keep(piece.at, &sums)
        })
    }

    /// Reads spans piece by piece, several in flight, and asks for the rest of what came in part.
    fn pull<'r>(
        &mut self,
        pieces: &Pieces,
        spans: impl IntoIterator<Item = Span>,
        ask: impl Fn(u64, u32) -> Request<'r>,
        mut keep: impl FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        let step = u64::from(pieces.most);
        let work = spans.into_iter().flat_map(|span| {
            (0..span.len.div_ceil(step)).map(move |n| {
                let len = (span.len - n * step).min(step);
                (span.at + n * step, len as u32)
            })
        });
        let ask = |&(at, len): &(u64, u32)| ask(at, len);
        self.pipeline(pieces.during, work, ask, |(at, len), response| {
            let kind = kind(&response);
            let piece = (pieces.find)(response).ok_or_else(|| unexpected(pieces.during, kind))?;
            let covered = piece.len;
            let whole = covered == len || covered.is_multiple_of(pieces.grain);
            if piece.at != at || covered == 0 || covered > len || !whole {
                return Err(pieces.nonsense(format!(
                    "asked for {at:#x}+{len}, got {:#x}+{covered}",
                    piece.at
                )));
            }
            keep(piece)?;
            Ok((covered < len).then(|| (at + u64::from(covered), len - covered)))
        })
    }
}
