//! The stage cache: a slow stage is keyed by the SHA-256 of its actual inputs and its result is
//! kept.
//!
//! Each stage builds in its own directory; the stamp `stage.json` is written last, so a directory
//! without a stamp is left from an interrupted build and is cleared before the next attempt.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use bundle::KeySet;
use camino::{Utf8Path, Utf8PathBuf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::artifact::{Artifact, hex, write_atomically};
use crate::progress::warn;
use crate::variable;

/// How many results of each stage are kept; older ones are removed when a new one is created.
const KEPT_PER_STAGE: usize = 6;

/// The file that marks a stage's directory as complete.
pub(crate) const STAMP: &str = "stage.json";

/// The inputs of a stage, hashed. Each part has a name, so that two parts cannot be confused.
#[derive(Debug)]
pub struct CacheKey(Sha256);

impl CacheKey {
    /// Starts a key. `version` is raised when a change of the stage's code changes its output.
    pub fn new(stage: &str, version: u32) -> Self {
        Self(Sha256::new()).with("stage", stage).with("version", version.to_string())
    }

    /// Adds an input.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name);
        self.0.update((value.len() as u64).to_le_bytes());
        self.0.update(value);
        self
    }

    /// Adds an input that has a JSON form.
    ///
    /// # Errors
    /// When it has none.
    pub fn with_json(self, name: &str, value: &impl Serialize) -> Result<Self> {
        let json = serde_json::to_vec(value).with_context(|| format!("describing {name}"))?;
        Ok(self.with(name, json))
    }

    /// The key as text.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// Downloads that other machines have: asked before the network is, and told what came from there.
pub trait RemoteDownloads: Debug + Send + Sync {
    /// Fetches a download by its hash; `false` when it is not available here. `received` is told how many bytes more
    /// have come.
    fn download(
        &self,
        sha256: &str,
        size: Option<u64>,
        into: &Utf8Path,
        received: &dyn Fn(u64),
    ) -> bool;

    /// Stores missing downloads, if this machine writes.
    fn offer(&self, what: &str, downloads: &[Artifact]);
}

/// Finished stages of other machines, and their downloads. What is wrong there is a warning, never an error.
pub trait RemoteStages: Debug + Send + Sync {
    /// Fetches a stage's result into its directory, which is empty: its value, and the id of the key that has signed it.
    fn restore_stage(&self, stage: &str, key: &str, dir: &Utf8Path) -> Option<(Value, String)>;

    /// Stores a stage's result of the cache in this directory, if this machine writes and has not stored it before.
    fn upload_stage(&self, cache: &Utf8Path, made: &FinishedStage<'_>);

    /// The downloads.
    fn downloads(&self) -> Arc<dyn RemoteDownloads>;
}

/// A finished stage.
pub struct FinishedStage<'a> {
    /// The stage.
    pub stage: &'a str,
    /// The key of its inputs.
    pub key: &'a str,
    /// Its directory.
    pub dir: &'a Utf8Path,
    /// Its value.
    pub value: Value,
    /// Its required files.
    pub outputs: Vec<Utf8PathBuf>,
}

/// The cache's directory, and the shared cache of a team.
#[derive(Debug, Clone)]
pub struct Cache {
    /// `$SLIPWAY_CACHE`, else `$XDG_CACHE_HOME/slipway`, else `~/.cache/slipway`.
    pub root: Utf8PathBuf,
    /// Ids of the keys whose stages are trusted.
    trusted: Vec<String>,
    shared: Option<Arc<dyn RemoteStages>>,
    /// Directories of stages that were fetched in this build.
    taken: Arc<Mutex<BTreeSet<Utf8PathBuf>>>,
}

/// The origin of a stage's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageOrigin {
    /// Built now.
    Made,
    /// Found in the local cache.
    Kept,
    /// Fetched from the shared cache.
    Shared,
}

/// A stage's result.
#[derive(Debug)]
pub struct StageResult<T> {
    /// The value that the stage returned.
    pub value: T,
    /// Its origin.
    pub origin: StageOrigin,
}

#[derive(Serialize, Deserialize)]
struct Stamp<T> {
    value: T,
    seals: Vec<Seal>,
    /// Id of the key that signed it in the shared cache; `None` when it was built here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signed_by: Option<String>,
}

/// The state of an output when it was finished, to detect later changes.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Seal {
    path: Utf8PathBuf,
    size: u64,
    modified: i64,
    modified_nanoseconds: i64,
}

impl Seal {
    fn from_file(path: &Utf8Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            path: path.to_owned(),
            size: metadata.size(),
            modified: metadata.mtime(),
            modified_nanoseconds: metadata.mtime_nsec(),
        })
    }
}

impl Cache {
    /// Finds the cache's directory.
    ///
    /// # Errors
    /// When there is no home directory and no variable is set, or one is not UTF-8.
    pub fn locate() -> Result<Self> {
        let root = if let Some(root) = variable::find("SLIPWAY_CACHE")? {
            Utf8PathBuf::from(root)
        } else if let Some(caches) = variable::find("XDG_CACHE_HOME")? {
            Utf8PathBuf::from(caches).join("slipway")
        } else if let Some(home) = variable::find("HOME")? {
            Utf8PathBuf::from(home).join(".cache/slipway")
        } else {
            bail!(
                "finding the cache: HOME is not set\n\
                 help: set SLIPWAY_CACHE to a directory with 5 GiB of free space"
            )
        };
        Ok(Self::in_dir(std::path::absolute(&root)?.try_into()?))
    }

    /// A cache in this directory.
    pub fn in_dir(root: Utf8PathBuf) -> Self {
        Self { root, trusted: Vec::new(), shared: None, taken: Arc::default() }
    }

    /// The same with a shared cache, trusting stages that are signed by one of these keys.
    #[must_use]
    pub fn with_shared(mut self, shared: Option<Arc<dyn RemoteStages>>, keys: &KeySet) -> Self {
        let counting = keys.keys.iter().filter(|key| !key.revoked);
        self.trusted = counting.map(|key| key.id.clone()).collect();
        self.shared = shared;
        self
    }

    /// The shared cache, for downloads.
    pub fn remote(&self) -> Option<Arc<dyn RemoteDownloads>> {
        self.shared.as_ref().map(|shared| shared.downloads())
    }

    fn restored_dirs(&self) -> MutexGuard<'_, BTreeSet<Utf8PathBuf>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory of finished stages.
    pub fn stages(&self) -> Utf8PathBuf {
        self.root.join("stages")
    }

    fn dir(&self, stage: &str, key: &str) -> Utf8PathBuf {
        self.stages().join(stage).join(key.get(..32).unwrap_or(key))
    }

    /// Whether a result is in the local cache, or was just fetched from the shared cache.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn has<T: Serialize + DeserializeOwned>(
        &self,
        stage: &str,
        key: &str,
        outputs: impl Fn(&T) -> Vec<Utf8PathBuf>,
    ) -> Result<bool> {
        let dir = self.dir(stage, key);
        let _held = lock_stage_dir(&dir)?;
        Ok(self.read_cached::<T>(&dir).is_some()
            || self.restore_stage(stage, key, &dir, &outputs)?.is_some())
    }

    /// Returns the cached result of `stage` under `key`, or fetches it from the shared cache, or
    /// calls `build` to create it in its directory. `outputs` lists the files that must exist
    /// unchanged for a cached result to be valid.
    ///
    /// # Errors
    /// The error of `build`; nothing is kept then.
    pub fn stage<T: Serialize + DeserializeOwned>(
        &self,
        stage: &str,
        key: &str,
        outputs: impl Fn(&T) -> Vec<Utf8PathBuf>,
        build: impl FnOnce(&Utf8Path) -> Result<T>,
    ) -> Result<StageResult<T>> {
        let dir = self.dir(stage, key);
        let lock = lock_stage_dir(&dir)?;
        if let Some(stamp) = self.read_cached::<T>(&dir) {
            File::open(dir.join(STAMP))
                .and_then(|file| file.set_modified(SystemTime::now()))
                .with_context(|| format!("touching {dir}"))?;
            let taken = self.restored_dirs().contains(&dir);
            // A result that another machine has signed is never signed again.
            if stamp.signed_by.is_none() {
                drop(lock);
                self.upload_stage(stage, key, &dir, &stamp.value, &outputs);
            }
            let origin = if taken { StageOrigin::Shared } else { StageOrigin::Kept };
            return Ok(StageResult { value: stamp.value, origin });
        }
        if let Some(value) = self.restore_stage(stage, key, &dir, &outputs)? {
            return Ok(StageResult { value, origin: StageOrigin::Shared });
        }
        clear_stage_dir(&dir)?;
        let value = build(&dir)?;
        let stamp = write_stamp(stage, &dir, value, None, &outputs)?;
        self.forget_old(stage);
        drop(lock);
        self.upload_stage(stage, key, &dir, &stamp.value, &outputs);
        Ok(StageResult { value: stamp.value, origin: StageOrigin::Made })
    }

    /// The cached result in a directory, if its outputs are unchanged and its signer is still
    /// trusted.
    fn read_cached<T: DeserializeOwned>(&self, dir: &Utf8Path) -> Option<Stamp<T>> {
        let text = fs::read(dir.join(STAMP)).ok()?;
        let stamp: Stamp<T> = serde_json::from_slice(&text).ok()?;
        let unchanged =
            stamp.seals.iter().all(|seal| Seal::from_file(&seal.path).as_ref() == Some(seal));
        let counts = stamp.signed_by.as_ref().is_none_or(|id| self.trusted.contains(id));
        (unchanged && counts).then_some(stamp)
    }

    /// Fetches a result from the shared cache into its directory.
    fn restore_stage<T: Serialize + DeserializeOwned>(
        &self,
        stage: &str,
        key: &str,
        dir: &Utf8Path,
        outputs: &impl Fn(&T) -> Vec<Utf8PathBuf>,
    ) -> Result<Option<T>> {
        let Some(shared) = &self.shared else { return Ok(None) };
        clear_stage_dir(dir)?;
        let Some((value, signer)) = shared.restore_stage(stage, key, dir) else { return Ok(None) };
        let read = || -> Result<Stamp<T>> {
            let value: T =
                serde_json::from_value(value).context("reading the value of the stage")?;
            for path in outputs(&value) {
                ensure!(
                    path.starts_with(dir),
                    "the result names {path}, which is not in the stage's directory"
                );
            }
            write_stamp(stage, dir, value, Some(signer), outputs)
        };
        match read() {
            Ok(stamp) => {
                self.restored_dirs().insert(dir.to_owned());
                self.forget_old(stage);
                Ok(Some(stamp.value))
            }
            Err(error) => {
                warn(format!("not using {stage} from the shared cache: {error:#}"));
                Ok(None)
            }
        }
    }

    /// Stores a result in the shared cache.
    fn upload_stage<T: Serialize>(
        &self,
        stage: &str,
        key: &str,
        dir: &Utf8Path,
        value: &T,
        outputs: &impl Fn(&T) -> Vec<Utf8PathBuf>,
    ) {
        let Some(shared) = &self.shared else { return };
        match serde_json::to_value(value) {
            Ok(json) => {
                let made = FinishedStage { stage, key, dir, value: json, outputs: outputs(value) };
                shared.upload_stage(&self.root, &made);
            }
            Err(error) => warn(format!("{stage} cannot be stored in the shared cache: {error}")),
        }
    }

    /// Keeps the newest results of a stage only. Best effort: a failure only costs disk space.
    fn forget_old(&self, stage: &str) {
        let Ok(entries) = self.stages().join(stage).read_dir_utf8() else { return };
        let mut finished: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let modified = fs::metadata(entry.path().join(STAMP)).ok()?.modified().ok()?;
                Some((modified, entry.path().to_owned()))
            })
            .collect();
        finished.sort();
        let surplus = finished.len().saturating_sub(KEPT_PER_STAGE);
        for (_, dir) in finished.into_iter().take(surplus) {
            // The stamp is removed first, so that a partly removed directory is never treated as
            // finished.
            if fs::remove_file(dir.join(STAMP)).is_ok() {
                drop(fs::remove_dir_all(&dir));
                drop(fs::remove_file(format!("{dir}.lock")));
            }
        }
    }
}

/// Waits until no other build uses this directory: two builds that need the same stage at once
/// build it once.
fn lock_stage_dir(dir: &Utf8Path) -> Result<File> {
    fs::create_dir_all(dir.parent().context("a stage's directory has a parent")?)
        .with_context(|| format!("creating {dir}"))?;
    let path = Utf8PathBuf::from(format!("{dir}.lock"));
    let lock = File::create(&path).with_context(|| format!("creating {path}"))?;
    lock.lock().with_context(|| format!("locking {path}"))?;
    Ok(lock)
}

/// Empties a stage's directory.
pub(crate) fn clear_stage_dir(dir: &Utf8Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("clearing {dir}"))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))
}

/// Marks a stage's directory as complete.
fn write_stamp<T: Serialize>(
    stage: &str,
    dir: &Utf8Path,
    value: T,
    signed_by: Option<String>,
    outputs: &impl Fn(&T) -> Vec<Utf8PathBuf>,
) -> Result<Stamp<T>> {
    let seals = outputs(&value)
        .iter()
        .map(|path| Seal::from_file(path).with_context(|| format!("{stage} did not create {path}")))
        .collect::<Result<Vec<_>>>()?;
    let stamp = Stamp { value, seals, signed_by };
    let json = serde_json::to_vec_pretty(&stamp).context("describing a stage")?;
    write_atomically(&dir.join(STAMP), |out| Ok(out.write_all(&json)?))?;
    Ok(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().expect("a directory");
        let root = Utf8PathBuf::try_from(dir.path().to_owned()).expect("UTF-8");
        (dir, Cache::in_dir(root))
    }

    fn run(cache: &Cache, key: &str, text: &str) -> Result<StageResult<Utf8PathBuf>> {
        cache.stage(
            "test",
            key,
            |p: &Utf8PathBuf| vec![p.clone()],
            |dir| {
                let path = dir.join("out");
                fs::write(&path, text)?;
                Ok(path)
            },
        )
    }

    #[test]
    fn a_result_is_made_once_and_again_when_somebody_changed_it() {
        let (_guard, cache) = cache();
        let key = CacheKey::new("test", 1).with("a", "b").finish();
        assert_eq!(run(&cache, &key, "one").expect("made").origin, StageOrigin::Made);
        let again = run(&cache, &key, "two").expect("kept");
        assert_eq!(again.origin, StageOrigin::Kept);
        assert_eq!(fs::read_to_string(&again.value).expect("read"), "one");
        fs::write(&again.value, "spoilt by hand").expect("written");
        assert_eq!(run(&cache, &key, "three").expect("made again").origin, StageOrigin::Made);
    }

    #[test]
    fn a_failed_stage_leaves_nothing_that_counts() {
        let (_guard, cache) = cache();
        let outcome = cache.stage(
            "test",
            "k",
            |_: &u32| vec![],
            |dir| {
                fs::write(dir.join("half"), "…")?;
                anyhow::bail!("no")
            },
        );
        assert!(outcome.is_err());
        let made = cache.stage(
            "test",
            "k",
            |_: &u32| vec![],
            |dir| {
                assert!(!dir.join("half").exists(), "the remains were cleared");
                Ok(7)
            },
        );
        assert_eq!(made.expect("made").value, 7);
    }

    #[test]
    fn parts_of_a_key_cannot_run_together() {
        let one = CacheKey::new("s", 1).with("a", "bc").with("d", "").finish();
        let two = CacheKey::new("s", 1).with("a", "b").with("cd", "").finish();
        assert_ne!(one, two);
    }
}
