//! Whom this robot trusts: the image's key set, or a later one that a trusted key has signed and that
//! was carried here as a file. Without a key nothing can be installed.

use std::io;
use std::path::Path;

use bundle::{KeySet, Kind};

use crate::durable;
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// What follows the name of a key set in that of its signature.
pub const SIGNATURE: &str = "minisig";

/// The key set that counts: of the image's and of the one on `data` that with the higher serial. A
/// release image trusts no development key, whatever the set says.
///
/// # Errors
/// `key-set`: one of the two cannot be read. `no-keys`: the set has no key that counts.
pub fn key_set(root: &Root, kind: Kind) -> Result<KeySet> {
    let mut set = image(root)?;
    if let Some(later) = kept(root)?.filter(|kept| kept.serial > set.serial) {
        set = later;
    }
    set.keys.retain(|key| kind == Kind::Development || key.kind == Kind::Release);
    if set.keys.iter().all(|key| key.revoked) {
        return Err(Refusal::new(
            "no-keys",
            format!("the key set has no key that a {kind} image trusts: nothing can be installed"),
            "flash an image that was built with keys",
        ));
    }
    Ok(set)
}

fn image(root: &Root) -> Result<KeySet> {
    let path = root.key_set();
    let help = "flash the image again, or find out who changed it";
    match durable::read(&path) {
        Ok(Some(json)) => parse(&path, &json, help),
        // No key at all.
        Ok(None) => Ok(KeySet::default()),
        Err(error) => Err(unreadable(&path, &error, help)),
    }
}

/// The set on `data`, which was verified when it was taken.
fn kept(root: &Root) -> Result<Option<KeySet>> {
    let path = root.state().join("keyset.json");
    // A set that revokes a key must not be lost by a damaged file.
    let help = "take the key set again with `slotd keys FILE`";
    match durable::read(&path) {
        Ok(json) => json.map(|json| parse(&path, &json, help)).transpose(),
        Err(error) => Err(unreadable(&path, &error, help)),
    }
}

fn parse(path: &Path, json: &[u8], help: &str) -> Result<KeySet> {
    KeySet::parse(json).map_err(|error| {
        Refusal::new("key-set", format!("reading {}: {error}", path.display()), help)
    })
}

fn unreadable(path: &Path, error: &io::Error, help: &str) -> Refusal {
    Refusal::new("key-set", format!("reading {}: {error}", path.display()), help)
}

/// Takes a new key set: `file`, and its signature beside it (`<file>.minisig`).
///
/// # Errors
/// `key-set`: it is malformed, or would leave no key. `old-key-set`: its serial is not higher than that
/// of the set it would replace. `not-trusted`, `bad-signature`, …: the signature does not count.
pub fn take(root: &Root, kind: Kind, key_epoch: u32, file: &Path) -> Result<KeySet> {
    let read = |path: &Path| -> Result<Vec<u8>> {
        let help = "carry the key set and its signature, FILE and FILE.minisig, together";
        let bytes = durable::read(path).map_err(|error| unreadable(path, &error, help))?;
        bytes.ok_or_else(|| unreadable(path, &io::Error::other("there is no such file"), help))
    };
    let json = read(file)?;
    let mut name = file.as_os_str().to_owned();
    name.push(".");
    name.push(SIGNATURE);
    let signature = read(Path::new(&name))?;
    // A damaged set on `data` is what this may repair; the image's keys then decide.
    let current = match key_set(root, kind) {
        Err(refusal) if refusal.code == "key-set" => image(root)?,
        other => other?,
    };
    // Verified before a byte of it is parsed.
    let by = current.verify(&name.to_string_lossy(), &signature, &json)?;
    if by.epoch < key_epoch || (kind == Kind::Release && by.kind == Kind::Development) {
        return Err(Refusal::new(
            "not-trusted",
            format!(
                "the key set is signed by the {} key {} of epoch {}, this robot asks for {key_epoch} or later",
                by.kind, by.id, by.epoch
            ),
            "sign it with a current key of this robot's key set",
        ));
    }
    let set = parse(file, &json, "make it again with `cargo xtask keys`")?;
    if set.serial <= current.serial {
        return Err(Refusal::new(
            "old-key-set",
            format!(
                "{} has serial {}, this robot has {}",
                file.display(),
                set.serial,
                current.serial
            ),
            "carry the newest key set of the key directory",
        ));
    }
    let counts = |key: &&bundle::TrustedKey| {
        !key.revoked && (kind == Kind::Development || key.kind == Kind::Release)
    };
    if set.keys.iter().find(counts).is_none() {
        return Err(Refusal::new(
            "key-set",
            format!(
                "{} has no key that a {kind} image trusts: it would end all updates",
                file.display()
            ),
            "add a key that is not revoked",
        ));
    }
    let path = root.state().join("keyset.json");
    durable::write(&path, &json)
        .map_err(|error| Refusal::io(format!("writing {}", path.display()), &error))?;
    Ok(set)
}
