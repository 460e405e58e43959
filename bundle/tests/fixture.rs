//! The first bundle of format 1 must stay readable for ever. Its files are never generated again: a change that
//! breaks this test breaks every bundle in the field. They were generated from `parts(&[&mixed(20_000)], 1)`, signed with
//! `TestKey::new(1)`, and from `keys()`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::PathBuf;

use bundle::{BundlePolicy, BundleReader, CompressionLevel, KeySet, StreamInput, Version};
use common::{TestKey, mixed, parts};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn the_first_bundle_is_readable() {
    let bytes = std::fs::read(fixture("v1.bundle")).unwrap();
    let keys = KeySet::parse(&std::fs::read(fixture("keyset.json")).unwrap()).unwrap();
    let mut reader = BundleReader::open(StreamInput(bytes.as_slice()), &keys).unwrap();
    let floor = Version::parse("1.0.0").unwrap();
    let (product, board) = (Some("robot-test"), Some("board-one"));
    reader.check(&BundlePolicy { product, board, floor: Some(&floor), key_epoch: 1 }).unwrap();
    assert_eq!(reader.manifest().version.as_str(), "1.2.3");
    let mut payload = reader.next_payload().unwrap().unwrap();
    assert_eq!((payload.component(), payload.role()), ("system", "p0"));
    assert_eq!((payload.index().blocks(), payload.index().used_blocks()), (5, 4));
    let mut content = Vec::new();
    payload
        .read_frame(&mut |_, bytes| {
            content.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    assert!(content == mixed(20_000));
    assert!(reader.next_payload().unwrap().is_none());
}

#[test]
fn every_level_is_readable() {
    let content = mixed(100_000);
    for level in [CompressionLevel::Fast, CompressionLevel::Release] {
        let mut data = Vec::new();
        let done = bundle::compress(content.as_slice(), level, 1, &mut data, &mut |_| {}).unwrap();
        let mut parts = parts(&[b""], 1);
        parts.manifest.components[0].payloads[0] = done.describe("p0");
        parts.payloads = vec![(done.index, data)];
        let bytes = parts.write(&[TestKey::new(1)]);
        assert!(common::extract(&bytes).unwrap() == [content.clone()], "{level:?}");
    }
}
