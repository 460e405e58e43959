//! The 512-byte tar headers. The format fixes every byte of a header except name and size. So a header
//! is read by writing the expected one and comparing: no octal variants, no extensions, no ambiguity.

use crate::error::{Error, Result};

/// Bytes of a header, and the unit that members are padded to.
pub const RECORD: usize = 512;

/// Bytes of zeros that end the archive: two records, as POSIX requires.
pub const TRAILER: usize = 2 * RECORD;

/// The header of a plain file of `size` bytes, exactly as the writer writes it.
///
/// Mode 0644, owner and group 0 without names, modification time 0.
///
/// # Errors
/// When the name or the size does not fit into the header.
pub fn encode_header(name: &str, size: u64) -> Result<[u8; RECORD]> {
    if size > crate::MAX_DATA {
        return Err(Error::BadLength {
            what: format!("the member `{name}`"),
            found: size,
            allowed: crate::MAX_DATA,
        });
    }
    if name.is_empty() || name.len() > 99 || !is_safe(name.as_bytes()) {
        return Err(Error::UnsafeName { name: name.escape_debug().to_string() });
    }
    let mut bytes = [0_u8; RECORD];
    set_field(&mut bytes, 0, name.as_bytes());
    set_field(&mut bytes, 100, b"0000644\0");
    set_field(&mut bytes, 108, b"0000000\0");
    set_field(&mut bytes, 116, b"0000000\0");
    set_field(&mut bytes, 124, format!("{size:011o}\0").as_bytes());
    set_field(&mut bytes, 136, b"00000000000\0");
    set_field(&mut bytes, 148, b"        ");
    set_field(&mut bytes, 156, b"0");
    set_field(&mut bytes, 257, b"ustar\0");
    set_field(&mut bytes, 263, b"00");
    // POSIX: the sum of all bytes, the checksum's own field counted as blanks.
    let sum: u32 = bytes.iter().map(|b| u32::from(*b)).sum();
    set_field(&mut bytes, 148, format!("{sum:06o}\0 ").as_bytes());
    Ok(bytes)
}

fn set_field(bytes: &mut [u8; RECORD], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarMember {
    /// The member's name.
    pub name: String,
    /// Its length in bytes, without padding.
    pub size: u64,
}

/// Reads a header; `None` for a record of zeros, which ends the archive.
///
/// # Errors
/// When the header differs in any byte from the one that [`encode_header`] makes.
pub fn parse(bytes: &[u8; RECORD]) -> Result<Option<TarMember>> {
    if bytes.iter().all(|b| *b == 0) {
        return Ok(None);
    }
    let name: Vec<u8> = bytes.iter().take(100).copied().take_while(|b| *b != 0).collect();
    let escaped = name.escape_ascii().to_string();
    let flag = bytes.get(156).copied().unwrap_or_default();
    if flag != b'0' {
        return Err(Error::IrregularMember { name: escaped, flag });
    }
    let Ok(name) = String::from_utf8(name) else { return Err(Error::UnsafeName { name: escaped }) };
    let mut size = 0_u64;
    for digit in bytes.iter().skip(124).take(11) {
        match digit {
            b'0'..=b'7' => size = size * 8 + u64::from(digit - b'0'),
            _ => {
                return Err(Error::BadHeader {
                    reason: format!("the size of `{escaped}` is not eleven octal digits"),
                });
            }
        }
    }
    let canonical = encode_header(&name, size)?;
    match canonical.iter().zip(bytes).position(|(a, b)| a != b) {
        None => Ok(Some(TarMember { name, size })),
        Some(at) => Err(Error::BadHeader {
            reason: format!(
                "byte {at} of the header of `{escaped}` differs from the prescribed one"
            ),
        }),
    }
}

/// Whether a name has only `a-z A-Z 0-9 . _ - /`, and no part that is empty, `.` or `..`.
fn is_safe(name: &[u8]) -> bool {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"._-/".contains(b);
    name.iter().all(plain)
        && name.split(|b| *b == b'/').all(|part| !matches!(part, b"" | b"." | b".."))
}

/// How many zeros follow a member of `size` bytes.
pub fn padding(size: u64) -> usize {
    let record = RECORD as u64;
    // Below RECORD, so the cast is exact.
    ((record - size % record) % record) as usize
}
