//! Why something was not done: a stable code for programs, a sentence and what to do for people.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The result of everything that can be refused.
pub type Result<T, E = Refusal> = std::result::Result<T, E>;

/// Whose matter a refusal is. The number is the exit code of `slotd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matter {
    /// The robot itself fails: its disk, its image, its agent.
    Robot = 1,
    /// The bundle or the key set is not one that this robot takes, now or ever.
    Bundle = 3,
    /// The robot's state does not allow it at this moment.
    State = 4,
    /// What the bundle is read from fails.
    Source = 5,
}

/// Every code there is, whose matter it is, and what it means. Codes are part of the interface: they
/// are never reused for another meaning. Those of the crate `bundle` keep theirs.
pub const CODES: &[(&str, Matter, &str)] = &[
    ("bad-api", Matter::Robot, "`api.toml` is malformed, or lacks something"),
    ("bad-device", Matter::Robot, "`device.toml` is missing, malformed, or lacks something"),
    ("bad-migration", Matter::Robot, "a declared step between versions of data makes no sense"),
    ("bad-resources", Matter::Robot, "the API's resources hold what no package should have"),
    ("boot-state", Matter::Robot, "the boot state cannot be written, or is not what was written"),
    ("internal", Matter::Robot, "a mistake in the agent"),
    ("io", Matter::Robot, "reading or writing the robot's own disk fails"),
    ("key-set", Matter::Robot, "a key set cannot be read, or would leave no key"),
    ("migration-failed", Matter::Robot, "a step between versions of data fails; it is put back"),
    ("misuse", Matter::Robot, "a mistake in the agent"),
    ("no-keys", Matter::Robot, "the robot trusts no key: nothing can be installed"),
    ("no-package", Matter::Robot, "Python would not find the API's package"),
    ("no-tryboot", Matter::Robot, "the firmware does not do what its boot flow needs"),
    ("old-eeprom", Matter::Robot, "the boot loader in the EEPROM is too old for trials"),
    ("read-back", Matter::Robot, "the slot does not hold what was written to it"),
    ("restart", Matter::Robot, "all is done, but the restart cannot be started"),
    ("unknown-slot", Matter::Robot, "the root file system is on no slot of this product"),
    ("watchdog", Matter::Robot, "systemd does not take the watchdog over after a commit"),
    ("wrong-layout", Matter::Robot, "the disk is not partitioned as `device.toml` says"),
    ("bad-frame", Matter::Bundle, "a frame is not of the format"),
    ("bad-header", Matter::Bundle, "a tar header is not of the format"),
    ("bad-index", Matter::Bundle, "a block index is malformed"),
    ("bad-key", Matter::Bundle, "a key set is malformed"),
    ("bad-length", Matter::Bundle, "a length is above its bound, or differs from the manifest"),
    ("bad-manifest", Matter::Bundle, "the manifest breaks a rule of the format"),
    ("bad-signature", Matter::Bundle, "a signature by a trusted key does not verify"),
    ("bad-signature-file", Matter::Bundle, "a signature file is malformed"),
    ("api-unfit", Matter::Bundle, "the API does not fit this system's Python, platform or minimum"),
    ("bad-component", Matter::Bundle, "a component's lock breaks a rule, or is not its payloads'"),
    ("bad-tree", Matter::Bundle, "a wheel's tree holds what none does"),
    ("below-floor", Matter::Bundle, "the version is below the floor"),
    ("duplicate-member", Matter::Bundle, "a member comes twice"),
    ("frame-length", Matter::Bundle, "a frame yields more or less than the index says"),
    ("incomplete-bundle", Matter::Bundle, "a part of the slot is not in the bundle"),
    ("irregular-member", Matter::Bundle, "a member is not a plain file"),
    ("mixed-bundle", Matter::Bundle, "the bundle has the component `api` and others"),
    ("not-trusted", Matter::Bundle, "no key that counts has signed"),
    ("old-key-set", Matter::Bundle, "the key set is not newer than the robot's"),
    ("too-large", Matter::Bundle, "a payload is larger than its partition"),
    ("trailing-data", Matter::Bundle, "bytes follow where the archive ends"),
    ("unexpected-member", Matter::Bundle, "a member is missing or superfluous"),
    ("unknown-feature", Matter::Bundle, "the bundle requires a feature that the agent lacks"),
    ("unknown-format", Matter::Bundle, "the bundle is of a later format"),
    ("unknown-payload", Matter::Bundle, "a payload has no place in a slot"),
    ("unsafe-name", Matter::Bundle, "a member's name is not allowed"),
    ("wrong-board", Matter::Bundle, "the bundle, or the running image, is for another board"),
    ("wrong-hash", Matter::Bundle, "something does not have the hash that is signed"),
    ("wrong-kind", Matter::Bundle, "a development build on a robot that takes only releases"),
    ("wrong-product", Matter::Bundle, "the bundle is for another product"),
    ("bad-archive", Matter::Source, "a backup is damaged, or holds what no backup does"),
    ("api-differs", Matter::State, "files of an API on data are not what was unpacked"),
    (
        "api-unhealthy",
        Matter::State,
        "the new API does not come up; the one before it serves again",
    ),
    ("bad-seed", Matter::Source, "what the flasher left for the first boot is malformed"),
    ("busy", Matter::State, "another process changes slots"),
    ("cancelled", Matter::State, "the job was cancelled; installing the same bundle again resumes"),
    ("drift", Matter::State, "`/data/system` is not what the API's package asks for"),
    ("half-done", Matter::State, "a restore was interrupted, and goes on with the next restart"),
    ("incomplete-slot", Matter::State, "the other slot holds no complete system"),
    ("newer-data", Matter::State, "data are of a later version, and there is no way back"),
    ("no-archive", Matter::State, "data holds more, or longer names, than could be unpacked again"),
    ("not-offered", Matter::State, "the update user asks for something that is not for it"),
    ("no-data", Matter::State, "data refuses writes, or is not the card's"),
    ("no-job", Matter::State, "no long operation runs, or none has run since the start"),
    ("no-other-api", Matter::State, "the system's own API serves already"),
    (
        "no-space",
        Matter::State,
        "data has no room for a backup, for what it holds, or for an API with its resources",
    ),
    ("not-committed", Matter::State, "the running slot is not the committed one"),
    ("nothing-on-trial", Matter::State, "there is no trial to end"),
    ("slot-differs", Matter::State, "a slot does not hold what the bundle says"),
    ("too-late", Matter::State, "the job has read its bundle and cannot be cancelled any more"),
    ("trial-pending", Matter::State, "a trial is not decided yet"),
    ("unhealthy", Matter::State, "a health check fails"),
    (
        "bad-certificate",
        Matter::Source,
        "over https the server is not believed, or a file of authorities makes no sense",
    ),
    ("source", Matter::Source, "the file, pipe or server of the bundle fails"),
    ("truncated", Matter::Source, "the bundle ends too early"),
];

/// A refusal or a failure: `{"refused": …}` of every answer in JSON. A reader skips what else it says, and takes codes
/// that it does not know: a later agent has more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Stable, in kebab-case, one of [`CODES`]: `wrong-board`.
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

    /// Reading or writing failed; `doing` is a gerund phrase that names what and where.
    pub fn io(doing: impl fmt::Display, error: &std::io::Error) -> Self {
        let help = "see `slotd log` and the kernel's messages; a card that fails must be replaced";
        Self::new("io", format!("{doing}: {error}"), help)
    }

    /// All of it for a terminal: the sentence with its code, and what to do in a line of its own.
    pub fn in_full(&self) -> String {
        format!("{} [{}]\nhelp: {}", self.message, self.code, self.help)
    }

    /// Whose matter it is; the robot's for a code that is not known.
    pub fn matter(&self) -> Matter {
        let known = CODES.iter().find(|(code, _, _)| self.code == *code);
        known.map_or(Matter::Robot, |(_, matter, _)| *matter)
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
