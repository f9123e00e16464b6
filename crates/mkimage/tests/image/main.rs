//! Images from small ELF files, good and bad.

mod maker;

use maker::{ALLOC, FUNCTION, Load, Maker, NOBITS, PROGBITS, RELA, RELR, ROOM, Section, Symbol};
use mkimage::symbols::{self, Fit};
use mkimage::{Error, elf, flat, header};

/// Reads the table back as the crash console does: (address offset, name) in order.
fn read_table(image: &[u8]) -> Vec<(u32, String)> {
    let table = &image[ROOM..];
    let word = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), u32::from_le_bytes(*b"TSYM"));
    (0..word(4) as usize)
        .map(|index| {
            let name = &table[word(12 + 8 * index) as usize..];
            let end = name.iter().position(|byte| *byte == 0).unwrap();
            (
                word(8 + 8 * index),
                String::from_utf8(name[..end].to_vec()).unwrap(),
            )
        })
        .collect()
}

fn image_error(maker: &Maker) -> Error {
    mkimage::image(&maker.build()).unwrap_err()
}

#[test]
fn lays_segments_out_at_their_places_without_bss() {
    let mut maker = Maker::image(0x400);
    maker.loads[1].data[0x3ff] = 0;
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(image.bytes.len(), 0x1400);
    assert_eq!(image.bytes[..0x1000], maker.loads[0].data[..]);
}

#[test]
fn fills_gaps_between_segments_with_zeros() {
    let mut maker = Maker::image(0x400);
    maker.loads[2] = Load {
        paddr: 0x4000,
        vaddr: 0x4000,
        data: vec![7; 16],
        memory: 0x1000,
    };
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(image.bytes.len(), 0x4010);
    assert!(image.bytes[0x1400..0x4000].iter().all(|byte| *byte == 0));
    assert_eq!(image.bytes[0x4000..], [7; 16]);
}

#[test]
fn memory_between_stored_segments_is_stored_as_zeros() {
    let mut maker = Maker::image(0x400);
    // .bss of the second segment, then a third with bytes.
    maker.loads.push(Load {
        paddr: 0x4ff0,
        vaddr: 0x4ff0,
        data: vec![9; 16],
        memory: 16,
    });
    maker.loads[2].memory = 0x2000;
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(image.bytes.len(), 0x5000);
    assert_eq!(image.bytes[0x4fef], 0);
    assert_eq!(image.bytes[0x4ff0], 9);
}

#[test]
fn names_are_sorted_demangled_and_one_an_address() {
    let image = mkimage::image(&Maker::image(0x400).build()).unwrap();
    assert_eq!(
        read_table(&image.bytes),
        [
            (0, "_start".to_owned()),
            (0x100, "local_label".to_owned()),
            (0x200, "board::parse".to_owned()),
            (0x800, "vectors".to_owned()),
        ]
    );
    assert_eq!(image.symbols.warning(), None);
    assert_eq!((image.symbols.kept, image.symbols.total), (4, 4));
}

#[test]
fn same_input_gives_same_output() {
    let elf = Maker::image(0x400).build();
    assert_eq!(
        mkimage::image(&elf).unwrap().bytes,
        mkimage::image(&elf).unwrap().bytes
    );
}

#[test]
fn room_is_found_by_symbols_when_no_section_has_the_name() {
    let mut maker = Maker::image(0x400);
    maker.sections[1].name = ".rodata";
    assert!(matches!(
        image_error(&maker),
        Error::Symbols(symbols::Error::NoRoom)
    ));
    maker
        .symbols
        .push(Symbol("__symbols_start".into(), maker::OBJECT, 2, 0x1000));
    maker
        .symbols
        .push(Symbol("__symbols_end".into(), maker::OBJECT, 2, 0x1400));
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(read_table(&image.bytes).len(), 4);
}

#[test]
fn equal_names_are_stored_once() {
    let mut maker = Maker::image(0x400);
    maker.symbols.clear();
    for place in 0..3 {
        maker.symbols.push(Symbol(
            format!("_ZN3vec4push17h000000000000000{place}E"),
            FUNCTION,
            1,
            place * 16,
        ));
    }
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(image.symbols.used, 8 + 3 * 8 + "vec::push\0".len());
    assert!(
        read_table(&image.bytes)
            .iter()
            .all(|(_, name)| name == "vec::push")
    );
}

/// Twenty functions with names of 100 bytes each, in a room of the given size.
fn long_names(room: usize) -> Maker {
    let mut maker = Maker::image(room);
    maker.symbols = (0..20)
        .map(|index| {
            Symbol(
                format!("{index:02}{}", "n".repeat(98)),
                FUNCTION,
                1,
                index * 16,
            )
        })
        .collect();
    maker
}

#[test]
fn names_are_shortened_before_functions_are_dropped() {
    let image = mkimage::image(&long_names(8 + 20 * (8 + 65)).build()).unwrap();
    let table = read_table(&image.bytes);
    assert_eq!(table.len(), 20);
    assert!(table.iter().all(|(_, name)| name.len() == 64));
    assert_eq!(image.symbols.shortened_to, Some(64));
    assert!(image.symbols.warning().unwrap().contains("cut to 64 bytes"));
}

#[test]
fn a_cut_table_does_not_name_later_functions_after_earlier_ones() {
    let room = 8 + 5 * (8 + 33) + 8 + 2;
    let image = mkimage::image(&long_names(room).build()).unwrap();
    let table = read_table(&image.bytes);
    assert_eq!(table.len(), 6);
    assert_eq!(table[5], (5 * 16, symbols::UNKNOWN.to_owned()));
    let Fit {
        kept, total, used, ..
    } = image.symbols;
    assert_eq!((kept, total, used), (5, 20, room));
    assert!(image.symbols.warning().unwrap().contains("only 5 of 20"));
    // One byte less holds one function less.
    let image = mkimage::image(&long_names(room - 1).build()).unwrap();
    assert_eq!(image.symbols.kept, 4);
}

#[test]
fn smallest_room_holds_one_function_and_one_byte_less_is_refused() {
    let need = 8 + (8 + 33) + (8 + 2);
    assert_eq!(
        mkimage::image(&long_names(need).build())
            .unwrap()
            .symbols
            .kept,
        1
    );
    assert!(matches!(
        image_error(&long_names(need - 1)),
        Error::Symbols(symbols::Error::TooSmall { have, need: told }) if have == need - 1 && told == need
    ));
    assert!(matches!(
        image_error(&long_names(0)),
        Error::Symbols(symbols::Error::TooSmall { have: 0, .. })
    ));
}

#[test]
fn a_single_function_needs_no_closing_entry() {
    let mut maker = Maker::image(8 + 8 + 5);
    maker.symbols = vec![Symbol("main".into(), FUNCTION, 1, 0x40)];
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(read_table(&image.bytes), [(0x40, "main".to_owned())]);
}

#[test]
fn a_name_is_cut_between_characters() {
    let mut maker = Maker::image(8 + 2 * (8 + 33));
    let name = format!("{}é{}", "a".repeat(31), "b".repeat(60));
    maker.symbols = vec![
        Symbol(name, FUNCTION, 1, 0),
        Symbol("c".repeat(80), FUNCTION, 1, 16),
    ];
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(read_table(&image.bytes)[0].1, "a".repeat(31));
}

#[test]
fn unusable_rooms_are_refused() {
    let mut maker = Maker::image(0x400);
    maker.sections[1].kind = NOBITS;
    assert!(matches!(
        image_error(&maker),
        Error::Symbols(symbols::Error::NotStored)
    ));

    let mut maker = Maker::image(0x400);
    maker.loads[1].data[3] = 1;
    assert!(matches!(
        image_error(&maker),
        Error::Symbols(symbols::Error::Occupied(0x1000))
    ));

    for (address, size) in [
        (0x2000, 0x400),
        (0x1000, 0x401),
        (u64::MAX, 2),
        (0x1000, u64::MAX),
    ] {
        let mut maker = Maker::image(0x400);
        (maker.sections[1].address, maker.sections[1].size) = (address, size);
        assert!(
            matches!(
                image_error(&maker),
                Error::Symbols(symbols::Error::Outside { .. })
            ),
            "{address:#x} {size:#x}"
        );
    }

    let mut maker = Maker::image(0x400);
    maker.symbols.clear();
    assert!(matches!(
        image_error(&maker),
        Error::Symbols(symbols::Error::NoSymbols)
    ));
}

#[test]
fn a_missing_or_wrong_header_is_refused() {
    let with = |at: usize, bytes: &[u8]| {
        let mut maker = Maker::image(0x400);
        maker.loads[0].data[at..at + bytes.len()].copy_from_slice(bytes);
        maker
    };
    let no_magic = with(0x38, b"MZ..");
    assert!(matches!(
        image_error(&no_magic),
        Error::Header(header::Error::NoMagic { found }) if found == b"MZ.."
    ));
    assert!(matches!(
        image_error(&with(8, &[1])),
        Error::Header(header::Error::TextOffset(1))
    ));
    assert!(matches!(
        image_error(&with(24, &[0b1011])),
        Error::Header(header::Error::BigEndian(0b1011))
    ));
    // .bss ends at 0x5000: a size that covers it to the byte is right, one less is not.
    assert!(mkimage::image(&with(16, &0x5000_u64.to_le_bytes()).build()).is_ok());
    assert!(matches!(
        image_error(&with(16, &0x4fff_u64.to_le_bytes())),
        Error::Header(header::Error::ImageSize {
            declared: 0x4fff,
            needed: 0x5000
        })
    ));
    // Without a header a guest is taken as it is; with one that lies it is not.
    assert!(mkimage::flat(&no_magic.build()).is_ok());
    assert!(mkimage::flat(&with(16, &[0; 8]).build()).is_err());
}

#[test]
fn an_image_shorter_than_a_header_is_refused() {
    for length in [1, 0x37, 0x3a, 0x3f] {
        let mut maker = Maker::image(0x400);
        maker.loads.truncate(1);
        maker.loads[0].data.truncate(length);
        assert!(
            matches!(
                image_error(&maker),
                Error::Header(header::Error::NoMagic { .. })
            ),
            "{length:#x}"
        );
    }
}

#[test]
fn segments_that_cannot_be_flat_are_refused() {
    let mut maker = Maker::image(0x400);
    maker.loads[1].paddr = 0xfff;
    maker.loads[1].vaddr = 0xfff;
    assert!(matches!(
        image_error(&maker),
        Error::Flat(flat::Error::Overlap {
            end: 0x1000,
            start: 0xfff
        })
    ));

    let mut maker = Maker::image(0x400);
    (maker.loads[2].paddr, maker.loads[2].vaddr) = (1 << 40, 1 << 40);
    assert!(matches!(
        image_error(&maker),
        Error::Flat(flat::Error::TooLong(_))
    ));
    maker.loads[2].memory = u64::MAX;
    assert!(matches!(
        image_error(&maker),
        Error::Flat(flat::Error::TooLong(_))
    ));

    let mut maker = Maker::image(0x400);
    maker.loads[2].vaddr += 0x1000;
    assert!(matches!(
        image_error(&maker),
        Error::Flat(flat::Error::Skewed {
            address: 0x2000,
            found: 0x1000,
            expected: 0
        })
    ));

    let mut maker = Maker::image(0x400);
    maker.loads.drain(..2);
    assert!(matches!(
        image_error(&maker),
        Error::Flat(flat::Error::NoBytes)
    ));
}

#[test]
fn link_addresses_above_load_addresses_are_taken_off() {
    let mut maker = Maker::image(0x400);
    let high = 0xffff_0000_0000_0000;
    for load in &mut maker.loads {
        load.vaddr += high;
    }
    for section in &mut maker.sections {
        section.address += high;
    }
    for symbol in &mut maker.symbols {
        symbol.3 += high;
    }
    let image = mkimage::image(&maker.build()).unwrap();
    assert_eq!(read_table(&image.bytes)[3], (0x800, "vectors".to_owned()));
}

/// One relocation of `kind` in a section of its own.
fn with_relocation(kind: u64) -> Maker {
    let mut maker = Maker::image(0x400);
    let mut data = Vec::new();
    for field in [0x10_u64, kind, 0] {
        data.extend_from_slice(&field.to_le_bytes());
    }
    maker.sections.push(Section {
        name: ".rela.dyn",
        kind: RELA,
        flags: ALLOC,
        address: 0,
        size: 24,
        data,
    });
    maker
}

#[test]
fn only_relocations_that_are_applied_at_start_are_let_through() {
    assert!(mkimage::image(&with_relocation(1027).build()).is_ok());
    assert!(mkimage::image(&with_relocation(0).build()).is_ok());
    // R_AARCH64_GLOB_DAT
    assert!(matches!(
        image_error(&with_relocation(1025)),
        Error::Elf(elf::Error::Relocation { kind: 1025, offset: 0x10, section }) if section == ".rela.dyn"
    ));
    let mut maker = Maker::image(0x400);
    maker.sections.push(Section {
        name: ".relr.dyn",
        kind: RELR,
        flags: ALLOC,
        address: 0,
        size: 8,
        data: vec![0; 8],
    });
    assert!(matches!(
        image_error(&maker),
        Error::Elf(elf::Error::PackedRelocations(name)) if name == ".relr.dyn"
    ));
}

#[test]
fn other_files_are_refused() {
    let elf_error = |bytes: &[u8]| match mkimage::image(bytes).unwrap_err() {
        Error::Elf(error) => error,
        other => panic!("{other}"),
    };
    assert!(matches!(elf_error(b""), elf::Error::Unreadable(_)));
    assert!(matches!(
        elf_error(b"#!/bin/sh\n"),
        elf::Error::Unreadable(_)
    ));

    let mut maker = Maker::image(0x400);
    maker.machine = 62;
    assert_eq!(elf_error(&maker.build()), elf::Error::Machine(62));
    let mut maker = Maker::image(0x400);
    maker.kind = 1;
    assert_eq!(elf_error(&maker.build()), elf::Error::Type(1));
    let mut maker = Maker::image(0x400);
    maker.loads.clear();
    assert_eq!(elf_error(&maker.build()), elf::Error::Empty);
    let mut maker = Maker::image(0x400);
    maker.loads[0].memory = 0xfff;
    assert_eq!(
        elf_error(&maker.build()),
        elf::Error::LongSegment {
            address: 0,
            file: 0x1000,
            memory: 0xfff
        }
    );
}

#[test]
fn a_file_cut_short_anywhere_is_refused_or_read_but_never_panics() {
    let whole = Maker::image(0x100).build();
    for length in 0..whole.len() {
        // The section headers are last, so every cut loses something that is needed.
        assert!(mkimage::image(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn a_file_with_any_header_byte_changed_never_panics() {
    let whole = Maker::image(0x100).build();
    let headers = (0..64 + 3 * 56).chain(whole.len() - 6 * 64..whole.len());
    let mut refused = 0;
    for at in headers {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            refused += u32::from(mkimage::image(&bytes).is_err());
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn sections_without_an_address_are_not_looked_at() {
    let mut maker = Maker::image(0x400);
    maker.sections.push(Section {
        name: ".symbols.debug",
        kind: PROGBITS,
        flags: 0,
        address: 0,
        size: 4,
        data: vec![1; 4],
    });
    assert!(mkimage::image(&maker.build()).is_ok());
}
