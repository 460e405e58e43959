//! What is on `data` follows the system's version: forth when a new version starts for the first time, and
//! back when an older one starts again. Before each step what it changes is packed away; that is the way back.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bundle::Version;
use serde::{Deserialize, Serialize};

use super::archive;
use crate::durable;
use crate::health::program;
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// Where the steps are declared, one TOML file each; part of the image.
const FOLDER: &str = "etc/slotd/migrations.d";

/// Where the way back is unpacked.
const STAGING: &str = ".snapshot";

/// Where what is undone goes on its way out.
const UNDONE: &str = ".undone";

/// The most bytes of a way back.
const MOST: u64 = 1 << 32;

/// Seconds that a step may take when it does not say.
fn usual() -> u64 {
    60
}

/// A step: how to bring data of older versions to this one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Migration {
    /// The file's name without its ending.
    #[serde(skip)]
    pub name: String,
    /// The first version whose data look as this step leaves them.
    pub version: Version,
    /// What it changes, below `/data`. Only this is put back by a rollback.
    pub paths: Vec<PathBuf>,
    /// The program with its arguments. It may be started again after a power cut.
    pub run: Vec<String>,
    /// How long it may take.
    #[serde(default = "usual")]
    pub timeout_seconds: u64,
}

/// A step that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Taken {
    name: String,
    version: Version,
    paths: Vec<PathBuf>,
}

/// Which version's data these are. It lies among them, so that a backup knows its own version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Record {
    version: Version,
    /// The steps whose way back is kept, oldest first.
    taken: Vec<Taken>,
    /// A step that was begun; what it has changed so far is not to be trusted.
    under_way: Option<Taken>,
}

impl Record {
    fn path(root: &Root) -> PathBuf {
        root.data().join("data-version.json")
    }

    fn read(root: &Root) -> Result<Option<Self>> {
        let path = Self::path(root);
        durable::read_json(&path).map_err(failed("reading", &path))
    }

    fn write(&self, root: &Root) -> Result<()> {
        let path = Self::path(root);
        durable::write_json(&path, self).map_err(failed("writing", &path))
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "data")]
pub enum Migrated {
    /// They fit this version already.
    Unchanged,
    /// There were none of another version.
    New,
    /// These steps were taken.
    Forth {
        /// The version whose data they were.
        from: Version,
        /// Names of the steps.
        steps: Vec<String>,
    },
    /// These steps were undone.
    Back {
        /// The version whose data they were.
        from: Version,
        /// Names of the steps.
        steps: Vec<String>,
    },
}

fn failed(doing: &str, path: &Path) -> impl Fn(io::Error) -> Refusal {
    let doing = format!("{doing} {}", path.display());
    move |error| Refusal::io(&doing, &error)
}

/// The steps of this system, in the order in which they are taken.
///
/// # Errors
/// `bad-migration`: a file that cannot be understood.
pub fn migrations(root: &Root) -> Result<Vec<Migration>> {
    let folder = root.path(FOLDER);
    let listing = match fs::read_dir(&folder) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("reading", &folder)(error)),
    };
    let mut all = Vec::new();
    for entry in listing {
        let path = entry.map_err(failed("reading", &folder))?.path();
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let bad = |why: String| {
            let help = "this system cannot bring older data to its version: install another one";
            Refusal::new("bad-migration", format!("{}: {why}", path.display()), help)
        };
        let text = fs::read_to_string(&path).map_err(failed("reading", &path))?;
        let mut step: Migration = toml::from_str(&text).map_err(|e| bad(e.message().to_owned()))?;
        step.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let within = |path: &PathBuf| archive::safe(path).is_some();
        if step.run.is_empty() || step.paths.is_empty() || !step.paths.iter().all(within) {
            return Err(bad("`run` and `paths` are needed, and paths lie below /data".to_owned()));
        }
        all.push(step);
    }
    all.sort_by(|a, b| (&a.version, &a.name).cmp(&(&b.version, &b.name)));
    Ok(all)
}

/// Brings `data` to `version`, the running system's, before anything uses them.
///
/// # Errors
/// `migration-failed`: a step; what it has changed is put back, the steps before it stay, and it is tried
/// again in the next start. `newer-data`: there is no way back. `bad-migration`, `bad-archive`, `io`.
pub fn migrate(root: &Root, version: &Version) -> Result<Migrated> {
    let Some(mut record) = Record::read(root)? else {
        let new = Record { version: version.clone(), taken: Vec::new(), under_way: None };
        new.write(root)?;
        return Ok(Migrated::New);
    };
    if let Some(begun) = record.under_way.take() {
        put_back(root, &begun)?;
        record.write(root)?;
    }
    let from = record.version.clone();
    let newest = record.taken.iter().map(|step| &step.version).max().cloned();
    let ahead = newest.filter(|newest| newest > version);
    match (record.version.cmp(version), ahead) {
        (Ordering::Equal | Ordering::Less, None) => forth(root, record, version, from),
        (_, Some(_)) => back(root, record, version, from),
        // Nothing was changed on the way there.
        (Ordering::Greater, None) => {
            record.version = version.clone();
            record.write(root)?;
            Ok(Migrated::Back { from, steps: Vec::new() })
        }
    }
}

fn forth(root: &Root, mut record: Record, version: &Version, from: Version) -> Result<Migrated> {
    if record.version == *version {
        return Ok(Migrated::Unchanged);
    }
    let known: Vec<String> = record.taken.iter().map(|step| step.name.clone()).collect();
    let steps: Vec<Migration> = migrations(root)?
        .into_iter()
        .filter(|step| step.version > from && step.version <= *version)
        .filter(|step| !known.contains(&step.name))
        .collect();
    // Two versions back nobody goes: the other slot holds the one before.
    let (old, kept): (Vec<Taken>, Vec<Taken>) =
        record.taken.into_iter().partition(|step| step.version <= from);
    record.taken = kept;
    for step in &steps {
        let taken = Taken {
            name: step.name.clone(),
            version: step.version.clone(),
            paths: step.paths.clone(),
        };
        pack_away(root, &taken)?;
        record.under_way = Some(taken.clone());
        record.write(root)?;
        if let Err(why) = run(root, step) {
            put_back(root, &taken)?;
            record.under_way = None;
            record.write(root)?;
            return Err(Refusal::new(
                "migration-failed",
                format!(
                    "bringing data from version {from} to {}: {}: {why}",
                    step.version, step.name
                ),
                "what the step has changed is put back; a system on trial comes back from it",
            ));
        }
        record.under_way = None;
        record.taken.push(taken);
        record.write(root)?;
    }
    record.version = version.clone();
    record.write(root)?;
    for step in &old {
        let path = snapshot(root, &step.name);
        durable::remove(&path).map_err(failed("removing", &path))?;
    }
    Ok(Migrated::Forth { from, steps: steps.into_iter().map(|step| step.name).collect() })
}

fn back(root: &Root, mut record: Record, version: &Version, from: Version) -> Result<Migrated> {
    let mut steps = Vec::new();
    while let Some(last) = record.taken.last().filter(|step| step.version > *version).cloned() {
        if !snapshot(root, &last.name).exists() {
            return Err(Refusal::new(
                "newer-data",
                format!(
                    "data are of version {from}, this system is {version}, and the way back over {} is lost",
                    last.name
                ),
                "install a system of that version, or restore an older backup",
            ));
        }
        put_back(root, &last)?;
        record.taken.pop();
        record.write(root)?;
        let path = snapshot(root, &last.name);
        durable::remove(&path).map_err(failed("removing", &path))?;
        steps.push(last.name);
    }
    record.version = version.clone();
    record.write(root)?;
    Ok(Migrated::Back { from, steps })
}

fn run(root: &Root, step: &Migration) -> std::result::Result<(), String> {
    let (name, arguments) = step.run.split_first().ok_or("no program")?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let timeout = Duration::from_secs(step.timeout_seconds);
    let (status, said) = program(name, &arguments, Some(&root.data()), timeout)?;
    let last = said.lines().last().unwrap_or_default().trim().to_owned();
    if status.success() { Ok(()) } else { Err(format!("{status}: {last}")) }
}

fn snapshot(root: &Root, name: &str) -> PathBuf {
    root.state().join("snapshots").join(format!("{name}.tar.zst"))
}

fn pack_away(root: &Root, step: &Taken) -> Result<()> {
    let path = snapshot(root, &step.name);
    let folder = path.parent().unwrap_or(&path);
    fs::create_dir_all(folder).map_err(failed("creating", folder))?;
    let partial = path.with_extension("partial");
    let file = File::create(&partial).map_err(failed("writing", &partial))?;
    archive::pack(&root.data(), &step.paths, &file)?;
    file.sync_all()
        .and_then(|()| fs::rename(&partial, &path))
        .and_then(|()| File::open(folder)?.sync_all())
        .map_err(failed("writing", &path))
}

/// Puts back what a step has changed. It may be cut and done again: the snapshot stays until the record no
/// longer names the step.
fn put_back(root: &Root, step: &Taken) -> Result<()> {
    let data = root.data();
    let (staging, undone) = (data.join(STAGING), data.join(UNDONE));
    for folder in [&staging, &undone] {
        clear(folder)?;
        fs::create_dir(folder).map_err(failed("creating", folder))?;
    }
    let path = snapshot(root, &step.name);
    let file = File::open(&path).map_err(failed("reading", &path))?;
    archive::unpack(file, &staging, MOST)?;
    for (number, name) in step.paths.iter().enumerate() {
        let (place, old) = (data.join(name), staging.join(name));
        if place.symlink_metadata().is_ok() {
            fs::rename(&place, undone.join(number.to_string()))
                .map_err(failed("moving", &place))?;
        }
        if old.symlink_metadata().is_ok() {
            let parent = place.parent().unwrap_or(&data);
            fs::create_dir_all(parent).map_err(failed("creating", parent))?;
            fs::rename(&old, &place).map_err(failed("moving", &old))?;
        }
        let parent = place.parent().unwrap_or(&data);
        if let Ok(folder) = File::open(parent) {
            folder.sync_all().map_err(failed("flushing", parent))?;
        }
    }
    clear(&staging)?;
    clear(&undone)
}

fn clear(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("removing", folder)(error))
        }
        _ => Ok(()),
    }
}
