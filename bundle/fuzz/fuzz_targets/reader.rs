//! The reader on hostile bytes. The first byte chooses how far they get by themselves: 0 as a whole
//! archive, where only a good signature leads past the manifest; 1 as a manifest, 2 as an index,
//! 3 as stored frames, each with everything around it hashed and signed, so that the fuzzer reaches
//! the code behind the signature.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

#[path = "../../tests/common/mod.rs"]
mod common;

use bundle::Manifest;
use common::{Parts, TestKey, keys, parts, verify};

/// A manifest to change. It is made once: the packer's threads are not what is tested here, and what
/// libc keeps for each of them looks like a leak.
static BASE: std::sync::LazyLock<Manifest> = std::sync::LazyLock::new(|| parts(&[b""], 1).manifest);

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else { return };
    match mode % 4 {
        0 => drop(verify(rest, &keys())),
        1 => manifest(rest),
        2 => index(rest),
        _ => frames(rest),
    }
});

/// Any bytes as the signed manifest of an archive that ends there.
fn manifest(json: &[u8]) {
    let mut out = Vec::new();
    add(&mut out, "manifest.json", json);
    add(&mut out, "manifest.json.minisig", TestKey::new(1).sign(json, "fuzz").text.as_bytes());
    out.resize(out.len() + 1024, 0);
    drop(verify(&out, &keys()));
}

/// Any bytes as an index: the first eight are the payload's size, the next four its data's.
fn index(bytes: &[u8]) {
    let Some((head, index)) = bytes.split_at_checked(12) else { return };
    let size = u64::from_le_bytes(head[..8].try_into().unwrap());
    let data = u32::from_le_bytes(head[8..].try_into().unwrap());
    signed(size, index, &vec![0; data as usize % 65536]);
}

/// Any bytes as stored frames, split where the first byte says, with an index that fits them.
fn frames(bytes: &[u8]) {
    let Some((blocks, data)) = bytes.split_first() else { return };
    if data.is_empty() {
        return;
    }
    let blocks = u32::from(*blocks % 64) + 1;
    let mut index = b"SLIPIDX1".to_vec();
    index.extend_from_slice(&(u64::from(blocks) * 4096).to_le_bytes());
    let pieces: Vec<_> = data.chunks(512 * 1024).map(Sha256::digest).collect();
    for value in [4096, 12, 1, pieces.len() as u32, 0, blocks, data.len() as u32] {
        index.extend_from_slice(&value.to_le_bytes());
    }
    index.extend_from_slice(&Sha256::digest(b""));
    pieces.iter().for_each(|piece| index.extend_from_slice(piece));
    // Every block is said to be zero, which run-length frames can satisfy.
    index.resize(index.len() + blocks.div_ceil(8) as usize, 0);
    signed(u64::from(blocks) * 4096, &index, data);
}

fn signed(size: u64, index: &[u8], data: &[u8]) {
    let payloads = vec![(index.to_vec(), data.to_vec())];
    let mut parts = Parts { manifest: BASE.clone(), payloads };
    let payload = &mut parts.manifest.components[0].payloads[0];
    payload.size = size;
    payload.index.size = index.len() as u64;
    payload.index.sha256 = Sha256::digest(index).iter().map(|b| format!("{b:02x}")).collect();
    payload.data.size = data.len() as u64;
    if parts.manifest.to_json().is_err() {
        return;
    }
    drop(verify(&parts.write(&[TestKey::new(1)]), &keys()));
}

/// A member in the prescribed form, written without the crate's help.
fn add(out: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..124].copy_from_slice(b"0000644\x000000000\x000000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].fill(b' ');
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend_from_slice(&header);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}
