//! Installs the component: first everything that can be refused, then the missing wheels, next to the API that
//! serves, and only then the change.

use std::collections::BTreeSet;
use std::time::Instant;

use bundle::component::{API, ComponentLock, LOCK_ROLE, SITE};
use bundle::{BundleInput, BundleReader, PayloadReader};
pub use contract::answer::InstalledApi;
use serde_json::json;

use super::service::HealthTimes;
use super::state::KnownGoodApi;
use super::switch::{switch_to, whole_millis};
use super::whole::repair_versions;
use super::{ApiDir, NEW, failed, retention, settle, tree};
use crate::builtin::BuiltInApi;
use crate::condition::{DataCondition, DataState};
use crate::durable;
use crate::install::{InstallStep, Progress, from_source};
use crate::machine::RobotContext;
use crate::python::{self, Interpreter, PathEntryOrigin, PythonModule, SearchPath};
use crate::refusal::{Refusal, RefusalKind, Result};
use crate::root::RootDir;

/// Installs a bundle of the component `api`. The caller has the lock, and has compared the manifest with
/// the robot.
///
/// # Errors
/// A refusal. Before the change itself, the API that serves is not touched; after it, the API that served before
/// serves again.
pub(crate) fn install<I: BundleInput>(
    robot: &RobotContext<'_>,
    reader: &mut BundleReader<I>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<InstalledApi> {
    let (root, events) = (robot.root, robot.events);
    let place = &ApiDir::new(root, robot.files);
    let component = match reader.manifest().components.as_slice() {
        [one] => one.clone(),
        _ => {
            return Err(Refusal::new(
                "mixed-bundle",
                "the bundle has the component api and others: some of them need a restart, api does not",
                "make a separate bundle for each; a system includes its own API",
            ));
        }
    };
    let Some(base) = BuiltInApi::read(root)? else {
        return Err(Refusal::new(
            "unknown-payload",
            "the bundle has the component api, but this system has no API",
            "use the bundle that was built for this product",
        ));
    };
    require_card_data(root)?;
    let manifest = reader.manifest_sha256().to_owned();
    let signed_by: Vec<String> = reader.signed_by().iter().map(|by| by.id.clone()).collect();
    let lock = match reader.next_payload().map_err(from_source)? {
        Some(payload) if payload.role() == LOCK_ROLE => read_lock(payload)?,
        _ => return Err(bad_component(format!("the first payload is not {LOCK_ROLE}"))),
    };
    let (lock, json) = lock;
    lock.matches(&component)?;
    if let Some(why) = base.misfit(root, &lock) {
        return Err(Refusal::new(
            "api-unfit",
            format!("the API {} does not fit this system: {why}", lock.version),
            "build it for this system's product, or install a newer system first",
        ));
    }
    // An interrupted change is completed or rolled back before the next one.
    settle(root, events, robot.files)?;
    let whole = retention::make_room(root, place, &lock)?;

    let id = bundle::index::to_hex(&bundle::index::sha256(&json));
    let folder = format!("{}-{}", lock.version, id.get(..8).unwrap_or_default());
    let before = super::ApiState::read(place).chosen;
    events.add(
        "api-install-started",
        json!({ "version": lock.version, "manifest": manifest, "signed-by": signed_by }),
    );
    let started = Instant::now();
    let mut outcome = InstalledApi {
        component: API.to_owned(),
        version: lock.version.clone(),
        folder: folder.clone(),
        manifest: manifest.clone(),
        before: before
            .and_then(|folder| super::state::read_lock(place, &folder).ok())
            .map(|l| l.version),
        wheels: lock.wheels.len(),
        reused: 0,
        size: component.payloads.iter().map(|payload| payload.size).sum(),
        held: 0,
        written: 0,
        write_ms: 0,
        down_ms: 0,
    };
    let beside = unpack_missing_wheels(reader, place, &lock, &whole, &mut outcome, progress)
        .map(|()| repair_versions(place, &lock, &folder, events))
        .and_then(|()| link_version(root, place, &lock, &json, &folder));
    if let Err(refusal) = beside {
        // Wheels of an interrupted transfer are kept for the next one; a refused API is removed.
        if let Err(error) = retention::remove_unfinished(place) {
            events.add("api-not-tidied", json!(error));
        } else if refusal.kind() == RefusalKind::Bundle {
            retention::remove_unneeded(root, place, events);
        }
        return Err(refusal);
    }
    outcome.write_ms = whole_millis(started.elapsed());

    let good = KnownGoodApi { folder: folder.clone(), version: lock.version, manifest, signed_by };
    let changed =
        switch_to(root, events, place, Some(&folder), HealthTimes::for_robot(root), |state| {
            state.good.retain(|other| other.folder != good.folder);
            state.good.insert(0, good);
        });
    retention::remove_unneeded(root, place, events);
    outcome.down_ms = whole_millis(changed?);
    Ok(outcome)
}

/// `data` must be on the card and writable: content in memory is lost at the next restart.
fn require_card_data(root: &RootDir) -> Result<()> {
    let state = DataState::read(root)?;
    match state.condition {
        DataCondition::ReadOnly | DataCondition::Memory => Err(Refusal::new(
            "no-data",
            state.alarm().unwrap_or_default(),
            "restart the robot to check data, or replace the card; the API that serves is unchanged",
        )),
        _ => Ok(()),
    }
}

fn bad_component(reason: String) -> Refusal {
    bundle::Error::BadComponent { reason }.into()
}

/// The lock and its bytes.
fn read_lock<I: BundleInput>(
    mut payload: PayloadReader<'_, I>,
) -> Result<(ComponentLock, Vec<u8>)> {
    if payload.payload().size > bundle::MAX_LOCK {
        return Err(bad_component(format!(
            "the lock has {} bytes, the maximum is {}",
            payload.payload().size,
            bundle::MAX_LOCK
        )));
    }
    let mut json = Vec::new();
    while payload.next_frame().is_some() {
        payload
            .read_frame(&mut |_, bytes| {
                json.extend_from_slice(bytes);
                Ok(())
            })
            .map_err(from_source)?;
    }
    Ok((ComponentLock::parse(&json)?, json))
}

/// Unpacks the missing wheels, and skips those that are `whole`.
fn unpack_missing_wheels<I: BundleInput>(
    reader: &mut BundleReader<I>,
    place: &ApiDir<'_>,
    lock: &ComponentLock,
    whole: &BTreeSet<String>,
    outcome: &mut InstalledApi,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<()> {
    let total = outcome.size;
    let mut done = 0;
    for wheel in &lock.wheels {
        let payload = reader.next_payload().map_err(from_source)?;
        let mut payload =
            payload.ok_or_else(|| bad_component("a payload is missing".to_owned()))?;
        if whole.contains(&wheel.role) {
            while payload.next_frame().is_some() {
                payload.skip_frame().map_err(from_source)?;
            }
            outcome.reused += 1;
            outcome.held += wheel.size;
            done += wheel.size;
            progress(Progress { step: InstallStep::Write, done, total });
        } else {
            tree::unpack_wheel(place, wheel, &mut payload, &mut |bytes| {
                done += bytes;
                progress(Progress { step: InstallStep::Write, done: done.min(total), total });
            })?;
            outcome.written += wheel.bytes;
        }
    }
    // The archive's end.
    match reader.next_payload().map_err(from_source)? {
        None => Ok(()),
        Some(_) => Err(bad_component("there is an extra payload".to_owned())),
    }
}

/// Assembles a version from links to its wheels' files: it is complete under its name, or absent.
fn link_version(
    root: &RootDir,
    place: &ApiDir<'_>,
    lock: &ComponentLock,
    json: &[u8],
    folder: &str,
) -> Result<()> {
    let path = place.version(folder);
    let new = place.version(&format!("{folder}{NEW}"));
    place.clear(&new)?;
    for wheel in &lock.wheels {
        tree::link_wheel(place, wheel, &new)?;
    }
    check_modules_exist(root, lock, &format!("{folder}{NEW}"))?;
    let own = new.join(LOCK_ROLE);
    durable::write_with(place.files, &own, json).map_err(failed("writing", &own))?;
    if path.exists() {
        // The same API again.
        return place.exchange(&new, &path);
    }
    place.flush_all(&new)?;
    place.rename(&new, &path)?;
    place.flush(place.folder())
}

/// Checks that every module that the package and its programs name exists where Python would find it, and that
/// every program exists.
fn check_modules_exist(root: &RootDir, lock: &ComponentLock, folder: &str) -> Result<()> {
    let place = ApiDir::for_reading(&RootDir::new("/"));
    let site = place.version(folder).join(SITE);
    let python = Interpreter::parse(&lock.python)
        .ok_or_else(|| bad_component(format!("invalid Python version `{}`", lock.python)))?;
    let scripts = || lock.wheels.iter().flat_map(|wheel| &wheel.scripts);
    for module in std::iter::once(&lock.module).chain(scripts().map(|script| &script.module)) {
        let mut found = Some(PythonModule::Namespace { folders: vec![site.clone()] });
        for part in module.split('.') {
            let folders = match found {
                Some(PythonModule::Package { folder, .. }) => vec![folder],
                Some(PythonModule::Namespace { folders }) => folders,
                _ => Vec::new(),
            };
            let entries: Vec<PathEntryOrigin> =
                folders.into_iter().map(PathEntryOrigin::Plain).collect();
            let path = SearchPath::new(root, &python, &entries);
            found = python::find(root, &python, &path, part)?;
        }
        if found.is_none() {
            return Err(bad_component(format!("no wheel has the module {module}")));
        }
    }
    let bin = ApiDir::for_reading(root).version(folder).join(bundle::component::BIN);
    match scripts().find(|script| !bin.join(&script.name).is_file()) {
        Some(script) => Err(bad_component(format!("no wheel has the program {}", script.name))),
        None => Ok(()),
    }
}
