//! Refusals: a stable machine-readable code, a sentence, and what to do.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The result of everything that can be refused.
pub type Result<T, E = Refusal> = std::result::Result<T, E>;

/// For `map_err`: turns the error of an action on a path into a refusal; `action` is a gerund, such as `reading`.
pub fn failed(action: &str, path: &Path) -> impl Fn(io::Error) -> Refusal + use<> {
    let action = format!("{action} {}", path.display());
    move |error| Refusal::io(&action, &error)
}

/// What a refusal concerns. The number is the exit code of `slotd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// The robot itself: its disk, its image, its agent.
    Robot = 1,
    /// The bundle or the key set: this robot will never accept it.
    Bundle = 3,
    /// The robot's state, which does not allow it at this moment.
    State = 4,
    /// The source of the bundle.
    Source = 5,
}

/// Every code, what it concerns, and what it means. Codes are part of the interface: they are never
/// reused for another meaning. Codes of the crate `bundle` stay the same here.
pub const CODES: &[(&str, RefusalKind, &str)] = &[
    ("bad-api", RefusalKind::Robot, "`api.toml` is malformed, or lacks something"),
    ("bad-device", RefusalKind::Robot, "`device.toml` is missing, malformed, or lacks something"),
    ("bad-migration", RefusalKind::Robot, "a declared step between versions of data is invalid"),
    (
        "bad-resources",
        RefusalKind::Robot,
        "the API's resources have entries that no package may have",
    ),
    (
        "boot-state",
        RefusalKind::Robot,
        "the boot state cannot be written, or reads back differently",
    ),
    ("internal", RefusalKind::Robot, "a bug in the agent"),
    ("io", RefusalKind::Robot, "reading or writing the robot's own disk fails"),
    ("key-set", RefusalKind::Robot, "a key set cannot be read, or would leave no key"),
    (
        "migration-failed",
        RefusalKind::Robot,
        "a step between versions of data failed and was rolled back",
    ),
    ("misuse", RefusalKind::Robot, "a bug in the agent"),
    ("no-keys", RefusalKind::Robot, "the robot trusts no key: nothing can be installed"),
    ("no-package", RefusalKind::Robot, "Python would not find the API's package"),
    ("no-tryboot", RefusalKind::Robot, "the firmware does not support what the boot flow needs"),
    ("old-eeprom", RefusalKind::Robot, "the boot loader in the EEPROM is too old for trials"),
    ("read-back", RefusalKind::Robot, "the slot does not hold what was written to it"),
    ("restart", RefusalKind::Robot, "the work is done, but the restart cannot be started"),
    ("unknown-slot", RefusalKind::Robot, "the root file system is not on a slot of this product"),
    ("watchdog", RefusalKind::Robot, "systemd does not take over the watchdog after a commit"),
    ("wrong-layout", RefusalKind::Robot, "the disk is not partitioned as `device.toml` says"),
    ("bad-frame", RefusalKind::Bundle, "a frame breaks a rule of the format"),
    ("bad-header", RefusalKind::Bundle, "a tar header is invalid"),
    ("bad-index", RefusalKind::Bundle, "a block index is malformed"),
    ("bad-key", RefusalKind::Bundle, "a key set is malformed"),
    (
        "bad-length",
        RefusalKind::Bundle,
        "a length is above its bound, or differs from the manifest",
    ),
    ("bad-manifest", RefusalKind::Bundle, "the manifest breaks a rule of the format"),
    ("bad-signature", RefusalKind::Bundle, "a signature by a trusted key does not verify"),
    ("bad-signature-file", RefusalKind::Bundle, "a signature file is malformed"),
    (
        "api-unfit",
        RefusalKind::Bundle,
        "the API does not fit this system's Python, platform or minimum",
    ),
    (
        "bad-component",
        RefusalKind::Bundle,
        "a component's lock breaks a rule, or does not match its payloads",
    ),
    ("bad-tree", RefusalKind::Bundle, "a wheel's tree has entries that are not allowed"),
    ("below-floor", RefusalKind::Bundle, "the version is below the floor"),
    ("duplicate-member", RefusalKind::Bundle, "a member occurs twice"),
    (
        "frame-length",
        RefusalKind::Bundle,
        "a frame decompresses to more or less than the index says",
    ),
    ("incomplete-bundle", RefusalKind::Bundle, "the bundle lacks a part of the slot"),
    ("irregular-member", RefusalKind::Bundle, "a member is not a regular file"),
    ("mixed-bundle", RefusalKind::Bundle, "the bundle has the component `api` and others"),
    ("not-trusted", RefusalKind::Bundle, "no trusted key has signed the bundle"),
    ("old-key-set", RefusalKind::Bundle, "the key set is not newer than the robot's"),
    ("too-large", RefusalKind::Bundle, "a payload is larger than its partition"),
    ("trailing-data", RefusalKind::Bundle, "there are bytes after the archive's end"),
    ("unexpected-member", RefusalKind::Bundle, "a member is missing or superfluous"),
    ("unknown-feature", RefusalKind::Bundle, "the bundle requires a feature that the agent lacks"),
    ("unknown-format", RefusalKind::Bundle, "the bundle has a later format"),
    ("unknown-payload", RefusalKind::Bundle, "a payload does not belong to a slot"),
    ("unsafe-name", RefusalKind::Bundle, "a member's name is invalid"),
    ("wrong-board", RefusalKind::Bundle, "the bundle, or the running image, is for another board"),
    ("wrong-hash", RefusalKind::Bundle, "data does not match its signed hash"),
    (
        "wrong-kind",
        RefusalKind::Bundle,
        "a development build on a robot that accepts only releases",
    ),
    ("wrong-product", RefusalKind::Bundle, "the bundle is for another product"),
    (
        "bad-archive",
        RefusalKind::Source,
        "a backup is damaged, or has entries that are not allowed",
    ),
    ("api-differs", RefusalKind::State, "files of an API on data differ from what was unpacked"),
    (
        "api-unhealthy",
        RefusalKind::State,
        "the new API does not start; the previous one serves again",
    ),
    ("bad-seed", RefusalKind::Source, "the file with settings for the first boot is malformed"),
    ("busy", RefusalKind::State, "another process is changing slots"),
    (
        "cancelled",
        RefusalKind::State,
        "the job was cancelled; installing the same bundle again resumes",
    ),
    ("drift", RefusalKind::State, "`/data/system` differs from the resources of the API's package"),
    (
        "half-done",
        RefusalKind::State,
        "a restore was interrupted and resumes with the next restart",
    ),
    ("incomplete-slot", RefusalKind::State, "the other slot has no complete system"),
    ("newer-data", RefusalKind::State, "data has a later version and cannot be rolled back"),
    (
        "no-archive",
        RefusalKind::State,
        "data has more entries, or longer names, than could be restored",
    ),
    ("not-offered", RefusalKind::State, "the update user asks for a command that it may not run"),
    ("no-data", RefusalKind::State, "data is read-only, or is not on the card"),
    ("no-job", RefusalKind::State, "no job is running, or there was none since the start"),
    ("no-other-api", RefusalKind::State, "the system's built-in API already serves"),
    (
        "no-space",
        RefusalKind::State,
        "data has no space for a backup, for its content, or for an API with its resources",
    ),
    ("not-committed", RefusalKind::State, "the running slot is not the committed one"),
    ("nothing-on-trial", RefusalKind::State, "there is no trial to end"),
    ("slot-differs", RefusalKind::State, "a slot differs from the bundle"),
    (
        "too-late",
        RefusalKind::State,
        "the job has read its whole bundle and can no longer be cancelled",
    ),
    ("trial-pending", RefusalKind::State, "a trial is still pending"),
    ("unhealthy", RefusalKind::State, "a health check fails"),
    (
        "bad-certificate",
        RefusalKind::Source,
        "the server's certificate is not trusted, or a file with certificate authorities is invalid",
    ),
    ("source", RefusalKind::Source, "the file, pipe or server of the bundle fails"),
    ("truncated", RefusalKind::Source, "the bundle ends too early"),
];

/// A refusal or a failure: `{"refused": …}` of every answer in JSON. A reader skips what else it says, and takes codes
/// that it does not know: a later agent has more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// A stable code in kebab-case, one of [`CODES`]: `wrong-board`.
    pub code: Cow<'static, str>,
    /// What happened: what was being done, what was expected and found.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

impl Refusal {
    /// A refusal with its three parts.
    pub fn new(code: &'static str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { code: Cow::Borrowed(code), message: message.into(), help: help.into() }
    }

    /// Reading or writing failed; `action` is a gerund phrase that names what and where.
    pub fn io(action: impl fmt::Display, error: &io::Error) -> Self {
        let help = "see `slotd log` and the kernel's messages; replace a failing card";
        Self::new("io", format!("{action}: {error}"), help)
    }

    /// The whole refusal for a terminal: the message with its code, and the help on a line of its own.
    pub fn in_full(&self) -> String {
        format!("{} [{}]\nhelp: {}", self.message, self.code, self.help)
    }

    /// What the refusal concerns; [`RefusalKind::Robot`] for an unknown code.
    pub fn kind(&self) -> RefusalKind {
        let known = CODES.iter().find(|(code, _, _)| self.code == *code);
        known.map_or(RefusalKind::Robot, |(_, matter, _)| *matter)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)
    }
}

impl std::error::Error for Refusal {}

impl From<bundle::Error> for Refusal {
    fn from(error: bundle::Error) -> Self {
        Self::new(error.code(), error.to_string(), error.hint())
    }
}
