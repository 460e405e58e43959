//! What is written can be read back, by this crate and by standard tools, and is the same every time.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::Path;
use std::process::Command;

use bundle::{
    BuildKind, BundlePolicy, BundleReader, Error, KeySet, SeekableInput, StreamInput, Version,
};
use common::{TestKey, extract, keys, make, member, mixed, noise, parts, verify};

const MIB: usize = 1 << 20;

#[test]
fn odd_sizes_come_back() {
    for size in [0, 1, 511, 512, 4095, 4096, 4097, 8 * 4096, 8 * 4096 + 1, 300_000] {
        for content in [vec![0; size], noise(size, 7), mixed(size)] {
            let bytes = make(&[&content]);
            verify(&bytes, &keys()).unwrap_or_else(|e| panic!("{size}: {e}"));
            assert_eq!(extract(&bytes).unwrap(), [content], "{size}");
        }
    }
}

#[test]
fn several_frames_and_payloads_come_back() {
    // More than one 16 MiB frame, a frame of zeros, a frame of noise (stored in many pieces).
    let mut content = mixed(17 * MIB + 123);
    content.resize(40 * MIB, 0);
    content.extend(noise(20 * MIB + 1, 3));
    let second = mixed(5000);
    let bytes = make(&[&content, &second]);
    assert!(extract(&bytes).unwrap() == [content, second]);
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    let content = mixed(50 * MIB + 77);
    let one = parts(&[&content], 1).write(&[TestKey::new(1)]);
    for workers in [2, 3, 8] {
        assert!(one == parts(&[&content], workers).write(&[TestKey::new(1)]), "{workers}");
    }
}

#[test]
fn a_frame_can_be_skipped_with_and_without_seeking() {
    let content = mixed(40 * MIB);
    let bytes = make(&[&content]);
    let mut piped = BundleReader::open(StreamInput(bytes.as_slice()), &keys()).unwrap();
    let mut seeking =
        BundleReader::open(SeekableInput(std::io::Cursor::new(&bytes)), &keys()).unwrap();
    let mut got = Vec::new();
    {
        let mut payload = piped.next_payload().unwrap().unwrap();
        payload.skip_frame().unwrap();
        payload
            .read_frame(&mut |offset, bytes| {
                got.push((offset, bytes.to_vec()));
                Ok(())
            })
            .unwrap();
        payload.skip_frame().unwrap();
        assert!(payload.next_frame().is_none());
    }
    assert!(piped.next_payload().unwrap().is_none());
    assert_eq!(got.first().unwrap().0, 16 * MIB as u64);
    let joined: Vec<u8> = got.into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert!(joined == content[16 * MIB..32 * MIB]);
    let mut payload = seeking.next_payload().unwrap().unwrap();
    for _ in 0..3 {
        payload.skip_frame().unwrap();
    }
    drop(payload);
    assert!(seeking.next_payload().unwrap().is_none());
}

#[test]
fn a_payload_left_unread_is_a_mistake_of_the_caller() {
    let bytes = make(&[&mixed(5000), &mixed(5000)]);
    let mut reader = BundleReader::open(StreamInput(bytes.as_slice()), &keys()).unwrap();
    drop(reader.next_payload().unwrap());
    assert_eq!(reader.next_payload().unwrap_err().code(), "misuse");
}

#[test]
fn further_signatures_let_a_rotated_key_set_verify() {
    let mut parts = parts(&[&mixed(5000)], 1);
    let bytes = parts.write(&[TestKey::new(1), TestKey::new(3), TestKey::new(2)]);
    for seed in [1, 2, 3] {
        let set =
            KeySet { serial: 0, keys: vec![TestKey::new(seed).trusted(BuildKind::Release, 1)] };
        verify(&bytes, &set).unwrap();
        let reader = BundleReader::open(StreamInput(bytes.as_slice()), &set).unwrap();
        assert_eq!(reader.signed_by().len(), 1);
        assert_eq!(reader.signed_by()[0].comment, "a test bundle");
    }
    let stranger = KeySet { serial: 0, keys: vec![TestKey::new(9).trusted(BuildKind::Release, 1)] };
    assert_eq!(verify(&bytes, &stranger).unwrap_err().code(), "not-trusted");
}

#[test]
fn trust_follows_kind_epoch_and_revocation() {
    let mut development = parts(&[&mixed(100)], 1);
    let mut release = parts(&[&mixed(100)], 1);
    release.manifest.kind = BuildKind::Release;
    release.manifest.key_epoch = 2;
    let key = || [TestKey::new(1)];
    let set = |kind, epoch| KeySet { serial: 0, keys: vec![TestKey::new(1).trusted(kind, epoch)] };
    let (development, release) = (development.write(&key()), release.write(&key()));
    verify(&development, &set(BuildKind::Release, 1)).unwrap();
    verify(&release, &set(BuildKind::Release, 2)).unwrap();
    let refused = |bytes: &[u8], set: &KeySet, part: &str| {
        let error = verify(bytes, set).unwrap_err();
        assert_eq!(error.code(), "not-trusted");
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(&release, &set(BuildKind::Development, 2), "may not sign a release");
    refused(&release, &set(BuildKind::Release, 1), "has epoch 1, but the bundle requires 2");
    refused(&development, &KeySet::default(), "is not in the key set");
    let mut revoked = set(BuildKind::Release, 3);
    revoked.keys[0].revoked = true;
    refused(&release, &revoked, "is revoked");
}

#[test]
fn the_policy_refuses_what_does_not_fit_the_device() {
    let bytes = make(&[&mixed(100)]);
    let reader = BundleReader::open(StreamInput(bytes.as_slice()), &keys()).unwrap();
    let v = |text| Version::parse(text).unwrap();
    let check =
        |policy: &BundlePolicy<'_>| reader.check(policy).map_err(|error: Error| error.code());
    let (low, same, high) = (v("1.2.3-rc.1"), v("1.2.3"), v("1.2.4-rc.1"));
    let good = BundlePolicy {
        product: Some("robot-test"),
        board: Some("board-two"),
        floor: Some(&same),
        key_epoch: 1,
    };
    assert_eq!(check(&good), Ok(()));
    assert_eq!(check(&BundlePolicy { floor: Some(&low), ..good.clone() }), Ok(()));
    assert_eq!(check(&BundlePolicy { floor: Some(&high), ..good.clone() }), Err("below-floor"));
    assert_eq!(
        check(&BundlePolicy { product: Some("other"), ..good.clone() }),
        Err("wrong-product")
    );
    assert_eq!(check(&BundlePolicy { board: Some("board"), ..good.clone() }), Err("wrong-board"));
    assert_eq!(check(&BundlePolicy { key_epoch: 2, ..good }), Err("not-trusted"));
}

/// Runs a standard tool; a missing tool is a failure.
fn tool(program: &str, args: &[&str], dir: &Path) -> Vec<u8> {
    let output = Command::new(program).args(args).current_dir(dir).output();
    let output = output.unwrap_or_else(|error| panic!("running {program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {errors}");
    output.stdout
}

#[test]
fn foreign_tools_read_it() {
    let mut content = mixed(17 * MIB + 5);
    content.resize(36 * MIB, 0);
    let bytes = make(&[&content, b""]);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("b.bundle"), &bytes).unwrap();
    let names = String::from_utf8(tool("tar", &["-tf", "b.bundle"], dir)).unwrap();
    let expected = "manifest.json\nmanifest.json.minisig\nsystem/p0.index\nsystem/p0.zst\nsystem/p1.index\nsystem/p1.zst\n";
    assert_eq!(names, expected);
    tool("tar", &["-xf", "b.bundle"], dir);
    let public = TestKey::new(1).public();
    tool("minisign", &["-V", "-m", "manifest.json", "-P", &public], dir);
    tool("zstd", &["-q", "-t", "system/p0.zst", "system/p1.zst"], dir);
    assert!(tool("zstd", &["-dc", "system/p0.zst"], dir) == content);
    assert!(tool("zstd", &["-dc", "system/p1.zst"], dir).is_empty());
    let script = "import json,sys,hashlib; m=json.load(open('manifest.json')); p=m['components'][0]['payloads'][0]; b=open('system/p0.index','rb').read(); assert hashlib.sha256(b).hexdigest()==p['index']['sha256'] and len(b)==p['index']['size']; print(m['version'])";
    assert_eq!(tool("python3", &["-c", script], dir), b"1.2.3\n");
    assert!(member(&bytes, "system/p0.zst").len() > 1000);
}
