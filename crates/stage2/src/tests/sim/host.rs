//! What the host and EL2's manager do in a simulated run, each told to the [`Ghost`](super::ghost::Ghost) too: slots,
//! the log and its epochs, and the ends of runs, where counts and copies are compared.

use super::*;

impl Sim {
    pub fn add(&self, place: Place) {
        let Place {
            id,
            ipa,
            pages,
            access,
            pa,
        } = place;
        let known = Known {
            place,
            presence: Presence::Changing,
            version: 0,
        };
        let before = lock(&self.slots).get(&id).map_or(0, |slot| slot.version);
        let known = Known {
            version: before + 1,
            ..known
        };
        lock(&self.slots).insert(id, known);
        let extent = Extent {
            pa: Pa::new(pa),
            pages,
        };
        self.op("add_slot", |stage2| {
            stage2.add_slot(SlotId(id), Ipa::new(ipa).gfn(), pages, access, &[extent])
        })
        .unwrap();
        let dirty = self.world.dirty(id);
        lock(&self.ghost).add_slot(id, ipa, dirty, pages);
        self.set_presence(id, Presence::There);
    }

    /// Calls a bounded operation of the engine until it is done.
    pub fn finish(
        &self,
        name: &'static str,
        mut step: impl FnMut(&Stage2<Arc<Machine>>) -> Result<Progress, Error>,
    ) -> Result<(), Error> {
        loop {
            match self.op(name, &mut step)? {
                Progress::Done => return Ok(()),
                Progress::More { .. } => self.pause(),
            }
        }
    }

    pub fn delete(&self, id: u16) {
        self.set_presence(id, Presence::Changing);
        lock(&self.ghost).remove_slot(id);
        self.finish("delete_slot", |stage2| stage2.delete_slot(SlotId(id)))
            .unwrap();
        self.set_presence(id, Presence::Gone);
    }

    /// Calls will change the slot past this, and delete it: an access may end either way, and what is known
    /// of its pages is no concern any more.
    pub fn abandon(&self, id: u16) {
        self.set_presence(id, Presence::Changing);
        lock(&self.ghost).remove_slot(id);
    }

    pub fn set_access(&self, id: u16, access: Access) {
        self.set_presence(id, Presence::Changing);
        self.finish("set_access", |stage2| stage2.set_access(SlotId(id), access))
            .unwrap();
        if let Some(slot) = lock(&self.slots).get_mut(&id) {
            slot.place.access = access;
        }
        self.set_presence(id, Presence::There);
    }

    pub fn map_ahead(&self, id: u16) -> Result<(), Error> {
        let mut from = 0;
        loop {
            let progress = self.op("map_ahead", |stage2| stage2.map_ahead(SlotId(id), from))?;
            match progress {
                Progress::Done => return Ok(()),
                Progress::More { done, .. } => from = done,
            }
            self.pause();
        }
    }

    pub fn start(&self, engine: Engine, granularity: Granularity) {
        self.finish("start_log", |stage2| stage2.start_log(engine, granularity))
            .unwrap();
        self.started();
    }

    /// The log has said that it is on.
    pub fn started(&self) {
        self.note(|| "copies everything".into());
        lock(&self.ghost).start();
    }

    pub fn start_all_dirty(&self, engine: Engine, granularity: Granularity) {
        self.finish("start_log_all_dirty", |stage2| {
            stage2.start_log_all_dirty(engine, granularity)
        })
        .unwrap();
        self.note(|| "has nothing".into());
        lock(&self.ghost).start_all_dirty();
    }

    /// The pages of a slot that were accessed since they were asked for last.
    pub fn young(&self, slot: u16) -> BTreeSet<u64> {
        let Some(place) = lock(&self.slots).get(&slot).map(|known| known.place) else {
            return BTreeSet::new();
        };
        let (mut young, mut first) = (BTreeSet::new(), 0);
        while first < place.pages {
            let mut words = [0; 7];
            let left = place.pages - first;
            let Ok(asked) = self.op("test_and_clear_young", |stage2| {
                stage2.test_and_clear_young(SlotId(slot), first, left, &mut words)
            }) else {
                break;
            };
            assert!(asked > 0 && asked <= left);
            for (index, word) in words.into_iter().enumerate() {
                for bit in crate::dirty::Bits(word) {
                    let page = first + index as u64 * 64 + u64::from(bit);
                    assert!(page < first + asked);
                    young.insert(place.ipa + page * PAGE_SIZE);
                }
            }
            first += asked;
        }
        young
    }

    /// A step of a take of `part`, or of everything.
    pub fn take_step(&self, epoch: Epoch, part: Option<Part>) -> Result<Progress, Error> {
        {
            let (machine, guest) = (&self.world.machine, self.world.guest);
            lock(&self.ghost).take_asked(machine, guest, epoch, part);
        }
        let step = match part {
            None => self.op("take", |stage2| stage2.take(epoch)),
            Some(Part { slot, first, pages }) => self.op("take_range", |stage2| {
                stage2.take_range(epoch, slot, first, pages)
            }),
        };
        if step == Ok(Progress::Done) {
            let done = lock(&self.ghost).take_done(epoch);
            self.require(done);
        }
        step
    }

    fn take_of(&self, part: Option<Part>) -> Epoch {
        let epoch = self.world.new_epoch();
        while self.take_step(epoch, part).unwrap() != Progress::Done {
            self.pause();
        }
        epoch
    }

    /// Takes an epoch of a range.
    pub fn take_range(&self, slot: u16, first: u64, pages: u64) -> Epoch {
        let slot = SlotId(slot);
        self.take_of(Some(Part { slot, first, pages }))
    }

    pub fn stop(&self) {
        lock(&self.ghost).stop();
        self.finish("stop_log", |stage2| stage2.stop_log()).unwrap();
    }

    /// Takes an epoch; it is with the host then, not copied.
    pub fn take(&self) -> Epoch {
        self.take_of(None)
    }

    /// Copies what the epoch holds, and returns it.
    pub fn copy(&self, epoch: Epoch) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        let taken = self.op("taken", |stage2| stage2.taken(epoch)).unwrap();
        for slot in taken {
            let words = self.op("in_flight", |stage2| stage2.in_flight(slot.slot, epoch));
            // A slot may have been deleted since.
            let Ok(words) = words else { continue };
            for page in pages_of(&words) {
                assert!(page < slot.pages, "past the end of slot {}", slot.slot);
                let ipa = slot.base.ipa().raw() + page * PAGE_SIZE;
                lock(&self.ghost).copy(ipa);
                pages.insert(ipa);
            }
        }
        self.note(|| format!("copied {} pages", pages.len()));
        pages
    }

    pub fn commit(&self, epoch: Epoch) {
        // The host has all it needs when it says so; what it is told may be forgotten in the middle of that.
        lock(&self.ghost).commit();
        self.op("commit", |stage2| stage2.commit(epoch)).unwrap();
        self.check_all();
    }

    /// Aborts an epoch that may not have begun.
    pub fn give_up(&self, epoch: Epoch) {
        self.op("give_up", |stage2| stage2.give_up(epoch));
        lock(&self.ghost).abort();
        let outstanding = self.world.stage2.log_status().outstanding;
        assert_ne!(outstanding, Some(epoch), "it was given up");
        self.check_all();
    }

    pub fn abort(&self, epoch: Epoch) {
        self.op("abort", |stage2| stage2.abort(epoch)).unwrap();
        lock(&self.ghost).abort();
        self.check_all();
    }

    /// Takes, copies and commits.
    pub fn harvest(&self) -> BTreeSet<u64> {
        let epoch = self.take();
        let pages = self.copy(epoch);
        self.commit(epoch);
        pages
    }

    /// The guest stops: its vCPU on each CPU exits, with the barrier that belongs to it.
    pub fn stop_guests(&self) {
        for cpu in 0..self.setup.cpus {
            self.world.machine.synchronize(cpu);
        }
    }

    /// The end of a migration: guests stand still, the last epoch is copied, the copy is the memory.
    pub fn last_round(&self) {
        self.stop_guests();
        self.harvest();
        let missing = self.missing();
        assert!(missing.is_empty(), "lost: {missing:x?}");
        assert!(
            self.harvest().is_empty(),
            "a second harvest after the last is empty"
        );
    }

    /// Counts and tables agree with what is really there.
    pub fn check_counts(&self) {
        let leaves = self.world.leaves();
        let of = |level| leaves.iter().filter(|leaf| leaf.1 == level).count() as u64;
        let mappings = self.world.stage2.mappings();
        assert_eq!(
            (mappings.blocks_1g, mappings.blocks_2m, mappings.pages_4k),
            (of(Level::L1), of(Level::L2), of(Level::L3))
        );
        assert_eq!(mappings.tables as usize, self.world.machine.tables_in_use());
    }

    /// The end of a log: the last round has what is missing, and the counts are right with it and without.
    pub fn last_of_the_log(&self) {
        self.last_round();
        self.check_counts();
        self.stop();
        self.check_counts();
    }

    /// The end of a run with a log.
    pub fn conclude(self: Arc<Self>) {
        self.alone(Sim::last_of_the_log);
        self.end();
    }

    /// Deletes all and ends the VM: nothing is leaked.
    pub fn end(self: Arc<Self>) {
        let machine = Arc::clone(&self.world.machine);
        let ids: Vec<u16> = lock(&self.slots)
            .iter()
            .filter(|(_, slot)| slot.presence == Presence::There)
            .map(|(id, _)| *id)
            .collect();
        let roots = {
            self.alone(|sim| ids.iter().for_each(|id| sim.delete(*id)));
            let mappings = self.world.stage2.mappings();
            assert_eq!(
                (mappings.blocks_1g, mappings.blocks_2m, mappings.pages_4k),
                (0, 0, 0)
            );
            mappings.tables as usize
        };
        assert_eq!(machine.tables_in_use(), roots, "only the roots are left");
        drop(self);
        assert_eq!(machine.tables_in_use(), 0);
    }
}
