//! What was decided about the API, and a change that is not confirmed yet.

use bundle::component::Lock;
pub use contract::answer::GoodApi as Good;
use serde::{Deserialize, Serialize};

use super::{Place, failed, is_version};
use crate::durable;
use crate::refusal::Result;

/// What is remembered, beside the versions themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct State {
    /// The API that is to serve; `None`: the base's own.
    pub chosen: Option<String>,
    /// Those that were healthy, the last one first.
    pub good: Vec<Good>,
    /// A change that was begun and not confirmed: from `chosen` to this.
    pub trial: Option<Trial>,
}

/// A change under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trial {
    /// The folder that is to serve; `None`: the base's own.
    pub to: Option<String>,
}

impl State {
    fn path(place: &Place<'_>) -> std::path::PathBuf {
        place.folder().join(".state.json")
    }

    /// What is remembered. Without it, or when it is damaged, the link is what was decided.
    pub(super) fn read(place: &Place<'_>) -> Self {
        let mut state: Self = match durable::read_json(&Self::path(place)) {
            Ok(Some(state)) => state,
            _ => Self { chosen: place.serving(), ..Self::default() },
        };
        // It names folders: nothing outside of ours is ever touched because of it.
        state.chosen = state.chosen.filter(|name| is_version(name));
        state.good.retain(|good| is_version(&good.folder));
        state
    }

    /// Whether what is remembered is on `data` in full.
    pub(super) fn is_kept(&self, place: &Place<'_>) -> bool {
        let kept: Option<Self> = durable::read_json(&Self::path(place)).ok().flatten();
        kept.as_ref() == Some(self)
    }

    /// Keeps it.
    ///
    /// # Errors
    /// `io`.
    pub(super) fn write(&self, place: &Place<'_>) -> Result<()> {
        let path = Self::path(place);
        durable::write_json_with(place.files, &path, self).map_err(failed("writing", &path))
    }
}

/// The lock of an installed API; why there is none.
pub(super) fn lock(place: &Place<'_>, folder: &str) -> Result<Lock, String> {
    let path = place.version(folder).join(bundle::component::LOCK_ROLE);
    match durable::read(&path) {
        Ok(Some(json)) => Lock::parse(&json).map_err(|error| error.to_string()),
        Ok(None) => Err(format!("{} is not there", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}
