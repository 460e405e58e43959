//! The error type of this crate: a stable machine-readable code, a sentence and a hint.

use std::fmt;
use std::io;

/// Why a bundle was refused, or could not be made.
#[derive(Debug)]
pub enum Error {
    /// Reading or writing failed; nothing is said about the bundle itself.
    Io(io::Error),
    /// The bundle ends in the middle of something.
    Truncated {
        /// What was being read.
        what: String,
    },
    /// A tar header differs from the one that the format prescribes for its member.
    BadHeader {
        /// What differs.
        reason: String,
    },
    /// A member's name is absolute, contains `..`, or has characters that the format does not allow.
    UnsafeName {
        /// The name, escaped.
        name: String,
    },
    /// A member is a link, a device, a directory, or an extension header (pax, GNU long name).
    IrregularMember {
        /// The name, escaped.
        name: String,
        /// The tar type flag.
        flag: u8,
    },
    /// A member occurs twice.
    DuplicateMember {
        /// The name.
        name: String,
    },
    /// A member is missing, superfluous, or in the wrong position.
    UnexpectedMember {
        /// What the format prescribes here.
        expected: String,
        /// What the archive has here.
        found: String,
    },
    /// A length is above the format's bound or differs from the manifest.
    BadLength {
        /// What has this length.
        what: String,
        /// The length that was found, in bytes or items.
        found: u64,
        /// The bound, or the length that was expected.
        allowed: u64,
    },
    /// There are bytes after the end of the archive, or the padding is not zero.
    TrailingData {
        /// Where.
        place: String,
    },
    /// `manifest.json` is not what the format prescribes.
    BadManifest {
        /// Where and what.
        reason: String,
    },
    /// The lock of a component breaks a rule of the format, or does not describe its payloads.
    BadComponent {
        /// What.
        reason: String,
    },
    /// A wheel's tree has entries that robots do not accept, or differs from its lock.
    BadTree {
        /// The wheel and its version.
        wheel: String,
        /// What is wrong.
        reason: String,
    },
    /// The bundle has a format version that this reader does not know.
    UnknownFormat {
        /// The version found.
        found: u64,
    },
    /// The bundle requires a feature that this reader does not have.
    UnknownFeature {
        /// Its name.
        name: String,
    },
    /// A signature file is malformed.
    BadSignatureFile {
        /// The member and what is wrong.
        reason: String,
    },
    /// A signature names a trusted key but does not verify.
    BadSignature {
        /// The key's id.
        key: String,
    },
    /// No signature was made by a key that may sign this bundle.
    NotTrusted {
        /// Why each signature is not accepted.
        reason: String,
    },
    /// A key set or a public key cannot be used.
    BadKey {
        /// What is wrong.
        reason: String,
    },
    /// The bundle is for another product.
    WrongProduct {
        /// The bundle's product.
        found: String,
        /// The device's product.
        expected: String,
    },
    /// The bundle does not list the device's board.
    WrongBoard {
        /// The bundle's boards.
        found: String,
        /// The device's board.
        expected: String,
    },
    /// The bundle's version is below the floor that an earlier bundle set.
    BelowFloor {
        /// The bundle's version.
        found: String,
        /// The lowest version allowed.
        floor: String,
    },
    /// A block index is malformed.
    BadIndex {
        /// What is wrong.
        reason: String,
    },
    /// Bytes do not match the hash in the manifest or the index.
    WrongHash {
        /// What has this length.
        what: String,
    },
    /// A frame is not a zstd frame, or not one that the format allows.
    BadFrame {
        /// The frame's number.
        frame: u32,
        /// What is wrong.
        reason: String,
    },
    /// A frame yields fewer or more bytes than the index says.
    FrameLength {
        /// The frame's number.
        frame: u32,
        /// Whether it yields more.
        more: bool,
    },
    /// The caller used the library in an invalid order.
    Misuse {
        /// What.
        reason: String,
    },
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A stable machine-readable word; it never changes once it has been released.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io(_) => "io",
            Self::Truncated { .. } => "truncated",
            Self::BadHeader { .. } => "bad-header",
            Self::UnsafeName { .. } => "unsafe-name",
            Self::IrregularMember { .. } => "irregular-member",
            Self::DuplicateMember { .. } => "duplicate-member",
            Self::UnexpectedMember { .. } => "unexpected-member",
            Self::BadLength { .. } => "bad-length",
            Self::TrailingData { .. } => "trailing-data",
            Self::BadManifest { .. } => "bad-manifest",
            Self::BadComponent { .. } => "bad-component",
            Self::BadTree { .. } => "bad-tree",
            Self::UnknownFormat { .. } => "unknown-format",
            Self::UnknownFeature { .. } => "unknown-feature",
            Self::BadSignatureFile { .. } => "bad-signature-file",
            Self::BadSignature { .. } => "bad-signature",
            Self::NotTrusted { .. } => "not-trusted",
            Self::BadKey { .. } => "bad-key",
            Self::WrongProduct { .. } => "wrong-product",
            Self::WrongBoard { .. } => "wrong-board",
            Self::BelowFloor { .. } => "below-floor",
            Self::BadIndex { .. } => "bad-index",
            Self::WrongHash { .. } => "wrong-hash",
            Self::BadFrame { .. } => "bad-frame",
            Self::FrameLength { .. } => "frame-length",
            Self::Misuse { .. } => "misuse",
        }
    }

    /// What the user can do about the error.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Io(_) => "check the medium and its cable, and try again",
            Self::Truncated { .. } => {
                "the file is incomplete: copy or download it again, and compare its size"
            }
            Self::BadHeader { .. }
            | Self::TrailingData { .. }
            | Self::BadLength { .. }
            | Self::UnexpectedMember { .. }
            | Self::BadSignatureFile { .. }
            | Self::BadIndex { .. }
            | Self::WrongHash { .. } => {
                "the file is damaged or was repacked: copy it again from the original"
            }
            Self::UnsafeName { .. }
            | Self::IrregularMember { .. }
            | Self::DuplicateMember { .. }
            | Self::BadFrame { .. }
            | Self::FrameLength { .. } => {
                "no Slipway tool writes such a file: do not use it, and find out where it comes from"
            }
            Self::BadManifest { .. } | Self::BadComponent { .. } | Self::BadTree { .. } => {
                "rebuild the bundle with a current version of Slipway"
            }
            Self::UnknownFormat { .. } | Self::UnknownFeature { .. } => {
                "this reader is older than the bundle: install an intermediate release first"
            }
            Self::BadSignature { .. } => {
                "the manifest was changed after it was signed: do not use this file"
            }
            Self::NotTrusted { .. } => {
                "sign the bundle with a key of this device's key set, or check that the bundle is meant for this device"
            }
            Self::BadKey { .. } => "check the key set file; `keys list` shows it",
            Self::WrongProduct { .. } | Self::WrongBoard { .. } => {
                "use the bundle that was built for this product and board"
            }
            Self::BelowFloor { .. } => "use a newer bundle",
            Self::Misuse { .. } => "this is a bug in the program that calls the library",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "{error}"),
            Self::Truncated { what } => write!(f, "the bundle ends in the middle of {what}"),
            Self::BadHeader { reason } => write!(f, "invalid tar header: {reason}"),
            Self::UnsafeName { name } => write!(f, "invalid member name `{name}`"),
            Self::IrregularMember { name, flag } => write!(
                f,
                "the member `{name}` is not a regular file (tar type `{}`)",
                flag.escape_ascii()
            ),
            Self::DuplicateMember { name } => write!(f, "the member `{name}` occurs twice"),
            Self::UnexpectedMember { expected, found } => {
                write!(f, "expected the member {expected}, found {found}")
            }
            Self::BadLength { what, found, allowed } => {
                write!(f, "the length of {what} is {found}, but {allowed} is allowed")
            }
            Self::TrailingData { place } => write!(f, "unexpected bytes {place}"),
            Self::BadManifest { reason } => write!(f, "manifest.json: {reason}"),
            Self::BadComponent { reason } => write!(f, "component.json: {reason}"),
            Self::BadTree { wheel, reason } => write!(f, "the tree of {wheel}: {reason}"),
            Self::UnknownFormat { found } => {
                write!(
                    f,
                    "the bundle has format version {found}, but this reader supports {}",
                    crate::FORMAT
                )
            }
            Self::UnknownFeature { name } => {
                write!(
                    f,
                    "the bundle requires the feature `{name}`, which this reader does not support"
                )
            }
            Self::BadSignatureFile { reason } => {
                write!(f, "malformed signature file: {reason}")
            }
            Self::BadSignature { key } => {
                write!(f, "the signature by the trusted key {key} does not match the manifest")
            }
            Self::NotTrusted { reason } => write!(f, "not signed by a trusted key: {reason}"),
            Self::BadKey { reason } => write!(f, "unusable key: {reason}"),
            Self::WrongProduct { found, expected } => {
                write!(
                    f,
                    "the bundle is for the product `{found}`, but this device is `{expected}`"
                )
            }
            Self::WrongBoard { found, expected } => {
                write!(f, "the bundle is for the boards {found}, but this device is `{expected}`")
            }
            Self::BelowFloor { found, floor } => {
                write!(
                    f,
                    "the bundle has version {found}, but the lowest allowed version is {floor}"
                )
            }
            Self::BadIndex { reason } => write!(f, "malformed block index: {reason}"),
            Self::WrongHash { what } => write!(f, "hash mismatch in {what}"),
            Self::BadFrame { frame, reason } => write!(f, "frame {frame}: {reason}"),
            Self::FrameLength { frame, more: true } => {
                write!(f, "frame {frame} decompresses to more than the index says")
            }
            Self::FrameLength { frame, more: false } => {
                write!(f, "frame {frame} decompresses to less than the index says")
            }
            Self::Misuse { reason } => write!(f, "{reason}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
