//! A bank of parallel NOR flash: CFI with the Intel command set, as QEMU's `virt` has two.
//!
//! # Purpose
//!
//! Firmware keeps its code in one bank and its variables in the other. A bank is two 16-bit chips side by
//! side that are always told the same: 32 bits wide, sectors of 256 KiB. What is stored is the owner's memory;
//! this is what the chips make of writes, and what they show while it is not that memory.
//!
//! # Invariants
//!
//! - While [`Pflash::view`] is [`View::Array`], reads see the memory and need not come here. A write that ends
//!   that is known beforehand ([`Pflash::leaves_array`]), so that the owner can see to it that reads come here first.
//! - Programming only clears bits; setting them takes an erase, of a whole sector.
//! - An access gives its owner at most [`BUFFER`] bytes to program, an instruction [`ERASE_STEP`] to erase. The chips are busy
//!   until a sector is erased, and go on by a step with each instruction that has an access, as a driver's polling makes them.
//! - What is protected keeps its content: all of a read-only bank, and the sectors that no memory stands for.
//!
//! # Concurrency
//!
//! `&mut self`; the owner locks.
//!
//! Specification: JEDEC JEP137 and JESD68.01 (CFI); Intel 290737 (the basic and the extended command set); the
//! identity and geometry are those of QEMU's `virt`, which U-Boot, EDK2 and Linux were built for.

use crate::AccessSize;
use core::ops::Range;

#[cfg(test)]
mod tests;

/// Bytes of a sector, what an erase is about.
pub const SECTOR: u64 = 256 << 10;
/// Bytes of both chips' write buffers together.
pub const BUFFER: usize = 512;
/// Bytes that are erased in a step, a divisor of a sector.
pub const ERASE_STEP: u64 = 8 << 10;

/// The chips: two, each with half of every word.
const CHIPS: u64 = 2;
/// Bytes of a word: both chips' 16 bits.
const WORD: u64 = 4;
const WORDS: usize = BUFFER / 8;
/// The most writes that fill the buffer. U-Boot takes the bank for one chip of 16 bits, as it does on QEMU, and
/// each of its writes counts as one, as there.
const WRITES: usize = BUFFER / 2;

/// Intel, and a part that QEMU made up.
const MANUFACTURER: u16 = 0x89;
const PART: u16 = 0x18;

const READY: u8 = 0x80;
const ERASE_ERROR: u8 = 0x20;
const PROGRAM_ERROR: u8 = 0x10;
const LOCKED: u8 = 0x02;
/// Both errors at once: the commands were not in their order.
const SEQUENCE_ERROR: u8 = ERASE_ERROR | PROGRAM_ERROR;

/// What is done with a bank's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// It can be programmed and erased.
    Writable,
    /// It cannot.
    ReadOnly,
}

/// What reads see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// What is stored.
    Array,
    /// The chips' registers and tables: [`Pflash::read`].
    Registers,
}

/// What a write is to do to what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect<'a> {
    /// Nothing.
    Nothing,
    /// These words, from an offset on that is a multiple of 8, keep the bits that are set in these masks.
    Program {
        /// The first word's offset in the bank.
        offset: u64,
        /// A mask a word of 64 bits.
        masks: &'a [u64],
    },
}

/// What the chips expect or are at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// Showing what is stored.
    #[default]
    Array,
    /// Showing their status.
    Status,
    /// Showing who they are.
    Identity,
    /// Showing the CFI table.
    Query,
    /// The next write is data.
    Program,
    /// The next write confirms an erase.
    Erase,
    /// The next write says what to do with a lock.
    Lock,
    /// The next write is the number of words less one.
    Count,
    /// So many writes of data are to come, for the block at this offset, or for any.
    Data {
        /// Writes.
        left: u32,
        /// Set by the first of them.
        block: Option<u64>,
    },
    /// The next write confirms programming the block at this offset.
    Confirm {
        /// Its offset.
        block: u64,
    },
    /// Busy: erasing the sector that ends here, from here on.
    Erasing {
        /// The next byte to erase.
        next: u64,
        /// The first past the sector.
        end: u64,
    },
}

/// All that a bank remembers, beside what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PflashState {
    /// What it expects or is at.
    pub mode: Mode,
    /// The errors in its status.
    pub errors: u8,
    /// The write buffer, as masks.
    pub buffer: [u64; WORDS],
}

/// A bank.
#[derive(Debug)]
pub struct Pflash {
    size: u64,
    stored: u64,
    protection: Protection,
    state: PflashState,
}

const RESET: PflashState = PflashState {
    mode: Mode::Array,
    errors: 0,
    buffer: [!0; WORDS],
};

/// A command, the low byte of what is written.
mod command {
    pub const WORD_PROGRAM: u8 = 0x40;
    pub const WORD_PROGRAM_ALSO: u8 = 0x10;
    pub const BLOCK_ERASE: u8 = 0x20;
    pub const CLEAR_STATUS: u8 = 0x50;
    pub const LOCK_SETUP: u8 = 0x60;
    pub const READ_STATUS: u8 = 0x70;
    pub const READ_IDENTITY: u8 = 0x90;
    pub const QUERY: u8 = 0x98;
    pub const BUFFERED_PROGRAM: u8 = 0xe8;
    pub const CONFIRM: u8 = 0xd0;
    pub const READ_ARRAY: u8 = 0xff;
    pub const LOCK: u8 = 0x01;
    pub const LOCK_DOWN: u8 = 0x2f;
}

impl Pflash {
    /// Makes a bank of `size` bytes, whole sectors, of which the first `stored` have memory behind them.
    pub const fn new(size: u64, stored: u64, protection: Protection) -> Self {
        Self {
            size,
            stored,
            protection,
            state: RESET,
        }
    }

    /// What reads see now.
    pub fn view(&self) -> View {
        match self.state.mode {
            Mode::Array => View::Array,
            _ => View::Registers,
        }
    }

    /// Whether writing `value` now makes reads see something else than what is stored.
    pub fn leaves_array(&self, value: u64) -> bool {
        let shown = |mode| !matches!(mode, None | Some(Mode::Array));
        self.view() == View::Array && shown(next_mode(value as u8))
    }

    /// What the chips do by themselves, before an instruction's first access: bytes of the bank to be erased now. Those after it
    /// find them busy: one with many must not erase as often.
    pub fn work(&mut self) -> Option<Range<u64>> {
        let Mode::Erasing { next, end } = self.state.mode else {
            return None;
        };
        let until = next.saturating_add(ERASE_STEP).min(end);
        self.state.mode = match until == end {
            true => Mode::Status,
            false => Mode::Erasing { next: until, end },
        };
        Some(next..until)
    }

    /// Reads what the chips show where that is not what is stored.
    pub fn read(&self, offset: u64, size: AccessSize) -> u64 {
        (0..size.bytes()).rev().fold(0, |value, byte| {
            let at = offset.wrapping_add(byte);
            let half = self.register(at / WORD).to_le_bytes();
            value << 8 | u64::from(half[(at % CHIPS) as usize])
        })
    }

    /// What each chip shows for a word.
    fn register(&self, word: u64) -> u16 {
        match self.state.mode {
            Mode::Array => u16::MAX,
            Mode::Identity => match word % (SECTOR / WORD) {
                0 => MANUFACTURER,
                1 => PART,
                // Bit 0: locked; bit 1: for good.
                2 if !self.may_change(word * WORD, WORD) => 0b11,
                _ => 0,
            },
            Mode::Query => u16::from(self.query(word)),
            Mode::Erasing { .. } => u16::from(self.state.errors),
            _ => u16::from(READY | self.state.errors),
        }
    }

    /// A byte of the CFI table. What it says is about one chip.
    fn query(&self, at: u64) -> u8 {
        let sectors = self.size / SECTOR;
        let sector = SECTOR / CHIPS / 256;
        match at {
            0x10 | 0x31 => [b'Q', b'P'][usize::from(at == 0x31)],
            0x11 | 0x32 => b'R',
            0x12 => b'Y',
            // The Intel extended command set, and where its own table is. There is no alternative.
            0x13 => 0x01,
            0x15 => 0x31,
            // 4.5 to 5.5 V.
            0x1b => 0x45,
            0x1c => 0x55,
            // Powers of two: 128 us to program a word or a buffer, 1 s to erase a sector; 16 times that at most.
            0x1f | 0x20 => 0x07,
            0x21 => 0x0a,
            0x23..=0x25 => 0x04,
            0x27 => (self.size / CHIPS).trailing_zeros() as u8,
            // 8 and 16 bits.
            0x28 => 0x02,
            0x2a => (BUFFER as u64 / CHIPS).trailing_zeros() as u8,
            // One region: its sectors less one, and their size in 256 bytes.
            0x2c => 1,
            0x2d => sectors.wrapping_sub(1) as u8,
            0x2e => (sectors.wrapping_sub(1) >> 8) as u8,
            0x2f => sector as u8,
            0x30 => (sector >> 8) as u8,
            0x33 => b'I',
            0x34 => b'1',
            0x35 => b'0',
            // One protection register, with nothing in it.
            0x3f => 0x01,
            _ => 0,
        }
    }

    /// Takes a write of `value`. What is stored changes as the effect says.
    pub fn write(&mut self, offset: u64, size: AccessSize, value: u64) -> Effect<'_> {
        let command = value as u8;
        match self.state.mode {
            // Busy. Suspending is not offered.
            Mode::Erasing { .. } => {}
            Mode::Program => {
                self.state.buffer = RESET.buffer;
                let block = self.put(offset, size, value);
                return self.program(block);
            }
            Mode::Erase => match command {
                command::CONFIRM if self.may_change(offset, 1) => {
                    let next = offset / SECTOR * SECTOR;
                    let end = next + SECTOR;
                    self.state.mode = Mode::Erasing { next, end };
                }
                command::CONFIRM => self.fail(ERASE_ERROR | LOCKED),
                command::READ_ARRAY => self.state.mode = Mode::Array,
                _ => self.fail(SEQUENCE_ERROR),
            },
            // Locks that last are no use to who has none that do not.
            Mode::Lock => match command {
                command::CONFIRM | command::LOCK | command::LOCK_DOWN => {
                    self.state.mode = Mode::Status;
                }
                command::READ_ARRAY => self.state.mode = Mode::Array,
                _ => self.fail(SEQUENCE_ERROR),
            },
            Mode::Count => {
                let left = u32::from(value as u16) + 1;
                match left as usize <= WRITES {
                    true => self.state.mode = Mode::Data { left, block: None },
                    false => self.fail(SEQUENCE_ERROR),
                }
            }
            Mode::Data { left, block } => match self.put(offset, size, value) {
                Some(at) if block.is_none_or(|block| block == at) => {
                    self.state.mode = match left.saturating_sub(1) {
                        0 => Mode::Confirm { block: at },
                        left => Mode::Data {
                            left,
                            block: Some(at),
                        },
                    };
                }
                // What is written at once lies in one block.
                _ => self.fail(SEQUENCE_ERROR),
            },
            Mode::Confirm { block } if command == command::CONFIRM => {
                return self.program(Some(block));
            }
            Mode::Confirm { .. } => self.fail(SEQUENCE_ERROR),
            Mode::Array | Mode::Status | Mode::Identity | Mode::Query => {
                if command == command::CLEAR_STATUS {
                    self.state.errors = 0;
                }
                if command == command::BUFFERED_PROGRAM {
                    self.state.buffer = RESET.buffer;
                }
                if let Some(mode) = next_mode(command) {
                    self.state.mode = mode;
                }
            }
        }
        Effect::Nothing
    }

    /// Puts what is written at `offset` into the buffer, if it lies in one block. Returns that block's offset.
    fn put(&mut self, offset: u64, size: AccessSize, value: u64) -> Option<u64> {
        let block = offset / BUFFER as u64 * BUFFER as u64;
        let first = (offset - block) as usize;
        let count = size.bytes() as usize;
        if first + count > BUFFER {
            return None;
        }
        for (byte, at) in value.to_le_bytes().into_iter().zip(first..first + count) {
            let shift = at % 8 * 8;
            if let Some(word) = self.state.buffer.get_mut(at / 8) {
                *word = *word & !(0xff << shift) | u64::from(byte) << shift;
            }
        }
        Some(block)
    }

    fn program(&mut self, block: Option<u64>) -> Effect<'_> {
        match block {
            None => self.fail(SEQUENCE_ERROR),
            Some(block) if !self.may_change(block, BUFFER as u64) => {
                self.fail(PROGRAM_ERROR | LOCKED);
            }
            Some(offset) => {
                self.state.mode = Mode::Status;
                let masks = &self.state.buffer;
                let begin = masks.iter().take_while(|mask| **mask == !0).count();
                let spare = masks.iter().rev().take_while(|mask| **mask == !0).count();
                let masks = masks
                    .get(begin..WORDS.saturating_sub(spare))
                    .unwrap_or_default();
                let offset = offset + begin as u64 * 8;
                return Effect::Program { offset, masks };
            }
        }
        Effect::Nothing
    }

    fn fail(&mut self, errors: u8) {
        self.state.errors |= errors;
        self.state.mode = Mode::Status;
    }

    fn may_change(&self, offset: u64, len: u64) -> bool {
        let stored = self.stored / SECTOR * SECTOR;
        let end = offset.checked_add(len);
        self.protection == Protection::Writable && end.is_some_and(|end| end <= stored)
    }

    /// Puts it into the state of a bank that was just switched on. What is stored stays; a sector that was being
    /// erased stays as far as it has come.
    pub fn reset(&mut self) {
        self.state = RESET;
    }

    /// Gives all it remembers.
    pub fn save(&self) -> PflashState {
        self.state
    }

    /// Takes up what [`Pflash::save`] gave, of any bank.
    pub fn restore(&mut self, state: &PflashState) {
        self.state = *state;
        let (stored, own) = (self.stored, self.protection == Protection::Writable);
        if let Mode::Erasing { next, end } = state.mode
            && !(own && next < end && end <= stored && end - next <= SECTOR)
        {
            self.state.mode = Mode::Status;
        }
        self.state.errors &= ERASE_ERROR | PROGRAM_ERROR | LOCKED;
    }
}

/// What a command brings the chips to when they expect one. `None`: it changes nothing in that. Unknown ones
/// lead back to what is stored: firmware that does not know yet that it runs from flash writes its variables there.
fn next_mode(command: u8) -> Option<Mode> {
    Some(match command {
        command::CLEAR_STATUS => return None,
        command::READ_STATUS => Mode::Status,
        command::READ_IDENTITY => Mode::Identity,
        command::QUERY => Mode::Query,
        command::WORD_PROGRAM | command::WORD_PROGRAM_ALSO => Mode::Program,
        command::BLOCK_ERASE => Mode::Erase,
        command::LOCK_SETUP => Mode::Lock,
        command::BUFFERED_PROGRAM => Mode::Count,
        _ => Mode::Array,
    })
}
