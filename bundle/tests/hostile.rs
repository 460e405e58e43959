//! Hostile input: for each rule there is a bundle that breaks it and is refused with its code, in bounded
//! memory. The archives are built by hand, because the crate's writer would refuse to build them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Seek, SeekFrom, Write};

use bundle::{BuildKind, BundleManifest, BundleReader, KeySet, StreamInput, TrustedKey};
use common::{TestKey, keys, make, member, mixed, noise, parts, verify};

/// Counts what this thread has allocated at its peak.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(n: isize) {
    LIVE.with(|live| {
        live.set(live.get() + n);
        PEAK.with(|peak| peak.set(peak.get().max(live.get())));
    });
}

#[allow(unsafe_code)]
// SAFETY: every call goes to the system allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The code that a bundle is refused with; refusing must not take more than 2 MiB (zstd's own
/// memory is bounded by its window and not counted here).
fn code(bytes: &[u8]) -> String {
    PEAK.with(|peak| peak.set(LIVE.with(Cell::get)));
    let before = LIVE.with(Cell::get);
    let result = verify(bytes, &keys());
    let used = PEAK.with(Cell::get) - before;
    assert!(used < 2 << 20, "{used} bytes to refuse a bundle");
    result.expect_err("the bundle was accepted").code().to_owned()
}

/// Writes a correct checksum into a tar header.
fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn header(name: &str, size: u64) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..124].copy_from_slice(b"0000644\x000000000\x000000000\0");
    header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut header);
    header
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in members {
        out.extend(header(name, content.len() as u64));
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// A good bundle with its header of `name` changed.
fn with_header(name: &str, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = make(&[&mixed(9000)]);
    let at = member(&bytes, name).start - 512;
    change(&mut bytes[at..at + 512]);
    bytes
}

/// An archive whose manifest is this text, properly signed.
fn with_manifest(json: &str) -> Vec<u8> {
    let signature = TestKey::new(1).sign(json.as_bytes(), "c").text;
    tar(&[("manifest.json", json.as_bytes()), ("manifest.json.minisig", signature.as_bytes())])
}

/// A good manifest as text, with one piece replaced.
fn manifest(from: &str, to: &str) -> String {
    let json = String::from_utf8(parts(&[&mixed(9000)], 1).manifest.to_json().unwrap()).unwrap();
    assert!(json.contains(from), "{from} is not in {json}");
    json.replacen(from, to, 1)
}

/// A good bundle of one payload whose index was changed and then hashed and signed again.
fn with_index(content: &[u8], change: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>)) -> Vec<u8> {
    let mut parts = parts(&[content], 1);
    let (index, data) = &mut parts.payloads[0];
    change(index, data);
    let payload = &mut parts.manifest.components[0].payloads[0];
    payload.index.size = index.len() as u64;
    payload.index.sha256 =
        bundle::index::sha256(index).iter().map(|b| format!("{b:02x}")).collect();
    payload.data.size = data.len() as u64;
    parts.write(&[TestKey::new(1)])
}

/// A good bundle whose one payload, index and frames, is that of another bundle. Lengths are the same: only the
/// index's hash in the manifest tells them apart.
fn with_the_payload_of_another(content: &[u8], other: &[u8]) -> Vec<u8> {
    let (mut good, other) = (parts(&[content], 1), parts(&[other], 1));
    let lengths = |parts: &common::Parts| {
        let (index, data) = &parts.payloads[0];
        (index.len(), data.len())
    };
    assert_eq!(lengths(&good), lengths(&other), "the lengths alone would tell");
    let bytes = good.write(&[TestKey::new(1)]);
    let mut forged = bytes.clone();
    let (index, data) = &other.payloads[0];
    forged[member(&bytes, "system/p0.index")].copy_from_slice(index);
    forged[member(&bytes, "system/p0.zst")].copy_from_slice(data);
    assert_ne!(forged, bytes);
    forged
}

/// Offsets in an index with one frame and one piece.
const FRAME_BLOCKS: usize = 36;
const FRAME_STORED: usize = 40;
const CONTENT: usize = 44;
const PIECE: usize = 76;

/// Replaces the stored frame, with the lengths and hashes of an attacker who has the key.
fn with_frame(content: &[u8], frame: &[u8]) -> Vec<u8> {
    with_index(content, |index, data| {
        *data = frame.to_vec();
        index[FRAME_STORED..FRAME_STORED + 4].copy_from_slice(&(frame.len() as u32).to_le_bytes());
        index[PIECE..PIECE + 32].copy_from_slice(&bundle::index::sha256(frame));
    })
}

fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(content, 3).unwrap()
}

#[test]
fn every_truncation_is_refused() {
    let bytes = make(&[&mixed(20_000)]);
    verify(&bytes, &keys()).unwrap();
    for end in 0..bytes.len() {
        assert_eq!(code(&bytes[..end]), "truncated", "cut to {end} bytes");
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let bytes = make(&[&mixed(9000)]);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            assert!(verify(&flipped, &keys()).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn trailing_bytes_are_refused() {
    for extra in [&b"\0"[..], b"x", &[0; 512], &[0; 9216]] {
        let mut bytes = make(&[&mixed(9000)]);
        bytes.extend_from_slice(extra);
        assert_eq!(code(&bytes), "trailing-data");
    }
}

#[test]
fn tar_tricks_are_refused() {
    let named = |name: &str| {
        with_header("system/p0.zst", |header| {
            header[..100].fill(0);
            header[..name.len()].copy_from_slice(name.as_bytes());
            seal(header);
        })
    };
    for name in
        ["../p0.zst", "/system/p0.zst", "system/../p0.zst", "./p0.zst", "a//b", "a\\b", "a b", "a/"]
    {
        assert_eq!(code(&named(name)), "unsafe-name", "{name}");
    }
    assert_eq!(code(&named("system/p1.zst")), "unexpected-member");
    assert_eq!(code(&named("system/p0.index")), "duplicate-member");
    assert_eq!(code(&named("manifest.json")), "duplicate-member");
    // Hard link, symbolic link, device, directory, pax (x, g), GNU long name and sparse, old file.
    for flag in *b"12345xgLKS\0" {
        let bytes = with_header("system/p0.zst", |header| {
            header[156] = flag;
            seal(header);
        });
        assert_eq!(code(&bytes), "irregular-member", "{flag}");
    }
    let bytes = with_header("system/p0.zst", |header| {
        header[345] = b'x';
        seal(header);
    });
    assert_eq!(code(&bytes), "bad-header", "a prefix");
    let bytes = with_header("system/p0.zst", |header| {
        header[124] = 0x80;
        seal(header);
    });
    assert_eq!(code(&bytes), "bad-header", "a binary size");
}

#[test]
fn another_order_is_refused() {
    let bytes = make(&[&mixed(9000)]);
    let part = |name| &bytes[member(&bytes, name)];
    let names = ["manifest.json", "manifest.json.minisig", "system/p0.index", "system/p0.zst"];
    let all: Vec<(&str, &[u8])> = names.iter().map(|name| (*name, part(name))).collect();
    assert!(tar(&all) == bytes, "the hand-made archive is the prescribed one");
    for (a, b) in [(0, 1), (1, 2), (2, 3), (0, 3)] {
        let mut swapped = all.clone();
        swapped.swap(a, b);
        assert_eq!(code(&tar(&swapped)), "unexpected-member", "{a} and {b}");
    }
    for missing in 0..4 {
        let mut fewer = all.clone();
        fewer.remove(missing);
        assert_eq!(code(&tar(&fewer)), "unexpected-member", "without {missing}");
    }
    let mut twice = all.clone();
    twice.push(all[3]);
    assert_eq!(code(&tar(&twice)), "duplicate-member");
    let mut more = all;
    more.push(("extra", b"x"));
    assert_eq!(code(&tar(&more)), "unexpected-member");
}

#[test]
fn absurd_lengths_are_refused_before_anything_is_allocated() {
    for name in ["manifest.json", "manifest.json.minisig", "system/p0.index", "system/p0.zst"] {
        let bytes = with_header(name, |header| {
            header[124..135].fill(b'7');
            seal(header);
        });
        assert_eq!(code(&bytes), "bad-length", "{name}");
    }
    // A manifest that claims a gigantic index, payload or data.
    let bytes = with_manifest(&manifest("\"size\": 9000", "\"size\": 99999999999999"));
    assert_eq!(code(&bytes), "bad-length");
    let mut json: serde_json::Value = serde_json::from_str(&manifest("{", "{")).unwrap();
    json["components"][0]["payloads"][0]["index"]["size"] = (9 << 20).into();
    assert_eq!(code(&with_manifest(&json.to_string())), "bad-length");
    // An index that claims frames, pieces or hashes that it does not have.
    for at in [24, 28, 32] {
        let bytes = with_index(&mixed(9000), |index, _| index[at..at + 4].fill(0xff));
        assert!(["bad-index", "bad-length"].contains(&code(&bytes).as_str()), "{at}");
    }
}

#[test]
fn a_broken_index_is_refused_even_when_signed() {
    let change = |at: usize, value: &[u8]| {
        with_index(&mixed(9000), |index, _| index[at..at + value.len()].copy_from_slice(value))
    };
    for (at, value) in [
        (0, &b"SLIPIDX2"[..]),
        (8, &[1]),
        (16, &512_u32.to_le_bytes()),
        (20, &32_u32.to_le_bytes()),
        (24, &0_u32.to_le_bytes()),
        (28, &2_u32.to_le_bytes()),
        (32, &9_u32.to_le_bytes()),
        (FRAME_BLOCKS, &0_u32.to_le_bytes()),
        (FRAME_BLOCKS, &2_u32.to_le_bytes()),
        (FRAME_BLOCKS, &4_u32.to_le_bytes()),
        (FRAME_BLOCKS, &u32::MAX.to_le_bytes()),
        (FRAME_STORED, &0_u32.to_le_bytes()),
        (FRAME_STORED, &1_u32.to_le_bytes()),
        (FRAME_STORED, &u32::MAX.to_le_bytes()),
        // The bitmap follows the single piece's hash: one bit less, and one bit after the payload's end.
        (PIECE + 32, &[0b001]),
        (PIECE + 32, &[0b1101]),
    ] {
        assert_eq!(code(&change(at, value)), "bad-index", "{at}: {value:?}");
    }
    for at in [CONTENT, PIECE, PIECE + 33] {
        assert_eq!(code(&change(at, &[0, 0, 0, 0])), "wrong-hash", "{at}");
    }
    // Each rule separately: another rule would refuse most of these a little later.
    let longer = with_index(&mixed(9000), |index, _| index.push(0));
    for (bundle, reason) in [
        (longer, "its parts"),
        (change(FRAME_BLOCKS, &u32::MAX.to_le_bytes()), "frame 0 has 4294967295 blocks"),
        (change(FRAME_BLOCKS, &4_u32.to_le_bytes()), "frame 0 ends after the payload"),
        (change(FRAME_STORED, &u32::MAX.to_le_bytes()), "frame 0 is stored in 4294967295 bytes"),
        (change(FRAME_STORED, &1_u32.to_le_bytes()), "the frames have 1 bytes"),
    ] {
        let why = verify(&bundle, &keys()).unwrap_err().to_string();
        assert!(why.contains(reason), "{why}");
    }
}

#[test]
fn another_payload_under_a_good_manifest_is_refused() {
    // Complete and consistent: it contradicts only the manifest.
    assert_eq!(code(&with_the_payload_of_another(&noise(9000, 1), &noise(9000, 2))), "wrong-hash");
}

#[test]
fn a_member_above_four_gibibytes_is_passed_over_to_its_end() {
    // 70 frames of 65 MiB, each for one block of zeros: 4.4 GiB as stored, which need not be read. In a sparse
    // file, so that it occupies no space.
    const FRAMES: u32 = 70;
    let (stored, pieces) = (65_u32 << 20, FRAMES * 130);
    let size = u64::from(FRAMES) * 4096;
    let mut index = bundle::index::MAGIC.to_vec();
    index.extend(size.to_le_bytes());
    for number in [4096, 12, FRAMES, pieces, 0] {
        index.extend(number.to_le_bytes());
    }
    for _ in 0..FRAMES {
        index.extend([1_u32.to_le_bytes(), stored.to_le_bytes()].concat());
        index.extend([0; 32]);
    }
    index.resize(index.len() + pieces as usize * 32 + FRAMES.div_ceil(8) as usize, 0);
    let mut described = parts(&[b"", &mixed(9000)], 1);
    let payload = &mut described.manifest.components[0].payloads[0];
    payload.size = size;
    payload.index.size = index.len() as u64;
    payload.index.sha256 = bundle::index::to_hex(&bundle::index::sha256(&index));
    payload.data.size = u64::from(FRAMES) * u64::from(stored);
    assert!(payload.data.size > 1 << 32);
    let json = described.manifest.to_json().unwrap();
    let signature = TestKey::new(1).sign(&json, "c").text;
    let (second, data) = &described.payloads[1];
    let mut file = tempfile::tempfile().unwrap();
    let add = |mut file: &std::fs::File, name: &str, content: &[u8]| {
        let archive = tar(&[(name, content)]);
        file.write_all(&archive[..archive.len() - 1024]).unwrap();
    };
    add(&file, "manifest.json", &json);
    add(&file, "manifest.json.minisig", signature.as_bytes());
    add(&file, "system/p0.index", &index);
    file.write_all(&header("system/p0.zst", u64::from(FRAMES) * u64::from(stored))).unwrap();
    file.seek(SeekFrom::Current(i64::from(FRAMES) * i64::from(stored))).unwrap();
    add(&file, "system/p1.index", second);
    add(&file, "system/p1.zst", data);
    file.write_all(&[0; 1024]).unwrap();
    file.rewind().unwrap();

    let mut reader = BundleReader::open(bundle::SeekableInput(&file), &keys()).unwrap();
    let mut large = reader.next_payload().unwrap().unwrap();
    let last = *large.index().frames().last().unwrap();
    assert_eq!(last.data_offset, u64::from(FRAMES - 1) * u64::from(stored));
    while large.next_frame().is_some() {
        large.skip_frame().unwrap();
    }
    let mut content = Vec::new();
    let mut small = reader.next_payload().unwrap().unwrap();
    small
        .read_frame(&mut |_, bytes| {
            content.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    assert_eq!(content, mixed(9000));
    assert!(reader.next_payload().unwrap().is_none());
}

#[test]
fn bombs_and_short_frames_are_refused() {
    let content = mixed(9000);
    assert_eq!(code(&with_frame(&content, &zstd(&vec![0; 100 << 20]))), "frame-length");
    let zeros = vec![0; 9000];
    assert_eq!(code(&with_frame(&zeros, &zstd(&vec![0; 100 << 20]))), "frame-length");
    assert_eq!(code(&with_frame(&zeros, &zstd(&vec![0; 9001]))), "frame-length");
    assert_eq!(code(&with_frame(&zeros, &zstd(&vec![0; 8999]))), "frame-length");
    assert_eq!(code(&with_frame(&zeros, &zstd(b""))), "frame-length");
    let good = zstd(&zeros);
    verify(&with_frame(&zeros, &good), &keys()).unwrap();
    for (what, frame) in [
        ("two frames", [good.clone(), good.clone()].concat()),
        ("a byte more", [good.clone(), vec![0]].concat()),
        ("a byte less", good[..good.len() - 1].to_vec()),
        ("no zstd", vec![1, 2, 3, 4, 5, 6, 7, 8]),
    ] {
        assert_eq!(code(&with_frame(&zeros, &frame)), "bad-frame", "{what}");
    }
    // The same length with other bytes.
    assert_eq!(code(&with_frame(&content, &zstd(&noise(9000, 1)))), "wrong-hash");
    assert_eq!(code(&with_frame(&zeros, &zstd(&noise(9000, 1)))), "wrong-hash");
}

/// An attacker with the key can make everything match except the blocks' own hashes: robots that already have a block,
/// and find it by its hash, would get a different payload than robots that read it from the bundle.
#[test]
fn a_frame_whose_blocks_are_not_those_of_the_index_is_refused() {
    let (content, other) = (noise(9000, 1), noise(9000, 2));
    let blocks: Vec<u8> = other.chunks(4096).flat_map(bundle::index::sha256).collect();
    let forged = with_index(&content, |index, data| {
        *data = zstd(&other);
        let stored = (data.len() as u32).to_le_bytes();
        index[FRAME_STORED..FRAME_STORED + 4].copy_from_slice(&stored);
        index[CONTENT..CONTENT + 32].copy_from_slice(&bundle::index::sha256(&blocks));
        index[PIECE..PIECE + 32].copy_from_slice(&bundle::index::sha256(data));
    });
    assert_eq!(code(&forged), "wrong-hash");
}

#[test]
fn a_window_that_does_not_fit_the_device_is_refused() {
    let zeros = vec![0; 9000];
    let mut frame = Vec::new();
    let mut encoder = zstd::stream::Encoder::new(&mut frame, 3).unwrap();
    encoder.window_log(25).unwrap();
    std::io::Write::write_all(&mut encoder, &zeros).unwrap();
    encoder.finish().unwrap();
    assert_eq!(code(&with_frame(&zeros, &frame)), "bad-frame");
}

#[test]
fn manifests_are_refused_by_rule() {
    let refused = |from: &str, to: &str| {
        let bytes = with_manifest(&manifest(from, to));
        let error = BundleReader::open(StreamInput(bytes.as_slice()), &keys()).unwrap_err();
        (error.code(), error.to_string())
    };
    for (from, to, code, part) in [
        ("\"format\": 1", "\"format\": 2", "unknown-format", "format version 2"),
        ("\"required\": []", "\"required\": [\"delta\"]", "unknown-feature", "`delta`"),
        ("\"robot-test\"", "\"Robot\"", "bad-manifest", "invalid name `Robot` in `product`"),
        ("\"board-one\"", "\"../x\"", "bad-manifest", "invalid name `../x` in `boards`"),
        ("\"board-one\"", "\"board-two\"", "bad-manifest", "`boards` has `board-two` twice"),
        ("\"1.0.0\"", "\"1.2.4\"", "bad-manifest", "`minimum-version` 1.2.4 is above"),
        ("\"1.0.0\"", "\"1.0\"", "bad-manifest", "`1.0` is not a version"),
        ("\"1.0.0\"", "\"01.0.0\"", "bad-manifest", "`01.0.0` is not a version"),
        ("\"development\"", "\"test\"", "bad-manifest", "unknown variant `test`"),
        ("\"p0\"", "\"a/b\"", "bad-manifest", "invalid name `a/b` in `role`"),
        ("4096", "512", "bad-manifest", "`block-size` 512, expected 4096"),
        ("\"sha256\": \"", "\"sha256\": \"0", "bad-manifest", "not 64 hexadecimal digits"),
        ("\"product\"", "\"produce\"", "bad-manifest", "missing field `product`"),
        ("\"epoch\": 1700000000", "\"epoch\": 1, \"epoch\": 2", "bad-manifest", "duplicate field"),
        ("\"format\": 1", "\"format\": 1, \"x\": ", "bad-manifest", "expected"),
    ] {
        let (found, text) = refused(from, to);
        assert_eq!((found, text.contains(part)), (code, true), "{to}: {text}");
    }
    // An unknown optional field is skipped.
    let json = manifest("\"format\": 1", "\"format\": 1, \"colour\": {\"deep\": [1]}");
    BundleManifest::parse(json.as_bytes()).unwrap();
}

#[test]
fn key_sets_are_refused_by_rule() {
    let key = |seed: u8| TestKey::new(seed).trusted(BuildKind::Development, 1);
    let why = |keys: Vec<TrustedKey>| {
        let json = serde_json::to_vec(&KeySet { serial: 1, keys }).unwrap();
        KeySet::parse(&json).map_err(|error| error.to_string())
    };
    assert!(why(vec![key(1), key(2)]).is_ok());
    let mut other = key(1);
    other.id = key(2).id;
    assert!(why(vec![other]).unwrap_err().contains("listed as 0202020202020202 has the id 0101"));
    assert!(why(vec![key(1), key(1)]).unwrap_err().contains("listed twice"));
    let mut none = key(1);
    none.public = "a secret key".to_owned();
    assert!(why(vec![none]).unwrap_err().contains("is not a public key"));
    assert!(why((1..=64).map(key).collect()).is_ok());
    assert!(why((1..=65).map(key).collect()).unwrap_err().contains("the maximum is 64"));
}

#[test]
fn signature_files_are_refused_by_rule() {
    let json = manifest("{", "{");
    let good = TestKey::new(1).sign(json.as_bytes(), "c").text;
    let code_of = |text: &str| {
        code(&tar(&[
            ("manifest.json", json.as_bytes()),
            ("manifest.json.minisig", text.as_bytes()),
        ]))
    };
    assert_eq!(code_of(&good), "unexpected-member");
    assert_eq!(code_of(&good.replace("signature from", "signature of")), "bad-signature-file");
    assert_eq!(code_of(&good.replace('\n', "\r\n")), "bad-signature-file");
    assert_eq!(code_of(&format!("{good}x\n")), "bad-signature-file");
    assert_eq!(code_of(&good.replace("comment: c", "comment: d")), "bad-signature");
    assert_eq!(code_of(""), "bad-signature-file");
    let other = TestKey::new(1).sign(b"another manifest", "c").text;
    assert_eq!(code_of(&other), "bad-signature");
    // Minisign's older format, which signs the text itself instead of its hash: only one format is accepted.
    let older = TestKey::new(1).sign_legacy(json.as_bytes(), "c");
    assert_eq!(code_of(&older), "bad-signature");
    // The same key twice, and further signatures out of order.
    let mut parts = parts(&[b""], 1);
    let twice = parts.write(&[TestKey::new(1), TestKey::new(1)]);
    assert_eq!(code(&twice), "bad-signature-file");
    let sign = |seed| TestKey::new(seed).sign(json.as_bytes(), "c").text;
    let (a, b) = (sign(2), sign(3));
    let (name_a, name_b) =
        ("manifest.json.0202020202020202.minisig", "manifest.json.0303030303030303.minisig");
    let archive = |first: (&str, &str), second: (&str, &str)| {
        tar(&[
            ("manifest.json", json.as_bytes()),
            ("manifest.json.minisig", good.as_bytes()),
            (first.0, first.1.as_bytes()),
            (second.0, second.1.as_bytes()),
        ])
    };
    // Without a payload both are refused, but not for their order.
    let why = |archive: &[u8]| verify(archive, &keys()).expect_err("no payload").to_string();
    assert!(why(&archive((name_b, &b), (name_a, &a))).contains("a signature after"));
    assert!(!why(&archive((name_a, &a), (name_b, &b))).contains("a signature after"));
    assert_eq!(code(&archive((name_a, &a), (name_a, &a))), "duplicate-member");
    // One signature more than a bundle may have.
    let further: Vec<(String, String)> = (2..10)
        .map(|seed| {
            (format!("manifest.json.{}.minisig", format!("{seed:02X}").repeat(8)), sign(seed))
        })
        .collect();
    let with = |count: usize| {
        let mut members =
            vec![("manifest.json", json.as_bytes()), ("manifest.json.minisig", good.as_bytes())];
        members.extend(further.iter().take(count).map(|(n, s)| (n.as_str(), s.as_bytes())));
        code(&tar(&members))
    };
    assert_eq!((with(7).as_str(), with(8).as_str()), ("unexpected-member", "bad-length"));
}
