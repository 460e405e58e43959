//! The services that run from the API: restarted in order, then checked until they are healthy.

use std::time::{Duration, Instant};

use crate::health::{self, CheckKind, HealthCheck};
use crate::process::run_program;
use crate::root::RootDir;

/// The API's server.
const SERVER: &str = "slipway-api.service";

/// The reverse proxy, which may serve files of the API.
const PROXY: &str = "slipway-proxy.service";

/// Timeout for queries to systemd.
const ANSWER: Duration = Duration::from_secs(20);

/// How long systemd may take to stop and start a unit: 1.5 times what the server's own unit allows.
const RESTART: Duration = Duration::from_secs(450);

/// How long an API may take until it is healthy, and how long it must then stay healthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthTimes {
    /// From the restart until all checks pass.
    pub start: Duration,
    /// How long no check may fail after that.
    pub settle: Duration,
    /// The time between two rounds of checks.
    pub pause: Duration,
}

impl HealthTimes {
    /// On a robot: a Pi 3 usually imports a large API in less than a minute, and at worst in five. In a test's root
    /// nothing is restarted, so there is nothing to wait for.
    pub fn for_robot(root: &RootDir) -> Self {
        let seconds =
            |robot, test| Duration::from_secs(if root.is_system() { robot } else { test });
        Self { start: seconds(300, 0), settle: seconds(6, 0), pause: Duration::from_millis(500) }
    }
}

/// The checks that say whether an API is healthy.
#[derive(Debug)]
pub(super) struct ApiChecks {
    checks: Vec<HealthCheck>,
}

impl ApiChecks {
    /// The declared checks and the server's unit. A check that does not concern the API and already fails before a
    /// change is ignored: a robot without a network cable accepts an API.
    pub fn new(root: &RootDir) -> Self {
        let mut checks: Vec<HealthCheck> = health::load_checks(root)
            .into_iter()
            .filter(|check| check.kind != Ok(CheckKind::Startup))
            .filter(|check| is_of_api(check) || check.run(root).healthy)
            .collect();
        let server = CheckKind::Unit(SERVER.to_owned());
        let named = checks.iter().any(|check| check.kind.as_ref() == Ok(&server));
        if root.is_system() && !named && unit_exists(SERVER) {
            checks.push(HealthCheck {
                name: "api".to_owned(),
                kind: Ok(server),
                timeout: Duration::from_secs(10),
            });
        }
        Self { checks }
    }

    /// Runs the checks until all pass and keep passing. Returns how long it took until they first passed.
    ///
    /// # Errors
    /// The failing check.
    pub fn wait(&self, root: &RootDir, patience: HealthTimes) -> Result<Duration, String> {
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
                // systemd does not start a failed unit again.
                if started.elapsed() >= patience.start || (root.is_system() && given_up()) {
                    return Err(failing.join("; "));
                }
                well = None;
            }
            std::thread::sleep(patience.pause);
        }
    }
}

/// Whether a check concerns the API: an address, or the server's unit.
fn is_of_api(check: &HealthCheck) -> bool {
    match &check.kind {
        Ok(CheckKind::Http { .. }) => true,
        Ok(CheckKind::Unit(name)) => name == SERVER,
        // An invalid check also fails before a change.
        _ => false,
    }
}

/// Restarts the services in order, on a robot.
///
/// # Errors
/// With systemd's message.
pub(super) fn restart_services(root: &RootDir) -> Result<(), String> {
    if !root.is_system() {
        return Ok(());
    }
    if unit_exists(SERVER) {
        // An API that failed too often must not prevent the next one from starting.
        systemctl(&["reset-failed", SERVER])?;
        systemctl(&["restart", SERVER])?;
    }
    if unit_exists(PROXY) {
        systemctl(&["try-reload-or-restart", PROXY])?;
    }
    Ok(())
}

fn unit_exists(unit: &str) -> bool {
    unit_property(unit, "LoadState").as_deref() == Some("loaded")
}

fn given_up() -> bool {
    unit_property(SERVER, "ActiveState").as_deref() == Some("failed")
}

fn unit_property(unit: &str, name: &str) -> Option<String> {
    let words = ["show", "--value", &format!("--property={name}"), unit];
    let (status, output) = run_program("systemctl", &words, None, ANSWER).ok()?;
    status.success().then(|| output.trim().to_owned())
}

fn systemctl(words: &[&str]) -> Result<(), String> {
    let (status, output) = run_program("systemctl", words, None, RESTART)?;
    if status.success() {
        return Ok(());
    }
    Err(format!("systemctl {}: {status}: {}", words.join(" "), output.trim()))
}
