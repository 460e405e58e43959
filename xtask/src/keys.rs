//! Creates, lists, rotates and uses signing keys. Secret keys stay in the key directory, in
//! minisign's own file format, readable by their owner only; they are never printed.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};

use anyhow::{Context, Result, bail, ensure};
use blake2::{Blake2b512, Digest};
use bundle::keys::{key_id, signature_file};

use bundle::{BuildKind, KeySet, MAX_SIGNATURES, SignatureFile, TrustedKey};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use crate::artifact;
use crate::program;
use crate::progress;
use crate::ssh_keys;
use crate::variable;

/// The environment variable with the password of release keys, for use without a terminal.
pub const PASSWORD_VARIABLE: &str = "SLIPWAY_KEY_PASSWORD";

/// The public parts of all keys, in the key directory; it is stored in images and verifies bundles.
pub const KEY_SET: &str = "keyset.json";

/// The key directory: `$SLIPWAY_KEYS`, else `$XDG_CONFIG_HOME/slipway/keys`, else
/// `~/.config/slipway/keys`.
///
/// # Errors
/// When none of the three variables is set, or one is not UTF-8.
pub fn key_directory() -> Result<Utf8PathBuf> {
    if let Some(dir) = variable::find("SLIPWAY_KEYS")? {
        return Ok(dir.into());
    }
    if let Some(dir) = variable::find("XDG_CONFIG_HOME")? {
        return Ok(Utf8PathBuf::from(dir).join("slipway/keys"));
    }
    if let Some(home) = variable::find("HOME")? {
        return Ok(Utf8PathBuf::from(home).join(".config/slipway/keys"));
    }
    bail!("finding the key directory: HOME is not set\nhelp: set SLIPWAY_KEYS to a directory")
}

/// Converts the error of a verification on this machine; the format's own hint is written for robots.
pub fn explain_bundle_error(error: bundle::Error) -> anyhow::Error {
    let hint = match &error {
        bundle::Error::NotTrusted { .. } => format!(
            "`{} keys list` shows the trusted keys; to trust others, copy the {KEY_SET} of the team that signed this to {}",
            program::name(),
            key_directory()
                .map_or_else(|_| "the key directory".to_owned(), Utf8PathBuf::into_string)
        ),
        bundle::Error::Io(cause) if cause.kind() == std::io::ErrorKind::StorageFull => format!(
            "the disk is full; free some space{}",
            if program::is_standalone() {
                ""
            } else {
                ", `cargo xtask clean --dry-run` shows what it would remove"
            }
        ),
        _ => error.hint().to_owned(),
    };
    let message = format!("{error} ({})\nhelp: {hint}", error.code());
    anyhow::Error::new(error).context(message)
}

/// The developer's SSH public keys, beside the signing keys: root of a development product accepts
/// them. The holder of the development key in the same directory can install any system on such a
/// robot anyway.
pub const AUTHORIZED_KEYS: &str = "authorized_keys";

/// The lines of [`AUTHORIZED_KEYS`] in a key directory; empty when there is no such file.
///
/// # Errors
/// When it cannot be read, or contains a line that is not a public key.
pub fn authorized_keys(dir: &Utf8Path) -> Result<String> {
    let path = dir.join(AUTHORIZED_KEYS);
    let file = artifact::none_if_missing(std::fs::read(&path))
        .with_context(|| format!("reading {path}"))?;
    match file {
        // It may be a file without keys yet.
        Some(file) if !file.trim_ascii().is_empty() => {
            ssh_keys::keys_as_lines(&file).map_err(|bad| bad.into_error(&path))
        }
        _ => Ok(String::new()),
    }
}

/// Additional keys that are trusted for stages in a shared cache only: a directory of minisign's
/// `.pub` files in the key directory.
pub const CACHE_SIGNERS: &str = "shared-cache";

/// The keys in [`CACHE_SIGNERS`]; empty when there is no such directory.
///
/// # Errors
/// When a file there is not a public key.
pub fn cache_signers(dir: &Utf8Path) -> Result<Vec<TrustedKey>> {
    let dir = dir.join(CACHE_SIGNERS);
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut keys = Vec::new();
    for entry in dir.read_dir_utf8().with_context(|| format!("reading {dir}"))? {
        let path = entry.with_context(|| format!("reading {dir}"))?.into_path();
        if path.extension() != Some("pub") {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let public = text.lines().nth(1).unwrap_or_default().trim().to_owned();
        let id = key_id(&public).with_context(|| {
            format!(
                "reading {path}\n\
             help: expected a public key of minisign, such as the files that `cargo xtask keys \
             list` names"
            )
        })?;
        keys.push(TrustedKey {
            id,
            epoch: 1,
            kind: BuildKind::Development,
            public,
            revoked: false,
        });
    }
    keys.sort_by(|a, b| a.id.cmp(&b.id));
    keys.dedup_by(|a, b| a.id == b.id);
    Ok(keys)
}

/// One line of `keys list`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ListedKey {
    /// The key in the key set.
    #[serde(flatten)]
    pub key: TrustedKey,
    /// The secret key's file, if it is here.
    pub secret: Option<Utf8PathBuf>,
    /// The public key's file, for `minisign -V -p`.
    pub public_file: Utf8PathBuf,
}

/// An opened key directory. It is locked until this value is dropped, so that two builds that both
/// need the first development key create only one.
#[derive(Debug)]
pub struct KeyDirectory {
    dir: Utf8PathBuf,
    set: KeySet,
    /// The lock, released when it is closed. `None` where this user cannot write: there is nothing
    /// to wait for.
    _lock: Option<File>,
}

impl KeyDirectory {
    /// Opens a key directory; it is created (mode 0700) when it is missing.
    ///
    /// # Errors
    /// When it cannot be created, locked or read, or its key set is damaged.
    pub fn open(dir: &Utf8Path) -> Result<Self> {
        if !dir.is_dir() {
            let create = || {
                std::fs::DirBuilder::new().recursive(true).mode(SECRET_FOLDER).create(dir)?;
                std::fs::set_permissions(dir, Permissions::from_mode(SECRET_FOLDER))
            };
            create().with_context(|| {
                format!(
                    "creating the key directory {dir}\n\
                     help: set SLIPWAY_KEYS to a writable directory, for the keys that are trusted or that sign"
                )
            })?;
        }
        let (mut options, place) = (OpenOptions::new(), dir.join(".lock"));
        let new = !place.exists();
        options.create(true).truncate(false).write(true).mode(SECRET);
        let lock = match options.open(&place) {
            Ok(lock) => {
                if new {
                    lock.set_permissions(Permissions::from_mode(SECRET))
                        .with_context(|| format!("making {place}"))?;
                }
                rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
                    .with_context(|| format!("locking {dir}/.lock"))?;
                Some(lock)
            }
            // A secret of CI is a read-only mount; another user's directory can be read without a
            // lock, since the key set is replaced by a rename. Creating a key there fails when its
            // file is written.
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::ReadOnlyFilesystem | std::io::ErrorKind::PermissionDenied
                ) =>
            {
                None
            }
            Err(error) => return Err(error).with_context(|| format!("opening {dir}/.lock")),
        };
        let path = dir.join(KEY_SET);
        let set = match std::fs::read(&path) {
            Ok(json) => KeySet::parse(&json).with_context(|| {
                format!(
                    "reading the key set {path}\n\
                     help: the file was truncated or changed; the keys beside it are unchanged. Restore it from a copy of the directory; \
                     it contains no secret. Each system has the key set of its build in /usr/lib/slipway/keyset.json, a release \
                     without the development keys. Robots take none with a lower serial than they have seen"
                )
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // A new set would begin at serial 1, and robots that know a later serial would
                // reject it as old.
                if let Some(key) = left_key(dir)? {
                    ensure!(
                        !program::is_standalone(),
                        "{dir} contains {key}, but no {KEY_SET}, which lists what each key may sign\n\
                         help: copy the {KEY_SET} of the team that signs the releases to {dir}"
                    );
                    bail!(
                        "{dir} contains {key}, but no {KEY_SET}, which lists what each key may \
                         sign\n\
                         help: restore {KEY_SET} from a copy of the directory, or set SLIPWAY_KEYS \
                         to an empty directory to start with \
                         new keys: robots that trust the old keys reject what the new ones sign"
                    );
                }
                KeySet::default()
            }
            Err(error) => return Err(error).with_context(|| format!("reading {path}")),
        };
        let mode = std::fs::metadata(dir).map_or(0, |about| about.permissions().mode());
        if mode & 0o022 != 0 {
            progress::warn(format!(
                "the key directory {dir} is writable by other users (mode {:03o}), who could \
                 change the trusted keys of robots: run chmod 700 on it",
                mode & 0o777
            ));
        }
        Ok(Self { dir: dir.to_owned(), set, _lock: lock })
    }

    /// All keys, including revoked ones.
    pub fn set(&self) -> &KeySet {
        &self.set
    }

    /// The keys that a device of this kind of product trusts: release devices trust no development
    /// key at all.
    pub fn set_for(&self, kind: BuildKind) -> KeySet {
        let trusts =
            |key: &&TrustedKey| kind == BuildKind::Development || key.kind == BuildKind::Release;
        KeySet {
            serial: self.set.serial,
            keys: self.set.keys.iter().filter(trusts).cloned().collect(),
        }
    }

    /// All keys with their files.
    pub fn list(&self) -> Vec<ListedKey> {
        let listed = |key: &TrustedKey| {
            let secret = self.file(key, "key");
            ListedKey {
                key: key.clone(),
                secret: secret.is_file().then_some(secret),
                public_file: self.file(key, "pub"),
            }
        };
        self.set.keys.iter().map(listed).collect()
    }

    /// Creates the first key of a kind.
    ///
    /// # Errors
    /// When there is one already, the password is not available, or writing fails.
    pub fn new_key(&mut self, kind: BuildKind) -> Result<TrustedKey> {
        if let Some(key) = self.current(kind) {
            bail!(
                "making a {kind} key: {} of epoch {} exists already\n\
                 help: `cargo xtask keys rotate` makes its successor",
                key.id,
                key.epoch
            );
        }
        self.make(kind)
    }

    /// Makes a key's successor with the next epoch. The old one stays trusted, so that bundles
    /// signed by it still install, unless it is to be revoked.
    ///
    /// # Errors
    /// When there is no key of this kind yet, the password is not available, or writing fails.
    pub fn rotate(&mut self, kind: BuildKind, revoke_old: bool) -> Result<TrustedKey> {
        ensure!(
            self.current(kind).is_some(),
            "rotating the {kind} key: no such key in {}\n\
             help: `cargo xtask keys new` makes the first key",
            self.dir
        );
        // One password opens all release keys of a machine: with different passwords, builds could
        // only sign with the new key, and robots that only know the old key would reject their
        // bundles.
        let current = self.current(kind).map(|key| self.file(&key, "key"));
        if kind == BuildKind::Release && current.is_some_and(|path| path.is_file()) {
            self.signer(kind).context(
                "opening the current release key: the new key must have the same password\n\
                 help: enter the current key's password; if it is lost, move the key's file away: \
                 robots that know no \
                 other key reject what is signed from then on",
            )?;
        }
        let mut set = self.set.clone();
        let new = self.make(kind)?;
        if revoke_old {
            for key in set.keys.iter_mut().filter(|key| key.kind == kind) {
                key.revoked = true;
            }
            set.keys.push(new.clone());
            self.save(set)?;
        }
        Ok(new)
    }

    /// The key that signs bundles of this kind, opened. The development key is created on first
    /// use.
    ///
    /// # Errors
    /// When there is none, its secret part is not here, or the password is wrong.
    pub fn signer(&mut self, kind: BuildKind) -> Result<SigningKey> {
        let key = match (self.current(kind), kind) {
            (Some(key), _) => key,
            (None, BuildKind::Development) => {
                let key = self.make(kind)?;
                progress::say(
                    "keys",
                    format!("made the development key {} in {}", key.id, self.dir),
                );
                key
            }
            (None, BuildKind::Release) => bail!(
                "finding the release key: no release key in {}\n\
                 help: `cargo xtask keys new` makes one; a release cannot be signed by a \
                 development key",
                self.dir
            ),
        };
        let path = self.file(&key, "key");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "reading the secret key {path}\n\
             help: copy the key to this path, or set SLIPWAY_KEYS"
            )
        })?;
        let mode = std::fs::metadata(&path).map_or(0, |about| about.permissions().mode());
        if mode & 0o077 != 0 {
            progress::warn(format!(
                "the secret key {path} is readable by other users (mode {:03o}): run chmod 600 on it",
                mode & 0o777
            ));
        }
        SigningKey::open(&text, key).with_context(|| format!("opening the secret key {path}"))
    }

    /// Revokes a key.
    ///
    /// # Errors
    /// When there is no such key, it is revoked already, or no other key of its kind would be left.
    pub fn revoke(&mut self, id: &str) -> Result<TrustedKey> {
        let mut set = self.set.clone();
        let dir = &self.dir;
        // People type what they read, and some tools show ids in lower case.
        let found =
            set.keys.iter_mut().find(|key| key.id.eq_ignore_ascii_case(id)).with_context(|| {
                format!(
                    "revoking a key: {dir} contains no key with the id `{id}`\n\
             help: `cargo xtask keys list` shows all keys"
                )
            })?;
        let id = found.id.clone();
        ensure!(!found.revoked, "revoking the key {id}: the key is already revoked");
        found.revoked = true;
        let key = found.clone();
        ensure!(
            set.keys.iter().any(|other| other.kind == key.kind && !other.revoked),
            "revoking the key {id}: without another {} key, nothing could be signed\n\
             help: `cargo xtask keys rotate{}` makes its successor first",
            key.kind,
            if key.kind == BuildKind::Development { " --development" } else { "" }
        );
        self.save(set)?;
        Ok(key)
    }

    /// The keys that sign a bundle of this kind: the newest first, then all earlier keys that are
    /// not revoked and whose secret part is here. A robot that was built before a rotation only
    /// knows the earlier keys.
    ///
    /// # Errors
    /// As [`Self::signer`]. An older key that cannot be opened is skipped with a warning.
    pub fn signers(&mut self, kind: BuildKind) -> Result<Vec<SigningKey>> {
        let mut signers = vec![self.signer(kind)?];
        let newest = signers.iter().map(|signer| signer.key().id.clone()).collect::<Vec<_>>();
        let fits =
            |key: &&TrustedKey| key.kind == kind && !key.revoked && !newest.contains(&key.id);
        let mut older: Vec<TrustedKey> = self.set.keys.iter().filter(fits).cloned().collect();
        older.sort_by_key(|key| std::cmp::Reverse(key.epoch));
        for key in older.into_iter().take(MAX_SIGNATURES - 1) {
            let (id, path) = (key.id.clone(), self.file(&key, "key"));
            let opened = std::fs::read_to_string(&path)
                .with_context(|| format!("reading {path}"))
                .and_then(|text| SigningKey::open(&text, key));
            match opened {
                Ok(signer) => signers.push(signer),
                Err(error) => progress::warn(format!(
                    "skipping the older {kind} key {id}: robots that know no newer key will reject \
                     the bundle ({error:#})"
                )),
            }
        }
        Ok(signers)
    }

    /// The newest key of a kind that is not revoked.
    fn current(&self, kind: BuildKind) -> Option<TrustedKey> {
        let fits = |key: &&TrustedKey| key.kind == kind && !key.revoked;
        self.set.keys.iter().filter(fits).max_by_key(|key| key.epoch).cloned()
    }

    fn make(&mut self, kind: BuildKind) -> Result<TrustedKey> {
        let pair = match kind {
            BuildKind::Development => minisign::KeyPair::generate_unencrypted_keypair(),
            BuildKind::Release => minisign::KeyPair::generate_encrypted_keypair(
                password_from_environment("protecting the new key")?,
            ),
        }
        .with_context(|| format!("making a {kind} key"))?;
        let public = pair.pk.to_base64();
        let epoch = self.set.keys.iter().map(|key| key.epoch).max().unwrap_or(0) + 1;
        let key = TrustedKey { id: key_id(&public)?, epoch, kind, public, revoked: false };
        let comment = format!("slipway {kind} secret key {}", key.id);
        let secret = pair.sk.to_box(Some(&comment)).context("encoding the secret key")?;
        write_with_mode(&self.file(&key, "key"), secret.into_string().as_bytes(), SECRET)?;
        let public = format!("untrusted comment: slipway {kind} key {}\n{}\n", key.id, key.public);
        write_with_mode(&self.file(&key, "pub"), public.as_bytes(), PUBLIC)?;
        // The key set is written last: a key exists only if it is listed.
        let mut set = self.set.clone();
        set.keys.push(key.clone());
        self.save(set)?;
        Ok(key)
    }

    fn save(&mut self, mut set: KeySet) -> Result<()> {
        // Robots only replace a set by one with a higher serial.
        set.serial = self.set.serial.checked_add(1).context("key-set serial number overflow")?;
        set.keys.sort_by(|a, b| (a.epoch, &a.id).cmp(&(b.epoch, &b.id)));
        set.check()?;
        let mut json = serde_json::to_vec_pretty(&set).context("encoding the key set")?;
        json.push(b'\n');
        write_with_mode(&self.dir.join(KEY_SET), &json, PUBLIC)?;
        self.set = set;
        Ok(())
    }

    fn file(&self, key: &TrustedKey, extension: &str) -> Utf8PathBuf {
        self.dir.join(format!("{}-{}-{}.{extension}", key.kind, key.epoch, key.id))
    }
}

/// Of a secret: its owner's alone.
const SECRET: u32 = 0o600;
/// Of a directory with secrets.
const SECRET_FOLDER: u32 = 0o700;
/// Of files that other users must read, such as a web server, and only their owner may change.
const PUBLIC: u32 = 0o644;

/// Writes a file with this mode, whatever the umask is. A secret has its mode from the first byte, so no other user can have
/// read it.
fn write_with_mode(path: &Utf8Path, content: &[u8], mode: u32) -> Result<()> {
    let temporary = artifact::partial_path(path);
    if temporary.exists() {
        std::fs::remove_file(&temporary).with_context(|| format!("removing {temporary}"))?;
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .with_context(|| format!("creating {temporary}"))?;
    // The umask has taken bits away, at most; of a mode without any the owner could not read his own key.
    file.set_permissions(Permissions::from_mode(mode))
        .and_then(|()| file.write_all(content))
        .and_then(|()| file.sync_all())
        .with_context(|| format!("writing {temporary}"))?;
    std::fs::rename(&temporary, path).with_context(|| format!("renaming {temporary}"))
}

/// The password from the environment; `None` lets the `minisign` crate ask for it.
fn password_from_environment(what: &str) -> Result<Option<String>> {
    match variable::find_or_empty(PASSWORD_VARIABLE).with_context(|| what.to_owned())? {
        Some(password) if password.is_empty() => {
            bail!("{what}: {PASSWORD_VARIABLE} is empty\nhelp: a release key needs a password")
        }
        Some(password) => Ok(Some(password)),
        None if std::io::stdin().is_terminal() => Ok(None),
        None => bail!(
            "{what}: cannot ask for the password (no terminal)\nhelp: set {PASSWORD_VARIABLE}"
        ),
    }
}

/// A signing key's file in a directory, if there is one.
fn left_key(dir: &Utf8Path) -> Result<Option<String>> {
    for entry in dir.read_dir_utf8().with_context(|| format!("reading {dir}"))? {
        let name = entry.with_context(|| format!("reading {dir}"))?.file_name().to_owned();
        let is_ours = ["release-", "development-"].iter().any(|start| name.starts_with(start));
        if is_ours && (name.ends_with(".key") || name.ends_with(".pub")) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// An opened signing key.
#[derive(Clone)]
pub struct SigningKey {
    key: TrustedKey,
    number: [u8; 8],
    secret: ed25519_compact::SecretKey,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.key.id).finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Opens a minisign secret key file; `key` is its entry in the key set.
    ///
    /// # Errors
    /// When it is not a secret key, not this key, or the password is wrong.
    pub fn open(text: &str, key: TrustedKey) -> Result<Self> {
        let secret = minisign::SecretKeyBox::from_string(text)?;
        let secret = match key.kind {
            BuildKind::Development => secret.into_unencrypted_secret_key()?,
            BuildKind::Release => {
                secret.into_secret_key(password_from_environment("opening the release key")?)?
            }
        };
        // minisign's layout: 54 bytes of algorithms and salt, key number, Ed25519 secret key.
        let bytes = secret.to_bytes();
        let (Some(number), Some(scalar)) = (bytes.get(54..62), bytes.get(62..126)) else {
            bail!("the secret key has {} bytes, expected at least 126", bytes.len());
        };
        let number: [u8; 8] = number.try_into()?;
        let id: String = number.iter().rev().map(|b| format!("{b:02X}")).collect();
        ensure!(id == key.id, "the file contains the key {id}, but the key set lists {}", key.id);
        let secret = ed25519_compact::SecretKey::from_slice(scalar)
            .map_err(|error| anyhow::anyhow!("reading the secret key: {error}"))?;
        Ok(Self { key, number, secret })
    }

    /// The key's entry in the key set.
    pub fn key(&self) -> &TrustedKey {
        &self.key
    }

    /// Signs, in minisign's prehashed form, and always the same way: Ed25519 as RFC 8032 defines it
    /// is deterministic, while the `minisign` crate adds random nonces.
    pub fn sign(&self, bytes: &[u8], comment: &str) -> SignatureFile {
        let signature = self.secret.sign(Blake2b512::digest(bytes), None);
        let mut commented = signature.to_vec();
        commented.extend_from_slice(comment.as_bytes());
        let global = self.secret.sign(commented, None);
        SignatureFile {
            key: self.key.id.clone(),
            text: signature_file(&self.number, &signature, comment, &global),
        }
    }
}
