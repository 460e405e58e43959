//! Validates SSH public keys from all sources: the product's `authorized-keys`, the developers'
//! keys in the key directory, `flash --ssh-key`, and overlays. Keys that sshd would not accept are
//! rejected here, where the user sees the reason; a secret key anywhere in a file is rejected.
//! Pure.
//!
//! F: sshd(8), "AUTHORIZED_KEYS FILE FORMAT"; RFC 4253, section 6.6; RFC 5656, section 3.1; RFC 8709, section 4;
//! PROTOCOL.u2f of OpenSSH.

use bundle::keys::decode_base64;
use camino::Utf8Path;

use crate::secret;

/// Why a file is not a list of public keys. Does not contain any of its content, which may be
/// secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKeysError {
    /// The line, from 1; `None` for the file as a whole.
    pub line: Option<usize>,
    /// What was expected and what was found.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl PublicKeysError {
    fn for_file(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { line: None, message: message.into(), help: help.into() }
    }

    /// The reason as an error about this file.
    pub fn into_error(self, path: &Utf8Path) -> anyhow::Error {
        let line = self.line.map_or(String::new(), |line| format!(":{line}"));
        anyhow::anyhow!("{path}{line}: {}\nhelp: {}", self.message, self.help)
    }
}

/// A public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshPublicKey {
    /// The line for sshd, without its end.
    pub text: String,
    /// Whether options precede the key.
    pub has_options: bool,
}

/// The longest line that sshd reads (sshd(8): "up to 8 kilobytes").
const LONGEST_LINE: usize = 8192;
/// The smallest RSA key that sshd accepts (sshd_config(5), `RequiredRSASize`).
const SMALLEST_RSA_BITS: usize = 1024;

/// The help for common errors.
const HELP: &str = "one line for each key, as in a .pub file of ssh-keygen";
const SECRET_HELP: &str =
    "use the public key: the .pub file beside it, or the output of `ssh-keygen -y -f FILE`";

/// Options without a value, and with one, in lower case: sshd ignores their case, and rejects a key
/// after an unknown option.
const FLAGS: [&str; 14] = [
    "agent-forwarding",
    "cert-authority",
    "no-agent-forwarding",
    "no-port-forwarding",
    "no-pty",
    "no-touch-required",
    "no-user-rc",
    "no-x11-forwarding",
    "port-forwarding",
    "pty",
    "restrict",
    "user-rc",
    "verify-required",
    "x11-forwarding",
];
const VALUES: [&str; 8] = [
    "command",
    "environment",
    "expiry-time",
    "from",
    "permitlisten",
    "permitopen",
    "principals",
    "tunnel",
];

/// The keys of a file, with any line endings. Comments and empty lines are ignored.
///
/// # Errors
/// When it contains a secret key, another format of keys, something else, or no key.
pub fn parse_keys(file: &[u8]) -> Result<Vec<SshPublicKey>, PublicKeysError> {
    if let Some(kind) = secret::find_secret(file) {
        return Err(PublicKeysError::for_file(
            format!("the file is a secret key ({kind})"),
            SECRET_HELP,
        ));
    }
    let Ok(text) = std::str::from_utf8(file) else {
        let help = "save the file as UTF-8 or ASCII; PowerShell's `>` writes UTF-16";
        return Err(PublicKeysError::for_file("the file is not a UTF-8 text", help));
    };
    // Editors on Windows put a byte order mark before the first line, which would become part of
    // it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(bad) = other_form(text) {
        return Err(bad);
    }
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let has_options = check_line(line).map_err(|(message, help)| PublicKeysError {
            line: Some(number),
            message,
            help: help.to_owned(),
        })?;
        keys.push(SshPublicKey { text: line.to_owned(), has_options });
    }
    if keys.is_empty() {
        Err(PublicKeysError::for_file("the file contains no SSH key", HELP))
    } else {
        Ok(keys)
    }
}

/// The keys as text for sshd: one line for each, all terminated.
///
/// # Errors
/// As [`parse_keys`].
pub fn keys_as_lines(file: &[u8]) -> Result<String, PublicKeysError> {
    Ok(parse_keys(file)?.into_iter().map(|key| key.text + "\n").collect())
}

/// Whether a file with that path on a robot contains such keys for sshd.
pub fn is_list(target: &Utf8Path) -> bool {
    let dir = target.parent().unwrap_or(Utf8Path::new(""));
    let name = target.file_name().unwrap_or_default();
    dir == "etc/ssh/authorized_keys.d"
        || (dir.file_name() == Some(".ssh")
            && matches!(name, "authorized_keys" | "authorized_keys2"))
}

/// Public keys in the formats of other programs, which sshd does not support here.
fn other_form(text: &str) -> Option<PublicKeysError> {
    let begins = |mark: &str| text.lines().any(|line| line.trim_start().starts_with(mark));
    // RFC 4716, section 3.2; what PuTTYgen's "Save public key" writes.
    let (form, flag) = if begins("---- BEGIN SSH2 PUBLIC KEY") {
        ("of RFC 4716 (PuTTY's)", "")
    } else if begins("-----BEGIN RSA PUBLIC KEY") {
        ("of PKCS #1", " -m PEM")
    } else if begins("-----BEGIN PUBLIC KEY") {
        ("of PKCS #8", " -m PKCS8")
    } else if begins("-----BEGIN ") {
        return Some(PublicKeysError::for_file("the file is a PEM file, not an SSH key", HELP));
    } else {
        return None;
    };
    let help = format!("convert the key with `ssh-keygen -i{flag} -f FILE`");
    Some(PublicKeysError::for_file(format!("the file is a public key in the format {form}"), help))
}

/// Whether options precede the key in a line.
fn check_line(line: &str) -> Result<bool, (String, &'static str)> {
    let wrong = |message: &str, help: &'static str| Err((message.to_owned(), help));
    if line.len() > LONGEST_LINE {
        return wrong(
            &format!("the line has {} bytes, but sshd reads only {LONGEST_LINE}", line.len()),
            HELP,
        );
    }
    if line.contains(|c: char| c.is_control() && c != '\t') {
        return wrong("the line contains control characters", HELP);
    }
    let blank = [' ', '\t'];
    let first = line.split(blank).next().unwrap_or_default();
    let (key, has_options) = match Kind::from_name(first) {
        Some(_) => (line, false),
        None => match skip_options(line) {
            Ok(rest) => (rest, true),
            Err(message) => return Err((message, HELP)),
        },
    };
    let mut words = key.split(blank).filter(|word| !word.is_empty());
    let name = words.next().unwrap_or_default();
    let Some(kind) = Kind::from_name(name) else {
        return wrong("expected an SSH public key, found something else", HELP);
    };
    match kind {
        Kind::Dss => {
            return wrong(
                "the key is a DSA key, which sshd no longer accepts",
                "create a key with `ssh-keygen -t ed25519`",
            );
        }
        Kind::Certificate => {
            let help = "use the key that was signed, or the authority's key with the option \
             cert-authority";
            return wrong("the key is a certificate, which sshd does not support here", help);
        }
        _ => {}
    }
    let again = "copy the whole line of the .pub file again";
    let Some(blob) = words.next().and_then(decode_base64) else {
        return wrong("the key is not valid base64: it is damaged or truncated", again);
    };
    match kind.matches_blob(name, &blob) {
        Some(true) => Ok(has_options),
        Some(false) => wrong(
            &format!(
                "the RSA key has less than {SMALLEST_RSA_BITS} bits, which sshd does not accept"
            ),
            "create a key with `ssh-keygen -t ed25519`",
        ),
        None => {
            wrong(&format!("the key is not a valid {name} key: it is damaged or truncated"), again)
        }
    }
}

/// The text after the options at the beginning of a line.
fn skip_options(line: &str) -> Result<&str, String> {
    // Like sshd (auth2-pubkeyfile.c): up to the first blank outside of quotes.
    let (mut quoted, mut escaped) = (false, false);
    let mut end = None;
    let mut starts = vec![0];
    for (at, c) in line.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted && line[at + 1..].starts_with('"') => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted => starts.push(at + 1),
            ' ' | '\t' if !quoted => {
                end = Some(at);
                break;
            }
            _ => {}
        }
    }
    if quoted {
        return Err("a quote is not closed in the options before the key".to_owned());
    }
    let nothing = || "expected an SSH public key, found something else".to_owned();
    let end = end.ok_or_else(nothing)?;
    let rest = line[end..].trim_start();
    if Kind::from_name(rest.split([' ', '\t']).next().unwrap_or_default()).is_none() {
        return Err(nothing());
    }
    for (n, start) in starts.iter().enumerate() {
        let stop = starts.get(n + 1).map_or(end, |next| next - 1);
        let option = &line[*start..stop];
        let known = match option.split_once('=') {
            Some((name, value)) => {
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
                VALUES.contains(&name.to_ascii_lowercase().as_str()) && value.is_some()
            }
            None => FLAGS.contains(&option.to_ascii_lowercase().as_str()),
        };
        if !known {
            return Err(format!(
                "sshd does not support the option {} before the key, so it would reject the key",
                n + 1
            ));
        }
    }
    Ok(rest)
}

/// Types of keys, by the format of their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    Ed25519,
    /// The curve's name, and the length of an uncompressed point in bytes.
    Ecdsa(&'static str, usize),
    SkEd25519,
    SkEcdsa,
    Dss,
    Certificate,
}

impl Kind {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "ssh-rsa" => Self::Rsa,
            "ssh-ed25519" => Self::Ed25519,
            "ecdsa-sha2-nistp256" => Self::Ecdsa("nistp256", 65),
            "ecdsa-sha2-nistp384" => Self::Ecdsa("nistp384", 97),
            "ecdsa-sha2-nistp521" => Self::Ecdsa("nistp521", 133),
            "sk-ssh-ed25519@openssh.com" => Self::SkEd25519,
            "sk-ecdsa-sha2-nistp256@openssh.com" => Self::SkEcdsa,
            "ssh-dss" => Self::Dss,
            _ if name.ends_with("-cert-v01@openssh.com") => Self::Certificate,
            _ => return None,
        })
    }

    /// Whether the bytes are a complete key of this type; false for a key that is too weak.
    fn matches_blob(self, name: &str, blob: &[u8]) -> Option<bool> {
        let mut blob = Blob(blob);
        (blob.next()? == name.as_bytes()).then_some(())?;
        let mut strong = true;
        match self {
            Self::Rsa => {
                let (exponent, modulus) = (blob.next()?, blob.next()?);
                (!exponent.is_empty()).then_some(())?;
                strong = bit_length(modulus) >= SMALLEST_RSA_BITS;
            }
            Self::Ed25519 => (blob.next()?.len() == 32).then_some(())?,
            Self::Ecdsa(curve, length) => blob.point(curve, length)?,
            Self::SkEd25519 => {
                (blob.next()?.len() == 32).then_some(())?;
                blob.next()?;
            }
            Self::SkEcdsa => {
                blob.point("nistp256", 65)?;
                blob.next()?;
            }
            Self::Dss | Self::Certificate => return None,
        }
        blob.0.is_empty().then_some(strong)
    }
}

/// Fields of RFC 4251, section 5: 32 bits of length, big-endian, and as many bytes.
struct Blob<'a>(&'a [u8]);

impl<'a> Blob<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let field = rest.get(..length)?;
        self.0 = &rest[length..];
        Some(field)
    }

    fn point(&mut self, curve: &str, length: usize) -> Option<()> {
        (self.next()? == curve.as_bytes()).then_some(())?;
        let point = self.next()?;
        // SEC 1, section 2.3.3: 4 means an uncompressed point, the only form that OpenSSH accepts.
        (point.len() == length && point.first() == Some(&4)).then_some(())
    }
}

/// The number of bits of a big-endian number.
fn bit_length(number: &[u8]) -> usize {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let first = number.get(zeros).map_or(0, |byte| byte.leading_zeros() as usize);
    (number.len() - zeros) * 8 - first
}
