//! The PL011 UART.
//!
//! # Purpose
//!
//! The guest's console: what it writes to DR comes out of [`Pl011::write`], what the host types
//! goes in by [`Pl011::push_rx`]. Registers, FIFO, interrupt sources and identification are those of the
//! r1p5 part, whose FIFOs are 32 deep.
//!
//! # Invariants
//!
//! - Transmission takes no time: the transmit FIFO is always empty, FR never says full or busy. TXRIS
//!   is set by each byte sent and stays until ICR clears it: the interrupt marks a transition
//!   (DDI 0183, 2.8.2), so unmasking it with nothing sent since raises nothing, as on the part and on QEMU.
//! - RXRIS is set when a byte fills the FIFO to its trigger level and cleared by reading below it;
//!   RTRIS stands for the receive timeout without a timer: set by every byte that arrives,
//!   cleared when the FIFO is empty. A byte is therefore never left without an interrupt, but by who clears it with ICR
//!   and leaves a full FIFO as it is.
//! - No received byte is dropped: a full FIFO refuses, and the sender keeps it. There is no overrun.
//! - UARTEN, TXE and RXE are stored and not obeyed: kernels' early consoles write to a UART no firmware enabled,
//!   and QEMU's `virt`, which they were written on, lets them.
//!
//! # Concurrency
//!
//! `&mut self`; the owner locks. After every `read`, `write`, `push_rx`, `reset` and `restore` the owner passes
//! [`Pl011::irq_change`] on to the interrupt controller under the same lock, or levels could arrive in the wrong order.
//!
//! Specification: DDI 0183 (PL011), chapter 3.

use crate::{Level, primecell};

#[cfg(test)]
mod tests;

/// Part 0x011 by Arm, revision r1p5 (3): the first with 32-deep FIFOs. Linux takes the depth from the revision.
const PERIPHERAL_ID: u32 = 0x0034_1011;
/// Depth of the receive FIFO.
pub const FIFO_DEPTH: usize = 32;

const DR: u64 = 0x00;
const RSR: u64 = 0x04;
const FR: u64 = 0x18;
const ILPR: u64 = 0x20;
const IBRD: u64 = 0x24;
const FBRD: u64 = 0x28;
const LCR_H: u64 = 0x2c;
const CR: u64 = 0x30;
const IFLS: u64 = 0x34;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
const DMACR: u64 = 0x48;

/// FR: clear to send, data set ready, carrier: someone is always at the other end.
const FR_CONNECTED: u32 = 0b111;
const FR_RXFE: u32 = 1 << 4;
const FR_RXFF: u32 = 1 << 6;
const FR_TXFE: u32 = 1 << 7;
const LCR_H_FEN: u32 = 1 << 4;
const CR_LBE: u32 = 1 << 7;
const INT_RX: u32 = 1 << 4;
const INT_TX: u32 = 1 << 5;
const INT_RT: u32 = 1 << 6;
const INT_ALL: u32 = 0x7ff;

/// All a PL011 remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pl011State {
    /// Received bytes, oldest first; `fifo_len` of them count.
    pub fifo: [u8; FIFO_DEPTH],
    /// How many bytes wait.
    pub fifo_len: u8,
    /// ILPR.
    pub low_power: u32,
    /// IBRD.
    pub integer_baud: u32,
    /// FBRD.
    pub fraction_baud: u32,
    /// LCR_H.
    pub line_control: u32,
    /// CR.
    pub control: u32,
    /// IFLS.
    pub fifo_levels: u32,
    /// IMSC.
    pub mask: u32,
    /// RIS.
    pub raw: u32,
    /// DMACR.
    pub dma_control: u32,
}

impl Pl011State {
    /// The state after reset (DDI 0183, table 3-1).
    pub const RESET: Self = Self {
        fifo: [0; FIFO_DEPTH],
        fifo_len: 0,
        low_power: 0,
        integer_baud: 0,
        fraction_baud: 0,
        line_control: 0,
        control: 0x300,
        fifo_levels: 0x12,
        mask: 0,
        raw: 0,
        dma_control: 0,
    };
}

/// The FIFO is full; the byte was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A PL011.
#[derive(Debug)]
pub struct Pl011 {
    state: Pl011State,
    /// Where in `state.fifo` the oldest byte is; below [`FIFO_DEPTH`].
    head: usize,
    /// What [`Pl011::irq_change`] said last: what the interrupt controller knows, over a reset of that too, which keeps
    /// lines.
    told: Option<Level>,
}

impl Default for Pl011 {
    fn default() -> Self {
        Self::new()
    }
}

impl Pl011 {
    /// Makes a UART in its reset state.
    pub const fn new() -> Self {
        Self {
            state: Pl011State::RESET,
            head: 0,
            told: None,
        }
    }

    /// Reads a register. Reading DR takes a byte from the FIFO.
    #[inline(always)]
    pub fn read(&mut self, offset: u64) -> u32 {
        let state = &self.state;
        match offset {
            DR => self.pop(),
            // No byte ever has an error.
            RSR => 0,
            FR => self.flags(),
            ILPR => state.low_power,
            IBRD => state.integer_baud,
            FBRD => state.fraction_baud,
            LCR_H => state.line_control,
            CR => state.control,
            IFLS => state.fifo_levels,
            IMSC => state.mask,
            RIS => state.raw,
            MIS => state.raw & state.mask,
            DMACR => state.dma_control,
            _ => primecell::read(PERIPHERAL_ID, offset).unwrap_or(0),
        }
    }

    /// Writes a register. Gives the byte to send, if that is what the write meant.
    #[must_use = "the byte is the guest's output"]
    #[inline(always)]
    pub fn write(&mut self, offset: u64, value: u32) -> Option<u8> {
        let state = &mut self.state;
        match offset {
            DR => return self.transmit(value as u8),
            ILPR => state.low_power = value & 0xff,
            IBRD => state.integer_baud = value & 0xffff,
            FBRD => state.fraction_baud = value & 0x3f,
            // The FIFO keeps its bytes when FEN changes: a real part may lose them, and typed-ahead input with them.
            LCR_H => state.line_control = value & 0xff,
            CR => state.control = value & 0xff87,
            IFLS => state.fifo_levels = value & 0x3f,
            IMSC => state.mask = value & INT_ALL,
            ICR => state.raw &= !value,
            DMACR => state.dma_control = value & 7,
            _ => {}
        }
        None
    }

    /// Receives a byte from the line.
    pub fn push_rx(&mut self, byte: u8) -> Result<(), Full> {
        let len = usize::from(self.state.fifo_len);
        if len >= self.depth() {
            return Err(Full);
        }
        if let Some(place) = self.state.fifo.get_mut((self.head + len) % FIFO_DEPTH) {
            *place = byte;
        }
        self.state.fifo_len += 1;
        self.state.raw |= INT_RT;
        if len + 1 >= self.trigger() {
            self.state.raw |= INT_RX;
        }
        Ok(())
    }

    /// Gives how many bytes [`Pl011::push_rx`] would take now.
    pub fn rx_room(&self) -> usize {
        self.depth()
            .saturating_sub(usize::from(self.state.fifo_len))
    }

    /// Gives the interrupt line (UARTINTR: any of MIS).
    fn irq_level(&self) -> Level {
        if self.state.raw & self.state.mask != 0 {
            Level::High
        } else {
            Level::Low
        }
    }

    /// Gives the interrupt line if it is not what this said last. The interrupt controller takes a lock; most accesses
    /// are reads of FR.
    #[inline(always)]
    pub fn irq_change(&mut self) -> Option<Level> {
        let level = self.irq_level();
        let changed = self.told != Some(level);
        self.told = Some(level);
        changed.then_some(level)
    }

    /// Puts it into its reset state; waiting input is lost.
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// Gives all it remembers.
    pub fn save(&self) -> Pl011State {
        let mut state = self.state;
        state.fifo.rotate_left(self.head);
        state
    }

    /// Takes up what [`Pl011::save`] gave. A length beyond the FIFO is cut to it.
    pub fn restore(&mut self, state: &Pl011State) {
        self.head = 0;
        // The interrupt controller is another one than it was told to.
        self.told = None;
        self.state = *state;
        self.state.fifo_len = state.fifo_len.min(FIFO_DEPTH as u8);
    }

    /// With FEN clear the FIFO is a one-byte register.
    fn depth(&self) -> usize {
        if self.state.line_control & LCR_H_FEN != 0 {
            FIFO_DEPTH
        } else {
            1
        }
    }

    /// The fill that raises RXRIS (RXIFLSEL, DDI 0183 3.3.9; reserved values act as seven eighths).
    fn trigger(&self) -> usize {
        if self.state.line_control & LCR_H_FEN == 0 {
            return 1;
        }
        match self.state.fifo_levels >> 3 & 7 {
            0 => FIFO_DEPTH / 8,
            1 => FIFO_DEPTH / 4,
            2 => FIFO_DEPTH / 2,
            3 => FIFO_DEPTH / 4 * 3,
            _ => FIFO_DEPTH / 8 * 7,
        }
    }

    fn flags(&self) -> u32 {
        let mut flags = FR_CONNECTED | FR_TXFE;
        if self.state.fifo_len == 0 {
            flags |= FR_RXFE;
        }
        if self.rx_room() == 0 {
            flags |= FR_RXFF;
        }
        flags
    }

    #[inline(always)]
    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.state.raw |= INT_TX;
        if self.state.control & CR_LBE == 0 {
            return Some(byte);
        }
        // Looped back into a full FIFO: lost, as on a line nobody reads.
        let _ = self.push_rx(byte);
        None
    }

    #[inline(always)]
    fn pop(&mut self) -> u32 {
        if self.state.fifo_len == 0 {
            return 0;
        }
        let byte = self.state.fifo.get(self.head).copied().unwrap_or(0);
        self.head = (self.head + 1) % FIFO_DEPTH;
        self.state.fifo_len -= 1;
        if usize::from(self.state.fifo_len) < self.trigger() {
            self.state.raw &= !INT_RX;
        }
        if self.state.fifo_len == 0 {
            self.state.raw &= !INT_RT;
        }
        u32::from(byte)
    }
}
