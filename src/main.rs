//! Tidemark: a hypervisor for aarch64 EL2 that knows which pages its guests wrote.
//!
//! This page is the bring-up, in order. The rooms are described in ARCHITECTURE.md.
#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod control;
mod crash;
mod entry;
mod host;
mod mm;
mod platform;
mod sched;
mod smp;
mod task;
mod vm;

use alloc::string::String;
use arch::features::{DirtyState, Features};
use log::{info, warn};
use platform::options::{self, Autostart, DirtyEngine, LeafSize, Options, WhenIdle};
use platform::{Board, BoardError, console};
use tidemark_errata::Verdict;
use tidemark_stage2::{Leaves, Support};
use tidemark_wire::bundle::WhenAllStopped;

/// The boot CPU's way, from boot/head.S: MMU on, the devicetree mapped.
#[unsafe(no_mangle)]
extern "C" fn boot_main() -> ! {
    console::init(platform::early_uart());
    let fdt = platform::devicetree().unwrap_or_else(|error| unusable(&error));
    let map = platform::memory_map(fdt).unwrap_or_else(|error| unusable(&error));
    mm::init(&map);
    let board = Board::read(fdt).unwrap_or_else(|error| unusable(&error));
    smp::adopt_boot_cpu();
    let uart = board
        .init()
        .unwrap_or_else(|error| panic!("mapping the devices: {error:?}"));
    console::init(uart);

    let options = Options::parse(platform::command_line(fdt));
    console::init_log(options.log);
    info!("tidemark {} on {}", env!("CARGO_PKG_VERSION"), board.model);
    for word in &options.unknown {
        match options::values(word) {
            Some(values) => warn!("command line: {word:?} means nothing here; it takes {values}"),
            None => warn!(
                "command line: {word:?} means nothing here; known are {}",
                options::NAMES
            ),
        }
    }
    platform::init_cpu().unwrap_or_else(|error| panic!("the boot CPU: {error}"));
    if let Some(time) = board.time() {
        vm::set_time(time);
    }

    let features = arch::features::set_system(smp::start_others(&board));
    if !features.stage2_4k {
        unusable(&BoardError::NoStage2Granule);
    }
    vm::stage2::init(
        features,
        options.dirty,
        choose_leaves(options.leaves),
        options.last_vmid,
    );
    report(&board, features, options.dirty);
    if let Some(costs) = mm::frames::choose_zeroing() {
        let each = |ticks| arch::timer::in_nanoseconds(ticks) / mm::frames::MEASURED as u64;
        info!(
            "memory is zeroed by {:?}: {} ns a page by stores, {} ns by DC ZVA",
            costs.chosen,
            each(costs.stores),
            each(costs.blocks)
        );
    }
    smp::init_controls(features);
    if let Some(name) = &options.selftest {
        crash::provoke(name);
    }

    vm::random::init(platform::seeds(fdt));
    let bundle = control::bundle::read(&map);
    if let Some(bundle) = bundle {
        control::guests::make(bundle);
    }
    let manifest = bundle.map_or(WhenAllStopped::default(), |bundle| {
        bundle.manifest().machine.when_all_stopped
    });
    control::work::set_default_engine(options.dirty);
    control::lifecycle::when_idle(match (options.when_idle, manifest) {
        (None, WhenAllStopped::PowerOff) => WhenIdle::PowerOff,
        (when, _) => when.unwrap_or_default(),
    });
    platform::gic().enable_shared(board.uart.intid);
    console::use_interrupts();
    host::start(&options.terminal);
    smp::release_others();
    for vm in vm::all() {
        if vm.spec.autostart && options.autostart == Autostart::Manifest {
            control::lifecycle::start(vm);
        }
    }
    entry::run::forever()
}

/// The machine is not one that this image runs on: says why, and stops.
fn unusable(error: &BoardError) -> ! {
    console::print(format_args!(
        "tidemark: {error}. Stopping.\ntidemark: verdict failed\n"
    ));
    console::flush();
    arch::smc::system_off()
}

/// Which leaves guests get, if the command line does not say. Blocks, but on a CPU that drops what it cached of a
/// block when one address in it is invalidated.
fn choose_leaves(told: LeafSize) -> Leaves {
    match told {
        LeafSize::Blocks => {
            info!("memory is mapped in blocks: leaves=blocks");
            return Leaves::Blocks;
        }
        LeafSize::Pages => {
            info!("memory is mapped in pages: leaves=pages");
            return Leaves::Pages;
        }
        LeafSize::Auto => {}
    }
    match mm::reach::measure() {
        Some(reach) if reach.drops_the_block() => {
            info!(
                "memory is mapped in pages: after an invalidation of one, {} others of its block take {} ns, {} before",
                mm::reach::NEIGHBOURS,
                arch::timer::in_nanoseconds(reach.after),
                arch::timer::in_nanoseconds(reach.before)
            );
            Leaves::Pages
        }
        Some(_) | None => Leaves::Blocks,
    }
}

/// One line for each thing that decides how guests' memory is watched.
fn report(board: &Board, features: &Features, dirty: DirtyEngine) {
    info!(
        "{} CPUs, {} MiB of memory free, {} virtio-mmio transports",
        arch::cpu::count(),
        mm::frames::free_pages() >> 8,
        board.virtio.len()
    );
    info!(
        "CPU: {} {}, MIDR {:#010x}",
        features.midr.name().unwrap_or("unknown part"),
        features.midr.revision(),
        features.midr.bits()
    );
    info!(
        "PARange {} bits, VMID {} bits, LSE {}, FWB {}, TTL {}, TLB {}, BBM level {}",
        features.pa_bits,
        features.vmid_bits,
        features.lse,
        features.fwb,
        features.ttl,
        features.tlb,
        features.bbm
    );
    let tlbi = features.errata.broadcast_tlbi;
    if !tlbi.is_sound() {
        info!("broadcast TLB invalidations are done twice: {tlbi}");
    }
    let walks = features.errata.speculative_walks;
    if !walks.is_sound() {
        info!("walks of EL1's tables are off while EL2 changes VMs: {walks}");
    }
    let par = features.errata.par_reads;
    if matches!(par, Verdict::Erratum(_)) {
        warn!("a guest that does not work around it can hang its CPU: {par}");
    }
    let used = vm::stage2::features().0.dbm == Support::Present;
    let usable = match (features.dirty_state(), used) {
        (DirtyState::Absent, _) => "no hardware dirty bit".into(),
        (DirtyState::Broken(erratum), _) => alloc::format!("not used, erratum {erratum}"),
        (DirtyState::Unknown, true) => {
            String::from("the hardware's dirty bit (DBM) is used on an unknown part, as told")
        }
        (DirtyState::Unknown, false) => String::from(
            "not used on an unknown part; dirty=dbm does, for who knows that it can be trusted",
        ),
        (DirtyState::Sound, _) => String::from("the hardware's dirty bit (DBM) can be used"),
    };
    let by = match (dirty, used) {
        (DirtyEngine::Auto, true) => "by DBM",
        (DirtyEngine::Auto, false) => "by write protection",
        (DirtyEngine::WriteProtect, _) => "by write protection, as dirty=wp says",
        (DirtyEngine::Dbm, true) => "by DBM, as dirty=dbm says",
        (DirtyEngine::Dbm, false) => "not at all: dirty=dbm asks for what is not there",
    };
    info!("HAFDBS {}: {usable}; dirty pages {by}", features.hafdbs);
}
