//! The devicetree that a guest gets: the board of `tidemark_devices::virt`.

use crate::vm::{Vm, random};
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;
use dtoolkit::error::{FdtParseError, ModelError};
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node, Property, ToPropertyValue};
use tidemark_devices::virt;
use tidemark_wire::bundle::Boot;

/// QEMU's numbers.
const GIC_PHANDLE: u32 = 0x8002;
const CLOCK_PHANDLE: u32 = 0x8000;
const SPI: u32 = 0;
const PPI: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Bytes of the largest seed in the tree.
pub const LARGEST_SEED: usize = 32;
/// Properties of /chosen that are random, with their sizes: what a kernel shuffles its addresses
/// by, and what its random numbers start from.
const KASLR_SEED: (&str, usize) = ("kaslr-seed", 8);
const RNG_SEED: (&str, usize) = ("rng-seed", LARGEST_SEED);

/// A guest's devicetree, without its seeds.
#[derive(Debug)]
pub struct Tree {
    blob: Vec<u8>,
    seeds: [Option<Range<usize>>; 2],
}

impl Tree {
    /// Its bytes; those of the seeds are zero.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// Where in it random bytes belong.
    pub fn seeds(&self) -> impl Iterator<Item = &Range<usize>> {
        self.seeds.iter().flatten()
    }

    /// Finds the seeds.
    fn read(blob: Vec<u8>) -> Result<Self, FdtParseError> {
        let place = |name| {
            let chosen = Fdt::new(&blob)?.find_node("/chosen");
            let seed = chosen.and_then(|chosen| chosen.property(name));
            Ok(seed.and_then(|seed| {
                // A slice of the blob.
                let start = (seed.value().as_ptr() as usize).checked_sub(blob.as_ptr() as usize)?;
                Some(start..start + seed.value().len())
            }))
        };
        let seeds = [place(KASLR_SEED.0)?, place(RNG_SEED.0)?];
        Ok(Self { blob, seeds })
    }
}

/// The tree could not be made. Nothing from outside can bring that about.
#[derive(Debug)]
#[expect(dead_code, reason = "their Debug form is what is said")]
pub enum TreeError {
    /// A name that a devicetree cannot hold.
    Model(ModelError),
    /// What was written cannot be read.
    Read(FdtParseError),
}

impl From<ModelError> for TreeError {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

fn node<const N: usize>(
    name: &str,
    properties: [Result<DeviceTreeProperty, ModelError>; N],
) -> Result<DeviceTreeNode, ModelError> {
    let mut node = DeviceTreeNode::new(name)?;
    for property in properties {
        node.add_property(property?);
    }
    Ok(node)
}

fn property(name: &str, value: impl ToPropertyValue) -> Result<DeviceTreeProperty, ModelError> {
    DeviceTreeProperty::new(name, value)
}

fn flag(name: &str) -> Result<DeviceTreeProperty, ModelError> {
    property(name, [0u8; 0])
}

/// An address or size as two cells.
fn cells<const N: usize>(values: [u64; N]) -> Vec<u32> {
    values
        .iter()
        .flat_map(|value| [(value >> 32) as u32, *value as u32])
        .collect()
}

/// Builds the tree.
///
/// # Errors
///
/// See [`TreeError`].
pub fn build(vm: &Vm) -> Result<Tree, TreeError> {
    let mut tree = DeviceTree::new();
    let root = &mut tree.root;
    for property in [
        property("compatible", "linux,dummy-virt"),
        property("model", "tidemark,virt"),
        property("#address-cells", 2u32),
        property("#size-cells", 2u32),
        property("interrupt-parent", GIC_PHANDLE),
        // What a device writes, the guest's CPUs see: without it some kernels warn about their caches.
        flag("dma-coherent"),
    ] {
        root.add_property(property?);
    }
    let serial = format!("/pl011@{:x}", virt::UART_BASE);
    root.add_child(chosen(vm, &serial)?);
    root.add_child(node("aliases", [property("serial0", serial.as_str())])?);
    root.add_child(node(
        &format!("memory@{:x}", virt::RAM_BASE),
        [
            property("device_type", "memory"),
            property("reg", cells([virt::RAM_BASE, vm.spec.memory_bytes])),
        ],
    )?);
    root.add_child(cpus(vm)?);
    root.add_child(node(
        "psci",
        [
            property(
                "compatible",
                &["arm,psci-1.0", "arm,psci-0.2", "arm,psci"][..],
            ),
            property("method", "hvc"),
            // What `arm,psci` stands for: before PSCI 0.2 functions had no fixed numbers.
            property("cpu_suspend", 0xc400_0001u32),
            property("cpu_off", 0x8400_0002u32),
            property("cpu_on", 0xc400_0003u32),
        ],
    )?);
    root.add_child(node(
        "timer",
        [
            property("compatible", &["arm,armv8-timer", "arm,armv7-timer"][..]),
            flag("always-on"),
            property(
                "interrupts",
                [13, 14, 11, 10]
                    .iter()
                    .flat_map(|&ppi| [PPI, ppi, LEVEL_HIGH])
                    .collect::<Vec<u32>>(),
            ),
        ],
    )?);
    root.add_child(node(
        &format!("intc@{:x}", virt::GICD_BASE),
        [
            property("compatible", "arm,gic-v3"),
            property("#interrupt-cells", 3u32),
            flag("interrupt-controller"),
            property("#address-cells", 2u32),
            property("#size-cells", 2u32),
            property("#redistributor-regions", 1u32),
            property(
                "reg",
                cells([
                    virt::GICD_BASE,
                    virt::GICD_SIZE,
                    virt::GICR_BASE,
                    virt::GICR_STRIDE * vm.spec.vcpus as u64,
                ]),
            ),
            property("phandle", GIC_PHANDLE),
        ],
    )?);
    root.add_child(node(
        "apb-pclk",
        [
            property("compatible", "fixed-clock"),
            property("#clock-cells", 0u32),
            property("clock-frequency", virt::APB_CLOCK_HZ),
            property("clock-output-names", "clk24mhz"),
            property("phandle", CLOCK_PHANDLE),
        ],
    )?);
    root.add_child(node(
        &format!("pl011@{:x}", virt::UART_BASE),
        [
            property("compatible", &["arm,pl011", "arm,primecell"][..]),
            property("reg", cells([virt::UART_BASE, virt::UART_SIZE])),
            property(
                "interrupts",
                [SPI, virt::UART_INTERRUPT.intid() - 32, LEVEL_HIGH],
            ),
            property("clocks", [CLOCK_PHANDLE, CLOCK_PHANDLE]),
            property("clock-names", &["uartclk", "apb_pclk"][..]),
        ],
    )?);
    root.add_child(node(
        &format!("pl031@{:x}", virt::RTC_BASE),
        [
            property("compatible", &["arm,pl031", "arm,primecell"][..]),
            property("reg", cells([virt::RTC_BASE, virt::RTC_SIZE])),
            property(
                "interrupts",
                [SPI, virt::RTC_INTERRUPT.intid() - 32, LEVEL_HIGH],
            ),
            property("clocks", CLOCK_PHANDLE),
            property("clock-names", "apb_pclk"),
        ],
    )?);
    if vm.flash.is_some() {
        root.add_child(node(
            &format!("flash@{:x}", virt::FLASH_BASE),
            [
                property("compatible", "cfi-flash"),
                property(
                    "reg",
                    cells([
                        virt::FLASH_BASE,
                        virt::FLASH_SIZE,
                        virt::FLASH_BASE + virt::FLASH_SIZE,
                        virt::FLASH_SIZE,
                    ]),
                ),
                property("bank-width", virt::FLASH_WIDTH),
            ],
        )?);
    }
    if vm.fw_cfg.is_some() {
        root.add_child(node(
            &format!("fw-cfg@{:x}", virt::FW_CFG_BASE),
            [
                property("compatible", "qemu,fw-cfg-mmio"),
                property("reg", cells([virt::FW_CFG_BASE, virt::FW_CFG_SIZE])),
                flag("dma-coherent"),
            ],
        )?);
    }
    Tree::read(tree.to_dtb()).map_err(TreeError::Read)
}

fn chosen(vm: &Vm, serial: &str) -> Result<DeviceTreeNode, ModelError> {
    let mut chosen = node("chosen", [property("stdout-path", serial)])?;
    let mut seed = |(name, size): (&str, usize)| {
        chosen.add_property(property(
            name,
            &[0u8; LARGEST_SEED][..size.min(LARGEST_SEED)],
        )?);
        Ok::<(), ModelError>(())
    };
    seed(KASLR_SEED)?;
    if random::is_entropy() {
        seed(RNG_SEED)?;
    }
    if let Boot::Kernel(kernel) = &vm.spec.boot {
        chosen.add_property(property("bootargs", kernel.cmdline.as_str())?);
        if let Some(initrd) = &kernel.initrd {
            let end = initrd.address.saturating_add(initrd.file.len);
            chosen.add_property(property("linux,initrd-start", initrd.address)?);
            chosen.add_property(property("linux,initrd-end", end)?);
        }
    }
    Ok(chosen)
}

fn cpus(vm: &Vm) -> Result<DeviceTreeNode, ModelError> {
    let mut cpus = node(
        "cpus",
        [
            property("#address-cells", 1u32),
            property("#size-cells", 0u32),
        ],
    )?;
    for vcpu in vm.vcpus() {
        let affinity = vcpu.index.affinity();
        cpus.add_child(node(
            &format!("cpu@{affinity:x}"),
            [
                property("device_type", "cpu"),
                property("compatible", "arm,armv8"),
                property("reg", affinity as u32),
                property("enable-method", "psci"),
            ],
        )?);
    }
    Ok(cpus)
}
