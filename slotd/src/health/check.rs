//! Declared checks: one TOML file each in `/etc/slotd/health.d`, named after what it checks.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use contract::answer::CheckOutcome;
use contract::health_file::{CheckTarget, FOLDER, HealthFile, TIMEOUT};
use ureq::http::Uri;

use super::probe;
use crate::durable;
use crate::root::RootDir;

/// A check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// The file's name without its ending.
    pub name: String,
    /// What it checks; or why its file is invalid, which makes a check that never passes.
    pub kind: Result<CheckKind, String>,
    /// Its timeout.
    pub timeout: Duration,
}

/// What a check examines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckKind {
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

impl HealthCheck {
    /// Runs the check once.
    pub fn run(&self, root: &RootDir) -> CheckOutcome {
        let result = match &self.kind {
            Ok(kind) => probe::run(root, kind, self.timeout),
            Err(why) => Err(why.clone()),
        };
        let (healthy, found) = match result {
            Ok(found) => (true, found),
            Err(found) => (false, found),
        };
        CheckOutcome { name: self.name.clone(), healthy, found }
    }
}

/// All checks of this system: first that it has started, then the declared ones by name. An invalid file
/// is a check that fails: a version with a broken check must not be kept.
pub fn load_checks(root: &RootDir) -> Vec<HealthCheck> {
    let startup =
        HealthCheck { name: "startup".to_owned(), kind: Ok(CheckKind::Startup), timeout: TIMEOUT };
    let mut checks = vec![startup];
    let folder = root.path(FOLDER);
    let broken = |name: &str, why: String| HealthCheck {
        name: name.to_owned(),
        kind: Err(why),
        timeout: TIMEOUT,
    };
    let files = durable::list(&folder).unwrap_or_else(|error| {
        checks.push(broken("health.d", format!("reading {}: {error}", folder.display())));
        Vec::new()
    });
    for path in files.iter().filter(|path| path.extension().is_some_and(|e| e == "toml")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        checks.push(match text.and_then(|text| parse(&text)) {
            Ok((kind, timeout)) => HealthCheck { name: name.into_owned(), kind: Ok(kind), timeout },
            Err(why) => broken(&name, format!("{}: {why}", path.display())),
        });
    }
    checks
}

fn parse(text: &str) -> Result<(CheckKind, Duration), String> {
    let file = HealthFile::parse(text)?;
    let kind = match file.target {
        CheckTarget::Unit(name) => CheckKind::Unit(name),
        CheckTarget::Http(http) => {
            require_local_address(&http.url)?;
            CheckKind::Http { url: http.url, status: http.status }
        }
        CheckTarget::Command(words) => CheckKind::Command(words),
        CheckTarget::Space { path, free } => CheckKind::Space { path, free },
    };
    Ok((kind, file.timeout))
}

/// Refuses every address that is not this machine's: a robot has no internet, and a check that depends on
/// another machine would roll back a good update when that machine is off.
fn require_local_address(url: &str) -> Result<(), String> {
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
            ("[unit]\nname = \"ssh.service\"", CheckKind::Unit("ssh.service".into())),
            (
                "[http]\nurl = \"http://[::1]:80/x\"\nstatus = 204",
                CheckKind::Http { url: "http://[::1]:80/x".into(), status: 204 },
            ),
            (
                "[command]\nrun = [\"/bin/true\", \"x\"]",
                CheckKind::Command(vec!["/bin/true".into(), "x".into()]),
            ),
            (
                "[space]\npath = \"/data\"\nfree-mib = 2",
                CheckKind::Space { path: "/data".into(), free: 2 << 20 },
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
        let root = RootDir::new(dir.path());
        assert_eq!(load_checks(&root).len(), 1);
        let folder = root.path(FOLDER);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("20-b.toml"), "[unit]\nname = \"b.service\"").unwrap();
        fs::write(folder.join("10-a.toml"), "nonsense").unwrap();
        fs::write(folder.join("README"), "no check").unwrap();
        let checks = load_checks(&root);
        let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, ["startup", "10-a", "20-b"]);
        assert!(!checks[1].run(&root).healthy);
    }
}
