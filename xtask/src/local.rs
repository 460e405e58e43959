//! The robot's own system on this machine, without its hardware: the very root file system that ships,
//! unpacked, in namespaces of an ordinary user, under qemu's user emulation where the architecture is another.
//!
//! This is the host's side. It starts process 1 of the local system ([`init`]), says what happens there, and
//! ends it by ending: nothing of it outlives this process.

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

use crate::build::Composed;
use crate::exec::{Tool, find};
use crate::progress::{duration, say, warn};
use crate::rootfs::debian;

/// The hidden verb under which process 1 of a local system is this very program.
pub const CHILD: &str = "local-init";

/// The robot's port that is reached from outside, besides SSH.
const PORT: u16 = 80;

/// Where Python looks for the API before the image's own, below `data` (`/usr/lib/slipway/api.env`).
const SITE: &str = "apps/api/current/site";

/// What the agent remembers of the last provisioning, below `data`.
const PROVISIONED: &str = "slotd/provisioned.json";

/// How long a system may take to be well when somebody waits for it; as the agent waits for an API.
const PATIENCE: Duration = Duration::from_secs(300);

/// The kernel's priority from which on a line is a warning (syslog(3): LOG_WARNING).
const WARNING: u8 = 4;

/// The namespaces: mounts, processes, network, host name and shared memory that nobody else sees.
const NAMESPACES: [&str; 6] = ["--mount", "--pid", "--fork", "--net", "--uts", "--ipc"];

/// And a user's own, in which that user is root.
const AS_USER: [&str; 2] = ["--user", "--map-root-user"];

/// With whose rights a local system runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rights {
    /// Only those of the user who has started it: it is root in a namespace of that user.
    User,
    /// Root's, where no user namespace can be made, as in a chroot.
    Root,
}

impl Rights {
    fn namespaces(self) -> Vec<&'static str> {
        let own: &[&str] = if self == Self::User { &AS_USER } else { &[] };
        [own, &NAMESPACES].concat()
    }
}

/// How a local system is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Begin with an empty `data`.
    pub fresh: bool,
    /// A folder with the API's package that serves in the place of the image's.
    pub site: Option<Utf8PathBuf>,
    /// Run this in it once it is well, and end.
    pub command: Vec<String>,
}

/// What process 1 is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Order {
    rights: Rights,
    root: Utf8PathBuf,
    data: Utf8PathBuf,
    /// What lies at [`SITE`] of `data`.
    site: Option<Utf8PathBuf>,
    system: units::System,
}

/// What becomes of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has started, and runs.
    Started,
    /// It has done its work.
    Done,
    /// It has failed, and is not started again.
    Failed,
    /// It has ended, and is started again.
    Restarts,
    /// A condition keeps it from running here.
    Skipped,
}

/// What process 1 says, one JSON object a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
enum Event {
    /// A service has written a line.
    Said { unit: String, level: u8, line: String },
    /// Something has become of a service, so many seconds after process 1 began.
    Unit { unit: String, state: State, why: String, seconds: f64 },
    /// All services have started, and every declared address answers.
    Well { seconds: f64 },
    /// The command has ended.
    Ended { code: i32, output: String, errors: String },
    /// The system cannot be started.
    Broken { why: String },
}

/// A service, for the result.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Service {
    /// Its name.
    pub unit: String,
    /// What became of it last.
    pub state: State,
    /// Why, or what it said of itself.
    pub why: String,
    /// When, in seconds after process 1 began.
    pub seconds: f64,
}

/// A system that is well.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ready {
    /// Where it is reached.
    pub address: String,
    /// The unpacked root.
    pub root: Utf8PathBuf,
    /// Its `data`, which is kept.
    pub data: Utf8PathBuf,
    /// Whether the root was unpacked by this run.
    pub unpacked: bool,
    /// Seconds from the command to an answer at every declared address.
    pub seconds: f64,
    /// Addresses within the system that have answered.
    pub answers: Vec<units::Address>,
    /// Its services.
    pub services: Vec<Service>,
    /// Enabled units that do not run here: the base system's own.
    pub left_out: Vec<String>,
    /// The command's exit code.
    pub exit: Option<i32>,
    /// What the command wrote to its standard output.
    pub output: Option<String>,
}

/// Starts a composed system here, which `listener` then leads to. Without a command it runs until this process
/// ends; `well` is told when every declared address answers.
///
/// # Errors
/// When the system is in use, a unit is not understood, or the system does not come up. A command that fails
/// is none: its code is in the answer.
pub fn run(
    composed: &Composed,
    options: &Options,
    rights: Rights,
    listener: TcpListener,
    well: impl FnOnce(&Ready) -> Result<()>,
) -> Result<Ready> {
    let started = Instant::now();
    let plan = &composed.plan;
    let place = composed.dist.join("local");
    // What is in it was another user's program with its rights; nobody else looks into it.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place)
        .with_context(|| format!("making {place}"))?;
    let _running = only_one(&place)?;
    debian::can_run(&plan.board.arch, &place)?;
    let port = listener.local_addr().context("asking for the port")?.port();

    let (root, data) = (place.join("root"), place.join("data"));
    let system = &composed.system;
    let unpacked = unpack::unpack(&system.root.path, &system.key, system.used, &root)?;
    if options.fresh {
        unpack::remove(&data)?;
    }
    fs::create_dir_all(&data).with_context(|| format!("making {data}"))?;
    let site = options.site.as_deref().map(|site| own_site(site, &data)).transpose()?;
    for path in [&root, &data] {
        let flags = statvfs(path.as_str()).with_context(|| format!("looking at {path}"))?.f_flag;
        ensure!(
            !flags.contains(StatVfsMountFlags::NOEXEC),
            "{path} is on a file system that is mounted noexec: no program starts from it\n\
             help: move the workspace, or remount the file system"
        );
    }
    let overlay: BTreeSet<Utf8PathBuf> = plan.overlay.iter().map(|f| f.target.clone()).collect();
    let found = units::read(&root, &overlay).context("reading what the root would start")?;
    found.notes.iter().for_each(warn);
    let mut ready = Ready {
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
    let local = Local::start(&Order { rights, root, data, site, system: found }, listener)?;
    local.follow(&mut ready, options, started, well)?;
    Ok(ready)
}

/// Makes the place for a package of one's own. What is edited there keeps its path: each start provisions.
fn own_site(site: &Utf8Path, data: &Utf8Path) -> Result<Utf8PathBuf> {
    ensure!(
        site.is_dir(),
        "{site} is no folder\nhelp: name one that has the API's package in it, as `pip install --target` makes it"
    );
    let site = site.canonicalize_utf8().with_context(|| format!("looking for {site}"))?;
    let place = data.join(SITE);
    fs::create_dir_all(&place).with_context(|| format!("making {place}"))?;
    unpack::remove(&data.join(PROVISIONED))?;
    Ok(site)
}

/// With which rights this machine lets this user make namespaces.
///
/// # Errors
/// When it does not; says what forbids it.
pub fn allowed() -> Result<Rights> {
    let tries = |rights: Rights| Tool::new("unshare").args(rights.namespaces()).arg("true").run();
    let Err(error) = tries(Rights::User) else { return Ok(Rights::User) };
    if rustix::process::geteuid().is_root() && tries(Rights::Root).is_ok() {
        return Ok(Rights::Root);
    }
    bail!(
        "trying to make namespaces: {error:#}\n\
         help: a system in which users may not make any says so in one of these:\n\
         help:   sysctl kernel.unprivileged_userns_clone               must be 1, where it exists\n\
         help:   sysctl user.max_user_namespaces                       must not be 0\n\
         help:   sysctl kernel.apparmor_restrict_unprivileged_userns   must be 0, where it exists\n\
         help: a container needs --privileged (docker, podman); in a chroot only root may"
    )
}

/// Holds the folder for as long as the value lives.
fn only_one(place: &Utf8Path) -> Result<File> {
    let path = place.join("lock");
    let file = File::create(&path).with_context(|| format!("opening {path}"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!(
            "{place} is in use: this system runs here already\n\
             help: end the other `run --local` (Ctrl-C), or choose another --board"
        ),
        Err(error) => Err(error).with_context(|| format!("locking {path}")),
    }
}

/// The port of 127.0.0.1 that is to lead to the robot's proxy; 0 takes any that is free. Only this machine
/// reaches it.
///
/// # Errors
/// When it is taken.
pub fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| {
        anyhow!(
            "listening on port {port} of 127.0.0.1: {error}\n\
             help: another program has it: end that, or choose another with --port; 0 takes any"
        )
    })
}

/// A running system. Dropping it ends it.
struct Local {
    child: Child,
    /// The end of this is the end of process 1.
    orders: UnixStream,
    events: Receiver<Event>,
}

impl Local {
    fn start(order: &Order, listener: TcpListener) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("making a socket")?;
        let own = std::env::current_exe().context("finding this program")?;
        let own = Utf8PathBuf::try_from(own).context("this program's path")?;
        let mut command = Tool::new(find("unshare").context("looking for unshare")?)
            .args(order.rights.namespaces())
            .args(["--kill-child", "--", own.as_str(), CHILD])
            .into_command();
        command
            .stdin(OwnedFd::from(listener))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::inherit());
        let child = command.spawn().context("running unshare")?;
        // It has the other ends; with ours it would never see the end.
        drop(command);
        let reader = BufReader::new(ours.try_clone().context("making a socket")?);
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in reader.lines() {
                let Ok(line) = line else { break };
                // Process 1 is this very program: it says nothing else.
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
        (&self.orders).write_all(&line).context("talking to the local system")
    }

    /// Says what happens until the command has ended; without one, as long as the system runs.
    fn follow(
        &self,
        ready: &mut Ready,
        options: &Options,
        started: Instant,
        well: impl FnOnce(&Ready) -> Result<()>,
    ) -> Result<()> {
        let began = Instant::now();
        let mut well = Some(well);
        loop {
            // Where somebody waits for the result, not for ever.
            let waits = well.is_some() && !options.command.is_empty();
            let left = if waits { PATIENCE.saturating_sub(began.elapsed()) } else { Duration::MAX };
            let event = match self.events.recv_timeout(left) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => bail!(
                    "{} is not well within {} s\nhelp: its services say why above",
                    ready.address,
                    PATIENCE.as_secs()
                ),
                Err(RecvTimeoutError::Disconnected) => bail!("the local system has ended"),
            };
            match event {
                Event::Said { unit, level, line } => show(&unit, level, &line),
                Event::Unit { unit, state, why, seconds } => {
                    tell(&unit, state, &why, seconds);
                    ready.services.retain(|service| service.unit != unit);
                    ready.services.push(Service { unit, state, why, seconds });
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
                    errors.lines().for_each(|line| show(&options.command[0], WARNING + 1, line));
                    (ready.exit, ready.output) = (Some(code), Some(output));
                    return Ok(());
                }
                Event::Broken { why } => bail!("starting the local system: {why}"),
            }
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // Process 1 ends at the end of its orders, and with it all that it has started. Nothing can be done
        // about an error here.
        drop(self.orders.shutdown(std::net::Shutdown::Both));
        drop(self.child.wait());
    }
}

fn short(unit: &str) -> &str {
    unit.strip_suffix(".service").unwrap_or(unit)
}

fn show(unit: &str, level: u8, line: &str) {
    if level <= WARNING {
        warn(format!("{}: {line}", short(unit)));
    } else {
        say(short(unit), line);
    }
}

fn tell(unit: &str, state: State, why: &str, seconds: f64) {
    let after = duration(Duration::from_secs_f64(seconds));
    match state {
        State::Started if why.is_empty() => say(short(unit), format!("has started  ({after})")),
        State::Started => say(short(unit), format!("has started: {why}  ({after})")),
        State::Done => say(short(unit), format!("is done  ({after})")),
        State::Failed => warn(format!("{} has failed: {why}", short(unit))),
        State::Restarts => warn(format!("{} has ended ({why}) and is started again", short(unit))),
        // In one line, when all have started.
        State::Skipped => {}
    }
}

/// What does not run here, and why.
fn left_out(ready: &Ready) -> String {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for service in ready.services.iter().filter(|service| service.state == State::Skipped) {
        reasons.entry(&service.why).or_default().push(short(&service.unit));
    }
    let mut parts: Vec<String> =
        reasons.iter().map(|(why, units)| format!("{} ({why})", units.join(", "))).collect();
    let others: Vec<&str> = ready.left_out.iter().map(|unit| short(unit)).collect();
    if !others.is_empty() {
        parts.push(format!("the base system's own: {}", others.join(", ")));
    }
    if parts.is_empty() { "nothing".to_owned() } else { parts.join("; ") }
}
