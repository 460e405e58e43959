//! Shared by the tests: a deterministic key, payloads, and bundles of them.
#![allow(dead_code)]

use blake2::{Blake2b512, Digest};
use bundle::keys::{encode_base64, key_id, signature_file};
use bundle::manifest::BundleComponent;
use bundle::{
    BuildKind, BundleManifest, BundleReader, CompressionLevel, KeySet, Result, SignatureFile,
    StreamInput, TrustedKey, Version,
};
use ed25519_compact::{KeyPair, Seed};

/// A key made from one byte, with its number made from the same.
pub struct TestKey {
    pub pair: KeyPair,
    pub number: [u8; 8],
}

impl TestKey {
    pub fn new(seed: u8) -> Self {
        Self { pair: KeyPair::from_seed(Seed::new([seed; 32])), number: [seed; 8] }
    }

    pub fn public(&self) -> String {
        let mut blob = b"Ed".to_vec();
        blob.extend_from_slice(&self.number);
        blob.extend_from_slice(&*self.pair.pk);
        encode_base64(&blob)
    }

    pub fn trusted(&self, kind: BuildKind, epoch: u32) -> TrustedKey {
        let public = self.public();
        TrustedKey { id: key_id(&public).unwrap(), epoch, kind, public, revoked: false }
    }

    pub fn sign(&self, bytes: &[u8], comment: &str) -> SignatureFile {
        let signature = self.pair.sk.sign(Blake2b512::digest(bytes), None);
        let mut commented = signature.to_vec();
        commented.extend_from_slice(comment.as_bytes());
        let global = self.pair.sk.sign(commented, None);
        SignatureFile {
            key: key_id(&self.public()).unwrap(),
            text: signature_file(&self.number, &signature, comment, &global),
        }
    }
}

impl TestKey {
    /// A valid signature in minisign's older format, `Ed`, over the text itself. The format does not accept it.
    pub fn sign_legacy(&self, bytes: &[u8], comment: &str) -> String {
        let signature = self.pair.sk.sign(bytes, None);
        let mut commented = signature.to_vec();
        commented.extend_from_slice(comment.as_bytes());
        let global = self.pair.sk.sign(commented, None);
        let mut blob = b"Ed".to_vec();
        blob.extend_from_slice(&self.number);
        blob.extend_from_slice(&*signature);
        let (first, second) = (encode_base64(&blob), encode_base64(&*global));
        let untrusted = bundle::keys::UNTRUSTED_COMMENT;
        format!("{untrusted}\n{first}\ntrusted comment: {comment}\n{second}\n")
    }
}

pub fn keys() -> KeySet {
    KeySet { serial: 0, keys: vec![TestKey::new(1).trusted(BuildKind::Development, 1)] }
}

/// Bytes that do not compress.
pub fn noise(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// A payload of the given length with text, zeros and noise.
pub fn mixed(n: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        b"a line that comes again and again\n".iter().copied().cycle().take(n).collect();
    for (at, block) in bytes.chunks_mut(4096).enumerate() {
        match at % 4 {
            1 => block.fill(0),
            2 => block.copy_from_slice(&noise(block.len(), at as u64)),
            _ => {}
        }
    }
    bytes
}

pub struct Parts {
    pub manifest: BundleManifest,
    pub payloads: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Compresses payloads `system/p0`, `system/p1`, … and describes them.
pub fn parts(contents: &[&[u8]], workers: usize) -> Parts {
    let version = Version::parse("1.2.3").unwrap();
    let mut described = Vec::new();
    let mut payloads = Vec::new();
    for (at, content) in contents.iter().enumerate() {
        let mut data = Vec::new();
        let done =
            bundle::compress(*content, CompressionLevel::Fast, workers, &mut data, &mut |_| {})
                .unwrap();
        described.push(done.describe(format!("p{at}")));
        payloads.push((done.index, data));
    }
    let manifest = BundleManifest {
        format: 1,
        required: Vec::new(),
        product: "robot-test".to_owned(),
        version: version.clone(),
        kind: BuildKind::Development,
        boards: vec!["board-one".to_owned(), "board-two".to_owned()],
        minimum_version: Version::parse("1.0.0").unwrap(),
        key_epoch: 1,
        epoch: 1_700_000_000,
        components: vec![BundleComponent {
            name: "system".to_owned(),
            version,
            payloads: described,
        }],
    };
    Parts { manifest, payloads }
}

impl Parts {
    pub fn write(&mut self, signers: &[TestKey]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut sign =
            |json: &[u8]| Ok(signers.iter().map(|key| key.sign(json, "a test bundle")).collect());
        let mut payloads: Vec<(&[u8], &[u8])> =
            self.payloads.iter().map(|(i, d)| (i.as_slice(), d.as_slice())).collect();
        let mut payloads: Vec<(&[u8], &mut dyn std::io::Read)> = payloads
            .iter_mut()
            .map(|(index, data)| (*index, data as &mut dyn std::io::Read))
            .collect();
        bundle::write_archive(&mut out, &self.manifest, &mut sign, &mut payloads).unwrap();
        out
    }
}

/// A bundle of these payloads, signed by key 1.
pub fn make(contents: &[&[u8]]) -> Vec<u8> {
    parts(contents, 2).write(&[TestKey::new(1)])
}

/// Verifies to the last byte.
pub fn verify(bytes: &[u8], keys: &KeySet) -> Result<()> {
    BundleReader::open(StreamInput(bytes), keys)?.verify(|_| {})
}

/// Reads all payloads back.
pub fn extract(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut reader = BundleReader::open(StreamInput(bytes), &keys())?;
    let mut all = Vec::new();
    while let Some(mut payload) = reader.next_payload()? {
        let mut content = Vec::new();
        while payload.next_frame().is_some() {
            payload.read_frame(&mut |offset, bytes| {
                assert_eq!(offset, content.len() as u64);
                content.extend_from_slice(bytes);
                Ok(())
            })?;
        }
        all.push(content);
    }
    Ok(all)
}

/// Offset and length of a member's content, found with plain tar arithmetic.
pub fn member(bytes: &[u8], name: &str) -> std::ops::Range<usize> {
    let mut at = 0;
    loop {
        let header = &bytes[at..at + 512];
        let found: Vec<u8> = header[..100].iter().copied().take_while(|b| *b != 0).collect();
        let size =
            usize::from_str_radix(std::str::from_utf8(&header[124..135]).unwrap(), 8).unwrap();
        if found == name.as_bytes() {
            return at + 512..at + 512 + size;
        }
        at += 512 + size.div_ceil(512) * 512;
    }
}
