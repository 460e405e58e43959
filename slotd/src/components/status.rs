//! The API's status, for `slotd status`.

pub use contract::answer::{ApiStatus, ServingApi};

use super::ApiDir;
use super::settle::{choose_api, last_settled};
use super::state::{self, ApiState};
use crate::builtin::BuiltInApi;
use crate::root::RootDir;

/// The API's status; `None` on a system without an API.
pub fn status(root: &RootDir) -> Option<ApiStatus> {
    let base = BuiltInApi::read(root).ok().flatten()?;
    let place = ApiDir::for_reading(root);
    let state = ApiState::read(&place);
    let served = place.serving();
    let lock = served.as_deref().and_then(|folder| state::read_lock(&place, folder).ok());
    let good = state.good.iter().find(|good| Some(&good.folder) == served.as_ref());
    let taken_back = last_settled(root).and_then(|settled| settled.taken_back);
    let set_aside = choose_api(root, &place, &state).ok().and_then(|decided| decided.set_aside);
    let why = match (&lock, &state.trial, set_aside) {
        (_, Some(_), _) => "a change is in progress and not confirmed yet".to_owned(),
        (None, None, Some(why)) => format!("the installed API is set aside: {why}"),
        (_, None, _) if taken_back.is_some() => {
            "the power failed before a change was confirmed: the change was rolled back".to_owned()
        }
        (Some(_), None, _) => "an API is installed and fits this system".to_owned(),
        (None, None, None) => "no API is installed".to_owned(),
    };
    Some(ApiStatus {
        package: base.package.clone(),
        serves: if lock.is_some() { ServingApi::Installed } else { ServingApi::BuiltIn },
        version: lock.map_or_else(|| base.version.clone(), |lock| lock.version),
        built_in: base.version.clone(),
        why,
        manifest: good.map(|good| good.manifest.clone()),
        pending: state.trial.is_some(),
        good: state.good,
    })
}
