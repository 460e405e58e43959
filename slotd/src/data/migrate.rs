//! Migrates `data` to the system's version: forward when a new version starts for the first time, and back when an
//! older version starts again. Before each step a snapshot of the files that it changes is packed; a rollback restores it.

use std::cmp::Ordering;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bundle::Version;
use serde::{Deserialize, Serialize};

use super::archive::{self, ArchiveLimits, none_if_missing};
use super::pending::private_folder;
use crate::durable;
use crate::files::{DirectFileChanges, FileAppender, FileChanges, make_dirs};
use crate::process::run_program;
use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;

/// The directory in the image where the steps are declared, one TOML file each.
const FOLDER: &str = "etc/slotd/migrations.d";

/// Where a snapshot is unpacked.
const STAGING: &str = ".snapshot";

/// Where undone files are moved before they are removed.
const UNDONE: &str = ".undone";

/// Maximum size of a snapshot; packing and unpacking use the same bound.
const MOST: ArchiveLimits = ArchiveLimits { bytes: 1 << 32, ..ArchiveLimits::BACKUP };

/// The record's name, at the top of `data`.
const RECORD: &str = "data-version.json";

/// Default timeout of a step in seconds.
fn default_timeout() -> u64 {
    60
}

/// A step that migrates data of older versions.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrationStep {
    /// The file's name without its ending.
    #[serde(skip)]
    pub name: String,
    /// The first version whose data has the form that this step produces.
    pub version: Version,
    /// The paths that it changes, below `/data`. A rollback restores only these.
    pub paths: Vec<PathBuf>,
    /// The program and its arguments. After a power cut it may be started again.
    pub run: Vec<String>,
    /// Its timeout.
    #[serde(default = "default_timeout")]
    pub timeout_seconds: u64,
}

/// A step that has run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Taken {
    name: String,
    version: Version,
    paths: Vec<PathBuf>,
}

impl Taken {
    /// Applies the rules for the image's own steps, because any program may have written this record.
    fn is_valid(&self) -> bool {
        is_name(&self.name) && are_paths(&self.paths)
    }
}

/// Whether this is a valid single file name.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=100).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(plain)
}

fn are_paths(paths: &[PathBuf]) -> bool {
    !paths.is_empty() && paths.iter().all(|path| archive::safe_path(path).is_some())
}

/// The version of the data. The record is part of the data, so that a backup has its own version. A restore keeps
/// only the version ([`only_the_version`]): the snapshots are on the robot that ran the steps.
///
/// Every agent reads and writes this format, so that an agent after a rollback finds what another one did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Record {
    version: Version,
    /// The steps whose snapshot is kept, oldest first.
    taken: Vec<Taken>,
    /// A step that has begun; its changes so far are incomplete.
    under_way: Option<Taken>,
    /// The last version that changed the data and has no snapshot any more: older systems cannot use the data.
    #[serde(default)]
    needs: Option<Version>,
}

/// The fields that every version of the record has.
#[derive(Deserialize)]
struct OnlyVersion {
    version: Version,
}

impl Record {
    fn path(root: &RootDir) -> PathBuf {
        root.data().join(RECORD)
    }

    fn new(version: &Version) -> Self {
        Self { version: version.clone(), taken: Vec::new(), under_way: None, needs: None }
    }

    /// Parses a record; `None`: the bytes are not a record.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut record: Self = match serde_json::from_slice(bytes) {
            Ok(record) => record,
            Err(_) => {
                let known: OnlyVersion = serde_json::from_slice(bytes).ok()?;
                Self::new(&known.version)
            }
        };
        let (taken, strange) = record.taken.into_iter().partition(Taken::is_valid);
        record.taken = taken;
        record.forget(strange);
        if record.under_way.as_ref().is_some_and(|step| !step.is_valid()) {
            let strange = record.under_way.take();
            record.forget(strange);
        }
        Some(record)
    }

    /// Records that these steps have no snapshot any more.
    fn forget(&mut self, steps: impl IntoIterator<Item = Taken>) {
        let versions = steps.into_iter().map(|step| step.version);
        self.needs = versions.chain(self.needs.take()).max();
    }

    fn write(&self, root: &RootDir, files: &dyn FileChanges) -> Result<()> {
        let path = Self::path(root);
        durable::write_json_with(files, &path, self).map_err(failed("writing", &path))
    }
}

/// Reduces the record of a backup that was unpacked into `folder` to the version: its steps ran on another robot, or
/// earlier on this one, and an archive must not say which steps ran here.
pub(super) fn only_the_version(files: &dyn FileChanges, folder: &Path) -> Result<()> {
    let path = folder.join(RECORD);
    let bad = || {
        let help = "use a file that `slotd backup` made";
        Refusal::new("bad-archive", format!("`{RECORD}` has no version"), help)
    };
    let found = none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?;
    match found {
        None => return Ok(()),
        Some(found) if !found.is_file() => return Err(bad()),
        Some(_) => {}
    }
    let bytes = durable::read(&path).map_err(failed("reading", &path))?;
    let mut record = bytes.and_then(|bytes| Record::parse(&bytes)).ok_or_else(bad)?;
    let steps = std::mem::take(&mut record.taken);
    let begun = record.under_way.take();
    record.forget(steps.into_iter().chain(begun));
    durable::write_json_with(files, &path, &record).map_err(failed("writing", &path))
}

/// The result of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "data")]
pub enum MigrationOutcome {
    /// The data already has this version.
    Unchanged,
    /// There was no data of another version.
    New,
    /// The record of the version is damaged: the data is treated as this version's.
    Damaged,
    /// These steps ran.
    Forth {
        /// The version that the data had.
        from: Version,
        /// Names of the steps.
        steps: Vec<String>,
    },
    /// These steps were undone.
    Back {
        /// The version that the data had.
        from: Version,
        /// Names of the steps.
        steps: Vec<String>,
    },
}

/// The steps of this system, in the order in which they run.
///
/// # Errors
/// `bad-migration`: a file is invalid.
pub fn read_steps(root: &RootDir) -> Result<Vec<MigrationStep>> {
    let folder = root.path(FOLDER);
    let mut all = Vec::new();
    for path in durable::list(&folder).map_err(failed("reading", &folder))? {
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let bad = |why: String| {
            let help =
                "this system cannot migrate older data to its version: install another system";
            Refusal::new("bad-migration", format!("{}: {why}", path.display()), help)
        };
        let text = fs::read_to_string(&path).map_err(failed("reading", &path))?;
        let mut step: MigrationStep =
            toml::from_str(&text).map_err(|e| bad(e.message().to_owned()))?;
        step.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if step.run.is_empty() || !are_paths(&step.paths) {
            return Err(bad(
                "`run` and `paths` are required, and paths must be below /data".to_owned()
            ));
        }
        if !is_name(&step.name) {
            return Err(bad(
                "the name must have 1 to 100 of the characters `A-Z a-z 0-9 - _ .`".to_owned()
            ));
        }
        all.push(step);
    }
    all.sort_by(|a, b| (&a.version, &a.name).cmp(&(&b.version, &b.name)));
    Ok(all)
}

/// Migrates `data` to `version`, that of the running system, before anything uses it.
///
/// # Errors
/// `migration-failed`: a step failed; its changes are rolled back, the steps before it stay, and the next start
/// tries it again. `newer-data`: there is no way back. `no-space`, `no-archive`: the snapshot of a step cannot be
/// made, so the step does not run. `bad-migration`, `bad-archive`, `io`.
pub fn migrate(root: &RootDir, version: &Version) -> Result<MigrationOutcome> {
    migrate_with(root, version, &DirectFileChanges, &run)
}

/// Runs a step. `Err` says why it failed; its changes may or may not be on the disk.
pub type StepRunner<'a> = &'a dyn Fn(&RootDir, &MigrationStep) -> std::result::Result<(), String>;

/// [`migrate`] with every change made through `files`, and every step run by `run`.
///
/// # Errors
/// As [`migrate`].
pub fn migrate_with(
    root: &RootDir,
    version: &Version,
    files: &dyn FileChanges,
    run: StepRunner<'_>,
) -> Result<MigrationOutcome> {
    let path = Record::path(root);
    let bytes = durable::read_or_damaged(&path).map_err(failed("reading", &path))?;
    let Some(mut record) = bytes.as_deref().and_then(Record::parse) else {
        let new = Record::new(version);
        new.write(root, files)?;
        remove_unneeded(root, files, &new)?;
        return Ok(if bytes.is_some() { MigrationOutcome::Damaged } else { MigrationOutcome::New });
    };
    if let Some(begun) = record.under_way.take() {
        put_back(root, files, &begun)?;
        record.write(root, files)?;
    }
    remove_unneeded(root, files, &record)?;
    let from = record.version.clone();
    let steps = record.taken.iter().map(|step| &step.version);
    let newest = steps.chain(&record.needs).max();
    let behind = newest.is_some_and(|newest| newest > version);
    match record.version.cmp(version) {
        _ if behind => migrate_back(root, files, record, version, from),
        Ordering::Equal => Ok(MigrationOutcome::Unchanged),
        Ordering::Less => migrate_forward(root, files, run, record, version, from),
        // No step changed anything.
        Ordering::Greater => {
            record.version = version.clone();
            record.write(root, files)?;
            Ok(MigrationOutcome::Back { from, steps: Vec::new() })
        }
    }
}

fn migrate_forward(
    root: &RootDir,
    files: &dyn FileChanges,
    run: StepRunner<'_>,
    mut record: Record,
    version: &Version,
    from: Version,
) -> Result<MigrationOutcome> {
    let known: Vec<String> = record.taken.iter().map(|step| step.name.clone()).collect();
    let steps: Vec<MigrationStep> = read_steps(root)?
        .into_iter()
        .filter(|step| step.version > from && step.version <= *version)
        .filter(|step| !known.contains(&step.name))
        .collect();
    // A rollback over two versions is impossible: the other slot holds the previous one.
    let (old, kept): (Vec<Taken>, Vec<Taken>) =
        record.taken.into_iter().partition(|step| step.version <= from);
    record.taken = kept;
    record.forget(old);
    for step in &steps {
        let taken = Taken {
            name: step.name.clone(),
            version: step.version.clone(),
            paths: outermost_paths(&step.paths),
        };
        pack_away(root, files, &taken)?;
        record.under_way = Some(taken.clone());
        record.write(root, files)?;
        if let Err(why) = run(root, step) {
            put_back(root, files, &taken)?;
            record.under_way = None;
            record.write(root, files)?;
            return Err(Refusal::new(
                "migration-failed",
                format!(
                    "migrating data from version {from} to {}: {}: {why}",
                    step.version, step.name
                ),
                "the step's changes are rolled back; a system on trial will be rolled back too",
            ));
        }
        // Programs seldom flush their files, and after the record is written, lost changes are never noticed.
        flush(root, files)?;
        record.under_way = None;
        record.taken.push(taken);
        record.write(root, files)?;
    }
    record.version = version.clone();
    match record.write(root, files) {
        Ok(()) => remove_unneeded(root, files, &record)?,
        // Nothing was changed: a full `data` must not prevent the update that fixes it. The next start writes the record.
        Err(refusal) if steps.is_empty() => crate::say!("slotd: {refusal}"),
        Err(refusal) => return Err(refusal),
    }
    Ok(MigrationOutcome::Forth { from, steps: steps.into_iter().map(|step| step.name).collect() })
}

fn migrate_back(
    root: &RootDir,
    files: &dyn FileChanges,
    mut record: Record,
    version: &Version,
    from: Version,
) -> Result<MigrationOutcome> {
    let lost = |over: &dyn std::fmt::Display| {
        Refusal::new(
            "newer-data",
            format!(
                "data has version {from}, this system has {version}, and the snapshot for going back over {over} is lost"
            ),
            "install a system of that version, or restore an older backup",
        )
    };
    if let Some(needs) = record.needs.as_ref().filter(|needs| *needs > version) {
        return Err(lost(needs));
    }
    // All steps back, or none.
    for step in record.taken.iter().filter(|step| step.version > *version) {
        let path = snapshot_dir(root, &step.name);
        let found =
            none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?;
        found.ok_or_else(|| lost(&step.name))?;
    }
    let mut steps = Vec::new();
    while let Some(last) = record.taken.last().filter(|step| step.version > *version).cloned() {
        // After a power cut, the next system first rolls this step back, and assumes no step that has not run.
        record.taken.pop();
        record.version = version.clone();
        record.under_way = Some(last.clone());
        record.write(root, files)?;
        put_back(root, files, &last)?;
        record.under_way = None;
        record.write(root, files)?;
        steps.push(last.name);
    }
    record.version = version.clone();
    record.write(root, files)?;
    remove_unneeded(root, files, &record)?;
    Ok(MigrationOutcome::Back { from, steps })
}

/// Runs a step's program.
fn run(root: &RootDir, step: &MigrationStep) -> std::result::Result<(), String> {
    let (name, arguments) = step.run.split_first().ok_or("no program")?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let timeout = Duration::from_secs(step.timeout_seconds);
    let (status, output) = run_program(name, &arguments, Some(&root.data()), timeout)?;
    let last = output.lines().last().unwrap_or_default().trim().to_owned();
    if status.success() { Ok(()) } else { Err(format!("{status}: {last}")) }
}

/// The paths that are not inside another one.
fn outermost_paths(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut sorted: Vec<PathBuf> =
        paths.iter().filter_map(|path| archive::safe_path(path)).collect();
    sorted.sort();
    let mut outer: Vec<PathBuf> = Vec::new();
    for path in sorted {
        if !outer.iter().any(|other| path.starts_with(other)) {
            outer.push(path);
        }
    }
    outer
}

fn snapshots_dir(root: &RootDir) -> PathBuf {
    root.state().join("snapshots")
}

fn snapshot_dir(root: &RootDir, name: &str) -> PathBuf {
    snapshots_dir(root).join(format!("{name}.tar.zst"))
}

fn flush(root: &RootDir, files: &dyn FileChanges) -> Result<()> {
    let data = root.data();
    files.sync_all(&data).map_err(failed("flushing", &data))
}

/// Removes what no step needs: snapshots that were dropped or never used, and undone files. The record says which
/// steps there are, so that a power cut at any moment leaves nothing behind for ever.
fn remove_unneeded(root: &RootDir, files: &dyn FileChanges, record: &Record) -> Result<()> {
    let remove = |path: &Path| files.remove(path).map_err(failed("removing", path));
    let unfinished = Path::new(RECORD).with_extension("partial");
    for name in [Path::new(STAGING), Path::new(UNDONE), &unfinished] {
        let path = root.data().join(name);
        if none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?.is_some()
        {
            remove(&path)?;
        }
    }
    let folder = snapshots_dir(root);
    let to_refusal = failed("reading", &folder);
    let Some(listing) = none_if_missing(fs::read_dir(&folder)).map_err(&to_refusal)? else {
        return Ok(());
    };
    // Older agents made it readable for all users.
    private_folder(files, &folder)?;
    let kept: Vec<PathBuf> =
        record.taken.iter().map(|step| snapshot_dir(root, &step.name)).collect();
    for entry in listing {
        let path = entry.map_err(&to_refusal)?.path();
        if !kept.contains(&path) {
            remove(&path)?;
        }
    }
    Ok(())
}

fn pack_away(root: &RootDir, files: &dyn FileChanges, step: &Taken) -> Result<()> {
    let path = snapshot_dir(root, &step.name);
    let (folder, partial) = (snapshots_dir(root), path.with_extension("partial"));
    let to_refusal = failed("writing", &path);
    private_folder(files, &folder)?;
    let written = write_snapshot(root, files, step, &partial);
    if written.is_err() {
        files.remove(&partial).map_err(failed("removing", &partial))?;
    }
    written?;
    files.replace(&partial, &path).and_then(|()| files.sync(&folder)).map_err(&to_refusal)
}

fn write_snapshot(
    root: &RootDir,
    files: &dyn FileChanges,
    step: &Taken,
    path: &Path,
) -> Result<()> {
    let to_refusal = failed("writing", path);
    let data = root.data();
    files.remove(path).and_then(|()| files.create(path)).map_err(&to_refusal)?;
    let mut out = FileAppender::new(files, path, ArchiveLimits::free_space(&data)?.bytes);
    let used = archive::pack(&data, &step.paths, &mut out, MOST)?;
    out.flush().and_then(|()| files.sync(path)).map_err(&to_refusal)?;
    let free = ArchiveLimits::free_space(&data)?;
    if free.bytes < used.bytes || free.entries < used.entries {
        return Err(Refusal::new(
            "no-space",
            format!(
                "the snapshot before the step {} needs {} MiB on data, but {} MiB are free",
                step.name,
                used.bytes >> 20,
                free.bytes >> 20
            ),
            "free space on data; the step runs only then",
        ));
    }
    Ok(())
}

/// Rolls back the changes of a step. It may be interrupted and repeated: the snapshot stays until the record no longer
/// names the step.
fn put_back(root: &RootDir, files: &dyn FileChanges, step: &Taken) -> Result<()> {
    let data = root.data();
    let (staging, undone) = (data.join(STAGING), data.join(UNDONE));
    for folder in [&staging, &undone] {
        files
            .remove(folder)
            .and_then(|()| files.create_dir(folder))
            .map_err(failed("creating", folder))?;
    }
    let path = snapshot_dir(root, &step.name);
    let file = durable::open(&path).map_err(failed("reading", &path))?;
    archive::unpack(files, file, &staging, MOST)?;
    for (number, name) in outermost_paths(&step.paths).iter().enumerate() {
        let (place, old) = (data.join(name), staging.join(name));
        let found = |path: &Path| {
            none_if_missing(fs::symlink_metadata(path)).map_err(failed("reading", path))
        };
        for parent in name.ancestors().skip(1) {
            if found(&data.join(parent))?.is_some_and(|parent| !parent.is_dir()) {
                let error = io::Error::from(io::ErrorKind::NotADirectory);
                return Err(failed("restoring into", &data.join(parent))(error));
            }
        }
        if found(&place)?.is_some() {
            let out = undone.join(number.to_string());
            files.rename(&place, &out).map_err(failed("moving", &place))?;
        }
        if found(&old)?.is_some() {
            let parent = place.parent().unwrap_or(&data);
            make_dirs(files, parent).map_err(failed("creating", parent))?;
            files.rename(&old, &place).map_err(failed("moving", &old))?;
        }
    }
    flush(root, files)
}
