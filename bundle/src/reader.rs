//! Reads a bundle from any stream, in constant memory. It passes on only verified data, and verifies
//! in this order: signature, compatibility, index, stored frame, block.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::frames::FrameDecoder;
use crate::index::{self, BlockIndex, Frame, Sha256Hash};
use crate::keys::{KeySet, SignaturePurpose, SignedBy};
use crate::limits::{BLOCK_SIZE, MAX_MANIFEST, MAX_SIGNATURE, MAX_SIGNATURES};
use crate::manifest::{BuildKind, BundleManifest, Payload, Version};
use crate::ustar::{self, RECORD, TRAILER, TarMember};

/// The name of the first member.
pub const MANIFEST: &str = "manifest.json";

/// The name of the second member, the first signature.
pub const SIGNATURE: &str = "manifest.json.minisig";

/// A stream that a bundle is read from.
pub trait BundleInput: Read {
    /// Skips `n` bytes. A seekable input may not notice that they are missing.
    ///
    /// # Errors
    /// When the stream ends too early, or reading fails.
    fn skip(&mut self, n: u64) -> io::Result<()>;
}

/// An input that cannot seek: a pipe, a socket, standard input.
#[derive(Debug)]
pub struct StreamInput<R>(pub R);

impl<R: Read> Read for StreamInput<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> BundleInput for StreamInput<R> {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        let copied = io::copy(&mut (&mut self.0).take(n), &mut io::sink())?;
        if copied == n { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// An input that can seek: skipped frames are not read.
#[derive(Debug)]
pub struct SeekableInput<R>(pub R);

impl<R: Read> Read for SeekableInput<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read + Seek> BundleInput for SeekableInput<R> {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        let n = i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.0.seek(SeekFrom::Current(n)).map(|_| ())
    }
}

/// What a device requires of a bundle beyond its signature. `None` requires nothing.
#[derive(Debug, Clone, Default)]
pub struct BundlePolicy<'a> {
    /// The device's product.
    pub product: Option<&'a str>,
    /// The device's board.
    pub board: Option<&'a str>,
    /// The highest `minimum-version` of any bundle that the device has committed.
    pub floor: Option<&'a Version>,
    /// The highest `key-epoch` of any bundle that the device has committed.
    pub key_epoch: u32,
}

/// A bundle whose signature has been verified.
#[derive(Debug)]
pub struct BundleReader<I> {
    input: I,
    manifest: BundleManifest,
    manifest_sha256: String,
    signed_by: Vec<SignedBy>,
    /// The header after the last signature. It must be read to know that no further signature follows.
    pending: Option<Option<TarMember>>,
    /// Components and payloads that are still to come, as indices into the manifest.
    coming: VecDeque<(usize, usize)>,
    seen: Vec<String>,
    stored: Vec<u8>,
    decoder: FrameDecoder,
    /// Frames of the current payload that have not been read or skipped.
    unread: bool,
}

impl<I: BundleInput> BundleReader<I> {
    /// Reads the manifest and its signatures, and verifies them. Nothing else is read.
    ///
    /// # Errors
    /// When the archive or the manifest is malformed, a signature by a trusted key does not
    /// match, or no trusted key has signed.
    pub fn open(mut input: I, keys: &KeySet) -> Result<Self> {
        let json = read_member(&mut input, MANIFEST, MAX_MANIFEST)?;
        let mut files =
            vec![(SIGNATURE.to_owned(), read_member(&mut input, SIGNATURE, MAX_SIGNATURE)?)];
        let pending = loop {
            let header = read_header(&mut input)?;
            match header {
                Some(member) if is_further_signature(&member.name) => {
                    if let Some((last, _)) = files.iter().skip(1).last() {
                        if *last == member.name {
                            return Err(Error::DuplicateMember { name: member.name });
                        }
                        if *last > member.name {
                            return Err(Error::UnexpectedMember {
                                expected: format!("a signature after `{last}`"),
                                found: format!("`{}`", member.name),
                            });
                        }
                    }
                    if files.len() == MAX_SIGNATURES {
                        return Err(Error::BadLength {
                            what: "the list of signatures".to_owned(),
                            found: MAX_SIGNATURES as u64 + 1,
                            allowed: MAX_SIGNATURES as u64,
                        });
                    }
                    let file = read_content(&mut input, &member, MAX_SIGNATURE)?;
                    files.push((member.name, file));
                }
                other => break other,
            }
        };
        // The manifest is parsed only now: unsigned bytes do not reach the JSON parser.
        let signatures = verify_signatures(keys, &files, &json)?;
        let manifest = BundleManifest::parse(&json)?;
        let signed_by = keep_trusted(signatures, &manifest)?;
        let coming = manifest
            .components
            .iter()
            .enumerate()
            .flat_map(|(c, component)| (0..component.payloads.len()).map(move |p| (c, p)))
            .collect();
        let mut seen = vec![MANIFEST.to_owned()];
        seen.extend(files.into_iter().map(|(name, _)| name));
        Ok(Self {
            input,
            manifest_sha256: index::to_hex(&index::sha256(&json)),
            manifest,
            signed_by,
            pending: Some(pending),
            coming,
            seen,
            stored: Vec::new(),
            decoder: FrameDecoder::new()?,
            unread: false,
        })
    }

    /// The verified manifest.
    pub fn manifest(&self) -> &BundleManifest {
        &self.manifest
    }

    /// SHA-256 of `manifest.json`, lower-case hexadecimal: it identifies the bundle's content.
    pub fn manifest_sha256(&self) -> &str {
        &self.manifest_sha256
    }

    /// The accepted signatures.
    pub fn signed_by(&self) -> &[SignedBy] {
        &self.signed_by
    }

    /// Compares the manifest with the device and with the bundles that it has committed.
    ///
    /// # Errors
    /// Names the first mismatch.
    pub fn check(&self, policy: &BundlePolicy<'_>) -> Result<()> {
        let manifest = &self.manifest;
        if let Some(product) = policy.product.filter(|p| *p != manifest.product) {
            return Err(Error::WrongProduct {
                found: manifest.product.clone(),
                expected: product.to_owned(),
            });
        }
        if let Some(board) = policy.board.filter(|b| !manifest.boards.iter().any(|x| x == b)) {
            return Err(Error::WrongBoard {
                found: manifest.boards.join(", "),
                expected: board.to_owned(),
            });
        }
        if let Some(floor) = policy.floor.filter(|floor| manifest.version < **floor) {
            return Err(Error::BelowFloor {
                found: manifest.version.to_string(),
                floor: floor.to_string(),
            });
        }
        if !self.signed_by.iter().any(|by| by.epoch >= policy.key_epoch) {
            return Err(Error::NotTrusted {
                reason: format!(
                    "this device requires a key of epoch {} or later",
                    policy.key_epoch
                ),
            });
        }
        Ok(())
    }

    /// Reads the index of the next payload. `None` after the last payload; the archive's end has then been
    /// checked too.
    ///
    /// # Errors
    /// When frames of the previous payload were neither read nor skipped, the archive is malformed,
    /// or the index does not match its hash in the manifest.
    pub fn next_payload(&mut self) -> Result<Option<PayloadReader<'_, I>>> {
        if self.unread {
            return Err(Error::Misuse {
                reason: "the previous payload has frames that were neither read nor skipped"
                    .to_owned(),
            });
        }
        let Some((c, p)) = self.coming.pop_front() else {
            self.finish()?;
            return Ok(None);
        };
        let (name, payload) = match self.manifest.components.get(c) {
            Some(component) => (component.name.clone(), component.payloads.get(p).cloned()),
            None => (String::new(), None),
        };
        let Some(payload) = payload else {
            return Err(Error::Misuse { reason: "the payload is not in the manifest".to_owned() });
        };
        let member = format!("{name}/{}.index", payload.role);
        self.expect(&member, payload.index.size)?;
        let bytes = read_exact(&mut self.input, payload.index.size, &member)?;
        read_padding(&mut self.input, payload.index.size)?;
        if index::to_hex(&index::sha256(&bytes)) != payload.index.sha256 {
            return Err(Error::WrongHash { what: member });
        }
        let index = Arc::new(BlockIndex::parse(&bytes, &payload)?);
        drop(bytes);
        self.expect(&format!("{name}/{}.zst", payload.role), payload.data.size)?;
        self.unread = true;
        Ok(Some(PayloadReader { reader: self, component: name, payload, index, next: 0 }))
    }

    /// Reads and verifies everything that is left. `progress` gets the number of payload bytes verified.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verify(&mut self, mut progress: impl FnMut(u64)) -> Result<()> {
        while let Some(mut payload) = self.next_payload()? {
            while payload.next_frame().is_some() {
                payload.read_frame(&mut |_, bytes| {
                    progress(bytes.len() as u64);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    fn expect(&mut self, name: &str, size: u64) -> Result<()> {
        let header = match self.pending.take() {
            Some(header) => header,
            None => read_header(&mut self.input)?,
        };
        let member = expect_name(header, name, &self.seen)?;
        if member.size != size {
            return Err(Error::BadLength { what: member.name, found: member.size, allowed: size });
        }
        self.seen.push(member.name);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let header = match self.pending.take() {
            Some(header) => header,
            None => read_header(&mut self.input)?,
        };
        if let Some(member) = header {
            if self.seen.contains(&member.name) {
                return Err(Error::DuplicateMember { name: member.name });
            }
            return Err(Error::UnexpectedMember {
                expected: "the archive's end".to_owned(),
                found: format!("`{}`", member.name),
            });
        }
        let rest = read_exact(&mut self.input, (TRAILER - RECORD) as u64, "the archive's end")?;
        let mut beyond = [0_u8; 1];
        let more = read_some(&mut self.input, &mut beyond)?;
        if more != 0 || !index::is_zero(&rest) {
            return Err(Error::TrailingData { place: "at the archive's end".to_owned() });
        }
        // So that a second call finds the end again, not a truncated header.
        self.pending = None;
        Ok(())
    }
}

/// One payload: its verified index, and its frames as they come.
#[derive(Debug)]
pub struct PayloadReader<'a, I> {
    reader: &'a mut BundleReader<I>,
    component: String,
    payload: Payload,
    index: Arc<BlockIndex>,
    next: usize,
}

impl<I: BundleInput> PayloadReader<'_, I> {
    /// The component's name.
    pub fn component(&self) -> &str {
        &self.component
    }

    /// The payload's role.
    pub fn role(&self) -> &str {
        &self.payload.role
    }

    /// What the manifest says.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The verified index.
    pub fn index(&self) -> &BlockIndex {
        &self.index
    }

    /// The verified index, for use while frames are read.
    pub fn shared_index(&self) -> Arc<BlockIndex> {
        self.index.clone()
    }

    /// The frame that comes next; it must be read or skipped. `None` after the last.
    pub fn next_frame(&self) -> Option<Frame> {
        self.index.frames().get(self.next).copied()
    }

    /// Reads the next frame, compares its stored bytes with their hashes, and only then decompresses
    /// them. `sink` gets verified bytes with their offset in the payload: whole blocks in order, at
    /// most 128 KiB at a time.
    ///
    /// # Errors
    /// When a hash or a length is wrong, or `sink` fails. What `sink` got before that was verified.
    pub fn read_frame(&mut self, sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let Some(frame) = self.next_frame() else {
            return Err(Error::Misuse { reason: "there are no more frames".to_owned() });
        };
        let what = || format!("frame {} of {}/{}", frame.number, self.component, self.payload.role);
        let reader = &mut *self.reader;
        let mut hashes = self.index.hashes(&frame);
        let mut offset = BlockIndex::offset(frame.first_block);
        let mut content = Sha256::new();
        let mut verified = |bytes: &[u8]| {
            for block in bytes.chunks(BLOCK_SIZE) {
                let Some((number, expected)) = hashes.next() else {
                    return Err(Error::FrameLength { frame: frame.number, more: true });
                };
                let ok = match expected {
                    None => index::is_zero(block),
                    Some(expected) => {
                        let hash = index::sha256(block);
                        content.update(hash);
                        hash.starts_with(expected)
                    }
                };
                if !ok {
                    return Err(Error::WrongHash { what: format!("block {number}") });
                }
            }
            sink(offset, bytes)?;
            offset += bytes.len() as u64;
            Ok(())
        };
        reader.decoder.begin(frame.number, self.index.content_size(&frame))?;
        let mut left = frame.stored as usize;
        for (length, hash) in self.index.pieces(&frame) {
            // At most PIECE bytes; the buffer is kept for the next piece.
            reader.stored.resize(length, 0);
            read_exactly(&mut reader.input, &mut reader.stored, &what())?;
            if index::sha256(&reader.stored) != hash {
                return Err(Error::WrongHash { what: format!("{} as stored", what()) });
            }
            left -= length;
            reader.decoder.push(&reader.stored, left == 0, &mut verified)?;
        }
        if Sha256Hash::from(content.finalize()) != frame.content {
            return Err(Error::WrongHash { what: format!("the content of {}", what()) });
        }
        drop(hashes);
        self.advance()
    }

    /// Skips the next frame, because the device already has every block of it.
    ///
    /// # Errors
    /// When the stream ends.
    pub fn skip_frame(&mut self) -> Result<()> {
        let Some(frame) = self.next_frame() else {
            return Err(Error::Misuse { reason: "there are no more frames".to_owned() });
        };
        self.reader
            .input
            .skip(u64::from(frame.stored))
            .map_err(|error| read_error(error, "a frame"))?;
        self.advance()
    }

    /// Counts a frame. After the last one, checks the padding and lets the reader continue.
    fn advance(&mut self) -> Result<()> {
        self.next += 1;
        if self.next == self.index.frames().len() {
            read_padding(&mut self.reader.input, self.payload.data.size)?;
            self.reader.unread = false;
        }
        Ok(())
    }
}

/// Reads the manifest of a bundle **without verifying anything**, to show it to a user who has no key
/// for it. Never install on the strength of its content.
///
/// # Errors
/// When the archive's beginning or the manifest is malformed.
pub fn unverified_manifest(input: &mut impl Read) -> Result<BundleManifest> {
    BundleManifest::parse(&read_member(input, MANIFEST, MAX_MANIFEST)?)
}

/// Every valid signature by a key of the set, or why there is none.
fn verify_signatures(
    keys: &KeySet,
    files: &[(String, Vec<u8>)],
    json: &[u8],
) -> Result<Vec<SignedBy>> {
    let mut good: Vec<SignedBy> = Vec::new();
    let mut reasons = Vec::new();
    for (member, file) in files {
        match keys.check_signature(SignaturePurpose::Bundle, member, file, json)? {
            Ok(by) if good.iter().any(|other| other.id == by.id) => {
                return Err(Error::BadSignatureFile {
                    reason: format!("{member}: the key {} signs twice", by.id),
                });
            }
            Ok(by) => good.push(by),
            Err(reason) => reasons.push(reason),
        }
    }
    if good.is_empty() {
        return Err(Error::NotTrusted { reason: reasons.join("; ") });
    }
    Ok(good)
}

/// The signatures that are accepted for this manifest's kind and key epoch.
fn keep_trusted(signatures: Vec<SignedBy>, manifest: &BundleManifest) -> Result<Vec<SignedBy>> {
    let mut reasons = Vec::new();
    let mut good = Vec::new();
    for by in signatures {
        if by.epoch < manifest.key_epoch {
            reasons.push(format!(
                "the key {} has epoch {}, but the bundle requires {} or later",
                by.id, by.epoch, manifest.key_epoch
            ));
        } else if manifest.kind == BuildKind::Release && by.kind == BuildKind::Development {
            reasons.push(format!("the development key {} may not sign a release", by.id));
        } else {
            good.push(by);
        }
    }
    if good.is_empty() {
        return Err(Error::NotTrusted { reason: reasons.join("; ") });
    }
    Ok(good)
}

/// `manifest.json.<16 upper-case hexadecimal digits>.minisig`.
fn is_further_signature(name: &str) -> bool {
    let id = name.strip_prefix("manifest.json.").and_then(|rest| rest.strip_suffix(".minisig"));
    let digit = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    id.is_some_and(|id| id.len() == 16 && id.bytes().all(digit))
}

fn read_header(input: &mut impl Read) -> Result<Option<TarMember>> {
    let mut bytes = [0_u8; RECORD];
    read_exactly(input, &mut bytes, "a tar header")?;
    ustar::parse(&bytes)
}

fn expect_name(header: Option<TarMember>, name: &str, seen: &[String]) -> Result<TarMember> {
    match header {
        Some(member) if member.name == name => Ok(member),
        Some(member) if seen.contains(&member.name) => {
            Err(Error::DuplicateMember { name: member.name })
        }
        Some(member) => Err(Error::UnexpectedMember {
            expected: format!("`{name}`"),
            found: format!("`{}`", member.name),
        }),
        None => Err(Error::UnexpectedMember {
            expected: format!("`{name}`"),
            found: "the archive's end".to_owned(),
        }),
    }
}

fn read_member(input: &mut impl Read, name: &str, bound: u64) -> Result<Vec<u8>> {
    let member = expect_name(read_header(input)?, name, &[])?;
    read_content(input, &member, bound)
}

fn read_content(input: &mut impl Read, member: &TarMember, bound: u64) -> Result<Vec<u8>> {
    if member.size > bound {
        return Err(Error::BadLength {
            what: format!("the member `{}`", member.name),
            found: member.size,
            allowed: bound,
        });
    }
    let bytes = read_exact(input, member.size, &member.name)?;
    read_padding(input, member.size)?;
    Ok(bytes)
}

/// Reads `n` bytes, which the caller has bounded. Memory grows only as bytes really arrive.
fn read_exact(input: &mut impl Read, n: u64, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = input.take(n).read_to_end(&mut bytes)?;
    if read as u64 != n {
        return Err(Error::Truncated { what: what.to_owned() });
    }
    Ok(bytes)
}

fn read_padding(input: &mut impl Read, size: u64) -> Result<()> {
    let padding = read_exact(input, ustar::padding(size) as u64, "the padding of a member")?;
    if !index::is_zero(&padding) {
        return Err(Error::TrailingData { place: "in the padding of a member".to_owned() });
    }
    Ok(())
}

fn read_exactly(input: &mut impl Read, buffer: &mut [u8], what: &str) -> Result<()> {
    input.read_exact(buffer).map_err(|error| read_error(error, what))
}

fn read_some(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return Ok(other?),
        }
    }
}

fn read_error(error: io::Error, what: &str) -> Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        Error::Truncated { what: what.to_owned() }
    } else {
        Error::Io(error)
    }
}
