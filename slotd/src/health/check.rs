//! Declared checks: one TOML file each in `/etc/slotd/health.d`, named after what it checks.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ureq::http::Uri;

use super::probe;
use crate::root::Root;

/// The directory of the checks: part of the image, and so of the version on trial.
const FOLDER: &str = "etc/slotd/health.d";

/// Default timeout of a check in seconds.
const TIMEOUT: u64 = 10;

/// Maximum timeout of a check in seconds.
const LONGEST_TIMEOUT: u64 = 120;

/// A check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The file's name without its ending.
    pub name: String,
    /// What it checks; or why its file is invalid, which makes a check that never passes.
    pub kind: Result<Kind, String>,
    /// Its timeout.
    pub timeout: Duration,
}

/// What a check examines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A unit of systemd is active.
    Unit(String),
    /// An address of this machine answers with this status.
    Http {
        /// `http://127.0.0.1:31950/health`.
        url: String,
        /// The expected status code.
        status: u16,
    },
    /// A program exits with 0.
    Command(Vec<String>),
    /// A file system has this many bytes free.
    Space {
        /// Any path on it.
        path: PathBuf,
        /// Bytes.
        free: u64,
    },
    /// Every unit that starts with the system has started or failed. This check always runs.
    Startup,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// The check's name.
    pub name: String,
    /// Whether the check passed.
    pub healthy: bool,
    /// What was found, human-readable.
    pub found: String,
}

/// A check's file.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    #[serde(default)]
    timeout_seconds: Option<u64>,
    unit: Option<Unit>,
    http: Option<Http>,
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
struct Http {
    url: String,
    #[serde(default = "ok")]
    status: u16,
}

fn ok() -> u16 {
    200
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

impl Check {
    /// Runs the check once.
    pub fn run(&self, root: &Root) -> Outcome {
        let result = match &self.kind {
            Ok(kind) => probe::run(root, kind, self.timeout),
            Err(why) => Err(why.clone()),
        };
        let (healthy, found) = match result {
            Ok(found) => (true, found),
            Err(found) => (false, found),
        };
        Outcome { name: self.name.clone(), healthy, found }
    }
}

/// All checks of this system: first that it has started, then the declared ones by name. An invalid file
/// is a check that fails: a version with a broken check must not be kept.
pub fn load(root: &Root) -> Vec<Check> {
    let startup = Check {
        name: "startup".to_owned(),
        kind: Ok(Kind::Startup),
        timeout: Duration::from_secs(TIMEOUT),
    };
    let mut checks = vec![startup];
    let folder = root.path(FOLDER);
    let broken = |name: &str, why: String| Check {
        name: name.to_owned(),
        kind: Err(why),
        timeout: Duration::from_secs(TIMEOUT),
    };
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return checks,
        Err(error) => {
            checks.push(broken("health.d", format!("reading {}: {error}", folder.display())));
            return checks;
        }
    };
    let mut files = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => files.push(entry.path()),
            Err(error) => checks.push(broken("health.d", error.to_string())),
        }
    }
    files.sort();
    for path in files.iter().filter(|path| path.extension().is_some_and(|e| e == "toml")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        checks.push(match text.and_then(|text| parse(&text)) {
            Ok((kind, timeout)) => Check { name: name.into_owned(), kind: Ok(kind), timeout },
            Err(why) => broken(&name, format!("{}: {why}", path.display())),
        });
    }
    checks
}

fn parse(text: &str) -> Result<(Kind, Duration), String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string().replace('\n', " "))?;
    let timeout = file.timeout_seconds.unwrap_or(TIMEOUT);
    if !(1..=LONGEST_TIMEOUT).contains(&timeout) {
        return Err(format!("`timeout-seconds` is {timeout}, expected 1 to {LONGEST_TIMEOUT}"));
    }
    let kind = match (file.unit, file.http, file.command, file.space) {
        (Some(unit), None, None, None) if !unit.name.starts_with('-') => Kind::Unit(unit.name),
        (None, Some(http), None, None) => {
            local(&http.url)?;
            Kind::Http { url: http.url, status: http.status }
        }
        (None, None, Some(command), None) if !command.run.is_empty() => Kind::Command(command.run),
        (None, None, None, Some(space)) if space.path.is_absolute() => Kind::Space {
            path: space.path,
            free: space.free_mib.checked_mul(1 << 20).ok_or("`free-mib` is too large")?,
        },
        _ => {
            let forms =
                "[unit] name, [http] url, [command] run, [space] path (absolute) and free-mib";
            return Err(format!("expected exactly one of {forms}"));
        }
    };
    Ok((kind, Duration::from_secs(timeout)))
}

/// Refuses every address that is not this machine's: a robot has no internet, and a check that depends on
/// another machine would roll back a good update when that machine is off.
fn local(url: &str) -> Result<(), String> {
    let uri: Uri = url.parse().map_err(|error| format!("`{url}` is not an address: {error}"))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let here = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    if uri.scheme_str() != Some("http") || !here {
        return Err(format!(
            "`{url}` is not an http:// address of this machine (127.0.0.1, [::1])"
        ));
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read() {
        let cases = [
            ("[unit]\nname = \"ssh.service\"", Kind::Unit("ssh.service".into())),
            (
                "[http]\nurl = \"http://[::1]:80/x\"\nstatus = 204",
                Kind::Http { url: "http://[::1]:80/x".into(), status: 204 },
            ),
            (
                "[command]\nrun = [\"/bin/true\", \"x\"]",
                Kind::Command(vec!["/bin/true".into(), "x".into()]),
            ),
            (
                "[space]\npath = \"/data\"\nfree-mib = 2",
                Kind::Space { path: "/data".into(), free: 2 << 20 },
            ),
        ];
        for (text, kind) in cases {
            assert_eq!(parse(text), Ok((kind, Duration::from_secs(10))), "{text}");
        }
        let slow = parse("timeout-seconds = 30\n[unit]\nname = \"a\"").unwrap();
        assert_eq!(slow.1, Duration::from_secs(30));
    }

    #[test]
    fn what_makes_no_sense_is_a_check_that_fails() {
        let cases = [
            ("", "exactly one"),
            ("[unit]\nname = \"a\"\n[command]\nrun = [\"b\"]", "exactly one"),
            ("[command]\nrun = []", "exactly one"),
            ("[unit]\nname = \"--help\"", "exactly one"),
            ("[space]\npath = \"data\"\nfree-mib = 1", "exactly one"),
            ("[unit]\nname = \"a\"\nstate = \"b\"", "unknown field"),
            ("timeout-seconds = 0\n[unit]\nname = \"a\"", "expected 1 to 120"),
            ("[http]\nurl = \"http://example.org/\"", "of this machine"),
            ("[http]\nurl = \"https://localhost/\"", "of this machine"),
            ("[http]\nurl = \"http://127.0.0.1.example.org/\"", "of this machine"),
            ("[http]\nurl = \"http://user@10.0.0.1/\"", "of this machine"),
        ];
        for (text, expected) in cases {
            let why = parse(text).unwrap_err();
            assert!(why.contains(expected), "{text}: {why}");
        }
    }

    #[test]
    fn checks_come_by_name_after_the_start_itself() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        assert_eq!(load(&root).len(), 1);
        let folder = root.path(FOLDER);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("20-b.toml"), "[unit]\nname = \"b.service\"").unwrap();
        fs::write(folder.join("10-a.toml"), "nonsense").unwrap();
        fs::write(folder.join("README"), "no check").unwrap();
        let checks = load(&root);
        let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, ["startup", "10-a", "20-b"]);
        assert!(!checks[1].run(&root).healthy);
    }
}
