//! Runs early in every start, before anything uses the API: rolls back a change that was not confirmed, and lets the
//! installed API serve only if it fits this system. So a base update can fall back to its built-in API, and after a
//! rollback the old base finds the API that it had.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::state::{self, ApiState};
use super::switch::point_link_to;
use super::{ApiDir, retention};
use crate::builtin::BuiltInApi;
use crate::durable;
use crate::events::EventLog;
use crate::files::FileChanges;
use crate::refusal::Result;
use crate::root::RootDir;

/// Which API is to serve, and why it is not the chosen one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SettledApi {
    /// The directory of the API that serves; `None`: the built-in API.
    pub serves: Option<String>,
    /// Why the chosen API does not serve.
    pub set_aside: Option<String>,
    /// The directory of a change that was rolled back, because the power failed before it was confirmed; empty for the
    /// built-in API.
    pub taken_back: Option<String>,
}

/// Which API is to serve. Nothing is changed.
///
/// # Errors
/// `bad-device`, `io`.
pub(super) fn choose_api(
    root: &RootDir,
    place: &ApiDir<'_>,
    state: &ApiState,
) -> Result<SettledApi> {
    let Some(chosen) = state.chosen.clone() else { return Ok(SettledApi::default()) };
    let misfit = match (BuiltInApi::read(root)?, state::read_lock(place, &chosen)) {
        (None, _) => Some("this system has no API".to_owned()),
        (_, Err(why)) => Some(format!("the installed API is damaged: {why}")),
        (Some(base), Ok(lock)) => base.misfit(root, &lock),
    };
    let serves = misfit.is_none().then_some(chosen);
    Ok(SettledApi { serves, set_aside: misfit, taken_back: None })
}

/// Points the link to the API that is to serve, with every change on `data` made through `files`. Writes the result
/// to `/run/slotd/api.json`, for `status`.
///
/// # Errors
/// `io`: `data` is read-only; the API that the link points to serves.
pub fn settle(root: &RootDir, events: &EventLog, files: &dyn FileChanges) -> Result<SettledApi> {
    let place = ApiDir::new(root, files);
    if !place.folder().is_dir() {
        return Ok(SettledApi::default());
    }
    let mut state = ApiState::read(&place);
    if !state.is_kept(&place) {
        // Before the link is removed, which is the only record of it.
        state.write(&place)?;
    }
    let mut settled = choose_api(root, &place, &state)?;
    let trial = state.trial.take();
    settled.taken_back = trial.as_ref().map(|trial| trial.to.clone().unwrap_or_default());
    let before = place.serving();
    if before != settled.serves || settled.taken_back.is_some() {
        events.add("api-settled", json!({ "before": before, "settled": settled }));
    }
    point_link_to(&place, settled.serves.as_deref())?;
    if trial.is_some() {
        // Last: until then the next start rolls it back again.
        state.write(&place)?;
    }
    retention::remove_unfinished(&place)?;
    let path = settled_path(root);
    if let Err(error) = durable::write_json(&path, &settled) {
        events.add("not-recorded", json!({ "error": error.to_string() }));
    }
    Ok(settled)
}

fn settled_path(root: &RootDir) -> std::path::PathBuf {
    root.run().join("api.json")
}

/// The result of the last start; `None` when it was not recorded.
pub(super) fn last_settled(root: &RootDir) -> Option<SettledApi> {
    durable::read_json(&settled_path(root)).ok().flatten()
}
