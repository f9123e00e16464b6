//! The lists against the notices, read a second time.

mod walks;

use super::*;
use std::collections::BTreeSet;
use std::string::ToString;
use std::vec::Vec;

fn midr(implementer: u8, part: u16, (variant, revision): (u8, u8)) -> Midr {
    Midr::new(
        u64::from(implementer) << 24
            | u64::from(variant) << 20
            | 0xf << 16
            | u64::from(part) << 4
            | u64::from(revision),
    )
}

/// Every revision a part can have.
fn revisions() -> impl Iterator<Item = (u8, u8)> {
    (0..16).flat_map(|variant| (0..16).map(move |revision| (variant, revision)))
}

fn affected(implementer: u8, part: u16, verdict: impl Fn(Errata) -> Verdict) -> Vec<(u8, u8)> {
    revisions()
        .filter(|revision| {
            let verdict = verdict(Errata::of(midr(implementer, part, *revision)));
            matches!(verdict, Verdict::Erratum(_))
        })
        .collect()
}

#[test]
fn the_register_is_taken_apart() {
    // A Neoverse N1 r3p1 as Linux prints it.
    let n1 = Midr::new(0x413f_d0c1);
    assert_eq!((n1.implementer(), n1.part()), (0x41, 0xd0c));
    assert_eq!(n1.revision(), Revision::new(3, 1));
    assert_eq!(n1.revision().to_string(), "r3p1");
    assert_eq!(n1.name(), Some("Neoverse N1"));
}

/// Arm's list for CVE-2025-10263 and those who build on its cores: every revision.
#[test]
fn cve_2025_10263_is_complete() {
    let parts: [(u8, u16); 23] = [
        (0x41, 0xd0c), // Neoverse N1
        (0x41, 0xd49), // Neoverse N2
        (0x41, 0xd40), // Neoverse V1
        (0x41, 0xd4f), // Neoverse V2
        (0x41, 0xd84), // Neoverse V3
        (0x41, 0xd83), // Neoverse V3AE
        (0x41, 0xd0b), // Cortex-A76
        (0x41, 0xd0e), // Cortex-A76AE
        (0x41, 0xd0d), // Cortex-A77
        (0x41, 0xd41), // Cortex-A78
        (0x41, 0xd42), // Cortex-A78AE
        (0x41, 0xd4b), // Cortex-A78C
        (0x41, 0xd47), // Cortex-A710
        (0x41, 0xd44), // Cortex-X1
        (0x41, 0xd4c), // Cortex-X1C
        (0x41, 0xd48), // Cortex-X2
        (0x41, 0xd4e), // Cortex-X3
        (0x41, 0xd82), // Cortex-X4
        (0x41, 0xd85), // Cortex-X925
        (0x41, 0xd8c), // C1-Ultra
        (0x41, 0xd90), // C1-Premium
        (0x6d, 0xd49), // Azure Cobalt 100
        (0x4e, 0x010), // Olympus
    ];
    for (implementer, part) in parts {
        let all = affected(implementer, part, |errata| errata.broadcast_tlbi);
        assert_eq!(all.len(), 256, "{implementer:#x} {part:#x}");
        // What needs the repeat has its dirty state trusted all the same.
        let errata = Errata::of(midr(implementer, part, (0, 0)));
        assert_eq!(errata.dirty_state, Verdict::Sound, "{part:#x}");
    }
}

#[test]
fn the_older_ones_that_repeat_are_there() {
    let tlbi = |errata: Errata| errata.broadcast_tlbi;
    let verdict = |implementer, part, revision| tlbi(Errata::of(midr(implementer, part, revision)));
    // To r3p0 an erratum of its own, later the other one.
    assert_eq!(
        verdict(0x41, 0xd0b, (3, 0)),
        Verdict::Erratum("Cortex-A76 1286807")
    );
    assert_eq!(
        verdict(0x41, 0xd0b, (3, 1)),
        Verdict::Erratum("Cortex-A76 4193800")
    );
    assert_eq!(affected(0x41, 0xd05, tlbi).len(), 256);
    // Cortex-A510: fixed in r1p2.
    assert_eq!(affected(0x41, 0xd46, tlbi).last(), Some(&(1, 1)));
    assert_eq!(verdict(0x41, 0xd46, (1, 2)), Verdict::Sound);
    // Falkor is 0x800 r0p0 and nothing else of that number; the first Kryo is every 0x2xx.
    assert_eq!(affected(0x51, 0x800, tlbi), [(0, 0)]);
    assert_eq!(affected(0x51, 0xc00, tlbi), []);
    for part in [0x200, 0x201, 0x205, 0x211, 0x2ff] {
        assert_eq!(affected(0x51, part, tlbi).len(), 256);
    }
    // Kryo 4xx Gold rcpe to rfpe.
    let gold = affected(0x51, 0x804, tlbi);
    assert_eq!((gold[0], gold[gold.len() - 1]), ((12, 14), (15, 14)));
}

#[test]
fn a_dirty_state_that_is_not_to_be_trusted() {
    let dirty = |errata: Errata| errata.dirty_state;
    assert_eq!(affected(0x41, 0xd05, dirty).len(), 256);
    assert_eq!(affected(0x51, 0x805, dirty).len(), 256);
    assert_eq!(affected(0x41, 0xd46, dirty), [(0, 0), (0, 1), (0, 2)]);
    assert_eq!(affected(0xc0, 0xac3, dirty).len(), 256);
    assert_eq!(affected(0xc0, 0xac4, dirty).len(), 256);
}

#[test]
fn an_unknown_part_has_every_defect() {
    // An Apple core, a Kunpeng, a ThunderX2, an Oryon, and Arm's next one.
    for (implementer, part) in [
        (0x61, 0x023),
        (0x48, 0xd01),
        (0x43, 0x0af),
        (0x51, 0x001),
        (0x41, 0xfff),
    ] {
        let midr = midr(implementer, part, (1, 0));
        assert_eq!(midr.name(), None);
        let unknown = Errata {
            broadcast_tlbi: Verdict::Unknown,
            dirty_state: Verdict::Unknown,
            speculative_walks: Verdict::Unknown,
            par_reads: Verdict::Unknown,
            stage2_first: Verdict::Unknown,
        };
        assert_eq!(Errata::of(midr), unknown);
    }
}

#[test]
fn cores_that_walk_out_of_context() {
    let walks = |errata: Errata| errata.speculative_walks;
    assert_eq!(affected(0x41, 0xd07, walks).len(), 256);
    assert_eq!(affected(0x41, 0xd08, walks).len(), 256);
    for part in [0xd0b, 0xd0c, 0xd05] {
        assert_eq!(
            affected(0x41, part, walks).last(),
            Some(&(2, 0)),
            "{part:#x}"
        );
    }
    assert_eq!(affected(0x51, 0x805, walks).len(), 256);
}

/// What QEMU calls itself, and the registers of its models.
#[test]
fn qemu_is_known_in_all_its_forms() {
    for (bits, name) in [
        (0x000f_0510, "QEMU's max"),
        (0x410f_d034, "Cortex-A53"),
        (0x411f_d070, "Cortex-A57"),
        (0x410f_d083, "Cortex-A72"),
        (0x461f_0010, "A64FX"),
    ] {
        let midr = Midr::new(bits);
        assert_eq!(midr.name(), Some(name));
        let errata = Errata::of(midr);
        assert_eq!(errata.broadcast_tlbi, Verdict::Sound, "{name}");
        assert_eq!(errata.dirty_state, Verdict::Sound, "{name}");
    }
    // Cortex-A76, Neoverse N1, V1 and N2, Cortex-A710.
    for bits in [
        0x414f_d0b1,
        0x414f_d0c1,
        0x411f_d402,
        0x410f_d493,
        0x412f_d471,
    ] {
        let errata = Errata::of(Midr::new(bits));
        let repeated = matches!(errata.broadcast_tlbi, Verdict::Erratum(_));
        assert!(repeated, "{bits:#x}");
        assert_eq!(errata.dirty_state, Verdict::Sound);
    }
}

#[test]
fn those_of_one_part_alone() {
    let par = affected(0x41, 0xd0d, |errata| errata.par_reads);
    assert_eq!(par.last(), Some(&(1, 0)));
    let first = affected(0x41, 0xd07, |errata| errata.stage2_first);
    assert_eq!(first.last(), Some(&(1, 2)));
    let a72 = Errata::of(midr(0x41, 0xd08, (0, 3)));
    assert!(a72.par_reads.is_sound() && a72.stage2_first.is_sound());
}

#[test]
fn of_two_cpus_the_worse_one_counts() {
    let erratum = Verdict::Erratum("Cortex-A0 1");
    for (one, other, worse) in [
        (Verdict::Sound, Verdict::Unknown, Verdict::Unknown),
        (Verdict::Sound, erratum, erratum),
        (Verdict::Unknown, erratum, erratum),
        (Verdict::Sound, Verdict::Sound, Verdict::Sound),
    ] {
        assert_eq!(one.worse(other), worse);
        assert_eq!(other.worse(one), worse);
    }
    // Of each defect for itself: a big core and a little one.
    let (big, little) = (
        Errata::of(midr(0x41, 0xd0d, (1, 0))),
        Errata::of(midr(0x41, 0xd05, (1, 0))),
    );
    for both in [big.worse(little), little.worse(big)] {
        assert_eq!(both.par_reads, big.par_reads);
        assert_eq!(both.dirty_state, little.dirty_state);
        assert_eq!(both.speculative_walks, little.speculative_walks);
        assert_eq!(both.stage2_first, Verdict::Sound);
        assert!(!both.broadcast_tlbi.is_sound());
    }
}

/// A list with a part twice, or with a range that is upside down, was written in a hurry.
#[test]
fn the_lists_are_well_formed() {
    let parts: BTreeSet<_> = table::KNOWN
        .iter()
        .map(|known| (known.implementer, known.part))
        .collect();
    assert_eq!(parts.len(), table::KNOWN.len());
    for row in table::ERRATA {
        assert!(
            row.erratum.chars().any(|c| c.is_ascii_digit()),
            "{} has no number",
            row.erratum
        );
        let (first, last) = row.parts;
        assert!(first <= last, "{}: parts", row.erratum);
        let table::Revisions { first, last } = &row.revisions;
        assert!(first <= last, "{}: {first} to {last}", row.erratum);
    }
}
