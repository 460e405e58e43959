//! The public keys of additional archives: armoured or binary OpenPGP, converted to one binary
//! keyring for apt. A secret key anywhere in the file is rejected. apt verifies the signatures.

use bundle::keys::decode_base64;

/// Why a file is not a keyring for apt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyringError {
    /// The file contains a secret key.
    Secret,
    /// The file is something else, or damaged.
    NoKey(&'static str),
}

/// Packets of RFC 4880, section 4.3.
const PUBLIC_KEY: u8 = 6;
const SECRET_KEYS: [u8; 2] = [5, 7];
/// Signature, marker, trust, user id, public subkey, user attribute, padding.
const BESIDES: [u8; 7] = [2, 10, 12, 13, 14, 17, 21];

const BEGIN: &str = "-----BEGIN PGP ";
const END: &str = "-----END PGP ";

/// The keyring in binary form.
///
/// # Errors
/// When the file contains a secret key, or no public key.
pub fn decode_keyring(file: &[u8]) -> Result<Vec<u8>, KeyringError> {
    let binary = match std::str::from_utf8(file) {
        Ok(text) if text.contains(BEGIN) => decode_armour(text)?,
        Ok(_) => return Err(KeyringError::NoKey("a text without \"BEGIN PGP PUBLIC KEY BLOCK\"")),
        Err(_) => file.to_vec(),
    };
    let mut rest = binary.as_slice();
    let mut first = true;
    while !rest.is_empty() {
        let (tag, length) =
            packet_header(rest).ok_or(KeyringError::NoKey("the data is damaged or truncated"))?;
        if SECRET_KEYS.contains(&tag) {
            return Err(KeyringError::Secret);
        }
        if tag != PUBLIC_KEY && (first || !BESIDES.contains(&tag)) {
            return Err(KeyringError::NoKey("OpenPGP data without a public key"));
        }
        (first, rest) = (false, &rest[length..]);
    }
    if first { Err(KeyringError::NoKey("the file is empty")) } else { Ok(binary) }
}

/// Tag and total length of the first packet of `bytes`.
fn packet_header(bytes: &[u8]) -> Option<(u8, usize)> {
    let head = *bytes.first()?;
    let number = |at: std::ops::Range<usize>| {
        bytes
            .get(at)?
            .iter()
            .try_fold(0usize, |n, b| n.checked_mul(256)?.checked_add(usize::from(*b)))
    };
    let (tag, body, start) = if head & 0xc0 == 0xc0 {
        let (body, start) = match bytes.get(1)? {
            short @ 0..=191 => (usize::from(*short), 2),
            long @ 192..=223 => ((usize::from(*long) - 192) * 256 + number(2..3)? + 192, 3),
            255 => (number(2..6)?, 6),
            // Only data packets may be partial.
            224..=254 => return None,
        };
        (head & 0x3f, body, start)
    } else if head & 0x80 != 0 {
        let octets = match head & 3 {
            0 => 1,
            1 => 2,
            2 => 4,
            _ => return None,
        };
        ((head >> 2) & 0x0f, number(1..1 + octets)?, 1 + octets)
    } else {
        return None;
    };
    let length = body.checked_add(start)?;
    (length <= bytes.len()).then_some((tag, length))
}

/// The content of all armoured blocks, without their checksums: apt checks the signatures.
fn decode_armour(text: &str) -> Result<Vec<u8>, KeyringError> {
    let mut binary = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        let Some(kind) = line.strip_prefix(BEGIN) else { continue };
        if kind.starts_with("PRIVATE KEY") {
            return Err(KeyringError::Secret);
        }
        if !kind.starts_with("PUBLIC KEY BLOCK") {
            return Err(KeyringError::NoKey("OpenPGP data without a public key"));
        }
        let mut body = String::new();
        let mut ended = false;
        // Headers end with an empty line.
        for line in lines.by_ref().skip_while(|line| !line.is_empty()) {
            if line.starts_with(END) {
                ended = true;
                break;
            }
            if !line.starts_with('=') {
                body.push_str(line);
            }
        }
        let decoded = if ended { decode_base64(&body) } else { None };
        binary.extend(decoded.ok_or(KeyringError::NoKey("the data is damaged or truncated"))?);
    }
    Ok(binary)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet in the new format with this tag and body.
    fn made(tag: u8, body: &[u8]) -> Vec<u8> {
        [&[0xc0 | tag, body.len() as u8], body].concat()
    }

    #[test]
    fn a_secret_key_is_found_wherever_it_is() {
        let public = made(6, &[4, 1, 2, 0xff]);
        assert_eq!(decode_keyring(&public), Ok(public.clone()));
        let both = [public.clone(), made(13, b"me"), made(5, &[4, 0xff])].concat();
        assert_eq!(decode_keyring(&both), Err(KeyringError::Secret));
        let subkey = [public.clone(), made(7, &[4, 0xff])].concat();
        assert_eq!(decode_keyring(&subkey), Err(KeyringError::Secret));
        let text =
            "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nxgME\n-----END PGP PRIVATE KEY BLOCK-----\n";
        assert_eq!(decode_keyring(text.as_bytes()), Err(KeyringError::Secret));
        // A secret key (tag 5) that is labelled as public.
        let text = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nxQME//8=\n-----END PGP PUBLIC KEY BLOCK-----\n";
        assert_eq!(decode_keyring(text.as_bytes()), Err(KeyringError::Secret));
    }

    #[test]
    fn damage_is_no_key() {
        let public = made(6, &[4, 1, 2, 0xff]);
        for cut in 1..public.len() {
            assert!(matches!(decode_keyring(&public[..cut]), Err(KeyringError::NoKey(_))), "{cut}");
        }
        for file in [&b""[..], b"hello", &made(2, &[0xff]), &[0xc6, 255, 255, 255, 255, 255]] {
            assert!(matches!(decode_keyring(file), Err(KeyringError::NoKey(_))), "{file:?}");
        }
        let text = "-----BEGIN PGP PUBLIC KEY BLOCK-----\nComment: x\n\nxgQE\nAQL/\n=abcd\n";
        assert!(matches!(decode_keyring(text.as_bytes()), Err(KeyringError::NoKey(_))));
        let whole = format!("{text}-----END PGP PUBLIC KEY BLOCK-----\n");
        assert_eq!(decode_keyring(whole.as_bytes()), Ok(public));
    }

    #[test]
    fn lengths_are_read_in_every_form() {
        let body = vec![0xff; 300];
        let old = [&[0x80 | 6 << 2 | 1, 1, 44][..], &body].concat();
        assert_eq!(decode_keyring(&old), Ok(old.clone()));
        let two = [&[0xc6, 192, 108][..], &body].concat();
        assert_eq!(decode_keyring(&two), Ok(two.clone()));
        let five = [&[0xc6, 255, 0, 0, 1, 44][..], &body].concat();
        assert_eq!(decode_keyring(&five), Ok(five.clone()));
    }
}
