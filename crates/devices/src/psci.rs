//! Firmware calls of a guest: PSCI 1.1, the SMC Calling Convention, and what is behind it ([`trng`]).
//!
//! # Purpose
//!
//! [`decode`] turns the registers of an HVC (or SMC) into a [`Call`]. Calls whose answer depends
//! on nothing come back as [`Call::Answer`], ready to be written to x0, so the commonest way
//! through is one `match`. The rest name what the caller has to do; [`cpu_on`] and
//! [`affinity_info`] decide their return codes from power states the caller gives.
//!
//! # Invariants
//!
//! - Any register contents decode; what is not known is answered NOT_SUPPORTED.
//! - Arguments of 32-bit functions are the low halves of their registers (SMCCC, DEN 0028, 3.1).
//! - FEATURES says yes exactly to what [`decode`] knows; a test compares the two.
//!
//! # Concurrency
//!
//! None: pure functions. The caller makes the check of a power state and its change one step.
//!
//! Specification: DEN 0022 (PSCI), chapter 5; DEN 0028 (SMCCC), chapter 7.

pub use crate::status::Status;
use crate::{VcpuIndex, trng};

#[cfg(test)]
mod tests;

/// PSCI 1.1 as PSCI_VERSION gives it.
pub const PSCI_VERSION: u64 = 0x0001_0001;
/// SMCCC 1.1 as SMCCC_VERSION gives it. Not later: 1.2 promises more result registers than are written.
pub const SMCCC_VERSION: u64 = 0x0001_0001;

/// What a vCPU's power controller thinks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    /// Runs or is ready to.
    On,
    /// Waits for CPU_ON.
    Off,
    /// CPU_ON was accepted and it has not run yet.
    OnPending,
}

/// A decoded call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Write this to x0 and go on.
    Answer(u64),
    /// Start a vCPU at `entry` with `context` in x0; answer with [`cpu_on`]. `target` is `None` when no vCPU can have that affinity.
    CpuOn {
        /// Whom to start.
        target: Option<VcpuIndex>,
        /// Where it starts, an IPA, MMU off.
        entry: u64,
        /// What it finds in x0.
        context: u64,
    },
    /// Turn the calling vCPU off. Does not return.
    CpuOff,
    /// Wait as WFI does, then answer [`Status::Success`].
    Standby,
    /// Wait as WFI does, then either answer [`Status::Success`] (a power-down request that was
    /// interrupted returns, DEN 0022 5.4.5, so this is always legal) or start at `entry` with `context` in x0.
    PowerDown {
        /// Where it may start again.
        entry: u64,
        /// What it then finds in x0.
        context: u64,
    },
    /// Say whether a vCPU is on; answer with [`affinity_info`].
    AffinityInfo {
        /// The affinity asked about, MPIDR format.
        target: u64,
        /// The lowest affinity level that counts, unchecked.
        level: u64,
    },
    /// Turn the guest off. Does not return.
    SystemOff,
    /// Restart the guest. Does not return.
    SystemReset,
    /// Give entropy, or say that there is none to be had.
    Trng(trng::Call),
}

mod id {
    pub const SMCCC_VERSION: u32 = 0x8000_0000;
    pub const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
    pub const VERSION: u32 = 0x8400_0000;
    pub const CPU_SUSPEND: u32 = 0x8400_0001;
    pub const CPU_OFF: u32 = 0x8400_0002;
    pub const CPU_ON: u32 = 0x8400_0003;
    pub const AFFINITY_INFO: u32 = 0x8400_0004;
    pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
    pub const FEATURES: u32 = 0x8400_000a;
    pub const SYSTEM_RESET2: u32 = 0x8400_0012;
    /// Set in the identifier of a function's 64-bit form.
    pub const WIDE: u32 = 0x4000_0000;
}

/// MIGRATE_INFO_TYPE's answer: no trusted OS, or one that need not be migrated (DEN 0022, 5.9).
const MIGRATION_NOT_NEEDED: u64 = 2;

/// CPU_SUSPEND's StateType bit in the original power_state format, the one FEATURES announces (DEN 0022, 5.4.2.1).
const POWER_DOWN: u64 = 1 << 16;
/// Bits that must be zero in that format.
const POWER_STATE_RESERVED: u64 = !(POWER_DOWN | 0x0300_ffff) & 0xffff_ffff;

/// Decodes a call from x0-x3 as the guest left them.
#[inline(always)]
pub fn decode(registers: [u64; 4]) -> Call {
    let [function, arguments @ ..] = registers;
    // The function identifier is w0; the upper half is not part of it (DEN 0028, 2.5).
    let function = function as u32;
    // First and alone: the cheapest call there is, and the one benchmarks time.
    if function == id::VERSION {
        return Call::Answer(PSCI_VERSION);
    }
    let [first, second, third] = if function & id::WIDE != 0 {
        arguments
    } else {
        arguments.map(|value| value & 0xffff_ffff)
    };
    const CPU_SUSPEND_64: u32 = id::CPU_SUSPEND | id::WIDE;
    const CPU_ON_64: u32 = id::CPU_ON | id::WIDE;
    const AFFINITY_INFO_64: u32 = id::AFFINITY_INFO | id::WIDE;
    const SYSTEM_RESET2_64: u32 = id::SYSTEM_RESET2 | id::WIDE;
    match function {
        id::CPU_SUSPEND | CPU_SUSPEND_64 => suspend(first, second, third),
        id::CPU_OFF => Call::CpuOff,
        id::CPU_ON | CPU_ON_64 => Call::CpuOn {
            target: exact_affinity(first),
            entry: second,
            context: third,
        },
        id::AFFINITY_INFO | AFFINITY_INFO_64 => Call::AffinityInfo {
            target: first,
            level: second,
        },
        id::MIGRATE_INFO_TYPE => Call::Answer(MIGRATION_NOT_NEEDED),
        id::SYSTEM_OFF => Call::SystemOff,
        id::SYSTEM_RESET => Call::SystemReset,
        id::SYSTEM_RESET2 | SYSTEM_RESET2_64 => reset2(first),
        id::FEATURES => Call::Answer(features(first as u32)),
        id::SMCCC_VERSION => Call::Answer(SMCCC_VERSION),
        id::SMCCC_ARCH_FEATURES => Call::Answer(arch_features(first as u32)),
        _ => trng::decode(function, first)
            .map_or(Call::Answer(Status::NotSupported.register()), Call::Trng),
    }
}

/// Finds the vCPU of a target argument, whose bits outside the affinity fields must be zero.
fn exact_affinity(target: u64) -> Option<VcpuIndex> {
    if target & !0x0000_00ff_00ff_ffff != 0 {
        return None;
    }
    VcpuIndex::from_affinity(target)
}

fn suspend(power_state: u64, entry: u64, context: u64) -> Call {
    let power_state = power_state & 0xffff_ffff;
    if power_state & POWER_STATE_RESERVED != 0 {
        Call::Answer(Status::InvalidParameters.register())
    } else if power_state & POWER_DOWN != 0 {
        Call::PowerDown { entry, context }
    } else {
        Call::Standby
    }
}

fn reset2(reset_type: u64) -> Call {
    // Bit 31 marks vendor-specific types, of which there are none; 0 is SYSTEM_WARM_RESET, the
    // only architectural one (DEN 0022, 5.12). To a guest a warm and a cold reset are the same.
    match reset_type & 0xffff_ffff {
        0 => Call::SystemReset,
        kind if kind & 0x8000_0000 != 0 => Call::Answer(Status::NotSupported.register()),
        _ => Call::Answer(Status::InvalidParameters.register()),
    }
}

/// Answers PSCI_FEATURES: flags (all clear) for what is there.
fn features(function: u32) -> u64 {
    const WIDE: [u32; 4] = [
        id::CPU_SUSPEND,
        id::CPU_ON,
        id::AFFINITY_INFO,
        id::SYSTEM_RESET2,
    ];
    let narrow = function & !id::WIDE;
    let known = match narrow {
        _ if function & id::WIDE != 0 => WIDE.contains(&narrow),
        id::VERSION
        | id::CPU_SUSPEND
        | id::CPU_OFF
        | id::CPU_ON
        | id::AFFINITY_INFO
        | id::MIGRATE_INFO_TYPE
        | id::SYSTEM_OFF
        | id::SYSTEM_RESET
        | id::FEATURES
        | id::SYSTEM_RESET2
        | id::SMCCC_VERSION => true,
        _ => false,
    };
    if known {
        0
    } else {
        Status::NotSupported.register()
    }
}

/// Answers SMCCC_ARCH_FEATURES.
///
/// The workaround calls are not offered: they would have to reach the machine's own firmware.
fn arch_features(function: u32) -> u64 {
    match function {
        id::SMCCC_VERSION | id::SMCCC_ARCH_FEATURES => 0,
        _ => Status::NotSupported.register(),
    }
}

/// Decides CPU_ON: `target` is the target's state (`None` if the guest has no such vCPU), `entry` what is at the entry point.
pub fn cpu_on(target: Option<PowerState>, entry: EntryPoint) -> Status {
    match (target, entry) {
        (None, _) => Status::InvalidParameters,
        (Some(PowerState::On), _) => Status::AlreadyOn,
        (Some(PowerState::OnPending), _) => Status::OnPending,
        (Some(PowerState::Off), EntryPoint::NotMemory) => Status::InvalidAddress,
        (Some(PowerState::Off), EntryPoint::Memory) => Status::Success,
    }
}

/// What is at the entry point of a CPU_ON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// The guest's memory.
    Memory,
    /// A device or nothing.
    NotMemory,
}

/// Answers AFFINITY_INFO as the value of x0: 0 on, 1 off, 2 on pending, or a [`Status`].
///
/// `states` are the guest's vCPUs in order. A level above 0 asks about all vCPUs that share the
/// affinities from that level up: on if any is on, else pending if any is, else off (DEN 0022, 5.7).
pub fn affinity_info(target: u64, level: u64, states: impl IntoIterator<Item = PowerState>) -> u64 {
    const AFFINITY: u64 = 0x0000_00ff_00ff_ffff;
    let ignored = match level {
        0 => 0,
        1 => 0xff,
        2 => 0xffff,
        3 => 0xff_ffff,
        _ => return Status::InvalidParameters.register(),
    };
    if target & !AFFINITY != 0 {
        return Status::InvalidParameters.register();
    }
    let mut found = None;
    for (index, state) in states.into_iter().enumerate().take(crate::MAX_VCPUS) {
        if (index as u64 ^ target) & !ignored != 0 {
            continue;
        }
        found = Some(match (found, state) {
            (Some(PowerState::On), _) | (_, PowerState::On) => PowerState::On,
            (Some(PowerState::OnPending), _) | (_, PowerState::OnPending) => PowerState::OnPending,
            _ => PowerState::Off,
        });
    }
    match found {
        Some(PowerState::On) => 0,
        Some(PowerState::Off) => 1,
        Some(PowerState::OnPending) => 2,
        None => Status::InvalidParameters.register(),
    }
}
