//! The API's status, for `slotd status`.

pub use contract::answer::{ApiStatus as Status, Serves};

use super::Place;
use super::settle::{decide, last};
use super::state::{self, State};
use crate::builtin::BuiltIn;
use crate::root::Root;

/// The API's status; `None` on a system without an API.
pub fn status(root: &Root) -> Option<Status> {
    let base = BuiltIn::read(root).ok().flatten()?;
    let place = Place::of(root);
    let state = State::read(&place);
    let served = place.serving();
    let lock = served.as_deref().and_then(|folder| state::lock(&place, folder).ok());
    let good = state.good.iter().find(|good| Some(&good.folder) == served.as_ref());
    let taken_back = last(root).and_then(|settled| settled.taken_back);
    let set_aside = decide(root, &place, &state).ok().and_then(|decided| decided.set_aside);
    let why = match (&lock, &state.trial, set_aside) {
        (_, Some(_), _) => "a change is in progress and not confirmed yet".to_owned(),
        (None, None, Some(why)) => format!("the installed API is set aside: {why}"),
        (_, None, _) if taken_back.is_some() => {
            "the power failed before a change was confirmed: the change was rolled back".to_owned()
        }
        (Some(_), None, _) => "an API is installed and fits this system".to_owned(),
        (None, None, None) => "no API is installed".to_owned(),
    };
    Some(Status {
        package: base.package.clone(),
        serves: if lock.is_some() { Serves::Installed } else { Serves::BuiltIn },
        version: lock.map_or_else(|| base.version.clone(), |lock| lock.version),
        built_in: base.version.clone(),
        why,
        manifest: good.map(|good| good.manifest.clone()),
        pending: state.trial.is_some(),
        good: state.good,
    })
}
