//! A small text in raw sectors of a disk. Two copies are written alternately, so that a torn write leaves the other
//! copy intact. It holds what a robot must not forget even when its file systems are lost. Pure functions over
//! bytes; `docs/concepts/boot-flows.md` describes the format.

use std::fmt;

/// Bytes that a disk layout sets aside for one copy.
pub const COPY: usize = 64 * 1024;

/// The first eight bytes of a copy.
pub const MAGIC: [u8; 8] = *b"SLIPKEPT";

/// The only format that exists.
const FORMAT: u32 = 1;

/// Bytes before the text: magic, format, checksum, sequence (8), length.
const HEAD: usize = 28;

/// Offset of the first byte that the checksum covers: it covers everything after itself.
const COVERED: usize = 16;

/// Maximum length of a text in bytes.
pub const MAX_TEXT: usize = COPY - HEAD;

/// Unit of what is written: a sector.
const SECTOR: usize = 512;

/// One copy's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AreaCopy {
    /// Grows by one with every write; of two valid copies the higher one is used.
    pub sequence: u64,
    /// The text.
    pub text: Vec<u8>,
}

/// Why a copy is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidAreaCopy {
    /// The whole first sector is zero: nothing was ever written.
    Empty,
    /// The copy does not begin with [`MAGIC`], or is too short.
    Foreign,
    /// The copy has another format version.
    Format(u32),
    /// The checksum or the length is wrong: the copy is torn or damaged.
    Checksum,
}

impl fmt::Display for InvalidAreaCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("nothing was written yet"),
            Self::Foreign => f.write_str("the sectors hold other data"),
            Self::Format(format) => write!(f, "unknown format {format} (supported: {FORMAT})"),
            Self::Checksum => f.write_str("checksum mismatch"),
        }
    }
}

impl std::error::Error for InvalidAreaCopy {}

impl AreaCopy {
    /// This copy as whole sectors; `None` when the text is longer than [`MAX_TEXT`].
    pub fn encode(&self) -> Option<Vec<u8>> {
        if self.text.len() > MAX_TEXT {
            return None;
        }
        let mut covered = self.sequence.to_le_bytes().to_vec();
        covered.extend(u32::try_from(self.text.len()).ok()?.to_le_bytes());
        covered.extend_from_slice(&self.text);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(crc32fast::hash(&covered).to_le_bytes());
        bytes.append(&mut covered);
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        Some(bytes)
    }

    /// Reads a copy from the sectors reserved for it.
    ///
    /// # Errors
    /// When the copy is not valid.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidAreaCopy> {
        if bytes.iter().take(SECTOR).all(|byte| *byte == 0) {
            return Err(InvalidAreaCopy::Empty);
        }
        let number = |at: usize| -> Result<u32, InvalidAreaCopy> {
            let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
            field.map(u32::from_le_bytes).ok_or(InvalidAreaCopy::Foreign)
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(InvalidAreaCopy::Foreign);
        }
        let format = number(8)?;
        if format != FORMAT {
            return Err(InvalidAreaCopy::Format(format));
        }
        let length = number(24)? as usize;
        let end = HEAD.checked_add(length).ok_or(InvalidAreaCopy::Checksum)?;
        let covered = bytes.get(COVERED..end).ok_or(InvalidAreaCopy::Checksum)?;
        if number(12)? != crc32fast::hash(covered) {
            return Err(InvalidAreaCopy::Checksum);
        }
        let sequence = u64::from(number(16)?) | u64::from(number(20)?) << 32;
        Ok(Self { sequence, text: bytes.get(HEAD..end).unwrap_or_default().to_vec() })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    fn copy(text: &[u8]) -> AreaCopy {
        AreaCopy { sequence: 1 << 40 | 7, text: text.to_vec() }
    }

    #[test]
    fn what_is_written_is_read_and_every_flipped_bit_is_noticed() {
        for text in [&b""[..], b"x", &[7; 5000], &[0; MAX_TEXT]] {
            let bytes = copy(text).encode().unwrap();
            assert!(bytes.len().is_multiple_of(SECTOR) && bytes.len() <= COPY);
            assert_eq!(AreaCopy::decode(&bytes), Ok(copy(text)));
        }
        assert_eq!(copy(&[0; MAX_TEXT + 1]).encode(), None);
        let bytes = copy(b"some text").encode().unwrap();
        for bit in 0..(HEAD + 9) * 8 {
            let mut broken = bytes.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            assert!(AreaCopy::decode(&broken).is_err(), "bit {bit}");
        }
        assert_eq!(AreaCopy::decode(&[0; COPY]), Err(InvalidAreaCopy::Empty));
        assert_eq!(AreaCopy::decode(&[]), Err(InvalidAreaCopy::Empty));
        assert_eq!(AreaCopy::decode(&bytes[..30]), Err(InvalidAreaCopy::Checksum));
        assert_eq!(AreaCopy::decode(&bytes[..10]), Err(InvalidAreaCopy::Foreign));
        assert_eq!(AreaCopy::decode(&[1; 600]), Err(InvalidAreaCopy::Foreign));
    }
}
