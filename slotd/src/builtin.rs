//! The API that is built into the image: its description in `api.toml`, and the environment in which it runs.

use std::fs;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

pub use contract::api_file::{ApiFile, ApiWheel};

use crate::python::{Interpreter, PathEntryOrigin, SearchPath};
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// What `api.toml` says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltInApi(ApiFile);

impl Deref for BuiltInApi {
    type Target = ApiFile;

    fn deref(&self) -> &ApiFile {
        &self.0
    }
}

impl BuiltInApi {
    /// Reads `api.toml`. `None`: this product has no API.
    ///
    /// # Errors
    /// `bad-api`: the file is invalid. `io`.
    pub fn read(root: &RootDir) -> Result<Option<Self>> {
        let path = root.api_file();
        let Some(text) = read(&path)? else { return Ok(None) };
        let bad = |why: String| {
            Refusal::new("bad-api", format!("{}: {why}", path.display()), crate::NEWER_IMAGE)
        };
        let api = ApiFile::parse(&text).map_err(|error| bad(error.message().to_owned()))?;
        if Interpreter::parse(&api.python).is_none() {
            return Err(bad(format!(
                "invalid `python` version `{}`, expected a version such as 3.11",
                api.python
            )));
        }
        if !api.site_packages.is_absolute()
            || api.module.is_empty()
            || api.module.contains(['.', '/'])
        {
            return Err(bad(
                "`site-packages` must be an absolute path, and `module` a single name".to_owned(),
            ));
        }
        Ok(Some(Self(api)))
    }

    /// The interpreter.
    ///
    /// # Errors
    /// `bad-api`.
    pub fn interpreter(&self) -> Result<Interpreter> {
        Interpreter::parse(&self.python).ok_or_else(|| {
            Refusal::new(
                "bad-api",
                format!("invalid Python version `{}`", self.python),
                crate::NEWER_IMAGE,
            )
        })
    }

    /// Where the API server's Python looks for modules: the paths in `api.env`, the standard library, the image's
    /// site directories.
    ///
    /// # Errors
    /// `bad-api`, `io`.
    pub fn search_path(&self, root: &RootDir) -> Result<SearchPath> {
        let python = self.interpreter()?;
        let Interpreter { major, minor, .. } = python;
        let first = read_variable(root, "PYTHONPATH")?.unwrap_or_default();
        let mut entries: Vec<PathEntryOrigin> = first
            .split(':')
            .filter(|entry| !entry.is_empty())
            .map(|entry| PathEntryOrigin::Plain(PathBuf::from(entry)))
            .collect();
        // `prefix` is /usr for every interpreter of a system (`Modules/getpath.py`).
        for library in [
            format!("/usr/lib/python{major}{minor}.zip"),
            format!("/usr/lib/python{major}.{minor}"),
            format!("/usr/lib/python{major}.{minor}/lib-dynload"),
        ] {
            entries.push(PathEntryOrigin::Plain(PathBuf::from(library)));
        }
        entries.push(PathEntryOrigin::Site(self.site_packages.clone()));
        // Debian's own modules come after the separately installed ones (`getsitepackages` in its site.py).
        if self.site_packages.file_name().is_some_and(|name| name == "dist-packages") {
            entries.push(PathEntryOrigin::Site(
                format!("/usr/lib/python{major}/dist-packages").into(),
            ));
        }
        Ok(SearchPath::new(root, &python, &entries))
    }
}

/// A variable of `api.env`, the environment of the API's services.
///
/// # Errors
/// `io`.
pub fn read_variable(root: &RootDir, name: &str) -> Result<Option<String>> {
    let text = read(&root.path("usr/lib/slipway/api.env"))?.unwrap_or_default();
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
    // As in systemd and the shell, the last one applies.
    Ok(text.lines().rev().find_map(value))
}

/// A text of the image; `None` when there is none.
pub(crate) fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Refusal::io(format!("reading {}", path.display()), &error)),
    }
}
