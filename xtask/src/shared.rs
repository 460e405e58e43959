//! The shared cache of a team: finished stages and downloads, in a store that several machines read
//! and some write. An error there is a warning, and the build continues with the local cache.

pub mod record;

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bundle::{BuildKind, KeySet};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;

use crate::artifact::{Artifact, hash_file, hash_reader};
use crate::cache::{self, Cache, FinishedStage, RemoteDownloads, RemoteStages};
use crate::keys::{self, KeyDirectory, SigningKey};
use crate::parallel;
use crate::progress::{ProgressStep, ProgressUnit, format_bytes, say, warn};
use crate::store::client::ServerTimeouts;
use crate::store::{FileStore, ObjectError, SecretText, StoreOptions, open_files};
use crate::variable;
use record::{ObjectCompression, PackedObject, PortableValue, StageFile, StageRecord};

/// The address of the shared cache.
const ADDRESS: &str = "SLIPWAY_SHARED_CACHE";
/// Whether this machine also writes to it.
const WRITE: &str = "SLIPWAY_SHARED_CACHE_WRITE";
/// The header `Authorization` for an HTTP server.
const AUTHORIZATION: &str = "SLIPWAY_SHARED_CACHE_AUTHORIZATION";

/// The shared stages: slow stages without data of the builder. `compose` and the later stages are
/// fast, change with each commit, and contain signatures, passwords and SSH keys.
pub const STAGES: [&str; 4] = ["root", "base", "api", "agent"];

/// A cache must save time: one attempt, and no long waits.
const TIMEOUTS: ServerTimeouts = ServerTimeouts {
    connect: Duration::from_secs(5),
    answer: Duration::from_secs(15),
    attempts: 1,
    silence: Duration::from_secs(15),
    rate: 256 << 10,
};
/// How many objects are fetched in parallel.
const CONNECTIONS: usize = 4;
/// zstd's level: it is faster than most networks.
const LEVEL: i32 = 3;
/// The maximum size of a packed file in percent of the file; else the file is stored uncompressed.
const PAYS: u64 = 95;
/// The largest download of unknown size: 4 GiB.
const UNKNOWN_LIMIT: u64 = 4 << 30;

/// A store as the cache of a team. It is not used any more after a failure.
pub struct RemoteStore {
    files: Box<dyn FileStore + Send + Sync>,
    /// Whether reading has failed.
    down: AtomicBool,
    /// Whether it may be written, and writing has not failed.
    writes: AtomicBool,
    /// Damaged objects in the store: a writer replaces them.
    bad: Mutex<BTreeSet<String>>,
}

impl std::fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteStore").field("name", &self.files.name()).finish_non_exhaustive()
    }
}

impl RemoteStore {
    /// Wraps a store; does not access it.
    pub fn new(files: Box<dyn FileStore + Send + Sync>, writes: bool) -> Self {
        let (down, writes) = (AtomicBool::new(false), AtomicBool::new(writes));
        Self { files, down, writes, bad: Mutex::default() }
    }

    /// Opens the shared cache in the environment, if any.
    ///
    /// # Errors
    /// When the address is invalid, or there are no credentials.
    pub fn from_environment() -> Result<Option<Self>> {
        let Some(address) = variable::find(ADDRESS)? else { return Ok(None) };
        let writes = match variable::find(WRITE)?.as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => {
                bail!("{WRITE} is `{other}`, expected 1 or 0\nhelp: 1 allows this machine to write")
            }
        };
        let authorization = variable::find(AUTHORIZATION)?.map(SecretText::new);
        Self::open(&address, authorization, writes).map(Some)
    }

    /// Opens a shared cache by its address.
    ///
    /// # Errors
    /// When the address is invalid, or there are no credentials.
    pub fn open(address: &str, authorization: Option<SecretText>, writes: bool) -> Result<Self> {
        let options = StoreOptions { timeouts: TIMEOUTS, authorization, ..StoreOptions::default() };
        let files =
            open_files(address, &options).with_context(|| format!("opening the {ADDRESS}"))?;
        Ok(Self::new(files, writes))
    }

    fn bad(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this build writes to it.
    fn writes(&self) -> bool {
        self.writes.load(Ordering::Relaxed) && !self.down.load(Ordering::Relaxed)
    }

    /// Reads, unless it has failed before. The first failure is reported and disables it.
    fn try_read<T>(&self, with: impl FnOnce(&dyn FileStore) -> Result<T>) -> Option<T> {
        if self.down.load(Ordering::Relaxed) {
            return None;
        }
        let error = match with(self.files.as_ref()) {
            Ok(answer) => return Some(answer),
            Err(error) => error,
        };
        match error.downcast_ref::<ObjectError>() {
            // Not an error: the object was never stored, or has expired.
            Some(ObjectError::Missing(_)) => {}
            Some(ObjectError::Damaged(_)) => {
                warn(format!("ignoring an object of the shared cache: {error:#}"));
            }
            None if self.down.swap(true, Ordering::Relaxed) => {}
            None => warn(format!("continuing without the shared cache: {error:#}")),
        }
        None
    }

    /// Writes, unless it has failed before. The first failure is reported and disables writing.
    fn try_write<T>(&self, with: impl FnOnce(&dyn FileStore) -> Result<T>) -> Option<T> {
        if !self.writes() {
            return None;
        }
        with(self.files.as_ref())
            .inspect_err(|error| {
                if self.writes.swap(false, Ordering::Relaxed) {
                    warn(format!("no longer writing to the shared cache: {error:#}"));
                }
            })
            .ok()
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> bool {
        let got = self.try_read(|files| files.get(sha256, limit, into, received)).is_some();
        if !got {
            // A cache that is down is not written either, so only damaged objects are stored again.
            self.bad().insert(sha256.to_owned());
        }
        got
    }
}

impl RemoteDownloads for RemoteStore {
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
        let Some(present) = self.try_write(|files| files.present(&named)) else { return };
        let lacking: Vec<&Artifact> = downloads
            .iter()
            .filter(|a| !present.contains(&a.sha256) || self.bad().contains(&a.sha256))
            .collect();
        if lacking.is_empty() {
            return;
        }
        let total = lacking.iter().map(|artifact| artifact.size).sum();
        let step =
            ProgressStep::new("shared", format!("storing {what}"), total, ProgressUnit::Bytes);
        for artifact in &lacking {
            if self.try_write(|files| files.put(&artifact.sha256, &artifact.path)).is_none() {
                return;
            }
            self.bad().remove(&artifact.sha256);
            step.advance(artifact.size);
        }
        drop(step);
        say(
            "shared",
            format!("{what} stored: {} in {} objects", format_bytes(total), lacking.len()),
        );
    }
}

/// A shared cache, with the keys that may sign a stage's result.
#[derive(Debug)]
pub struct SharedCache {
    remote: Arc<RemoteStore>,
    keys: KeySet,
    signer: SigningKey,
}

/// Opens the shared cache in the environment for a build, with the trusted keys for a product of
/// this kind. Without a shared cache only the keys are used: a result from a shared cache is valid
/// as long as its signing key is trusted.
///
/// # Errors
/// When the address in the environment is invalid, or a key cannot be read.
pub fn attach_shared_cache(
    cache: Cache,
    kind: BuildKind,
    signer: &SigningKey,
    offline: bool,
) -> Result<Cache> {
    let keys = trusted_keys(&keys::key_directory()?, kind)?;
    let remote = match RemoteStore::from_environment()? {
        Some(remote) if offline => {
            say("shared", format!("{} is not used because of --offline", remote.files.name()));
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
        let shared = SharedCache::new(Arc::new(remote), keys.clone(), signer.clone());
        Arc::new(shared) as Arc<dyn RemoteStages>
    });
    Ok(cache.with_shared(shared, &keys))
}

/// The keys whose records are trusted: for a release only release keys of the key set, else the
/// whole set and the additional cache signers of the key directory.
///
/// # Errors
/// When the key directory cannot be read.
pub fn trusted_keys(dir: &Utf8Path, kind: BuildKind) -> Result<KeySet> {
    let mut set = KeyDirectory::open(dir)?.set_for(kind);
    if kind == BuildKind::Development {
        for key in keys::cache_signers(dir)? {
            // A key in the set keeps its state in the set: it may be revoked.
            if set.keys.iter().all(|known| known.id != key.id) {
                set.keys.push(key);
            }
        }
    }
    Ok(set)
}

impl SharedCache {
    /// Wraps a store with the trusted keys.
    pub fn new(remote: Arc<RemoteStore>, keys: KeySet, signer: SigningKey) -> Self {
        Self { remote, keys, signer }
    }
}

impl RemoteStages for SharedCache {
    fn downloads(&self) -> Arc<dyn RemoteDownloads> {
        Arc::clone(&self.remote) as Arc<dyn RemoteDownloads>
    }

    fn restore_stage(&self, stage: &str, key: &str, dir: &Utf8Path) -> Option<(Value, String)> {
        if !STAGES.contains(&stage) {
            return None;
        }
        let mut ids: Vec<_> = self.keys.keys.iter().filter(|key| !key.revoked).collect();
        ids.sort_by_key(|key| std::cmp::Reverse(key.epoch));
        for signer in ids {
            let path = record::record_path(key, &signer.id);
            let Some(file) = self.remote.try_read(|files| files.read(&path))? else { continue };
            let opened = StageRecord::open(&file, &self.keys, stage, key);
            let fetched = opened.and_then(|(record, signed)| {
                self.fetch(&record, dir)?;
                Ok((record.value_in(dir)?, signed.id))
            });
            match fetched {
                Ok(taken) => return Some(taken),
                Err(error) => {
                    warn(format!(
                        "not using {stage} from the shared cache: reading {path}: {error:#}"
                    ));
                    cache::clear_stage_dir(dir).ok()?;
                }
            }
        }
        None
    }

    fn upload_stage(&self, cache: &Utf8Path, made: &FinishedStage<'_>) {
        if !STAGES.contains(&made.stage) || !self.remote.writes() {
            return;
        }
        if let Err(error) = self.store(cache, made) {
            warn(format!("not storing {} in the shared cache: {error:#}", made.stage));
        }
    }
}

impl SharedCache {
    fn fetch(&self, record: &StageRecord, dir: &Utf8Path) -> Result<()> {
        let total = record.files.iter().map(|file| file.object.size).sum();
        let step =
            ProgressStep::new(&record.stage, "from the shared cache", total, ProgressUnit::Bytes);
        let files: Vec<_> = record.files.iter().enumerate().collect();
        parallel::map(&files, CONNECTIONS, |&(index, file)| {
            self.fetch_file(file, index, dir, &step)
                .with_context(|| format!("fetching {}", file.path))
        })?;
        Ok(())
    }

    fn fetch_file(
        &self,
        file: &StageFile,
        index: usize,
        dir: &Utf8Path,
        step: &ProgressStep,
    ) -> Result<()> {
        // Paths in a record never begin with a dot.
        let packed = dir.join(format!(".{index}.object.partial"));
        let PackedObject { sha256, size, compression } = &file.object;
        ensure!(
            self.remote.get(sha256, *size, &packed, &|n| step.advance(n)),
            "the object {sha256} is not available"
        );
        let plain = match compression {
            ObjectCompression::None => packed,
            ObjectCompression::Zstd => {
                let plain = dir.join(format!(".{index}.partial"));
                unpack_object(&packed, &plain, file)?;
                fs::remove_file(&packed).with_context(|| format!("removing {packed}"))?;
                plain
            }
        };
        let mode = if file.executable { 0o755 } else { 0o644 };
        let target = dir.join(&file.path);
        let parent = target.parent().context("a stage's file has a directory")?;
        fs::create_dir_all(parent)
            .and_then(|()| fs::set_permissions(&plain, Permissions::from_mode(mode)))
            .and_then(|()| File::open(&plain)?.sync_all())
            .and_then(|()| fs::rename(&plain, &target))
            .with_context(|| format!("writing {target}"))
    }

    fn store(&self, cache: &Utf8Path, made: &FinishedStage<'_>) -> Result<()> {
        let &FinishedStage { stage, key, dir, .. } = made;
        let path = record::record_path(key, &self.signer.key().id);
        let Some(there) = self.remote.try_read(|files| files.read(&path)) else { return Ok(()) };
        if let Some(file) = there
            && let Ok((record, _)) = StageRecord::open(&file, &self.keys, stage, key)
        {
            let objects: BTreeSet<(String, u64)> =
                record.files.into_iter().map(|f| (f.object.sha256, f.object.size)).collect();
            let objects: Vec<_> = objects.into_iter().collect();
            let Some(present) = self.remote.try_write(|files| files.present(&objects)) else {
                return Ok(());
            };
            let bad = self.remote.bad();
            if objects.iter().all(|(sha256, _)| present.contains(sha256) && !bad.contains(sha256)) {
                return Ok(());
            }
        }
        let mut portable = PortableValue::from_value(made.value.clone(), dir, cache)?;
        for output in &made.outputs {
            let inside = output.strip_prefix(dir);
            let inside = inside.with_context(|| format!("{output} is not in its own directory"))?;
            portable.files.insert(inside.to_owned());
        }
        let step = ProgressStep::new("shared", format!("storing {stage}"), 0, ProgressUnit::Bytes);
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
        let record = StageRecord {
            format: record::FORMAT,
            stage: stage.to_owned(),
            key: key.to_owned(),
            value: portable.value,
            paths: portable.paths,
            files,
        };
        record.value_in(dir).context("reading the stored result back")?;
        let signed = record.sign(&self.signer)?;
        drop(step);
        // Store the record last: its objects exist when it is found.
        if self.remote.try_write(|files| files.write(&path, &signed)).is_some() {
            say("shared", format!("{stage} stored: {} in {sent} objects", format_bytes(size)));
        }
        Ok(())
    }

    /// Packs a file and stores the result: returns how it was stored, and whether it was sent.
    /// `None` when the store does not accept it.
    fn store_file(&self, dir: &Utf8Path, path: Utf8PathBuf) -> Result<Option<(StageFile, bool)>> {
        let from = dir.join(&path);
        let metadata = fs::symlink_metadata(&from)
            .with_context(|| format!("reading the metadata of {from}"))?;
        ensure!(metadata.is_file(), "{from} is not a plain file");
        let executable = metadata.permissions().mode() & 0o111 != 0;
        let scratch = tempfile::Builder::new()
            .prefix(".packed-")
            .tempfile_in(dir)
            .with_context(|| format!("making a file in {dir}"))?;
        let packed = Utf8Path::from_path(scratch.path()).context("the cache's path")?;
        let (size, sha256) = pack_file(&from, scratch.as_file())?;
        let (packed_size, packed_sha256) = hash_file(packed)?;
        let pays = packed_size.saturating_mul(100) <= size.saturating_mul(PAYS) && size > 0;
        let (object, source) = if pays {
            let (sha256, size) = (packed_sha256, packed_size);
            (PackedObject { sha256, size, compression: ObjectCompression::Zstd }, packed)
        } else {
            let sha256 = sha256.clone();
            (PackedObject { sha256, size, compression: ObjectCompression::None }, from.as_path())
        };
        let named = [(object.sha256.clone(), object.size)];
        let present = self.remote.try_write(|files| files.present(&named));
        let Some(present) = present else { return Ok(None) };
        let new = present.is_empty() || self.remote.bad().contains(&object.sha256);
        if new && self.remote.try_write(|files| files.put(&object.sha256, source)).is_none() {
            return Ok(None);
        }
        self.remote.bad().remove(&object.sha256);
        Ok(Some((StageFile { path, size, sha256, executable, object }, new)))
    }
}

/// Compresses a file: returns its own size and SHA-256.
fn pack_file(from: &Utf8Path, into: &File) -> Result<(u64, String)> {
    let work = || {
        let mut encoder = zstd::Encoder::new(into, LEVEL)?;
        let plain =
            hash_reader(&mut File::open(from)?, |error| error, |bytes| encoder.write_all(bytes))?;
        encoder.finish()?;
        Ok::<_, std::io::Error>(plain)
    };
    work().with_context(|| format!("packing {from}"))
}

/// Unpacks an object, at most the size in the record, and verifies the result.
fn unpack_object(packed: &Utf8Path, into: &Utf8Path, file: &StageFile) -> Result<()> {
    let context = || format!("unpacking {}", file.path);
    let work = || {
        let decoder = zstd::Decoder::new(File::open(packed)?)?;
        let mut out = File::create(into)?;
        // One additional byte is enough to detect a wrong object.
        let mut decoder = decoder.take(file.size.saturating_add(1));
        hash_reader(&mut decoder, |error| error, |bytes| out.write_all(bytes))
    };
    let (size, found) = work().with_context(context)?;
    ensure!(
        size == file.size && found == file.sha256,
        "{}: expected {} bytes with SHA-256 {}, found at least {size} with {found}",
        context(),
        file.size,
        file.sha256
    );
    Ok(())
}
