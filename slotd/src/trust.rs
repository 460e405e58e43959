//! Which keys this robot trusts, and which versions it accepts: the image's key set, or a later one reached by a
//! chain of signatures from it; and the stored floor, which only ever rises.
//!
//! The state is on `data` and in raw sectors of the disk ([`crate::ratchet`]). A key set from there is valid only with
//! its signatures, which are verified at each read. Unsigned state can only reduce trust.

use std::path::Path;

use bundle::keys::SignaturePurpose;
use bundle::{BuildKind, KeySet};
use serde_json::json;

use crate::durable;
use crate::machine::{RobotContext, require_decided};
use crate::ratchet::{
    MOST_LINKS, Ratchet, RatchetContent, RatchetSectors, SignedKeySet, valid_key_ids,
};
use crate::record::{self, Floor};
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// The suffix of a key set's signature file.
pub const SIGNATURE: &str = "minisig";

/// Everything that decides whether a bundle or a key set is accepted.
#[derive(Debug)]
pub struct TrustStore {
    /// Why the image's own set cannot be read.
    broken: Option<Refusal>,
    kind: BuildKind,
    /// The effective key set, without keys that are revoked elsewhere.
    keys: KeySet,
    /// The same, without unsigned claims on `data`.
    solid: KeySet,
    /// The key set that follows from the signatures alone.
    signed: KeySet,
    /// The lowest accepted version and key epoch.
    pub floor: Floor,
    /// The same, without unsigned claims on `data`.
    confirmed: Floor,
    /// Warnings for the user, including damaged files that the next commit repairs.
    pub alarms: Vec<String>,
    image: KeySet,
    /// The content of the raw sectors, and what it should be; `None` without raw sectors.
    held: Option<RatchetContent>,
    raw: Ratchet,
    /// The state on `data`, if it can be read, and what it should be.
    found: Option<Ratchet>,
    data: Ratchet,
    /// Whether the running system is the committed one, so that its requirements are stored.
    decided: bool,
}

impl TrustStore {
    /// Reads everything. Damaged state on `data` or in the raw sectors is ignored with a warning: it never prevents
    /// updates.
    pub fn read(robot: &RobotContext<'_>) -> Self {
        let (root, about) = (robot.root, robot.about);
        let mut alarms = Vec::new();
        let (image, broken) = match read_image_key_set(root) {
            Ok(set) => (of_kind(set, about.kind), None),
            Err(refusal) => (KeySet::default(), Some(refusal)),
        };
        let held = with_ratchet_sectors(robot, false, |area| area.read()).map(|held| {
            held.unwrap_or_else(|refusal| {
                RatchetContent::unreadable(format!("the trust area: {}", refusal.message))
            })
        });
        alarms.extend(held.iter().flat_map(|held| held.damage.clone()));
        let raw = held.as_ref().and_then(|held| held.ratchet.clone()).unwrap_or_default();
        let found = read(&mut alarms, "trust.json", Ratchet::on_data(root));
        let data = found.clone().unwrap_or_default();
        let kept = read(&mut alarms, "floor.json", record::read_floor(root)).unwrap_or_default();

        // The raw sectors take precedence over `data`: only the agent writes them.
        let signed = follow_chain(image.clone(), &raw.chain, about.kind, |set| set);
        let mut chain = raw.chain.clone();
        let mut solid = raw.limit(signed.clone());
        let beside = read_data_key_set(root, &mut alarms);
        let of_data = data.chain.iter().chain(beside.signed.as_ref());
        for link in of_data {
            let next = follow_chain(solid.clone(), std::slice::from_ref(link), about.kind, |set| {
                raw.limit(set)
            });
            if next != solid {
                solid = next;
                if !chain.contains(link) {
                    chain.push(link.clone());
                }
            }
        }
        let mut keys = solid.clone();
        let unsigned = beside.set.filter(|set| set.serial > solid.serial);
        if let Some(set) = &unsigned {
            alarms.push(format!(
                "the key set {} on data has no valid signature: only its revocations apply; install it again with `slotd keys FILE`",
                set.serial
            ));
        }
        // State of an older agent without signatures, or of an agent in the other slot.
        let mut old = Ratchet::default();
        unsigned.iter().for_each(|set| old.raise_keys(&of_kind(set.clone(), about.kind)));
        for claim in [&data, &old] {
            let limited = claim.limit(keys.clone());
            if !valid_key_ids(&limited).is_empty() {
                keys = limited;
            } else if !valid_key_ids(&keys).is_empty() {
                alarms.push(
                    "the revocations on data would leave no key: they are ignored".to_owned(),
                );
            }
        }

        let decided = require_decided(robot).is_ok();
        // The new content of the raw sectors: a damaged or forged file on `data` must not reach them.
        let mut confirmed = Floor { version: raw.version.clone(), key_epoch: raw.key_epoch }
            .raised(about.minimum_version.as_ref(), about.key_epoch);
        // A trial that is not committed does not raise the floor.
        if let Some(of) = record::read_slot(root, robot.running).filter(|_| decided) {
            confirmed = confirmed.raised(Some(&of.minimum_version), of.key_epoch);
        }
        let mut floor = confirmed
            .clone()
            .raised(data.version.as_ref(), data.key_epoch)
            .raised(kept.version.as_ref(), kept.key_epoch);
        let highest = keys.keys.iter().filter(|key| !key.revoked).map(|key| key.epoch).max();
        if let Some(highest) = highest.filter(|highest| *highest < floor.key_epoch) {
            alarms.push(format!(
                "key epoch {} is required, but no key has it: {highest} is required instead",
                floor.key_epoch
            ));
            floor.key_epoch = highest;
        }
        let mut trust = Self {
            broken,
            kind: about.kind,
            keys,
            solid,
            signed,
            floor,
            confirmed,
            alarms,
            image,
            held,
            raw,
            found,
            data,
            decided,
        };
        let newest = chain.len().saturating_sub(MOST_LINKS);
        let chain = chain.split_off(newest);
        trust.raw.chain.clone_from(&chain);
        trust.data.chain = chain;
        trust
    }

    /// The accepted keys.
    ///
    /// # Errors
    /// `key-set`: the image's set cannot be read. `no-keys`: no key is accepted.
    pub fn keys(&self) -> Result<KeySet> {
        if let Some(refusal) = &self.broken {
            return Err(refusal.clone());
        }
        if valid_key_ids(&self.keys).is_empty() {
            return Err(Refusal::new(
                "no-keys",
                format!(
                    "no key of the key set is valid on a {} image: nothing can be installed",
                    self.kind
                ),
                "start the newer system with `slotd boot-other`, install a newer key set with `slotd keys FILE`, or flash an image that was built with keys",
            ));
        }
        Ok(self.keys.clone())
    }

    /// Stores the requirements of the committed system: first in the raw sectors, then on `data`. Damaged files are
    /// written again. A failure does not stop the caller: it is returned, and the next change tries again.
    #[must_use]
    pub fn store_requirements(mut self, robot: &RobotContext<'_>) -> Vec<String> {
        if !self.decided || self.broken.is_some() {
            return Vec::new();
        }
        for (ratchet, floor) in [(&mut self.raw, &self.confirmed), (&mut self.data, &self.floor)] {
            ratchet.version.clone_from(&floor.version);
            ratchet.key_epoch = floor.key_epoch;
            ratchet.raise_keys(&self.solid);
        }
        let mut failed = Vec::new();
        failed.extend(self.write_raw(robot).err().map(|refusal| refusal.message));
        failed.extend(self.write_data(robot).err().map(|refusal| refusal.message));
        failed
    }

    fn write_raw(&self, robot: &RobotContext<'_>) -> Result<()> {
        let Some(held) = &self.held else { return Ok(()) };
        if held.damage.is_empty() && held.ratchet.as_ref() == Some(&self.raw) {
            return Ok(());
        }
        let failed =
            |error: std::io::Error| Refusal::io("writing the trust area of the disk", &error);
        match with_ratchet_sectors(robot, true, |area| area.write(&self.raw)) {
            Some(written) => written?.map_err(failed),
            None => Ok(()),
        }
    }

    fn write_data(&self, robot: &RobotContext<'_>) -> Result<()> {
        let root = robot.root;
        let failed =
            |error: std::io::Error| Refusal::io("writing the trust state to /data/slotd", &error);
        if self.found.as_ref() != Some(&self.data) {
            self.data.keep_on_data(root).map_err(failed)?;
        }
        // For an older agent in the other slot, which reads only these files.
        if !matches!(record::read_floor(root), Ok(Some(kept)) if kept == self.floor) {
            record::write_floor(root, &self.floor).map_err(failed)?;
        }
        let path = root.state().join("keyset.json");
        match self.data.chain.last() {
            Some(link) => {
                for (path, text) in [(&path, &link.set), (&signature_of(&path), &link.signature)] {
                    if !matches!(durable::read(path), Ok(Some(kept)) if kept == text.as_bytes()) {
                        durable::write(path, text.as_bytes()).map_err(failed)?;
                    }
                }
                Ok(())
            }
            None if durable::read_json::<KeySet>(&path).is_err() => {
                durable::remove(&path).map_err(failed)
            }
            None => Ok(()),
        }
    }
}

/// Installs a new key set: `file`, and its signature next to it (`<file>.minisig`).
///
/// # Errors
/// `key-set`: the set is malformed, would leave no key, or needs a longer chain than can be stored. `old-key-set`:
/// its serial is not higher than that of the set it would replace. `not-trusted`, `bad-signature`, …: the
/// signature is not valid. `io`: it cannot be stored.
pub fn install_key_set(robot: &RobotContext<'_>, file: &Path) -> Result<KeySet> {
    let read = |path: &Path| -> Result<Vec<u8>> {
        let help = "copy the key set and its signature, FILE and FILE.minisig, together";
        let bytes = durable::read(path).map_err(|error| unreadable(path, error, help))?;
        bytes.ok_or_else(|| unreadable(path, "no such file", help))
    };
    let (json, name) = (read(file)?, signature_of(file));
    let signature = read(&name)?;
    let mut trust = TrustStore::read(robot);
    if let Some(refusal) = trust.broken {
        return Err(refusal);
    }
    // A new set may repair unsigned revocations on `data`. And if an image that no longer runs has revoked all keys,
    // the owner's newer set is the way back.
    let none_left = valid_key_ids(&trust.solid).is_empty();
    let current = if none_left { &trust.signed } else { &trust.solid };
    // Verified before a byte of it is parsed.
    let by =
        current.verify(SignaturePurpose::KeySet, &name.to_string_lossy(), &signature, &json)?;
    if by.epoch < trust.floor.key_epoch {
        return Err(Refusal::new(
            "not-trusted",
            format!(
                "the key set is signed by the key {} of epoch {}, but this robot requires {} or later",
                by.id, by.epoch, trust.floor.key_epoch
            ),
            "sign it with a current key of this robot's key set",
        ));
    }
    let set = parse(
        file,
        &json,
        "copy it again from the key directory of your team: `slipway keys list` or `cargo xtask keys list` names it",
    )?;
    // The newest set accepted here may have come with an image: as a file it is not known yet.
    if set.serial <= trust.solid.serial || set.serial < trust.raw.serial {
        return Err(Refusal::new(
            "old-key-set",
            format!(
                "{} has serial {}, but this robot has {}",
                file.display(),
                set.serial,
                trust.solid.serial.max(trust.raw.serial)
            ),
            "copy the newest key set from the key directory",
        ));
    }
    let counts = of_kind(set.clone(), trust.kind);
    if valid_key_ids(&counts).is_empty() {
        return Err(Refusal::new(
            "key-set",
            format!(
                "{} has no key that a {} image trusts: the key set would prevent all updates",
                file.display(),
                trust.kind
            ),
            "add a key that is not revoked",
        ));
    }
    let text = |bytes: Vec<u8>, path: &Path| {
        String::from_utf8(bytes).map_err(|_| unreadable(path, "not UTF-8", "copy the file again"))
    };
    let mut chain = trust.raw.chain.clone();
    chain.push(SignedKeySet { set: text(json, file)?, signature: text(signature, &name)? });
    let chain = chain.split_off(chain.len().saturating_sub(MOST_LINKS));
    if follow_chain(trust.image.clone(), &chain, trust.kind, |set| set).serial != set.serial {
        return Err(Refusal::new(
            "key-set",
            format!("{} is more than {MOST_LINKS} sets away from the image's", file.display()),
            "install an image with a newer key set first",
        ));
    }
    for ratchet in [&mut trust.raw, &mut trust.data] {
        ratchet.chain.clone_from(&chain);
        ratchet.serial = counts.serial;
        ratchet.counted = valid_key_ids(&counts);
    }
    trust.write_raw(robot)?;
    if let Err(refusal) = trust.write_data(robot) {
        if trust.held.is_none() {
            return Err(refusal);
        }
        // The set in the raw sectors applies.
        robot.events.add("not-recorded", json!(refusal));
    }
    Ok(counts)
}

/// Runs a function on the raw sectors; `None`: this image has none.
fn with_ratchet_sectors<T>(
    robot: &RobotContext<'_>,
    writable: bool,
    use_it: impl FnOnce(&RatchetSectors<&dyn crate::storage::Storage>) -> T,
) -> Option<Result<T>> {
    let (disk, sectors) = match robot.slots.trust_area(writable)? {
        Ok(opened) => opened,
        Err(refusal) => return Some(Err(refusal)),
    };
    Some(Ok(use_it(&RatchetSectors::new(&*disk, sectors))))
}

/// Follows a chain of key sets as far as each is signed by a key that the previous set accepts.
fn follow_chain(
    start: KeySet,
    links: &[SignedKeySet],
    kind: BuildKind,
    limit: impl Fn(KeySet) -> KeySet,
) -> KeySet {
    let mut current = start;
    for link in links {
        let by = current.verify(
            SignaturePurpose::KeySet,
            "keyset.json.minisig",
            link.signature.as_bytes(),
            link.set.as_bytes(),
        );
        let next = by.ok().and_then(|_| KeySet::parse(link.set.as_bytes()).ok());
        if let Some(next) = next.filter(|next| next.serial > current.serial) {
            let next = limit(of_kind(next, kind));
            if !valid_key_ids(&next).is_empty() {
                current = next;
            }
        }
    }
    current
}

/// A release image trusts no development key, even if a set lists one.
fn of_kind(mut set: KeySet, kind: BuildKind) -> KeySet {
    set.keys.retain(|key| kind == BuildKind::Development || key.kind == BuildKind::Release);
    set
}

/// The key set on `data` in its own file.
#[derive(Default)]
struct Beside {
    set: Option<KeySet>,
    /// With its signature, which is not verified yet.
    signed: Option<SignedKeySet>,
}

fn read_data_key_set(root: &RootDir, alarms: &mut Vec<String>) -> Beside {
    let path = root.state().join("keyset.json");
    let parsed = durable::read(&path).and_then(|bytes| {
        let Some(bytes) = bytes else { return Ok(None) };
        let set = KeySet::parse(&bytes).map_err(std::io::Error::other)?;
        Ok(Some((set, String::from_utf8(bytes).map_err(std::io::Error::other)?)))
    });
    let Some((set, text)) = read(alarms, "keyset.json", parsed) else { return Beside::default() };
    // An older agent has stored no signature.
    let signature = durable::read(&signature_of(&path)).ok().flatten();
    let signature = signature.and_then(|bytes| String::from_utf8(bytes).ok());
    let signed = signature.map(|signature| SignedKeySet { set: text, signature });
    Beside { set: Some(set), signed }
}

fn read<T>(alarms: &mut Vec<String>, name: &str, result: std::io::Result<Option<T>>) -> Option<T> {
    result.unwrap_or_else(|error| {
        alarms.push(format!(
            "{name} on data is damaged ({error}): the file is ignored, and written again at the next commit"
        ));
        None
    })
}

fn signature_of(path: &Path) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(SIGNATURE);
    name.into()
}

fn read_image_key_set(root: &RootDir) -> Result<KeySet> {
    let path = root.key_set();
    let help = "flash the image again, or find out who changed the file";
    match durable::read(&path) {
        Ok(Some(json)) => parse(&path, &json, help),
        // No keys.
        Ok(None) => Ok(KeySet::default()),
        Err(error) => Err(unreadable(&path, error, help)),
    }
}

fn parse(path: &Path, json: &[u8], help: &str) -> Result<KeySet> {
    KeySet::parse(json).map_err(|error| unreadable(path, error, help))
}

fn unreadable(path: &Path, error: impl std::fmt::Display, help: &str) -> Refusal {
    Refusal::new("key-set", format!("reading {}: {error}", path.display()), help)
}
