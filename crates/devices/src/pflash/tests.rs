//! The flash: what the drivers of EDK2, U-Boot and Linux do with it, and what nobody should.

use std::vec;
use std::vec::Vec;

use super::*;

const SIZE: u64 = 64 << 20;
/// Two sectors have memory.
const STORED: u64 = 2 * SECTOR;

/// A bank with what is stored in it.
struct Bank {
    chips: Pflash,
    stored: Vec<u8>,
}

impl Bank {
    fn new() -> Self {
        Self {
            chips: Pflash::new(SIZE, STORED, Protection::Writable),
            stored: vec![0xff; STORED as usize],
        }
    }

    fn work(&mut self) {
        if let Some(range) = self.chips.work() {
            assert!(range.end - range.start <= ERASE_STEP);
            self.stored[range.start as usize..range.end as usize].fill(0xff);
        }
    }

    fn write_as(&mut self, offset: u64, size: AccessSize, value: u64) {
        self.work();
        let before = self.chips.view();
        let leaves = self.chips.leaves_array(value);
        if let Effect::Program { offset, masks } = self.chips.write(offset, size, value) {
            assert!(offset.is_multiple_of(8) && masks.len() * 8 <= BUFFER);
            let end = offset + 8 * masks.len() as u64;
            assert!(end <= STORED, "{offset:#x}: {} words", masks.len());
            let stored = self.stored[offset as usize..end as usize].chunks_mut(8);
            for (word, mask) in stored.zip(masks) {
                for (byte, mask) in word.iter_mut().zip(mask.to_le_bytes()) {
                    *byte &= mask;
                }
            }
        }
        let left = before == View::Array && self.chips.view() == View::Registers;
        assert_eq!(leaves, left, "{value:#x}");
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.write_as(offset, AccessSize::Word, u64::from(value));
    }

    /// A command for both chips.
    fn tell(&mut self, offset: u64, command: u8) {
        self.write(offset, u32::from(command) * 0x1_0001);
    }

    fn read_as(&mut self, offset: u64, size: AccessSize) -> u64 {
        self.work();
        if self.chips.view() == View::Registers {
            return self.chips.read(offset, size);
        }
        let bytes = (offset..offset + size.bytes()).rev();
        bytes.fold(0, |value, at| {
            value << 8 | u64::from(*self.stored.get(at as usize).unwrap_or(&0xff))
        })
    }

    fn read(&mut self, offset: u64) -> u32 {
        self.read_as(offset, AccessSize::Word) as u32
    }

    /// EDK2's way of waiting.
    fn status(&mut self) -> u32 {
        for _ in 0..1000 {
            self.tell(0, 0x70);
            let status = self.read(0);
            if status & 0x80_0080 == 0x80_0080 {
                return status;
            }
        }
        panic!("busy for ever");
    }

    fn program(&mut self, offset: u64, value: u32) -> u32 {
        self.tell(offset, 0x40);
        self.write(offset, value);
        self.settled()
    }

    fn erase(&mut self, offset: u64) -> u32 {
        self.tell(offset, 0x20);
        self.tell(offset, 0xd0);
        self.settled()
    }

    fn buffered(&mut self, offset: u64, words: &[u32]) -> u32 {
        self.tell(offset, 0xe8);
        assert_eq!(self.read(offset) & 0x80, 0x80, "the buffer is free");
        let count = words.len() as u32 - 1;
        self.write(offset, count | count << 16);
        for (word, at) in words.iter().zip((offset..).step_by(4)) {
            self.write(at, *word);
        }
        self.tell(0, 0xd0);
        self.settled()
    }

    /// The status, and then the array again with the status forgotten.
    fn settled(&mut self) -> u32 {
        let status = self.status();
        self.tell(0, 0x50);
        self.tell(0, 0xff);
        assert_eq!(self.chips.view(), View::Array);
        status
    }
}

#[test]
fn edk2_programs_a_word_a_buffer_and_erases() {
    let mut bank = Bank::new();
    // It asks whether the block is locked.
    bank.tell(SECTOR, 0x90);
    assert_eq!(bank.read(SECTOR + 8), 0);
    bank.tell(0, 0xff);
    assert_eq!(bank.program(SECTOR + 4, 0x1234_5678), 0x80_0080);
    assert_eq!(bank.read(SECTOR + 4), 0x1234_5678);
    let words: Vec<u32> = (0..32).map(|n| 0xabcd_0000 | n).collect();
    assert_eq!(bank.buffered(SECTOR + 128, &words), 0x80_0080);
    for (word, at) in words.iter().zip((SECTOR + 128..).step_by(4)) {
        assert_eq!(bank.read(at), *word);
    }
    assert_eq!(bank.read(SECTOR + 124), !0);
    assert_eq!(bank.read(SECTOR + 256), !0);
    assert_eq!(bank.program(0, 0), 0x80_0080);
    assert_eq!(bank.erase(SECTOR + 0x100), 0x80_0080);
    assert!(
        bank.stored[SECTOR as usize..]
            .iter()
            .all(|byte| *byte == 0xff)
    );
    assert_eq!(bank.read(0), 0, "the sector beside it stays");
}

#[test]
fn programming_only_clears_bits() {
    let mut bank = Bank::new();
    bank.program(8, 0xffff_00ff);
    bank.program(8, 0x0f0f_0f0f);
    assert_eq!(bank.read(8), 0x0f0f_000f);
    assert_eq!(bank.read(12), !0, "the rest of the word stays");
    bank.buffered(8, &[0xffff_fff0, 0x7fff_ffff]);
    assert_eq!((bank.read(8), bank.read(12)), (0x0f0f_0000, 0x7fff_ffff));
}

/// A driver tries each width of the bank, and of its chips, until it reads `QRY`.
#[test]
fn a_probe_finds_two_chips_of_16_bits() {
    let mut bank = Bank::new();
    let sizes = [
        AccessSize::Byte,
        AccessSize::Half,
        AccessSize::Word,
        AccessSize::Double,
    ];
    let mut found = Vec::new();
    for port in sizes {
        for chip in sizes
            .into_iter()
            .take_while(|chip| chip.bytes() <= port.bytes())
        {
            let repeated = |byte: u8| {
                let every = (0..port.bytes()).step_by(chip.bytes() as usize);
                every.fold(0, |value, at| value | u64::from(byte) << (8 * at))
            };
            for reset in [0xf0, 0xff] {
                bank.write_as(0, port, repeated(reset));
            }
            bank.write_as(0x55 * port.bytes(), port, repeated(0x98));
            let is = |bank: &mut Bank, at: u64, byte| {
                bank.read_as(at * port.bytes(), port) == repeated(byte)
            };
            if is(&mut bank, 0x10, b'Q') && is(&mut bank, 0x11, b'R') && is(&mut bank, 0x12, b'Y') {
                found.push((port, chip));
            }
            bank.write_as(0, port, repeated(0xff));
        }
    }
    assert_eq!(found, [(AccessSize::Word, AccessSize::Half)]);
}

/// It takes the bank for one chip of 16 bits, on QEMU too, and sees each sector as two.
#[test]
fn uboot_saves_its_environment_by_halves() {
    let mut bank = Bank::new();
    bank.stored.fill(0x5a);
    let tell = |bank: &mut Bank, at, command| bank.write_as(at, AccessSize::Half, command);
    for half in [0, SECTOR / 2] {
        tell(&mut bank, half, 0x50);
        tell(&mut bank, half, 0x20);
        tell(&mut bank, half, 0xd0);
        // A step with each look, the first included.
        let ready = (0..SECTOR / ERASE_STEP)
            .find(|_| bank.read_as(half, AccessSize::Half) == 0x80)
            .expect("busy for ever");
        assert_eq!(ready, SECTOR / ERASE_STEP - 1);
        tell(&mut bank, half, 0xff);
    }
    assert_eq!(bank.read(SECTOR - 4), !0);
    assert_eq!(bank.read(SECTOR), 0x5a5a_5a5a);
    tell(&mut bank, 256, 0xe8);
    assert_eq!(bank.read_as(256, AccessSize::Half), 0x80);
    tell(&mut bank, 256, 127);
    for at in (256..512).step_by(2) {
        tell(&mut bank, at, at);
    }
    tell(&mut bank, 256, 0xd0);
    assert_eq!(bank.settled(), 0x80_0080);
    for at in (256..512).step_by(2) {
        assert_eq!(bank.read_as(at, AccessSize::Half), at);
    }
    assert_eq!((bank.read(252), bank.read(512)), (!0, !0));
}

#[test]
fn the_table_says_what_the_bank_is() {
    let mut bank = Bank::new();
    bank.tell(0x154, 0x98);
    let mut byte = |at: u64| {
        let word = bank.read(at * 4);
        assert_eq!(word & 0xff00_ff00, 0);
        assert_eq!(word >> 16, word & 0xffff, "both chips say the same");
        word & 0xff
    };
    let text: Vec<u32> = [0x10, 0x11, 0x12, 0x31, 0x32, 0x33].map(&mut byte).into();
    assert_eq!(text, b"QRYPRI".map(u32::from));
    assert_eq!((byte(0x13), byte(0x14)), (1, 0), "Intel's extended set");
    assert_eq!((byte(0x15), byte(0x16)), (0x31, 0));
    assert_eq!(1u64 << byte(0x27), SIZE / 2);
    assert_eq!(1usize << byte(0x2a), BUFFER / 2);
    assert_eq!(byte(0x2c), 1);
    let sectors = (byte(0x2d) | byte(0x2e) << 8) + 1;
    let sector = (byte(0x2f) | byte(0x30) << 8) * 256;
    assert_eq!((sectors, sector), (256, 128 << 10));
    assert_eq!(u64::from(sectors * sector), SIZE / 2);
    assert_eq!((byte(0x51), byte(0x52), byte(0xfff)), (0, 0, 0));
    bank.tell(0, 0x90);
    assert_eq!((bank.read(0), bank.read(4)), (0x89_0089, 0x18_0018));
    assert_eq!(bank.read_as(4, AccessSize::Byte), 0x18);
    assert_eq!(bank.read_as(0, AccessSize::Double), 0x18_0018_0089_0089);
}

#[test]
fn what_is_protected_stays() {
    let mut code = Bank::new();
    code.stored.fill(0x5a);
    code.chips = Pflash::new(SIZE, STORED, Protection::ReadOnly);
    code.tell(0, 0x90);
    assert_eq!(code.read(8), 0x3_0003, "locked for good");
    code.tell(0, 0x60);
    code.tell(0, 0xd0);
    code.tell(0, 0xff);
    assert_eq!(code.program(0, 0), 0x92_0092);
    assert_eq!(code.buffered(0, &[0; 8]), 0x92_0092);
    assert_eq!(code.erase(0), 0xa2_00a2);
    assert!(code.stored.iter().all(|byte| *byte == 0x5a));
    // So is what no memory stands for.
    let mut bank = Bank::new();
    assert_eq!(bank.program(STORED, 0), 0x92_0092);
    assert_eq!(bank.program(STORED - 4, 0), 0x80_0080);
    assert_eq!(bank.erase(STORED), 0xa2_00a2);
    assert_eq!(bank.erase(SIZE - 4), 0xa2_00a2);
    bank.tell(0, 0x90);
    assert_eq!(
        (bank.read(SECTOR + 8), bank.read(STORED + 8)),
        (0, 0x3_0003)
    );
    // And a sector that has it in part.
    bank.chips = Pflash::new(SIZE, STORED - 8, Protection::Writable);
    assert_eq!(bank.erase(SECTOR), 0xa2_00a2);
}

#[test]
fn errors_stay_until_they_are_cleared() {
    let mut bank = Bank::new();
    bank.tell(0, 0x20);
    bank.tell(0, 0x20);
    assert_eq!(bank.read(0), 0xb0_00b0, "an erase that was not confirmed");
    bank.tell(0, 0xff);
    assert_eq!(bank.read(0), !0);
    bank.tell(0, 0x70);
    assert_eq!(bank.read(0), 0xb0_00b0);
    bank.tell(0, 0x50);
    assert_eq!(bank.read(0), 0x80_0080);
    // More words than there is room for, a confirmation that is none, and words of two blocks.
    for sequence in [
        &[(0, 0xe8), (0, 0x0100_0100)][..],
        &[(0, 0xe8), (0, 0), (0, 1), (0, 0xff)],
        &[(0, 0xe8), (0, 3), (0, 1), (BUFFER as u64, 1)],
        &[(0, 0x60), (0, 7)],
    ] {
        for (offset, value) in sequence {
            bank.write(*offset, *value);
        }
        assert_eq!(bank.settled(), 0xb0_00b0, "{sequence:x?}");
        assert_eq!(bank.read(0), !0);
    }
    bank.tell(0, 0x40);
    bank.write_as(BUFFER as u64 - 4, AccessSize::Double, 0);
    assert_eq!(bank.settled(), 0xb0_00b0, "over a block's end");
}

/// What EDK2's first instructions do to the code bank.
#[test]
fn stray_writes_do_not_hide_the_array() {
    let mut bank = Bank::new();
    for value in [0x17384, 0, 0x50, 0xd0, 1, 0x03, 0xaa, 0xffff_fff0] {
        assert!(!bank.chips.leaves_array(u64::from(value)));
        bank.write(0x1cb20, value);
        assert_eq!(bank.chips.view(), View::Array, "{value:#x}");
    }
}

#[test]
fn an_erase_takes_its_steps_and_nothing_else_meanwhile() {
    let mut bank = Bank::new();
    bank.stored.fill(0);
    bank.tell(0, 0x20);
    bank.tell(0, 0xd0);
    let mut steps = 0;
    loop {
        // Neither of these is heard.
        bank.tell(0, 0xff);
        steps += 1;
        if bank.chips.view() == View::Array {
            break;
        }
        assert!(matches!(
            bank.chips.save().mode,
            Mode::Erasing { .. } | Mode::Status
        ));
    }
    assert_eq!(steps, SECTOR / ERASE_STEP);
    let (first, second) = bank.stored.split_at(SECTOR as usize);
    assert!(first.iter().all(|byte| *byte == 0xff) && second.iter().all(|byte| *byte == 0));
    // A reset in the middle leaves it in the middle.
    bank.stored.fill(0);
    bank.tell(0, 0x20);
    bank.tell(0, 0xd0);
    assert_eq!(bank.read(0) & 0x80, 0);
    bank.chips.reset();
    assert_eq!(bank.chips.work(), None);
    assert_eq!(bank.read(0), !0);
    assert_eq!(bank.read(SECTOR - 4), 0);
}

#[test]
fn state_is_kept_and_checked() {
    let mut bank = Bank::new();
    bank.tell(0, 0xe8);
    bank.write(0, 1);
    bank.write(0, 0x1111_1111);
    let state = bank.chips.save();
    let mut other = Bank::new();
    other.chips.restore(&state);
    assert_eq!(other.chips.save(), state);
    other.write(4, 0x2222_2222);
    other.tell(0, 0xd0);
    other.tell(0, 0xff);
    assert_eq!(other.read_as(0, AccessSize::Double), 0x2222_2222_1111_1111);
    let never = u64::MAX;
    for (next, end) in [
        (0, never),
        (never, 0),
        (STORED, STORED + 1),
        (0, STORED),
        (5, 5),
    ] {
        other.chips.restore(&PflashState {
            mode: Mode::Erasing { next, end },
            errors: 0xff,
            buffer: [0; WORDS],
        });
        assert_eq!(other.chips.work(), None, "{next:#x} {end:#x}");
        assert_eq!(other.read(0), 0xb2_00b2);
    }
    other.chips.restore(&PflashState {
        mode: Mode::Confirm { block: never },
        ..state
    });
    other.tell(0, 0xd0);
    assert_eq!(other.read(0), 0x92_0092);
}

/// Whatever is written where: no panic, bounded effects, and memory changes only where it may.
#[test]
fn nonsense_does_no_harm() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let commands = [
        0x10, 0x20, 0x40, 0x50, 0x60, 0x70, 0x90, 0x98, 0xe8, 0xd0, 0xff, 0, 1,
    ];
    let sizes = [
        AccessSize::Byte,
        AccessSize::Half,
        AccessSize::Word,
        AccessSize::Double,
    ];
    let mut bank = Bank::new();
    for _ in 0..200_000 {
        let size = sizes[random() as usize % 4];
        let value = match random() % 4 {
            0 => random(),
            _ => commands[random() as usize % commands.len()],
        };
        let offset = match random() % 4 {
            0 => random() % (SIZE - 8),
            _ => random() % (2 * BUFFER as u64),
        };
        match random() % 3 {
            0 => drop(bank.read_as(offset, size)),
            _ => bank.write_as(offset, size, value),
        }
    }
    assert!(
        bank.stored.iter().any(|byte| *byte != 0xff),
        "it did something"
    );
    // Offsets that no bank has.
    for mode in [0x20, 0x40, 0xe8, 0x90, 0x98] {
        for size in sizes {
            bank.chips.reset();
            bank.chips.write(0, AccessSize::Word, mode);
            bank.chips.read(u64::MAX, size);
            let effect = bank.chips.write(u64::MAX, size, 0xd0);
            assert_eq!(effect, Effect::Nothing);
        }
    }
}
