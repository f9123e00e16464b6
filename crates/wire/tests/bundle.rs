//! Bundles, whole and broken: each way of being broken has its own answer.

use proptest::prelude::*;
use tidemark_wire::bundle::{
    Blob, Boot, BootFiles, Builder, Bundle, BundleError, HEADER_LEN, MachineOptions, Manifest,
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
        boot: BootFiles::Kernel {
            kernel: vec![0x4B; 10_000],
            initrd: Some(vec![0x1D; 5]),
            cmdline: "console=ttyAMA0".into(),
        },
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
    out.extend(1u32.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(total.to_le_bytes());
    out.extend(crc32c(&body).to_le_bytes());
    out.extend([0; 4]);
    out.extend(&body);
    out.resize(usize::try_from(total).expect("small").max(out.len()), 0);
    out
}

fn spec(image: Blob) -> VmSpec {
    VmSpec {
        name: "fw".into(),
        vcpus: 1,
        memory_bytes: 2 * MIB,
        autostart: true,
        boot: Boot::Firmware { image },
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
    let firmware = VmDraft {
        boot: BootFiles::Firmware {
            image: vec![0xF1; 4097],
        },
        autostart: false,
        ..draft("u-boot")
    };
    let bytes = pack([draft("debian"), firmware]).expect("a good bundle");
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
    let Boot::Kernel {
        kernel,
        initrd: Some(initrd),
        cmdline,
    } = &debian.boot
    else {
        panic!("{debian:?}")
    };
    assert_eq!(bundle.blob(*kernel).expect("intact"), [0x4B; 10_000]);
    assert_eq!(bundle.blob(*initrd).expect("intact"), [0x1D; 5]);
    assert_eq!(cmdline, "console=ttyAMA0");
    let Boot::Firmware { image } = u_boot.boot else {
        panic!("{u_boot:?}")
    };
    assert_eq!(bundle.blob(image).expect("intact"), [0xF1; 4097]);
    assert!(!u_boot.autostart);
    for blob in [*kernel, *initrd, image] {
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
                boot: BootFiles::Kernel {
                    kernel: vec![i as u8 + 1; 4096 * 5],
                    initrd: None,
                    cmdline: "c".repeat(usize::try_from(len).expect("positive")),
                },
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
    other[8] = 2;
    assert_eq!(refused(&other), BundleError::Format(2));
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
    let Boot::Kernel {
        kernel,
        initrd: Some(initrd),
        ..
    } = bundle.manifest().vms[0].boot
    else {
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
    let boot = BootFiles::Firmware {
        image: vec![1; (2 * MIB + 1) as usize],
    };
    let got = pack([VmDraft {
        boot,
        memory_bytes: 2 * MIB,
        ..draft("a")
    }]);
    assert_eq!(
        got.expect_err("refused"),
        BundleError::TooBig("a".into(), 2 * MIB + 1)
    );
    for cmdline in ["a\0b".to_string(), "c".repeat(2048)] {
        let boot = BootFiles::Kernel {
            kernel: vec![1],
            initrd: None,
            cmdline,
        };
        let got = pack([VmDraft { boot, ..draft("a") }]).expect_err("refused");
        assert_eq!(got, BundleError::CommandLine("a".into()));
    }
}

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
        BundleError::Format(2),
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
        BundleError::TooBig(name(), 1),
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
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut bundle = b"TIDEBNDL\x01\0\0\0".to_vec();
        bundle.extend(bytes);
        let _ = Bundle::parse(&bundle);
    }
}
