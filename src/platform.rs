//! The machine, as its devicetree describes it. Nothing here is assumed but the early
//! console's address (`arch::boot`).
//!
//! A devicetree is input: whatever it says, reading it ends in a [`Board`] or in a
//! [`BoardError`] that names what is missing.

pub mod console;
pub mod gicv3;
mod map;
pub mod options;
pub mod pl011;

use crate::arch::boot::EARLY_UART;
use crate::arch::cpu::{AFFINITY, MAX_CPUS};
use crate::arch::mmio::Mmio;
use crate::mm::Range;
use crate::mm::stage1::{self, Access, MapError};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node, Property};
use spin::Once;

/// What EL2 uses of the machine.
#[derive(Debug)]
pub struct Board {
    /// The machine's name for itself.
    pub model: String,
    /// Affinities of the CPUs that PSCI can start, the boot CPU's among them.
    pub cpus: Vec<u64>,
    /// CPUs past [`MAX_CPUS`].
    pub cpus_left_out: usize,
    /// The console.
    pub uart: Device,
    /// GICv3: the distributor.
    pub distributor: Range,
    /// GICv3: redistributor regions.
    pub redistributors: Vec<Range>,
    /// GICv3: the maintenance interrupt.
    pub maintenance: u32,
    /// The virtual timer's interrupt.
    pub virtual_timer: u32,
    /// EL2's physical timer's interrupt.
    pub hypervisor_timer: u32,
    /// A PL031 that knows the time of day.
    pub clock: Option<Range>,
    /// virtio-mmio transports.
    pub virtio: Vec<Device>,
}

/// Registers and an interrupt.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    /// Where its registers are.
    pub registers: Range,
    /// Its interrupt.
    pub intid: u32,
}

/// Why the machine cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoardError {
    /// There is no devicetree, or it cannot be read.
    NoDevicetree,
    /// A node that EL2 cannot do without.
    Missing(&'static str),
    /// CPUs are not started by PSCI.
    NoPsci,
    /// A node of /reserved-memory whose `reg` cannot be read.
    Reservation(&'static str),
    /// More reservations than are looked through.
    Reservations(usize),
    /// More ranges of memory than are looked through.
    Memory(usize),
    /// Stage 2 cannot have pages of 4 KiB.
    NoStage2Granule,
}

impl fmt::Display for BoardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDevicetree => write!(
                f,
                "no readable devicetree in x0: the loader must pass one (QEMU -kernel and U-Boot booti do)"
            ),
            Self::NoStage2Granule => write!(
                f,
                "a CPU's stage 2 has no granule of 4 KiB (ID_AA64MMFR0_EL1.TGran4_2), of which guests' tables are made: this image does not run on it"
            ),
            Self::Missing(what) => write!(f, "the devicetree has no {what}"),
            Self::NoPsci => write!(
                f,
                "the devicetree has no /psci node: firmware with PSCI (TF-A) is needed to start CPUs"
            ),
            Self::Reservation(name) => write!(
                f,
                "/reserved-memory/{name}: its reg does not fit #address-cells and #size-cells, and guests must \
                 not get that memory; correct the devicetree"
            ),
            Self::Reservations(count) => write!(
                f,
                "the devicetree reserves {count} ranges of memory, more than {}; join neighbours in \
                 /reserved-memory",
                map::MOST_RESERVATIONS
            ),
            Self::Memory(count) => write!(
                f,
                "the devicetree has {count} ranges of memory, more than {}; join neighbours",
                map::MOST_MEMORY
            ),
        }
    }
}

/// Opens the devicetree.
pub fn devicetree() -> Result<Fdt<'static>, BoardError> {
    let range = stage1::devicetree_range().ok_or(BoardError::NoDevicetree)?;
    // SAFETY: the range was mapped read-only by the boot tables and nothing writes it: the
    // frame allocator never gets it.
    let bytes =
        unsafe { core::slice::from_raw_parts(range.start as *const u8, range.size() as usize) };
    Fdt::new(bytes).map_err(|_| BoardError::NoDevicetree)
}

impl Board {
    /// Reads the machine's description.
    pub fn read(fdt: Fdt<'static>) -> Result<Self, BoardError> {
        let root = fdt.root();
        fdt.find_node("/psci").ok_or(BoardError::NoPsci)?;
        let gic = find(root, &["arm,gic-v3"]).ok_or(BoardError::Missing(
            "GICv3 (start QEMU with -M virt,gic-version=3)",
        ))?;
        let mut frames = registers(gic);
        let distributor = frames
            .next()
            .ok_or(BoardError::Missing("GICv3 registers"))?;
        let redistributors: Vec<_> = frames
            .take(cell(gic, "#redistributor-regions").unwrap_or(1) as usize)
            .collect();
        let timer = find(root, &["arm,armv8-timer"]).ok_or(BoardError::Missing("timer"))?;
        let (cpus, cpus_left_out) = cpus(fdt);
        Ok(Self {
            model: string(root, "model").unwrap_or("unknown").into(),
            cpus,
            cpus_left_out,
            uart: chosen_uart(fdt).ok_or(BoardError::Missing("PL011 console"))?,
            distributor,
            redistributors,
            // PPIs 9, 11 and 10 where the tree is silent (BSA's assignment).
            maintenance: interrupt(gic, 0).unwrap_or(25),
            virtual_timer: interrupt(timer, 2).unwrap_or(27),
            hypervisor_timer: interrupt(timer, 3).unwrap_or(26),
            clock: find(root, &["arm,pl031"]).and_then(|node| registers(node).next()),
            virtio: virtio(root),
        })
    }
}

/// Children of the root and of its simple buses.
fn nodes(root: FdtNode<'static>) -> impl Iterator<Item = FdtNode<'static>> {
    root.children().flat_map(|node| {
        let bus = compatible(node, &["simple-bus"]);
        core::iter::once(node).chain(node.children().filter(move |_| bus))
    })
}

fn find(root: FdtNode<'static>, compatibles: &[&str]) -> Option<FdtNode<'static>> {
    nodes(root).find(|&node| compatible(node, compatibles) && enabled(node))
}

fn compatible(node: FdtNode<'_>, wanted: &[&str]) -> bool {
    node.property("compatible").is_some_and(|property| {
        property
            .value()
            .split(|&byte| byte == 0)
            .any(|name| wanted.iter().any(|wanted| wanted.as_bytes() == name))
    })
}

fn enabled(node: FdtNode<'_>) -> bool {
    string(node, "status").is_none_or(|status| status == "okay" || status == "ok")
}

fn bytes<'a>(node: FdtNode<'a>, name: &str) -> Option<&'a [u8]> {
    node.property(name)?.value_as::<&'a [u8]>().ok()
}

/// An integer of one cell or two.
fn integer(node: FdtNode<'_>, name: &str) -> Option<u64> {
    let value = bytes(node, name)?;
    match value.len() {
        4 => Some(u64::from(u32::from_be_bytes(value.try_into().ok()?))),
        8 => Some(u64::from_be_bytes(value.try_into().ok()?)),
        _ => None,
    }
}

fn string<'a>(node: FdtNode<'a>, name: &str) -> Option<&'a str> {
    let value = bytes(node, name)?;
    core::str::from_utf8(value.split(|&byte| byte == 0).next()?).ok()
}

fn cell(node: FdtNode<'_>, name: &str) -> Option<u32> {
    let value = bytes(node, name)?;
    Some(u32::from_be_bytes(value.get(..4)?.try_into().ok()?))
}

fn registers(node: FdtNode<'static>) -> impl Iterator<Item = Range> {
    node.reg()
        .ok()
        .flatten()
        .into_iter()
        .flatten()
        .filter_map(|reg| Range::new(reg.address().ok()?, reg.size().ok()?))
}

/// The INTID of interrupt `n` of a node, by the GIC's binding: type, number, flags.
fn interrupt(node: FdtNode<'_>, n: usize) -> Option<u32> {
    let value = bytes(node, "interrupts")?;
    let word = |i: usize| {
        let bytes = value.get(4 * i..4 * i + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    match word(3 * n)? {
        0 => word(3 * n + 1)?.checked_add(32),
        1 => word(3 * n + 1)?.checked_add(16),
        _ => None,
    }
}

fn cpus(fdt: Fdt<'static>) -> (Vec<u64>, usize) {
    let mut found = Vec::new();
    let mut left_out = 0;
    for node in fdt
        .find_node("/cpus")
        .into_iter()
        .flat_map(|n| n.children())
    {
        if string(node, "device_type") != Some("cpu") || !enabled(node) {
            continue;
        }
        let Some(affinity) = integer(node, "reg") else {
            continue;
        };
        if found.len() < MAX_CPUS {
            found.push(affinity & AFFINITY);
        } else {
            left_out += 1;
        }
    }
    (found, left_out)
}

/// The PL011 that /chosen names, or the first one.
fn chosen_uart(fdt: Fdt<'static>) -> Option<Device> {
    let chosen = fdt
        .find_node("/chosen")
        .and_then(|chosen| string(chosen, "stdout-path"))
        .map(|path| path.split(':').next().unwrap_or(path))
        .and_then(|path| match path.strip_prefix('/') {
            Some(_) => fdt.find_node(path),
            None => fdt.find_node(string(fdt.find_node("/aliases")?, path)?),
        })
        .filter(|&node| compatible(node, &["arm,pl011"]));
    let node = chosen.or_else(|| find(fdt.root(), &["arm,pl011"]))?;
    device(node)
}

fn device(node: FdtNode<'static>) -> Option<Device> {
    Some(Device {
        registers: registers(node).next()?,
        intid: interrupt(node, 0)?,
    })
}

fn virtio(root: FdtNode<'static>) -> Vec<Device> {
    nodes(root)
        .filter(|&node| compatible(node, &["virtio,mmio"]) && enabled(node))
        .filter_map(device)
        .collect()
}

/// EL2's command line.
pub fn command_line(fdt: Fdt<'static>) -> &'static str {
    fdt.find_node("/chosen")
        .and_then(|chosen| string(chosen, "bootargs"))
        .unwrap_or("")
}

pub use map::memory_map;

/// What the boot loader left for the seeding of random numbers.
pub fn seeds(fdt: Fdt<'static>) -> impl Iterator<Item = &'static [u8]> {
    let chosen = fdt.find_node("/chosen");
    ["rng-seed", "kaslr-seed"]
        .into_iter()
        .filter_map(move |name| bytes(chosen?, name))
}

/// The console before the devicetree has named one.
pub fn early_uart() -> pl011::Pl011 {
    // SAFETY: the boot tables map this page as device memory. Where no PL011 is there, its
    // accesses have no effect on memory.
    pl011::Pl011::new(unsafe { Mmio::new(EARLY_UART, crate::mm::PAGE) })
}

/// Maps a device's registers for EL2's use.
pub fn map_registers(range: Range) -> Result<Mmio, MapError> {
    stage1::map_identity(range, Access::Device)?;
    // SAFETY: just mapped as device memory, for good; the devicetree names it as a
    // device's, and what it names as memory was mapped before and would have stayed so.
    Ok(unsafe { Mmio::new(range.start as usize, range.size() as usize) })
}

/// The interrupts that are EL2's.
#[derive(Debug, Clone, Copy)]
pub struct Interrupts {
    /// The virtual timer.
    pub virtual_timer: u32,
    /// EL2's physical timer.
    pub hypervisor_timer: u32,
    /// The virtual CPU interface's maintenance interrupt.
    pub maintenance: u32,
    /// The console.
    pub uart: u32,
}

struct Ready {
    gic: gicv3::Gic,
    interrupts: Interrupts,
    redistributors: Vec<Mmio>,
}

static READY: Once<Ready> = Once::new();

fn ready() -> &'static Ready {
    READY
        .get()
        .expect("the interrupt controller is used before it was set up")
}

/// The machine's interrupt controller.
#[inline]
pub fn gic() -> &'static gicv3::Gic {
    &ready().gic
}

/// EL2's interrupts.
#[inline]
pub fn interrupts() -> &'static Interrupts {
    &ready().interrupts
}

impl Board {
    /// Maps the devices and sets the interrupt controller up. Gives the UART that the devicetree names.
    ///
    /// # Errors
    ///
    /// Their registers cannot be mapped.
    pub fn init(&self) -> Result<pl011::Pl011, MapError> {
        let uart = map_registers(self.uart.registers)?;
        let uart = pl011::Pl011::new(uart);
        uart.enable();
        let distributor = map_registers(self.distributor)?;
        let redistributors = self
            .redistributors
            .iter()
            .map(|range| map_registers(*range))
            .collect::<Result<_, _>>()?;
        READY.call_once(|| Ready {
            gic: gicv3::Gic::new(distributor),
            interrupts: Interrupts {
                virtual_timer: self.virtual_timer,
                hypervisor_timer: self.hypervisor_timer,
                maintenance: self.maintenance,
                uart: self.uart.intid,
            },
            redistributors,
        });
        Ok(uart)
    }

    /// The time of day, where the machine knows it.
    pub fn time(&self) -> Option<u64> {
        const DATA: usize = 0;
        let clock = map_registers(self.clock?).ok()?;
        Some(u64::from(clock.read32(DATA)))
    }
}

/// Sets up what of the interrupt controller is this CPU's own.
pub fn init_cpu() -> Result<(), gicv3::RedistributorError> {
    let ready = ready();
    ready.gic.init_cpu(&ready.redistributors)?;
    crate::arch::gic::init_cpu_interface();
    Ok(())
}
