//! Process 1 of a local system, in separate namespaces: mounts, runs the robot's services instead
//! of systemd, and forwards connections of the host's port. It communicates with the host's side
//! over its standard output, a socket, and exits with it; the kernel then ends all other processes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::Mode;
use rustix::process::{Pid, Signal, kill_process_group, umask};

use super::units::{
    ConditionTest, FstabMount, HttpCheck, RestartPolicy, ServiceProgram, ServiceUnit,
    StartCriterion, UnitCondition,
};
use super::{Event, LocalPrivileges, Order, PORT, ServiceState, mounts};
use crate::artifact::none_if_missing;
use crate::exec::Tool;

/// The first user id for dynamic users of systemd (systemd.exec(5), DynamicUser=). Any id other
/// than root's would do.
const OWN_USER: u32 = 61184;

/// The default PATH of services (systemd.exec(5)).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

/// The interval for polling a running service.
const POLL: Duration = Duration::from_millis(50);

/// The interval for polling an address, and the timeout of one request.
const ASK: Duration = Duration::from_millis(500);
const ANSWER: Duration = Duration::from_secs(30);

/// The default priority of a line (syslog(3): LOG_INFO), and that of errors (LOG_ERR).
const INFO: u8 = 6;
const ERROR: u8 = 3;

/// The state of the local system, shared by its threads.
struct SupervisedSystem {
    order: Order,
    /// The program `unshare` of the host: every service enters the root through it.
    unshare: Utf8PathBuf,
    host: Mutex<UnixStream>,
    /// The services that have started, were skipped or have failed.
    settled: Mutex<Vec<String>>,
    changed: Condvar,
    /// The umask belongs to the process, so services are started one at a time.
    starting: Mutex<()>,
    began: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the local system until the host's side stops it.
///
/// # Errors
/// When it cannot read from the host's side. Other errors are reported to the host's side.
pub fn run() -> Result<()> {
    let host =
        std::io::stdout().as_fd().try_clone_to_owned().context("connecting to the host's side")?;
    let host = UnixStream::from(host);
    let mut orders = BufReader::new(host.try_clone().context("connecting to the host's side")?);
    let mut line = String::new();
    orders.read_line(&mut line).context("reading the order")?;
    let order: Order = serde_json::from_str(&line).context("reading the order")?;
    let listener = std::io::stdin().as_fd().try_clone_to_owned().context("receiving the port")?;
    let listener = TcpListener::from(listener);
    let unshare = crate::exec::find_program("unshare").context("finding unshare")?;
    // Leaked: it is needed as long as the process and its threads run.
    let system: &'static SupervisedSystem = Box::leak(Box::new(SupervisedSystem {
        order,
        unshare,
        host: Mutex::new(host),
        settled: Mutex::default(),
        changed: Condvar::new(),
        starting: Mutex::default(),
        began: Instant::now(),
    }));
    if let Err(error) = system.prepare() {
        system.send(&Event::Broken { why: format!("{error:#}") });
        return Ok(());
    }
    thread::spawn(|| system.kernel_log());
    thread::spawn(move || hand_on(&listener));
    for unit in &system.order.system.units {
        thread::spawn(|| system.look_after(unit));
    }
    thread::spawn(|| system.watch_health());
    // Commands, one for each line. Their end means that the host's side has exited, and so does
    // this process.
    for line in orders.lines() {
        let Ok(line) = line else { break };
        let words: Vec<String> = serde_json::from_str(&line).context("reading a command")?;
        thread::spawn(move || system.command(&words));
    }
    Ok(())
}

impl SupervisedSystem {
    /// Sends a message to the host's side. If the host's side is gone, this system ends anyway.
    fn send(&self, event: &Event) {
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        if lock(&self.host).write_all(&line).is_err() {
            std::process::exit(1);
        }
    }

    fn log_line(&self, unit: &str, level: u8, line: &str) {
        self.send(&Event::Said { unit: unit.to_owned(), level, line: line.to_owned() });
    }

    fn report_state(&self, unit: &ServiceUnit, state: ServiceState, why: impl Into<String>) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.send(&Event::Unit { unit: unit.name.clone(), state, why: why.into(), seconds });
    }

    /// Prepares everything before the first service.
    fn prepare(&self) -> Result<()> {
        let Order { root, data, site, system, .. } = &self.order;
        // Like process 1 on a robot, independent of the user's umask.
        umask(Mode::from_raw_mode(0o022));
        mounts::mount_first(root, data, &system.mounts)?;
        if let Some(site) = site {
            mounts::mount_site(root, site)?;
        }
        self.name()?;
        Tool::new("ip").args(["link", "set", "lo", "up"]).run().context("starting the network")?;
        // In this private network, a service's own user may open the robot's ports.
        fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
            .context("letting services open low ports")
    }

    /// Sets the host name that the services of this system have chosen.
    fn name(&self) -> Result<()> {
        let path = self.order.root.join(mounts::HOSTNAME);
        let name = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        rustix::system::sethostname(name.trim().as_bytes()).context("setting the host name")
    }

    /// Waits for the services that it depends on, then starts this one and keeps it running.
    fn look_after(&'static self, unit: &'static ServiceUnit) {
        let mut settled = lock(&self.settled);
        while !unit.after.iter().all(|other| settled.contains(other)) {
            settled = self.changed.wait(settled).unwrap_or_else(PoisonError::into_inner);
        }
        drop(settled);
        let fails = |condition: &&UnitCondition| !self.holds(condition);
        if let Some(condition) = unit.conditions.iter().find(fails) {
            self.report_state(unit, ServiceState::Skipped, condition.text.clone());
            return self.mark_settled(unit);
        }
        loop {
            let (healthy, why) = match self.once(unit) {
                Ok(status) => (status.success(), status.to_string()),
                Err(error) => (false, format!("{error:#}")),
            };
            let again = match unit.again {
                RestartPolicy::Always => true,
                RestartPolicy::Failed => !healthy,
                RestartPolicy::No => false,
            };
            match (again, healthy) {
                (true, _) => self.report_state(unit, ServiceState::Restarts, why),
                (false, true) => self.report_state(unit, ServiceState::Done, ""),
                (false, false) => self.report_state(unit, ServiceState::Failed, why),
            }
            self.mark_settled(unit);
            if !again {
                return;
            }
            thread::sleep(unit.pause);
        }
    }

    /// Services that wait for this one may start.
    fn mark_settled(&self, unit: &ServiceUnit) {
        if lock(&self.settled).contains(&unit.name) {
            return;
        }
        let after = |mount: &&FstabMount| mount.after.as_ref() == Some(&unit.name);
        for mount in self.order.system.mounts.iter().filter(after) {
            // Like `nofail` in fstab: only reported.
            if let Err(error) = mounts::mount_entry(&self.order.root, mount) {
                self.log_line(&unit.name, ERROR, &format!("{error:#}"));
            }
        }
        if let Err(error) = self.name() {
            self.log_line(&unit.name, ERROR, &format!("{error:#}"));
        }
        lock(&self.settled).push(unit.name.clone());
        self.changed.notify_all();
    }

    fn holds(&self, condition: &UnitCondition) -> bool {
        let look = |path: &Utf8Path| {
            let fd = mounts::resolve_within(&self.order.root, path).ok()?;
            let path = Utf8PathBuf::from(mounts::by_descriptor(&fd));
            let about = fs::metadata(&path).ok()?;
            let entries = about.is_dir() && fs::read_dir(&path).ok()?.next().is_some();
            Some((about, entries))
        };
        let runs =
            |about: &fs::Metadata| about.is_file() && about.permissions().mode() & 0o111 != 0;
        let holds = match &condition.test {
            ConditionTest::Exists(path) => look(path).is_some(),
            ConditionTest::Executable(path) => look(path).is_some_and(|(about, _)| runs(&about)),
            ConditionTest::NotEmpty(path) => look(path).is_some_and(|(about, _)| about.len() > 0),
            ConditionTest::Populated(path) => look(path).is_some_and(|(_, entries)| entries),
            ConditionTest::Container => true,
        };
        holds != condition.negated
    }

    /// Runs a service once, to its end.
    fn once(&'static self, unit: &'static ServiceUnit) -> Result<ExitStatus> {
        for name in &unit.runtime {
            let path = self.order.root.join("run").join(name);
            fs::create_dir_all(&path).with_context(|| format!("making {path}"))?;
            let mode = fs::Permissions::from_mode(unit.runtime_mode);
            fs::set_permissions(&path, mode).with_context(|| format!("making {path}"))?;
            self.change_owner(unit, &path)?;
        }
        let deadline = Instant::now().checked_add(unit.timeout);
        for exec in &unit.before {
            let status = self.to_the_end(unit, exec, deadline)?;
            if !status.success() && !exec.may_fail {
                bail!("{}: {status}", exec.words.join(" "));
            }
        }
        if unit.start == StartCriterion::Ended {
            let mut last = Err(anyhow::anyhow!("the service has no program"));
            for exec in &unit.programs {
                let status = self.to_the_end(unit, exec, deadline)?;
                last = Ok(if exec.may_fail { ExitStatus::default() } else { status });
                if !status.success() && !exec.may_fail {
                    break;
                }
            }
            return last;
        }
        let exec = unit.programs.first().context("the service has no program")?;
        let notified = match unit.start {
            StartCriterion::Notified => Some(Notified::new(&self.order.root, &unit.name)?),
            _ => None,
        };
        if let Some(notified) = &notified {
            self.change_owner(
                unit,
                &self.order.root.join(notified.inside.trim_start_matches('/')),
            )?;
        }
        let mut child = self.start(unit, exec, notified.as_ref())?;
        let mut waits = notified.as_ref();
        if waits.is_none() {
            self.report_state(unit, ServiceState::Started, "");
            self.mark_settled(unit);
        }
        loop {
            if let Some(status) = child.try_wait().context("waiting for the program")? {
                // Its child processes end with it.
                kill_program(&child);
                return Ok(status);
            }
            if let Some(status_text) = waits.and_then(Notified::ready) {
                waits = None;
                self.report_state(unit, ServiceState::Started, status_text);
                self.mark_settled(unit);
            }
            if waits.is_some() && deadline.is_some_and(|deadline| Instant::now() > deadline) {
                kill_program(&child);
                child.wait().context("waiting for the program")?;
                bail!("the service did not start within {} s", unit.timeout.as_secs());
            }
            thread::sleep(POLL);
        }
    }

    /// Changes the owner of a file to a service's own user, if that differs.
    fn change_owner(&self, unit: &ServiceUnit, path: &Utf8Path) -> Result<()> {
        if !unit.own_user || self.order.rights == LocalPrivileges::User {
            return Ok(());
        }
        chown(path, Some(OWN_USER), Some(OWN_USER))
            .with_context(|| format!("changing the owner of {path}"))
    }

    fn to_the_end(
        &'static self,
        unit: &'static ServiceUnit,
        exec: &ServiceProgram,
        by: Option<Instant>,
    ) -> Result<ExitStatus> {
        let mut child = self.start(unit, exec, None)?;
        loop {
            if let Some(status) = child.try_wait().context("waiting for the program")? {
                return Ok(status);
            }
            if by.is_some_and(|deadline| Instant::now() > deadline) {
                kill_program(&child);
                child.wait().context("waiting for the program")?;
                bail!("{} did not end within {} s", exec.words.join(" "), unit.timeout.as_secs());
            }
            thread::sleep(POLL);
        }
    }

    /// The command that enters the root and executes the program that follows.
    fn enter(&self, more: &[&str], dir: &Utf8Path) -> Tool {
        let root = &self.order.root;
        Tool::new(&self.unshare)
            .args(more)
            .args([format!("--root={root}"), format!("--wd={dir}"), "--".to_owned()])
            .env_only(&[])
            .env("PATH", PATH)
    }

    /// Starts a program of a service. A service's own user is in a separate user namespace: not
    /// root there, but with the files of the host's user. For root it is simply another user.
    fn start(
        &'static self,
        unit: &'static ServiceUnit,
        exec: &ServiceProgram,
        notified: Option<&Notified>,
    ) -> Result<Child> {
        let (user, group) = match self.order.rights {
            LocalPrivileges::User => ("--map-user", "--map-group"),
            LocalPrivileges::Root => ("--setuid", "--setgid"),
        };
        let (user, group) = (format!("{user}={OWN_USER}"), format!("{group}={OWN_USER}"));
        let own: &[&str] = match (unit.own_user, self.order.rights) {
            (false, _) => &[],
            (true, LocalPrivileges::User) => &["--user", &user, &group],
            (true, LocalPrivileges::Root) => &[&user, &group],
        };
        let mut tool = self.enter(own, &unit.folder).args(&exec.words);
        for (name, value) in &unit.environment {
            tool = tool.env(name, value);
        }
        // These override the unit's own variables (systemd.exec(5)).
        for (path, may_lack) in &unit.environment_files {
            for (name, value) in self.variables(path, *may_lack)? {
                tool = tool.env(&name, value);
            }
        }
        if let Some(notified) = notified {
            tool = tool.env("NOTIFY_SOCKET", &notified.inside);
        }
        let (output, writer) = std::io::pipe().context("making a pipe")?;
        let second = writer.try_clone().context("making a pipe")?;
        let mut command = tool.into_command();
        // A separate process group: Ctrl-C goes to the host's side, which then stops everything at
        // once.
        command.stdin(Stdio::null()).stdout(writer).stderr(second).process_group(0);
        let child = {
            let _one = lock(&self.starting);
            let before = umask(Mode::from_raw_mode(unit.umask));
            let child = command.spawn();
            umask(before);
            child.with_context(|| format!("starting {}", exec.words.join(" ")))?
        };
        // Ends when the last program closes the pipe.
        thread::spawn(move || {
            for line in read_lines(output) {
                let (level, text) = split_priority(&line);
                self.log_line(&unit.name, level, text);
            }
        });
        Ok(child)
    }

    /// A file of variables (systemd.exec(5), EnvironmentFile=), without expansion.
    fn variables(&self, path: &Utf8Path, may_lack: bool) -> Result<Vec<(String, String)>> {
        let text = mounts::resolve_within(&self.order.root, path)
            .and_then(|fd| Ok(fs::read_to_string(mounts::by_descriptor(&fd))?));
        let text = match text {
            Err(_) if may_lack => return Ok(Vec::new()),
            text => text.with_context(|| format!("reading {path}"))?,
        };
        let plain = |line: &&str| !line.is_empty() && !line.starts_with(['#', ';']);
        let pairs = text.lines().map(str::trim).filter(plain).filter_map(|l| l.split_once('='));
        Ok(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// Forwards what services write to the kernel's log.
    fn kernel_log(&self) {
        let path = self.order.root.join(mounts::KERNEL_LOG);
        // Also open for writing, so that it never reaches its end.
        let Ok(log) = File::options().read(true).write(true).open(&path) else { return };
        for line in read_lines(log) {
            let (level, text) = split_priority(&line);
            self.log_line("kernel", level, text);
        }
    }

    /// Reports when all services have started and every declared address answers with its expected
    /// status.
    fn watch_health(&self) {
        let units = &self.order.system.units;
        let mut settled = lock(&self.settled);
        while settled.len() < units.len() {
            settled = self.changed.wait(settled).unwrap_or_else(PoisonError::into_inner);
        }
        drop(settled);
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(ANSWER))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        let agent = ureq::Agent::from(config);
        for HttpCheck { url, status } in &self.order.system.addresses {
            let found = || Some(agent.get(url).call().ok()?.status().as_u16());
            while found() != Some(*status) {
                thread::sleep(ASK);
            }
        }
        self.send(&Event::Well { seconds: self.began.elapsed().as_secs_f64() });
    }

    /// Runs a command in the root, as root.
    fn command(&self, words: &[String]) {
        let ran = self
            .enter(&[], Utf8Path::new("/"))
            .args(words)
            .into_command()
            .stdin(Stdio::null())
            .process_group(0)
            .output();
        self.send(&match ran {
            Ok(output) => Event::Ended {
                code: output.status.code().unwrap_or(-1),
                output: String::from_utf8_lossy(&output.stdout).into_owned(),
                errors: String::from_utf8_lossy(&output.stderr).into_owned(),
            },
            Err(error) => {
                Event::Ended { code: -1, output: String::new(), errors: error.to_string() }
            }
        });
    }
}

/// The socket on which a service reports that it has started (sd_notify(3)).
struct Notified {
    socket: UnixDatagram,
    /// Its path in the root.
    inside: String,
}

impl Notified {
    fn new(root: &Utf8Path, unit: &str) -> Result<Self> {
        let context = || format!("listening to {unit}");
        let run = File::open(root.join("run")).with_context(context)?;
        let name = format!("{unit}.notify");
        let inside = format!("/run/{name}");
        none_if_missing(fs::remove_file(root.join("run").join(&name))).with_context(context)?;
        // A socket's path has at most 107 bytes; the root's own may have more.
        let path = format!("{}/{name}", mounts::by_descriptor(&run));
        let socket = UnixDatagram::bind(path).with_context(context)?;
        socket.set_nonblocking(true).with_context(context)?;
        Ok(Self { socket, inside })
    }

    /// Its status text, once it has started.
    fn ready(&self) -> Option<String> {
        let mut message = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut message) {
            let text = String::from_utf8_lossy(message.get(..length)?);
            if text.lines().any(|line| line == "READY=1") {
                let status = text.lines().find_map(|line| line.strip_prefix("STATUS="));
                return Some(status.unwrap_or_default().to_owned());
            }
        }
        None
    }
}

/// Kills a program and its children.
fn kill_program(child: &Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        // It may have just ended, which is fine.
        kill_process_group(group, Signal::KILL).ok();
    }
}

/// Lines of any bytes, up to the end of the file or an error.
fn read_lines(source: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(source)
        .split(b'\n')
        .map_while(Result::ok)
        .map(|line| String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// A line's priority, if it begins with one (sd-daemon(3)), and its text.
fn split_priority(line: &str) -> (u8, &str) {
    let parts = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
    match parts.and_then(|(level, text)| Some((level.parse().ok()?, text))) {
        Some((level @ 0..=7, text)) => (level, text),
        _ => (INFO, line),
    }
}

/// Forwards connections of the host's port to the robot's. The host's socket was created outside of
/// this system's network, the other one is created inside.
fn hand_on(listener: &TcpListener) {
    for outer in listener.incoming() {
        let Ok(outer) = outer else { continue };
        thread::spawn(move || {
            // Nothing is listening yet: close the connection.
            let inner = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).ok()?;
            let (from, to) = (outer.try_clone().ok()?, inner.try_clone().ok()?);
            let there = thread::spawn(move || copy_stream(from, to));
            copy_stream(inner, outer);
            there.join().ok()
        });
    }
}

/// Copies bytes to the end. A broken connection is treated as ended.
fn copy_stream(mut from: TcpStream, mut to: TcpStream) {
    drop(std::io::copy(&mut from, &mut to));
    drop(to.shutdown(Shutdown::Write));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lines_priority_is_taken_off() {
        assert_eq!(split_priority("<3>bad"), (3, "bad"));
        assert_eq!(split_priority("<9>text"), (6, "<9>text"));
        assert_eq!(split_priority("<b>text"), (6, "<b>text"));
        assert_eq!(split_priority("plain"), (6, "plain"));
    }

    #[test]
    fn bytes_reach_the_other_side_and_so_does_the_end() {
        let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (outer, inner) = (listen(), listen());
        let mut client = TcpStream::connect(outer.local_addr().unwrap()).unwrap();
        let from = outer.accept().unwrap().0;
        let to = TcpStream::connect(inner.local_addr().unwrap()).unwrap();
        let mut server = inner.accept().unwrap().0;
        let passing = thread::spawn(move || copy_stream(from, to));
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut status_text = String::new();
        server.read_to_string(&mut status_text).unwrap();
        assert_eq!(status_text, "question");
        passing.join().unwrap();
    }
}
