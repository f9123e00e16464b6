//! CPUs that are threads.

use super::*;
use std::collections::HashMap;
use std::ops::DerefMut;
use std::sync::{Mutex, PoisonError};
use std::{println, thread};

#[derive(Default)]
struct SharedVm {
    vmid: VmVmid,
    version: AtomicU64,
    complete: AtomicU64,
}

struct Arena {
    vmids: Vmids,
    vms: Vec<SharedVm>,
    tlbs: Vec<Mutex<HashMap<u16, Entry>>>,
}

impl Arena {
    fn tlb(&self, cpu: usize) -> impl DerefMut<Target = HashMap<u16, Entry>> + '_ {
        self.tlbs[cpu]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn access(&self, cpu: usize, vm: usize, number: u16) {
        let mut tlb = self.tlb(cpu);
        // What is complete by now. The walk comes after.
        let complete = self.vms[vm].complete.load(SeqCst);
        let entry = *tlb.entry(number).or_insert_with(|| Entry {
            vm,
            version: self.vms[vm].version.load(SeqCst),
        });
        assert_eq!(entry.vm, vm, "CPU {cpu}, number {number}: found {entry:?}");
        assert!(
            entry.version >= complete,
            "CPU {cpu}, number {number}: found {entry:?} after version {complete} was complete"
        );
    }

    fn invalidate(&self, vm: usize) {
        let version = self.vms[vm].version.fetch_add(1, SeqCst) + 1;
        fence(SeqCst);
        if let Some(vmid) = self.vmids.current(&self.vms[vm].vmid) {
            for cpu in 0..self.tlbs.len() {
                self.tlb(cpu).remove(&vmid.raw());
            }
        }
        self.vms[vm].complete.fetch_max(version, SeqCst);
    }

    fn cpu(&self, cpu: usize, loads: usize, mut random: Random) {
        for _ in 0..loads {
            let few = if random.one_in(4) { 4 } else { self.vms.len() };
            let vm = random.below(few);
            let loaded = self.vmids.load(cpu, &self.vms[vm].vmid).unwrap();
            if loaded.flush == Flush::Local {
                self.tlb(cpu).clear();
            }
            // Some stay over several rollovers.
            let accesses = if random.one_in(300) { 4000 } else { 3 };
            for _ in 0..accesses {
                self.access(cpu, vm, loaded.vmid.raw());
                if random.one_in(16) {
                    let all = self.vms.len();
                    let target = if random.one_in(2) {
                        vm
                    } else {
                        random.below(all)
                    };
                    self.invalidate(target);
                }
            }
            match random.below(64) {
                0 => self.vmids.unload(cpu),
                1 => {
                    self.vmids.turn_off(cpu);
                    self.tlb(cpu)
                        .extend((1..=self.vmids.last as u16).map(|number| (number, GARBAGE)));
                }
                _ => {}
            }
        }
    }
}

fn race(vmids: Vmids, vms: usize, loads: usize) -> u64 {
    let cpus = vmids.slots.len();
    let arena = Arena {
        vmids,
        vms: (0..vms).map(|_| SharedVm::default()).collect(),
        tlbs: (0..cpus).map(|_| Mutex::default()).collect(),
    };
    let arena = &arena;
    let mut random = Random(seeds(0)[0]);
    println!("VMID_SEED={}", random.0);
    thread::scope(|scope| {
        for cpu in 0..cpus {
            let random = Random(random.next());
            scope.spawn(move || arena.cpu(cpu, loads, random));
        }
    });
    println!("{} rollovers", arena.vmids.rollovers());
    arena.vmids.rollovers()
}

#[test]
fn inv17_nobody_finds_anothers_translations_on_threads() {
    for (last, cpus, vms) in [(5, 2, 9), (9, 4, 20), (17, 8, 40)] {
        assert!(race(Vmids::small(last, cpus), vms, 20_000) > 500);
    }
    for cpus in [4, 8] {
        let vmids = Vmids::new(VmidWidth::Eight, cpus).unwrap();
        assert!(race(vmids, 340, 20_000) > 20);
    }
    let vmids = Vmids::new(VmidWidth::Sixteen, 4).unwrap();
    vmids.skip_to_the_last(5000);
    assert!(race(vmids, 10_000, 20_000) >= 1);
}
