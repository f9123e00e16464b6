//! What an EL1 payload stands on: entry, MMU, console, PSCI, exceptions, interrupts, other vCPUs.
//!
//! The machine is QEMU's `virt` as seen at EL1, so a payload runs the same under Tidemark and under no hypervisor.
//! A payload names its main function with [`el1_main!`](crate::el1_main); that function is called on vCPU 0 with the MMU and
//! the caches on, interrupts masked, and what the devicetree says in [`Boot`]. The other vCPUs start with [`smp::start`].
//!
//! Invariants: what a payload writes for itself (data, tables, stacks) is [`Boot::own`] and nothing else; anything
//! that goes wrong is printed and ends in PSCI SYSTEM_OFF, never in a silent loop.

pub mod console;
pub mod counter;
pub mod exceptions;
pub mod gic;
pub mod mmu;
pub mod psci;
pub mod smp;

use core::panic::PanicInfo;

use crate::fdt::{self, FdtError, Machine};
use crate::pattern::PageRun;

pub use console::say;

/// What a payload is told at its start.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// RAM and CPUs, by the devicetree.
    pub machine: Machine,
    /// RAM in pages, mapped with the caches on.
    pub ram: PageRun,
    /// The payload itself: code, data, tables and stacks.
    pub image: PageRun,
    /// The part of [`Boot::image`] that the payload writes.
    pub own: PageRun,
    /// The devicetree.
    pub devicetree: PageRun,
}

/// Begins a payload: its entry point, its main function (`fn(Boot) -> !`) and its panic handler.
#[macro_export]
macro_rules! el1_main {
    ($main:path) => {
        ::core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/rt/entry.s")),
            primary = sym primary,
            secondary = sym $crate::rt::smp::secondary,
            vectors = sym $crate::rt::exceptions::vectors,
            tables = sym $crate::rt::mmu::TABLES,
        );

        extern "C" fn primary(devicetree: usize) -> ! {
            $crate::rt::start(devicetree, $main)
        }

        #[panic_handler]
        fn panic(info: &::core::panic::PanicInfo<'_>) -> ! {
            $crate::rt::panic(info)
        }
    };
}

/// The first Rust code, on vCPU 0, with the entry's provisional map.
pub fn start(devicetree: usize, main: fn(Boot) -> !) -> ! {
    console::init();
    let boot = match read_boot(devicetree) {
        Ok(boot) => boot,
        Err(error) => {
            say!("fail {error}");
            psci::system_off()
        }
    };
    mmu::map(&boot.machine.ram);
    main(boot)
}

fn read_boot(devicetree: usize) -> Result<Boot, FdtError> {
    let base = devicetree as u64;
    // The entry's map has the first GiB of RAM and no more.
    if !(0x4000_0000..0x8000_0000).contains(&base) || !base.is_multiple_of(8) {
        return Err(FdtError::Magic);
    }
    let header = core::ptr::with_exposed_provenance::<[u8; fdt::HEADER_BYTES]>(devicetree);
    // SAFETY: the boot protocol puts the devicetree there, in RAM that is mapped, and nothing writes it.
    let size = fdt::total_size(unsafe { &*header })?.min(0x8000_0000 - devicetree);
    let blob = core::ptr::with_exposed_provenance::<u8>(devicetree);
    // SAFETY: as above; a size that runs past RAM reads as whatever the machine gives, and faults are reported.
    let blob = unsafe { core::slice::from_raw_parts(blob, size) };
    let machine = fdt::read(blob)?;
    let ram = machine.ram;
    let [image, own, end] = mmu::image();
    let whole = |size| size - size % mmu::BLOCK_BYTES;
    Ok(Boot {
        machine,
        ram: PageRun::covering(ram.base, whole(ram.size)),
        image: PageRun::covering(image, end - image),
        own: PageRun::covering(own, end - own),
        devicetree: PageRun::covering(base, size as u64),
    })
}

/// Says what happened and turns the machine off.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => say!("panic {} at {}:{}", info.message(), at.file(), at.line()),
        None => say!("panic {}", info.message()),
    }
    psci::system_off()
}
