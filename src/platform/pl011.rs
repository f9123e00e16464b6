//! The machine's PL011 (ARM DDI 0183).

use crate::arch::mmio::Mmio;

const DR: usize = 0x00;
const FR: usize = 0x18;
const LCR_H: usize = 0x2c;
const CR: usize = 0x30;
const IMSC: usize = 0x38;
const ICR: usize = 0x44;
const FR_RXFE: u32 = 1 << 4;
const FR_TXFF: u32 = 1 << 5;
const FR_TXFE: u32 = 1 << 7;
const RX: u32 = 1 << 4;
const TX: u32 = 1 << 5;
const RX_TIMEOUT: u32 = 1 << 6;
/// What the transmit FIFO holds at least: 16 bytes before revision r1p5, 32 since.
const FIFO: usize = 16;

/// What a UART interrupts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptFor {
    /// Something was received.
    Input,
    /// Or there is room to send.
    InputAndRoom,
}

/// A PL011, set up by the firmware (baud rate, line format, enabled).
#[derive(Clone, Copy, Debug)]
pub struct Pl011(Mmio);

impl Pl011 {
    /// The UART behind a window of device registers.
    pub const fn new(registers: Mmio) -> Self {
        Self(registers)
    }

    /// Turns the FIFOs, both directions and the UART itself on. Baud rate and line format
    /// stay the firmware's.
    pub fn enable(&self) {
        const FIFOS: u32 = 1 << 4;
        const UART_TX_RX: u32 = 1 | 1 << 8 | 1 << 9;
        self.0.write32(LCR_H, self.0.read32(LCR_H) | FIFOS);
        self.0.write32(CR, self.0.read32(CR) | UART_TX_RX);
    }

    /// Sends a byte, waiting for room.
    pub fn send(&self, byte: u8) {
        while self.room() == 0 {
            core::hint::spin_loop();
        }
        self.put(byte);
    }

    /// How many bytes are sure to be taken: a read of a register for each would be half the cost of sending it.
    pub fn room(&self) -> usize {
        match self.0.read32(FR) {
            flags if flags & FR_TXFE != 0 => FIFO,
            flags if flags & FR_TXFF == 0 => 1,
            _ => 0,
        }
    }

    /// Sends a byte that there is room for.
    pub fn put(&self, byte: u8) {
        self.0.write32(DR, u32::from(byte));
    }

    /// Takes a received byte. Reading is what lowers the receive interrupts: clearing them
    /// by ICR could lose one, because QEMU raises it on an edge. Errors of the line (bits 11:8) are the frame CRC's matter.
    pub fn receive(&self) -> Option<u8> {
        (self.0.read32(FR) & FR_RXFE == 0).then(|| self.0.read32(DR) as u8)
    }

    /// Says what it is to interrupt for.
    pub fn interrupt_for(&self, wanted: InterruptFor) {
        let mask = match wanted {
            InterruptFor::Input => RX | RX_TIMEOUT,
            InterruptFor::InputAndRoom => RX | RX_TIMEOUT | TX,
        };
        self.0.write32(IMSC, mask);
    }

    /// Clears the send interrupt.
    pub fn clear_send(&self) {
        self.0.write32(ICR, TX);
    }
}
