//! Early in every start, before anything uses the API: a change that was not confirmed is taken back, and
//! the installed API serves only if it fits this system. A base update can so fall back to its own API, and
//! a base that comes back finds the API that it had.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::state::{self, State};
use super::switch::point;
use super::{Place, retention};
use crate::builtin::BuiltIn;
use crate::durable;
use crate::events::Events;
use crate::files::Files;
use crate::refusal::Result;
use crate::root::Root;

/// What is to serve, and why it is not what was chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settled {
    /// The folder of the API that serves; `None`: the base's own.
    pub serves: Option<String>,
    /// Why the one that was chosen does not serve.
    pub set_aside: Option<String>,
    /// The folder of a change that was taken back, because the power went before it was confirmed; empty
    /// for the base's own.
    pub taken_back: Option<String>,
}

/// What is to serve by what was decided: nothing is changed.
///
/// # Errors
/// `bad-device`, `io`.
pub(super) fn decide(root: &Root, place: &Place<'_>, state: &State) -> Result<Settled> {
    let Some(chosen) = state.chosen.clone() else { return Ok(Settled::default()) };
    let misfit = match (BuiltIn::read(root)?, state::lock(place, &chosen)) {
        (None, _) => Some("this system has no API".to_owned()),
        (_, Err(why)) => Some(format!("it is damaged: {why}")),
        (Some(base), Ok(lock)) => base.misfit(root, &lock),
    };
    let serves = misfit.is_none().then_some(chosen);
    Ok(Settled { serves, set_aside: misfit, taken_back: None })
}

/// Brings the link to what is to serve, with every change on `data` made through `files`. What it did is left in
/// `/run/slotd/api.json`, for `status`.
///
/// # Errors
/// `io`: `data` refuses writes; whatever the link leads to serves.
pub fn settle(root: &Root, events: &Events, files: &dyn Files) -> Result<Settled> {
    let place = Place::new(root, files);
    if !place.folder().is_dir() {
        return Ok(Settled::default());
    }
    let mut state = State::read(&place);
    if !state.is_kept(&place) {
        // Before the link goes, by which alone it is known.
        state.write(&place)?;
    }
    let mut settled = decide(root, &place, &state)?;
    let trial = state.trial.take();
    settled.taken_back = trial.as_ref().map(|trial| trial.to.clone().unwrap_or_default());
    let before = place.serving();
    if before != settled.serves || settled.taken_back.is_some() {
        events.add("api-settled", json!({ "before": before, "settled": settled }));
    }
    point(&place, settled.serves.as_deref())?;
    if trial.is_some() {
        // Last: until then the next start takes it back again.
        state.write(&place)?;
    }
    retention::sweep(&place)?;
    let path = file(root);
    if let Err(error) = durable::write_json(&path, &settled) {
        events.add("not-recorded", json!({ "error": error.to_string() }));
    }
    Ok(settled)
}

fn file(root: &Root) -> std::path::PathBuf {
    root.run().join("api.json")
}

/// What the last start has settled; `None` when nobody said.
pub(super) fn last(root: &Root) -> Option<Settled> {
    durable::read_json(&file(root)).ok().flatten()
}
