//! Bits: descriptors, registers, TLBI operands.

use super::world::{dbm, vmid};
use crate::config::{Shape, vttbr};
use crate::fake::Machine;
use crate::pte::{Kind, MemAttr, Permission, Pte};
use crate::tlb::{IpaOperand, Piece, Pieces};
use crate::types::*;
use crate::{Error, Features};
use std::vec::Vec;

const PA: Pa = Pa::new(0x12_3456_7000);

const PERMISSIONS: [Permission; 6] = [
    Permission::ReadOnly,
    Permission::Untracked,
    Permission::Clean(Engine::WriteProtect),
    Permission::Clean(Engine::Dbm),
    Permission::Dirty(Engine::WriteProtect),
    Permission::Dirty(Engine::Dbm),
];

#[test]
fn leaves_have_the_bits_of_the_manual() {
    // Valid page, MemAttr 0b1111, S2AP 0b11, SH 0b11, AF: 0x7ff is what KVM's page tables show too.
    let page = Pte::leaf(Level::L3, PA, MemAttr::WriteBack, Permission::Untracked);
    assert_eq!(page.0, 0x12_3456_7000 | 0x7ff);
    let block = Pte::leaf(
        Level::L2,
        Pa::new(0x4000_0000),
        MemAttr::WriteBack,
        Permission::Untracked,
    );
    assert_eq!(block.0, 0x4000_0000 | 0x7fd);
    // With FEAT_S2FWB MemAttr is 0b0110.
    let forced = Pte::leaf(
        Level::L3,
        PA,
        MemAttr::ForcedWriteBack,
        Permission::ReadOnly,
    );
    assert_eq!(forced.0, 0x12_3456_7000 | 0x75b & !0x80 | 0x40);
    let dbm = Pte::leaf(
        Level::L3,
        PA,
        MemAttr::WriteBack,
        Permission::Clean(Engine::Dbm),
    );
    assert_eq!(dbm.0 & (1 << 51 | 1 << 7), 1 << 51);
    let protected = Pte::leaf(
        Level::L3,
        PA,
        MemAttr::WriteBack,
        Permission::Clean(Engine::WriteProtect),
    );
    assert_eq!(protected.0 & (1 << 51 | 1 << 7), 0);
    assert_eq!(Pte::table(PA).0, 0x12_3456_7003);
}

#[test]
fn invariant_08_the_states_are_told_apart_by_the_descriptor_alone() {
    for level in [Level::L1, Level::L2, Level::L3] {
        for permission in PERMISSIONS {
            let pte = Pte::leaf(level, Pa::new(0x4000_0000), MemAttr::WriteBack, permission);
            assert_eq!(pte.kind(level), Kind::Leaf);
            assert_eq!(pte.is_clean(), matches!(permission, Permission::Clean(_)));
            assert_eq!(pte.is_dirty(), matches!(permission, Permission::Dirty(_)));
            assert_eq!(pte.dirty_bit() == 1, pte.is_dirty());
            assert_eq!(pte.is_tracked(), pte.is_clean() || pte.is_dirty());
            assert_eq!(
                pte.is_untracked_writable(),
                permission == Permission::Untracked
            );
            assert_eq!(
                pte.is_writable(),
                permission == Permission::Untracked || pte.is_dirty()
            );
            if let Permission::Clean(engine) | Permission::Dirty(engine) = permission {
                assert_eq!(pte.engine(), engine);
            }
            for other in PERMISSIONS {
                let changed = pte.with(other);
                assert_eq!(
                    changed,
                    Pte::leaf(level, Pa::new(0x4000_0000), MemAttr::WriteBack, other)
                );
            }
        }
    }
}

#[test]
fn invariant_08_clearing_write_touches_nothing_that_is_no_dirty_leaf() {
    use crate::pte::CLEAR_WRITE;
    for quiet in [
        Pte::EMPTY,
        Pte::BUSY,
        Pte::table(Pa::new(0x0000_ffff_ffff_f000)),
    ] {
        assert_eq!(quiet.0 & CLEAR_WRITE, quiet.0);
        assert!(!quiet.is_dirty() && quiet.dirty_bit() == 0 && !quiet.is_tracked());
    }
    let dirty = Pte::leaf(
        Level::L3,
        PA,
        MemAttr::WriteBack,
        Permission::Dirty(Engine::Dbm),
    );
    assert_eq!(
        Pte(dirty.0 & CLEAR_WRITE),
        dirty.with(Permission::Clean(Engine::Dbm))
    );
}

#[test]
fn invariant_06_a_child_inherits_every_bit_it_is_not_told_to_change() {
    let strange = 1 << 52 | 1 << 53 | 1 << 54 | 1 << 57 | 1 << 58 | 0xf << 59;
    let block = Pte::leaf(
        Level::L2,
        Pa::new(0x4020_0000),
        MemAttr::ForcedWriteBack,
        Permission::ReadOnly,
    );
    let block = Pte(block.0 | strange);
    for index in [0, 1, 511] {
        let child = block.child(Level::L3, index, Permission::Clean(Engine::Dbm));
        assert_eq!(child.output().raw(), 0x4020_0000 + index as u64 * 4096);
        assert_eq!(child.kind(Level::L3), Kind::Leaf);
        let moved = 0x0000_ffff_ffff_f000 | 0b10;
        assert_eq!(
            child.with(Permission::ReadOnly).0 & !moved,
            block.0 & !moved
        );
    }
    let parent = block.child(Level::L3, 0, Permission::ReadOnly).parent();
    assert_eq!(parent, block);
}

#[test]
fn invariant_09_what_makes_a_leaf_dirty_sets_its_access_flag() {
    for permission in PERMISSIONS {
        let pte = Pte::leaf(Level::L3, PA, MemAttr::WriteBack, permission);
        assert_ne!(pte.0 & 1 << 10, 0);
        assert_eq!(Pte(pte.0 & !(1 << 10)).accessed(), pte);
    }
}

#[test]
fn vtcr_is_what_the_manual_says() {
    // 40-bit IPA and PA on an Armv8.0 machine: the value KVM programs there, too.
    assert_eq!(
        Shape::new(40, &Features::BASELINE).unwrap().vtcr,
        0x8002_3558
    );
    let all = Shape::new(48, &Machine::everything()).unwrap();
    assert_eq!(
        all.vtcr,
        0x8000_0000 | 5 << 16 | 1 << 19 | 3 << 21 | 0x3500 | 2 << 6 | 16
    );
    assert_eq!(all.attr, MemAttr::ForcedWriteBack);
    assert_eq!(vttbr(Pa::new(0x8000_0000), vmid()), 7 << 48 | 0x8000_0000);
}

#[test]
fn invariant_14_ha_and_hd_go_together_and_only_with_usable_dirty_state() {
    assert_eq!(
        Shape::new(40, &Features::BASELINE).unwrap().vtcr >> 21 & 3,
        0
    );
    assert_eq!(Shape::new(40, &dbm()).unwrap().vtcr >> 21 & 3, 3);
}

#[test]
fn every_ipa_size_has_a_start_level_that_fits() {
    let features = Features {
        pa_bits: 48,
        ..Features::BASELINE
    };
    for bits in 32..=48u8 {
        let shape = Shape::new(bits, &features).unwrap();
        let resolved = u32::from(bits) - shape.start.shift();
        // Arm ARM D8.2.2: up to four bits beyond one table, and at least one resolved at the start.
        assert!((1..=13).contains(&resolved), "{bits}");
        assert_eq!(shape.roots, 1 << resolved.saturating_sub(9), "{bits}");
        assert_eq!(shape.vtcr & 0x3f, 64 - u64::from(bits));
        assert_eq!(
            shape.vtcr >> 6 & 3,
            if shape.start == Level::L0 { 2 } else { 1 }
        );
    }
    for bits in [0, 31, 49, 255] {
        assert_eq!(
            Shape::new(bits, &features).unwrap_err(),
            Error::IpaBits {
                asked: bits,
                most: 48
            }
        );
    }
    let small = Features {
        pa_bits: 36,
        ..Features::BASELINE
    };
    assert_eq!(
        Shape::new(40, &small).unwrap_err(),
        Error::IpaBits {
            asked: 40,
            most: 36
        }
    );
    let odd = Features {
        pa_bits: 41,
        ..Features::BASELINE
    };
    assert_eq!(Shape::new(40, &odd).unwrap_err(), Error::PaBits(41));
}

#[test]
fn invariant_16_operands_carry_the_page_and_the_leaf_level() {
    let ipa = Ipa::new(0x0000_ffff_ffff_f000);
    assert_eq!(IpaOperand::new(ipa, None).bits(), 0xf_ffff_ffff);
    for (level, ttl) in [
        (Level::L1, 0b0101),
        (Level::L2, 0b0110),
        (Level::L3, 0b0111),
    ] {
        let operand = IpaOperand::new(ipa, Some(level));
        assert_eq!(operand.bits() >> 44, ttl);
        assert_eq!((operand.ipa(), operand.ttl()), (ipa, ttl as u8));
    }
    assert_eq!(IpaOperand::new(ipa, Some(Level::L0)).ttl(), 0);
    assert_eq!(
        GuestVa::new(0xffff_8000_1234_5678).operand(),
        0xff8_0001_2345
    );
}

#[test]
fn invariant_16_ranges_cover_exactly_and_odd_tails_go_alone() {
    let start = 0x12_3400_0000u64;
    let cases = (1..200).chain([511, 512, 513, 4095, 32767, 32768, 1 << 16, (1 << 21) - 1]);
    for pages in cases {
        let mut at = start;
        for piece in Pieces::new(Ipa::new(start), pages, Some(Level::L3)) {
            match piece {
                Piece::Single(ipa) => {
                    assert_eq!(ipa.raw(), at);
                    at += PAGE_SIZE;
                }
                Piece::Range(operand) => {
                    assert_eq!(operand.start().raw(), at);
                    assert_eq!(operand.pages() % 2, 0);
                    assert_eq!(operand.bits() >> 46, 0b01, "the granule is 4 KiB");
                    assert_eq!(operand.bits() >> 37 & 3, 3, "the hint is level 3");
                    at += operand.pages() * PAGE_SIZE;
                }
            }
        }
        assert_eq!(at, start + pages * PAGE_SIZE, "{pages} pages");
    }
    let pieces: Vec<_> = Pieces::new(Ipa::new(0), 64, None).collect();
    assert_eq!(pieces.len(), 1);
}

#[test]
fn invariant_17_vmids_are_checked_against_the_width() {
    assert_eq!(Vmid::new(0, VmidWidth::Sixteen), None);
    assert_eq!(Vmid::new(256, VmidWidth::Eight), None);
    assert_eq!(Vmid::new(256, VmidWidth::Sixteen).unwrap().raw(), 256);
}

#[test]
fn addresses_do_not_wrap() {
    assert_eq!(Ipa::new(u64::MAX).checked_add(1), None);
    assert_eq!(Gfn::new(u64::MAX), None);
    assert_eq!(Gfn::new(u64::MAX >> 12).unwrap().ipa().raw(), !0xfff);
}
