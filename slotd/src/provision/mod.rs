//! Provisioning: the `resources` of the API's package become `/data/system`, exactly, in one step.
//!
//! The package is found as Python would find it, and is never imported. The new tree is complete and durable
//! next to the old one before the two exchange their names; a failure before that leaves the old tree.

mod tree;
mod write;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::builtin::{self, BuiltInApi};
use crate::durable;
use crate::events::EventLog;
use crate::files::{DirectFileChanges, FileChanges};
use crate::lock::{LockScope, ProcessLock};
use crate::python::{self, PythonModule, SearchNote};
use crate::refusal::{Refusal, Result};
use crate::reserve;
use crate::root::RootDir;
pub use tree::{DifferenceKind, ResourceDifference};
use tree::{ResourceKind, ResourceTree};

/// The directory in a package whose content is provisioned.
const RESOURCES: &str = "resources";

/// Where the new tree is created, below `/data`, and where the old one waits for its removal. Names that begin
/// with a dot are not backed up.
const STAGING: &str = ".system.new";

/// Maximum number of differences that a refusal lists.
const LISTED: usize = 20;

/// The result in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProvisionOutcome {
    /// The package's resources replaced the old tree.
    Provisioned,
    /// The tree was already up to date; nothing was written.
    Unchanged,
    /// The package has no resources; the existing tree stays unchanged.
    NoResources,
    /// This product has no API.
    NoApi,
    /// This base and this package were provisioned in an earlier start; nothing was compared.
    Current,
}

/// The result of provisioning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProvisionReport {
    /// The result in a word.
    pub outcome: ProvisionOutcome,
    /// The package's directory.
    pub package: Option<PathBuf>,
    /// The changed paths, and how each one differed before.
    pub changes: Vec<ResourceDifference>,
    /// Junk in the package, below its `resources`.
    pub left_out: Vec<PathBuf>,
    /// Files of the tree, links included.
    pub files: usize,
    /// Bytes of these files.
    pub bytes: u64,
    /// What the search for the package could not determine.
    pub notes: Vec<SearchNote>,
}

impl ProvisionReport {
    fn new(
        outcome: ProvisionOutcome,
        found: Option<&Found>,
        wanted: Option<&ResourceTree>,
    ) -> Self {
        let sizes =
            wanted.iter().flat_map(|tree| tree.entries.values()).filter_map(|item| match item {
                ResourceKind::File { size, .. } => Some(*size),
                ResourceKind::Link(_) => Some(0),
                ResourceKind::Folder { .. } | ResourceKind::Other => None,
            });
        let sizes: Vec<u64> = sizes.collect();
        Self {
            outcome,
            package: found.map(|found| found.folder.clone()),
            changes: Vec::new(),
            left_out: wanted.map_or_else(Vec::new, |tree| tree.junk.clone()),
            files: sizes.len(),
            bytes: sizes.iter().sum(),
            notes: found.map_or_else(Vec::new, |found| found.notes.clone()),
        }
    }
}

/// Record of the last provisioning; written only after success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct ProvisionRecord {
    /// The base's id, if the image has one.
    base_id: Option<String>,
    /// The package's directory, with links resolved: it distinguishes APIs on `data` from each other and from the
    /// built-in one.
    package: PathBuf,
    /// Whether it has resources.
    resources: bool,
}

impl ProvisionRecord {
    fn path(root: &RootDir) -> PathBuf {
        root.state().join("provisioned.json")
    }

    /// A damaged record is treated as missing: provisioning then runs again.
    fn read(root: &RootDir) -> Option<Self> {
        durable::read_json(&Self::path(root)).ok().flatten()
    }

    fn store(&self, root: &RootDir, files: &dyn FileChanges) -> Result<()> {
        if Self::read(root).as_ref() == Some(self) {
            return Ok(());
        }
        let path = Self::path(root);
        durable::write_json_with(files, &path, self)
            .map_err(|error| write::failed("writing", &path, &error))
    }
}

/// Durably removes the record, so that the next start provisions again: called by code that changes the package or
/// replaces `data` as a whole.
///
/// # Errors
/// `io`.
pub fn forget(root: &RootDir, files: &dyn FileChanges) -> Result<()> {
    let path = ProvisionRecord::path(root);
    if fs::symlink_metadata(&path).is_err() {
        return Ok(());
    }
    // A record that reappears after a power cut would describe a tree that was replaced meanwhile.
    let removed = files.remove(&path).and_then(|()| files.sync(&root.state()));
    removed.map_err(|error| Refusal::io(format!("removing {}", path.display()), &error))
}

/// The package, as Python finds it.
struct Found {
    /// Its directory, or its only file.
    folder: PathBuf,
    /// The same with links resolved, below the root.
    real: PathBuf,
    /// Its `resources`, if it has any.
    resources: Option<PathBuf>,
    notes: Vec<SearchNote>,
}

fn locate_package(root: &RootDir, api: &BuiltInApi) -> Result<Found> {
    let path = api.search_path(root)?;
    let module = python::find(root, &api.interpreter()?, &path, &api.module)?;
    let Some(module) = module else {
        let entries: Vec<String> = path.entries.iter().map(|e| e.display().to_string()).collect();
        let mut message =
            format!("Python would not find `{}` on its path {}", api.module, entries.join(":"));
        for note in &path.notes {
            message.push_str(&format!("\n  {note}"));
        }
        let help = "install the API again: `slotd log` shows what happened to it; /data/system is unchanged";
        return Err(Refusal::new("no-package", message, help));
    };
    let folders = match module {
        PythonModule::Package { folder, .. } => vec![folder],
        PythonModule::Namespace { folders } => folders,
        PythonModule::File { path } => vec![path],
        PythonModule::Archived { path } => {
            return Err(bad(&path, "the package is in an archive, expected a directory"));
        }
    };
    let mut found = None;
    for folder in &folders {
        let resources = folder.join(RESOURCES);
        match fs::symlink_metadata(root.path(&resources)) {
            Ok(about) if about.is_dir() => {
                found = Some((folder, resources));
                break;
            }
            Ok(_) => return Err(bad(&resources, "not a directory")),
            // Also for a module that is one file (`NotADirectory`).
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory]
                    .contains(&error.kind()) => {}
            Err(error) => return Err(tree::read_error(&resources, &error)),
        }
    }
    let (folder, resources) = match found {
        Some((folder, resources)) => (folder.clone(), Some(resources)),
        None => (folders.first().cloned().unwrap_or_default(), None),
    };
    let resolve = |path: &Path| fs::canonicalize(path).map_err(|e| tree::read_error(path, &e));
    let (real, top) = (resolve(&root.path(&folder))?, resolve(&root.path("/"))?);
    let real = Path::new("/").join(real.strip_prefix(top).unwrap_or(&real));
    Ok(Found { folder, real, resources, notes: path.notes })
}

fn bad(path: &Path, why: &str) -> Refusal {
    let help = "install a package whose resources are regular files; /data/system is unchanged";
    Refusal::new("bad-resources", format!("{}: {why}", path.display()), help)
}

/// Replaces `/data/system` by the `resources` of the API's package.
///
/// # Errors
/// `no-package`, `bad-resources`, `bad-api`: `/data/system` is unchanged. `no-space`, `busy`, `io`: it is the
/// complete old tree or the complete new one.
pub fn run(root: &RootDir, events: &EventLog) -> Result<ProvisionReport> {
    run_with(root, events, &DirectFileChanges)
}

/// [`run`] with every change made through `files`, except the log and locks.
///
/// # Errors
/// As [`run`].
pub fn run_with(
    root: &RootDir,
    events: &EventLog,
    files: &dyn FileChanges,
) -> Result<ProvisionReport> {
    let result = provision(root, files);
    match &result {
        Ok(done) if done.outcome == ProvisionOutcome::Provisioned => {
            let mut details = json!(done);
            // Log lines are bounded, but a first provisioning changes every path.
            if let Some(details) = details.as_object_mut() {
                details.remove("changes");
                details.insert("changed".to_owned(), json!(done.changes.len()));
            }
            events.add("provisioned", details);
        }
        Ok(done) if done.outcome == ProvisionOutcome::NoResources => {
            events.add("no-resources", json!({ "package": done.package }));
        }
        Ok(_) => {}
        Err(refusal) => events.add("provision-refused", json!(refusal)),
    }
    result
}

fn provision(root: &RootDir, files: &dyn FileChanges) -> Result<ProvisionReport> {
    let Some(api) = BuiltInApi::read(root)? else {
        return Ok(ProvisionReport::new(ProvisionOutcome::NoApi, None, None));
    };
    let found = locate_package(root, &api)?;
    let record = |resources| -> Result<ProvisionRecord> {
        Ok(ProvisionRecord { base_id: base_id(root)?, package: found.real.clone(), resources })
    };
    let Some(wanted) = read_wanted_tree(root, &found)? else {
        record(false)?.store(root, files)?;
        return Ok(ProvisionReport::new(ProvisionOutcome::NoResources, Some(&found), None));
    };
    let (target, staging) = (root.system(), root.data().join(STAGING));
    let unchanged = |changes: &[ResourceDifference]| changes.is_empty() && target.is_dir();
    let leftover = fs::symlink_metadata(&staging).is_ok();
    let changes = tree::compare_trees(&wanted, tree::read_present(&target)?.as_ref())?;
    if unchanged(&changes) && !leftover {
        record(true)?.store(root, files)?;
        return Ok(ProvisionReport::new(ProvisionOutcome::Unchanged, Some(&found), Some(&wanted)));
    }
    let _lock = ProcessLock::acquire(root, LockScope::Provision, "provision")?;
    // Another process may have provisioned until now.
    let changes = tree::compare_trees(&wanted, tree::read_present(&target)?.as_ref())?;
    write::remove_staging(files, &staging)?;
    let mut outcome = ProvisionOutcome::Unchanged;
    if !unchanged(&changes) {
        write::check_space(&wanted, &root.data())?;
        write::replace(files, &wanted, &staging, &target)?;
        outcome = ProvisionOutcome::Provisioned;
    }
    record(true)?.store(root, files)?;
    Ok(ProvisionReport { changes, ..ProvisionReport::new(outcome, Some(&found), Some(&wanted)) })
}

/// The tree that the package requires; `None` when it has no resources, or only junk in them.
fn read_wanted_tree(root: &RootDir, found: &Found) -> Result<Option<ResourceTree>> {
    let Some(resources) = &found.resources else { return Ok(None) };
    let wanted = tree::read_resources(&root.path(resources))?;
    Ok(Some(wanted).filter(|tree| !tree.entries.is_empty()))
}

/// Provisions in the first start of a base, and whenever Python finds a different package. Success is recorded, so
/// that the next start has nothing to do.
///
/// # Errors
/// As [`run`]; the next start tries again.
pub fn provision_at_start(root: &RootDir, events: &EventLog) -> Result<ProvisionReport> {
    let known = ProvisionRecord::read(root);
    if let (Some(known), Ok(Some(api))) = (known, BuiltInApi::read(root))
        && known.base_id.is_some()
        && known.base_id == base_id(root)?
        && let Ok(found) = locate_package(root, &api)
        && found.real == known.package
        && (root.system().is_dir() || !known.resources)
    {
        return Ok(ProvisionReport::new(ProvisionOutcome::Current, Some(&found), None));
    }
    reserve::with_reserve_released(root, || run(root, events))
}

/// Compares `/data/system` with the package's resources. Nothing is changed.
///
/// # Errors
/// `drift`: they differ; the message lists where. Otherwise as [`run`].
pub fn check(root: &RootDir) -> Result<ProvisionReport> {
    let Some(api) = BuiltInApi::read(root)? else {
        return Ok(ProvisionReport::new(ProvisionOutcome::NoApi, None, None));
    };
    let found = locate_package(root, &api)?;
    let Some(wanted) = read_wanted_tree(root, &found)? else {
        return Ok(ProvisionReport::new(ProvisionOutcome::NoResources, Some(&found), None));
    };
    let present = tree::read_present(&root.system())?;
    let differences = tree::compare_trees(&wanted, present.as_ref())?;
    if present.is_some() && differences.is_empty() {
        return Ok(ProvisionReport::new(ProvisionOutcome::Unchanged, Some(&found), Some(&wanted)));
    }
    let mut message = format!(
        "/data/system differs from {}/{RESOURCES} in {} places",
        found.folder.display(),
        differences.len()
    );
    for difference in differences.iter().take(LISTED) {
        let path = match tree::escape_path(&difference.path) {
            path if path.is_empty() => "/data/system itself".to_owned(),
            path => path,
        };
        message.push_str(&format!("\n  {path}: {}", difference.how.word()));
    }
    if differences.len() > LISTED {
        message.push_str(&format!("\n  and {} more", differences.len() - LISTED));
    }
    Err(Refusal::new("drift", message, "run `slotd provision` to restore the package's resources"))
}

fn base_id(root: &RootDir) -> Result<Option<String>> {
    let text = builtin::read(&root.path("usr/lib/slipway/base-id"))?;
    Ok(text.map(|text| text.trim().to_owned()).filter(|id| !id.is_empty()))
}
