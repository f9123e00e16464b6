//! Bundles, whole and broken: each way of being broken has its own answer.

use proptest::prelude::*;
use tidemark_wire::bundle::{
    Blob, Boot, BootFiles, Builder, Bundle, BundleError, Clock, FLASH_MAX, FORMAT, Firmware,
    HEADER_LEN, Initrd, Kernel, MachineOptions, Manifest, Payload, RAM_BASE, SEGMENTS_MAX, Segment,
    VmDraft, VmSpec, WhenAllStopped,
};
use tidemark_wire::checksum::crc32c;

const MIB: u64 = 1 << 20;

fn draft(name: &str) -> VmDraft {
    VmDraft {
        name: name.into(),
        vcpus: 2,
        memory_bytes: 64 * MIB,
        autostart: true,
        boot: BootFiles::Kernel(Kernel {
            initrd: Some(Initrd {
                address: RAM_BASE + 32 * MIB,
                file: vec![0x1D; 5],
            }),
            devicetree: Some(RAM_BASE + 34 * MIB),
            cmdline: "console=ttyAMA0".into(),
            ..program(vec![0x4B; 10_000])
        }),
        clock: Clock::Stop,
    }
}

/// A program of one segment, a little larger in memory than its file.
fn program(file: Vec<u8>) -> Kernel<Vec<u8>> {
    Kernel {
        entry: RAM_BASE + 2 * MIB,
        segments: vec![Segment {
            address: RAM_BASE + 2 * MIB,
            size: file.len() as u64 + 100,
            file: Some(file),
        }],
        initrd: None,
        devicetree: None,
        cmdline: String::new(),
    }
}

fn pack(drafts: impl IntoIterator<Item = VmDraft>) -> Result<Vec<u8>, BundleError> {
    let machine = MachineOptions {
        when_all_stopped: WhenAllStopped::PowerOff,
    };
    let mut builder = Builder::new(machine);
    drafts.into_iter().for_each(|draft| builder.vm(draft));
    builder.finish()
}

fn refused(bytes: &[u8]) -> BundleError {
    Bundle::parse(bytes).expect_err("refused")
}

/// A bundle whose manifest nobody checked, as a hostile packer would make it.
fn forged(manifest: &Manifest, total: u64) -> Vec<u8> {
    let body = postcard::to_allocvec(manifest).expect("it serializes");
    let mut out = b"TIDEBNDL".to_vec();
    out.extend(FORMAT.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(total.to_le_bytes());
    out.extend(crc32c(&body).to_le_bytes());
    out.extend([0; 4]);
    out.extend(&body);
    out.resize(usize::try_from(total).expect("small").max(out.len()), 0);
    out
}

/// Firmware alone.
fn firmware<File>(image: File) -> Firmware<File> {
    Firmware {
        image,
        variables: None,
        kernel: None,
    }
}

fn spec(image: Blob) -> VmSpec {
    VmSpec {
        name: "fw".into(),
        vcpus: 1,
        memory_bytes: 2 * MIB,
        autostart: true,
        boot: Boot::Firmware(firmware(image)),
        clock: Clock::Run,
    }
}

fn manifest(vms: Vec<VmSpec>) -> Manifest {
    Manifest {
        machine: MachineOptions::default(),
        vms,
    }
}

#[test]
fn round_trip() {
    let draft_of_firmware = VmDraft {
        boot: BootFiles::Firmware(firmware(vec![0xF1; 4097])),
        autostart: false,
        clock: Clock::Run,
        ..draft("u-boot")
    };
    let bytes = pack([draft("debian"), draft_of_firmware]).expect("a good bundle");
    let bundle = Bundle::parse(&bytes).expect("a good bundle");
    let Manifest { machine, vms } = bundle.manifest();
    assert_eq!(machine.when_all_stopped, WhenAllStopped::PowerOff);
    let [debian, u_boot] = &vms[..] else {
        panic!("{vms:?}")
    };
    assert_eq!(
        (debian.name.as_str(), debian.vcpus, debian.memory_bytes),
        ("debian", 2, 64 * MIB)
    );
    let Boot::Kernel(kernel) = &debian.boot else {
        panic!("{debian:?}")
    };
    let [kernel_file, initrd_file] = debian.boot.blobs().collect::<Vec<_>>()[..] else {
        panic!("{debian:?}")
    };
    assert_eq!(bundle.blob(kernel_file).expect("intact"), [0x4B; 10_000]);
    assert_eq!(bundle.blob(initrd_file).expect("intact"), [0x1D; 5]);
    assert_eq!(kernel.cmdline, "console=ttyAMA0");
    assert_eq!(
        kernel.ranges().collect::<Vec<_>>(),
        [
            ("segment", RAM_BASE + 2 * MIB, 10_100),
            ("initrd", RAM_BASE + 32 * MIB, 5)
        ]
    );
    assert_eq!(kernel.devicetree, Some(RAM_BASE + 34 * MIB));
    let [image] = u_boot.boot.blobs().collect::<Vec<_>>()[..] else {
        panic!("{u_boot:?}")
    };
    assert_eq!(bundle.blob(image).expect("intact"), [0xF1; 4097]);
    assert!(!u_boot.autostart);
    assert_eq!((debian.clock, u_boot.clock), (Clock::Stop, Clock::Run));
    for blob in [kernel_file, initrd_file, image] {
        assert_eq!(blob.offset % 4096, 0);
    }
}

#[test]
fn padding_by_the_boot_loader_is_legal() {
    let mut bytes = pack([draft("a")]).expect("a good bundle");
    bytes.resize(bytes.len() + 12_345, 0xFF);
    assert!(Bundle::parse(&bytes).is_ok());
}

#[test]
fn guests_that_share_files_share_bytes() {
    let one = pack([draft("a")]).expect("a good bundle").len();
    let four = pack(["a", "b", "c", "d"].map(draft))
        .expect("a good bundle")
        .len();
    assert!(four < one + 4096, "{four} against {one}");
}

#[test]
fn offsets_hold_whatever_the_manifest_grows_to() {
    // Manifest lengths around the page edge, where a longer varint moves every file.
    for pad in 3900..4100 {
        let drafts = (0..4).map(|i| {
            let len = (pad - i * 1000).clamp(0, 1000);
            VmDraft {
                boot: BootFiles::Kernel(Kernel {
                    cmdline: "c".repeat(usize::try_from(len).expect("positive")),
                    ..program(vec![i as u8 + 1; 4096 * 5])
                }),
                ..draft(&format!("vm{i}"))
            }
        });
        let bytes = pack(drafts).expect("a good bundle");
        let bundle = Bundle::parse(&bytes).expect("a good bundle");
        for (i, vm) in bundle.manifest().vms.iter().enumerate() {
            for blob in vm.boot.blobs() {
                assert_eq!(
                    bundle.blob(blob).expect("intact")[0],
                    i as u8 + 1,
                    "pad {pad}"
                );
            }
        }
    }
}

#[test]
fn what_is_no_bundle() {
    assert_eq!(refused(b""), BundleError::Magic);
    assert_eq!(refused(b"070701 a cpio archive"), BundleError::Magic);
    assert_eq!(
        refused(b"TIDE"),
        BundleError::Truncated { wanted: 32, got: 4 }
    );
}

#[test]
fn header_damage() {
    let good = pack([draft("a")]).expect("a good bundle");
    let mut other = good.clone();
    // One of before, and one to come.
    for format in [1, 3] {
        other[8] = format;
        assert_eq!(refused(&other), BundleError::Format(format.into()));
    }
    let short = &good[..good.len() - 1];
    let (wanted, got) = (good.len() as u64, short.len() as u64);
    assert_eq!(refused(short), BundleError::Truncated { wanted, got });
    let mut long = good.clone();
    long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let wanted = u64::from(u32::MAX) + HEADER_LEN as u64;
    let got = good.len() as u64;
    assert_eq!(refused(&long), BundleError::Truncated { wanted, got });
    let mut huge = good.clone();
    huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(
        refused(&huge),
        BundleError::Truncated {
            wanted: u64::MAX,
            got
        }
    );
}

#[test]
fn manifest_damage() {
    let good = pack([draft("a")]).expect("a good bundle");
    let len = u32::from_le_bytes(*good[12..].first_chunk().expect("a header")) as usize;
    for at in HEADER_LEN..HEADER_LEN + len {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert_eq!(refused(&bad), BundleError::ManifestCrc, "at {at}");
    }
    // The CRC of nonsense can be right.
    let mut bad = good.clone();
    bad[HEADER_LEN..HEADER_LEN + len].fill(0xFF);
    let crc = crc32c(&bad[HEADER_LEN..HEADER_LEN + len]);
    bad[24..28].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(refused(&bad), BundleError::Manifest);
}

#[test]
fn file_damage_is_found_when_the_file_is_used() {
    let mut bytes = pack([draft("a")]).expect("a good bundle");
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    let bundle = Bundle::parse(&bytes).expect("the manifest is intact");
    let [kernel, initrd] = bundle.manifest().vms[0].boot.blobs().collect::<Vec<_>>()[..] else {
        panic!("a kernel was packed")
    };
    assert!(bundle.blob(kernel).is_ok());
    assert_eq!(bundle.blob(initrd), Err(BundleError::BlobCrc(initrd)));
}

#[test]
fn files_outside_the_bundle() {
    let check = |blob: Blob| {
        let bytes = forged(&manifest(vec![spec(blob)]), 8192);
        assert_eq!(refused(&bytes), BundleError::BlobRange("fw".into(), blob));
    };
    let blob = Blob {
        offset: 4096,
        len: 4096,
        crc32c: 0,
    };
    assert!(Bundle::parse(&forged(&manifest(vec![spec(blob)]), 8192)).is_ok());
    check(Blob { len: 4097, ..blob });
    check(Blob { len: 0, ..blob });
    check(Blob {
        len: u64::MAX,
        ..blob
    });
    check(Blob {
        offset: u64::MAX - 4095,
        len: 4096,
        ..blob
    });
    check(Blob { offset: 0, ..blob });
    check(Blob {
        offset: 4097,
        len: 1,
        ..blob
    });
    check(Blob {
        offset: 12288,
        len: 1,
        ..blob
    });
}

#[test]
fn a_blob_of_another_bundle_is_refused() {
    let bytes = pack([draft("a")]).expect("a good bundle");
    let bundle = Bundle::parse(&bytes).expect("a good bundle");
    let far = Blob {
        offset: 1 << 40,
        len: 1,
        crc32c: 0,
    };
    assert!(matches!(bundle.blob(far), Err(BundleError::BlobRange(..))));
    let wraps = Blob {
        offset: u64::MAX,
        len: u64::MAX,
        crc32c: 0,
    };
    assert!(matches!(
        bundle.blob(wraps),
        Err(BundleError::BlobRange(..))
    ));
}

#[test]
fn impossible_guests() {
    assert_eq!(pack([]).expect_err("refused"), BundleError::NoVms);
    let many = (0..17).map(|i| draft(&format!("vm{i}")));
    assert_eq!(
        pack(many).expect_err("refused"),
        BundleError::TooManyVms(17)
    );
    let twice = [draft("a"), draft("b"), draft("a")];
    assert_eq!(
        pack(twice).expect_err("refused"),
        BundleError::DuplicateName("a".into())
    );
    for name in ["", "a b", "näme", "7", "a/b", &"x".repeat(32)] {
        let got = pack([draft(name)]).expect_err("refused");
        assert_eq!(got, BundleError::Name(name.into()));
    }
    for name in ["7up", "x", &"x".repeat(31)] {
        assert!(pack([draft(name)]).is_ok(), "{name}");
    }
    for vcpus in [0, 17, 255] {
        let got = pack([VmDraft {
            vcpus,
            ..draft("a")
        }])
        .expect_err("refused");
        assert_eq!(got, BundleError::Vcpus("a".into(), vcpus));
    }
    for memory_bytes in [0, MIB, 3 * MIB, 2 * MIB + 1, u64::MAX] {
        let got = pack([VmDraft {
            memory_bytes,
            ..draft("a")
        }])
        .expect_err("refused");
        assert_eq!(got, BundleError::Memory("a".into(), memory_bytes));
    }
    let too_big = FLASH_MAX as usize + 1;
    for (what, boot) in [
        ("firmware", firmware(vec![1; too_big])),
        (
            "variables",
            Firmware {
                variables: Some(vec![1; too_big]),
                ..firmware(vec![1])
            },
        ),
    ] {
        let boot = BootFiles::Firmware(boot);
        let got = pack([VmDraft { boot, ..draft("a") }]).expect_err("refused");
        assert_eq!(got, BundleError::Flash("a".into(), what, FLASH_MAX + 1));
    }
    for cmdline in ["a\0b".to_string(), "c".repeat(2048)] {
        let boot = BootFiles::Kernel(Kernel {
            cmdline,
            ..program(vec![1])
        });
        let got = pack([VmDraft { boot, ..draft("a") }]).expect_err("refused");
        assert_eq!(got, BundleError::CommandLine("a".into()));
    }
}

const NO_BLOB: Blob = Blob {
    offset: 4096,
    len: 1,
    crc32c: 0,
};

/// Addresses and sizes, most of them near an edge.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(8),
        Just(RAM_BASE),
        Just(RAM_BASE - 8),
        Just(RAM_BASE + MIB),
        Just(2 * MIB),
        Just(MIB),
        Just(u64::MAX - 7),
        Just(u64::MAX - RAM_BASE + 1),
        any::<u64>(),
    ]
}

#[test]
fn programs_that_are_not_in_memory() {
    let good = || Kernel {
        entry: RAM_BASE + MIB + 4,
        segments: vec![
            Segment {
                address: RAM_BASE + MIB,
                size: 4096,
                file: Some(NO_BLOB),
            },
            Segment {
                address: RAM_BASE,
                size: MIB,
                file: None,
            },
        ],
        initrd: Some(Initrd {
            address: RAM_BASE + 2 * MIB - 1,
            file: NO_BLOB,
        }),
        devicetree: Some(RAM_BASE + 2 * MIB - 8),
        cmdline: String::new(),
    };
    type Change<'a> = &'a dyn Fn(&mut Kernel<Blob>);
    let judged = |change: Change<'_>| {
        let mut kernel = good();
        change(&mut kernel);
        let boot = Boot::Kernel(kernel);
        let vm = VmSpec {
            boot,
            ..spec(NO_BLOB)
        };
        Bundle::parse(&forged(&manifest(vec![vm]), 8192)).map(|_| ())
    };
    let name = || String::from("fw");
    assert_eq!(judged(&|_| ()), Ok(()));
    let wrong: [(Change<'_>, BundleError); 13] = [
        (
            &|kernel| kernel.segments.clear(),
            BundleError::Segments(name(), 0),
        ),
        (
            &|kernel| {
                let one = kernel.segments[1].clone();
                kernel.segments.resize(SEGMENTS_MAX + 1, one);
            },
            BundleError::Segments(name(), SEGMENTS_MAX + 1),
        ),
        (
            &|kernel| kernel.segments[0].address = RAM_BASE - 4096,
            BundleError::Place(name(), "segment", RAM_BASE - 4096, 4096),
        ),
        (
            &|kernel| kernel.segments[0].size = MIB + 1,
            BundleError::Place(name(), "segment", RAM_BASE + MIB, MIB + 1),
        ),
        (
            &|kernel| kernel.segments[0].size = u64::MAX,
            BundleError::Place(name(), "segment", RAM_BASE + MIB, u64::MAX),
        ),
        (
            &|kernel| kernel.segments[0].size = 0,
            BundleError::Place(name(), "segment", RAM_BASE + MIB, 0),
        ),
        (
            &|kernel| kernel.segments[1].size = MIB + 1,
            BundleError::Overlap(name(), ("segment", RAM_BASE), ("segment", RAM_BASE + MIB)),
        ),
        (
            &|kernel| kernel.initrd.as_mut().expect("there").address = RAM_BASE + 5,
            BundleError::Overlap(name(), ("initrd", RAM_BASE + 5), ("segment", RAM_BASE)),
        ),
        (
            &|kernel| kernel.initrd.as_mut().expect("there").address = RAM_BASE + 2 * MIB,
            BundleError::Place(name(), "initrd", RAM_BASE + 2 * MIB, 1),
        ),
        (
            &|kernel| {
                kernel.segments[0].size = 4;
                kernel.segments[0].file.as_mut().expect("there").len = 5;
                kernel.entry = RAM_BASE + MIB;
            },
            BundleError::Segment(name(), RAM_BASE + MIB),
        ),
        (
            &|kernel| kernel.entry = RAM_BASE + MIB + 4096,
            BundleError::Entry(name(), RAM_BASE + MIB + 4096),
        ),
        (
            &|kernel| kernel.entry += 2,
            BundleError::Entry(name(), RAM_BASE + MIB + 6),
        ),
        (
            &|kernel| kernel.devicetree = Some(RAM_BASE + 2 * MIB),
            BundleError::Place(name(), "devicetree", RAM_BASE + 2 * MIB, 8),
        ),
    ];
    for (change, error) in wrong {
        assert_eq!(judged(change), Err(error));
    }
}

/// Debian pads its images to a bank of flash; what erased flash is as good as is not packed.
#[test]
fn firmware_comes_with_all_that_it_needs_and_no_padding() {
    const SECTOR: usize = 256 << 10;
    let padded = |with: u8, len: usize| {
        let mut image = vec![7; SECTOR + 5];
        image.resize(len, with);
        image
    };
    let all = Firmware {
        image: padded(0, FLASH_MAX as usize),
        variables: Some(padded(0xff, 5 * SECTOR)),
        kernel: Some(Payload {
            kernel: b"MZ".to_vec(),
            initrd: Some(b"0707".to_vec()),
            cmdline: "quiet".into(),
        }),
    };
    let boot = |firmware| VmDraft {
        boot: BootFiles::Firmware(firmware),
        ..draft("a")
    };
    let bytes = pack([boot(all)]).expect("a good bundle");
    let bundle = Bundle::parse(&bytes).expect("a good bundle");
    let files = bundle.manifest().vms[0].boot.blobs();
    let files: Vec<_> = files
        .map(|blob| bundle.blob(blob).expect("intact"))
        .collect();
    assert_eq!(
        files[0],
        padded(0, 2 * SECTOR),
        "zeros that fill a sector stay"
    );
    assert_eq!(files[1], padded(0xff, 2 * SECTOR));
    assert_eq!(files[2..], [b"MZ".as_slice(), b"0707"]);
    // Zeros at the end of what is not padded to a bank are its own, and variables may be none at all.
    let bytes = pack([boot(Firmware {
        image: padded(0, 3 * SECTOR),
        variables: Some(vec![0; FLASH_MAX as usize]),
        kernel: None,
    })])
    .expect("a good bundle");
    let bundle = Bundle::parse(&bytes).expect("a good bundle");
    let files: Vec<_> = bundle.manifest().vms[0].boot.blobs().collect();
    assert_eq!(files.len(), 1);
    assert_eq!(files[0].len, 3 * SECTOR as u64);
}

/// The bytes of the header and the manifest: a change here is another format.
#[test]
fn golden() {
    let bytes = pack([
        draft("a"),
        VmDraft {
            boot: BootFiles::Firmware(firmware(vec![9])),
            autostart: false,
            ..draft("b")
        },
        VmDraft {
            boot: BootFiles::Firmware(Firmware {
                image: vec![9],
                variables: Some(vec![8; 2]),
                kernel: Some(Payload {
                    kernel: b"MZ".to_vec(),
                    initrd: Some(b"0707".to_vec()),
                    cmdline: "quiet".into(),
                }),
            }),
            clock: Clock::Run,
            ..draft("c")
        },
    ])
    .expect("a good bundle");
    let end =
        HEADER_LEN + u32::from_le_bytes(*bytes[12..].first_chunk().expect("a header")) as usize;
    let hex: String = bytes[..end]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(hex, GOLDEN);
}

const GOLDEN: &str = "54494445424e444c02000000940000000480000000000000a376ab0c00000000\
     01030161028080802001008080808104018080808104f44e018020904edaf5d6\
     920101808080900480800105fee39eee040180808091040f636f6e736f6c653d\
     747479414d41300001620280808020000180a001019d91bed602000000016302\
     80808020010180a001019d91bed6020180c00102a5d9b3b50e0180e00102aef2\
     b5a40f0180800204dfe6dcba0305717569657401";

#[test]
fn each_error_is_one_clear_line() {
    let blob = Blob {
        offset: 4096,
        len: 1,
        crc32c: 0,
    };
    let name = || String::from("a");
    for error in [
        BundleError::Magic,
        BundleError::Format(3),
        BundleError::Truncated { wanted: 2, got: 1 },
        BundleError::ManifestCrc,
        BundleError::Manifest,
        BundleError::NoVms,
        BundleError::TooManyVms(17),
        BundleError::Name("a\nb".into()),
        BundleError::DuplicateName(name()),
        BundleError::Vcpus(name(), 0),
        BundleError::Memory(name(), 1),
        BundleError::BlobRange(name(), blob),
        BundleError::Segments(name(), 0),
        BundleError::Segment(name(), 1),
        BundleError::Place(name(), "initrd", 1, 1),
        BundleError::Overlap(name(), ("initrd", 1), ("segment", 2)),
        BundleError::Entry(name(), 1),
        BundleError::Flash(name(), "firmware", FLASH_MAX + 1),
        BundleError::CommandLine(name()),
        BundleError::BlobCrc(blob),
    ] {
        let line = error.to_string();
        assert!(line.len() > 15 && !line.contains('\n'), "{line}");
    }
}

proptest! {
    #[test]
    fn damage_never_panics(
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut: prop::sample::Index,
        fix_crc in any::<bool>(),
    ) {
        let mut bytes = pack(["a", "b"].map(draft)).expect("a good bundle");
        let len = u32::from_le_bytes(*bytes[12..].first_chunk().expect("a header")) as usize;
        for (at, to) in hits {
            let at = at.index(HEADER_LEN + len);
            bytes[at] = to;
        }
        if fix_crc {
            let crc = crc32c(&bytes[HEADER_LEN..HEADER_LEN + len]);
            bytes[24..28].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(bundle) = Bundle::parse(&bytes) {
            for vm in &bundle.manifest().vms {
                for blob in vm.boot.blobs() {
                    let _ = bundle.blob(blob);
                }
            }
        }
        let end = cut.index(bytes.len());
        prop_assert!(Bundle::parse(&bytes[..end]).is_err());
    }

    #[test]
    fn no_place_is_trusted(
        memory_bytes in prop::sample::select(vec![2 * MIB, 64 * MIB, u64::MAX - 2 * MIB + 1]),
        ranges in prop::collection::vec((place(), place()), 0..4),
        entry in place(),
        devicetree in prop::option::of(place()),
    ) {
        let segments = ranges.iter().map(|&(address, size)| Segment { address, size, file: None });
        let kernel = Kernel {
            entry,
            segments: segments.collect(),
            initrd: None,
            devicetree,
            cmdline: String::new(),
        };
        let vm = VmSpec { memory_bytes, boot: Boot::Kernel(kernel), ..spec(NO_BLOB) };
        if Bundle::parse(&forged(&manifest(vec![vm]), 8192)).is_ok() {
            let end = |(address, size): (u64, u64)| u128::from(address) + u128::from(size);
            for (index, &range) in ranges.iter().enumerate() {
                prop_assert!(range.0 >= RAM_BASE);
                prop_assert!(end(range) <= u128::from(RAM_BASE) + u128::from(memory_bytes));
                for &other in &ranges[..index] {
                    let apart = end(range) <= other.0.into() || end(other) <= range.0.into();
                    prop_assert!(apart);
                }
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut bundle = b"TIDEBNDL\x02\0\0\0".to_vec();
        bundle.extend(bytes);
        let _ = Bundle::parse(&bundle);
    }
}
