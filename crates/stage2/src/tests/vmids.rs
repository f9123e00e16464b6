//! More VMs than VMIDs, on CPUs that run them in turn: each finds its own memory, and no write is lost.
//!
//! `vmid::tests` has the numbers alone, against a model of TLBs; here they tag the translations of whole
//! VMs, whose harvests leave invalidations out where a VM has none.

use super::world::{GIB, P2M, RAM, engines, finish};
use crate::fake::{Guest, Machine};
use crate::hardware::Hardware;
use crate::stage2::Stage2;
use crate::sync::atomic::Ordering;
use crate::types::*;
use crate::vmid::{Flush, Vmids};
use crate::{FaultAccess, Features, Outcome};
use std::boxed::Box;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
const VMS: u64 = 12;
const CPUS: usize = 2;
/// The largest number: two of the VMs may keep theirs, three others have one.
const LAST: u64 = 5;

struct Vm {
    stage2: Stage2<Arc<Machine>>,
    memory: u64,
    written: BTreeSet<u64>,
    epoch: Epoch,
}

struct Machines {
    machine: Arc<Machine>,
    vms: Vec<Vm>,
    /// Which VM each CPU runs, and by which VTTBR_EL2.
    runs: [(usize, u64); CPUS],
    flushes: usize,
}

impl Machines {
    fn new(features: Features) -> Self {
        let machine = Arc::new(Machine::new(8 * VMS as usize, CPUS));
        machine.assume(&features);
        let vmids = Vmids::with_numbers(features.vmid, LAST, CPUS).unwrap();
        let vmids: &'static Vmids = Box::leak(Box::new(vmids));
        let vms = (0..VMS).map(|number| {
            let hw = Arc::clone(&machine);
            let stage2 = Stage2::with_vmids(hw, 39, vmids, features).unwrap();
            let memory = RAM + number * GIB;
            let extent = Extent {
                pa: Pa::new(memory),
                pages: P2M,
            };
            let base = Ipa::new(IPA).gfn();
            stage2
                .add_slot(SlotId(0), base, P2M, Access::ReadWrite, &[extent])
                .unwrap();
            Vm {
                stage2,
                memory,
                written: BTreeSet::new(),
                epoch: Epoch(0),
            }
        });
        let mut machines = Self {
            vms: vms.collect(),
            machine,
            runs: [(0, 0); CPUS],
            flushes: 0,
        };
        for cpu in 0..CPUS {
            machines.run(cpu, 0);
        }
        machines
    }

    fn run(&mut self, cpu: usize, vm: usize) {
        self.machine.become_pe(cpu);
        let (vttbr, flush) = self.vms[vm].stage2.load(cpu).unwrap();
        self.machine.select(vttbr);
        if flush == Flush::Local {
            self.machine.forget_all();
            self.flushes += 1;
        }
        self.runs[cpu] = (vm, vttbr);
    }

    fn write(&mut self, cpu: usize, page: u64) {
        self.machine.become_pe(cpu);
        let (vm, vttbr) = self.runs[cpu];
        let vm = &mut self.vms[vm];
        let vtcr = vm.stage2.vtcr();
        let ipa = IPA + page * PAGE_SIZE;
        for _ in 0..8 {
            let guest = Guest { vtcr, vttbr };
            match self
                .machine
                .access(cpu, guest, ipa, FaultAccess::Write, |pa| pa)
            {
                Ok(pa) => {
                    assert_eq!(
                        pa.raw(),
                        vm.memory + page * PAGE_SIZE,
                        "another VM's memory"
                    );
                    vm.written.insert(page);
                    return;
                }
                Err(abort) => {
                    let outcome = vm.stage2.handle_fault(abort);
                    assert!(matches!(outcome, Outcome::Resume | Outcome::Dirtied(_)));
                }
            }
        }
        panic!("it faults for ever");
    }

    fn harvest(&mut self, cpu: usize, vm: usize) {
        self.machine.become_pe(cpu);
        let vm = &mut self.vms[vm];
        vm.epoch.0 += 1;
        finish(|| vm.stage2.take(vm.epoch)).unwrap();
        let words = vm.stage2.in_flight(SlotId(0), vm.epoch).unwrap();
        let told = |page: &u64| {
            let word = words[*page as usize / 64].load(Ordering::Relaxed);
            word >> (page % 64) & 1 == 1
        };
        let told: BTreeSet<u64> = (0..P2M).filter(told).collect();
        assert_eq!(
            told,
            core::mem::take(&mut vm.written),
            "epoch {:?}",
            vm.epoch
        );
        vm.stage2.commit(vm.epoch).unwrap();
    }
}

#[test]
fn more_vms_than_vmids_find_their_own_memory_and_lose_no_write() {
    for (engine, features) in engines() {
        let mut machines = Machines::new(features);
        for vm in &machines.vms {
            finish(|| vm.stage2.start_log(engine, Granularity::Page)).unwrap();
        }
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..4000 {
            let cpu = below(CPUS as u64) as usize;
            match below(8) {
                0..3 => machines.run(cpu, below(VMS) as usize),
                // Of any VM, wherever it runs: often of one that has no number.
                3 => machines.harvest(cpu, below(VMS) as usize),
                _ => machines.write(cpu, below(6)),
            }
        }
        assert!(machines.flushes > 100, "{} flushes", machines.flushes);
    }
}

#[test]
fn a_vm_that_has_no_number_is_not_invalidated_and_one_that_kept_its_own_is() {
    let mut machines = Machines::new(Features::BASELINE);
    let tlbis = |machines: &Machines| machines.vms[0].stage2.counters().tlbis;
    let harvest = |machines: &mut Machines| {
        let before = tlbis(machines);
        machines.harvest(1, 0);
        tlbis(machines) - before
    };
    let log = |vm: &Vm| finish(|| vm.stage2.start_log(Engine::WriteProtect, Granularity::Page));
    log(&machines.vms[0]).unwrap();
    machines.write(0, 1);
    // Rollovers on the other CPU: this one goes on running.
    for vm in 1..VMS as usize {
        machines.run(1, vm);
    }
    assert!(harvest(&mut machines) > 0, "it still runs on CPU 0");
    machines.write(0, 1);
    for vm in 1..VMS as usize {
        machines.run(0, vm);
    }
    assert_eq!(harvest(&mut machines), 0, "no CPU can use what it cached");
    machines.run(0, 0);
    machines.write(0, 1);
    machines.harvest(0, 0);
}
