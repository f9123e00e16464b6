//! The clock: what a driver does with it.

use std::vec::Vec;

use super::*;

const NOW: UnixSeconds = UnixSeconds(1_700_000_000);

fn later(seconds: u32) -> UnixSeconds {
    UnixSeconds(NOW.0.wrapping_add(seconds))
}

#[test]
fn identifies_as_a_pl031() {
    let mut clock = Pl031::new();
    let ids: Vec<u32> = (0xfe0..0x1000)
        .step_by(4)
        .map(|offset| clock.read(offset, NOW))
        .collect();
    assert_eq!(ids, [0x31, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
    let periphid = ids[0] | ids[1] << 8 | ids[2] << 16 | ids[3] << 24;
    assert_eq!(
        periphid & 0x000f_ffff,
        0x0004_1031,
        "what Linux's rtc-pl031 matches"
    );
    assert_eq!(clock.read(CR, NOW), 1);
    assert_eq!(clock.read(0x20, NOW), 0);
}

#[test]
fn shows_the_time_and_can_be_set() {
    let mut clock = Pl031::new();
    assert_eq!(clock.read(DR, NOW), NOW.0);
    assert_eq!(clock.read(DR, later(7)), NOW.0 + 7);
    clock.write(LR, 100, NOW);
    assert_eq!(clock.read(LR, later(5)), 100);
    assert_eq!(clock.read(DR, later(5)), 105);
    clock.write(DR, 3, NOW);
    clock.write(CR, 0, NOW);
    assert_eq!(
        clock.read(DR, NOW),
        100,
        "DR is read-only, and nothing stops it"
    );
    clock.write(LR, u32::MAX, NOW);
    assert_eq!(clock.read(DR, later(2)), 1, "it wraps");
}

#[test]
fn the_alarm_fires_once_at_its_second() {
    let mut clock = Pl031::new();
    clock.write(MR, NOW.0 + 10, NOW);
    assert_eq!(clock.next_alarm(NOW), None, "masked: nobody would see it");
    clock.write(IMSC, 1, NOW);
    assert_eq!(clock.next_alarm(later(3)), Some(later(10)));
    clock.tick(later(9));
    assert_eq!(clock.irq_level(), Level::Low);
    clock.tick(later(12));
    assert_eq!(clock.irq_level(), Level::High, "a tick may come late");
    assert_eq!(
        (clock.read(RIS, later(12)), clock.read(MIS, later(12))),
        (1, 1)
    );
    clock.write(ICR, 1, later(12));
    assert_eq!(clock.irq_level(), Level::Low);
    clock.tick(later(13));
    assert_eq!(
        (clock.irq_level(), clock.next_alarm(later(13))),
        (Level::Low, None),
        "once"
    );
    clock.write(MR, NOW.0 + 20, later(13));
    clock.write(IMSC, 0, later(13));
    assert_eq!(clock.read(RIS, later(20)), 1);
    assert_eq!(
        (clock.read(MIS, later(20)), clock.irq_level()),
        (0, Level::Low)
    );
}

#[test]
fn setting_the_clock_moves_the_alarm() {
    let mut clock = Pl031::new();
    clock.write(IMSC, 1, NOW);
    clock.write(LR, 1000, NOW);
    clock.write(MR, 1060, NOW);
    assert_eq!(clock.next_alarm(NOW), Some(later(60)));
    clock.write(LR, 1050, NOW);
    assert_eq!(clock.next_alarm(NOW), Some(later(10)));
    clock.write(LR, 1060, NOW);
    assert_eq!(clock.irq_level(), Level::High);
}

#[test]
fn nothing_fires_before_an_alarm_is_set() {
    let mut clock = Pl031::new();
    clock.write(IMSC, 1, UnixSeconds(0));
    assert_eq!(
        clock.read(DR, UnixSeconds(0)),
        0,
        "equal to MR's reset value"
    );
    assert_eq!(clock.irq_level(), Level::Low);
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut clock = Pl031::new();
    clock.write(LR, 5, NOW);
    clock.write(MR, 9, NOW);
    clock.write(IMSC, 1, NOW);
    let mut other = Pl031::new();
    other.restore(&clock.save());
    assert_eq!(other.read(DR, later(1)), 6);
    assert_eq!(other.next_alarm(later(1)), Some(later(4)));
    let mut wild = clock.save();
    (wild.mask, wild.raw) = (u32::MAX, u32::MAX);
    other.restore(&wild);
    assert_eq!((other.read(IMSC, NOW), other.read(RIS, NOW)), (1, 1));
}
