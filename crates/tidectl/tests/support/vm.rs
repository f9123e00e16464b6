//! A guest of the fake target: its memory, who writes there, its console, and the state of its log.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::{
    Counters, Epoch, Extent, Features, Hold, Logging, Mappings, Quota, SlotAccess, SlotId,
    SlotInfo, VmId, VmInfo, VmState, VmSummary,
};

use super::rng::Rng;

const PAGE: usize = PAGE_SIZE as usize;

pub struct Slot {
    pub id: SlotId,
    pub base_ipa: u64,
    pub access: SlotAccess,
    pub memory: Vec<u8>,
    pub live: Vec<u64>,
    pub in_flight: Vec<u64>,
}

impl Slot {
    pub fn new(id: u16, base_ipa: u64, pages: usize, access: SlotAccess) -> Self {
        let words = pages.div_ceil(64);
        let mut memory = vec![0; pages * PAGE];
        // Not all zero, so that a copy that read nothing is seen.
        for (page, chunk) in memory.chunks_mut(PAGE).enumerate().step_by(3) {
            chunk[8] = page as u8 | 1;
        }
        let (live, in_flight) = (vec![0; words], vec![0; words]);
        Self {
            id: SlotId(id),
            base_ipa,
            access,
            memory,
            live,
            in_flight,
        }
    }

    pub fn pages(&self) -> u64 {
        (self.memory.len() / PAGE) as u64
    }
}

pub struct Vm {
    pub name: String,
    pub state: VmState,
    pub reason: String,
    pub slots: Vec<Slot>,
    pub logging: Option<Logging>,
    /// Whose the log is.
    pub log_is: Option<Hold>,
    /// Who holds it paused.
    pub holds: BTreeSet<u8>,
    /// What each vCPU may dirty.
    pub quota: Option<Quota>,
    /// The memory slot that was taken away last.
    pub last_deleted: Option<SlotId>,
    pub outstanding: Option<Epoch>,
    pub last_taken: Epoch,
    pub last_committed: Epoch,
    pub last_aborted: Epoch,
    pub restarts: u32,
    /// Asked to stop, and on its way.
    pub ending: bool,
    pub console: Vec<u8>,
    /// Output before this is no longer kept.
    pub oldest: u64,
    pub attached: bool,
    /// Output already sent as events, or not to be.
    pub sent: usize,
    /// All input ever taken.
    pub typed: Vec<u8>,
    /// Input taken in this session.
    pub input: u64,
    /// Most input taken at once.
    pub takes: usize,
    /// Echo input to the console.
    pub echoes: bool,
    /// What it stops at when it is typed, with a last word that no event carries.
    pub stops_at: Option<&'static [u8]>,
    /// The state that the host was told last.
    pub told: VmState,
    /// Pages written for each request that comes while it runs.
    pub writes: u64,
    /// Every so many writes goes unnoticed: a broken tracker.
    pub misses_every: Option<u64>,
    /// Every so many writes is noticed when the guest is paused, as hardware's dirty bits may be (the slot, the page).
    pub late_every: Option<u64>,
    pub late: Vec<(usize, u64)>,
    pub written: u64,
    pub rng: Rng,
    /// Answers of "not yet" before something long is done.
    pub slowness: u64,
    pub slow: u64,
    /// File that is the machine's memory, and the address of its first byte.
    pub ram: Option<(File, u64)>,
}

impl Vm {
    pub fn new(name: &str, slots: Vec<Slot>) -> Self {
        Self {
            name: name.into(),
            state: VmState::Running,
            reason: String::new(),
            slots,
            logging: None,
            log_is: None,
            holds: BTreeSet::new(),
            quota: None,
            last_deleted: None,
            outstanding: None,
            last_taken: Epoch(0),
            last_committed: Epoch(0),
            last_aborted: Epoch(0),
            restarts: 0,
            ending: false,
            console: Vec::new(),
            oldest: 0,
            attached: false,
            sent: 0,
            typed: Vec::new(),
            input: 0,
            takes: 16,
            echoes: true,
            stops_at: None,
            told: VmState::Running,
            writes: 3,
            misses_every: None,
            late_every: None,
            late: Vec::new(),
            written: 0,
            rng: Rng::new(7),
            slowness: 2,
            slow: 0,
            ram: None,
        }
    }

    pub fn resume(&mut self, hold: Hold) -> Result<(), VmState> {
        self.holds.remove(&(hold as u8));
        match self.state {
            VmState::Paused | VmState::Running if !self.holds.is_empty() => {}
            VmState::Paused | VmState::Running => self.state = VmState::Running,
            state => return Err(state),
        }
        Ok(())
    }

    /// What the session held is given back.
    pub fn session_over(&mut self) {
        if self.holds.contains(&(Hold::Session as u8)) {
            let _ = self.resume(Hold::Session);
        }
        if self.log_is == Some(Hold::Session) {
            self.logging = None;
        }
    }

    /// Physical address of a slot, when the machine's memory is a file.
    pub fn pa(&self, slot: &Slot) -> u64 {
        let before: usize = self
            .slots
            .iter()
            .take_while(|s| s.id != slot.id)
            .map(|s| s.memory.len())
            .sum();
        self.ram.as_ref().map_or(0, |(_, base)| *base) + before as u64
    }

    /// Puts all memory into `file`, which is the machine's memory from then on.
    pub fn back_by(&mut self, path: &Path, base: u64) {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .expect("a temporary file");
        self.ram = Some((file, base));
        for slot in &self.slots {
            let (file, base) = self.ram.as_ref().expect("just set");
            file.write_all_at(&slot.memory, self.pa(slot) - base)
                .expect("a temporary file");
        }
    }

    /// The guest writes a page somewhere.
    pub fn write_somewhere(&mut self) {
        let writable: Vec<usize> = (0..self.slots.len())
            .filter(|&i| self.slots[i].access == SlotAccess::ReadWrite)
            .collect();
        let pick = self.rng.below(writable.len() as u64) as usize;
        let Some(&index) = writable.get(pick) else {
            return;
        };
        let page = self.rng.below(self.slots[index].pages());
        // Edges matter most.
        let page = match self.rng.below(8) {
            0 => 0,
            1 => self.slots[index].pages() - 1,
            _ => page,
        };
        let value = self.rng.next();
        self.write(index, page, value);
    }

    /// Writes a word into a page, or, now and then, wipes the page.
    pub fn write(&mut self, slot: usize, page: u64, value: u64) {
        self.written += 1;
        let missed = self
            .misses_every
            .is_some_and(|every| self.written.is_multiple_of(every));
        let late = self
            .late_every
            .is_some_and(|every| self.written.is_multiple_of(every));
        if late && self.logging.is_some() {
            self.late.push((slot, page));
        }
        let slot = &mut self.slots[slot];
        let start = page as usize * PAGE;
        if value.is_multiple_of(4) {
            slot.memory[start..start + PAGE].fill(0);
        } else {
            let at = start + (value % 512) as usize * 8;
            slot.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if self.logging.is_some() && !missed && !late {
            slot.live[page as usize / 64] |= 1 << (page % 64);
        }
        let id = slot.id;
        if let Some((file, base)) = &self.ram {
            let slot = self.slots.iter().find(|s| s.id == id).expect("it is there");
            let place = self.pa(slot) - base + start as u64;
            let content = &slot.memory[start..start + PAGE];
            file.write_all_at(content, place).expect("a temporary file");
        }
    }

    /// The guest stands still, and all that it wrote has been noticed.
    pub fn pause(&mut self) {
        self.state = VmState::Paused;
        for (slot, page) in std::mem::take(&mut self.late) {
            self.slots[slot].live[page as usize / 64] |= 1 << (page % 64);
        }
    }

    pub fn print(&mut self, text: &[u8]) {
        self.console.extend_from_slice(text);
    }

    pub fn give_back(&mut self) {
        if let Some(epoch) = self.outstanding.take() {
            self.last_aborted = epoch;
            for slot in &mut self.slots {
                for (live, taken) in slot.live.iter_mut().zip(&mut slot.in_flight) {
                    *live |= std::mem::take(taken);
                }
            }
        }
    }

    pub fn dirty(&self) -> u64 {
        let count = |words: &[u64]| words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        self.slots.iter().map(|s| count(&s.live)).sum()
    }

    pub fn summary(&self, id: VmId) -> VmSummary {
        let memory_bytes = self.slots.iter().map(|s| s.memory.len() as u64).sum();
        VmSummary {
            id,
            name: self.name.clone(),
            state: self.state,
            vcpus: 2,
            memory_bytes,
        }
    }

    /// Says "not yet" a few times, so that asking again is tested.
    pub fn not_yet(&mut self) -> bool {
        self.slow += 1;
        if self.slow <= self.slowness {
            return true;
        }
        self.slow = 0;
        false
    }
}

/// All about it.
pub fn info(vm: &Vm, id: VmId) -> VmInfo {
    let slots = vm
        .slots
        .iter()
        .map(|slot| SlotInfo {
            id: slot.id,
            base_ipa: slot.base_ipa,
            pages: slot.pages(),
            access: slot.access,
            // In two pieces, as memory may be.
            extents: match slot.pages() / 2 {
                0 => vec![Extent {
                    ipa: slot.base_ipa,
                    pa: vm.pa(slot),
                    pages: slot.pages(),
                }],
                half => vec![
                    Extent {
                        ipa: slot.base_ipa,
                        pa: vm.pa(slot),
                        pages: half,
                    },
                    Extent {
                        ipa: slot.base_ipa + half * PAGE_SIZE,
                        pa: vm.pa(slot) + half * PAGE_SIZE,
                        pages: slot.pages() - half,
                    },
                ],
            },
            more_extents: 0,
        })
        .collect();
    VmInfo {
        summary: vm.summary(id),
        reason: vm.reason.clone(),
        restarts: vm.restarts,
        slots,
        features: Features {
            hafdbs: 2,
            dbm_usable: true,
            cpus: 2,
            ipa_bits: 40,
            ..Features::default()
        },
        mappings: Mappings {
            blocks_1g: 0,
            blocks_2m: 8,
            pages_4k: 512,
        },
        counters: Counters {
            exits: 1000,
            ..Counters::default()
        },
    }
}
