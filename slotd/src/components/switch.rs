//! The change from one API to another: recorded, made by one rename, confirmed when the new API is healthy, and rolled
//! back otherwise. The next start rolls back a change that is recorded but not confirmed.

use std::io;
use std::time::{Duration, Instant};

pub use contract::answer::ApiRollback;
use serde_json::json;

use super::service::{self, ApiChecks, HealthTimes};
use super::state::{self, ApiState, ApiTrial};
use super::{ApiDir, NEW, failed, retention, settle};
use crate::builtin::BuiltInApi;
use crate::events::EventLog;
use crate::files::FileChanges;
use crate::provision;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// Lets `folder` serve, or the built-in API if there is none: one rename, or one removal.
///
/// # Errors
/// `io`.
pub(super) fn point_link_to(place: &ApiDir<'_>, folder: Option<&str>) -> Result<()> {
    let current = place.current();
    if place.serving().as_deref() == folder && current.is_symlink() == folder.is_some() {
        return Ok(());
    }
    match folder {
        Some(folder) => {
            let new = place.folder().join(format!("current{NEW}"));
            place.clear(&new)?;
            let to = std::path::Path::new(folder);
            place.files.symlink(to, &new).map_err(failed("linking", &new))?;
            place.files.replace(&new, &current).map_err(failed("renaming", &new))?;
        }
        // Not a link, so slotd did not make it: foreign files are never removed.
        None if current.is_dir() && !current.is_symlink() => {
            return Err(failed("removing", &current)(io::ErrorKind::IsADirectory.into()));
        }
        None => place.clear(&current)?,
    }
    place.flush(place.folder())
}

/// Changes from the chosen API to `to`, whose directory is complete. Returns how long no API answered.
///
/// # Errors
/// `api-unhealthy`, and all refusals of provisioning: the previous API serves again. `io`.
pub(super) fn switch_to(
    root: &RootDir,
    events: &EventLog,
    place: &ApiDir<'_>,
    to: Option<&str>,
    patience: HealthTimes,
    confirm: impl FnOnce(&mut ApiState),
) -> Result<Duration> {
    let watch = ApiChecks::new(root);
    let mut state = ApiState::read(place);
    let before = state.clone();
    state.trial = Some(ApiTrial { to: to.map(str::to_owned) });
    state.write(place)?;
    let result = try_it(root, events, place, to, &watch, patience).and_then(|down| {
        let mut confirmed =
            ApiState { chosen: to.map(str::to_owned), trial: None, ..before.clone() };
        confirm(&mut confirmed);
        confirmed.write(place)?;
        Ok(down)
    });
    if let Err(refusal) = &result {
        take_back(root, events, place, &before, refusal);
    }
    result
}

fn try_it(
    root: &RootDir,
    events: &EventLog,
    place: &ApiDir<'_>,
    to: Option<&str>,
    watch: &ApiChecks,
    patience: HealthTimes,
) -> Result<Duration> {
    // If the power fails now, the next start must not assume that `/data/system` still belongs to the old API.
    provision::forget(root, place.files)?;
    point_link_to(place, to)?;
    provision::run_with(root, events, place.files)?;
    let started = Instant::now();
    let unhealthy = |why: String| {
        Refusal::new(
            "api-unhealthy",
            format!("the API does not start: {why}"),
            "see `journalctl -u slipway-api`; the previous API serves again",
        )
    };
    service::restart_services(root).map_err(unhealthy)?;
    let restarted = started.elapsed();
    let well = watch.wait(root, patience).map_err(unhealthy)?;
    Ok(restarted + well)
}

/// Lets the previously chosen API serve again, however much of the change was recorded. A failure here is logged: the
/// next start tries again.
fn take_back(
    root: &RootDir,
    events: &EventLog,
    place: &ApiDir<'_>,
    before: &ApiState,
    why: &Refusal,
) {
    events.add("api-taken-back", json!({ "serves": before.chosen, "why": why }));
    let done = settle::choose_api(root, place, before).and_then(|decided| {
        point_link_to(place, decided.serves.as_deref())?;
        provision::run_with(root, events, place.files)?;
        ApiState { trial: None, ..before.clone() }.write(place)
    });
    if let Err(refusal) = done {
        events.add("api-not-taken-back", json!(refusal));
    }
    if let Err(why) = service::restart_services(root) {
        events.add("api-not-restarted", json!({ "why": why }));
    }
}

/// Goes back to the last good API before this one, or to the built-in API, with every change on `data` made through
/// `files`. The caller was admitted.
///
/// # Errors
/// `no-other-api`, `api-unhealthy`, `io`.
pub fn roll_back(
    root: &RootDir,
    events: &EventLog,
    files: &dyn FileChanges,
) -> Result<ApiRollback> {
    settle(root, events, files)?;
    let place = ApiDir::new(root, files);
    let state = ApiState::read(&place);
    let Some(chosen) = &state.chosen else {
        return Err(Refusal::new(
            "no-other-api",
            "the system's built-in API serves: there is no earlier API to go back to",
            "install a bundle with the component api",
        ));
    };
    let base = BuiltInApi::read(root)?;
    let at = state.good.iter().position(|good| good.folder == *chosen);
    let fits = |folder: &str| {
        let lock = state::read_lock(&place, folder).ok();
        lock.zip(base.as_ref()).is_some_and(|(lock, base)| base.misfit(root, &lock).is_none())
    };
    let before = state.good.iter().skip(at.map_or(0, |at| at + 1));
    let to = before.clone().find(|good| good.folder != *chosen && fits(&good.folder));
    let folder = to.map(|good| good.folder.as_str());
    let down = switch_to(root, events, &place, folder, HealthTimes::for_robot(root), |_| {})?;
    retention::remove_unneeded(root, &place, events);
    let back = ApiRollback {
        component: bundle::component::API.to_owned(),
        version: to.map(|good| good.version.clone()),
        down_ms: whole_millis(down),
    };
    events.add("api-went-back", json!(back));
    Ok(back)
}

/// Whole milliseconds.
pub(super) fn whole_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
