//! The stage cache: a slow stage is keyed by the SHA-256 of its real inputs and its result is kept.
//!
//! A stage builds inside a folder of its own; the stamp `stage.json` is written last, so a folder
//! without a stamp is the remains of an interrupted build and is cleared before the next attempt.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::artifact::{hex, write_atomically};

/// How many results of each stage are kept; older ones go when a new one is made.
const KEPT_PER_STAGE: usize = 6;

const STAMP: &str = "stage.json";

/// The inputs of a stage, hashed. Each part has a name, so that two parts cannot run together.
#[derive(Debug)]
pub struct Key(Sha256);

impl Key {
    /// Starts a key. `version` is raised when the stage's code changes what it makes.
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

/// The cache's folder.
#[derive(Debug, Clone)]
pub struct Cache {
    /// `$SLIPWAY_CACHE`, else `$XDG_CACHE_HOME/slipway`, else `~/.cache/slipway`.
    pub root: Utf8PathBuf,
}

/// A stage's result.
#[derive(Debug)]
pub struct Staged<T> {
    /// What the stage made.
    pub value: T,
    /// It was there already.
    pub cached: bool,
}

#[derive(Serialize, Deserialize)]
struct Stamp<T> {
    value: T,
    seals: Vec<Seal>,
}

/// What an output looked like when it was finished, to notice that somebody changed it.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Seal {
    path: Utf8PathBuf,
    size: u64,
    modified: i64,
    modified_nanoseconds: i64,
}

impl Seal {
    fn of(path: &Utf8Path) -> Option<Self> {
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
    /// Finds the cache's folder.
    ///
    /// # Errors
    /// When there is no home folder and none is named.
    pub fn locate() -> Result<Self> {
        let variable =
            |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty()).map(Utf8PathBuf::from);
        let root = variable("SLIPWAY_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|c| c.join("slipway")))
            .or_else(|| variable("HOME").map(|h| h.join(".cache/slipway")))
            .context(
                "looking for the cache: HOME is not set\n\
                 help: set SLIPWAY_CACHE to a folder with 5 GiB of free space",
            )?;
        Ok(Self { root: std::path::absolute(&root)?.try_into()? })
    }

    /// Where finished stages lie.
    pub fn stages(&self) -> Utf8PathBuf {
        self.root.join("stages")
    }

    fn dir(&self, stage: &str, key: &str) -> Utf8PathBuf {
        self.stages().join(stage).join(key.get(..32).unwrap_or(key))
    }

    /// Whether a result is kept, without looking at its outputs.
    pub fn has(&self, stage: &str, key: &str) -> bool {
        self.dir(stage, key).join(STAMP).is_file()
    }

    /// Returns the kept result of `stage` under `key`, or lets `build` make it in its folder.
    /// `outputs` lists the files that must still be there, unchanged, for a kept result to count.
    ///
    /// # Errors
    /// Whatever `build` returns; nothing is kept then.
    pub fn stage<T: Serialize + DeserializeOwned>(
        &self,
        stage: &str,
        key: &str,
        outputs: impl Fn(&T) -> Vec<Utf8PathBuf>,
        build: impl FnOnce(&Utf8Path) -> Result<T>,
    ) -> Result<Staged<T>> {
        let dir = self.dir(stage, key);
        fs::create_dir_all(dir.parent().context("a stage's folder has a parent")?)
            .with_context(|| format!("creating {dir}"))?;
        // Two builds that want the same stage at once: the second waits, then finds it finished.
        let lock_path = Utf8PathBuf::from(format!("{dir}.lock"));
        let lock = File::create(&lock_path).with_context(|| format!("creating {lock_path}"))?;
        lock.lock().with_context(|| format!("locking {lock_path}"))?;
        if let Some(value) = kept::<T>(&dir) {
            File::open(dir.join(STAMP))
                .and_then(|stamp| stamp.set_modified(SystemTime::now()))
                .with_context(|| format!("touching {dir}"))?;
            return Ok(Staged { value, cached: true });
        }
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("clearing {dir}"))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("creating {dir}"))?;
        let value = build(&dir)?;
        let seals = outputs(&value)
            .iter()
            .map(|path| Seal::of(path).with_context(|| format!("{stage} did not make {path}")))
            .collect::<Result<Vec<_>>>()?;
        let stamp = Stamp { value, seals };
        let json = serde_json::to_vec_pretty(&stamp).context("describing a stage")?;
        write_atomically(&dir.join(STAMP), |out| Ok(out.write_all(&json)?))?;
        self.forget_old(stage);
        Ok(Staged { value: stamp.value, cached: false })
    }

    /// Keeps the newest results of a stage only. Best effort: a failure costs disk space, no more.
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
            // The stamp goes first, so that a half-removed folder never counts as finished.
            if fs::remove_file(dir.join(STAMP)).is_ok() {
                drop(fs::remove_dir_all(&dir));
                drop(fs::remove_file(format!("{dir}.lock")));
            }
        }
    }
}

fn kept<T: DeserializeOwned>(dir: &Utf8Path) -> Option<T> {
    let text = fs::read(dir.join(STAMP)).ok()?;
    let stamp: Stamp<T> = serde_json::from_slice(&text).ok()?;
    stamp
        .seals
        .iter()
        .all(|seal| Seal::of(&seal.path).as_ref() == Some(seal))
        .then_some(stamp.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().expect("a folder");
        let root = Utf8PathBuf::try_from(dir.path().to_owned()).expect("UTF-8");
        (dir, Cache { root })
    }

    fn run(cache: &Cache, key: &str, text: &str) -> Result<Staged<Utf8PathBuf>> {
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
        let key = Key::new("test", 1).with("a", "b").finish();
        assert!(!run(&cache, &key, "one").expect("made").cached);
        let again = run(&cache, &key, "two").expect("kept");
        assert!(again.cached);
        assert_eq!(fs::read_to_string(&again.value).expect("read"), "one");
        fs::write(&again.value, "spoilt by hand").expect("written");
        assert!(!run(&cache, &key, "three").expect("made again").cached);
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
        let one = Key::new("s", 1).with("a", "bc").with("d", "").finish();
        let two = Key::new("s", 1).with("a", "b").with("cd", "").finish();
        assert_ne!(one, two);
    }
}
