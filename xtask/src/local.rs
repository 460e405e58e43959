//! The robot's own system on this machine, without its hardware: the root filesystem that ships,
//! unpacked, in namespaces of an ordinary user, under qemu's user emulation if the architecture
//! differs.
//!
//! This is the host's side. It starts process 1 of the local system ([`init`]), reports its events,
//! and stops it by exiting: no process of the system outlives this process.

pub mod init;
mod mounts;
pub mod units;
mod unpack;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FlockOperation, StatVfsMountFlags, flock, statvfs};
use serde::{Deserialize, Serialize};

use crate::build::LocalBuild;
use crate::exec::{Tool, find_program};
use crate::progress::{format_duration, say, warn};
use crate::rootfs::debian;

/// The hidden command with which this program runs as process 1 of a local system.
pub const CHILD: &str = "local-init";

/// The robot's port that is reachable from outside, besides SSH.
const PORT: u16 = 80;

/// The directory below `data` in which Python looks for the API before the image's own
/// (`/usr/lib/slipway/api.env`).
const SITE: &str = "apps/api/current/site";

/// The agent's record of the last provisioning, below `data`.
const PROVISIONED: &str = "slotd/provisioned.json";

/// How long a system may take to become healthy when a command waits for it; the same as the
/// agent's timeout for an API.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(300);

/// The kernel's priority of a warning (syslog(3): LOG_WARNING).
const WARNING: u8 = 4;

/// The namespaces: private mounts, processes, network, host name and shared memory.
const NAMESPACES: [&str; 6] = ["--mount", "--pid", "--fork", "--net", "--uts", "--ipc"];

/// And a user namespace, in which the user is root.
const AS_USER: [&str; 2] = ["--user", "--map-root-user"];

/// The privileges of a local system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalPrivileges {
    /// Only those of the user who started it: it is root in that user's namespace.
    User,
    /// Those of root, where user namespaces are not available, such as in a chroot.
    Root,
}

impl LocalPrivileges {
    fn namespaces(self) -> Vec<&'static str> {
        let own: &[&str] = if self == Self::User { &AS_USER } else { &[] };
        [own, &NAMESPACES].concat()
    }
}

/// Options of a local system.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Start with an empty `data`.
    pub fresh: bool,
    /// A directory with the API's package that replaces the image's.
    pub site: Option<Utf8PathBuf>,
    /// Run this command in the system once it is healthy, then stop.
    pub command: Vec<String>,
}

/// The orders for process 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Order {
    rights: LocalPrivileges,
    root: Utf8PathBuf,
    data: Utf8PathBuf,
    /// The directory for [`SITE`] of `data`.
    site: Option<Utf8PathBuf>,
    system: units::LocalServices,
}

/// The state of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// Running.
    Started,
    /// Finished.
    Done,
    /// Failed, and not restarted.
    Failed,
    /// Ended, and restarted.
    Restarts,
    /// Skipped because of a condition.
    Skipped,
}

/// The messages of process 1, one JSON object for each line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
enum Event {
    /// A line of a service's output.
    Said { unit: String, level: u8, line: String },
    /// The state of a service changed, with the time in seconds since process 1 started.
    Unit { unit: String, state: ServiceState, why: String, seconds: f64 },
    /// All services have started, and every declared address answers.
    Well { seconds: f64 },
    /// The command has exited.
    Ended { code: i32, output: String, errors: String },
    /// The system cannot be started.
    Broken { why: String },
}

/// A service, for the result.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ServiceStatus {
    /// Its name.
    pub unit: String,
    /// Its last state.
    pub state: ServiceState,
    /// The reason, or the service's own status text.
    pub why: String,
    /// The time, in seconds since process 1 started.
    pub seconds: f64,
}

/// A healthy system.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HealthySystem {
    /// Its address.
    pub address: String,
    /// The unpacked root.
    pub root: Utf8PathBuf,
    /// Its `data`, which is kept.
    pub data: Utf8PathBuf,
    /// Whether this run unpacked the root.
    pub unpacked: bool,
    /// Seconds from the start of the command until every declared address answered.
    pub seconds: f64,
    /// Addresses within the system that have answered.
    pub answers: Vec<units::HttpCheck>,
    /// Its services.
    pub services: Vec<ServiceStatus>,
    /// Enabled units of the base system, which do not run here.
    pub left_out: Vec<String>,
    /// The command's exit code.
    pub exit: Option<i32>,
    /// What the command wrote to its standard output.
    pub output: Option<String>,
}

/// Starts a composed system here, which is reachable through `listener`. Without a command it runs
/// until this process ends; `well` is called when every declared address answers.
///
/// # Errors
/// When the system is in use, a unit is not supported, or the system does not start. A failing
/// command is not an error: its exit code is in the answer.
pub fn run_system(
    composed: &LocalBuild,
    options: &LocalOptions,
    rights: LocalPrivileges,
    listener: TcpListener,
    well: impl FnOnce(&HealthySystem) -> Result<()>,
) -> Result<HealthySystem> {
    let started = Instant::now();
    let plan = &composed.plan;
    let place = composed.dist.join("local");
    // It contains programs of other users with their privileges; no other user may read it.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place)
        .with_context(|| format!("making {place}"))?;
    let _running = only_one(&place)?;
    debian::can_run(&plan.board.arch, &place)?;
    let port = listener.local_addr().context("reading the port")?.port();

    let (root, data) = (place.join("root"), place.join("data"));
    let system = &composed.system;
    let unpacked = unpack::unpack_image(&system.root.path, &system.key, system.used, &root)?;
    if options.fresh {
        unpack::remove_path(&data)?;
    }
    fs::create_dir_all(&data).with_context(|| format!("making {data}"))?;
    let site = options.site.as_deref().map(|site| own_site(site, &data)).transpose()?;
    for path in [&root, &data] {
        let flags = statvfs(path.as_str())
            .with_context(|| format!("reading the mount flags of {path}"))?
            .f_flag;
        ensure!(
            !flags.contains(StatVfsMountFlags::NOEXEC),
            "{path} is on a filesystem that is mounted noexec, so its programs cannot run\n\
             help: move the workspace, or remount the filesystem"
        );
    }
    let overlay: BTreeSet<Utf8PathBuf> = plan.overlay.iter().map(|f| f.target.clone()).collect();
    let found = units::read_services(&root, &overlay).context("reading the units of the root")?;
    found.notes.iter().for_each(warn);
    let mut ready = HealthySystem {
        address: format!("http://127.0.0.1:{port}"),
        root: root.clone(),
        data: data.clone(),
        unpacked,
        seconds: 0.0,
        answers: found.addresses.clone(),
        services: Vec::new(),
        left_out: found.left_out.clone(),
        exit: None,
        output: None,
    };
    say("run", format!("{} for {} on {}", plan.stem(), plan.board.arch, ready.address));
    let local = RunningSystem::start(&Order { rights, root, data, site, system: found }, listener)?;
    local.follow(&mut ready, options, started, well)?;
    Ok(ready)
}

/// Prepares the directory for a developer's own package. Files that are edited there keep their
/// paths, so provisioning runs at each start.
fn own_site(site: &Utf8Path, data: &Utf8Path) -> Result<Utf8PathBuf> {
    ensure!(
        site.is_dir(),
        "{site} is not a directory\n\
         help: use a directory that contains the API's package, as `pip install --target` creates it"
    );
    let site = site.canonicalize_utf8().with_context(|| format!("resolving {site}"))?;
    let place = data.join(SITE);
    fs::create_dir_all(&place).with_context(|| format!("making {place}"))?;
    unpack::remove_path(&data.join(PROVISIONED))?;
    Ok(site)
}

/// The privileges with which this user can create namespaces on this machine.
///
/// # Errors
/// When the user cannot; explains what forbids it.
pub fn available_privileges() -> Result<LocalPrivileges> {
    let tries =
        |rights: LocalPrivileges| Tool::new("unshare").args(rights.namespaces()).arg("true").run();
    let Err(error) = tries(LocalPrivileges::User) else { return Ok(LocalPrivileges::User) };
    if rustix::process::geteuid().is_root() && tries(LocalPrivileges::Root).is_ok() {
        return Ok(LocalPrivileges::Root);
    }
    bail!(
        "creating namespaces: {error:#}\n\
         help: check the settings that forbid users to create namespaces:\n\
         help:   sysctl kernel.unprivileged_userns_clone               must be 1, where it exists\n\
         help:   sysctl user.max_user_namespaces                       must not be 0\n\
         help:   sysctl kernel.apparmor_restrict_unprivileged_userns   must be 0, where it exists\n\
         help: a container needs --privileged (docker, podman); in a chroot, run it as root"
    )
}

/// Locks the directory until the value is dropped.
fn only_one(place: &Utf8Path) -> Result<File> {
    let path = place.join("lock");
    let file = File::create(&path).with_context(|| format!("opening {path}"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!(
            "{place} is in use: this system is already running\n\
             help: stop the other `run --local` (Ctrl-C), or choose another --board"
        ),
        Err(error) => Err(error).with_context(|| format!("locking {path}")),
    }
}

/// The port of 127.0.0.1 that is forwarded to the robot's proxy; 0 selects a free port. Only this
/// machine can reach it.
///
/// # Errors
/// When it is in use.
pub fn listen_on(port: u16) -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| {
        anyhow!(
            "listening on port {port} of 127.0.0.1: {error}\n\
             help: stop the program that uses the port, or choose another port with --port; 0 \
             selects a free one"
        )
    })
}

/// A running system. Dropping it ends it.
struct RunningSystem {
    child: Child,
    /// Closing this stops process 1.
    orders: UnixStream,
    events: Receiver<Event>,
}

impl RunningSystem {
    fn start(order: &Order, listener: TcpListener) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("making a socket")?;
        let own = std::env::current_exe().context("finding this program")?;
        let own = Utf8PathBuf::try_from(own).context("this program's path")?;
        let mut command = Tool::new(find_program("unshare").context("finding unshare")?)
            .args(order.rights.namespaces())
            .args(["--kill-child", "--", own.as_str(), CHILD])
            .into_command();
        command
            .stdin(OwnedFd::from(listener))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::inherit());
        let child = command.spawn().context("running unshare")?;
        // Process 1 has the other ends; with ours open it would never see the end of file.
        drop(command);
        let reader = BufReader::new(ours.try_clone().context("making a socket")?);
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in reader.lines() {
                let Ok(line) = line else { break };
                // Process 1 is this program: it writes nothing else.
                let Ok(event) = serde_json::from_str(&line) else { break };
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        let local = Self { child, orders: ours, events };
        local.order(order)?;
        Ok(local)
    }

    fn order(&self, order: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(order).context("writing an order")?;
        line.push(b'\n');
        (&self.orders).write_all(&line).context("reading from the local system")
    }

    /// Reports events until the command has exited; without one, as long as the system runs.
    fn follow(
        &self,
        ready: &mut HealthySystem,
        options: &LocalOptions,
        started: Instant,
        well: impl FnOnce(&HealthySystem) -> Result<()>,
    ) -> Result<()> {
        let began = Instant::now();
        let mut well = Some(well);
        loop {
            // With a command, wait for a limited time.
            let waits = well.is_some() && !options.command.is_empty();
            let left =
                if waits { HEALTH_TIMEOUT.saturating_sub(began.elapsed()) } else { Duration::MAX };
            let event = match self.events.recv_timeout(left) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => bail!(
                    "{} did not become healthy within {} s\n\
                     help: see the output of its services above",
                    ready.address,
                    HEALTH_TIMEOUT.as_secs()
                ),
                Err(RecvTimeoutError::Disconnected) => bail!("the local system has ended"),
            };
            match event {
                Event::Said { unit, level, line } => print_unit_line(&unit, level, &line),
                Event::Unit { unit, state, why, seconds } => {
                    log_unit_state(&unit, state, &why, seconds);
                    ready.services.retain(|service| service.unit != unit);
                    ready.services.push(ServiceStatus { unit, state, why, seconds });
                }
                Event::Well { .. } => {
                    ready.seconds = started.elapsed().as_secs_f64();
                    say("skipped", left_out(ready));
                    if options.command.is_empty() {
                        if let Some(well) = well.take() {
                            well(ready)?;
                        }
                    } else {
                        well = None;
                        self.order(&options.command)?;
                    }
                }
                Event::Ended { code, output, errors } => {
                    errors
                        .lines()
                        .for_each(|line| print_unit_line(&options.command[0], WARNING + 1, line));
                    (ready.exit, ready.output) = (Some(code), Some(output));
                    return Ok(());
                }
                Event::Broken { why } => bail!("starting the local system: {why}"),
            }
        }
    }
}

impl Drop for RunningSystem {
    fn drop(&mut self) {
        // Process 1 exits at the end of its orders, and with it all its children. Errors cannot be
        // handled here.
        drop(self.orders.shutdown(std::net::Shutdown::Both));
        drop(self.child.wait());
    }
}

fn short_unit_name(unit: &str) -> &str {
    unit.strip_suffix(".service").unwrap_or(unit)
}

fn print_unit_line(unit: &str, level: u8, line: &str) {
    if level <= WARNING {
        warn(format!("{}: {line}", short_unit_name(unit)));
    } else {
        say(short_unit_name(unit), line);
    }
}

fn log_unit_state(unit: &str, state: ServiceState, why: &str, seconds: f64) {
    let after = format_duration(Duration::from_secs_f64(seconds));
    match state {
        ServiceState::Started if why.is_empty() => {
            say(short_unit_name(unit), format!("has started  ({after})"))
        }
        ServiceState::Started => {
            say(short_unit_name(unit), format!("has started: {why}  ({after})"))
        }
        ServiceState::Done => say(short_unit_name(unit), format!("has finished  ({after})")),
        ServiceState::Failed => warn(format!("{} has failed: {why}", short_unit_name(unit))),
        ServiceState::Restarts => {
            warn(format!("{} has ended ({why}) and is restarted", short_unit_name(unit)))
        }
        // Reported in one line, when all have started.
        ServiceState::Skipped => {}
    }
}

/// The services that do not run here, with reasons.
fn left_out(ready: &HealthySystem) -> String {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for service in ready.services.iter().filter(|service| service.state == ServiceState::Skipped) {
        reasons.entry(&service.why).or_default().push(short_unit_name(&service.unit));
    }
    let mut parts: Vec<String> =
        reasons.iter().map(|(why, units)| format!("{} ({why})", units.join(", "))).collect();
    let others: Vec<&str> = ready.left_out.iter().map(|unit| short_unit_name(unit)).collect();
    if !others.is_empty() {
        parts.push(format!("the base system's own: {}", others.join(", ")));
    }
    if parts.is_empty() { "nothing".to_owned() } else { parts.join("; ") }
}
