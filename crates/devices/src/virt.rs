//! The guest's memory map: QEMU's `virt` board.
//!
//! Addresses and interrupt numbers that kernels and firmware built for `-M virt` have compiled in
//! or find in the devicetree; the devicetree written for a guest uses these same constants.
//! No state, no concurrency. [`decode`] is the one place that turns an address into a device.

use crate::VcpuIndex;
use crate::vgic::{Frame, Ppi, Spi};

/// The first bank of flash, firmware's code. The second, its variables, follows.
pub const FLASH_BASE: u64 = 0;
/// Size of a bank.
pub const FLASH_SIZE: u64 = 0x0400_0000;
/// Banks of flash.
pub const FLASH_BANKS: u64 = 2;
/// Bytes that a bank's chips give at once.
pub const FLASH_WIDTH: u32 = 4;
/// GIC distributor.
pub const GICD_BASE: u64 = 0x0800_0000;
/// Size of the distributor's frame.
pub const GICD_SIZE: u64 = 0x1_0000;
/// GIC redistributors, one after the other in vCPU order.
pub const GICR_BASE: u64 = 0x080a_0000;
/// Distance between two redistributors: RD frame and SGI frame, 64 KiB each.
pub const GICR_STRIDE: u64 = 0x2_0000;
/// PL011 UART.
pub const UART_BASE: u64 = 0x0900_0000;
/// Size of the UART's page.
pub const UART_SIZE: u64 = 0x1000;
/// PL031 real-time clock.
pub const RTC_BASE: u64 = 0x0901_0000;
/// Size of the clock's page.
pub const RTC_SIZE: u64 = 0x1000;
/// QEMU's `fw_cfg`.
pub const FW_CFG_BASE: u64 = 0x0902_0000;
/// Size of its registers.
pub const FW_CFG_SIZE: u64 = 0x18;
/// First virtio-mmio transport.
pub const VIRTIO_BASE: u64 = 0x0a00_0000;
/// Distance between two virtio-mmio transports.
pub const VIRTIO_STRIDE: u64 = 0x200;
/// Number of virtio-mmio transports the map has room for.
pub const VIRTIO_COUNT: u64 = 32;
/// Start of RAM.
pub const RAM_BASE: u64 = 0x4000_0000;

/// The frequency in the devicetree's `apb-pclk`, from which drivers compute baud rates.
pub const APB_CLOCK_HZ: u32 = 24_000_000;

/// The virtual timer's interrupt.
pub const VIRTUAL_TIMER: Ppi = Ppi::literal(27);
/// The EL1 physical timer's interrupt.
pub const PHYSICAL_TIMER: Ppi = Ppi::literal(30);
/// The UART's interrupt (SPI 1).
pub const UART_INTERRUPT: Spi = Spi::literal(33);
/// The clock's interrupt (SPI 2).
pub const RTC_INTERRUPT: Spi = Spi::literal(34);
/// SPI number (as a devicetree writes it, intid - 32) of the first virtio-mmio transport.
pub const VIRTIO_FIRST_SPI: u16 = 16;

/// Gives the interrupt of virtio-mmio transport `slot`; `None` from [`VIRTIO_COUNT`] on.
pub fn virtio_interrupt(slot: u64) -> Option<Spi> {
    if slot >= VIRTIO_COUNT {
        return None;
    }
    Spi::new(32 + u32::from(VIRTIO_FIRST_SPI) + u32::try_from(slot).ok()?)
}

/// A device of the board, with the offset of an access inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The interrupt controller.
    Gic(Frame, u64),
    /// The UART.
    Uart(u64),
    /// The real-time clock.
    Rtc(u64),
    /// QEMU's `fw_cfg`, which only guests with firmware have.
    FwCfg(u64),
    /// A virtio-mmio transport: slot, offset.
    Virtio(u64, u64),
}

/// Finds the device at an intermediate physical address; `None` when nothing is there.
///
/// A redistributor that the guest has no vCPU for is still [`Device::Gic`]; [`crate::vgic::Vgic`]
/// reads it as zero. Guests stop at the one that says it is the last.
pub fn decode(ipa: u64) -> Option<Device> {
    let within = |base: u64, size: u64| ipa.checked_sub(base).filter(|offset| *offset < size);
    if let Some(offset) = within(GICD_BASE, GICD_SIZE) {
        return Some(Device::Gic(Frame::Distributor, offset));
    }
    if let Some(offset) = within(UART_BASE, UART_SIZE) {
        return Some(Device::Uart(offset));
    }
    if let Some(offset) = within(GICR_BASE, GICR_STRIDE * crate::MAX_VCPUS as u64) {
        let vcpu = VcpuIndex::new((offset / GICR_STRIDE) as usize)?;
        return Some(Device::Gic(
            Frame::Redistributor(vcpu),
            offset % GICR_STRIDE,
        ));
    }
    if let Some(offset) = within(RTC_BASE, RTC_SIZE) {
        return Some(Device::Rtc(offset));
    }
    if let Some(offset) = within(FW_CFG_BASE, FW_CFG_SIZE) {
        return Some(Device::FwCfg(offset));
    }
    let offset = within(VIRTIO_BASE, VIRTIO_STRIDE * VIRTIO_COUNT)?;
    Some(Device::Virtio(
        offset / VIRTIO_STRIDE,
        offset % VIRTIO_STRIDE,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_find_their_devices() {
        let vcpu = |index| VcpuIndex::new(index).expect("small");
        for (ipa, device) in [
            (0x0800_0000, Some(Device::Gic(Frame::Distributor, 0))),
            (0x0800_ffff, Some(Device::Gic(Frame::Distributor, 0xffff))),
            (0x0801_0000, None),
            (0x0809_ffff, None),
            (
                0x080a_0000,
                Some(Device::Gic(Frame::Redistributor(vcpu(0)), 0)),
            ),
            (
                0x080b_0080,
                Some(Device::Gic(Frame::Redistributor(vcpu(0)), 0x1_0080)),
            ),
            (
                0x080c_0008,
                Some(Device::Gic(Frame::Redistributor(vcpu(1)), 8)),
            ),
            (
                0x0829_ffff,
                Some(Device::Gic(Frame::Redistributor(vcpu(15)), 0x1_ffff)),
            ),
            (0x082a_0000, None),
            (0x0900_0000, Some(Device::Uart(0))),
            (0x0900_0fff, Some(Device::Uart(0xfff))),
            (0x0900_1000, None),
            (0x0901_0ffc, Some(Device::Rtc(0xffc))),
            (0x0901_1000, None),
            (0x0902_0008, Some(Device::FwCfg(8))),
            (0x0902_0018, None),
            (0x09ff_ffff, None),
            (0x0a00_0000, Some(Device::Virtio(0, 0))),
            (0x0a00_3fff, Some(Device::Virtio(31, 0x1ff))),
            (0x0a00_4000, None),
            (0, None),
            (RAM_BASE, None),
            (u64::MAX, None),
        ] {
            assert_eq!(decode(ipa), device, "{ipa:#x}");
        }
    }

    #[test]
    fn interrupts_are_those_of_qemus_virt() {
        assert_eq!((UART_INTERRUPT.intid(), RTC_INTERRUPT.intid()), (33, 34));
        assert_eq!((VIRTUAL_TIMER.intid(), PHYSICAL_TIMER.intid()), (27, 30));
        assert_eq!(virtio_interrupt(0).map(Spi::intid), Some(48));
        assert_eq!(virtio_interrupt(31).map(Spi::intid), Some(79));
        assert_eq!(virtio_interrupt(32), None);
        assert_eq!(virtio_interrupt(u64::MAX), None);
    }

    #[test]
    fn intids_are_checked() {
        assert_eq!(Ppi::new(15).or(Ppi::new(32)).or(Ppi::new(u32::MAX)), None);
        assert_eq!(Spi::new(31).or(Spi::new(160)).or(Spi::new(32 + 256)), None);
        assert_eq!(
            (Ppi::new(16).map(Ppi::intid), Ppi::new(31).map(Ppi::intid)),
            (Some(16), Some(31))
        );
        assert_eq!(
            (Spi::new(32).map(Spi::intid), Spi::new(159).map(Spi::intid)),
            (Some(32), Some(159))
        );
        assert_eq!(VcpuIndex::new(16), None);
        assert_eq!(
            VcpuIndex::from_affinity(0x8000_000f),
            VcpuIndex::new(15),
            "MPIDR's other bits"
        );
        assert_eq!(VcpuIndex::from_affinity(0x100), None);
        assert_eq!(VcpuIndex::from_affinity(1 << 32), None);
    }
}
