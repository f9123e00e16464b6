//! The UART register by register, and against a small model.

use std::vec::Vec;

use proptest::collection::vec_deque;
use proptest::prelude::*;
use std::collections::VecDeque;

use super::*;

/// A UART as Linux sets it up: FIFO on, trigger at half, receive interrupts on.
fn ready() -> Pl011 {
    let mut uart = Pl011::new();
    for (offset, value) in [
        (LCR_H, 0x70),
        (IFLS, 0x12),
        (CR, 0x301),
        (IMSC, INT_RX | INT_RT),
    ] {
        assert_eq!(uart.write(offset, value), None);
    }
    uart
}

#[test]
fn identifies_as_a_pl011_r1p5() {
    let mut uart = Pl011::new();
    let ids: Vec<u32> = (0xfe0..0x1000)
        .step_by(4)
        .map(|offset| uart.read(offset))
        .collect();
    assert_eq!(ids, [0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
    let periphid = ids[0] | ids[1] << 8 | ids[2] << 16 | ids[3] << 24;
    assert_eq!(
        periphid & 0x000f_ffff,
        0x0004_1011,
        "what Linux's amba-pl011 matches"
    );
    assert_eq!(uart.read(0xfe1), 0);
    assert_eq!(uart.read(0x1000), 0);
}

#[test]
fn resets_to_the_manuals_values() {
    let mut uart = ready();
    uart.push_rx(1).expect("room");
    let _ = uart.write(DR, 2);
    uart.reset();
    assert_eq!(uart.save(), Pl011State::RESET);
    for (offset, value) in [
        (FR, 0x97),
        (CR, 0x300),
        (IFLS, 0x12),
        (IMSC, 0),
        (RIS, 0),
        (MIS, 0),
        (LCR_H, 0),
        (DMACR, 0),
    ] {
        assert_eq!(uart.read(offset), value, "{offset:#x}");
    }
}

#[test]
fn stores_what_each_register_has_room_for() {
    let mut uart = Pl011::new();
    for (offset, mask) in [
        (ILPR, 0xff),
        (IBRD, 0xffff),
        (FBRD, 0x3f),
        (LCR_H, 0xff),
        (CR, 0xff87),
        (IFLS, 0x3f),
        (IMSC, 0x7ff),
        (DMACR, 7),
    ] {
        assert_eq!(uart.write(offset, u32::MAX), None);
        assert_eq!(uart.read(offset), mask, "{offset:#x}");
        assert_eq!(uart.write(offset, 0), None);
        assert_eq!(uart.read(offset), 0, "{offset:#x}");
    }
    for offset in [RSR, FR, RIS, MIS, 0x08, 0x1c, 0x4c, 0xfe0] {
        let before = uart.read(offset);
        assert_eq!(uart.write(offset, u32::MAX), None);
        assert_eq!(uart.read(offset), before, "{offset:#x} is read-only");
    }
}

#[test]
fn sends_at_once_and_says_so() {
    let mut uart = Pl011::new();
    assert_eq!(uart.write(IMSC, INT_TX), None);
    assert_eq!(
        uart.irq_level(),
        Level::Low,
        "unmasking with nothing sent raises nothing"
    );
    for byte in [b'a', 0, 0xff] {
        assert_eq!(uart.write(DR, 0xffff_ff00 | u32::from(byte)), Some(byte));
        assert_eq!(
            uart.read(FR) & (1 << 3 | 1 << 5 | FR_TXFE),
            FR_TXFE,
            "never busy, never full"
        );
        assert_eq!((uart.read(RIS), uart.read(MIS)), (INT_TX, INT_TX));
        assert_eq!(uart.irq_level(), Level::High);
        assert_eq!(uart.write(ICR, INT_TX), None);
        assert_eq!(uart.irq_level(), Level::Low);
    }
    let _ = uart.write(DR, 1);
    assert_eq!(uart.write(IMSC, 0), None);
    assert_eq!((uart.read(RIS), uart.read(MIS)), (INT_TX, 0));
    assert_eq!(uart.irq_level(), Level::Low);
    // Unmasked later, what was sent before counts: Linux starts sending so when its buffer is longer than the FIFO.
    assert_eq!(uart.write(IMSC, INT_TX), None);
    assert_eq!(uart.irq_level(), Level::High);
}

#[test]
fn one_byte_is_enough_for_an_interrupt() {
    let mut uart = ready();
    assert_eq!(uart.read(FR) & (FR_RXFE | FR_RXFF), FR_RXFE);
    uart.push_rx(b'x').expect("room");
    assert_eq!(uart.read(MIS), INT_RT);
    assert_eq!(uart.irq_level(), Level::High);
    assert_eq!(uart.read(FR) & (FR_RXFE | FR_RXFF), 0);
    assert_eq!(uart.read(DR), u32::from(b'x'));
    assert_eq!(uart.irq_level(), Level::Low);
    assert_eq!(uart.read(DR), 0, "empty");
    assert_eq!(uart.read(FR) & FR_RXFE, FR_RXFE);
}

#[test]
fn the_receive_interrupt_follows_the_trigger_level() {
    for (select, level) in [(0, 4), (1, 8), (2, 16), (3, 24), (4, 28), (7, 28)] {
        let mut uart = ready();
        let _ = uart.write(IFLS, select << 3);
        for count in 1..=FIFO_DEPTH {
            uart.push_rx(count as u8).expect("room");
            assert_eq!(
                uart.read(RIS) & INT_RX != 0,
                count >= level,
                "{count} of {level}"
            );
        }
        for count in (0..FIFO_DEPTH).rev() {
            uart.read(DR);
            assert_eq!(
                uart.read(RIS) & INT_RX != 0,
                count >= level,
                "{count} left of {level}"
            );
        }
    }
}

#[test]
fn clearing_the_receive_interrupts_lasts_until_the_next_byte() {
    let mut uart = ready();
    for byte in 0..20 {
        uart.push_rx(byte).expect("room");
    }
    let _ = uart.write(ICR, INT_RX | INT_RT);
    assert_eq!(uart.irq_level(), Level::Low);
    uart.push_rx(20).expect("room");
    assert_eq!(uart.read(MIS), INT_RX | INT_RT);
}

#[test]
fn a_full_fifo_refuses_and_keeps_the_order() {
    let mut uart = ready();
    assert_eq!(uart.rx_room(), 32);
    for byte in 0..32 {
        uart.push_rx(byte).expect("room");
    }
    assert_eq!(uart.rx_room(), 0);
    assert_eq!(uart.push_rx(99), Err(Full));
    assert_eq!(uart.read(FR) & (FR_RXFE | FR_RXFF), FR_RXFF);
    for byte in 0..32 {
        assert_eq!(uart.read(DR), byte);
    }
    assert_eq!(uart.read(RSR), 0, "no overrun");
}

#[test]
fn without_the_fifo_there_is_one_place() {
    let mut uart = Pl011::new();
    uart.push_rx(1).expect("room");
    assert_eq!(uart.push_rx(2), Err(Full));
    assert_eq!(uart.read(RIS), INT_RX | INT_RT);
    // Typed ahead of the driver, it outlives the driver's setting the FIFO up.
    let _ = uart.write(LCR_H, 0x70);
    uart.push_rx(3).expect("room");
    assert_eq!((uart.read(DR), uart.read(DR)), (1, 3));
}

#[test]
fn loopback_receives_what_is_sent() {
    let mut uart = ready();
    let _ = uart.write(CR, 0x381);
    assert_eq!(uart.write(DR, 0x55), None, "nothing leaves");
    assert_eq!(uart.read(RIS), INT_TX | INT_RT);
    assert_eq!(uart.read(DR), 0x55);
    let _ = uart.write(CR, 0x301);
    assert_eq!(uart.write(DR, 0x55), Some(0x55));
}

#[test]
fn a_line_is_told_anew_after_a_reset_and_to_another_controller() {
    let mut uart = ready();
    assert_eq!(uart.irq_change(), Some(Level::Low));
    uart.push_rx(b'x').expect("room");
    assert_eq!(uart.irq_change(), Some(Level::High));
    uart.push_rx(b'y').expect("room");
    assert_eq!(uart.irq_change(), None);
    let state = uart.save();
    uart.restore(&state);
    assert_eq!(uart.irq_change(), Some(Level::High));
    uart.reset();
    assert_eq!(uart.irq_change(), Some(Level::Low));
    assert_eq!(uart.irq_change(), None);
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut uart = ready();
    for byte in 0..30 {
        uart.push_rx(byte).expect("room");
    }
    for _ in 0..25 {
        uart.read(DR);
    }
    for byte in 30..40 {
        uart.push_rx(byte).expect("room");
    }
    let state = uart.save();
    assert_eq!(
        &state.fifo[..usize::from(state.fifo_len)],
        (25..40).collect::<Vec<u8>>()
    );
    let mut other = Pl011::new();
    other.restore(&state);
    assert_eq!(other.irq_level(), Level::High);
    for byte in 25..40 {
        assert_eq!(other.read(DR), byte);
    }
    assert_eq!(other.irq_level(), Level::Low);
    let mut wrong = state;
    wrong.fifo_len = 200;
    other.restore(&wrong);
    assert_eq!(other.rx_room(), 0);
    for _ in 0..40 {
        other.read(DR);
    }
    assert_eq!(other.rx_room(), 32);
}

/// What a UART does to bytes, said in another way.
#[derive(Default)]
struct Model {
    waiting: VecDeque<u8>,
    fifo: bool,
    loopback: bool,
    level: usize,
    mask: u32,
    raw: u32,
}

impl Model {
    fn trigger(&self) -> usize {
        if self.fifo {
            [4, 8, 16, 24, 28, 28, 28, 28][self.level]
        } else {
            1
        }
    }

    fn receive(&mut self, byte: u8) -> bool {
        if self.waiting.len() >= if self.fifo { 32 } else { 1 } {
            return false;
        }
        self.waiting.push_back(byte);
        self.raw |= 0x40;
        if self.waiting.len() >= self.trigger() {
            self.raw |= 0x10;
        }
        true
    }

    fn take(&mut self) -> u32 {
        let Some(byte) = self.waiting.pop_front() else {
            return 0;
        };
        if self.waiting.len() < self.trigger() {
            self.raw &= !0x10;
        }
        if self.waiting.is_empty() {
            self.raw &= !0x40;
        }
        u32::from(byte)
    }
}

proptest! {
    #[test]
    fn behaves_like_the_model(steps in vec_deque((0u8..8, any::<u32>()), 1..400)) {
        let mut uart = Pl011::new();
        let mut model = Model { level: 2, ..Model::default() };
        let mut line = None;
        for (step, value) in steps {
            match step {
                0..3 => prop_assert_eq!(uart.push_rx(value as u8).is_ok(), model.receive(value as u8)),
                3 => prop_assert_eq!(uart.read(0x00), model.take()),
                4 => {
                    model.raw |= 0x20;
                    let sent = uart.write(0x00, value);
                    prop_assert_eq!(sent, (!model.loopback).then_some(value as u8));
                    if model.loopback {
                        model.receive(value as u8);
                    }
                }
                5 => {
                    model.raw &= !value;
                    let _ = uart.write(0x44, value);
                }
                6 => {
                    model.mask = value & 0x7ff;
                    let _ = uart.write(0x38, value);
                }
                // Rarely, or a FIFO never fills.
                _ if value % 8 == 0 => {
                    model.fifo = value & 0x100 != 0;
                    let _ = uart.write(0x2c, u32::from(model.fifo) << 4);
                    model.level = (value >> 12 & 7) as usize;
                    let _ = uart.write(0x34, (model.level as u32) << 3);
                    model.loopback = value & 0x800 != 0;
                    let _ = uart.write(0x30, 0x301 | u32::from(model.loopback) << 7);
                }
                _ => {
                    // Any other access changes nothing.
                    let offset = u64::from(value % 0x1000);
                    if offset != DR {
                        uart.read(offset);
                    }
                }
            }
            prop_assert_eq!(uart.read(0x3c), model.raw & 0x7ff);
            // Who only hears of changes knows the line.
            let level = if model.raw & model.mask == 0 { Level::Low } else { Level::High };
            prop_assert_eq!(uart.irq_change(), (line != Some(level)).then_some(level));
            line = Some(level);
            prop_assert_eq!(uart.read(0x40), model.raw & model.mask);
            prop_assert_eq!(uart.irq_level() == Level::High, model.raw & model.mask != 0);
            prop_assert_eq!(uart.read(0x18) >> 4 & 1 == 1, model.waiting.is_empty());
        }
    }
}
