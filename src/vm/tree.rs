//! The devicetree that a guest gets: the board of `tidemark_devices::virt`.

use super::Vm;
use alloc::format;
use alloc::vec::Vec;
use dtoolkit::ToPropertyValue;
use dtoolkit::error::ModelError;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use tidemark_devices::virt;
use tidemark_wire::bundle::Boot;

const GIC_PHANDLE: u32 = 1;
const CLOCK_PHANDLE: u32 = 2;
const SPI: u32 = 0;
const PPI: u32 = 1;
const LEVEL_HIGH: u32 = 4;

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
/// Fails on a name that a devicetree cannot hold; none of them comes from outside.
pub fn build(vm: &Vm) -> Result<Vec<u8>, ModelError> {
    let mut tree = DeviceTree::new();
    let root = &mut tree.root;
    for property in [
        property("compatible", "linux,dummy-virt"),
        property("model", "tidemark,virt"),
        property("#address-cells", 2u32),
        property("#size-cells", 2u32),
        property("interrupt-parent", GIC_PHANDLE),
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
    Ok(tree.to_dtb())
}

fn chosen(vm: &Vm, serial: &str) -> Result<DeviceTreeNode, ModelError> {
    let mut chosen = node("chosen", [property("stdout-path", serial)])?;
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
