//! VMIDs on simulated CPUs, whose TLBs keep what they cached until something drops it.
//!
//! A TLB entry here says under which number whose translations were cached, and how old they are. A guest
//! that finds another VM's entry under its number has read another VM's memory; one that finds an entry
//! older than the VM's last completed invalidation has written a page that was believed clean.
//!
//! [`steps`] has one thread and small steps, [`threads`] real threads; here is one thing at a time.
//! `VMID_SEED` repeats a run.

use super::*;
use std::collections::BTreeSet;
use std::format;
use std::hash::{BuildHasher, RandomState};
use std::string::ToString;

mod steps;
mod threads;

#[derive(Clone, Copy)]
struct Random(u64);

impl Random {
    /// As SplitMix64 has it.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }
}

/// Some seeds that are always the same and one that never is, or only the one that was asked for.
fn seeds(fixed: u64) -> Vec<u64> {
    match std::env::var("VMID_SEED") {
        Ok(seed) => std::vec![seed.parse().unwrap(); fixed as usize + 1],
        Err(_) => {
            let new = RandomState::new().hash_one(0) >> 16;
            (0..fixed).chain([new]).collect()
        }
    }
}

impl Vmids {
    fn small(last: u64, cpus: usize) -> Self {
        Self::with_numbers(VmidWidth::Eight, last, cpus).unwrap()
    }

    fn rollovers(&self) -> u64 {
        self.generation.load(Relaxed) / (self.mask + 1) - 1
    }

    /// Gives all numbers but `left`, to nobody.
    fn skip_to_the_last(&self, left: u64) {
        self.books.lock().next = self.last + 1 - left;
    }
}

/// What a TLB holds under a number: whose, and of which version of its tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    vm: usize,
    version: u64,
}

/// Out of reset a TLB holds anything.
const GARBAGE: Entry = Entry {
    vm: usize::MAX,
    version: 0,
};

fn vms(count: usize) -> Vec<VmVmid> {
    (0..count).map(|_| VmVmid::new()).collect()
}

fn number(vmids: &Vmids, cpu: usize, vm: &VmVmid) -> u16 {
    vmids.load(cpu, vm).unwrap().vmid.raw()
}

/// Loads new VMs on a CPU until the generation changes.
fn until_the_rollover(vmids: &Vmids, cpu: usize) -> BTreeSet<u16> {
    let before = vmids.rollovers();
    let mut given = BTreeSet::new();
    while vmids.rollovers() == before {
        given.insert(number(vmids, cpu, &VmVmid::new()));
    }
    given
}

#[test]
fn a_first_load_flushes_and_the_next_does_not() {
    let vmids = Vmids::new(VmidWidth::Eight, 2).unwrap();
    let [one, two] = [VmVmid::new(), VmVmid::new()];
    let flush = |cpu, vm| vmids.load(cpu, vm).unwrap().flush;
    assert_eq!(flush(0, &one), Flush::Local);
    assert_eq!(flush(0, &two), Flush::None);
    assert_eq!(flush(0, &one), Flush::None);
    assert_eq!(flush(1, &one), Flush::Local);
    vmids.unload(0);
    assert_eq!(flush(0, &two), Flush::None, "its TLB is as it was");
    vmids.turn_off(0);
    assert_eq!(flush(0, &two), Flush::Local, "nobody knows what is in it");
    assert_eq!(vmids.load(2, &one), None, "there is no CPU 2");
    vmids.unload(2);
    vmids.turn_off(2);
}

#[test]
fn every_number_but_zero_is_given_once_a_generation() {
    for (width, last) in [(VmidWidth::Eight, 255), (VmidWidth::Sixteen, 65_535)] {
        let vmids = Vmids::new(width, 1).unwrap();
        let vms = vms(last);
        let given: Vec<u16> = vms.iter().map(|vm| number(&vmids, 0, vm)).collect();
        assert_eq!(vmids.rollovers(), 0);
        let different: BTreeSet<u16> = given.iter().copied().collect();
        assert_eq!((different.len(), different.contains(&0)), (last, false));
        // And are the VMs' own as long as it lasts.
        assert!(
            vms.iter()
                .zip(&given)
                .all(|(vm, was)| number(&vmids, 0, vm) == *was)
        );
        // The one that runs keeps its own: all but that are given in the next.
        number(&vmids, 0, &VmVmid::new());
        assert_eq!(vmids.rollovers(), 1);
        let mut next = until_the_rollover(&vmids, 0);
        next.insert(1);
        assert_eq!(next.len(), last - 1);
        assert!(!next.contains(&0) && !next.contains(given.last().unwrap()));
    }
}

#[test]
fn the_fast_path_takes_no_lock() {
    let vmids = Vmids::new(VmidWidth::Eight, 2).unwrap();
    let [one, two] = [VmVmid::new(), VmVmid::new()];
    let first = [number(&vmids, 0, &one), number(&vmids, 0, &two)];
    let books = vmids.books.lock();
    for _ in 0..3 {
        assert_eq!(
            [number(&vmids, 0, &one), number(&vmids, 0, &two)],
            first,
            "would hang"
        );
        assert_eq!(vmids.current(&one).unwrap().raw(), first[0]);
        vmids.unload(0);
    }
    drop(books);
}

#[test]
fn a_rollover_keeps_the_numbers_of_who_runs() {
    let vmids = Vmids::small(20, 4);
    let running = vms(3);
    let kept: Vec<u16> = (0..3)
        .map(|cpu| number(&vmids, cpu, &running[cpu]))
        .collect();
    let idle = VmVmid::new();
    number(&vmids, 3, &idle);
    until_the_rollover(&vmids, 3);
    // CPUs 0 to 2 stay where they are. Nobody else is given what they have, however long it goes.
    for round in 0..10 {
        let given = until_the_rollover(&vmids, 3);
        assert!(given.is_disjoint(&kept.iter().copied().collect()));
        assert_eq!(vmids.current(&idle), None);
        // Sooner or later somebody asks, or runs the VM too.
        if round % 2 == 0 {
            assert_eq!(vmids.current(&running[0]).unwrap().raw(), kept[0]);
        }
        if round % 3 == 0 {
            assert_eq!(number(&vmids, 3, &running[1]), kept[1]);
        }
    }
    let now: Vec<u16> = running
        .iter()
        .map(|vm| vmids.current(vm).unwrap().raw())
        .collect();
    assert_eq!(now, kept);
    // Back after ten rollovers, on the same number, but its TLB is not trusted.
    let back = vmids.load(2, &running[2]).unwrap();
    assert_eq!((back.vmid.raw(), back.flush), (kept[2], Flush::Local));
    // Who left is not kept again.
    vmids.unload(0);
    until_the_rollover(&vmids, 3);
    assert_eq!(vmids.current(&running[0]), None);
    assert_eq!(vmids.current(&running[1]).unwrap().raw(), kept[1]);
}

#[test]
fn a_vm_on_several_cpus_has_one_number_over_rollovers() {
    let vmids = Vmids::small(20, 4);
    let vm = VmVmid::new();
    let was: BTreeSet<u16> = (0..3).map(|cpu| number(&vmids, cpu, &vm)).collect();
    for _ in 0..3 {
        until_the_rollover(&vmids, 3);
    }
    // One comes back and leaves; the others are still on it.
    let mut now = BTreeSet::from([number(&vmids, 0, &vm)]);
    number(&vmids, 0, &VmVmid::new());
    until_the_rollover(&vmids, 3);
    now.insert(number(&vmids, 0, &vm));
    now.insert(vmids.current(&vm).unwrap().raw());
    assert_eq!((was.len(), now), (1, was));
}

#[test]
fn a_cpu_that_was_overtaken_in_the_fast_path_looks_again() {
    let vmids = Vmids::small(20, 2);
    let [one, two] = [VmVmid::new(), VmVmid::new()];
    number(&vmids, 0, &two);
    number(&vmids, 0, &one);
    let seen = Vmids::look(&vmids.slots[0], &two);
    until_the_rollover(&vmids, 1);
    assert!(!vmids.take(&vmids.slots[0], seen), "its number is gone");
    let loaded = vmids.load(0, &two).unwrap();
    assert_eq!(loaded.flush, Flush::Local);
}

#[test]
fn what_was_never_loaded_needs_no_invalidation() {
    let vmids = Vmids::new(VmidWidth::Eight, 1).unwrap();
    let vm = VmVmid::new();
    assert_eq!(vmids.current(&vm), None);
    let loaded = vmids.load(0, &vm).unwrap();
    assert_eq!(vmids.current(&vm), Some(loaded.vmid));
    vmids.unload(0);
    assert_eq!(vmids.current(&vm), Some(loaded.vmid), "it is still cached");
}

/// As many CPUs as may be, each with a VM of its own, and no end of further VMs: there is always a
/// number. More CPUs are refused, so there cannot be more VMs running than numbers.
#[test]
fn the_numbers_last_for_all_cpus() {
    for (width, cpus) in [(VmidWidth::Eight, 127), (VmidWidth::Sixteen, 200)] {
        let vmids = Vmids::new(width, cpus).unwrap();
        let mut own: Vec<(VmVmid, u16)> = Vec::new();
        for cpu in 0..cpus {
            let vm = VmVmid::new();
            let number = number(&vmids, cpu, &vm);
            own.push((vm, number));
        }
        for round in 0..3 {
            let given = until_the_rollover(&vmids, round);
            assert!(given.len() >= vmids.last as usize / 2);
            for (vm, was) in own.iter().skip(round + 1) {
                assert_eq!(vmids.current(vm).unwrap().raw(), *was);
            }
        }
    }
    for (width, most) in [(VmidWidth::Eight, 127), (VmidWidth::Sixteen, 32_767)] {
        let asked = most + 1;
        let error = Vmids::new(width, asked).err().unwrap();
        assert_eq!(error, Error::TooManyCpus { asked, most });
        assert!(error.to_string().contains(&format!("{most} CPUs")));
        assert!(Vmids::new(width, most).is_ok());
    }
}

/// 2^63 numbers are given before the counter is at its end: half of the numbers each generation.
#[test]
fn the_counter_lasts() {
    for width in [VmidWidth::Eight, VmidWidth::Sixteen] {
        let last = mask(width);
        let each = u128::from(last - last / 2);
        let generations = (1u128 << 64) / u128::from(last + 1);
        assert_eq!(generations * each, 1 << 63);
    }
    // And nothing changes on the way there.
    let vmids = Vmids::small(20, 2);
    vmids.generation.store(((1 << 55) - 2) << 8, Relaxed);
    let vm = VmVmid::new();
    let kept = number(&vmids, 0, &vm);
    for _ in 0..4 {
        assert!(!until_the_rollover(&vmids, 1).contains(&kept));
        assert_eq!(vmids.current(&vm).unwrap().raw(), kept);
    }
}
