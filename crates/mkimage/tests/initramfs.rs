//! Directories packed as cpio and read back.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use mkimage::initramfs::{Error, pack};

/// A directory of its own for each test, emptied first.
fn directory(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// One entry read back: name, mode, (major, minor), contents.
type Entry = (String, u32, (u32, u32), Vec<u8>);

fn unpack(archive: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = 0;
    loop {
        assert_eq!(&archive[at..at + 6], b"070701");
        let field = |index: usize| {
            let start = at + 6 + 8 * index;
            u32::from_str_radix(std::str::from_utf8(&archive[start..start + 8]).unwrap(), 16)
                .unwrap()
        };
        let name_end = at + 110 + field(11) as usize;
        let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
        let data = name_end.next_multiple_of(4);
        let data_end = data + field(6) as usize;
        // Owner root, time zero: nothing of the builder.
        assert_eq!((field(2), field(3), field(5)), (0, 0, 0));
        if name == "TRAILER!!!" {
            assert!(archive[data_end..].iter().all(|byte| *byte == 0));
            return entries;
        }
        entries.push((
            name,
            field(1),
            (field(9), field(10)),
            archive[data..data_end].to_vec(),
        ));
        at = data_end.next_multiple_of(4);
    }
}

#[test]
fn packs_files_links_and_device_nodes_by_name() {
    let root = directory("pack");
    fs::create_dir(root.join("bin")).unwrap();
    fs::write(root.join("bin/busybox"), b"12345").unwrap();
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o700)).unwrap();
    symlink("busybox", root.join("bin/sh")).unwrap();
    fs::write(root.join("readme"), b"").unwrap();
    fs::set_permissions(root.join("readme"), fs::Permissions::from_mode(0o600)).unwrap();
    let entries = unpack(&pack(&root).unwrap());
    let expected: [Entry; 7] = [
        ("bin".into(), 0o040_755, (0, 0), vec![]),
        ("bin/busybox".into(), 0o100_755, (0, 0), b"12345".to_vec()),
        ("bin/sh".into(), 0o120_777, (0, 0), b"busybox".to_vec()),
        ("readme".into(), 0o100_644, (0, 0), vec![]),
        ("dev".into(), 0o040_755, (0, 0), vec![]),
        ("dev/console".into(), 0o020_600, (5, 1), vec![]),
        ("dev/null".into(), 0o020_666, (1, 3), vec![]),
    ];
    assert_eq!(entries, expected);
}

#[test]
fn same_directory_gives_same_bytes_whatever_the_umask() {
    let (one, two) = (directory("same-1"), directory("same-2"));
    for (root, mode) in [(&one, 0o600), (&two, 0o664)] {
        fs::create_dir(root.join("dev")).unwrap();
        fs::write(root.join("file"), b"x").unwrap();
        fs::set_permissions(root.join("file"), fs::Permissions::from_mode(mode)).unwrap();
    }
    assert_eq!(pack(&one).unwrap(), pack(&two).unwrap());
}

#[test]
fn what_cannot_be_packed_is_named() {
    let root = directory("bad");
    let _socket = UnixListener::bind(root.join("socket")).unwrap();
    let error = pack(&root).unwrap_err();
    assert!(
        matches!(&error, Error::Kind(path) if path.ends_with("socket")),
        "{error}"
    );

    let missing = root.join("nothing-here");
    let error = pack(&missing).unwrap_err();
    assert!(
        matches!(&error, Error::Read { path, .. } if *path == missing),
        "{error}"
    );
}
