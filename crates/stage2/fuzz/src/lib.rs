//! What a fuzzer calls: plain functions of bytes that panic when the engine is wrong, and return what they
//! saw it do, so that whoever has no instrumented build knows which input is new.
//!
//! They use what is public only. The bytes are a list of calls with their arguments; where they end, the run
//! ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tidemark_stage2::fake::{Guest, Machine, Refusal};
use tidemark_stage2::*;

/// What was seen: a call and how it ended, as a number.
pub type Seen = BTreeSet<u64>;

/// The bytes that are left.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn short(&mut self) -> Option<u64> {
        Some(u64::from(self.byte()?) << 8 | u64::from(self.byte()?))
    }

    /// Any number, those near powers of two and near the end more often.
    fn long(&mut self) -> Option<u64> {
        let kind = self.byte()?;
        let shift = u32::from(kind & 63);
        let low = u64::from(self.byte()?);
        Some(match kind >> 6 {
            0 => low << shift,
            1 => (1u64 << shift).wrapping_add(low).wrapping_sub(128),
            2 => u64::MAX - (low << shift.min(40)),
            _ => (self.short()? << 16 | low).wrapping_mul(4096) << (shift & 15),
        })
    }
}

const BASE: u64 = 0x4000_0000;
const RAM: u64 = 0x20_0000_0000;

/// What a host that copies knows: pages written and not yet with it.
#[derive(Default)]
struct Model {
    slots: BTreeMap<u16, (u64, u64)>,
    /// Written before the harvest under way began, or since the last one when none is.
    before: BTreeSet<u64>,
    /// Written since it began.
    during: BTreeSet<u64>,
    taking: Option<Epoch>,
    done: bool,
    on: bool,
}

impl Model {
    fn wrote(&mut self, ipa: u64) {
        let page = ipa & !(PAGE_SIZE - 1);
        let holds = |(base, pages): &(u64, u64)| (*base..base + pages * PAGE_SIZE).contains(&page);
        // What a slot knew goes with it.
        if !self.on || !self.slots.values().any(holds) {
            return;
        }
        if self.taking.is_some() {
            self.during.insert(page);
        } else {
            self.before.insert(page);
        }
    }

    fn forget(&mut self, id: u16) {
        if let Some((base, pages)) = self.slots.remove(&id) {
            let gone = |page: &u64| !(base..base + pages * PAGE_SIZE).contains(page);
            self.before.retain(gone);
            self.during.retain(gone);
        }
    }

    fn settled(&mut self, committed: bool) {
        if committed {
            self.before.clear();
        }
        self.before.append(&mut self.during);
        (self.taking, self.done) = (None, false);
    }
}

struct Vm {
    machine: Arc<Machine>,
    stage2: Stage2<Arc<Machine>>,
    guest: Guest,
    model: Model,
    epoch: u64,
    /// Changes of access that are half way, by slot: until each is done a guest may try in vain.
    changing: BTreeMap<SlotId, Access>,
    seen: Seen,
}

/// How often a step may be repeated before it counts as one that never ends.
const STEPS: usize = 100_000;

impl Vm {
    fn new(flags: u8) -> Self {
        let support = |bit: u8| {
            if flags >> bit & 1 == 1 {
                Support::Present
            } else {
                Support::Absent
            }
        };
        let features = Features {
            dbm: support(0),
            bbm2: support(1),
            tlb_range: support(2),
            ttl: support(3),
            ..Machine::everything()
        };
        let machine = Arc::new(Machine::new(48, 2));
        machine.assume(&features);
        let vmid = Vmid::new(7, VmidWidth::Eight).unwrap();
        let stage2 = Stage2::new(Arc::clone(&machine), 39, vmid, features).unwrap();
        let guest = Guest {
            vtcr: stage2.vtcr(),
            vttbr: stage2.vttbr(),
        };
        Self {
            machine,
            stage2,
            guest,
            model: Model::default(),
            epoch: 0,
            changing: BTreeMap::new(),
            seen: Seen::new(),
        }
    }

    /// Notes that `call` ended so, and what the log is at; two errors are one if they have the same name.
    fn saw(&mut self, call: u8, how: &dyn std::fmt::Debug) {
        let text = format!("{how:?}");
        let name = text.split(|c: char| !c.is_alphanumeric()).take(2);
        let log = self.stage2.log_status();
        let at = log.stage as u64 | u64::from(log.outstanding.is_some()) << 2;
        let hash = name
            .flat_map(str::bytes)
            .fold(at << 8 | u64::from(call), |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        self.seen.insert(hash);
    }

    fn finish(
        &self,
        steps: u8,
        step: impl Fn(&Stage2<Arc<Machine>>) -> Result<Progress, Error>,
    ) -> Result<Progress, Error> {
        let most = if steps & 3 == 0 { 1 } else { STEPS };
        let mut last = Progress::Done;
        for _ in 0..most {
            last = step(&self.stage2)?;
            if last == Progress::Done {
                return Ok(last);
            }
        }
        assert_ne!(most, STEPS, "it never ends");
        Ok(last)
    }

    /// Where the page of `ipa` is in the machine. A slot that goes may be reached until it is gone.
    fn backing(&self, ipa: u64) -> Option<u64> {
        let gfn = Ipa::new(ipa).gfn().raw();
        let slots = self.stage2.slots();
        let holds =
            |slot: &&SlotInfo| (slot.base.raw()..slot.base.raw() + slot.pages).contains(&gfn);
        let slot = slots.iter().find(holds)?;
        Some(slot.extents.first()?.pa.raw() + (gfn - slot.base.raw()) * PAGE_SIZE)
    }

    fn access(&mut self, ipa: u64, access: FaultAccess) {
        for _ in 0..64 {
            let reached = self
                .machine
                .access(0, self.guest, ipa, access, |pa| pa.raw());
            let abort = match reached {
                Ok(pa) => {
                    assert_eq!(
                        Some(pa),
                        self.backing(ipa),
                        "{ipa:#x} reached foreign memory"
                    );
                    if access == FaultAccess::Write {
                        self.model.wrote(ipa);
                    }
                    return;
                }
                Err(abort) => abort,
            };
            let outcome = self.stage2.handle_fault(abort);
            self.saw(20, &outcome);
            match outcome {
                Outcome::Resume | Outcome::Dirtied(_) => {}
                Outcome::Retry => {
                    for (name, access) in std::mem::take(&mut self.changing) {
                        let _ = self.finish(1, |stage2| stage2.set_access(name, access));
                    }
                }
                Outcome::OutOfTables => return self.machine.refuse_tables(Refusal::None),
                Outcome::NotMemory | Outcome::ReadOnly => return,
            }
        }
        panic!("the guest faults for ever at {ipa:#x}");
    }

    fn reported(&self, epoch: Epoch) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for slot in self.stage2.taken(epoch).unwrap() {
            let words = self.stage2.in_flight(slot.slot, epoch).unwrap();
            let before = pages.len();
            // Only where there may be any, as a host is given it.
            let marked = |page: &u64| {
                words
                    .marked(*page as usize / 64)
                    .contains(&(*page as usize / 64))
            };
            for page in (0..words.len() as u64 * 64).filter(marked) {
                let word = words[page as usize / 64].load(std::sync::atomic::Ordering::SeqCst);
                if word >> (page % 64) & 1 == 1 {
                    assert!(page < slot.pages, "past the end of slot {}", slot.slot);
                    pages.insert(slot.base.ipa().raw() + page * PAGE_SIZE);
                }
            }
            assert_eq!((pages.len() - before) as u64, slot.dirty_pages);
        }
        pages
    }

    fn take(&mut self, steps: u8) {
        let epoch = self.model.taking.unwrap_or(Epoch(self.epoch + 1));
        let taken = self.finish(steps, |stage2| stage2.take(epoch));
        self.saw(6, &taken);
        let Ok(progress) = taken else { return };
        self.epoch = epoch.0;
        self.model.taking = Some(epoch);
        if progress == Progress::Done && !self.model.done {
            self.model.done = true;
            let reported = self.reported(epoch);
            let lost: Vec<_> = self.model.before.difference(&reported).take(3).collect();
            assert!(lost.is_empty(), "lost: {lost:x?}");
            // What was written meanwhile is in this epoch or in the next.
            let during = std::mem::take(&mut self.model.during);
            let (has, lacks) = during.into_iter().partition(|page| reported.contains(page));
            self.model.during = lacks;
            self.model.before.extend::<BTreeSet<u64>>(has);
        }
    }

    /// One call. `None` where the bytes end.
    fn call(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let call = bytes.byte()? % 20;
        let argument = bytes.byte()?;
        let id = u16::from(argument & 3);
        let name = SlotId(id);
        match call {
            0 => {
                let (base, pages) = (
                    BASE + bytes.short()? % 2048 * PAGE_SIZE,
                    1 + bytes.short()? % 1100,
                );
                let extent = Extent {
                    pa: Pa::new(
                        RAM + u64::from(id) * 0x4000_0000 + bytes.short()? % 1024 * PAGE_SIZE,
                    ),
                    pages,
                };
                let access = [Access::ReadWrite, Access::ReadOnly][usize::from(argument >> 7)];
                let added =
                    self.stage2
                        .add_slot(name, Ipa::new(base).gfn(), pages, access, &[extent]);
                self.saw(call, &added);
                if added.is_ok() {
                    self.model.slots.insert(id, (base, pages));
                }
            }
            1 => {
                let deleted = self.finish(argument >> 4, |stage2| stage2.delete_slot(name));
                self.saw(call, &deleted);
                self.model.forget(id);
            }
            2 => {
                let access = [Access::ReadWrite, Access::ReadOnly][usize::from(argument >> 7)];
                let set = self.finish(argument >> 4, |stage2| stage2.set_access(name, access));
                self.saw(call, &set);
                match set {
                    Ok(Progress::More { .. }) => drop(self.changing.insert(name, access)),
                    _ => drop(self.changing.remove(&name)),
                }
            }
            3 => {
                let mapped = self.stage2.map_ahead(name, bytes.short()?);
                self.saw(call, &mapped);
            }
            4 => {
                let engine = [Engine::WriteProtect, Engine::Dbm][usize::from(argument & 1)];
                let size = [Granularity::Page, Granularity::Adaptive, Granularity::Block];
                let size = size[usize::from(argument >> 1) % 3];
                let dirty = argument & 8 != 0;
                let started = self.finish(argument >> 4, |stage2| match dirty {
                    true => stage2.start_log_all_dirty(engine, size),
                    false => stage2.start_log(engine, size),
                });
                self.saw(call, &started);
                if started == Ok(Progress::Done) && !self.model.on {
                    self.model.on = true;
                }
            }
            5 => {
                let stopped = self.finish(argument, |stage2| stage2.stop_log());
                self.saw(call, &stopped);
                if stopped.is_ok() {
                    self.model = Model {
                        slots: std::mem::take(&mut self.model.slots),
                        ..Model::default()
                    };
                }
            }
            6 => self.take(argument),
            7 => {
                let epoch = Epoch(self.epoch);
                let committed = self.stage2.commit(epoch);
                self.saw(call, &committed);
                if committed.is_ok() && self.model.taking.is_some() {
                    self.model.settled(true);
                }
            }
            8 => {
                let epoch = Epoch(self.epoch);
                let aborted = match argument & 3 {
                    0 => Ok(self.stage2.abort_outstanding()),
                    1 => {
                        self.stage2.give_up(epoch);
                        Ok(None)
                    }
                    _ => self.stage2.abort(epoch).map(|()| None),
                };
                self.saw(call, &aborted);
                if self.stage2.log_status().outstanding.is_none() && self.model.taking.is_some() {
                    self.model.settled(false);
                }
            }
            9 => {
                let (ipa, len) = (BASE + bytes.short()? * 512, bytes.short()? * 8);
                let marked = self.stage2.mark_dirty(Ipa::new(ipa), len);
                self.saw(call, &marked);
                if marked.is_ok() && len > 0 {
                    let first = ipa & !(PAGE_SIZE - 1);
                    (first..ipa + len)
                        .step_by(PAGE_SIZE as usize)
                        .for_each(|page| self.model.wrote(page));
                }
            }
            10 => {
                let engine = [Engine::WriteProtect, Engine::Dbm][usize::from(argument & 1)];
                let set = self.stage2.set_engine(engine);
                self.saw(call, &set);
            }
            11 => {
                let status = self.stage2.log_status();
                self.saw(call, &status.stage);
                let there: Vec<u16> = self.stage2.slots().iter().map(|slot| slot.id.0).collect();
                assert!(self.model.slots.keys().all(|id| there.contains(id)));
                let tables = self.stage2.mappings().tables;
                assert_eq!(tables as usize, self.machine.tables_in_use());
            }
            12 => self.machine.refuse_tables(match argument & 3 {
                0 => Refusal::One(usize::from(argument >> 2) % 4),
                1 => Refusal::AllFrom(usize::from(argument >> 2) % 4),
                _ => Refusal::None,
            }),
            13 => {
                let fault = Fault {
                    ipa: Ipa::new(bytes.long()?),
                    access: [FaultAccess::Read, FaultAccess::Write, FaultAccess::Execute]
                        [usize::from(argument) % 3],
                    kind: [
                        FaultKind::Translation,
                        FaultKind::Permission,
                        FaultKind::AccessFlag,
                    ][usize::from(argument >> 4) % 3],
                    va: None,
                };
                let outcome = self.stage2.handle_fault(fault);
                self.saw(call, &outcome);
            }
            16 => {
                let mut young = [0; 8];
                let first = u64::from(bytes.byte()?) * 64;
                let pages = u64::from(argument >> 2) * 16;
                let asked = (self.stage2).test_and_clear_young(name, first, pages, &mut young);
                self.saw(call, &asked);
                assert!(asked.is_err() || asked.unwrap() <= pages.min(512));
            }
            17 => {
                let now = match argument & 4 {
                    0 => self.stage2.adapt_engine().map(|_| Progress::Done),
                    _ => self.finish(argument >> 4, |stage2| stage2.bring_over()),
                };
                self.saw(call, &now);
            }
            _ => {
                let access =
                    [FaultAccess::Write, FaultAccess::Read][usize::from(argument & 7 == 0)];
                let ipa = BASE + bytes.short()? % 3200 * PAGE_SIZE;
                self.access(ipa, access);
            }
        }
        Some(())
    }
}

/// Public operations in any order, on one CPU: what was written is reported, nothing is leaked, nothing
/// panics, whatever is asked.
pub fn operations(bytes: &[u8]) -> Seen {
    let mut bytes = Bytes(bytes);
    let Some(flags) = bytes.byte() else {
        return Seen::new();
    };
    let mut vm = Vm::new(flags);
    while vm.call(&mut bytes).is_some() {}
    let Vm {
        machine,
        stage2,
        seen,
        ..
    } = vm;
    drop(stage2);
    assert_eq!(machine.tables_in_use(), 0, "leaked");
    seen
}

/// Slots of any place and size: accepted exactly where plain arithmetic says so, and translated as told.
pub fn slots(bytes: &[u8]) -> Seen {
    let mut bytes = Bytes(bytes);
    let mut seen = Seen::new();
    let _ = slots_of(&mut bytes, &mut seen);
    seen
}

fn slots_of(bytes: &mut Bytes<'_>, seen: &mut Seen) -> Option<()> {
    let bits = 32 + bytes.byte()? % 17;
    let machine = Machine::new(32, 1);
    let features = Machine::everything();
    let vmid = Vmid::new(1, VmidWidth::Eight).unwrap();
    let stage2 = Stage2::new(&machine, bits, vmid, features).unwrap();
    let mut there: Vec<(u64, u64)> = Vec::new();
    // Bitmaps are made for every slot, so that larger ones would only show how much memory there is.
    const MOST: u64 = 1 << 24;
    for id in 0..8 {
        let (base, pages, count) = (bytes.long()?, bytes.long()?, bytes.byte()? & 3);
        let mut extents = Vec::new();
        let mut total = 0u128;
        for _ in 0..count {
            let extent = Extent {
                pa: Pa::new(bytes.long()?),
                pages: bytes.long()?,
            };
            total += u128::from(extent.pages);
            extents.push(extent);
        }
        let pages = if bytes.byte()? & 1 == 0 {
            u64::try_from(total).unwrap_or(pages)
        } else {
            pages
        };
        let Some(gfn) = Gfn::new(base >> 12) else {
            continue;
        };
        if pages > MOST {
            continue;
        }
        let added = stage2.add_slot(SlotId(id), gfn, pages, Access::ReadWrite, &extents);
        let (first, end) = (
            u128::from(gfn.raw()),
            u128::from(gfn.raw()) + u128::from(pages),
        );
        let fits = pages > 0 && end <= 1 << (bits - 12);
        let sound = |extent: &Extent| {
            let end = u128::from(extent.pa.raw()) + u128::from(extent.pages) * 4096;
            extent.pages > 0 && extent.pa.is_aligned(PAGE_SIZE) && end <= 1 << features.pa_bits
        };
        let apart = there
            .iter()
            .all(|(from, to)| end <= u128::from(*from) || first >= u128::from(*to));
        let good = fits && extents.iter().all(sound) && total == u128::from(pages) && apart;
        assert_eq!(
            added.is_ok(),
            good,
            "{added:?}: {gfn:?} {pages} {extents:?} beside {there:?}"
        );
        seen.insert(
            match added {
                Ok(()) => 1,
                Err(Error::SlotRange { .. }) => 2,
                Err(Error::ExtentRange(_)) => 3,
                Err(Error::ExtentTotal { .. }) => 4,
                Err(Error::SlotOverlap(_)) => 5,
                Err(other) => panic!("{other:?}"),
            } + 8 * u64::from(count),
        );
        if !good {
            continue;
        }
        there.push((first as u64, end as u64));
        let mut page = 0;
        for extent in &extents {
            for into in [0, extent.pages - 1] {
                let ipa = gfn.ipa().raw() + (page + into) * PAGE_SIZE;
                let found = stage2.translate(Ipa::new(ipa + 5)).unwrap();
                assert_eq!(found.pa.raw(), extent.pa.raw() + into * PAGE_SIZE + 5);
                assert!(found.bytes >= (extent.pages - into) * PAGE_SIZE - 5);
                let write = Fault {
                    ipa: Ipa::new(ipa),
                    access: FaultAccess::Write,
                    kind: FaultKind::Translation,
                    va: None,
                };
                let outcome = stage2.handle_fault(write);
                assert!(
                    matches!(outcome, Outcome::Resume | Outcome::OutOfTables),
                    "{outcome:?}"
                );
            }
            page += extent.pages;
        }
        let behind = Ipa::new(gfn.ipa().raw() + pages * PAGE_SIZE);
        let next = there.iter().any(|(from, _)| *from == behind.gfn().raw());
        assert_eq!(stage2.translate(behind).is_some(), next);
    }
    Some(())
}
