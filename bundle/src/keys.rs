//! The key set: which minisign keys a device trusts, since which epoch, and for what. With an empty
//! set nothing verifies. No key ever expires, because the device's clock cannot be trusted.

use minisign_verify::{PublicKey, Signature};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::manifest::BuildKind;

/// The untrusted comment of every signature, as the `minisign` tool writes it. It is the only part of
/// a signature file that is not signed, so the format fixes its text.
pub const UNTRUSTED_COMMENT: &str = "untrusted comment: signature from minisign secret key";

/// Maximum number of keys in a set; far more than key rotations need.
const MAX_KEYS: usize = 64;

/// One trusted key, as the key set file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrustedKey {
    /// Sixteen upper-case hexadecimal digits, as `minisign` shows them.
    pub id: String,
    /// Starts at 1 and grows with each rotation.
    pub epoch: u32,
    /// What the key may sign: `release` both kinds of bundle, `development` only that kind.
    pub kind: BuildKind,
    /// The public key in minisign's base64 form (the second line of a `.pub` file).
    pub public: String,
    /// A revoked key verifies nothing. It stays listed so that a refusal can say why.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
}

/// A set of trusted keys: `keyset.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct KeySet {
    /// Grows with every change of the set: a device replaces its set only by one with a higher serial.
    #[serde(default, skip_serializing_if = "is_first")]
    pub serial: u32,
    /// The keys, by epoch and then id.
    pub keys: Vec<TrustedKey>,
}

fn is_first(serial: &u32) -> bool {
    *serial == 0
}

/// A signature that was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SignedBy {
    /// The key's id.
    pub id: String,
    /// The key's epoch.
    pub epoch: u32,
    /// The key's kind.
    pub kind: BuildKind,
    /// The signature's trusted comment, which the signature covers.
    pub comment: String,
}

/// What a signature is for. The trusted comment, which is signed, begins with `slipway <word>`, so that a text of
/// one kind is never accepted as another. A comment that does not begin with `slipway` (a signature made by hand
/// with `minisign -S`) states no purpose; then only the form of the signed text tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignaturePurpose {
    /// A bundle's manifest.
    Bundle,
    /// A key set.
    KeySet,
    /// A release's manifest.
    Release,
    /// The index of a channel of releases.
    Channel,
    /// A record of a shared cache.
    Stage,
}

impl SignaturePurpose {
    /// The word after `slipway`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Bundle => "bundle",
            Self::KeySet => "keys",
            Self::Release => "release",
            Self::Channel => "channel",
            Self::Stage => "stage",
        }
    }

    /// Why a comment contradicts this purpose.
    fn contradicts(self, comment: &str) -> Option<String> {
        let mut words = comment.split(' ');
        let ours = words.next() == Some("slipway");
        let word = words.next().unwrap_or_default();
        (ours && word != self.word()).then(|| {
            format!("made this signature for another purpose (`{word}`, not `{}`)", self.word())
        })
    }
}

/// The id of a public key (base64 form): sixteen upper-case hexadecimal digits.
///
/// # Errors
/// When it is not a minisign public key.
pub fn key_id(public: &str) -> Result<String> {
    parse_key(public)?;
    let bytes = decode_base64(public).unwrap_or_default();
    Ok(id_of(&bytes))
}

fn parse_key(public: &str) -> Result<PublicKey> {
    // The text is not shown: it may be a secret key.
    PublicKey::from_base64(public)
        .map_err(|error| Error::BadKey { reason: format!("not a public key: {error}") })
}

/// Bytes 2 to 10 of a key or signature blob are the key number, little-endian.
fn id_of(blob: &[u8]) -> String {
    blob.iter().skip(2).take(8).rev().map(|b| format!("{b:02X}")).collect()
}

impl KeySet {
    /// Reads a key set file and checks each key.
    ///
    /// # Errors
    /// When the file is not a key set, has too many keys, or lists a key under a wrong id.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let set: Self = serde_json::from_slice(json).map_err(|error| Error::BadKey {
            reason: match error.classify() {
                serde_json::error::Category::Eof if json.trim_ascii().is_empty() => {
                    "the key set is empty".to_owned()
                }
                serde_json::error::Category::Eof => {
                    format!("the key set ends in the middle, in line {}", error.line())
                }
                serde_json::error::Category::Syntax => {
                    format!("the key set is not JSON from line {} on: {error}", error.line())
                }
                _ => format!("the key set: {error}"),
            },
        })?;
        set.check()?;
        Ok(set)
    }

    /// Checks that each key is well-formed and has the id that it is listed under, and that no id occurs twice.
    ///
    /// # Errors
    /// Names the key that fails.
    pub fn check(&self) -> Result<()> {
        if self.keys.len() > MAX_KEYS {
            return Err(Error::BadKey {
                reason: format!(
                    "the key set has {} keys, the maximum is {MAX_KEYS}",
                    self.keys.len()
                ),
            });
        }
        for (at, key) in self.keys.iter().enumerate() {
            let id = key_id(&key.public).map_err(|_| Error::BadKey {
                reason: format!("the entry {} is not a public key", key.id),
            })?;
            if id != key.id {
                return Err(Error::BadKey {
                    reason: format!("the key listed as {} has the id {id}", key.id),
                });
            }
            if self.keys.iter().take(at).any(|other| other.id == key.id) {
                return Err(Error::BadKey { reason: format!("the key {id} is listed twice") });
            }
        }
        Ok(())
    }

    /// Verifies a signature by a key of this set over something that is not a bundle.
    ///
    /// # Errors
    /// When the file is malformed, the key is not valid for it, or the signature does not verify.
    pub fn verify(
        &self,
        purpose: SignaturePurpose,
        name: &str,
        file: &[u8],
        signed: &[u8],
    ) -> Result<SignedBy> {
        self.check_signature(purpose, name, file, signed)?
            .map_err(|reason| Error::NotTrusted { reason })
    }

    /// Checks one signature file over `signed`. `Ok(Err(reason))`: the key is unknown or revoked, or the signature is
    /// for another purpose. `Err`: the file is malformed, or forged in a trusted key's name.
    pub(crate) fn check_signature(
        &self,
        purpose: SignaturePurpose,
        member: &str,
        file: &[u8],
        signed: &[u8],
    ) -> Result<std::result::Result<SignedBy, String>> {
        let text = require_canonical(member, file)?;
        let bad = |error: minisign_verify::Error| Error::BadSignatureFile {
            reason: format!("{member}: {error}"),
        };
        let signature = Signature::decode(text).map_err(bad)?;
        let blob = text.lines().nth(1).and_then(decode_base64).unwrap_or_default();
        let id = id_of(&blob);
        let Some(key) = self.keys.iter().find(|key| key.id == id) else {
            return Ok(Err(format!("the key {id} is not in the key set")));
        };
        if key.revoked {
            return Ok(Err(format!("the key {id} is revoked")));
        }
        parse_key(&key.public)?
            .verify(signed, &signature, false)
            .map_err(|_| Error::BadSignature { key: id.clone() })?;
        let comment = signature.trusted_comment().to_owned();
        if let Some(why) = purpose.contradicts(&comment) {
            return Ok(Err(format!("the key {id} has {why}")));
        }
        Ok(Ok(SignedBy { id, epoch: key.epoch, kind: key.kind, comment }))
    }
}

/// Accepts exactly four lines, the prescribed untrusted comment and canonical base64, so that the file
/// is refused when any bit of it has changed.
fn require_canonical<'a>(member: &str, file: &'a [u8]) -> Result<&'a str> {
    let bad = |reason: &str| Error::BadSignatureFile { reason: format!("{member}: {reason}") };
    let text = std::str::from_utf8(file).map_err(|_| bad("not UTF-8"))?;
    let lines: Vec<&str> = text.split('\n').collect();
    let [comment, first, trusted, second, ""] = lines.as_slice() else {
        return Err(bad("expected exactly four lines"));
    };
    if *comment != UNTRUSTED_COMMENT {
        return Err(bad(&format!("the first line is not `{UNTRUSTED_COMMENT}`")));
    }
    if trusted.contains('\r') || !trusted.starts_with("trusted comment: ") {
        return Err(bad("the third line is not a trusted comment"));
    }
    // 74 bytes: algorithm, key number, signature; 64: the signature over signature and comment.
    let ok =
        |line: &str, length: usize| decode_base64(line).is_some_and(|bytes| bytes.len() == length);
    if !ok(first, 74) || !ok(second, 64) {
        return Err(bad("the signature is not canonical base64 of the right length"));
    }
    Ok(text)
}

/// Standard base64 with padding.
pub fn encode_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0_usize, |bits, at| {
            bits << 8 | usize::from(group.get(at).copied().unwrap_or_default())
        });
        for digit in 0..4 {
            let value = ALPHABET.get(bits >> (18 - 6 * digit) & 63).copied().unwrap_or_default();
            out.push(if digit > group.len() { '=' } else { char::from(value) });
        }
    }
    out
}

/// A signature file of the prescribed form, from a prehashed (`ED`) minisign signature.
///
/// `number` is the key number as the key file has it, `signature` signs the BLAKE2b-512 of the
/// manifest, `global` signs `signature` followed by the trusted comment's text.
pub fn signature_file(
    number: &[u8; 8],
    signature: &[u8; 64],
    comment: &str,
    global: &[u8; 64],
) -> String {
    let mut blob = b"ED".to_vec();
    blob.extend_from_slice(number);
    blob.extend_from_slice(signature);
    let (first, second) = (encode_base64(&blob), encode_base64(global));
    format!("{UNTRUSTED_COMMENT}\n{first}\ntrusted comment: {comment}\n{second}\n")
}

/// Decodes strict base64: standard alphabet, padded, unused bits zero. `None` for any other text.
pub fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let bytes = text.as_bytes();
    let body = text.trim_end_matches('=').len();
    let padding = bytes.len().checked_sub(body)?;
    if !bytes.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut out = Vec::with_capacity(bytes.len());
    let (mut bits, mut count) = (0_u32, 0_u32);
    for byte in bytes.iter().take(body) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push(((bits >> count) & 0xff) as u8);
            bits &= (1 << count) - 1;
        }
    }
    (bits == 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_one_spelling() {
        assert_eq!(decode_base64("QQ==").as_deref(), Some(&b"A"[..]));
        assert_eq!(decode_base64("QUE=").as_deref(), Some(&b"AA"[..]));
        // Unused bits that are set, too little or too much padding, a character outside of the alphabet.
        for other in ["QR==", "QUF=", "QQ=", "QQ", "Q===", "QQ==QQ==", "Q Q="] {
            assert_eq!(decode_base64(other), None, "{other}");
        }
    }
}
