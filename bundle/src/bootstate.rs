//! The boot state: which slot starts. It is kept in two raw sectors that are written alternately.
//!
//! A sector is a U-Boot environment block, so that U-Boot itself reads and writes it (`env import -c`,
//! `env export -c`). Pure functions over bytes; `docs/concepts/boot-flows.md` describes the format.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Length of one copy in bytes: one sector, which a card writes whole or not at all.
pub const SECTOR: usize = 512;

/// The checksum's length: CRC-32 (the zip polynomial), little-endian, over everything that follows it.
const CHECKSUM: usize = 4;

/// One of the two sets of partitions that hold a system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// The first; the one that starts when nothing valid is known.
    A,
    /// The second.
    B,
}

impl Slot {
    /// `a` or `b`.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        match name {
            "a" => Some(Self::A),
            "b" => Some(Self::B),
            _ => None,
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What one copy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootState {
    /// Grows by one with every write; of two valid copies the higher one is used.
    pub sequence: u32,
    /// The committed slot.
    pub active: Slot,
    /// The slot that is to be tried before it is committed.
    pub trial: Option<Slot>,
    /// How many more starts of `trial` are allowed.
    pub tries: u32,
}

/// Why a sector holds no boot state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidBootState {
    /// The sector is not 512 bytes long.
    Length(usize),
    /// The checksum is wrong: never written, or torn.
    Checksum,
    /// The checksum is right, but this variable is missing or invalid.
    Variable(&'static str),
}

impl fmt::Display for InvalidBootState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(length) => write!(f, "the sector has {length} bytes, expected {SECTOR}"),
            Self::Checksum => f.write_str("checksum mismatch"),
            Self::Variable(name) => write!(f, "the variable `{name}` is missing or invalid"),
        }
    }
}

impl std::error::Error for InvalidBootState {}

impl BootState {
    /// The state of a new card: slot a, nothing on trial.
    pub fn first() -> Self {
        Self { sequence: 1, active: Slot::A, trial: None, tries: 0 }
    }

    /// This state as a sector. Numbers are hexadecimal without a prefix, because U-Boot's `setexpr`
    /// writes only those.
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut text = format!("active={}\0seq={:x}\0", self.active, self.sequence);
        if let Some(trial) = self.trial {
            text.push_str(&format!("trial={trial}\0"));
        }
        text.push_str(&format!("tries={:x}\0", self.tries));
        let mut sector = [0; SECTOR];
        let (checksum, body) = sector.split_at_mut(CHECKSUM);
        // At most 45 bytes, and the rest stays zero: an empty string ends the list.
        body.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        checksum.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        sector
    }

    /// Reads a sector. Unknown variables are skipped.
    ///
    /// # Errors
    /// When the sector is not a valid copy.
    pub fn decode(sector: &[u8]) -> Result<Self, InvalidBootState> {
        let sector: &[u8; SECTOR] =
            sector.try_into().map_err(|_| InvalidBootState::Length(sector.len()))?;
        let (checksum, body) = sector.split_at(CHECKSUM);
        if checksum != crc32fast::hash(body).to_le_bytes() {
            return Err(InvalidBootState::Checksum);
        }
        let (mut sequence, mut active, mut trial, mut tries) = (None, None, None, 0);
        for entry in body.split(|b| *b == 0).take_while(|entry| !entry.is_empty()) {
            let entry = String::from_utf8_lossy(entry);
            let (name, value) = entry.split_once('=').unwrap_or((&entry, ""));
            match name {
                "seq" => sequence = Some(number(value).ok_or(InvalidBootState::Variable("seq"))?),
                "active" => {
                    active = Some(Slot::parse(value).ok_or(InvalidBootState::Variable("active"))?);
                }
                "trial" if !value.is_empty() => {
                    trial = Some(Slot::parse(value).ok_or(InvalidBootState::Variable("trial"))?);
                }
                "tries" => tries = number(value).ok_or(InvalidBootState::Variable("tries"))?,
                _ => {}
            }
        }
        Ok(Self {
            sequence: sequence.ok_or(InvalidBootState::Variable("seq"))?,
            active: active.ok_or(InvalidBootState::Variable("active"))?,
            trial,
            tries,
        })
    }
}

/// The copy that is used, and its index: the valid one with the highest sequence number, or the first
/// of two equal ones. `None` when no copy is valid.
pub fn find_newest<'a>(copies: impl IntoIterator<Item = &'a [u8]>) -> Option<(usize, BootState)> {
    let mut best: Option<(usize, BootState)> = None;
    for (index, copy) in copies.into_iter().enumerate() {
        let Ok(state) = BootState::decode(copy) else { continue };
        if best.is_none_or(|(_, known)| state.sequence > known.sequence) {
            best = Some((index, state));
        }
    }
    best
}

fn number(text: &str) -> Option<u32> {
    // `from_str_radix` also accepts a sign.
    if text.starts_with('+') { None } else { u32::from_str_radix(text, 16).ok() }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    fn state(sequence: u32, active: Slot) -> BootState {
        BootState { sequence, active, trial: None, tries: 0 }
    }

    fn sector_of(text: &[u8]) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        sector[4..4 + text.len()].copy_from_slice(text);
        let checksum = crc32fast::hash(&sector[4..]);
        sector[..4].copy_from_slice(&checksum.to_le_bytes());
        sector
    }

    #[test]
    fn what_is_written_is_read() {
        let full = BootState { sequence: 0x1f, active: Slot::B, trial: Some(Slot::A), tries: 0x10 };
        for state in [BootState::first(), full, state(u32::MAX, Slot::B)] {
            assert_eq!(BootState::decode(&state.encode()), Ok(state));
        }
        assert_eq!(&full.encode()[4..40], b"active=b\0seq=1f\0trial=a\0tries=10\0\0\0\0");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let sector = state(7, Slot::B).encode();
        for bit in 0..SECTOR * 8 {
            let mut broken = sector;
            broken[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(BootState::decode(&broken), Err(InvalidBootState::Checksum), "bit {bit}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let cases: [(&[u8], InvalidBootState); 6] = [
            (b"", InvalidBootState::Variable("seq")),
            (b"seq=1\0", InvalidBootState::Variable("active")),
            (b"active=c\0seq=1\0", InvalidBootState::Variable("active")),
            (b"active=a\0seq=+1\0", InvalidBootState::Variable("seq")),
            (b"active=a\0seq=100000000\0", InvalidBootState::Variable("seq")),
            (b"active=a\0seq=1\0trial=x\0", InvalidBootState::Variable("trial")),
        ];
        for (text, expected) in cases {
            assert_eq!(BootState::decode(&sector_of(text)), Err(expected));
        }
        assert_eq!(BootState::decode(&[0; SECTOR]), Err(InvalidBootState::Checksum));
        assert_eq!(BootState::decode(&[0; 511]), Err(InvalidBootState::Length(511)));
    }

    #[test]
    fn the_newest_valid_copy_counts() {
        let (old, new) = (state(9, Slot::A).encode(), state(0x10, Slot::B).encode());
        let torn = [0xff; SECTOR];
        let pick = |a: &[u8], b: &[u8]| find_newest([a, b]).map(|(i, s)| (i, s.active));
        assert_eq!(pick(&old, &new), Some((1, Slot::B)));
        assert_eq!(pick(&new, &old), Some((0, Slot::B)));
        assert_eq!(pick(&old, &torn), Some((0, Slot::A)));
        assert_eq!(pick(&torn, &new), Some((1, Slot::B)));
        assert_eq!(pick(&torn, &torn), None);
    }
}
