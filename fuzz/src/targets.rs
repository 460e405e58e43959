//! The fuzz targets: all untrusted input of a robot. Each target accepts any bytes and fails by panicking, also when
//! the result contradicts the reader's guarantees. Each has seeds from real values. `slotd/tests/fuzzed.rs` replays
//! seeds and corpus in every test run.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

#[path = "../../bundle/tests/common/mod.rs"]
mod bundles;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bundle::bootstate::{self, BootState, SECTOR, Slot};
use bundle::{BuildKind, BundleManifest, BundleReader, KeySet, SignatureFile, StreamInput};
use bundles::{TestKey, keys, mixed, parts};
use slotd::RootDir;
use slotd::data::archive::{self, ArchiveLimits};
use slotd::files::DirectFileChanges;

/// A target's name, the target, and its initial corpus.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

pub const ALL: [Target; 7] = [
    ("archive", backup, archives),
    ("boot-state", boot_state, boot_states),
    ("bundle", bundle, bundle_seeds),
    ("device", device, devices),
    ("health", health, checks),
    ("key-set", key_set, key_sets),
    ("seed", seed, seeds),
];

/// A directory, in memory if possible, kept for the whole process, without files of earlier runs.
fn folder() -> PathBuf {
    thread_local! {
        static FOLDER: tempfile::TempDir = {
            let memory = Path::new("/dev/shm");
            let place = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
            tempfile::tempdir_in(place).unwrap()
        };
    }
    FOLDER.with(|folder| folder.path().to_owned())
}

/// A root whose only file is this one.
fn root_with(path: &str, bytes: &[u8]) -> RootDir {
    let root = RootDir::new(folder());
    let path = root.path(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    root
}

pub fn boot_state(data: &[u8]) {
    let copies: Vec<&[u8]> = data.chunks(SECTOR).take(2).collect();
    for copy in &copies {
        if let Ok(state) = BootState::decode(copy) {
            assert_eq!(BootState::decode(&state.encode()), Ok(state));
        }
    }
    let newest = bootstate::find_newest(copies.iter().copied());
    let valid = copies.iter().filter_map(|copy| BootState::decode(copy).ok());
    let highest = valid.map(|state| state.sequence).max();
    assert_eq!(newest.map(|(_, state)| state.sequence), highest);
    // Any text with a correct checksum, which a fuzzer would not find.
    let mut sealed = [0; SECTOR];
    let text = &data[..data.len().min(SECTOR - 4)];
    sealed[4..4 + text.len()].copy_from_slice(text);
    let checksum = crc32(&sealed[4..]);
    sealed[..4].copy_from_slice(&checksum.to_le_bytes());
    if let Ok(state) = BootState::decode(&sealed) {
        assert_eq!(BootState::decode(&state.encode()), Ok(state));
    }
}

/// CRC-32 as in zip, to avoid another dependency of this crate.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum: u32, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            sum >> 1 ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    })
}

fn boot_states() -> Vec<Vec<u8>> {
    let first = BootState::first();
    let trial = BootState { sequence: 7, active: Slot::B, trial: Some(Slot::A), tries: 1 };
    vec![
        [first.encode(), trial.encode()].concat(),
        [trial.encode(), [0; SECTOR]].concat(),
        trial.encode()[4..60].to_vec(),
        b"seq=ffffffff\0active=b\0trial=\0tries=10\0other=1\0".to_vec(),
    ]
}

/// The first byte says how much of the input is signed by a trusted key; without this a fuzzer would never
/// get past the signature.
pub fn bundle(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    match how % 4 {
        0 => read(rest),
        // A signed manifest; then any bytes.
        1 => {
            let (json, rest) = split(rest);
            let mut bytes = signed(json);
            bytes.extend_from_slice(rest);
            read(&bytes);
        }
        // An index with its hash in the signed manifest, and stored frames.
        2 => {
            let (index, frames) = split(rest);
            vouched(index, frames);
        }
        _ => fitting(rest),
    }
}

/// Stored frames with a matching index; the first byte is the number of blocks. The index lists all blocks as
/// zero, which run-length frames can satisfy.
fn fitting(data: &[u8]) {
    let Some((blocks, data)) = data.split_first().filter(|(_, data)| !data.is_empty()) else {
        return;
    };
    let blocks = u32::from(*blocks % 64) + 1;
    let mut index = b"SLIPIDX1".to_vec();
    index.extend_from_slice(&(u64::from(blocks) * 4096).to_le_bytes());
    let pieces: Vec<_> = data.chunks(512 * 1024).map(bundle::index::sha256).collect();
    for value in [4096, 12, 1, pieces.len() as u32, 0, blocks, data.len() as u32] {
        index.extend_from_slice(&value.to_le_bytes());
    }
    index.extend_from_slice(&bundle::index::sha256(b""));
    pieces.iter().for_each(|piece| index.extend_from_slice(piece));
    index.resize(index.len() + blocks.div_ceil(8) as usize, 0);
    vouched(&index, data);
}

/// Reads a bundle whose signed manifest has the hash and the lengths of these parts.
fn vouched(index: &[u8], frames: &[u8]) {
    // Created once: the packer's threads are not tested here.
    static BASE: LazyLock<BundleManifest> = LazyLock::new(|| parts(&[b""], 1).manifest);
    let mut manifest = BASE.clone();
    let payload = &mut manifest.components[0].payloads[0];
    // Take the payload's size from the index, so that more than the comparison of the two is fuzzed.
    let size = index.get(8..16).and_then(|size| size.try_into().ok());
    payload.size = size.map_or(0, u64::from_le_bytes);
    payload.index.size = index.len() as u64;
    payload.index.sha256 = hexadecimal(&bundle::index::sha256(index));
    payload.data.size = frames.len() as u64;
    let Ok(json) = manifest.to_json() else { return };
    let mut bytes = signed(&json);
    member(&mut bytes, "system/p0.index", index);
    member(&mut bytes, "system/p0.zst", frames);
    bytes.extend_from_slice(&[0; 1024]);
    read(&bytes);
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Two parts, divided by a length in the first two bytes.
fn split(data: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return (&[], &[]) };
    rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()))
}

/// Reads a whole bundle as an install does, and checks the reader's guarantees.
fn read(bytes: &[u8]) {
    let Ok(mut reader) = BundleReader::open(StreamInput(bytes), &keys()) else { return };
    let manifest = reader.manifest().clone();
    assert_eq!(BundleManifest::parse(&manifest.to_json().unwrap()).unwrap(), manifest);
    while let Ok(Some(mut payload)) = reader.next_payload() {
        let (size, blocks) = (payload.index().size(), payload.index().blocks());
        let mut end = 0;
        while payload.next_frame().is_some() {
            let done = payload.read_frame(&mut |offset, bytes| {
                assert_eq!(offset, end, "not in order");
                end += bytes.len() as u64;
                assert!(end <= size, "beyond the payload's end");
                Ok(())
            });
            if done.is_err() {
                return;
            }
        }
        assert!(end == size && blocks == size.div_ceil(4096) as u32, "not all of it");
    }
}

/// A member in the prescribed format, written without the crate.
fn member(out: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..124].copy_from_slice(b"0000644\x000000000\x000000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].fill(b' ');
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend_from_slice(&header);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// The two members before all others.
fn signed(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    member(&mut out, bundle::reader::MANIFEST, json);
    let SignatureFile { text, .. } = TestKey::new(1).sign(json, "fuzzed");
    member(&mut out, bundle::reader::SIGNATURE, text.as_bytes());
    out
}

fn bundle_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for content in [&b""[..], &mixed(9000), &mixed(40_000)] {
        let mut made = parts(&[content], 1);
        let whole = made.write(&[TestKey::new(1)]);
        let json = &whole[bundles::member(&whole, bundle::reader::MANIFEST)];
        let after = bundles::member(&whole, bundle::reader::SIGNATURE).end.next_multiple_of(512);
        let part = |how: u8, first: &[u8], second: &[u8]| {
            let length = u16::try_from(first.len()).unwrap().to_le_bytes();
            [&[how][..], &length, first, second].concat()
        };
        let (index, frames) = &made.payloads[0];
        seeds.push(part(1, json, &whole[after..]));
        seeds.push(part(2, index, frames));
        seeds.push([&[3, 1][..], frames].concat());
        seeds.push([&[0][..], &whole].concat());
    }
    seeds
}

pub fn key_set(data: &[u8]) {
    let (json, rest) = split(data);
    let Ok(set) = KeySet::parse(json) else { return };
    let again = serde_json::to_vec(&set).unwrap();
    assert_eq!(KeySet::parse(&again).unwrap(), set);
    let (file, content) = split(rest);
    if let Ok(by) = set.verify(bundle::keys::SignaturePurpose::KeySet, "a signature", file, content)
    {
        let key = set.keys.iter().find(|key| key.id == by.id).unwrap();
        assert!(!key.revoked && key.epoch == by.epoch);
        // No other bytes have this signature.
        assert!(
            set.verify(
                bundle::keys::SignaturePurpose::KeySet,
                "a signature",
                file,
                &[content, b"x"].concat()
            )
            .is_err()
        );
    }
}

fn key_sets() -> Vec<Vec<u8>> {
    let [one, two] = [TestKey::new(1), TestKey::new(2)];
    let mut set = KeySet {
        serial: 3,
        keys: vec![one.trusted(BuildKind::Release, 2), two.trusted(BuildKind::Development, 1)],
    };
    let join = |set: &KeySet, file: &str, content: &[u8]| {
        let json = serde_json::to_vec(set).unwrap();
        let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap().to_le_bytes();
        [&length(&json)[..], &json, &length(file.as_bytes()), file.as_bytes(), content].concat()
    };
    let file = one.sign(b"content", "a comment").text;
    let good = join(&set, &file, b"content");
    set.keys[1].revoked = true;
    vec![good, join(&set, &two.sign(b"x", "").text, b"x"), join(&KeySet::default(), "", b"")]
}

pub fn device(data: &[u8]) {
    let root = root_with("usr/lib/slipway/device.toml", data);
    if let Ok(about) = slotd::device::read_device_file(&root) {
        assert!(!about.version.as_str().is_empty());
    }
}

fn devices() -> Vec<Vec<u8>> {
    let text = "product = \"robot\"\nversion = \"1.2.3\"\nminimum-version = \"1.0.0\"\nkind = \"release\"\n\
                board = \"one\"\nboot-flow = \"tryboot\"\neeprom-since = \"2022-11-25\"\n\
                compatible = [\"maker,one\"]\n[boot-state]\nsectors = [8, 16]\n[partitions]\n\
                root-a = { number = 2, start-sector = 8192, sectors = 100 }\n";
    vec![text.into(), text.replace("tryboot", "uboot").into()]
}

pub fn health(data: &[u8]) {
    let root = root_with("etc/slotd/health.d/10-it.toml", data);
    let checks = slotd::health::load_checks(&root);
    // The check of the system's start always exists, and an invalid file is a check that fails.
    assert_eq!(checks.len(), 2);
    let timeout = checks[1].timeout.as_secs();
    assert!((1..=120).contains(&timeout), "{timeout} s");
    if let Ok(slotd::health::CheckKind::Http { url, .. }) = &checks[1].kind {
        assert!(url.starts_with("http://") || url.starts_with("HTTP://"), "{url}");
    }
}

fn checks() -> Vec<Vec<u8>> {
    [
        "timeout-seconds = 30\n[unit]\nname = \"ssh.service\"\n",
        "[http]\nurl = \"http://[::1]:80/health\"\nstatus = 204\n",
        "[command]\nrun = [\"/bin/true\", \"x\"]\n",
        "[space]\npath = \"/data\"\nfree-mib = 16\n",
    ]
    .map(|text| text.into())
    .to_vec()
}

pub fn seed(data: &[u8]) {
    let Ok(seed) = slotd::data::seed::SeedFile::parse(data) else { return };
    // No value adds another line to the robot's configuration.
    let Some(file) = slotd::data::seed::wifi_configuration(&seed) else { return };
    assert_eq!(file.lines().count(), 5, "{file:?}");
    assert!(
        file.bytes().all(|byte| byte == b'\n' || byte == b'\t' || (b' '..=b'~').contains(&byte))
    );
}

fn seeds() -> Vec<Vec<u8>> {
    vec![
        b"hostname = \"robot-7\"\nssh-keys = [\"ssh-ed25519 AAAAC3 me\"]\n\
          [wifi]\nssid = \"lab\"\npassword = \"correct horse\"\n"
            .to_vec(),
        b"[wifi]\nssid = \"\\u00e9\"\n".to_vec(),
        Vec::new(),
    ]
}

/// The first byte says whether the rest is already compressed: a fuzzer does not produce zstd frames.
pub fn backup(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let packed = if how % 2 == 0 { rest.to_vec() } else { zstd::encode_all(rest, 1).unwrap() };
    let folder = folder();
    let (into, outside) = (folder.join("into"), folder.join("outside"));
    fs::create_dir_all(&into).unwrap();
    fs::create_dir_all(&outside).unwrap();
    let taken = unpack(&packed, &into);
    let held: u64 = sizes(&into);
    assert!(held <= ROOM, "{held} bytes where {ROOM} were allowed: {taken}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "written outside");
    fs::remove_dir_all(&into).unwrap();
}

/// Maximum bytes of an unpacked archive.
const ROOM: u64 = 1 << 20;

fn sizes(folder: &Path) -> u64 {
    // An archive's modes apply, and the user who runs this may not be root.
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
    let sizes = fs::read_dir(folder).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let about = fs::symlink_metadata(&path).unwrap();
        if about.is_dir() { sizes(&path) } else { about.len() }
    });
    sizes.sum()
}

fn unpack(packed: &[u8], into: &Path) -> bool {
    let room = ArchiveLimits { bytes: ROOM, entries: 256 };
    archive::unpack(&DirectFileChanges, packed, into, room).is_ok()
}

fn archives() -> Vec<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut entry = |kind: tar::EntryType, name: &str, link: &str, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_path(name).unwrap();
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        tar.append(&header, content).unwrap();
    };
    entry(tar::EntryType::Directory, "home", "", b"");
    entry(tar::EntryType::Regular, "home/notes", "", b"a text");
    entry(tar::EntryType::Symlink, "home/link", "notes", b"");
    let plain = tar.into_inner().unwrap();
    let mut long = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_cksum();
    long.append_data(&mut header, format!("home/{}", "n".repeat(150)), &b"abc"[..]).unwrap();
    let long = long.into_inner().unwrap();
    let packed = zstd::encode_all(&plain[..], 3).unwrap();
    vec![[&[1][..], &plain].concat(), [&[1][..], &long].concat(), [&[0][..], &packed].concat()]
}
