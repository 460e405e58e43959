//! A declared health check: one TOML file each in `/etc/slotd/health.d`, named after what it checks.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The directory of the checks: part of the image, and so of the version on trial.
pub const FOLDER: &str = "etc/slotd/health.d";

/// Default timeout of a check.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum timeout of a check.
pub const LONGEST_TIMEOUT: Duration = Duration::from_secs(120);

/// What a check examines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckTarget {
    /// A unit of systemd is active.
    Unit(String),
    /// An address answers. The agent refuses every address that is not this machine's.
    Http(HttpCheck),
    /// A program exits with 0: its path and its arguments.
    Command(Vec<String>),
    /// A file system has this many bytes free.
    Space {
        /// Any absolute path on it.
        path: PathBuf,
        /// Bytes.
        free: u64,
    },
}

/// An address that must answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HttpCheck {
    /// Such as `http://127.0.0.1:31950/health`.
    pub url: String,
    /// The expected status code.
    #[serde(default = "default_status")]
    pub status: u16,
}

fn default_status() -> u16 {
    200
}

/// A check's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthFile {
    /// What it checks.
    pub target: CheckTarget,
    /// Its timeout.
    pub timeout: Duration,
}

/// The file's format: exactly one of the tables. Unknown keys are refused: an invalid check is one that fails.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Form {
    #[serde(default)]
    timeout_seconds: Option<u64>,
    unit: Option<Unit>,
    http: Option<HttpCheck>,
    command: Option<Command>,
    space: Option<Space>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unit {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Command {
    run: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Space {
    path: PathBuf,
    free_mib: u64,
}

impl HealthFile {
    /// Reads a check's text.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let form: Form =
            toml::from_str(text).map_err(|error| error.to_string().replace('\n', " "))?;
        let (seconds, longest) =
            (form.timeout_seconds.unwrap_or(TIMEOUT.as_secs()), LONGEST_TIMEOUT.as_secs());
        if !(1..=longest).contains(&seconds) {
            return Err(format!("`timeout-seconds` is {seconds}, expected 1 to {longest}"));
        }
        let target = match (form.unit, form.http, form.command, form.space) {
            (Some(unit), None, None, None) if !unit.name.starts_with('-') => {
                CheckTarget::Unit(unit.name)
            }
            (None, Some(http), None, None) => CheckTarget::Http(http),
            (None, None, Some(command), None) if !command.run.is_empty() => {
                CheckTarget::Command(command.run)
            }
            (None, None, None, Some(space)) if space.path.is_absolute() => CheckTarget::Space {
                path: space.path,
                free: space.free_mib.checked_mul(1 << 20).ok_or("`free-mib` is too large")?,
            },
            _ => {
                let forms =
                    "[unit] name, [http] url, [command] run, [space] path (absolute) and free-mib";
                return Err(format!("expected exactly one of {forms}"));
            }
        };
        Ok(Self { target, timeout: Duration::from_secs(seconds) })
    }

    /// The address that a check's text names, if it names one; all other keys are ignored. For `run --local`, which only
    /// waits for addresses: it must not refuse an image for a check that it does not run.
    ///
    /// # Errors
    /// What is wrong and where: invalid TOML, or an invalid address.
    pub fn parse_address(text: &str) -> Result<Option<HttpCheck>, toml::de::Error> {
        #[derive(Deserialize)]
        struct Addresses {
            http: Option<HttpCheck>,
        }
        toml::from_str::<Addresses>(text).map(|form| form.http)
    }
}
