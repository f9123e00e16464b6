//! Register by register: what is fixed, what is stored, what is not there.

use proptest::prelude::*;

use super::*;

const WORD: AccessSize = AccessSize::Word;

#[test]
fn distributor_identifies_a_gicv3_with_160_intids_and_one_security_state() {
    let board = Board::new(2);
    let typer = board.read_gicd(0x4);
    assert_eq!(32 * ((typer & 0x1f) + 1), 160);
    assert_eq!(typer >> 19 & 0x1f, 9, "ten intid bits");
    assert_eq!(typer & (1 << 10), 0, "no security extension: DS=1");
    assert_eq!(
        typer & (1 << 17 | 1 << 16 | 1 << 8 | 1 << 9 | 1 << 26),
        0,
        "no LPIs, MBIs, extended SPIs, NMIs, RSS"
    );
    assert_eq!(typer & (1 << 25), 0, "one-of-N supported: No1N clear");
    assert_eq!(board.read_gicd(0x8), 0x5400_043b);
    assert_eq!(board.read_gicd(0xffe8) >> 4 & 0xf, 3, "ArchRev");
    let ids: Vec<u64> = (0xffd0..0x1_0000)
        .step_by(4)
        .map(|offset| board.read_gicd(offset))
        .collect();
    assert_eq!(
        ids,
        [0x44, 0, 0, 0, 0x92, 0xb4, 0x3b, 0, 0x0d, 0xf0, 0x05, 0xb1]
    );
}

#[test]
fn control_keeps_the_group_enables_and_shows_affinity_routing() {
    let mut board = Board::new(1);
    for enables in 0..4 {
        board.gicd(0, 0xffff_fffc | enables);
        assert_eq!(
            board.read_gicd(0),
            0x50 | enables,
            "ARE, DS, enables; RWP never set"
        );
    }
}

#[test]
fn redistributors_say_who_they_are_and_which_is_last() {
    let board = Board::new(3);
    for index in 0..3 {
        let frame = Frame::Redistributor(vcpu(index));
        let read = |offset, size| board.vgic.mmio_read(V0, frame, offset, size);
        let typer = read(0x8, AccessSize::Double);
        assert_eq!(typer >> 32, index as u64, "affinity");
        assert_eq!(typer >> 8 & 0xffff, index as u64, "processor number");
        assert_eq!(
            typer & 0xff,
            if index == 2 { 1 << 4 } else { 0 },
            "last, no LPIs"
        );
        assert_eq!(read(0x8, WORD) | read(0xc, WORD) << 32, typer, "the halves");
        assert_eq!(read(0x4, WORD), 0x5400_043b);
        assert_eq!(read(0xffe8, WORD), 0x3b);
        assert_eq!(read(0xffe0, WORD), 0x93);
        assert_eq!(read(0x0, WORD), 0, "CTLR");
    }
    let beyond = Frame::Redistributor(vcpu(3));
    assert_eq!(board.vgic.mmio_read(V0, beyond, 0x8, AccessSize::Double), 0);
    let kick = board.vgic.mmio_write(V0, beyond, GICR_SGI + 0x100, WORD, 1);
    assert!(kick.is_none());
}

#[test]
fn waker_wakes_at_once() {
    let board = Board::new(2);
    let frame = Frame::Redistributor(vcpu(1));
    let read = || board.vgic.mmio_read(V0, frame, 0x14, WORD);
    assert_eq!(read(), 0b110, "asleep after reset");
    let _ = board.vgic.mmio_write(V0, frame, 0x14, WORD, 0);
    assert_eq!(read(), 0, "neither ProcessorSleep nor ChildrenAsleep");
    assert_eq!(
        board
            .vgic
            .mmio_read(V0, Frame::Redistributor(V0), 0x14, WORD),
        0b110,
        "the other still sleeps"
    );
    let _ = board.vgic.mmio_write(V0, frame, 0x14, WORD, 2);
    assert_eq!(read(), 0b110);
}

/// Everything that is set, cleared and read by set and clear registers.
#[test]
fn set_and_clear_registers_work_on_one_state() {
    for intid in [0, 15, 16, 27, 31, 32, 63, 64, 159] {
        for (set, clear) in [(0x100, 0x180), (0x200, 0x280), (0x300, 0x380)] {
            let mut board = Board::new(2);
            assert_eq!(board.read_bit(1, set, intid), 0);
            board.bit(1, set, intid);
            board.sync_all();
            assert_eq!(board.read_bit(1, set, intid), 1, "{set:#x} {intid}");
            assert_eq!(board.read_bit(1, clear, intid), 1);
            let others =
                (0..160).filter(|other| *other != intid && board.read_bit(1, set, *other) == 1);
            assert_eq!(others.count(), 0, "{set:#x} {intid} touched others");
            if intid < 32 {
                assert_eq!(board.read_bit(0, set, intid), 0, "the other vCPU's");
            }
            board.bit(1, clear, intid);
            board.sync_all();
            assert_eq!(board.read_bit(1, set, intid), 0);
        }
    }
}

#[test]
fn group_is_plain_storage() {
    let mut board = Board::new(1);
    board.gicd(0x84, 0x1234_5678);
    assert_eq!(board.read_gicd(0x84), 0x1234_5678);
    board.gicr(0, 0x80, 0xabcd_0123);
    assert_eq!(board.read_gicr(0, 0x80), 0xabcd_0123);
}

#[test]
fn priorities_have_five_bits_and_take_bytes_and_words() {
    let board = Board::new(1);
    for (frame, base) in [
        (Frame::Distributor, 0x400 + 36),
        (Frame::Redistributor(V0), GICR_SGI + 0x400 + 4),
    ] {
        let write = |offset, size, value| {
            assert!(
                board
                    .vgic
                    .mmio_write(V0, frame, base + offset, size, value)
                    .is_none()
            );
        };
        let read = |offset, size| board.vgic.mmio_read(V0, frame, base + offset, size);
        write(0, WORD, 0xffff_ffff_dead_a7ff);
        assert_eq!(read(0, WORD), 0xd8a8_a0f8);
        write(2, AccessSize::Byte, 0x17);
        assert_eq!(read(0, WORD), 0xd810_a0f8);
        assert_eq!(read(3, AccessSize::Byte), 0xd8);
        assert_eq!(read(4, WORD), 0, "the neighbours are untouched");
        for (offset, size) in [(0, AccessSize::Half), (0, AccessSize::Double), (2, WORD)] {
            write(offset, size, u64::MAX);
            assert_eq!(
                read(offset, size),
                0,
                "{size:?} at {offset} is not architected"
            );
        }
        assert_eq!(read(0, WORD), 0xd810_a0f8);
    }
}

#[test]
fn configuration_keeps_the_upper_bit_of_each_pair() {
    let mut board = Board::new(1);
    board.gicd(0xc08, 0xffff_ffff);
    assert_eq!(board.read_gicd(0xc08), 0xaaaa_aaaa);
    board.gicd(0xc08, 0x0000_0082);
    assert_eq!(board.read_gicd(0xc08), 0x82);
    assert_eq!(board.read_gicd(0xc0c), 0, "the other half of the word");
    board.gicd(0xc0c, 0x8000_0000);
    assert_eq!(
        (board.read_gicd(0xc08), board.read_gicd(0xc0c)),
        (0x82, 0x8000_0000)
    );
    assert_eq!(
        board.read_gicr(0, 0xc00),
        0xaaaa_aaaa,
        "SGIs are edge-triggered"
    );
    board.gicr(0, 0xc00, 0);
    assert_eq!(board.read_gicr(0, 0xc00), 0xaaaa_aaaa);
    board.gicr(0, 0xc04, 0x0080_0000);
    assert_eq!(board.read_gicr(0, 0xc04), 0x0080_0000);
    assert_eq!(board.read_gicr(0, 0xc00), 0xaaaa_aaaa);
}

#[test]
fn routes_are_64_bits_in_one_or_two_accesses() {
    let board = Board::new(1);
    let offset = 0x6000 + 8 * 40;
    let write = |offset, size, value| {
        let _ = board
            .vgic
            .mmio_write(V0, Frame::Distributor, offset, size, value);
    };
    let read = |offset, size| board.vgic.mmio_read(V0, Frame::Distributor, offset, size);
    write(offset, AccessSize::Double, u64::MAX);
    assert_eq!(read(offset, AccessSize::Double), 0xff_80ff_ffff);
    write(offset, WORD, 0xffff_ffff_0001_0203);
    assert_eq!(
        read(offset, AccessSize::Double),
        0xff_0001_0203,
        "the low half alone"
    );
    write(offset + 4, WORD, 0x7);
    assert_eq!(read(offset, AccessSize::Double), 0x7_0001_0203);
    assert_eq!(
        (read(offset, WORD), read(offset + 4, WORD)),
        (0x0001_0203, 7)
    );
    for offset in [0x6000, 0x6000 + 8 * 31, 0x6000 + 8 * 160, 0x7ff8] {
        write(offset, AccessSize::Double, 1);
        assert_eq!(read(offset, AccessSize::Double), 0, "no SPI at {offset:#x}");
    }
}

#[test]
fn private_interrupts_are_not_in_the_distributor() {
    let mut board = Board::new(1);
    for offset in [0x80, 0x100, 0x200, 0x300, 0x400, 0x41c, 0xc00, 0xc04] {
        board.gicd(offset, 0xffff_ffff);
        assert_eq!(board.read_gicd(offset), 0, "{offset:#x}");
    }
}

#[test]
fn what_is_not_there_reads_zero_and_ignores_writes() {
    let mut board = Board::new(1);
    let before = board.vgic.save();
    // TYPER2, STATUSR, SETSPI, ITARGETSR, IGRPMODR, NSACR, SGIR, CPENDSGIR, INMIR, words of SPIs beyond the last.
    for offset in [
        0xc, 0x10, 0x40, 0x820, 0xd04, 0xe08, 0xf00, 0xf10, 0xf84, 0x94, 0x114, 0x4a0, 0xc28,
        0x4000,
    ] {
        assert_eq!(board.read_gicd(offset), 0, "{offset:#x}");
        board.gicd(offset, 0xffff_ffff);
        assert_eq!(board.read_gicd(offset), 0, "{offset:#x} after a write");
    }
    for offset in [0x84, 0x104, 0x420, 0xc08, 0xd00, 0xe00, 0xf80, 0xffe8] {
        board.gicr(0, offset, 0xffff_ffff);
        assert_eq!(board.read_gicr(0, offset), 0, "SGI frame {offset:#x}");
    }
    // PROPBASER, PENDBASER, INVLPIR, SYNCR of a redistributor without LPIs.
    for offset in [0x70, 0x78, 0xa0, 0xc0] {
        let frame = Frame::Redistributor(V0);
        for size in [WORD, AccessSize::Double] {
            let _ = board.vgic.mmio_write(V0, frame, offset, size, u64::MAX);
            assert_eq!(board.vgic.mmio_read(V0, frame, offset, size), 0);
        }
    }
    assert_eq!(board.vgic.save(), before);
}

#[test]
fn bit_registers_take_words_only() {
    let board = Board::new(1);
    let before = board.vgic.save();
    for size in [AccessSize::Byte, AccessSize::Half, AccessSize::Double] {
        for (frame, offset) in [
            (Frame::Distributor, 0x108),
            (Frame::Distributor, 0),
            (Frame::Distributor, 0x208),
            (Frame::Redistributor(V0), GICR_SGI + 0x100),
            (Frame::Redistributor(V0), 0x14),
        ] {
            assert!(
                board
                    .vgic
                    .mmio_write(V0, frame, offset, size, u64::MAX)
                    .is_none()
            );
            assert_eq!(board.vgic.mmio_read(V0, frame, offset, size), 0);
        }
    }
    assert_eq!(board.vgic.save(), before);
}

#[test]
fn misaligned_accesses_are_ignored() {
    let board = Board::new(1);
    for (offset, size) in [
        (0x1, WORD),
        (0x2, WORD),
        (0x6144, AccessSize::Double),
        (0x429, WORD),
        (0x5, AccessSize::Half),
    ] {
        assert_eq!(
            board.vgic.mmio_read(V0, Frame::Distributor, offset, size),
            0,
            "{offset:#x}"
        );
        let kick = board
            .vgic
            .mmio_write(V0, Frame::Distributor, offset, size, u64::MAX);
        assert!(kick.is_none(), "{offset:#x}");
    }
    let typer = board
        .vgic
        .mmio_read(V0, Frame::Redistributor(V0), 0xc, AccessSize::Double);
    assert_eq!(typer, 0);
}

#[test]
fn reset_forgets_all_but_lines() {
    let mut board = Board::new(2);
    let fresh = Vgic::new(2).save();
    board.enable(0, 40);
    board.route(40, 1);
    board.priority(1, 27, 0x80);
    board.edge(1, 20);
    board.raise(1, 27, Link::Hardware(27));
    board.sgi(0, 1 << 40);
    for index in 0..2 {
        let _ = board.vgic.withdraw(vcpu(index), &mut board.cpus[index]);
    }
    board.vgic.reset();
    assert_eq!(board.vgic.save(), fresh);
    board.line(40, Level::High);
    board.vgic.reset();
    assert_eq!(board.vgic.save().shared[0].line, 1 << 8);
}

fn sizes() -> impl Strategy<Value = AccessSize> {
    prop_oneof![
        1 => Just(AccessSize::Byte),
        1 => Just(AccessSize::Half),
        4 => Just(AccessSize::Word),
        1 => Just(AccessSize::Double),
    ]
}

/// Offsets around where registers are, and anywhere.
fn offsets() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..0xe00,
        2 => 0x1_0000u64..0x1_0e00,
        1 => 0x6000u64..0x8000,
        1 => 0u64..0x2_0000,
        1 => any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest accesses: no panic, and a second read sees what the first saw. The list registers stay lawful.
    #[test]
    fn random_accesses_are_harmless(
        accesses in proptest::collection::vec((0usize..17, offsets(), sizes(), any::<u64>(), any::<bool>()), 1..300)
    ) {
        let mut board = Board::new(3);
        for (frame, offset, size, value, aligned) in accesses {
            let frame = VcpuIndex::new(frame).map_or(Frame::Distributor, Frame::Redistributor);
            let offset = if aligned { offset & !(size.bytes() - 1) } else { offset };
            let kick = board.vgic.mmio_write(V0, frame, offset, size, value);
            board.settle(kick);
            let kick = board.vgic.refresh(frame, offset);
            board.settle(kick);
            let first = board.vgic.mmio_read(vcpu(1), frame, offset, size);
            prop_assert_eq!(first, board.vgic.mmio_read(vcpu(2), frame, offset, size));
            if size != AccessSize::Double {
                prop_assert_eq!(first >> (8 * size.bytes()), 0);
            }
            board.sync_all();
            for intid in 0..160 {
                for cpu in &board.cpus {
                    cpu.holding(intid);
                }
            }
        }
    }
}
