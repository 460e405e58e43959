//! `run --local`: the robot's own system on this machine, started for real, with the rights of an ordinary user.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::exec;
use xtask::wheel::WheelLock;

use crate::support::{Built, built, root, say};

const BOARD: &str = "qemu-arm64";

/// How soon nothing may be left of a system that was ended.
const END: Duration = Duration::from_secs(10);

/// How long the tool may take to stop its services, on a busy machine.
const STOP: Duration = Duration::from_secs(120);

/// How long an answer may take: the API's first request reads definitions, under emulation.
const ANSWER: Duration = Duration::from_secs(60);

/// What takes root's rights from a program.
const WITHOUT_RIGHTS: [&str; 2] = ["--inh-caps=-all", "--no-new-privs"];

/// Starts a program without root's capabilities, except one if it is kept, without which root
/// outside cannot be root in a namespace (user_namespaces(7)).
fn without_rights(program: &str, kept: bool) -> Command {
    let bounds = if kept { "--bounding-set=-all,+setfcap" } else { "--bounding-set=-all" };
    let mut command = Command::new(exec::find_program("setpriv").expect("setpriv"));
    command.args(WITHOUT_RIGHTS).args([bounds, program]);
    command
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The tool, with `run --local` and more. Root does without its rights, so that nothing needs them,
/// unless it is in a chroot, where user namespaces are not available.
fn command(more: &[&str]) -> Command {
    let tool = env!("CARGO_BIN_EXE_xtask");
    let tried = || {
        let mut command = without_rights("unshare", true);
        command.args(["--user", "--map-root-user", "true"]).stderr(Stdio::null()).status()
    };
    // A shell without job control starts background jobs with SIGINT ignored, and their children inherit that.
    let mut command = Command::new(exec::find_program("env").expect("env"));
    command.arg("--default-signal=INT");
    if is_root() && tried().expect("setpriv runs").success() {
        let dropped = without_rights(tool, true);
        command.arg(dropped.get_program()).args(dropped.get_args());
    } else {
        command.arg(tool);
    }
    command.args(["run", "--local", "--offline", "--board", BOARD]).args(more);
    command.current_dir(root()).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::inherit());
    command
}

/// The error of a start that is refused.
fn refused(more: &[&str]) -> Result<String> {
    let printed = command(more).stderr(Stdio::piped()).output()?;
    ensure!(printed.status.code() == Some(1), "it ended with {}", printed.status);
    Ok(String::from_utf8(printed.stderr)?)
}

/// Ends with the value, whatever becomes of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The state of a service.
fn state<'a>(ready: &'a Value, unit: &str) -> &'a str {
    let services = ready["services"].as_array().map_or(&[][..], Vec::as_slice);
    let service =
        services.iter().find(|service| service["unit"] == format!("slipway-{unit}.service"));
    service.and_then(|service| service["state"].as_str()).unwrap_or("missing")
}

/// How often the agent has provisioned.
fn provisioned(data: &Utf8Path) -> Result<usize> {
    let log = fs::read_to_string(data.join("slotd/log/events.jsonl"))?;
    Ok(log.lines().filter(|line| line.contains("\"event\":\"provisioned\"")).count())
}

/// Status and text of an answer.
fn get(address: &str, path: &str) -> Result<(u16, String)> {
    let host = address.strip_prefix("http://").context("an address")?;
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut printed = String::new();
    stream.read_to_string(&mut printed)?;
    let status = printed.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = printed.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status.with_context(|| format!("reading {printed}"))?, body.to_owned()))
}

/// A process and all that it has started, each with the time of its start: numbers are used again.
fn family(first: u32) -> BTreeSet<(u32, String)> {
    let stats: Vec<(u32, u32, String)> = fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| stat(entry.file_name().to_str()?.parse().ok()?))
        .collect();
    let mut found: BTreeSet<u32> = [first].into();
    loop {
        let more: Vec<u32> = stats
            .iter()
            .filter(|(pid, parent, _)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, ..)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    stats.into_iter().filter(|s| found.contains(&s.0)).map(|(pid, _, time)| (pid, time)).collect()
}

/// Number, parent and start of a process that is not a zombie (proc_pid_stat(5)).
fn stat(pid: u32) -> Option<(u32, u32, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    (*fields.first()? != "Z").then_some(())?;
    Some((pid, fields.get(1)?.parse().ok()?, (*fields.get(19)?).to_owned()))
}

/// Ends it by a signal, and looks for what is left. How many services run at a moment is chance, but the tool,
/// what makes the namespaces, and process 1 in them are always there.
fn end(mut running: Running, signal: Signal) -> Result<()> {
    let family = family(running.0.id());
    ensure!(family.len() >= 3, "too few processes for a system: {family:?}");
    let pid = i32::try_from(running.0.id()).ok().and_then(Pid::from_raw).context("a number")?;
    kill_process(pid, signal)?;
    let deadline = Instant::now() + STOP;
    while running.0.try_wait()?.is_none() {
        ensure!(Instant::now() < deadline, "{signal:?} does not end it");
        std::thread::sleep(Duration::from_millis(50));
    }
    let deadline = Instant::now() + END;
    loop {
        let is_left = |(pid, time): &&(u32, String)| stat(*pid).is_some_and(|s| s.2 == *time);
        let left: Vec<_> = family.iter().filter(is_left).collect();
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "of {} processes these are left: {left:?}",
            family.len()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// In the first start all is new: data is provisioned, and the agent itself says so from within.
fn first_start(data: &Utf8Path) -> Result<String> {
    let started = Instant::now();
    let words =
        ["--fresh", "--port", "0", "--format", "json", "--", "slotd", "provision", "--check"];
    let printed = command(&words).output()?;
    let ready: Value = serde_json::from_slice(&printed.stdout).context("reading the result")?;
    let (well, all) = (&ready["seconds"], started.elapsed());
    say(format!("first start: well after {well} s, ended after {all:.1?}"));
    ensure!(printed.status.success() && ready["exit"] == 0, "{ready}");
    let output = ready["output"].as_str().unwrap_or_default();
    ensure!(output.starts_with("/data/system has the "), "{output}");
    for unit in ["state", "identity", "provision", "links"] {
        ensure!(state(&ready, unit) == "done", "{unit} is {}: {ready}", state(&ready, unit));
    }
    for unit in ["api", "proxy"] {
        ensure!(state(&ready, unit) == "started", "{unit} is {}: {ready}", state(&ready, unit));
    }
    for unit in ["seed", "network", "ssh-keys", "health"] {
        ensure!(state(&ready, unit) == "skipped", "{unit} is {}: {ready}", state(&ready, unit));
    }
    ensure!(ready["left-out"].to_string().contains("\"ssh.service\""), "{ready}");
    ensure!(provisioned(data)? == 1, "the log tells something else");
    Ok(fs::read_to_string(data.join("identity/machine-id"))?)
}

/// In the second one nothing is: the same machine, the same resources. It answers on 127.0.0.1.
fn second_start(built: &Built, data: &Utf8Path, machine: &str) -> Result<()> {
    let began = Instant::now();
    let mut running = Running(command(&["--port", "0", "--format", "json"]).spawn()?);
    let out = running.0.stdout.take().context("standard output")?;
    let mut results = serde_json::Deserializer::from_reader(out).into_iter::<Value>();
    let ready = results.next().context("it has ended")??;
    say(format!("second start: well after {:.1?}", began.elapsed()));
    ensure!(ready["unpacked"] == false, "the root was unpacked again");
    ensure!(state(&ready, "provision") == "done", "{ready}");
    ensure!(provisioned(data)? == 1, "it was provisioned again");
    ensure!(fs::read_to_string(data.join("identity/machine-id"))? == machine, "another machine");

    let address = ready["address"].as_str().context("an address")?;
    let (status, body) = get(address, "/health")?;
    let health: Value = serde_json::from_str(&body).with_context(|| format!("reading {body}"))?;
    let api = built.plan.api.as_ref().context("the product has an API")?;
    let locked = WheelLock::load(&root().join(&api.lock))?;
    let version = locked.wheels.iter().find(|w| api.package.starts_with(&format!("{}==", w.name)));
    ensure!(status == 200 && health["name"] == built.plan.network.hostname, "{status} {body}");
    ensure!(health["api_version"] == version.context("it is locked")?.version, "{body}");
    ensure!(get(address, "/nothing")?.0 == 404, "unknown paths have a content");

    // One at a time: `data` is one.
    let error = refused(&["--port", "0"])?;
    ensure!(error.contains("is in use: this system is already running"), "{error}");
    // As Ctrl-C does.
    end(running, Signal::INT)
}

/// A package of one's own goes before the image's: here it is the image's, at another place.
fn own_package(place: &Utf8Path, package: &str) -> Result<()> {
    let python = place.join("root/usr/local/lib");
    let version = python.read_dir_utf8()?.next().context("a directory of Python's")??;
    let site = version.path().join("dist-packages");
    let mut running =
        Running(command(&["--port", "0", "--site", site.as_str()]).stderr(Stdio::piped()).spawn()?);
    let errors = BufReader::new(running.0.stderr.take().context("standard error")?);
    let wanted = format!(" files of /data/apps/api/current/site/{package}");
    let mut lines = errors.lines().map_while(Result::ok).inspect(|line| say(line));
    let found = lines.find(|line| line.contains(&wanted));
    ensure!(found.is_some_and(|line| line.contains("provision")), "no line contains `{wanted}`");
    // Killed, it can clean nothing up. What it says until then is still heard.
    end(running, Signal::KILL)?;
    drop(lines);
    Ok(())
}

/// Where users may make no namespaces, it is said before any work.
fn forbidden() -> Result<()> {
    let tool = env!("CARGO_BIN_EXE_xtask");
    let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
    let mut command = match is_root() {
        true => without_rights(tool, false),
        false => {
            let mut command = Command::new(exec::find_program("unshare").context("unshare")?);
            command.args(["--user", "--map-root-user", "sh", "-c", script, tool]);
            command
        }
    };
    let printed = command.args(["run", "--local"]).current_dir(root()).output()?;
    let error = String::from_utf8(printed.stderr)?;
    ensure!(printed.status.code() == Some(1), "it ended with {}: {error}", printed.status);
    ensure!(error.starts_with("error: creating namespaces: "), "{error}");
    ensure!(error.contains("help:   sysctl user.max_user_namespaces"), "{error}");
    Ok(())
}

#[test]
fn the_robots_own_system_runs_here() -> Result<()> {
    let built = built(BOARD)?;
    let place: Utf8PathBuf = built.dist.join("local");
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port();
    let error = refused(&["--port", &port.to_string()])?;
    ensure!(error.contains(&format!("listening on port {port} of 127.0.0.1")), "{error}");
    ensure!(error.contains("help: stop the program that uses the port"), "{error}");

    forbidden()?;

    let machine = first_start(&place.join("data"))?;
    second_start(built, &place.join("data"), &machine)?;
    let api = built.plan.api.as_ref().context("the product has an API")?;
    own_package(&place, api.package.split("==").next().unwrap_or_default())?;
    // Some hundred megabytes that no other test wants.
    fs::remove_dir_all(&place).with_context(|| format!("removing {place}"))
}
