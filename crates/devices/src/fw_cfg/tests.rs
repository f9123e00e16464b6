//! What firmware asks, and what nobody should.

use std::vec::Vec;

use super::*;

fn select(fw_cfg: &mut FwCfg, key: u16) {
    fw_cfg.write(8, AccessSize::Half, u64::from(key.swap_bytes()));
}

fn bytes(fw_cfg: &mut FwCfg, key: u16, count: usize) -> Vec<u8> {
    select(fw_cfg, key);
    (0..count)
        .map(|_| fw_cfg.read(0, AccessSize::Byte) as u8)
        .collect()
}

fn word(fw_cfg: &mut FwCfg, key: u16) -> u32 {
    select(fw_cfg, key);
    fw_cfg.read(0, AccessSize::Word) as u32
}

#[test]
fn firmware_finds_it_and_what_it_is_to_start() {
    let kernel = Kernel {
        kernel: b"MZ is a kernel",
        initrd: Some(b"0707"),
        command_line: "quiet",
    };
    let mut fw_cfg = FwCfg::new(3, Some(kernel));
    assert_eq!(bytes(&mut fw_cfg, 0, 4), b"QEMU");
    assert_eq!(word(&mut fw_cfg, 1), 1, "no DMA");
    assert_eq!(fw_cfg.read(16, AccessSize::Double), 0, "nor its signature");
    assert_eq!(word(&mut fw_cfg, 5), 3);
    assert_eq!(word(&mut fw_cfg, 0x0f), 3);
    assert_eq!(word(&mut fw_cfg, 0x19), 0, "no files");
    assert_eq!(word(&mut fw_cfg, 8), 14);
    assert_eq!(bytes(&mut fw_cfg, 0x11, 16), b"MZ is a kernel\0\0");
    assert_eq!(word(&mut fw_cfg, 0x0b), 4);
    assert_eq!(bytes(&mut fw_cfg, 0x12, 4), b"0707");
    assert_eq!(word(&mut fw_cfg, 0x14), 6);
    assert_eq!(bytes(&mut fw_cfg, 0x15, 7), b"quiet\0\0");
    // By accesses of all sizes, one after the other.
    select(&mut fw_cfg, 0x11);
    assert_eq!(fw_cfg.read(0, AccessSize::Half), 0x5a4d);
    assert_eq!(
        fw_cfg.read(0, AccessSize::Double),
        u64::from_le_bytes(*b" is a ke")
    );
    assert_eq!(
        fw_cfg.read(4, AccessSize::Word),
        u64::from(u32::from_le_bytes(*b"rnel"))
    );
    assert_eq!(fw_cfg.read(0, AccessSize::Double), 0);
}

#[test]
fn what_there_is_not_has_no_size() {
    let mut fw_cfg = FwCfg::new(1, None);
    for key in [8, 0x0b, 0x11, 0x12, 0x14, 0x15, 0x17, 0x20, 0x8000, 0xffff] {
        assert_eq!(word(&mut fw_cfg, key), 0, "{key:#x}");
    }
    // An item asked for to be written is the same item.
    assert_eq!(word(&mut fw_cfg, 0x4001), 1);
}

#[test]
fn nonsense_does_no_harm() {
    let mut fw_cfg = FwCfg::new(1, None);
    for size in [AccessSize::Byte, AccessSize::Word, AccessSize::Double] {
        fw_cfg.write(8, size, u64::MAX);
        fw_cfg.write(0, size, u64::MAX);
        fw_cfg.write(16, size, 0x4000_0000);
        fw_cfg.write(u64::MAX, size, 1);
        assert_eq!(fw_cfg.read(8, size), 0);
        assert_eq!(fw_cfg.read(u64::MAX, size), 0);
    }
    assert_eq!(
        fw_cfg.save(),
        FwCfgState::default(),
        "none of it is a selector"
    );
    fw_cfg.restore(&FwCfgState {
        selected: 0,
        read: u64::MAX,
    });
    assert_eq!(fw_cfg.read(0, AccessSize::Double), 0);
    assert_eq!(fw_cfg.save().read, u64::MAX);
    fw_cfg.reset();
    assert_eq!(
        fw_cfg.read(0, AccessSize::Word) as u32,
        u32::from_le_bytes(*b"QEMU")
    );
}
