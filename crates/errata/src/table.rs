//! The lists. Numbers and revisions are those of the makers' errata notices (Arm's "Software Developer Errata Notice"
//! of each part), as Linux has them in `Documentation/arch/arm64/silicon-errata.rst`, `kernel/cpu_errata.c` and
//! `cpu_has_broken_dbm`; part numbers as in its `asm/cputype.h`.

use crate::Defect::{self, BroadcastTlbi, DirtyState, ParReads, SpeculativeWalks, Stage2First};
use crate::{Midr, Revision};

const SOFTWARE: u8 = 0x00;
const ARM: u8 = 0x41;
const FUJITSU: u8 = 0x46;
const NVIDIA: u8 = 0x4e;
const QUALCOMM: u8 = 0x51;
const MICROSOFT: u8 = 0x6d;
const AMPERE: u8 = 0xc0;

/// A part whose errata were looked at: what is not in [`ERRATA`] it has not.
pub(crate) struct Known {
    pub(crate) implementer: u8,
    pub(crate) part: u16,
    pub(crate) name: &'static str,
}

const fn known(implementer: u8, part: u16, name: &'static str) -> Known {
    Known {
        implementer,
        part,
        name,
    }
}

/// Qualcomm's own cores are not among them, but for the errata that are listed.
pub(crate) const KNOWN: &[Known] = &[
    // Emulators and models do what the architecture says. QEMU's `max` has a number of its own.
    known(SOFTWARE, 0x051, "QEMU's max"),
    known(ARM, 0xd00, "Foundation model"),
    known(ARM, 0xd0f, "Base model"),
    known(ARM, 0xd03, "Cortex-A53"),
    known(ARM, 0xd04, "Cortex-A35"),
    known(ARM, 0xd05, "Cortex-A55"),
    known(ARM, 0xd07, "Cortex-A57"),
    known(ARM, 0xd08, "Cortex-A72"),
    known(ARM, 0xd09, "Cortex-A73"),
    known(ARM, 0xd0a, "Cortex-A75"),
    known(ARM, 0xd0b, "Cortex-A76"),
    known(ARM, 0xd0c, "Neoverse N1"),
    known(ARM, 0xd0d, "Cortex-A77"),
    known(ARM, 0xd0e, "Cortex-A76AE"),
    known(ARM, 0xd40, "Neoverse V1"),
    known(ARM, 0xd41, "Cortex-A78"),
    known(ARM, 0xd42, "Cortex-A78AE"),
    known(ARM, 0xd44, "Cortex-X1"),
    known(ARM, 0xd46, "Cortex-A510"),
    known(ARM, 0xd47, "Cortex-A710"),
    known(ARM, 0xd48, "Cortex-X2"),
    known(ARM, 0xd49, "Neoverse N2"),
    known(ARM, 0xd4b, "Cortex-A78C"),
    known(ARM, 0xd4c, "Cortex-X1C"),
    known(ARM, 0xd4d, "Cortex-A715"),
    known(ARM, 0xd4e, "Cortex-X3"),
    known(ARM, 0xd4f, "Neoverse V2"),
    known(ARM, 0xd80, "Cortex-A520"),
    known(ARM, 0xd81, "Cortex-A720"),
    known(ARM, 0xd82, "Cortex-X4"),
    known(ARM, 0xd83, "Neoverse V3AE"),
    known(ARM, 0xd84, "Neoverse V3"),
    known(ARM, 0xd85, "Cortex-X925"),
    known(ARM, 0xd87, "Cortex-A725"),
    known(ARM, 0xd89, "Cortex-A720AE"),
    // Its 4193714 (CVE-2026-0995) is about SME alone, which traps.
    known(ARM, 0xd8b, "C1-Pro"),
    known(ARM, 0xd8c, "C1-Ultra"),
    known(ARM, 0xd8e, "Neoverse N3"),
    known(ARM, 0xd90, "C1-Premium"),
    known(FUJITSU, 0x001, "A64FX"),
    known(NVIDIA, 0x010, "Olympus"),
    known(MICROSOFT, 0xd49, "Azure Cobalt 100"),
    known(AMPERE, 0xac3, "AmpereOne"),
    known(AMPERE, 0xac4, "AmpereOne A"),
];

/// An erratum of a part.
pub(crate) struct Row {
    pub(crate) defect: Defect,
    pub(crate) erratum: &'static str,
    implementer: u8,
    /// First and last part.
    pub(crate) parts: (u16, u16),
    pub(crate) revisions: Revisions,
}

impl Row {
    pub(crate) fn matches(&self, midr: Midr) -> bool {
        self.implementer == midr.implementer()
            && (self.parts.0..=self.parts.1).contains(&midr.part())
            && (self.revisions.first..=self.revisions.last).contains(&midr.revision())
    }
}

pub(crate) struct Revisions {
    pub(crate) first: Revision,
    pub(crate) last: Revision,
}

const ALL: Revisions = between((0x0, 0x0), (0xf, 0xf));

const fn to(variant: u8, revision: u8) -> Revisions {
    between((0, 0), (variant, revision))
}

const fn between(first: (u8, u8), last: (u8, u8)) -> Revisions {
    Revisions {
        first: Revision::new(first.0, first.1),
        last: Revision::new(last.0, last.1),
    }
}

const fn row(
    defect: Defect,
    erratum: &'static str,
    implementer: u8,
    part: u16,
    revisions: Revisions,
) -> Row {
    Row {
        defect,
        erratum,
        implementer,
        parts: (part, part),
        revisions,
    }
}

pub(crate) const ERRATA: &[Row] = &[
    // Another CPU may go on storing through the old entry (Linux: ARM64_WORKAROUND_REPEAT_TLBI).
    row(BroadcastTlbi, "Cortex-A76 1286807", ARM, 0xd0b, to(3, 0)),
    row(BroadcastTlbi, "Cortex-A55 2441007", ARM, 0xd05, ALL),
    row(BroadcastTlbi, "Cortex-A510 2441009", ARM, 0xd46, to(1, 1)),
    row(BroadcastTlbi, "Falkor E1009", QUALCOMM, 0x800, to(0, 0)),
    Row {
        parts: (0x200, 0x2ff),
        ..row(BroadcastTlbi, "Kryo E1009", QUALCOMM, 0x200, ALL)
    },
    row(
        BroadcastTlbi,
        "Kryo 4xx Gold 1286807",
        QUALCOMM,
        0x804,
        between((0xc, 0xe), (0xf, 0xe)),
    ),
    // CVE-2025-10263 (Linux: ARM64_ERRATUM_4118414): its stores are observed later.
    row(BroadcastTlbi, "Cortex-A76 4193800", ARM, 0xd0b, ALL),
    row(BroadcastTlbi, "Cortex-A76AE 4193801", ARM, 0xd0e, ALL),
    row(BroadcastTlbi, "Cortex-A77 4193798", ARM, 0xd0d, ALL),
    row(BroadcastTlbi, "Cortex-A78 4193791", ARM, 0xd41, ALL),
    row(BroadcastTlbi, "Cortex-A78AE 4193793", ARM, 0xd42, ALL),
    row(BroadcastTlbi, "Cortex-A78C 4193794", ARM, 0xd4b, ALL),
    row(BroadcastTlbi, "Cortex-A710 4193788", ARM, 0xd47, ALL),
    row(BroadcastTlbi, "Cortex-X1 4193791", ARM, 0xd44, ALL),
    row(BroadcastTlbi, "Cortex-X1C 4193792", ARM, 0xd4c, ALL),
    row(BroadcastTlbi, "Cortex-X2 4193788", ARM, 0xd48, ALL),
    row(BroadcastTlbi, "Cortex-X3 4193786", ARM, 0xd4e, ALL),
    row(BroadcastTlbi, "Cortex-X4 4118414", ARM, 0xd82, ALL),
    row(BroadcastTlbi, "Cortex-X925 4193781", ARM, 0xd85, ALL),
    row(BroadcastTlbi, "Neoverse N1 4193800", ARM, 0xd0c, ALL),
    row(BroadcastTlbi, "Neoverse N2 4193789", ARM, 0xd49, ALL),
    row(BroadcastTlbi, "Neoverse V1 4193790", ARM, 0xd40, ALL),
    row(BroadcastTlbi, "Neoverse V2 4193787", ARM, 0xd4f, ALL),
    row(BroadcastTlbi, "Neoverse V3 4193784", ARM, 0xd84, ALL),
    row(BroadcastTlbi, "Neoverse V3AE 4193784", ARM, 0xd83, ALL),
    row(BroadcastTlbi, "C1-Ultra 4193780", ARM, 0xd8c, ALL),
    row(BroadcastTlbi, "C1-Premium 4193780", ARM, 0xd90, ALL),
    row(
        BroadcastTlbi,
        "Azure Cobalt 100 4193789",
        MICROSOFT,
        0xd49,
        ALL,
    ),
    row(BroadcastTlbi, "Olympus T410-OLY-1029", NVIDIA, 0x010, ALL),
    // The dirty state is updated wrongly, or out of order; on AmpereOne, which hides it, after an entry's
    // invalidation: HA and HD must stay 0.
    row(DirtyState, "Cortex-A55 1024718", ARM, 0xd05, ALL),
    row(DirtyState, "Kryo 4xx Silver 1024718", QUALCOMM, 0x805, ALL),
    row(DirtyState, "Cortex-A510 2051678", ARM, 0xd46, to(0, 2)),
    row(DirtyState, "AmpereOne AC03_CPU_38", AMPERE, 0xac3, ALL),
    row(DirtyState, "AmpereOne AC04_CPU_10", AMPERE, 0xac4, ALL),
    // An AT instruction is speculated out of context (Linux: ARM64_WORKAROUND_SPECULATIVE_AT; Neoverse N1 as Xen has
    // it, 858c0be8c2fa).
    row(SpeculativeWalks, "Cortex-A57 1319537", ARM, 0xd07, ALL),
    row(SpeculativeWalks, "Cortex-A72 1319367", ARM, 0xd08, ALL),
    row(SpeculativeWalks, "Cortex-A76 1165522", ARM, 0xd0b, to(2, 0)),
    row(
        SpeculativeWalks,
        "Neoverse N1 1165522",
        ARM,
        0xd0c,
        to(2, 0),
    ),
    row(SpeculativeWalks, "Cortex-A55 1530923", ARM, 0xd05, to(2, 0)),
    row(
        SpeculativeWalks,
        "Kryo 4xx Silver 1530923",
        QUALCOMM,
        0x805,
        ALL,
    ),
    row(ParReads, "Cortex-A77 1508412", ARM, 0xd0d, to(1, 0)),
    row(Stage2First, "Cortex-A57 834220", ARM, 0xd07, to(1, 2)),
];
