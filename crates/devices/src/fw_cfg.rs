//! QEMU's `fw_cfg`: what the machine has to say to firmware, item by item.
//!
//! # Purpose
//!
//! Firmware for QEMU's `virt` asks it for the number of CPUs, and for the kernel that it is to start, with its
//! initrd and command line.
//!
//! # Invariants
//!
//! - Items are made before the guest starts and never change. A guest can select and read; what it writes to
//!   data is ignored, as QEMU has done since 2.4.
//! - There is no DMA, and the features say so: firmware reads 8 bytes an access. One access by DMA could ask for
//!   4 GiB, more than EL2 does in one go.
//!
//! # Concurrency
//!
//! `&mut self`; the owner locks.
//!
//! Specification: QEMU, `docs/specs/fw_cfg`.

use crate::AccessSize;
use alloc::borrow::Cow;
use alloc::vec::Vec;

#[cfg(test)]
mod tests;

/// Registers: data, 8 bytes wide, and the selector behind it.
const DATA: core::ops::Range<u64> = 0..8;
const SELECTOR: u64 = 8;
/// Of a selector, what names an item; the rest asks for writing, which there is not.
const KEY: u16 = !(1 << 14);

/// The name of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u16);

impl Key {
    /// `QEMU`.
    const SIGNATURE: Self = Self(0x00);
    /// Which interface there is.
    const FEATURES: Self = Self(0x01);
    /// CPUs.
    const CPUS: Self = Self(0x05);
    /// The most CPUs there can be.
    const CPUS_MAX: Self = Self(0x0f);
    /// Items that have a file's name: none.
    const FILES: Self = Self(0x19);
    /// The kernel's size.
    const KERNEL_SIZE: Self = Self(0x08);
    const KERNEL: Self = Self(0x11);
    const INITRD_SIZE: Self = Self(0x0b);
    const INITRD: Self = Self(0x12);
    const COMMAND_LINE_SIZE: Self = Self(0x14);
    const COMMAND_LINE: Self = Self(0x15);
}

/// The interface of selector and data, without DMA.
const TRADITIONAL: u32 = 1;

/// What firmware is to start.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    /// The kernel.
    pub kernel: &'static [u8],
    /// Its initrd, if it has one.
    pub initrd: Option<&'static [u8]>,
    /// Its command line, without a zero byte.
    pub command_line: &'a str,
}

#[derive(Debug)]
struct Item {
    key: Key,
    bytes: Cow<'static, [u8]>,
}

/// Where reading goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FwCfgState {
    /// The selected item.
    pub selected: u16,
    /// Bytes of it that were read.
    pub read: u64,
}

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: Vec<Item>,
    state: FwCfgState,
}

impl FwCfg {
    /// Makes one for a machine with so many CPUs.
    pub fn new(cpus: u16, kernel: Option<Kernel<'_>>) -> Self {
        let mut fw_cfg = Self {
            items: Vec::new(),
            state: FwCfgState::default(),
        };
        fw_cfg.add(Key::SIGNATURE, b"QEMU".as_slice());
        fw_cfg.add(Key::FEATURES, TRADITIONAL.to_le_bytes().to_vec());
        fw_cfg.add(Key::CPUS, cpus.to_le_bytes().to_vec());
        fw_cfg.add(Key::CPUS_MAX, cpus.to_le_bytes().to_vec());
        fw_cfg.add(Key::FILES, [0; 4].as_slice());
        if let Some(kernel) = kernel {
            fw_cfg.sized(Key::KERNEL_SIZE, Key::KERNEL, kernel.kernel);
            if let Some(initrd) = kernel.initrd {
                fw_cfg.sized(Key::INITRD_SIZE, Key::INITRD, initrd);
            }
            if !kernel.command_line.is_empty() {
                let mut text = kernel.command_line.as_bytes().to_vec();
                text.push(0);
                fw_cfg.sized(Key::COMMAND_LINE_SIZE, Key::COMMAND_LINE, text);
            }
        }
        fw_cfg
    }

    fn add(&mut self, key: Key, bytes: impl Into<Cow<'static, [u8]>>) {
        let bytes = bytes.into();
        self.items.push(Item { key, bytes });
    }

    /// An item, and another that says how long it is.
    fn sized(&mut self, size: Key, key: Key, bytes: impl Into<Cow<'static, [u8]>>) {
        let bytes = bytes.into();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.add(size, len.to_le_bytes().to_vec());
        self.add(key, bytes);
    }

    /// Reads. Each byte is read once, the first at the lowest address; past an item's end there are zeros.
    pub fn read(&mut self, offset: u64, size: AccessSize) -> u64 {
        if !DATA.contains(&offset) {
            return 0;
        }
        let selected = Key(self.state.selected);
        let item = self.items.iter().find(|item| item.key == selected);
        let from = usize::try_from(self.state.read).unwrap_or(usize::MAX);
        let rest = item.and_then(|item| item.bytes.get(from..));
        let mut value = [0; 8];
        for (to, from) in value
            .iter_mut()
            .zip(rest.unwrap_or_default())
            .take(size.bytes() as usize)
        {
            *to = *from;
        }
        self.state.read = self.state.read.saturating_add(size.bytes());
        u64::from_le_bytes(value)
    }

    /// Writes. The selector is 16 bits, the high byte first.
    pub fn write(&mut self, offset: u64, size: AccessSize, value: u64) {
        if offset == SELECTOR && size == AccessSize::Half {
            self.state = FwCfgState {
                selected: (value as u16).swap_bytes() & KEY,
                read: 0,
            };
        }
    }

    /// Puts it into the state of a machine that was just switched on.
    pub fn reset(&mut self) {
        self.state = FwCfgState::default();
    }

    /// Gives all it remembers.
    pub fn save(&self) -> FwCfgState {
        self.state
    }

    /// Takes up what [`FwCfg::save`] gave.
    pub fn restore(&mut self, state: &FwCfgState) {
        self.state = *state;
    }
}
