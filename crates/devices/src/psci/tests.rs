//! The table of calls, and the decisions on power states.

use super::*;

const NOT_SUPPORTED: u64 = u64::MAX;
const INVALID: u64 = -2i64 as u64;

fn call(function: u64, arguments: [u64; 3]) -> Call {
    decode([function, arguments[0], arguments[1], arguments[2]])
}

fn index(index: usize) -> VcpuIndex {
    VcpuIndex::new(index).expect("small")
}

#[test]
fn fixed_answers() {
    for (function, argument, answer) in [
        (0x8400_0000, 0, 0x1_0001),
        (0x8400_0006, 0, 2),
        (0x8000_0000, 0, 0x1_0001),
        (0x8000_0001, 0x8000_0000, 0),
        (0x8000_0001, 0x8000_0001, 0),
        (0x8000_0001, 0x8000_8000, NOT_SUPPORTED),
        (0x8000_0001, 0x8400_0000, NOT_SUPPORTED),
    ] {
        assert_eq!(
            call(function, [argument, 0, 0]),
            Call::Answer(answer),
            "{function:#x}"
        );
    }
    // The function identifier is w0.
    assert_eq!(call(0xdead_beef_8400_0000, [0; 3]), Call::Answer(0x1_0001));
}

#[test]
fn what_is_not_known_is_not_supported() {
    // MIGRATE, MIGRATE_INFO_UP_CPU, CPU_FREEZE, SYSTEM_SUSPEND, MEM_PROTECT, PSCI 0.1 and the 64-bit forms of 32-bit functions.
    for function in [
        0x8400_0005,
        0x8400_0007,
        0x8400_000b,
        0x8400_000e,
        0x8400_0013,
        0x8400_004f,
        0x8400_0054,
        0x95c1_ba5e,
        0xc400_0000,
        0xc400_0002,
        0xc400_0006,
        0xc400_0008,
        0xc400_000a,
        0xc000_0000,
        0xc000_0001,
        0,
        u64::MAX,
    ] {
        assert_eq!(
            call(function, [0; 3]),
            Call::Answer(NOT_SUPPORTED),
            "{function:#x}"
        );
    }
}

/// FEATURES and the decoder know the same functions, over the whole standard range and the SMCCC one.
#[test]
fn features_says_what_there_is() {
    let functions = (0..0x100u64).flat_map(|low| {
        [0x8400_0000, 0xc400_0000, 0x8000_0000, 0xc000_0000].map(|base| base | low)
    });
    let mut known = 0;
    for function in functions {
        // An argument that each knows: FEATURES is asked about VERSION, SYSTEM_RESET2 for a warm reset.
        let argument = if function == 0x8400_000a {
            0x8400_0000
        } else {
            0
        };
        // The entropy calls have a FEATURES of their own.
        if matches!(function as u32 & 0xbfff_ffff, 0x8400_0050..=0x8400_0053) {
            continue;
        }
        let there = call(function, [argument, 0x4000_0000, 0]) != Call::Answer(NOT_SUPPORTED);
        // SMCCC_ARCH_FEATURES is found by SMCCC_VERSION, not by PSCI_FEATURES (DEN 0022, 5.15), and knows no function 0.
        let expected = if there { 0 } else { NOT_SUPPORTED };
        assert_eq!(
            call(0x8400_000a, [function, 0, 0]),
            Call::Answer(expected),
            "{function:#x}"
        );
        known += u32::from(there);
    }
    assert_eq!(known, 10 + 4 + 1, "narrow, wide, SMCCC_VERSION");
}

#[test]
fn cpu_on_takes_its_target_and_arguments() {
    let big = 0x1234_5678_9abc_def0;
    assert_eq!(
        call(0xc400_0003, [1, big, u64::MAX]),
        Call::CpuOn {
            target: Some(index(1)),
            entry: big,
            context: u64::MAX
        }
    );
    assert_eq!(
        call(0x8400_0003, [0xffff_ffff_0000_0001, big, u64::MAX]),
        Call::CpuOn {
            target: Some(index(1)),
            entry: 0x9abc_def0,
            context: 0xffff_ffff
        },
        "32-bit: low halves"
    );
    for target in [
        16,
        0x100,
        0x1_0000,
        1 << 32,
        1 << 31,
        1 << 24,
        1 << 40,
        u64::MAX,
    ] {
        assert!(
            matches!(
                call(0xc400_0003, [target, 0, 0]),
                Call::CpuOn { target: None, .. }
            ),
            "{target:#x} is nobody"
        );
    }
}

#[test]
fn cpu_on_is_decided_by_the_targets_state() {
    use EntryPoint::{Memory, NotMemory};
    for (state, entry, status, register) in [
        (None, Memory, Status::InvalidParameters, INVALID),
        (Some(PowerState::Off), Memory, Status::Success, 0),
        (
            Some(PowerState::Off),
            NotMemory,
            Status::InvalidAddress,
            -9i64 as u64,
        ),
        (
            Some(PowerState::On),
            Memory,
            Status::AlreadyOn,
            -4i64 as u64,
        ),
        (
            Some(PowerState::On),
            NotMemory,
            Status::AlreadyOn,
            -4i64 as u64,
        ),
        (
            Some(PowerState::OnPending),
            Memory,
            Status::OnPending,
            -5i64 as u64,
        ),
    ] {
        assert_eq!(cpu_on(state, entry), status);
        assert_eq!(status.register(), register);
    }
}

#[test]
fn suspend_is_standby_or_power_down() {
    for function in [0x8400_0001, 0xc400_0001] {
        assert_eq!(call(function, [0, 0, 0]), Call::Standby);
        assert_eq!(
            call(function, [0x0300_ffff, 0, 0]),
            Call::Standby,
            "state ids are ours to ignore"
        );
        let down = call(function, [0x1_0000, 0x4000_0000, 7]);
        assert_eq!(
            down,
            Call::PowerDown {
                entry: 0x4000_0000,
                context: 7
            }
        );
        for reserved in [1 << 17, 1 << 26, 1 << 31, 0x0400_0000] {
            assert_eq!(
                call(function, [reserved, 0, 0]),
                Call::Answer(INVALID),
                "{reserved:#x}"
            );
        }
    }
}

#[test]
fn endings() {
    assert_eq!(call(0x8400_0002, [0; 3]), Call::CpuOff);
    assert_eq!(call(0x8400_0008, [0; 3]), Call::SystemOff);
    assert_eq!(call(0x8400_0009, [0; 3]), Call::SystemReset);
    for function in [0x8400_0012, 0xc400_0012] {
        assert_eq!(
            call(function, [0, 5, 0]),
            Call::SystemReset,
            "warm reset, the cookie is ours to ignore"
        );
        assert_eq!(call(function, [1, 0, 0]), Call::Answer(INVALID));
        assert_eq!(
            call(function, [0x8000_0000, 0, 0]),
            Call::Answer(NOT_SUPPORTED),
            "vendor-specific"
        );
    }
}

#[test]
fn affinity_info_reports_one_or_a_group() {
    use PowerState::{Off, On, OnPending};
    assert_eq!(
        call(0xc400_0004, [1, 2, 0]),
        Call::AffinityInfo {
            target: 1,
            level: 2
        }
    );
    let states = [On, Off, OnPending];
    for (target, expected) in [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, INVALID),
        (0x100, INVALID),
        (1 << 32, INVALID),
        (1 << 31, INVALID),
    ] {
        assert_eq!(affinity_info(target, 0, states), expected, "{target:#x}");
    }
    for level in 1..=3 {
        assert_eq!(affinity_info(0, level, states), 0, "one is on");
        assert_eq!(affinity_info(7, level, [Off, OnPending, Off]), 2);
        assert_eq!(affinity_info(0, level, [Off, Off]), 1);
    }
    assert_eq!(affinity_info(0x100, 1, states), INVALID);
    assert_eq!(affinity_info(0x100, 2, states), 0);
    assert_eq!(affinity_info(0, 4, states), INVALID);
    assert_eq!(affinity_info(0, u64::MAX, states), INVALID);
}
