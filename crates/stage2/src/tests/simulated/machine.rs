//! Simulated runs about the machine: access flags, updates that come late, registers, VMIDs, memory types.

use super::*;

/// Aging takes the access flag alone. The next access brings it back, by hardware or by a fault, and
/// the dirty state is what it was.
#[test]
fn invariant_09_aging_never_touches_the_dirty_state() {
    use crate::hardware::Hardware;
    const ACCESSED: u64 = 1 << 10;
    for (engine, features) in engines() {
        for setup in setups(features, 20) {
            let sim = vm(setup);
            let s = &sim;
            s.alone(|s| s.start(engine, Granularity::Page));
            let aging = Box::new(|| {
                for round in 0..6 {
                    for number in HOT {
                        let entry = s.world.entry(page(number));
                        let old = Pte(entry.load(Ordering::SeqCst));
                        // A dirty leaf keeps it: software makes none without (I_DSHLJ).
                        if old.is_clean() {
                            let young = old.0;
                            let _ = entry.compare_exchange(
                                young,
                                young & !ACCESSED,
                                Ordering::SeqCst,
                                Ordering::SeqCst,
                            );
                        }
                    }
                    let machine = &s.world.machine;
                    machine.dsb_ishst();
                    let before = machine.select(s.world.guest.vttbr);
                    machine.tlbi_vmalls12e1is();
                    machine.dsb_ish();
                    machine.restore(before);
                    if round % 2 == 1 {
                        s.harvest();
                    }
                }
            });
            s.run(vec![aging, guest(s, 60), guest(s, 60)]);
            sim.conclude();
        }
    }
}

#[test]
fn invariant_09_a_dirty_leaf_without_the_access_flag_ends_the_run() {
    let sim = vm(Setup::new(dbm(), 1));
    let why = refused(|| {
        sim.alone(|sim| {
            sim.start(Engine::Dbm, Granularity::Page);
            sim.read(page(1));
            let entry = sim.world.entry(page(1));
            let pte = Pte(entry.load(Ordering::SeqCst)).with(Permission::Dirty(Engine::Dbm));
            entry.swap(pte.0 & !(1 << 10), Ordering::SeqCst);
        });
    });
    assert!(why.contains("dirty and not accessed"), "{why}");
}

/// The guest's own tables have flags that its hardware writes: the page that holds the descriptor is
/// dirty then, whoever wrote it.
#[test]
fn invariant_12_flags_of_the_guests_own_tables_dirty_their_pages() {
    let va = 0xffff_8000_0000_0000;
    let table = page(700);
    for (engine, features) in engines() {
        for granularity in GRANULARITIES {
            for setup in setups(features, 10) {
                let sim = vm(setup);
                let s = &sim;
                let stage1 = Stage1::default();
                let mut reported = BTreeSet::new();
                s.alone(|s| {
                    s.start(engine, granularity);
                    // Everything is mapped, and clean.
                    s.read(page(700));
                    s.read(page(20));
                    s.harvest();
                    // Aliases: what is relaxed for one address may be stale under the other.
                    for alias in 0..4 {
                        stage1.map(va + alias * PAGE_SIZE, page(20), table);
                    }
                    s.guest_va(&stage1, va, FaultAccess::Read);
                    s.stop_guests();
                    reported.extend(s.harvest());
                });
                assert!(reported.contains(&table), "AF was set: {engine:?}");
                let manager = Box::new(|| (0..3).for_each(|_| drop(s.harvest())));
                let guest = || {
                    Box::new(|| {
                        for _ in 0..20 {
                            let alias = va + s.roll(4) * PAGE_SIZE;
                            let access = [FaultAccess::Read, FaultAccess::Write];
                            s.guest_va(&stage1, alias, access[s.roll(2) as usize]);
                            s.breathe();
                        }
                    })
                };
                s.run(vec![manager, guest(), guest()]);
                sim.conclude();
            }
        }
    }
}

/// The store may be visible before the hardware's update of the descriptor. So a harvest is the last one
/// only after a barrier on each CPU that ran the guest; without it there are pages that it misses.
#[test]
fn invariant_13_the_last_harvest_comes_after_a_barrier_on_every_cpu() {
    let mut late = 0;
    for seed in 0..200 {
        let sim = vm(Setup::new(dbm(), seed));
        let s = &sim;
        let mut missing = false;
        s.alone(|s| {
            s.start(Engine::Dbm, Granularity::Page);
            for cpu in 0..3 {
                s.world.machine.become_pe(cpu);
                s.write(page(cpu as u64));
                s.write(page(cpu as u64 + 64));
            }
            // CPU 0 harvests, and its own barriers are none of the others'.
            s.world.machine.become_pe(0);
            s.harvest();
            missing = !s.missing().is_empty();
        });
        late += u32::from(missing);
        // With the barrier nothing is missing, and a second harvest is empty.
        sim.conclude();
    }
    assert!(late > 20, "the update was late in {late} runs of 200");
}

#[test]
fn invariant_14_engines_are_switched_under_fire_and_no_register_changes() {
    let all = Machine::everything();
    for features in [dbm(), all] {
        for granularity in GRANULARITIES {
            for setup in setups(features, 20) {
                let sim = vm(setup);
                let s = &sim;
                let vtcr = s.world.stage2.vtcr();
                let manager = Box::new(|| {
                    s.start(Engine::Dbm, granularity);
                    for round in 0..6 {
                        let engine = [Engine::WriteProtect, Engine::Dbm][round % 2];
                        s.op("set_engine", |stage2| stage2.set_engine(engine))
                            .unwrap();
                        s.harvest();
                    }
                });
                s.run(vec![manager, guest(s, 60), guest(s, 60)]);
                assert_eq!(s.world.stage2.vtcr(), vtcr);
                sim.conclude();
            }
        }
    }
}

/// HD may be cached in a TLB: a CPU whose register says otherwise goes on as before for what it has.
#[test]
fn invariant_14_a_register_that_changed_without_an_invalidation_is_not_seen() {
    let world = World::sized(dbm(), 39, 8, 1);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Page);
    world.read(0, IPA);
    let without = Guest {
        vtcr: world.guest.vtcr & !(1 << 22),
        ..world.guest
    };
    let write = |ipa| {
        let access = FaultAccess::Write;
        world
            .machine
            .access(0, without, ipa, access, |_| ())
            .is_ok()
    };
    assert!(write(IPA), "cached with HD");
    assert!(!write(page(1)), "cached without");
}

/// Two VMs on one machine: what EL2 does for one is done with its VTTBR_EL2 loaded, whatever was, and
/// the other's is put back.
#[test]
fn invariant_17_invalidations_are_for_the_vm_they_are_meant_for() {
    use crate::hardware::Hardware;
    for (engine, features) in engines() {
        let world = World::sized(features, 39, 64, 2);
        world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
        let machine = Arc::clone(&world.machine);
        let other_id = Vmid::new(8, VmidWidth::Eight).unwrap();
        let other = Stage2::new(Arc::clone(&machine), 39, other_id, features).unwrap();
        // The CPU that harvests runs the other VM.
        machine.become_pe(0);
        let before = machine.select(other.vttbr());
        world.start(engine, Granularity::Page);
        for _ in 0..3 {
            world.write(1, IPA);
            machine.become_pe(0);
            assert_eq!(world.harvest(), set([IPA]), "{engine:?}");
        }
        assert_eq!(machine.select(before), other.vttbr(), "it was put back");
    }
}

/// The VMID of a VM that ended is another's: nothing that is cached under it leads to the old memory.
#[test]
fn invariant_17_nothing_cached_outlives_a_vm_whose_vmid_is_used_again() {
    for (_, features) in engines() {
        let machine = Arc::new(Machine::new(16, 2));
        for life in 0..3 {
            let memory = RAM + life * GIB;
            let stage2 = Stage2::new(Arc::clone(&machine), 39, vmid(), features).unwrap();
            let extent = Extent {
                pa: Pa::new(memory),
                pages: P2M,
            };
            stage2
                .add_slot(
                    SlotId(0),
                    Ipa::new(IPA).gfn(),
                    P2M,
                    Access::ReadWrite,
                    &[extent],
                )
                .unwrap();
            let guest = Guest {
                vtcr: stage2.vtcr(),
                vttbr: stage2.vttbr(),
            };
            for cpu in 0..2 {
                machine.become_pe(cpu);
                let reached = loop {
                    match machine.access(cpu, guest, IPA, FaultAccess::Write, |pa| pa) {
                        Ok(pa) => break pa,
                        Err(abort) => assert_eq!(stage2.handle_fault(abort), Outcome::Resume),
                    }
                };
                assert_eq!(reached.raw(), memory, "life {life}, CPU {cpu}");
            }
        }
    }
}

/// On tables that are not Inner Shareable Write-Back the hardware's update is a load and a store, and
/// undoes what came between. The registers this crate makes say that they are.
#[test]
fn invariant_20_tables_are_shareable_and_write_back_else_updates_are_lost() {
    const SHAREABLE: u64 = 3 << 12;
    const CACHEABLE: u64 = 0b0101 << 8;
    for bits in 32..=48 {
        for features in [Features::BASELINE, dbm(), Machine::everything()] {
            let features = Features {
                pa_bits: 48,
                ..features
            };
            let vtcr = crate::vtcr(bits, &features).unwrap();
            assert_eq!(vtcr & (SHAREABLE | 0xf << 8), SHAREABLE | CACHEABLE);
        }
    }
    for (vtcr, expected) in [(0, true), (SHAREABLE, false), (CACHEABLE, false)] {
        let world = World::sized(dbm(), 39, 8, 2);
        world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
        world.start(Engine::Dbm, Granularity::Page);
        let guest = Guest {
            vtcr: world.guest.vtcr & !vtcr,
            ..world.guest
        };
        let write = |cpu: usize| {
            world.machine.become_pe(cpu);
            while let Err(abort) = world
                .machine
                .access(cpu, guest, IPA, FaultAccess::Write, |_| ())
            {
                assert_eq!(world.stage2.handle_fault(abort), Outcome::Resume);
            }
        };
        world.read(1, IPA);
        write(1);
        world.machine.become_pe(0);
        let entry = world.entry(IPA);
        let marker = 1 << 57;
        entry.fetch_or(marker, Ordering::SeqCst);
        // The update that CPU 1 has under way arrives now.
        world.machine.synchronize(1);
        let kept = entry.load(Ordering::SeqCst) & marker != 0;
        assert_eq!(kept, expected, "without {vtcr:#x}");
    }
}
