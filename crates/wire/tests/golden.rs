//! The bytes of every message. A change here is a change of protocol: raise `PROTOCOL`.

use proptest::prelude::*;
use tidemark_wire::PROTOCOL;
use tidemark_wire::message::{
    ConsoleFrom, Cost, Counters, DirtyStatus, Engine, EngineChoice, Epoch, ErrorReply, Event,
    Extent, Features, Granularity, Hold, Logging, Mappings, NotAMessage, PIECE_OVERHEAD, Quota,
    Request, Response, SlotAccess, SlotDirty, SlotId, SlotInfo, Stalls, TakeReport, Task, VmId,
    VmInfo, VmState, VmSummary,
};

const VM: VmId = VmId(2);
const SLOT: SlotId = SlotId(1);
const EPOCH: Epoch = Epoch(300);
const QUOTA: Quota = Quota {
    pages: 300,
    interval_ms: 100,
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn requests() -> Vec<(Request<'static>, &'static str)> {
    vec![
        (
            Request::Hello {
                protocol: 4,
                max_payload: 8192,
            },
            "00048040",
        ),
        (Request::Goodbye, "01"),
        (Request::List, "02"),
        (Request::Info { vm: VM }, "0302"),
        (
            Request::Pause {
                vm: VM,
                hold: Hold::Lasting,
            },
            "040200",
        ),
        (
            Request::Pause {
                vm: VM,
                hold: Hold::Session,
            },
            "040201",
        ),
        (
            Request::Resume {
                vm: VM,
                hold: Hold::Lasting,
            },
            "050200",
        ),
        (
            Request::Resume {
                vm: VM,
                hold: Hold::Session,
            },
            "050201",
        ),
        (
            Request::Reset {
                vm: VM,
                restarts: 3,
            },
            "060203",
        ),
        (Request::Stop { vm: VM }, "0702"),
        (Request::PowerOff, "08"),
        (Request::Hash { vm: VM, slot: SLOT }, "090201"),
        (
            dirty_start(EngineChoice::Auto, Granularity::Page, Hold::Lasting),
            "0a02000000",
        ),
        (
            dirty_start(
                EngineChoice::WriteProtect,
                Granularity::Adaptive,
                Hold::Session,
            ),
            "0a02010101",
        ),
        (
            dirty_start(EngineChoice::Dbm, Granularity::Block, Hold::Session),
            "0a02020201",
        ),
        (Request::DirtyStop { vm: VM }, "0b02"),
        (Request::DirtyStatus { vm: VM }, "0c02"),
        (
            Request::DirtyTake {
                vm: VM,
                epoch: EPOCH,
            },
            "0d02ac02",
        ),
        (
            Request::BitmapRead {
                vm: VM,
                slot: SLOT,
                epoch: EPOCH,
                first_page: 32768,
                pages: 32768,
            },
            "0e0201ac02808002808002",
        ),
        (
            Request::DirtyCommit {
                vm: VM,
                epoch: EPOCH,
            },
            "0f02ac02",
        ),
        (
            Request::DirtyAbort {
                vm: VM,
                epoch: EPOCH,
            },
            "1002ac02",
        ),
        (
            Request::ReadMemory {
                vm: VM,
                ipa: 0x4000_0000,
                len: 4096,
            },
            "110280808080048020",
        ),
        (
            Request::ConsoleAttach {
                vm: VM,
                from: ConsoleFrom::Now,
            },
            "120200",
        ),
        (
            Request::ConsoleAttach {
                vm: VM,
                from: ConsoleFrom::Oldest,
            },
            "120201",
        ),
        (Request::ConsoleDetach { vm: VM }, "1302"),
        (
            Request::ConsoleRead {
                vm: VM,
                offset: 1 << 40,
            },
            "1402808080808020",
        ),
        (
            Request::ConsoleWrite {
                vm: VM,
                offset: 5,
                data: b"ls\n",
            },
            "150205036c730a",
        ),
        (
            Request::DirtyEngine {
                vm: VM,
                engine: EngineChoice::WriteProtect,
            },
            "160201",
        ),
        (Request::Costs, "17"),
        (
            Request::DirtyQuota {
                vm: VM,
                quota: Some(QUOTA),
            },
            "180201ac0264",
        ),
        (
            Request::DirtyQuota {
                vm: VM,
                quota: None,
            },
            "180200",
        ),
        (
            Request::SlotAdd {
                vm: VM,
                slot: SlotId(3),
                base_ipa: 0x8000_0000,
                bytes: 64 << 20,
            },
            "190203808080800880808020",
        ),
        (
            Request::SlotDelete {
                vm: VM,
                slot: SlotId(18),
            },
            "1a0212",
        ),
        (
            Request::KeepAlive {
                patience_ms: 10_000,
            },
            "1b904e",
        ),
        (
            Request::PageSums {
                vm: VM,
                slot: SLOT,
                first_page: 300,
                pages: 2048,
            },
            "1c0201ac028010",
        ),
    ]
}

fn dirty_start(engine: EngineChoice, granularity: Granularity, hold: Hold) -> Request<'static> {
    Request::DirtyStart {
        vm: VM,
        engine,
        granularity,
        hold,
    }
}

fn summary(state: VmState) -> VmSummary {
    VmSummary {
        id: VM,
        name: String::from("deb"),
        state,
        vcpus: 2,
        memory_bytes: 512 << 20,
    }
}

fn info() -> VmInfo {
    VmInfo {
        summary: summary(VmState::Running),
        reason: String::from("x"),
        restarts: 1,
        slots: vec![SlotInfo {
            id: SLOT,
            base_ipa: 0x4000_0000,
            pages: 131_072,
            access: SlotAccess::ReadWrite,
            extents: vec![Extent {
                ipa: 0x4000_0000,
                pa: 0x8000_0000,
                pages: 131_072,
            }],
            more_extents: 4,
        }],
        features: Features {
            hafdbs: 2,
            dbm_usable: true,
            bbm2: false,
            fwb: true,
            tlb_range: false,
            ttl: true,
            lse: false,
            vmid16: true,
            ipa_bits: 40,
            cpus: 4,
        },
        mappings: Mappings {
            blocks_1g: 1,
            blocks_2m: 2,
            pages_4k: 3,
        },
        counters: Counters {
            exits: 10,
            hypercalls: 11,
            mmio: 12,
            wfi: 13,
            irqs: 14,
            translation_faults: 15,
            write_faults: 16,
            splits: 17,
            collapses: 18,
            tlbis: 19,
        },
    }
}

fn responses() -> Vec<(Response<'static>, &'static str)> {
    let status = DirtyStatus {
        logging: Some(Logging {
            engine: Engine::Dbm,
            granularity: Granularity::Adaptive,
        }),
        outstanding: Some(EPOCH),
        last_taken: EPOCH,
        last_committed: Epoch(299),
        live_pages_hint: 1,
        write_faults: 2,
        splits: 3,
        harvests: 4,
        entries_read: 5,
        quota: Some(QUOTA),
        stalls: Stalls {
            count: 5,
            time_us: 1000,
            percent: 99,
        },
    };
    let off = DirtyStatus {
        logging: None,
        outstanding: None,
        quota: None,
        stalls: Stalls::default(),
        ..status
    };
    let wp = Logging {
        engine: Engine::WriteProtect,
        granularity: Granularity::Block,
    };
    let take = TakeReport {
        epoch: EPOCH,
        dirty_pages: 7,
        slots: vec![SlotDirty {
            slot: SLOT,
            base_ipa: 0x4000_0000,
            pages: 4096,
            dirty_pages: 7,
        }],
    };
    vec![
        (Response::Ok, "00"),
        (
            Response::Hello {
                protocol: 3,
                max_payload: 1024,
                image: "tidemark 0.1.0",
            },
            "020380080e746964656d61726b20302e312e30",
        ),
        (Response::Vms(vec![]), "0300"),
        (
            Response::Vms(vec![
                summary(VmState::Starting),
                summary(VmState::Paused),
                summary(VmState::Stopped),
            ]),
            "0303020364656200028080808002020364656202028080808002020364656203028080808002",
        ),
        (
            Response::Info(info()),
            "040203646562010280808080020178010101808080800480800800018080808004808080800880800804020100010001000128040102030a0b0c0d0e0f10111213",
        ),
        (Response::State(VmState::Failed), "0504"),
        (
            Response::Progress {
                done: 512,
                total: 4096,
            },
            "0680048020",
        ),
        (
            Response::HashDone {
                sha256: [0xAB; 32],
                pages: 4096,
            },
            "07abababababababababababababababababababababababababababababababab8020",
        ),
        (
            Response::DirtyStatus(status),
            "0801010101ac02ac02ab02010203040501ac026405e80763",
        ),
        (
            Response::DirtyStatus(off),
            "080000ac02ab02010203040500000000",
        ),
        (
            Response::DirtyStatus(DirtyStatus {
                logging: Some(wp),
                ..off
            }),
            "0801000200ac02ab02010203040500000000",
        ),
        (Response::TakeDone(take), "09ac020701018080808004802007"),
        (
            Response::Bitmap {
                first_page: 64,
                pages: 128,
                encoding: &[3, 1, 127],
            },
            "0a4080010303017f",
        ),
        (
            Response::Memory {
                ipa: 0x4000_0000,
                covered: 8,
                encoding: &[6, 0],
            },
            "0b808080800408020600",
        ),
        (
            Response::PageSums {
                first_page: 64,
                sums: &[1, 2, 3, 4],
            },
            "0f400401020304",
        ),
        (
            Response::ConsoleData {
                offset: 300,
                oldest: 44,
                data: b"hi",
            },
            "0cac022c026869",
        ),
        (Response::ConsoleAccepted { next_offset: 8 }, "0d08"),
        (
            Response::Costs {
                frequency: 1000,
                costs: Task::ALL
                    .map(|task| Cost {
                        task,
                        times: 1,
                        ticks: 300,
                        longest: 2,
                    })
                    .to_vec(),
            },
            "0ee807100001ac02020101ac02020201ac02020301ac02020401ac02020501ac02020601ac0202\
             0701ac02020801ac02020901ac02020a01ac02020b01ac02020c01ac02020d01ac02020e01ac02020f01ac0202",
        ),
    ]
}

fn errors() -> Vec<(ErrorReply, &'static str)> {
    vec![
        (ErrorReply::VersionMismatch { target: 7 }, "010007"),
        (ErrorReply::StaleSession, "0101"),
        (ErrorReply::Malformed, "0102"),
        (ErrorReply::NoSuchVm, "0103"),
        (ErrorReply::NoSuchSlot, "0104"),
        (ErrorReply::NotLogging, "0105"),
        (ErrorReply::AlreadyLogging, "0106"),
        (ErrorReply::EpochOutstanding { epoch: EPOCH }, "0107ac02"),
        (
            ErrorReply::NoSuchEpoch {
                outstanding: Some(EPOCH),
            },
            "010801ac02",
        ),
        (ErrorReply::NoSuchEpoch { outstanding: None }, "010800"),
        (ErrorReply::NotPaused, "0109"),
        (ErrorReply::BadState(VmState::Stopped), "010a03"),
        (ErrorReply::OutOfRange, "010b"),
        (ErrorReply::OutOfMemory, "010c"),
        (ErrorReply::EngineUnavailable, "010d"),
        (ErrorReply::NeedsAlignment, "010e"),
        (ErrorReply::Busy, "010f"),
        (ErrorReply::BadQuota, "0110"),
        (ErrorReply::SlotNumber, "0111"),
        (ErrorReply::SlotExists, "0112"),
        (ErrorReply::SlotOverlap { slot: SlotId(3) }, "011303"),
        (
            ErrorReply::SlotPlace {
                first: 1 << 30,
                end: 1 << 40,
            },
            "01148080808004808080808020",
        ),
        (ErrorReply::SlotSize, "0115"),
        (ErrorReply::NotEnoughMemory { free_bytes: 300 }, "0116ac02"),
    ]
}

fn events() -> Vec<(Event<'static>, &'static str)> {
    vec![
        (
            Event::Console {
                vm: VM,
                offset: 128,
                data: b"$ ",
            },
            "00028001022420",
        ),
        (Event::Log { data: b"up" }, "01027570"),
        (
            Event::VmState {
                vm: VM,
                state: VmState::Paused,
            },
            "020202",
        ),
    ]
}

#[test]
fn requests_are_frozen() {
    for (message, wanted) in requests() {
        let mut buffer = [0; 256];
        let bytes = message.encode(&mut buffer).expect("it fits");
        assert_eq!(hex(bytes), wanted, "{message:?}");
        assert_eq!(Request::decode(bytes), Ok(message));
    }
}

#[test]
fn responses_are_frozen() {
    for (message, wanted) in responses() {
        let mut buffer = [0; 512];
        let bytes = message.encode(&mut buffer).expect("it fits");
        assert_eq!(hex(bytes), wanted, "{message:?}");
        assert_eq!(Response::decode(bytes), Ok(message));
    }
}

#[test]
fn errors_are_frozen_and_say_the_way_out() {
    for (error, wanted) in errors() {
        let message = Response::Error(error);
        let mut buffer = [0; 64];
        let bytes = message.encode(&mut buffer).expect("it fits");
        assert_eq!(hex(bytes), wanted, "{error:?}");
        assert_eq!(Response::decode(bytes), Ok(message));
        assert!(error.to_string().len() > 20, "{error:?}: {error}");
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn events_are_frozen() {
    for (message, wanted) in events() {
        let mut buffer = [0; 64];
        let bytes = message.encode(&mut buffer).expect("it fits");
        assert_eq!(hex(bytes), wanted, "{message:?}");
        assert_eq!(Event::decode(bytes), Ok(message));
    }
}

#[test]
fn cut_messages_and_left_over_bytes_are_refused() {
    for (message, _) in requests() {
        let mut buffer = [0; 257];
        let len = message.encode(&mut buffer).expect("it fits").len();
        for cut in 0..len {
            assert_eq!(
                Request::decode(&buffer[..cut]),
                Err(NotAMessage),
                "{message:?} at {cut}"
            );
        }
        assert_eq!(
            Request::decode(&buffer[..=len]),
            Err(NotAMessage),
            "{message:?}"
        );
    }
    for (message, _) in responses() {
        let mut buffer = [0; 512];
        let len = message.encode(&mut buffer).expect("it fits").len();
        for cut in 0..len {
            assert_eq!(
                Response::decode(&buffer[..cut]),
                Err(NotAMessage),
                "{message:?} at {cut}"
            );
        }
        assert_eq!(
            Response::decode(&buffer[..=len]),
            Err(NotAMessage),
            "{message:?}"
        );
    }
}

#[test]
fn hello_of_another_version_can_be_answered_whatever_follows_it() {
    let hello = |protocol: u16| {
        let mut buffer = [0; 16];
        let hello = Request::Hello {
            protocol,
            max_payload: 1024,
        };
        let len = hello.encode(&mut buffer).expect("it fits").len();
        (hello, buffer, len)
    };
    let (other, bytes, len) = hello(PROTOCOL + 1);
    assert_eq!(Request::decode(&bytes[..len + 3]), Ok(other));
    let (_, bytes, len) = hello(PROTOCOL);
    assert_eq!(Request::decode(&bytes[..len + 3]), Err(NotAMessage));
}

#[test]
fn longest_requests_fit_their_frame() {
    let data = [0xFF; tidemark_wire::CONSOLE_WRITE_MAX];
    let mut buffer = [0; tidemark_wire::REQUEST_PAYLOAD_MAX];
    let write = Request::ConsoleWrite {
        vm: VmId(u16::MAX),
        offset: u64::MAX,
        data: &data,
    };
    assert!(write.encode(&mut buffer).is_ok());
    let read = Request::BitmapRead {
        vm: VmId(u16::MAX),
        slot: SlotId(u16::MAX),
        epoch: Epoch(u64::MAX),
        first_page: u64::MAX,
        pages: u32::MAX,
    };
    assert!(read.encode(&mut buffer).is_ok());
}

#[test]
fn longest_lists_fit_the_shortest_answer() {
    let mut buffer = [0; tidemark_wire::RESPONSE_PAYLOAD_MIN];
    let longest = |id| VmSummary {
        id: VmId(id),
        name: "n".repeat(tidemark_wire::bundle::NAME_MAX),
        state: VmState::Failed,
        vcpus: 16,
        memory_bytes: 1 << 48,
    };
    let vms = (0..tidemark_wire::bundle::VMS_MAX as u16)
        .map(longest)
        .collect();
    assert!(Response::Vms(vms).encode(&mut buffer).is_ok());

    // All slots there can be, in as many pieces as are told, anywhere in 48 bits, and counters
    // that have run for a century at a billion a second.
    let all = (1 << 48) - 1;
    let extents = vec![
        Extent {
            ipa: all,
            pa: all,
            pages: all >> 12
        };
        16
    ];
    let slot = |id, pages, extents| SlotInfo {
        id: SlotId(id),
        base_ipa: all,
        pages,
        access: SlotAccess::ReadWrite,
        extents,
        more_extents: pages as u32,
    };
    let mut slots = vec![slot(0, all >> 12, extents)];
    slots.extend((1..3).map(|id| slot(id, 1 << 14, vec![])));
    let added = tidemark_wire::HOT_SLOT_FIRST..=tidemark_wire::HOT_SLOT_LAST;
    let most = tidemark_wire::HOT_SLOT_BYTES_MAX / tidemark_wire::PAGE_SIZE;
    slots.extend(added.map(|id| slot(id, most, vec![])));
    let many = 1 << 62;
    let info = VmInfo {
        summary: longest(15),
        reason: "r".repeat(100),
        restarts: u32::MAX,
        slots,
        counters: Counters {
            exits: many,
            hypercalls: many,
            mmio: many,
            wfi: many,
            irqs: many,
            translation_faults: many,
            write_faults: many,
            splits: many,
            collapses: many,
            tlbis: many,
        },
        ..info()
    };
    assert!(Response::Info(info).encode(&mut buffer).is_ok());
}

#[test]
fn overheads_are_upper_bounds() {
    let data = vec![0xFF; 16384];
    let mut buffer = vec![0; 16384 + 64];
    let over = |bytes: &[u8]| bytes.len() - 16384;
    let bitmap = Response::Bitmap {
        first_page: u64::MAX,
        pages: u32::MAX,
        encoding: &data,
    };
    let len = over(bitmap.encode(&mut buffer).expect("it fits"));
    assert_eq!(len, tidemark_wire::message::PIECE_OVERHEAD);
    let memory = Response::Memory {
        ipa: u64::MAX,
        covered: u32::MAX,
        encoding: &data,
    };
    let len = over(memory.encode(&mut buffer).expect("it fits"));
    assert_eq!(len, tidemark_wire::message::PIECE_OVERHEAD);
    let console = Response::ConsoleData {
        offset: u64::MAX,
        oldest: u64::MAX,
        data: &data,
    };
    let len = over(console.encode(&mut buffer).expect("it fits"));
    assert_eq!(len, tidemark_wire::message::CONSOLE_OVERHEAD);
    let event = Event::Console {
        vm: VmId(u16::MAX),
        offset: u64::MAX,
        data: &data,
    };
    let len = over(event.encode(&mut buffer).expect("it fits"));
    assert!(len <= tidemark_wire::message::CONSOLE_OVERHEAD);
}

proptest! {
    #[test]
    fn random_payloads_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Request::decode(&bytes);
        let _ = Response::decode(&bytes);
        let _ = Event::decode(&bytes);
    }

    #[test]
    fn damaged_messages_never_panic(which: prop::sample::Index, at: prop::sample::Index, to: u8) {
        let all = responses();
        let mut buffer = [0; 512];
        let len = which.get(&all).0.encode(&mut buffer).expect("it fits").len();
        buffer[at.index(len)] = to;
        let _ = Response::decode(&buffer[..len]);
    }
}

#[test]
fn a_piece_has_a_head() {
    for len in [0, 1, 127, 128, 5000, 16_000] {
        let bytes = vec![0xA5; len];
        for (whole, without) in [
            (
                Response::Memory {
                    ipa: u64::MAX,
                    covered: u32::MAX,
                    encoding: &bytes,
                },
                Response::Memory {
                    ipa: u64::MAX,
                    covered: u32::MAX,
                    encoding: &[],
                },
            ),
            (
                Response::Bitmap {
                    first_page: 64,
                    pages: 300,
                    encoding: &bytes,
                },
                Response::Bitmap {
                    first_page: 64,
                    pages: 300,
                    encoding: &[],
                },
            ),
        ] {
            let mut head = [0; PIECE_OVERHEAD];
            let head = without.head(len, &mut head).expect("it fits");
            let mut buffer = vec![0; 17_000];
            let wanted = whole.encode(&mut buffer).expect("it fits");
            assert_eq!([head, &bytes].concat(), wanted, "{len}");
        }
    }
    assert!(Response::Ok.head(1, &mut [0; PIECE_OVERHEAD]).is_err());
}
