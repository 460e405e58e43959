//! The record of the chosen API, and of a change that is not confirmed yet.

use bundle::component::ComponentLock;
pub use contract::answer::KnownGoodApi;
use serde::{Deserialize, Serialize};

use super::{ApiDir, failed, is_version};
use crate::durable;
use crate::refusal::Result;

/// The recorded state, besides the versions themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ApiState {
    /// The API that is to serve; `None`: the built-in API.
    pub chosen: Option<String>,
    /// The versions that were healthy, the latest first.
    pub good: Vec<KnownGoodApi>,
    /// A change that has begun but is not confirmed: from `chosen` to this.
    pub trial: Option<ApiTrial>,
}

/// A change under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiTrial {
    /// The directory that is to serve; `None`: the built-in API.
    pub to: Option<String>,
}

impl ApiState {
    fn path(place: &ApiDir<'_>) -> std::path::PathBuf {
        place.folder().join(".state.json")
    }

    /// Reads the state. If the file is missing or damaged, the link's target is the chosen API.
    pub(super) fn read(place: &ApiDir<'_>) -> Self {
        let mut state: Self = match durable::read_json(&Self::path(place)) {
            Ok(Some(state)) => state,
            _ => Self { chosen: place.serving(), ..Self::default() },
        };
        // The state names directories: names of other directories are never used.
        state.chosen = state.chosen.filter(|name| is_version(name));
        state.good.retain(|good| is_version(&good.folder));
        state
    }

    /// Whether everything in the state exists on `data`.
    pub(super) fn is_kept(&self, place: &ApiDir<'_>) -> bool {
        let kept: Option<Self> = durable::read_json(&Self::path(place)).ok().flatten();
        kept.as_ref() == Some(self)
    }

    /// Writes the state.
    ///
    /// # Errors
    /// `io`.
    pub(super) fn write(&self, place: &ApiDir<'_>) -> Result<()> {
        let path = Self::path(place);
        durable::write_json_with(place.files, &path, self).map_err(failed("writing", &path))
    }
}

/// The lock of an installed API, or why it cannot be read.
pub(super) fn read_lock(place: &ApiDir<'_>, folder: &str) -> Result<ComponentLock, String> {
    let path = place.version(folder).join(bundle::component::LOCK_ROLE);
    match durable::read(&path) {
        Ok(Some(json)) => ComponentLock::parse(&json).map_err(|error| error.to_string()),
        Ok(None) => Err(format!("{} does not exist", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}
