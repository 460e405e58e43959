//! The services that run from the API: restarted in order, and looked at until they are well.

use std::time::{Duration, Instant};

use crate::health::{self, Check, Kind, program};
use crate::root::Root;

/// The API's server.
const SERVER: &str = "slipway-api.service";

/// The reverse proxy, which may answer from what the API has brought.
const PROXY: &str = "slipway-proxy.service";

/// Answers of systemd that wait for nothing.
const ANSWER: Duration = Duration::from_secs(20);

/// How long systemd may take to stop a unit and start it: what the server's own unit allows, and a half.
const RESTART: Duration = Duration::from_secs(450);

/// How long an API may take until it is well, and how long it must then stay so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// From the restart until all is well.
    pub start: Duration,
    /// Without a failure, from then on.
    pub settle: Duration,
    /// Between two looks.
    pub pause: Duration,
}

impl Patience {
    /// For a robot: a Pi 3 imports a large API in less than a minute, and five on a bad day. Below a test's
    /// root nothing is restarted, so nothing is waited for.
    pub fn of(root: &Root) -> Self {
        let seconds =
            |robot, test| Duration::from_secs(if root.is_system() { robot } else { test });
        Self { start: seconds(300, 0), settle: seconds(6, 0), pause: Duration::from_millis(500) }
    }
}

/// The checks that say whether an API is well.
#[derive(Debug)]
pub(super) struct Watch {
    checks: Vec<Check>,
}

impl Watch {
    /// The declared checks and the server's unit. What fails before a change and is not the API's says
    /// nothing about the change: a robot without a network cable takes an API.
    pub fn new(root: &Root) -> Self {
        let mut checks: Vec<Check> = health::load(root)
            .into_iter()
            .filter(|check| check.kind != Ok(Kind::Startup))
            .filter(|check| is_of_api(check) || check.run(root).healthy)
            .collect();
        let server = Kind::Unit(SERVER.to_owned());
        let named = checks.iter().any(|check| check.kind.as_ref() == Ok(&server));
        if root.is_system() && !named && exists(SERVER) {
            checks.push(Check {
                name: "api".to_owned(),
                kind: Ok(server),
                timeout: Duration::from_secs(10),
            });
        }
        Self { checks }
    }

    /// Looks until all is well and stays so. Returns how long it took until it was.
    ///
    /// # Errors
    /// What is not well.
    pub fn wait(&self, root: &Root, patience: Patience) -> Result<Duration, String> {
        let started = Instant::now();
        let mut well: Option<Instant> = None;
        loop {
            let failing: Vec<String> = self
                .checks
                .iter()
                .map(|check| check.run(root))
                .filter(|outcome| !outcome.healthy)
                .map(|outcome| format!("{}: {}", outcome.name, outcome.found))
                .collect();
            if failing.is_empty() {
                let since = *well.get_or_insert_with(Instant::now);
                if since.elapsed() >= patience.settle {
                    return Ok(since.duration_since(started));
                }
            } else {
                // A unit that systemd has given up does not come back.
                if started.elapsed() >= patience.start || (root.is_system() && given_up()) {
                    return Err(failing.join("; "));
                }
                well = None;
            }
            std::thread::sleep(patience.pause);
        }
    }
}

/// Whether a check looks at the API: at an address, or at its server's unit.
fn is_of_api(check: &Check) -> bool {
    match &check.kind {
        Ok(Kind::Http { .. }) => true,
        Ok(Kind::Unit(name)) => name == SERVER,
        // One that nobody can understand fails before a change, too.
        _ => false,
    }
}

/// Restarts the services in order, on a robot.
///
/// # Errors
/// What systemd says.
pub(super) fn restart(root: &Root) -> Result<(), String> {
    if !root.is_system() {
        return Ok(());
    }
    if exists(SERVER) {
        // An API that failed too often before must not keep the next one from starting.
        systemctl(&["reset-failed", SERVER])?;
        systemctl(&["restart", SERVER])?;
    }
    if exists(PROXY) {
        systemctl(&["try-reload-or-restart", PROXY])?;
    }
    Ok(())
}

fn exists(unit: &str) -> bool {
    property(unit, "LoadState").as_deref() == Some("loaded")
}

fn given_up() -> bool {
    property(SERVER, "ActiveState").as_deref() == Some("failed")
}

fn property(unit: &str, name: &str) -> Option<String> {
    let words = ["show", "--value", &format!("--property={name}"), unit];
    let (status, said) = program("systemctl", &words, None, ANSWER).ok()?;
    status.success().then(|| said.trim().to_owned())
}

fn systemctl(words: &[&str]) -> Result<(), String> {
    let (status, said) = program("systemctl", words, None, RESTART)?;
    if status.success() {
        return Ok(());
    }
    Err(format!("systemctl {}: {status}: {}", words.join(" "), said.trim()))
}
