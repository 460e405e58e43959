//! The cache that a team shares: finished stages and downloads, in a store that several machines read and
//! some write. What is wrong there is a warning, and the build goes on with what this machine has.

pub mod record;

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bundle::{KeySet, Kind};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::artifact::{Artifact, hash_file, hex};
use crate::cache::{self, Cache, Made, RemoteDownloads, RemoteStages};
use crate::keys::{self, Keys, Signer};
use crate::progress::{Step, Unit, bytes, say, warn};
use crate::store::client::Patience;
use crate::store::{BadObject, Files, Options, Secret, open_files};
use record::{Compression, Packed, Portable, Record, StoredFile};

/// The address of the shared cache.
const ADDRESS: &str = "SLIPWAY_SHARED_CACHE";
/// Whether it is also written.
const WRITE: &str = "SLIPWAY_SHARED_CACHE_WRITE";
/// What an HTTP server wants as the header `Authorization`.
const AUTHORIZATION: &str = "SLIPWAY_SHARED_CACHE_AUTHORIZATION";

/// The stages that are shared: slow ones, whose files hold nothing of whoever builds. `compose` and what
/// comes after it are quick, change with each commit, and hold signatures, passwords and SSH keys.
pub const STAGES: [&str; 4] = ["root", "base", "api", "agent"];

/// A cache is there to save time: one attempt, and no long waits.
const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(5),
    answer: Duration::from_secs(15),
    attempts: 1,
    rate: 256 << 10,
};
/// Objects that are fetched at a time.
const CONNECTIONS: usize = 4;
/// zstd's level: its speed is above that of most networks.
const LEVEL: i32 = 3;
/// A packed file is at most so many percent of the file, else it is stored as it is.
const PAYS: u64 = 95;
/// The largest download of which the size is not known: 4 GiB.
const UNKNOWN_LIMIT: u64 = 4 << 30;

/// A store as the cache of a team. It is left alone once it has failed.
pub struct Remote {
    files: Box<dyn Files + Send + Sync>,
    /// Reading has failed.
    down: AtomicBool,
    /// It may be written, and writing has not failed.
    writes: AtomicBool,
    /// Objects there that are not what they should be: a writer replaces them.
    bad: Mutex<BTreeSet<String>>,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("name", &self.files.name()).finish_non_exhaustive()
    }
}

impl Remote {
    /// Takes a store; nothing is asked yet.
    pub fn new(files: Box<dyn Files + Send + Sync>, writes: bool) -> Self {
        let (down, writes) = (AtomicBool::new(false), AtomicBool::new(writes));
        Self { files, down, writes, bad: Mutex::default() }
    }

    /// Opens the one that the environment names, if it names one.
    ///
    /// # Errors
    /// When what it names is no address, or it lacks credentials.
    pub fn from_environment() -> Result<Option<Self>> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(address) = variable(ADDRESS) else { return Ok(None) };
        let writes = match variable(WRITE).as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => {
                bail!("{WRITE} is `{other}`, expected 1 or 0\nhelp: 1 lets this machine write")
            }
        };
        let authorization = variable(AUTHORIZATION).map(Secret::new);
        Self::open(&address, authorization, writes).map(Some)
    }

    /// Opens one by its address.
    ///
    /// # Errors
    /// When it is none, or there are no credentials.
    pub fn open(address: &str, authorization: Option<Secret>, writes: bool) -> Result<Self> {
        let options = Options { patience: PATIENCE, authorization, ..Options::default() };
        let files =
            open_files(address, &options).with_context(|| format!("opening the {ADDRESS}"))?;
        Ok(Self::new(files, writes))
    }

    fn bad(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it takes what this build makes.
    fn writes(&self) -> bool {
        self.writes.load(Ordering::Relaxed) && !self.down.load(Ordering::Relaxed)
    }

    /// Asks, unless it has failed before. Its first failure is told, and is its last.
    fn ask<T>(&self, with: impl FnOnce(&dyn Files) -> Result<T>) -> Option<T> {
        if self.down.load(Ordering::Relaxed) {
            return None;
        }
        let error = match with(self.files.as_ref()) {
            Ok(answer) => return Some(answer),
            Err(error) => error,
        };
        match error.downcast_ref::<BadObject>() {
            // Nothing wrong: it was never stored, or has expired.
            Some(BadObject::Missing(_)) => {}
            Some(BadObject::Damaged(_)) => {
                warn(format!("an object of the shared cache is not used: {error:#}"));
            }
            None if self.down.swap(true, Ordering::Relaxed) => {}
            None => warn(format!("going on without the shared cache: {error:#}")),
        }
        None
    }

    /// Writes, while that works. The first failure is told, and is the last.
    fn tell<T>(&self, with: impl FnOnce(&dyn Files) -> Result<T>) -> Option<T> {
        if !self.writes() {
            return None;
        }
        with(self.files.as_ref())
            .inspect_err(|error| {
                if self.writes.swap(false, Ordering::Relaxed) {
                    warn(format!("nothing more goes to the shared cache: {error:#}"));
                }
            })
            .ok()
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> bool {
        let got = self.ask(|files| files.get(sha256, limit, into, received)).is_some();
        if !got {
            // What is down is not written either, so only what is bad there is stored anew.
            self.bad().insert(sha256.to_owned());
        }
        got
    }
}

impl RemoteDownloads for Remote {
    fn download(
        &self,
        sha256: &str,
        size: Option<u64>,
        into: &Utf8Path,
        received: &dyn Fn(u64),
    ) -> bool {
        self.get(sha256, size.unwrap_or(UNKNOWN_LIMIT), into, received)
    }

    fn offer(&self, what: &str, downloads: &[Artifact]) {
        let named: Vec<(String, u64)> =
            downloads.iter().map(|artifact| (artifact.sha256.clone(), artifact.size)).collect();
        let Some(present) = self.tell(|files| files.present(&named)) else { return };
        let lacking: Vec<&Artifact> = downloads
            .iter()
            .filter(|a| !present.contains(&a.sha256) || self.bad().contains(&a.sha256))
            .collect();
        if lacking.is_empty() {
            return;
        }
        let total = lacking.iter().map(|artifact| artifact.size).sum();
        let step = Step::new("shared", format!("storing {what}"), total, Unit::Bytes);
        for artifact in &lacking {
            if self.tell(|files| files.put(&artifact.sha256, &artifact.path)).is_none() {
                return;
            }
            self.bad().remove(&artifact.sha256);
            step.advance(artifact.size);
        }
        drop(step);
        say("shared", format!("{what} stored: {} in {} objects", bytes(total), lacking.len()));
    }
}

/// A shared cache, with who may say what a stage has made.
#[derive(Debug)]
pub struct Shared {
    remote: Arc<Remote>,
    keys: KeySet,
    signer: Signer,
}

/// Lets a build use the shared cache that the environment names, with the keys that count for a product
/// of this kind. Without one only the keys matter: what once came from a shared cache counts no longer
/// than the key that has signed it.
///
/// # Errors
/// When the environment names something else than a shared cache, or a key cannot be read.
pub fn attach(cache: Cache, kind: Kind, signer: &Signer, offline: bool) -> Result<Cache> {
    let keys = trusted(&keys::directory()?, kind)?;
    let remote = match Remote::from_environment()? {
        Some(remote) if offline => {
            say("shared", format!("{} is not asked, because of --offline", remote.files.name()));
            None
        }
        Some(remote) => {
            let how = if remote.writes() { "read and written" } else { "read" };
            say("shared", format!("{} is {how}", remote.files.name()));
            Some(remote)
        }
        None => None,
    };
    let shared = remote.map(|remote| {
        let shared = Shared::new(Arc::new(remote), keys.clone(), signer.clone());
        Arc::new(shared) as Arc<dyn RemoteStages>
    });
    Ok(cache.sharing(shared, &keys))
}

/// Whose records count: for a release only release keys of the key set, else the whole set, and the keys
/// that the key directory lists for nothing but this.
///
/// # Errors
/// When the key directory cannot be read.
pub fn trusted(dir: &Utf8Path, kind: Kind) -> Result<KeySet> {
    let mut set = Keys::open(dir)?.set_for(kind);
    if kind == Kind::Development {
        for key in keys::cache_signers(dir)? {
            // A key that the set knows keeps what the set says of it: it may be revoked.
            if set.keys.iter().all(|known| known.id != key.id) {
                set.keys.push(key);
            }
        }
    }
    Ok(set)
}

impl Shared {
    /// Takes a store, and who counts.
    pub fn new(remote: Arc<Remote>, keys: KeySet, signer: Signer) -> Self {
        Self { remote, keys, signer }
    }
}

impl RemoteStages for Shared {
    fn downloads(&self) -> Arc<dyn RemoteDownloads> {
        Arc::clone(&self.remote) as Arc<dyn RemoteDownloads>
    }

    fn take(&self, stage: &str, key: &str, dir: &Utf8Path) -> Option<(Value, String)> {
        if !STAGES.contains(&stage) {
            return None;
        }
        let mut ids: Vec<_> = self.keys.keys.iter().filter(|key| !key.revoked).collect();
        ids.sort_by_key(|key| std::cmp::Reverse(key.epoch));
        for signer in ids {
            let path = record::path(key, &signer.id);
            let Some(file) = self.remote.ask(|files| files.read(&path))? else { continue };
            let opened = Record::open(&file, &self.keys, stage, key);
            let fetched = opened.and_then(|(record, signed)| {
                self.fetch(&record, dir)?;
                Ok((record.value_in(dir)?, signed.id))
            });
            match fetched {
                Ok(taken) => return Some(taken),
                Err(error) => {
                    warn(format!(
                        "{stage} is not taken from the shared cache: reading {path}: {error:#}"
                    ));
                    cache::clear(dir).ok()?;
                }
            }
        }
        None
    }

    fn give(&self, cache: &Utf8Path, made: &Made<'_>) {
        if !STAGES.contains(&made.stage) || !self.remote.writes() {
            return;
        }
        if let Err(error) = self.store(cache, made) {
            warn(format!("{} is not stored in the shared cache: {error:#}", made.stage));
        }
    }
}

impl Shared {
    fn fetch(&self, record: &Record, dir: &Utf8Path) -> Result<()> {
        let total = record.files.iter().map(|file| file.object.size).sum();
        let step = Step::new(&record.stage, "from the shared cache", total, Unit::Bytes);
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let error = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS.min(record.files.len()) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(file) = record.files.get(index) else { break };
                        if let Err(why) = self.fetch_file(file, index, dir, &step) {
                            failed.store(true, Ordering::Relaxed);
                            let mut first = error.lock().unwrap_or_else(PoisonError::into_inner);
                            first.get_or_insert(why.context(format!("fetching {}", file.path)));
                        }
                    }
                });
            }
        });
        match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn fetch_file(
        &self,
        file: &StoredFile,
        index: usize,
        dir: &Utf8Path,
        step: &Step,
    ) -> Result<()> {
        // No path of a record begins with a dot.
        let packed = dir.join(format!(".{index}.object.partial"));
        let Packed { sha256, size, compression } = &file.object;
        ensure!(
            self.remote.get(sha256, *size, &packed, &|n| step.advance(n)),
            "the object {sha256} cannot be had"
        );
        let plain = match compression {
            Compression::None => packed,
            Compression::Zstd => {
                let plain = dir.join(format!(".{index}.partial"));
                unpack(&packed, &plain, file)?;
                fs::remove_file(&packed).with_context(|| format!("removing {packed}"))?;
                plain
            }
        };
        let mode = if file.executable { 0o755 } else { 0o644 };
        let target = dir.join(&file.path);
        let parent = target.parent().context("a stage's file has a folder")?;
        fs::create_dir_all(parent)
            .and_then(|()| fs::set_permissions(&plain, Permissions::from_mode(mode)))
            .and_then(|()| File::open(&plain)?.sync_all())
            .and_then(|()| fs::rename(&plain, &target))
            .with_context(|| format!("writing {target}"))
    }

    fn store(&self, cache: &Utf8Path, made: &Made<'_>) -> Result<()> {
        let &Made { stage, key, dir, .. } = made;
        let path = record::path(key, &self.signer.key().id);
        let Some(there) = self.remote.ask(|files| files.read(&path)) else { return Ok(()) };
        if let Some(file) = there
            && let Ok((record, _)) = Record::open(&file, &self.keys, stage, key)
        {
            let objects: BTreeSet<(String, u64)> =
                record.files.into_iter().map(|f| (f.object.sha256, f.object.size)).collect();
            let objects: Vec<_> = objects.into_iter().collect();
            let Some(present) = self.remote.tell(|files| files.present(&objects)) else {
                return Ok(());
            };
            let bad = self.remote.bad();
            if objects.iter().all(|(sha256, _)| present.contains(sha256) && !bad.contains(sha256)) {
                return Ok(());
            }
        }
        let mut portable = Portable::of(made.value.clone(), dir, cache)?;
        for output in &made.outputs {
            let inside = output.strip_prefix(dir);
            let inside = inside.with_context(|| format!("{output} is not in its own folder"))?;
            portable.files.insert(inside.to_owned());
        }
        let step = Step::new("shared", format!("storing {stage}"), 0, Unit::Bytes);
        let (mut files, mut sent, mut size) = (Vec::new(), 0, 0);
        for path in portable.files {
            step.note(path.as_str());
            let Some(stored) = self.store_file(dir, path)? else { return Ok(()) };
            let (file, new) = stored;
            if new {
                sent += 1;
                size += file.object.size;
            }
            files.push(file);
        }
        let record = Record {
            format: record::FORMAT,
            stage: stage.to_owned(),
            key: key.to_owned(),
            value: portable.value,
            paths: portable.paths,
            files,
        };
        record.value_in(dir).context("reading it as others will")?;
        let signed = record.sign(&self.signer)?;
        drop(step);
        // Last: whoever finds it finds all of its objects.
        if self.remote.tell(|files| files.write(&path, &signed)).is_some() {
            say("shared", format!("{stage} stored: {} in {sent} objects", bytes(size)));
        }
        Ok(())
    }

    /// Packs a file and stores what it became: how it was stored, and whether it had to be sent. `None`
    /// when the store does not take it.
    fn store_file(&self, dir: &Utf8Path, path: Utf8PathBuf) -> Result<Option<(StoredFile, bool)>> {
        let from = dir.join(&path);
        let metadata = fs::symlink_metadata(&from).with_context(|| format!("looking at {from}"))?;
        ensure!(metadata.is_file(), "{from} is no plain file");
        let executable = metadata.permissions().mode() & 0o111 != 0;
        let scratch = tempfile::Builder::new()
            .prefix(".packed-")
            .tempfile_in(dir)
            .with_context(|| format!("making a file in {dir}"))?;
        let packed = Utf8Path::from_path(scratch.path()).context("the cache's path")?;
        let (size, sha256) = pack(&from, scratch.as_file())?;
        let (packed_size, packed_sha256) = hash_file(packed)?;
        let pays = packed_size.saturating_mul(100) <= size.saturating_mul(PAYS) && size > 0;
        let (object, source) = if pays {
            let (sha256, size) = (packed_sha256, packed_size);
            (Packed { sha256, size, compression: Compression::Zstd }, packed)
        } else {
            let sha256 = sha256.clone();
            (Packed { sha256, size, compression: Compression::None }, from.as_path())
        };
        let named = [(object.sha256.clone(), object.size)];
        let present = self.remote.tell(|files| files.present(&named));
        let Some(present) = present else { return Ok(None) };
        let new = present.is_empty() || self.remote.bad().contains(&object.sha256);
        if new && self.remote.tell(|files| files.put(&object.sha256, source)).is_none() {
            return Ok(None);
        }
        self.remote.bad().remove(&object.sha256);
        Ok(Some((StoredFile { path, size, sha256, executable, object }, new)))
    }
}

/// Compresses a file: its own size and SHA-256.
fn pack(from: &Utf8Path, into: &File) -> Result<(u64, String)> {
    let work = || {
        let mut encoder = zstd::Encoder::new(into, LEVEL)?;
        let plain = copy(&mut File::open(from)?, &mut encoder)?;
        encoder.finish()?;
        Ok::<_, std::io::Error>(plain)
    };
    work().with_context(|| format!("packing {from}"))
}

/// Unpacks an object, never more than the record says, and checks what comes out.
fn unpack(packed: &Utf8Path, into: &Utf8Path, file: &StoredFile) -> Result<()> {
    let doing = || format!("unpacking {}", file.path);
    let work = || {
        let decoder = zstd::Decoder::new(File::open(packed)?)?;
        // One byte more is enough to know that it is wrong.
        copy(&mut decoder.take(file.size.saturating_add(1)), &mut File::create(into)?)
    };
    let (size, found) = work().with_context(doing)?;
    ensure!(
        size == file.size && found == file.sha256,
        "{}: expected {} bytes with SHA-256 {}, found at least {size} with {found}",
        doing(),
        file.size,
        file.sha256
    );
    Ok(())
}

/// Copies to the end: how many bytes, and their SHA-256.
fn copy(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<(u64, String)> {
    let (mut hasher, mut buffer, mut size) = (Sha256::new(), vec![0; 1 << 18], 0);
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok((size, hex(&hasher.finalize()))),
            n => {
                hasher.update(&buffer[..n]);
                to.write_all(&buffer[..n])?;
                size += n as u64;
            }
        }
    }
}
