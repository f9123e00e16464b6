//! What the fake target answers to requests about a dirty log: epochs, and bitmaps in flight.

use tidemark_wire::message::{
    DirtyStatus, Engine, EngineChoice, ErrorReply, Logging, Quota, Request, Response, SlotAccess,
    SlotDirty, Stalls, TakeReport,
};
use tidemark_wire::{BITMAP_READ_PAGES_MAX, bitmap};

use super::{Lie, Target};

impl Target {
    pub fn answer_dirty<'b>(
        &mut self,
        request: &Request<'_>,
        piece: &'b mut [u8],
    ) -> Result<Response<'b>, ErrorReply> {
        let lie = self.lie;
        match *request {
            Request::DirtyStart {
                vm,
                engine,
                granularity,
                hold,
            } => {
                let vm = self.vm(vm)?;
                let engine = match engine {
                    EngineChoice::WriteProtect => Engine::WriteProtect,
                    EngineChoice::Dbm | EngineChoice::Auto => Engine::Dbm,
                };
                let wanted = Logging {
                    engine,
                    granularity,
                };
                match vm.logging {
                    Some(now) if now == wanted => return Ok(Response::Ok),
                    Some(_) => return Err(ErrorReply::AlreadyLogging),
                    None => {}
                }
                if vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                vm.logging = Some(wanted);
                vm.log_is = Some(hold);
                Ok(Response::Ok)
            }
            Request::DirtyEngine { vm, engine } => {
                let vm = self.vm(vm)?;
                let Some(logging) = &mut vm.logging else {
                    return Err(ErrorReply::NotLogging);
                };
                match engine {
                    EngineChoice::WriteProtect => logging.engine = Engine::WriteProtect,
                    EngineChoice::Dbm => logging.engine = Engine::Dbm,
                    EngineChoice::Auto => {}
                }
                Ok(Response::Ok)
            }
            Request::DirtyStop { vm } => {
                let vm = self.vm(vm)?;
                if let Some(epoch) = vm.outstanding {
                    return Err(ErrorReply::EpochOutstanding { epoch });
                }
                if vm.logging.is_some() && vm.not_yet() {
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                vm.logging = None;
                vm.slots.iter_mut().for_each(|s| s.live.fill(0));
                Ok(Response::Ok)
            }
            Request::DirtyStatus { vm } => {
                let vm = self.vm(vm)?;
                Ok(Response::DirtyStatus(DirtyStatus {
                    logging: vm.logging,
                    outstanding: vm.outstanding,
                    last_taken: vm.last_taken,
                    last_committed: vm.last_committed,
                    live_pages_hint: vm.dirty(),
                    write_faults: vm.written,
                    splits: 0,
                    harvests: vm.last_taken.0,
                    entries_read: 0,
                    quota: vm.quota,
                    stalls: vm.quota.map_or(Stalls::default(), |_| Stalls {
                        count: 3,
                        time_us: 270_000,
                        percent: 90,
                    }),
                }))
            }
            Request::DirtyQuota { vm, quota } => {
                let bad =
                    |quota: &Quota| quota.pages == 0 || !(10..=1000).contains(&quota.interval_ms);
                if quota.as_ref().is_some_and(bad) {
                    return Err(ErrorReply::BadQuota);
                }
                self.vm(vm)?.quota = quota;
                Ok(Response::Ok)
            }
            Request::DirtyTake { vm, epoch } => {
                let vm = self.vm(vm)?;
                if vm.logging.is_none() {
                    return Err(ErrorReply::NotLogging);
                }
                match vm.outstanding {
                    Some(now) if now == epoch => {}
                    Some(now) => return Err(ErrorReply::EpochOutstanding { epoch: now }),
                    None if epoch <= vm.last_taken => {
                        return Err(ErrorReply::NoSuchEpoch { outstanding: None });
                    }
                    None => {
                        vm.outstanding = Some(epoch);
                        vm.last_taken = epoch;
                        vm.slow = 0;
                        for slot in &mut vm.slots {
                            slot.in_flight =
                                std::mem::replace(&mut slot.live, vec![0; slot.in_flight.len()]);
                        }
                    }
                }
                if vm.slow < vm.slowness {
                    vm.slow += 1;
                    return Ok(Response::Progress {
                        done: vm.slow,
                        total: vm.slowness + 1,
                    });
                }
                let slots: Vec<SlotDirty> = vm
                    .slots
                    .iter()
                    .filter(|s| s.access == SlotAccess::ReadWrite)
                    .map(|s| SlotDirty {
                        slot: s.id,
                        base_ipa: s.base_ipa,
                        pages: s.pages(),
                        dirty_pages: s.in_flight.iter().map(|w| u64::from(w.count_ones())).sum(),
                    })
                    .collect();
                let mut report = TakeReport {
                    epoch,
                    dirty_pages: slots.iter().map(|s| s.dirty_pages).sum(),
                    slots,
                };
                if lie == Some(Lie::WrongCount) {
                    report.slots[0].dirty_pages += 1;
                }
                Ok(Response::TakeDone(report))
            }
            Request::BitmapRead {
                vm,
                slot,
                epoch,
                first_page,
                pages,
            } => {
                let vm = self.vm(vm)?;
                if vm.outstanding != Some(epoch) {
                    return Err(ErrorReply::NoSuchEpoch {
                        outstanding: vm.outstanding,
                    });
                }
                let slot = vm
                    .slots
                    .iter()
                    .find(|s| s.id == slot)
                    .ok_or(ErrorReply::NoSuchSlot)?;
                let end = first_page
                    .checked_add(u64::from(pages))
                    .ok_or(ErrorReply::OutOfRange)?;
                if pages == 0 || pages > BITMAP_READ_PAGES_MAX || end > slot.pages() {
                    return Err(ErrorReply::OutOfRange);
                }
                if first_page % 64 != 0 {
                    return Err(ErrorReply::NeedsAlignment);
                }
                let base = (first_page / 64) as usize;
                let done = bitmap::encode(&slot.in_flight[base..], |word| *word, pages, piece)
                    .expect("a word fits");
                let first_page = match lie {
                    Some(Lie::WrongPiece) => first_page + 64,
                    _ => first_page,
                };
                Ok(Response::Bitmap {
                    first_page,
                    pages: done.pages,
                    encoding: &piece[..done.len],
                })
            }
            Request::DirtyCommit { vm, epoch } => {
                let vm = self.vm(vm)?;
                if vm.outstanding == Some(epoch) {
                    vm.outstanding = None;
                    vm.last_committed = epoch;
                    vm.slots.iter_mut().for_each(|s| s.in_flight.fill(0));
                } else if vm.last_committed != epoch {
                    return Err(ErrorReply::NoSuchEpoch {
                        outstanding: vm.outstanding,
                    });
                }
                Ok(Response::Ok)
            }
            Request::DirtyAbort { vm, epoch } => {
                let vm = self.vm(vm)?;
                if vm.outstanding == Some(epoch) {
                    vm.give_back();
                } else if vm.last_aborted != epoch {
                    return Err(ErrorReply::NoSuchEpoch {
                        outstanding: vm.outstanding,
                    });
                }
                Ok(Response::Ok)
            }
            _ => Err(ErrorReply::Malformed),
        }
    }
}
