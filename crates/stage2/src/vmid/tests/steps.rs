//! Random CPUs advance by small steps, in one thread: between the two halves of the fast path, between
//! a load and its flush, between asking for a number and the TLBI by it. At any time a CPU may cache
//! something for whatever its VTTBR_EL2 says, guest or no guest.

use super::*;
use std::collections::HashMap;
use std::println;

struct Vm {
    vmid: VmVmid,
    /// Of its tables, as in memory.
    version: u64,
    /// No CPU may use an older version any more.
    complete: u64,
}

/// What a CPU runs, or has in VTTBR_EL2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct On {
    number: u16,
    vm: usize,
}

#[derive(Clone, Copy)]
enum Doing {
    Off,
    /// At EL2, with no vCPU loaded.
    Nothing,
    /// In a guest.
    Guest(On),
    /// In the middle of the fast path.
    Looked {
        vm: usize,
        seen: Seen,
    },
    /// Has its number, which is not in VTTBR_EL2 yet.
    Loaded(On, Flush),
    /// And now is.
    Written(On, Flush),
    /// At EL2, has changed descriptors of a VM.
    Changed {
        vm: usize,
        back: Option<On>,
    },
    /// At EL2, has a VM's VTTBR_EL2 selected and is about to invalidate.
    Selected {
        on: On,
        version: u64,
        /// Rollovers so far.
        asked: u64,
        back: Option<On>,
        before: Option<On>,
    },
}

struct Cpu {
    tlb: HashMap<u16, Entry>,
    vttbr: Option<On>,
    doing: Doing,
    /// Turns that it lets pass: the others are faster.
    slow: usize,
}

#[derive(Default, Debug)]
struct Seldom {
    flushes: u64,
    /// The fast path was overtaken between its halves.
    overtaken: u64,
    /// A VM kept its number over a rollover and was loaded elsewhere.
    renewed: u64,
    /// A TLBI was left out.
    left_out: u64,
    /// There was a rollover between asking for a number and the TLBI by it.
    late: u64,
    hits: u64,
}

struct World {
    vmids: Vmids,
    vms: Vec<Vm>,
    cpus: Vec<Cpu>,
    random: Random,
    seldom: Seldom,
}

impl World {
    fn new(vmids: Vmids, vms: usize, seed: u64) -> Self {
        let cpus = vmids.slots.len();
        let mut world = Self {
            vmids,
            vms: (0..vms)
                .map(|_| Vm {
                    vmid: VmVmid::new(),
                    version: 0,
                    complete: 0,
                })
                .collect(),
            cpus: (0..cpus)
                .map(|_| Cpu {
                    tlb: HashMap::new(),
                    vttbr: None,
                    doing: Doing::Nothing,
                    slow: 0,
                })
                .collect(),
            random: Random(seed),
            seldom: Seldom::default(),
        };
        (0..cpus).for_each(|cpu| world.fill_with_garbage(cpu));
        world
    }

    fn fill_with_garbage(&mut self, cpu: usize) {
        let last = self.vmids.last as u16;
        self.cpus[cpu]
            .tlb
            .extend((1..=last).map(|number| (number, GARBAGE)));
    }

    /// What the hardware caches for what VTTBR_EL2 says.
    fn walk(&mut self, cpu: usize, on: On) -> Entry {
        let version = self.vms[on.vm].version;
        *self.cpus[cpu]
            .tlb
            .entry(on.number)
            .or_insert(Entry { vm: on.vm, version })
    }

    fn access(&mut self, cpu: usize, on: On) {
        let entry = self.walk(cpu, on);
        assert_eq!(entry.vm, on.vm, "CPU {cpu}, {on:?}: found {entry:?}");
        let complete = self.vms[on.vm].complete;
        assert!(
            entry.version >= complete,
            "CPU {cpu}, {on:?}: found {entry:?} after version {complete} was complete"
        );
        self.seldom.hits += 1;
    }

    fn any_vm(&mut self) -> usize {
        // A quarter of the time one of few, so that VMs run on several CPUs and come back soon.
        let all = self.vms.len();
        let few = if self.random.one_in(4) { 4 } else { all };
        self.random.below(few)
    }

    fn begin_load(&mut self, cpu: usize) -> Doing {
        let vm = self.any_vm();
        let seen = Vmids::look(&self.vmids.slots[cpu], &self.vms[vm].vmid);
        Doing::Looked { vm, seen }
    }

    fn begin_change(&mut self, back: Option<On>) -> Doing {
        let vm = match back {
            Some(on) if self.random.one_in(2) => on.vm,
            _ => self.any_vm(),
        };
        self.vms[vm].version += 1;
        Doing::Changed { vm, back }
    }

    fn finish_load(&mut self, cpu: usize, vm: usize, seen: Seen) -> Doing {
        let (vmids, vmid) = (&self.vmids, &self.vms[vm].vmid);
        let slot = &vmids.slots[cpu];
        let before = vmid.0.load(Relaxed);
        let loaded = if vmids.take(slot, seen) {
            vmids.loaded(seen.id, Flush::None)
        } else {
            if slot.0.load(Relaxed) != seen.slot {
                self.seldom.overtaken += 1;
            }
            vmids.load_slowly(slot, vmid)
        };
        let loaded = loaded.expect("VMID 0 was given");
        let after = vmid.0.load(Relaxed);
        if before != 0 && before != after && vmids.number(before) == vmids.number(after) {
            self.seldom.renewed += 1;
        }
        if loaded.flush == Flush::Local {
            self.seldom.flushes += 1;
        }
        let number = loaded.vmid.raw();
        Doing::Loaded(On { number, vm }, loaded.flush)
    }

    fn after(back: Option<On>) -> Doing {
        back.map_or(Doing::Nothing, Doing::Guest)
    }

    fn step(&mut self, cpu: usize) {
        if self.random.one_in(4)
            && let Some(on) = self.cpus[cpu].vttbr
        {
            self.walk(cpu, on);
        }
        if self.cpus[cpu].slow > 0 {
            self.cpus[cpu].slow -= 1;
            return;
        }
        if self.random.one_in(50) {
            self.cpus[cpu].slow = self.random.below(100);
        }
        let doing = match self.cpus[cpu].doing {
            Doing::Off => match self.random.below(4) {
                0 => self.begin_load(cpu),
                _ => Doing::Off,
            },
            Doing::Nothing => match self.random.below(16) {
                0 => {
                    self.vmids.turn_off(cpu);
                    self.cpus[cpu].vttbr = None;
                    self.fill_with_garbage(cpu);
                    Doing::Off
                }
                1..4 => self.begin_change(None),
                4..12 => self.begin_load(cpu),
                _ => Doing::Nothing,
            },
            Doing::Guest(on) => match self.random.below(32) {
                0 => {
                    self.vmids.unload(cpu);
                    Doing::Nothing
                }
                1..4 => self.begin_change(Some(on)),
                // CPU 0 stays long with what it runs, over several rollovers.
                4..16 if cpu != 0 || self.random.one_in(40) => self.begin_load(cpu),
                _ => {
                    self.access(cpu, on);
                    Doing::Guest(on)
                }
            },
            Doing::Looked { vm, seen } => self.finish_load(cpu, vm, seen),
            Doing::Loaded(on, flush) => {
                self.cpus[cpu].vttbr = Some(on);
                Doing::Written(on, flush)
            }
            Doing::Written(on, flush) => {
                if flush == Flush::Local {
                    self.cpus[cpu].tlb.clear();
                }
                self.access(cpu, on);
                self.check_with(cpu, on);
                Doing::Guest(on)
            }
            Doing::Changed { vm, back } => {
                let version = self.vms[vm].version;
                match self.vmids.current(&self.vms[vm].vmid) {
                    Some(vmid) => {
                        let number = vmid.raw();
                        let on = On { number, vm };
                        let before = self.cpus[cpu].vttbr.replace(on);
                        Doing::Selected {
                            on,
                            version,
                            asked: self.vmids.rollovers(),
                            back,
                            before,
                        }
                    }
                    None => {
                        self.seldom.left_out += 1;
                        self.complete(vm, version);
                        Self::after(back)
                    }
                }
            }
            Doing::Selected {
                on,
                version,
                asked,
                back,
                before,
            } => {
                if self.vmids.rollovers() != asked {
                    self.seldom.late += 1;
                }
                for other in &mut self.cpus {
                    other.tlb.remove(&on.number);
                }
                self.complete(on.vm, version);
                self.cpus[cpu].vttbr = before;
                Self::after(back)
            }
        };
        self.cpus[cpu].doing = doing;
    }

    fn complete(&mut self, vm: usize, version: u64) {
        let complete = &mut self.vms[vm].complete;
        *complete = version.max(*complete);
    }

    /// No two VMs run on one number, and a VM runs on one number wherever it runs.
    fn check_with(&self, cpu: usize, on: On) {
        for (other, state) in self.cpus.iter().enumerate() {
            if let Doing::Guest(there) = state.doing
                && other != cpu
            {
                assert_eq!(
                    there.vm == on.vm,
                    there.number == on.number,
                    "{there:?}, {on:?}"
                );
            }
        }
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            let cpu = self.random.below(self.cpus.len());
            self.step(cpu);
        }
    }
}

fn simulate(make: impl Fn() -> Vmids, vms: usize, steps: usize, rounds: u64) -> (u64, Seldom) {
    let (mut rollovers, mut sum) = (0, Seldom::default());
    for seed in seeds(rounds) {
        println!("VMID_SEED={seed}");
        let mut world = World::new(make(), vms, seed);
        world.seldom = sum;
        world.run(steps);
        rollovers += world.vmids.rollovers();
        sum = world.seldom;
    }
    println!("{rollovers} rollovers, {sum:?}");
    (rollovers, sum)
}

/// With few numbers everything that is seldom happens all the time.
#[test]
fn inv17_nobody_finds_anothers_translations_with_few_numbers() {
    for (last, cpus, vms) in [(3, 1, 6), (5, 2, 9), (9, 4, 20), (17, 8, 40), (30, 4, 60)] {
        let (rollovers, seldom) = simulate(|| Vmids::small(last, cpus), vms, 80_000, 6);
        assert!(rollovers > 500);
        assert!(seldom.flushes > rollovers / 2 && seldom.hits > 50_000);
        assert!(cpus == 1 || (seldom.overtaken > 20 && seldom.renewed > 20 && seldom.late > 20));
        assert!(seldom.left_out > 100);
    }
}

#[test]
fn inv17_nobody_finds_anothers_translations_of_300_vms() {
    for cpus in [4, 8] {
        let make = || Vmids::new(VmidWidth::Eight, cpus).unwrap();
        let (rollovers, seldom) = simulate(make, 340, 400_000, 3);
        assert!(rollovers > 100);
        assert!(seldom.renewed > 10 && seldom.left_out > 1000, "{seldom:?}");
    }
}

#[test]
fn inv17_nobody_finds_anothers_translations_with_16_bits() {
    let make = || {
        let vmids = Vmids::new(VmidWidth::Sixteen, 4).unwrap();
        vmids.skip_to_the_last(1000);
        vmids
    };
    let (rollovers, seldom) = simulate(make, 3000, 100_000, 3);
    assert!(rollovers >= 4, "one a seed");
    assert!(seldom.flushes > 2 * rollovers);
}
