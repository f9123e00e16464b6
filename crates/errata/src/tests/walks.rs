//! Every moment between two writes, with all that the CPU may have taken in by then.

use crate::walks::{OutOfContext, Registers, Stage1, arrive, enter, leave};
use std::vec;
use std::vec::Vec;

/// A register: what it holds for good, and what was written since the last ISB, any of which may count already.
#[derive(Clone)]
struct Register(Vec<u64>);

impl Register {
    fn write(&mut self, value: u64) {
        self.0.push(value);
    }

    fn latest(&self) -> u64 {
        self.0[self.0.len() - 1]
    }
}

/// A CPU. The VM is in the upper bits of VTTBR_EL2, and `tables` stands for TTBR0_EL1 and the others.
struct Cpu {
    tcr: Register,
    sctlr: Register,
    vttbr: Register,
    tables: Register,
    /// Mixes of two VMs that a walk may have seen.
    mixed: usize,
}

impl Cpu {
    fn of(vm: u64, stage1: Stage1) -> Self {
        Self {
            tcr: Register(vec![stage1.tcr]),
            sctlr: Register(vec![stage1.sctlr]),
            vttbr: Register(vec![vm]),
            tables: Register(vec![vm]),
            mixed: 0,
        }
    }

    fn load_tables(&mut self, vm: u64) {
        self.tables.write(vm);
        self.look();
    }

    /// May a walk begin now that finds something, and does it find it for the wrong VM?
    fn look(&mut self) {
        let banned = |tcr: u64| tcr >> 7 & 1 == 1 && tcr >> 23 & 1 == 1;
        let on = |sctlr: u64| sctlr & 1 == 1;
        let pairs = |a: &Register, b: &Register| -> Vec<(u64, u64)> {
            a.0.iter()
                .flat_map(|a| b.0.iter().map(move |b| (*a, *b)))
                .collect()
        };
        let walks = pairs(&self.sctlr, &self.tcr)
            .into_iter()
            .any(|(sctlr, tcr)| !on(sctlr) || !banned(tcr));
        let mixed = pairs(&self.vttbr, &self.tables)
            .into_iter()
            .any(|(vttbr, tables)| vttbr != tables);
        self.mixed += usize::from(walks && mixed);
    }
}

impl Registers for Cpu {
    fn tcr(&self) -> u64 {
        self.tcr.latest()
    }
    fn set_tcr(&mut self, value: u64) {
        self.tcr.write(value);
        self.look();
    }
    fn sctlr(&self) -> u64 {
        self.sctlr.latest()
    }
    fn set_sctlr(&mut self, value: u64) {
        self.sctlr.write(value);
        self.look();
    }
    fn set_vttbr(&mut self, value: u64) {
        self.vttbr.write(value);
        self.look();
    }
    fn isb(&mut self) {
        for register in [
            &mut self.tcr,
            &mut self.sctlr,
            &mut self.vttbr,
            &mut self.tables,
        ] {
            *register = Register(vec![register.latest()]);
        }
        self.look();
    }
}

/// Guests with stage 1 off (a boot loader), on, and on with tables that they do not want walked.
fn guests() -> [Stage1; 4] {
    let guest = |tcr, sctlr| Stage1 { tcr, sctlr };
    [
        guest(0, 0x30d0_0800),
        guest(0x19, 0x30d0_0801),
        guest(1 << 7, 0x30d0_0801),
        guest(1 << 7 | 1 << 23, 0x30d0_0800),
    ]
}

/// TLB maintenance for another VM, with a guest's registers loaded.
fn maintenance(cpu: &mut Cpu, walks: OutOfContext) {
    let before = enter(walks, cpu, 2);
    leave(walks, cpu, 1, before);
    cpu.isb();
}

#[test]
fn maintenance_for_another_vm_gives_no_walk_its_number() {
    for guest in guests() {
        let mut cpu = Cpu::of(1, guest);
        maintenance(&mut cpu, OutOfContext::Possible);
        assert_eq!(cpu.mixed, 0, "{guest:x?}");
        assert_eq!((cpu.tcr(), cpu.sctlr()), (guest.tcr, guest.sctlr));
        assert_eq!(cpu.vttbr.latest(), 1);
    }
}

#[test]
fn a_switch_between_vms_lets_no_walk_see_both() {
    for before in guests() {
        for after in guests() {
            let mut cpu = Cpu::of(1, before);
            enter(OutOfContext::Possible, &mut cpu, 2);
            cpu.load_tables(2);
            arrive(OutOfContext::Possible, &mut cpu, after);
            cpu.isb();
            assert_eq!(cpu.mixed, 0, "{before:x?} to {after:x?}");
            assert_eq!((cpu.tcr(), cpu.sctlr()), (after.tcr, after.sctlr));
        }
    }
}

/// The check sees what it is there for: EPD0 and EPD1 alone stop nothing while stage 1 is off.
#[test]
fn the_ban_alone_is_not_enough() {
    for (guest, seen) in guests().into_iter().zip([true, false, false, true]) {
        let mut cpu = Cpu::of(1, guest);
        cpu.set_tcr(guest.tcr | 1 << 7 | 1 << 23);
        cpu.isb();
        cpu.set_vttbr(2);
        cpu.isb();
        cpu.set_vttbr(1);
        cpu.isb();
        cpu.set_tcr(guest.tcr);
        cpu.isb();
        assert_eq!(cpu.mixed > 0, seen, "{guest:x?}");
    }
}

/// Cores that keep to the architecture pay for nothing.
#[test]
fn where_no_walk_is_out_of_context_only_vttbr_is_written() {
    for guest in guests() {
        let mut cpu = Cpu::of(1, guest);
        let before = enter(OutOfContext::Never, &mut cpu, 2);
        assert_eq!((cpu.tcr(), cpu.sctlr()), (guest.tcr, guest.sctlr));
        leave(OutOfContext::Never, &mut cpu, 1, before);
        assert_eq!(cpu.vttbr.latest(), 1);
        enter(OutOfContext::Never, &mut cpu, 2);
        arrive(OutOfContext::Never, &mut cpu, Stage1::default());
        assert_eq!((cpu.tcr(), cpu.sctlr()), (0, 0));
    }
}
