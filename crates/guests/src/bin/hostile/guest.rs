//! The list of cases, and how they are run and reported.
//!
//! Concurrency: vCPU 0 runs the cases and speaks; vCPU 1 does what [`other`] is told.

mod calls;
mod clocks;
mod devices;
mod flash;
mod fw_cfg;
mod identity;
mod instructions;
mod interrupts;
mod levels;
mod map;
mod memory;
mod modes;
mod nesting;
mod other;
mod probe;
mod registers;
mod timers;
mod walks;

use core::fmt;

use tidemark_guests::fdt::Mpidr;
use tidemark_guests::pattern::Random;
use tidemark_guests::report::Ready;
use tidemark_guests::rt::console::{self, Input};
use tidemark_guests::rt::{Boot, psci, say};

use clocks::Meanwhile;
use probe::Taken;

tidemark_guests::el1_main!(main);

/// What a case does.
type Body = fn(&mut Case, &mut World);

/// All of them. Those that leave the interrupt controller in disorder put it in order again; the last one loses vCPU 1.
const CASES: &[(&str, Body)] = &[
    ("unmapped_ipa", memory::unmapped),
    ("beyond_the_ipa_space", memory::beyond),
    ("mmu_off", memory::mmu_off),
    ("execute_nothing", memory::execute),
    ("flash_is_read_only", memory::flash),
    ("ram_by_every_form", memory::ram),
    ("hardware_access_flag", walks::access_flag),
    ("hardware_dirty_state", walks::dirty_state),
    ("walk_tables_nowhere", walks::nowhere),
    ("walk_tables_in_devices", walks::in_devices),
    ("walk_root_nowhere", walks::root_nowhere),
    ("translate_wild", walks::translate),
    ("device_values", devices::values),
    ("instruction_loads", instructions::loads),
    ("instruction_stores", instructions::stores),
    ("instruction_without_mmu", instructions::without_mmu),
    ("instruction_at_el0", instructions::from_el0),
    ("instruction_refused", instructions::refused),
    ("instruction_at_the_end", instructions::at_the_end),
    ("instruction_tables_change", instructions::tables_change),
    ("instruction_code_changes", instructions::code_changes),
    ("device_unaligned", devices::unaligned),
    ("sweep_distributor", devices::distributor),
    ("sweep_redistributor_own", devices::redistributor_own),
    ("sweep_redistributor_other", devices::redistributor_other),
    ("sweep_redistributor_none", devices::redistributor_none),
    ("sweep_uart", devices::uart),
    ("sweep_rtc", devices::rtc),
    ("sweep_virtio", devices::virtio),
    ("sweep_by_two", devices::by_two),
    ("call_random", calls::random),
    ("call_power_states", calls::power_states),
    ("call_affinity_info", calls::affinity_info),
    ("call_entropy", calls::entropy),
    ("call_suspend", calls::suspend),
    ("id_registers_read", identity::read),
    ("id_features_absent", identity::absent),
    ("id_features_work", identity::shown_work),
    ("undefined_el2_el3", registers::higher_levels),
    ("undefined_features", registers::features),
    ("undefined_instructions", registers::instructions),
    (
        "undefined_implementation_defined",
        registers::implementation_defined,
    ),
    ("debug_registers", registers::debug),
    ("sysreg_read_all", registers::read_all),
    ("cache_by_set_and_way", registers::set_way),
    ("cache_by_address", registers::by_address),
    ("tlb_wild", registers::tlb),
    ("sgi_wild", interrupts::sgi_wild),
    ("cpu_interface_wild", interrupts::interface_wild),
    ("ipi_there_and_back", interrupts::ipi),
    ("timer_physical", timers::physical),
    ("timer_virtual", timers::virtual_),
    ("clock_alarm", timers::clock_alarm),
    ("level_virtual_timer", levels::virtual_timer_),
    ("level_physical_timer", levels::physical_timer_),
    ("level_clock", levels::clock),
    ("level_uart", levels::uart),
    ("nesting_deep", nesting::deep),
    ("wfi_storm", timers::wfi_storm),
    ("wfe", timers::wfe),
    ("wfi_with_timeout", timers::wfit),
    ("misaligned", modes::misaligned),
    ("debug_exceptions", modes::debug_exceptions),
    ("illegal_return", modes::illegal_return),
    ("el0", modes::el0),
    ("stack_pointer_of_el0", modes::sp_el0),
    ("cpu_on_wild", calls::cpu_on_wild),
];

/// Those of a guest that was started by firmware and has its devices.
const FIRMWARE_CASES: &[(&str, Body)] = &[
    ("flash_commands_cut_short", flash::cut_short),
    ("flash_programs", flash::programs),
    ("flash_execute", flash::execute),
    ("flash_by_two", flash::by_two),
    ("flash_sweep", flash::sweep),
    ("fw_cfg_ends", fw_cfg::ends),
    ("fw_cfg_nothing", fw_cfg::nothing),
    ("fw_cfg_writes", fw_cfg::writes),
    ("fw_cfg_sweep", fw_cfg::sweep),
];

/// What the cases share.
struct World {
    random: Random,
    boot: Boot,
    /// vCPU 0 and 1.
    cpus: [Mpidr; 2],
}

/// A case under way.
struct Case {
    number: usize,
    name: &'static str,
    checks: u64,
    fails: u64,
    skip: Option<&'static str>,
}

/// Failures of one case that are told; the rest are counted.
const TOLD: u64 = 8;

impl Case {
    /// Counts a check that did not hold, and says so.
    fn fail(&mut self, what: fmt::Arguments<'_>) {
        self.fails += 1;
        if self.fails <= TOLD {
            say!("case {} {} FAIL {what}", self.number, self.name);
        }
    }

    /// Checks that something holds.
    fn check(&mut self, holds: bool, what: fmt::Arguments<'_>) {
        self.checks += 1;
        if !holds {
            self.fail(what);
        }
    }

    /// Checks that there was no exception.
    fn quiet(&mut self, taken: &Taken, what: fmt::Arguments<'_>) {
        self.check(taken.count == 0, format_args!("{what}: {taken}"));
    }

    /// Checks that there was one exception with one of these syndromes.
    fn syndrome(&mut self, taken: &Taken, allowed: &[u64], what: fmt::Arguments<'_>) {
        let one = taken.count == 1 && taken.vector == probe::SYNC_EL1H && taken.resumable();
        let fits = one && allowed.contains(&taken.syndrome());
        self.check(fits, format_args!("{what}: {taken}"));
    }

    /// Checks that there was one exception with one of these syndromes, about `far`.
    fn syndrome_at(&mut self, taken: &Taken, allowed: &[u64], far: u64, what: fmt::Arguments<'_>) {
        self.syndrome(taken, allowed, what);
        if taken.count == 1 {
            self.check(
                taken.far == far,
                format_args!("{what}: FAR is not {far:#x}: {taken}"),
            );
        }
    }

    /// Checks that an instruction was undefined.
    fn undefined(&mut self, taken: &Taken, what: fmt::Arguments<'_>) {
        self.syndrome(taken, &[probe::UNDEFINED], what);
    }

    /// Says that the CPU lacks what this case needs.
    fn skip(&mut self, why: &'static str) {
        self.skip = Some(why);
    }
}

fn main(boot: Boot) -> ! {
    map::install();
    probe::init();
    let mut cpus = [Mpidr(0); 2];
    for (slot, cpu) in cpus.iter_mut().zip(boot.machine.cpus()) {
        *slot = *cpu;
    }
    let vcpus = other::start(&boot);
    say!(
        "{}",
        Ready {
            payload: "hostile",
            ram: boot.ram,
            vcpus,
            el: 1
        }
    );
    let mut world = World {
        random: Random(0),
        boot,
        cpus,
    };
    loop {
        let mut buffer = [0; 64];
        let Input::Line(line) = console::read_line(&mut buffer, console::pause) else {
            continue;
        };
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next().map(str::parse)) {
            (Some("run"), Some(Ok(seed))) if vcpus == 2 => run(&mut world, CASES, seed),
            (Some("firmware"), Some(Ok(seed))) if vcpus == 2 => {
                run(&mut world, FIRMWARE_CASES, seed)
            }
            (Some("program"), Some(Ok(page))) => flash::program_pages(page),
            (Some("program-on"), Some(Ok(seed))) => flash::go_on(seed),
            (Some("erase"), Some(Ok(page))) => flash::erase_page(page),
            (Some("aarch32"), None) => modes::aarch32(),
            (Some("clocks"), None) if vcpus == 2 => clocks::run(Meanwhile::Looks),
            (Some("clocks-waiting"), None) if vcpus == 2 => clocks::run(Meanwhile::Waits),
            _ => say!(
                "error commands are `run SEED`, `firmware SEED`, `clocks`, `clocks-waiting` (with two vCPUs), `program PAGE`, `program-on SEED`, `erase PAGE` and `aarch32`"
            ),
        }
    }
}

fn run(world: &mut World, cases: &[(&'static str, Body)], seed: u64) -> ! {
    say!("seed {seed}");
    let (mut passed, mut failed) = (0_u32, 0_u32);
    for (index, (name, body)) in cases.iter().enumerate() {
        let mut case = Case {
            number: index + 1,
            name,
            checks: 0,
            fails: 0,
            skip: None,
        };
        // Its own sequence, so that a case repeats whatever the others do.
        world.random = Random(seed.wrapping_add((index as u64) << 32));
        body(&mut case, world);
        let number = case.number;
        match (case.fails, case.skip) {
            (0, Some(why)) => {
                say!("case {number} {name} skip {why}");
                passed += 1;
            }
            (0, None) if case.checks > 0 => {
                say!("case {number} {name} ok");
                passed += 1;
            }
            (0, None) => {
                say!("case {number} {name} FAIL it checked nothing");
                failed += 1;
            }
            (fails, _) => {
                say!(
                    "case {number} {name} FAIL {fails} of {} checks",
                    case.checks
                );
                failed += 1;
            }
        }
    }
    say!("hostile: done {passed} {failed}");
    psci::system_off()
}
