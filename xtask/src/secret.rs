//! Detects secret keys in files by the markers of their formats. Files of an image are also in its
//! bundle and in every release, so they must not contain secret keys.

/// A format of secret keys.
struct Form {
    /// The prefix of its first line.
    begin: &'static str,
    /// Another part of its first line.
    with: &'static str,
    /// Its name in messages.
    name: &'static str,
}

/// PEM of RFC 7468, with four dashes as in RFC 4716; OpenSSH's first protocol; PuTTY's PPK; age.
const FORMS: [Form; 5] = [
    Form { begin: "-----BEGIN ", with: "PRIVATE KEY", name: "PEM" },
    Form { begin: "---- BEGIN ", with: "PRIVATE KEY", name: "SSH2" },
    Form { begin: "SSH PRIVATE KEY FILE FORMAT", with: "", name: "SSH 1" },
    Form { begin: "PuTTY-User-Key-File-", with: ":", name: "PuTTY" },
    Form { begin: "AGE-SECRET-KEY-1", with: "", name: "age" },
];
/// minisign's: base64 of 158 bytes that begin with "Ed", scrypt or no derivation of a key, and "B2"
/// (`minisign` 0.11, `SeckeyStruct`). A public key's 42 bytes have the same beginning.
const MINISIGN: [&str; 2] = ["RWRTY0Iy", "RWQAAEIy"];
const MINISIGN_LENGTH: usize = 212;

/// The format of the secret key in a file, if any.
///
/// A program that contains these markers has them among other bytes; a key has them at the
/// beginning of a line, and key data in the next.
pub fn find_secret(file: &[u8]) -> Option<&'static str> {
    // In UTF-16, every other byte of ASCII text is zero.
    let wide = file.starts_with(&[0xff, 0xfe]) || file.starts_with(&[0xfe, 0xff]);
    let narrow: Vec<u8>;
    let file = if wide {
        narrow = file.iter().copied().filter(|byte| *byte != 0).collect();
        narrow.as_slice()
    } else {
        file
    };
    let mut lines = file.split(|byte| matches!(byte, b'\n' | b'\r'));
    while let Some(line) = lines.next() {
        let line = trim_line_start(line);
        for Form { begin, with, name } in &FORMS {
            let rest = line.strip_prefix(begin.as_bytes());
            if rest
                .is_some_and(|rest| contains_word(rest.get(..80).unwrap_or(rest), with.as_bytes()))
                && is_followed_by_key(&mut lines.clone(), name)
            {
                return Some(name);
            }
        }
        let begins = MINISIGN.iter().any(|mark| line.starts_with(mark.as_bytes()));
        if begins && base64_length(line) == MINISIGN_LENGTH {
            return Some("minisign");
        }
    }
    None
}

/// A line without a byte order mark and indentation.
fn trim_line_start(line: &[u8]) -> &[u8] {
    let line = line.strip_prefix(&[0xef, 0xbb, 0xbf]).unwrap_or(line);
    let line =
        line.strip_prefix(&[0xff, 0xfe]).or(line.strip_prefix(&[0xfe, 0xff])).unwrap_or(line);
    line.trim_ascii_start()
}

fn contains_word(line: &[u8], word: &[u8]) -> bool {
    word.is_empty() || line.windows(word.len()).any(|window| window == word)
}

/// Whether the lines after the first one belong to a key: a header ("Proc-Type:", "Encryption:") or
/// base64. Formats with an unambiguous first line need no further check.
fn is_followed_by_key(lines: &mut dyn Iterator<Item = &[u8]>, name: &str) -> bool {
    if matches!(name, "SSH 1" | "age") {
        return true;
    }
    let Some(next) = lines.map(trim_line_start).find(|line| !line.is_empty()) else { return false };
    let header = next.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'-').count();
    base64_length(next) >= 16 || next.get(header..).is_some_and(|rest| rest.starts_with(b":"))
}

/// The length of a line that is base64 and nothing else; else 0.
fn base64_length(line: &[u8]) -> usize {
    let line = line.trim_ascii_end();
    let is = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    if line.iter().all(is) { line.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_found_wherever_it_stands() {
        let body = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW";
        let minisign = format!("RWQAAEIy{}", "A".repeat(MINISIGN_LENGTH - 8));
        let texts = [
            format!(
                "-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----\n"
            ),
            format!("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n{body}\n"),
            format!("-----BEGIN PRIVATE KEY-----\n{body}\n"),
            format!("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{body}\n"),
            format!("---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\nComment: \"me\"\n{body}\n"),
            "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\n".to_owned(),
            "SSH PRIVATE KEY FILE FORMAT 1.1\n".to_owned(),
            "# created: today\nAGE-SECRET-KEY-1QQQQ\n".to_owned(),
            format!("untrusted comment: minisign secret key\n{minisign}\n"),
        ];
        for text in &texts {
            assert!(find_secret(text.as_bytes()).is_some(), "{text}");
            assert!(find_secret(text.replace('\n', "\r\n").as_bytes()).is_some(), "CRLF: {text}");
            assert!(
                find_secret(format!("ssh-ed25519 AAAA me\n  {text}").as_bytes()).is_some(),
                "{text}"
            );
            assert!(find_secret(format!("\u{feff}{text}").as_bytes()).is_some(), "BOM: {text}");
            let wide: Vec<u8> = [0xfeff]
                .into_iter()
                .chain(text.encode_utf16())
                .flat_map(u16::to_le_bytes)
                .collect();
            assert!(find_secret(&wide).is_some(), "UTF-16: {text}");
        }
    }

    #[test]
    fn what_only_names_a_mark_is_no_key() {
        let public =
            format!("untrusted comment: minisign public key\nRWQAAEIy{}\n", "A".repeat(48));
        for text in [
            "grep -q '-----BEGIN OPENSSH PRIVATE KEY-----' \"$1\"\n",
            "-----BEGIN OPENSSH PRIVATE KEY-----\0-----END OPENSSH PRIVATE KEY-----\0",
            "-----BEGIN PRIVATE KEY-----\nis how such a file begins.\n",
            "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIU\n",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me\n",
            public.as_str(),
            "",
        ] {
            assert_eq!(find_secret(text.as_bytes()), None, "{text:?}");
        }
    }
}
