//! The frame, bitmap and memory codecs against arbitrary and hostile input.

use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use tidemark_wire::bitmap::{self, BitmapError};
use tidemark_wire::checksum::crc32c;
use tidemark_wire::frame::{
    BadReason, Decoder, Encoder, Header, Item, Kind, PayloadTooLong, Seq, Session, buffer_len,
    encode,
};
use tidemark_wire::pages::{self, PagesError};

const HEADER: Header = Header {
    kind: Kind::Request,
    seq: Seq(0x0201),
    session: Session(0xBEEF),
};
const ROOM: usize = buffer_len(1024);

/// What a decoder said, owned.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Said {
    Frame(Header, Vec<u8>),
    Text(Vec<u8>),
    Bad(BadReason, Vec<u8>),
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&HEADER, payload, &mut |part: &[u8]| {
        out.extend_from_slice(part)
    })
    .expect("it fits");
    out
}

fn decode_with<const N: usize>(bytes: &[u8]) -> Vec<Said> {
    let mut decoder = Box::new(Decoder::<N>::new());
    let mut said: Vec<Said> = Vec::new();
    let mut take = |item: Item<'_>| match item {
        Item::Frame(f) => said.push(Said::Frame(f.header, f.payload.to_vec())),
        Item::Bad(b) => said.push(Said::Bad(b.reason, b.text.to_vec())),
        Item::Text(byte) => match said.last_mut() {
            Some(Said::Text(text)) => text.push(byte),
            _ => said.push(Said::Text(vec![byte])),
        },
    };
    for &byte in bytes {
        if let Some(item) = decoder.push(byte) {
            take(item);
        }
    }
    if let Some(item) = decoder.finish() {
        take(item);
    }
    said
}

fn decode(bytes: &[u8]) -> Vec<Said> {
    decode_with::<ROOM>(bytes)
}

fn ok(payload: &[u8]) -> Said {
    Said::Frame(HEADER, payload.to_vec())
}

/// Stuffs raw header-and-payload bytes with a right CRC, to reach the checks behind it.
fn crafted(plain: &[u8]) -> Vec<u8> {
    let mut body = plain.to_vec();
    body.extend_from_slice(&crc32c(plain).to_le_bytes());
    let mut out = vec![0];
    for (index, run) in body.split(|&b| b == 0).enumerate() {
        assert!(run.len() < 254, "crafted frames are short ({index})");
        out.push(run.len() as u8 + 1);
        out.extend_from_slice(run);
    }
    out.push(0);
    out
}

#[test]
fn frame_bytes_are_frozen() {
    let crc = crc32c(&[1, 1, 0, 0, 1, 2, 0, 0, 2, 0, 0xEF, 0xBE, 0x55, 0x00]).to_le_bytes();
    let mut wanted = vec![0, 3, 1, 1, 1, 3, 1, 2, 1, 2, 2, 4, 0xEF, 0xBE, 0x55, 5];
    wanted.extend_from_slice(&crc);
    wanted.push(0);
    assert!(!crc.contains(&0), "the vector above has the CRC as one run");
    assert_eq!(frame(&[0x55, 0x00]), wanted);
}

#[test]
fn text_around_frames_passes() {
    let mut line = b"boot\r\n".to_vec();
    line.extend(frame(b"one"));
    line.extend(b"between");
    line.extend(frame(b"two"));
    line.extend(frame(b""));
    line.extend(b"$ ");
    let wanted = [
        Said::Text(b"boot\r\n".to_vec()),
        ok(b"one"),
        Said::Text(b"between".to_vec()),
        ok(b"two"),
        ok(b""),
        Said::Text(b"$ ".to_vec()),
    ];
    assert_eq!(decode(&line), wanted);
}

#[test]
fn neighbours_may_share_a_delimiter() {
    let mut line = frame(b"one");
    line.pop();
    line.extend(frame(b"two"));
    assert_eq!(decode(&line), [ok(b"one"), ok(b"two")]);
}

#[test]
fn text_after_a_stray_zero_is_shown_at_once() {
    let mut decoder = Decoder::<ROOM>::new();
    assert_eq!(decoder.push(0), None);
    assert_eq!(decoder.push(b'#'), Some(Item::Text(b'#')));
    assert_eq!(decoder.push(b' '), Some(Item::Text(b' ')));
}

#[test]
fn text_written_into_a_frame_is_kept_and_the_next_frame_arrives() {
    let mut line = frame(&[0x80; 40]);
    let half = line.len() / 2;
    line.splice(half..half, b"panic: out of luck\n".iter().copied());
    line.extend(frame(b"next"));
    let said = decode(&line);
    let [Said::Bad(_, text), next] = &said[..] else {
        panic!("{said:?}")
    };
    assert_eq!(text, b"panic: out of luck\n");
    assert_eq!(next, &ok(b"next"));
}

#[test]
fn cut_frame_is_told_and_the_next_one_arrives() {
    let whole = frame(&[7; 100]);
    for cut in 1..whole.len() - 1 {
        let mut line = whole[..cut].to_vec();
        line.extend(frame(b"next"));
        let said = decode(&line);
        assert_eq!(said.last(), Some(&ok(b"next")), "cut at {cut}: {said:?}");
        let bad = said.iter().filter(|s| matches!(s, Said::Bad(..))).count();
        assert_eq!(bad, usize::from(cut > 1), "cut at {cut}: {said:?}");
    }
}

#[test]
fn each_reason_is_told_apart() {
    let head = |version: u8, kind: u8, flags: u8, len: u8| {
        let mut plain = vec![version, kind, flags, 0, 1, 0, 0, 0, len, 0, 1, 0];
        plain.extend_from_slice(b"ab");
        plain
    };
    let reason = |line: &[u8]| match decode_with::<32>(line).first() {
        Some(Said::Bad(reason, _)) => Some(*reason),
        _ => None,
    };
    assert_eq!(
        reason(&crafted(&head(1, 1, 0, 2))),
        None,
        "the crafted frame itself is good"
    );
    assert_eq!(
        reason(&crafted(&head(2, 1, 0, 2))),
        Some(BadReason::Version(2))
    );
    assert_eq!(
        reason(&crafted(&head(1, 9, 0, 2))),
        Some(BadReason::Kind(9))
    );
    assert_eq!(
        reason(&crafted(&head(1, 1, 0x10, 2))),
        Some(BadReason::Flags(0x10))
    );
    assert_eq!(
        reason(&crafted(&head(1, 1, 0x01, 2))),
        None,
        "low flags may be ignored"
    );
    assert_eq!(reason(&crafted(&head(1, 1, 0, 3))), Some(BadReason::Length));
    assert_eq!(reason(&[0, 2, 1, 0]), Some(BadReason::TooShort));
    assert_eq!(reason(&[0, 7, 1, 0]), Some(BadReason::Stuffing));
    assert_eq!(reason(&[0, 7, 1, 1]), Some(BadReason::Ended));
    assert_eq!(reason(&frame(&[1; 64])), Some(BadReason::TooLong));
    let mut flipped = crafted(&head(1, 1, 0, 2));
    let last = flipped.len() - 2;
    flipped[last] ^= 0x40;
    assert_eq!(reason(&flipped), Some(BadReason::Crc));
}

#[test]
fn over_long_frame_is_dropped_once_and_text_in_it_passes() {
    let mut line = vec![0, 3, 1, 1];
    line.extend([0x90; 100]);
    line.extend(b"hello");
    line.extend(frame(b"x"));
    let said = decode_with::<32>(&line);
    let wanted = [
        Said::Bad(BadReason::TooLong, vec![]),
        Said::Text(b"hello".to_vec()),
        ok(b"x"),
    ];
    assert_eq!(said, wanted);
}

#[test]
fn payload_beyond_the_length_field_is_refused() {
    let mut wrote = 0;
    let result = encode(&HEADER, &[0; 65536], &mut |part: &[u8]| wrote += part.len());
    assert_eq!(result, Err(PayloadTooLong(65536)));
    assert_eq!(wrote, 0);
}

#[test]
fn stuffing_edges_round_trip() {
    // Runs of non-zero bytes around the 254-byte block, with and without a zero behind.
    for len in 230..270 {
        for tail in [&b""[..], &[0], &[0, 0], &[1]] {
            let mut payload = vec![0xA5; len];
            payload.extend_from_slice(tail);
            let line = frame(&payload);
            assert!(line.len() <= buffer_len(payload.len()) + 2);
            assert_eq!(decode(&line), [ok(&payload)], "{len} {tail:?}");
        }
    }
}

proptest! {
    #[test]
    fn any_payload_round_trips(payload in prop::collection::vec(any::<u8>(), 0..1024)) {
        let line = frame(&payload);
        prop_assert!(line.len() <= buffer_len(payload.len()) + 2);
        prop_assert!(line[1..line.len() - 1].iter().all(|&b| b != 0));
        prop_assert_eq!(decode(&line), [ok(&payload)]);
    }

    #[test]
    fn a_frame_made_in_parts_is_the_same(
        runs in prop::collection::vec((0..3u8, 0..600usize), 0..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        salt: u64,
    ) {
        // Zeros far apart, close together, and everywhere: blocks end in all places.
        let bytes = runs.iter().flat_map(|&(kind, len)| {
            (0..len).map(move |n| match kind {
                0 => 0,
                1 => (n % 7) as u8,
                _ => 1 | (salt.rotate_left(n as u32) as u8),
            })
        });
        let payload: Vec<u8> = bytes.collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|at| at.index(payload.len() + 1)).collect();
        cuts.extend([0, payload.len()]);
        cuts.sort_unstable();
        let mut line = Vec::new();
        let mut sink = |part: &[u8]| line.extend_from_slice(part);
        let mut made = Encoder::begin(&HEADER, payload.len(), &mut sink).expect("it fits");
        for cut in cuts.windows(2) {
            made.push(&payload[cut[0]..cut[1]], &mut sink);
        }
        made.finish(&mut sink);
        prop_assert_eq!(decode_with::<{ buffer_len(8192) }>(&line), [ok(&payload)]);
        prop_assert_eq!(line, frame(&payload));
    }

    #[test]
    fn damage_never_makes_another_frame_and_never_outlives_itself(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..4),
    ) {
        let mut line = frame(&payload);
        for (at, byte, kind) in hits {
            let at = at.index(line.len());
            match kind {
                0 => line[at] = byte,
                1 => { line.remove(at); }
                _ => line.insert(at, byte),
            }
            if line.is_empty() { break; }
        }
        // A delimiter ends whatever the damage left open; then all is well again.
        line.push(0);
        line.extend(frame(b"after"));
        let said = decode(&line);
        prop_assert_eq!(said.last(), Some(&ok(b"after")));
        for s in &said {
            if let Said::Frame(_, got) = s {
                prop_assert!(got == &payload || got == b"after", "{:?}", said);
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        decode(&bytes);
        decode_with::<1>(&bytes);
        decode_with::<20>(&bytes);
    }

    #[test]
    fn dense_small_bytes_never_panic(bytes in prop::collection::vec(0..8u8, 0..4096)) {
        decode(&bytes);
        decode_with::<40>(&bytes);
    }
}

// ---- bitmaps ----

fn words(pages: u32, seed: u64, style: u8) -> Vec<u64> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut out: Vec<u64> = (0..bitmap::words_for(pages))
        .map(|_| match style {
            0 => 0,
            1 => u64::MAX,
            2 => next(),
            3 => next() & next() & next() & next() & next(),
            _ => [0, u64::MAX, next()][(next() % 3) as usize],
        })
        .collect();
    if !pages.is_multiple_of(64)
        && let Some(last) = out.last_mut()
    {
        *last &= (1 << (pages % 64)) - 1;
    }
    out
}

proptest! {
    #[test]
    fn bitmap_round_trips_in_any_room(
        pages in 1..20_000u32, seed: u64, style in 0..5u8, room in 16..4000usize,
    ) {
        let bits = words(pages, seed, style);
        let mut got = Vec::new();
        let mut at = 0u32;
        let mut turns = 0;
        while at < pages {
            let mut out = vec![0xEE; room];
            let base = (at / 64) as usize;
            let piece = bitmap::encode(&bits[base..], |word| *word, pages - at, &mut out);
            let piece = piece.expect("16 bytes hold a word");
            prop_assert!(piece.pages > 0 && piece.len <= room);
            prop_assert!(piece.pages == pages - at || piece.pages % 64 == 0);
            let raw_would = (((room - 1) / 8) as u32).saturating_mul(64).min(pages - at);
            prop_assert!(piece.pages >= raw_would, "never worse than raw");
            let mut back = vec![0; bitmap::words_for(piece.pages)];
            prop_assert_eq!(bitmap::decode(&out[..piece.len], piece.pages, &mut back), Ok(()));
            got.extend(back);
            at += piece.pages;
            turns += 1;
        }
        prop_assert_eq!(&got, &bits);
        if style < 2 { prop_assert_eq!(turns, 1, "empty and full always fit"); }
    }

    #[test]
    fn any_bitmap_encoding_is_accepted_or_refused(
        tag in 0..6u8, body in prop::collection::vec(any::<u8>(), 0..300), pages in 0..3000u32,
    ) {
        let mut out = vec![0; bitmap::words_for(pages)];
        let encoding: Vec<u8> = std::iter::once(tag).chain(body).collect();
        if bitmap::decode(&encoding, pages, &mut out).is_ok() && pages % 64 != 0 {
            let last = out.last().copied().unwrap_or(0);
            prop_assert_eq!(last >> (pages % 64), 0, "no bit past the end");
        }
    }
}

#[test]
fn bitmap_tags_are_frozen_and_chosen_well() {
    let encoded = |pages: u32, bits: &[u64]| {
        let mut out = [0; 64];
        let done = bitmap::encode(bits, |word| *word, pages, &mut out).expect("it fits");
        assert_eq!(done.pages, pages);
        out[..done.len].to_vec()
    };
    assert_eq!(encoded(128, &[0, 0]), [0]);
    assert_eq!(encoded(128, &[u64::MAX; 2]), [1]);
    assert_eq!(
        encoded(100, &[u64::MAX; 2]),
        [1],
        "bits past the end are not looked at"
    );
    assert_eq!(encoded(128, &[0b1110, 0]), [3, 1, 3, 124]);
    assert_eq!(
        encoded(640, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 63]),
        [3, 0, 1, 0xFE, 4, 1]
    );
    let mixed = 0x5555_5555_5555_5555u64;
    let mut raw = vec![2];
    raw.extend(mixed.to_le_bytes());
    assert_eq!(encoded(64, &[mixed]), raw);
}

#[test]
fn bitmap_refusals() {
    let refused = |encoding: &[u8], pages: u32| {
        let mut out = vec![0; bitmap::words_for(pages)];
        bitmap::decode(encoding, pages, &mut out).expect_err("refused")
    };
    assert_eq!(refused(&[], 64), BitmapError::NoTag);
    assert_eq!(refused(&[4], 64), BitmapError::Tag(4));
    assert_eq!(refused(&[0, 0], 64), BitmapError::Length);
    assert_eq!(refused(&[1, 0], 64), BitmapError::Length);
    assert_eq!(refused(&[2, 0, 0, 0, 0, 0, 0, 0], 64), BitmapError::Length);
    assert_eq!(
        refused(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0], 64),
        BitmapError::Length
    );
    assert_eq!(
        refused(&[2, 0, 0, 0, 0, 0, 0, 0, 0x80], 63),
        BitmapError::PastEnd
    );
    assert_eq!(refused(&[3, 63], 64), BitmapError::Runs);
    assert_eq!(refused(&[3, 65], 64), BitmapError::Runs);
    assert_eq!(refused(&[3, 1, 0, 63], 64), BitmapError::Runs);
    assert_eq!(
        refused(&[3, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01], 64),
        BitmapError::Runs
    );
    assert_eq!(
        refused(&[3, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F], 64),
        BitmapError::Runs
    );
    assert_eq!(refused(&[3, 0x80], 64), BitmapError::Runs);
    assert_eq!(
        bitmap::decode(&[0], 64, &mut [0; 2]),
        Err(BitmapError::Buffer)
    );
}

#[test]
fn bitmap_without_room_for_a_word_is_none() {
    assert_eq!(bitmap::encode(&[0x5555], |word| *word, 64, &mut []), None);
    assert_eq!(
        bitmap::encode(&[0x5555], |word| *word, 64, &mut [0; 8]),
        None
    );
}

#[test]
fn a_bitmap_is_read_about_once() {
    // What EL2 does for a piece with nobody looking for an interrupt: bounded whatever is in it.
    const PAGES: u32 = 32_768;
    let reads = |bits: &[u64]| {
        let count = Cell::new(0);
        let mut out = vec![0; 8192];
        let read = |word: &u64| {
            count.set(count.get() + 1);
            *word
        };
        let done = bitmap::encode(bits, read, PAGES, &mut out).expect("it fits");
        assert_eq!(done.pages, PAGES);
        (count.get(), done.len)
    };
    assert_eq!(reads(&words(PAGES, 1, 0)), (512, 1), "clean");
    let (full, len) = reads(&words(PAGES, 1, 1));
    assert!(full <= 512 + 16 && len == 1, "all dirty: {full} reads");
    let (dense, len) = reads(&words(PAGES, 1, 2));
    assert!(
        dense <= 512 + 32 && len == 1 + 4096,
        "half of all pages, at random: {dense} reads, {len} bytes"
    );
    // Runs that lose a little at first and win in the end are not given up.
    let mut clustered = words(PAGES, 1, 0);
    clustered[..4].copy_from_slice(&words(256, 1, 2));
    let (_, len) = reads(&clustered);
    assert!((64..256).contains(&len), "a few dense words: {len} bytes");
    let sparse: Vec<u64> = (0..512u64).map(|n| 1 << (n % 61)).collect();
    let (_, len) = reads(&sparse);
    assert!(len <= 2 * 512 + 8, "a page in each word: {len} bytes");
    let most: Vec<u64> = (0..512u64).map(|n| 0b101 << (n % 61)).collect();
    let (_, len) = reads(&most);
    assert_eq!(len, 1 + 2048 * 2, "more runs than their bound");
}

#[test]
fn bits_past_the_last_page_are_not_told() {
    for (bits, wanted) in [
        (!0u64 << 40, &[0][..]),
        (!0, &[1]),
        (!0 << 20, &[3, 20, 20]),
        (
            0x5555_5555_5555_5555,
            &[2, 0x55, 0x55, 0x55, 0x55, 0x55, 0, 0, 0],
        ),
    ] {
        let mut out = [0xEE; 64];
        let done = bitmap::encode(&[bits], |word| *word, 40, &mut out).expect("it fits");
        assert_eq!((done.pages, &out[..done.len]), (40, wanted), "{bits:#x}");
    }
}

// ---- memory ----

proptest! {
    #[test]
    fn memory_round_trips_in_any_room(
        runs in prop::collection::vec((0..4u64, 1..700usize), 1..20), room in 10..5000usize,
        salt: u64,
    ) {
        let mut memory = Vec::new();
        for (kind, len) in runs {
            for i in 0..len as u64 {
                memory.push(match kind {
                    0 => 0,
                    1 => 0xAAAA_AAAA_5555_5555,
                    2 => salt.wrapping_mul(i | 1).wrapping_add(i),
                    _ => (i / 2) % 2,
                });
            }
        }
        let mut got: Vec<u64> = Vec::new();
        while got.len() < memory.len() {
            let mut out = vec![0xEE; room];
            let rest = &memory[got.len()..];
            let piece = encode_words(rest, &mut out);
            prop_assert!(piece.words > 0 && piece.len <= room);
            let mut back = vec![0; piece.words * 8];
            prop_assert_eq!(pages::decode(&out[..piece.len], &mut back), Ok(()));
            got.extend(back.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)));
        }
        prop_assert_eq!(got, memory);
    }

    #[test]
    fn any_memory_encoding_is_accepted_or_refused(
        encoding in prop::collection::vec(any::<u8>(), 0..300), len in 0..600usize,
    ) {
        let _ = pages::decode(&encoding, &mut vec![0; len]);
    }

    #[test]
    fn what_is_written_of_a_word_was_read_there(room in 0..200usize, len in 0..100usize, bits in 0..40u32) {
        // A guest that changes memory meanwhile: each read may give another value.
        let reads = Cell::new(0u64);
        let seen = RefCell::new(vec![Vec::new(); len]);
        let indices: Vec<usize> = (0..len).collect();
        let word = |n: &usize| {
            reads.set(reads.get() + 1);
            let value = (reads.get() >> (bits / 8)) & 1;
            seen.borrow_mut()[*n].push(value);
            value
        };
        let mut out = vec![0; room];
        let piece = pages::encode(&indices, word, &mut out);
        prop_assert!(piece.words > 0 || len == 0 || room < pages::ROOM_MIN);
        let mut back = vec![0; piece.words * 8];
        prop_assert_eq!(pages::decode(&out[..piece.len], &mut back), Ok(()));
        for (b, seen) in back.as_chunks::<8>().0.iter().zip(seen.borrow().iter()) {
            prop_assert!(seen.contains(&u64::from_le_bytes(*b)));
        }
    }
}

fn encode_words(words: &[u64], out: &mut [u8]) -> pages::Encoded {
    pages::encode(words, |word| *word, out)
}

#[test]
fn memory_items_are_frozen() {
    let mut out = [0; 64];
    let done = encode_words(&[0; 512], &mut out);
    assert_eq!((done.words, &out[..done.len]), (512, &[0x02, 0x08][..]));
    let done = encode_words(&[7; 512], &mut out);
    assert_eq!(
        (done.words, &out[..done.len]),
        (512, &[0x01, 0x08, 7, 0, 0, 0, 0, 0, 0, 0][..])
    );
    let done = encode_words(&[7, 8, 8], &mut out);
    assert_eq!(done.words, 3);
    assert_eq!(
        &out[..done.len],
        &{
            let mut wanted = vec![3 << 2, 0];
            for w in [7u64, 8, 8] {
                wanted.extend(w.to_le_bytes());
            }
            wanted
        }[..]
    );
}

#[test]
fn a_literal_ends_at_its_longest() {
    let dense: Vec<u64> = (1..=20_000).collect();
    let mut out = vec![0; 200_000];
    let done = encode_words(&dense, &mut out);
    assert_eq!((done.words, done.len), (20_000, 2 + 2 + 20_000 * 8));
    let mut back = vec![0; done.words * 8];
    assert_eq!(pages::decode(&out[..done.len], &mut back), Ok(()));
    let back = back.as_chunks::<8>().0.iter();
    assert!(back.map(|word| u64::from_le_bytes(*word)).eq(dense));
}

#[test]
fn encodings_of_neighbours_may_be_joined() {
    // EL2 makes a long answer of several.
    let memory: Vec<u64> = (0..2000u64).map(|n| n / 700 * (n % 5)).collect();
    let mut out = vec![0; 20_000];
    let (mut words, mut len) = (0, 0);
    for part in memory.chunks(123) {
        let done = encode_words(part, &mut out[len..]);
        assert_eq!(done.words, part.len());
        (words, len) = (words + done.words, len + done.len);
    }
    let mut back = vec![0; words * 8];
    assert_eq!(pages::decode(&out[..len], &mut back), Ok(()));
    let back = back.as_chunks::<8>().0.iter();
    assert!(back.map(|word| u64::from_le_bytes(*word)).eq(memory));
}

#[test]
fn long_zero_ranges_cost_almost_nothing() {
    let mut out = [0; 16];
    let done = pages::encode(&[0; 65536 / 8], |word| *word, &mut out);
    assert_eq!((done.words, done.len), (8192, 2));
}

#[test]
fn memory_refusals() {
    let refused = |encoding: &[u8], len: usize| {
        pages::decode(encoding, &mut vec![0; len]).expect_err("refused")
    };
    assert_eq!(refused(&[], 8), PagesError::TooFew);
    assert_eq!(refused(&[6], 8), PagesError::Truncated);
    assert_eq!(refused(&[2, 0], 8), PagesError::EmptyItem);
    assert_eq!(refused(&[7, 0], 8), PagesError::Kind);
    assert_eq!(refused(&[10, 0], 8), PagesError::TooMany);
    assert_eq!(refused(&[6, 0], 16), PagesError::TooFew);
    assert_eq!(refused(&[6, 0, 6], 8), PagesError::Truncated);
    assert_eq!(refused(&[4, 0, 1, 2, 3], 8), PagesError::Truncated);
    assert_eq!(refused(&[5, 0, 1, 2, 3], 8), PagesError::Truncated);
    assert_eq!(refused(&[6, 0], 9), PagesError::Buffer);
}
