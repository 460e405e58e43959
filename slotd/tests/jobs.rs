//! An install continues when its client ends, however it ends; it can be watched and cancelled; a client that does not read
//! does not block it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use bundle::bootstate::Slot;
use common::{Plan, Robot, answer, bundle_of, new_system, write};
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

/// Longer than anything takes on a busy machine.
const FOR_EVER: Duration = Duration::from_secs(120);

const SIZE: u64 = 48 << 20;

/// A robot, and a client in its own process group that has received half of its bundle; the other half is not sent yet.
struct Scene {
    robot: Robot,
    new: Vec<u8>,
    bundle: Vec<u8>,
    client: Child,
    input: ChildStdin,
}

impl Scene {
    fn new() -> Self {
        let robot = Plan { size: SIZE, ..Plan::default() }.make();
        let new = new_system(SIZE, 3);
        let bundle = bundle_of(&new);
        let mut command = robot.command(&["install", "-"]);
        let mut client = command.stdin(Stdio::piped()).process_group(0).spawn().unwrap();
        let mut input = client.stdin.take().unwrap();
        input.write_all(&bundle[..bundle.len() / 2]).unwrap();
        let scene = Self { robot, new, bundle, client, input };
        scene.until("it begins", |job| job["progress"]["step"] == "write");
        scene
    }

    fn job(&self) -> Value {
        self.robot.run(&["job"])
    }

    /// Waits until the job's record meets a condition.
    fn until(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let job = self.job();
            if is(&job) {
                return job;
            }
            assert!(started.elapsed() < FOR_EVER, "{what}: {job}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the job has read everything that was sent, and sleeps: it can only be woken by the rest of its bundle.
    fn until_it_waits(&self) {
        let process = self.job()["process"].as_u64().unwrap();
        let sleeps = || {
            let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
            let stats = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("stat")));
            // proc_pid_stat(5): the state follows the name, which is in parentheses.
            let asleep = |stat: String| stat.rsplit(')').next().unwrap().starts_with(" S ");
            stats.map(Result::unwrap).all(asleep)
        };
        let (started, mut times) = (Instant::now(), 0);
        while times < 5 {
            let waits = ioctl_fionread(&self.input).unwrap() == 0 && sleeps();
            times = if waits { times + 1 } else { 0 };
            assert!(started.elapsed() < FOR_EVER, "it never waits");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.client.id()).unwrap()).unwrap()
    }

    /// Sends the rest, and expects the install to be done.
    fn goes_on(mut self) -> Robot {
        assert_eq!(self.job()["state"], "runs");
        // The client is gone; the pipe is not.
        self.input.write_all(&self.bundle[self.bundle.len() / 2..]).unwrap();
        drop(self.input);
        let watched = self.robot.run(&["job", "--watch"]);
        assert_eq!(watched["slot"], "b");
        assert!(self.robot.slot(Slot::B) == self.new, "slot b has other bytes");
        assert_eq!(self.robot.state().trial, Some(Slot::B));
        let job = self.robot.run(&["job"]);
        assert_eq!(job["state"]["done"]["answer"], watched);
        assert_eq!(job["cancellable"], false);
        // The result of a finished job can be read again.
        assert_eq!(self.robot.run(&["job", "--watch"]), watched);
        assert_eq!(self.robot.refused(&["job", "--cancel"]), (4, "no-job".to_owned()));
        self.client.wait().unwrap();
        self.robot
    }
}

#[test]
fn an_install_goes_on_when_its_client_is_killed() {
    let mut scene = Scene::new();
    scene.client.kill().unwrap();
    scene.client.wait().unwrap();
    // No other verb is admitted meanwhile.
    let other = write(scene.robot.dir.path(), "other.bundle", &scene.bundle);
    for args in [&["install", &other][..], &["commit"], &["boot-other"], &["provision"]] {
        assert_eq!(scene.robot.refused(args), (4, "busy".to_owned()), "{args:?}");
    }
    let robot = scene.goes_on();
    let by = robot.run(&["job"])["by"].clone();
    assert_eq!(by["uid"], rustix::process::getuid().as_raw());
    assert!(by["command"].as_str().unwrap().ends_with("install -"), "{by}");
    assert_eq!(by["rights"], "all");
}

#[test]
fn neither_a_hang_up_nor_ctrl_c_reach_the_install() {
    for signal in [Signal::HUP, Signal::INT] {
        let scene = Scene::new();
        kill_process_group(scene.pid(), signal).unwrap();
        scene.goes_on();
    }
}

#[test]
fn a_client_that_is_stopped_holds_nothing_up() {
    let mut scene = Scene::new();
    kill_process(scene.pid(), Signal::STOP).unwrap();
    scene.input.write_all(&scene.bundle[scene.bundle.len() / 2..]).unwrap();
    let Scene { robot, client, input, .. } = scene;
    drop(input);
    assert_eq!(robot.run(&["job", "--watch"])["slot"], "b");
    kill_process(Pid::from_raw(i32::try_from(client.id()).unwrap()).unwrap(), Signal::CONT)
        .unwrap();
    let output = client.wait_with_output().unwrap();
    // The pipe has only the progress that fitted; the answer waits a few seconds for the client.
    assert!(output.status.success() || answer(&output)["refused"]["code"] == "io", "{output:?}");
}

#[test]
fn a_cancelled_install_ends_and_resumes() {
    let mut scene = Scene::new();
    let mut cancel = scene.robot.command(&["job", "--cancel"]).spawn().unwrap();
    // The job checks for the request when it reads. The rest is sent slowly, so that it does not reach the end.
    let rest = scene.bundle[scene.bundle.len() / 2..].to_vec();
    for piece in rest.chunks(64 << 10).take(80) {
        if scene.input.write_all(piece).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(cancel.wait().unwrap().success());
    let output = scene.client.wait_with_output().unwrap();
    assert_eq!(answer(&output)["refused"]["code"], "cancelled", "{output:?}");
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(scene.robot.run(&["job"])["state"]["refused"]["code"], "cancelled");
    assert!(scene.robot.state().trial.is_none());
    let file = write(scene.robot.dir.path(), "update.bundle", &scene.bundle);
    let again = scene.robot.run(&["install", &file]);
    assert_eq!((&again["resumed"], &again["slot"]), (&true.into(), &"b".into()));
    assert!(scene.robot.slot(Slot::B) == scene.new, "slot b has other bytes");
}

#[test]
fn one_that_waits_for_its_bundle_is_cancelled_too() {
    let scene = Scene::new();
    scene.until_it_waits();
    let cancelled = scene.robot.run(&["job", "--cancel"]);
    assert_eq!(cancelled["state"]["refused"]["code"], "cancelled");
    let output = scene.client.wait_with_output().unwrap();
    // The process was terminated without an answer.
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    drop(scene.input);
    let file = write(scene.robot.dir.path(), "update.bundle", &scene.bundle);
    assert_eq!(scene.robot.run(&["install", &file])["resumed"], true);
}

/// The whole refusal of a command.
fn refusal(robot: &Robot, args: &[&str]) -> Value {
    answer(&robot.command(args).output().unwrap())["refused"].clone()
}

/// The answer as text.
fn in_text(robot: &Robot, verb: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
    let output = command.arg("--root").arg(robot.dir.path()).arg(verb).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The id of the process of the job.
fn process_of(job: &Value) -> Pid {
    Pid::from_raw(i32::try_from(job["process"].as_i64().unwrap()).unwrap()).unwrap()
}

/// Starts an install from a source that never answers, and expects a job that can be cancelled.
fn is_a_job_before_it_opens(source: &str) {
    let robot = Plan::default().make();
    let mut client = robot.command(&["install", source]).process_group(0).spawn().unwrap();
    let started = Instant::now();
    let job = loop {
        let job = robot.run(&["job"]);
        if job["state"] == "runs" {
            break job;
        }
        assert!(started.elapsed() < FOR_EVER, "{source}: {job}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(
        (&job["request"]["install"]["source"], &job["progress"]),
        (&source.into(), &Value::Null)
    );
    let file = write(robot.dir.path(), "other.bundle", &bundle_of(&new_system(robot.size, 3)));
    assert_eq!(robot.refused(&["install", &file]), (4, "busy".to_owned()));
    let group = Pid::from_raw(i32::try_from(client.id()).unwrap()).unwrap();
    // Not SIGINT: a program that a script starts in the background inherits that it is ignored.
    kill_process_group(group, Signal::TERM).unwrap();
    // Not to the end of its output, which the job has inherited.
    assert_eq!(client.wait().unwrap().code(), None);
    assert_eq!(robot.run(&["job"])["state"], "runs");
    let cancelled = robot.run(&["job", "--cancel"]);
    assert_eq!(cancelled["state"]["refused"]["code"], "cancelled");
    assert!(robot.state().trial.is_none());
    // Nothing is left of it.
    assert_eq!(robot.run(&["install", &file])["slot"], "b");
}

#[test]
fn one_whose_server_never_answers_is_a_job() {
    // The kernel accepts the connection; the request is not answered.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    is_a_job_before_it_opens(&format!("http://{}/update.bundle", server.local_addr().unwrap()));
}

#[test]
fn one_whose_pipe_has_no_writer_is_a_job() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success(), "{made}");
    is_a_job_before_it_opens(pipe.to_str().unwrap());
}

#[test]
fn a_source_that_cannot_be_opened_leaves_a_record() {
    let robot = Plan::default().make();
    let refused = refusal(&robot, &["install", "/nowhere/\x1b[31m.bundle"]);
    assert_eq!(refused["code"], "source");
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("/nowhere/\\u{1b}[31m.bundle"), "{message}");
    assert_eq!(robot.run(&["job"])["state"]["refused"], refused);
    // Nothing can be opened, and nothing may be.
    refusal(&robot, &["install", "http://user:hunter2@127.0.0.1:1/x.bundle"]);
    refusal(&robot, &["install", "http://127.0.0.1:1/x.bundle"]);
    let log = robot.run(&["log"]);
    let logged: Vec<_> = log.as_array().unwrap().iter().collect();
    let [first, secret, last] = logged.as_slice() else { panic!("{log}") };
    assert_eq!((&first["event"], &first["message"]), (&"install-refused".into(), &message.into()));
    assert!(secret["message"].as_str().unwrap().contains("user name or a password"), "{secret}");
    assert!(last["message"].as_str().unwrap().contains("127.0.0.1:1"), "{last}");
    assert!(!log.to_string().contains("hunter2"), "{log}");
}

#[test]
fn an_address_with_a_password_is_neither_used_nor_recorded() {
    let robot = Plan::default().make();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let host = server.local_addr().unwrap();
    for address in [
        format!("http://user:hunter2@{host}/x.bundle"),
        format!("https://hunter2@{host}?a=b"),
        format!("HTTPS://user:hunter2@{host}"),
    ] {
        for verb in ["install", "verify"] {
            let output = robot.command(&[verb, &address]).output().unwrap();
            assert_eq!(answer(&output)["refused"]["code"], "source", "{output:?}");
            let printed = [output.stdout, output.stderr].concat();
            assert!(!String::from_utf8(printed).unwrap().contains("hunter2"), "{address}");
        }
    }
    assert!(server.accept().is_err(), "the address was used");
    assert_eq!(robot.run(&["job"]), Value::Null);
    assert!(!robot.path("run/slotd/job.json").exists());
    // An `@` after the host does not start a password.
    let refused = refusal(&robot, &["verify", "http://127.0.0.1:1/user@1.bundle"]);
    assert!(refused["message"].as_str().unwrap().contains("user@1.bundle"), "{refused}");
}

#[test]
fn a_stopped_job_is_cancelled_too() {
    let scene = Scene::new();
    kill_process(process_of(&scene.job()), Signal::STOP).unwrap();
    let cancelled = scene.robot.run(&["job", "--cancel"]);
    assert_eq!(cancelled["state"]["refused"]["code"], "cancelled");
    assert_eq!(scene.client.wait_with_output().unwrap().status.code(), Some(1));
}

#[test]
fn a_damaged_record_does_not_keep_a_job_from_being_cancelled() {
    for damage in ["", "{", "[]", "a later version"] {
        let scene = Scene::new();
        // Then it writes nothing more.
        scene.until_it_waits();
        let job = scene.job();
        let text = match damage {
            "a later version" => {
                let mut later = job.clone();
                later["state"] = serde_json::json!({ "paused": {} });
                later.to_string()
            }
            damage => damage.to_owned(),
        };
        scene.robot.file("run/slotd/job.json", text);
        let shown = scene.job();
        for key in ["id", "request", "by", "process", "state"] {
            assert_eq!(shown[key], job[key], "{damage}: {key}");
        }
        let cancelled = scene.robot.run(&["job", "--cancel"]);
        assert_eq!(cancelled["state"]["refused"]["code"], "cancelled", "{damage}");
        assert_eq!(scene.robot.run(&["job"]), cancelled, "{damage}");
        assert_eq!(scene.client.wait_with_output().unwrap().status.code(), Some(1));
    }
}

#[test]
fn a_full_run_does_not_make_a_done_job_a_killed_one() {
    let mut scene = Scene::new();
    scene.until_it_waits();
    // Every later write of the record fails as on a full file system.
    symlink("/dev/full", scene.robot.path("run/slotd/job.partial")).unwrap();
    scene.input.write_all(&scene.bundle[scene.bundle.len() / 2..]).unwrap();
    let Scene { robot, new, client, input, .. } = scene;
    drop(input);
    let output = client.wait_with_output().unwrap();
    assert_eq!(answer(&output)["slot"], "b", "{output:?}");
    assert!(robot.slot(Slot::B) == new, "slot b has other bytes");
    assert_eq!(robot.run(&["job"])["state"], "lost");
    let refused = refusal(&robot, &["job", "--watch"]);
    assert!(refused["message"].as_str().unwrap().contains("`/run` is full"), "{refused}");
    assert!(refused["help"].as_str().unwrap().contains("`slotd status`"), "{refused}");
    let text = in_text(&robot, "job");
    assert!(text.contains("ended without leaving its result"), "{text}");
}

#[test]
fn an_answer_that_cannot_be_printed_is_reported() {
    let robot = Plan::default().make();
    for (format, verb) in [("json", "status"), ("text", "status"), ("json", "roll-back")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
        command.args(["--format", format, "--root"]).arg(robot.dir.path()).arg(verb);
        command.stdout(File::options().write(true).open("/dev/full").unwrap());
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("could not be written to standard output: "), "{verb}: {text}");
    }
}

#[test]
fn a_job_that_was_killed_is_told_from_one_that_runs() {
    let scene = Scene::new();
    // The status says that it runs, not that it was interrupted.
    let status = scene.robot.run(&["status"]);
    assert_eq!((&status["job"], status["interrupted"].is_object()), (&1.into(), true));
    let text = in_text(&scene.robot, "status");
    assert!(text.contains("\njob        1 is running"), "{text}");
    assert!(!text.contains("interrupted"), "{text}");
    let process = process_of(&scene.job());
    assert_ne!(process, scene.pid());
    kill_process(process, Signal::KILL).unwrap();
    let output = scene.client.wait_with_output().unwrap();
    assert_eq!(answer(&output)["refused"]["code"], "io", "{output:?}");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(scene.robot.run(&["job"])["state"], "lost");
    assert_eq!(scene.robot.run(&["status"])["job"], Value::Null);
    let text = in_text(&scene.robot, "status");
    assert!(text.contains("\ninterrupted: an install of "), "{text}");
    assert_eq!(scene.robot.refused(&["job", "--watch"]), (1, "io".to_owned()));
    assert_eq!(scene.robot.refused(&["job", "--cancel"]), (4, "no-job".to_owned()));
}

#[test]
fn before_the_first_job_there_is_none_and_a_damaged_record_is_no_obstacle() {
    let robot = Plan::default().make();
    assert_eq!(robot.run(&["job"]), Value::Null);
    assert_eq!(robot.refused(&["job", "--watch"]), (4, "no-job".to_owned()));
    assert_eq!(robot.refused(&["job", "--cancel"]), (4, "no-job".to_owned()));
    robot.file("run/slotd/job.json", "{");
    assert_eq!(robot.refused(&["job", "--cancel"]), (4, "no-job".to_owned()));
    for args in [&["job"][..], &["job", "--watch"]] {
        let refused = refusal(&robot, args);
        assert_eq!(refused["code"], "io");
        let message = refused["message"].as_str().unwrap();
        assert!(message.starts_with("reading the job's record /run/slotd/job.json: "), "{message}");
        assert!(!refused["help"].as_str().unwrap().contains("card"), "{refused}");
    }
    let file = write(robot.dir.path(), "update.bundle", &bundle_of(&new_system(robot.size, 3)));
    robot.run(&["install", &file]);
    let job = robot.run(&["job"]);
    assert_eq!((&job["id"], &job["state"]["done"]["restarts"]), (&1.into(), &false.into()));
    assert_eq!(job["request"]["install"]["source"], file);
    let text = in_text(&robot, "job");
    assert!(text.starts_with("job 1 (install): done\nrequested by user id "), "{text}");
    // Names that others have chosen do not control the terminal.
    let mut stranger = job;
    stranger["by"]["unit"] = "\x1b[31m.scope".into();
    robot.file("run/slotd/job.json", stranger.to_string());
    let text = in_text(&robot, "job");
    assert!(text.contains(" in \\u{1b}[31m.scope: "), "{text}");
}

#[test]
fn the_rights_of_the_user_update_hold_in_the_agent_itself() {
    let robot = Plan::default().make();
    let file = write(robot.dir.path(), "update.bundle", &bundle_of(&new_system(robot.size, 3)));
    robot.run(&["--as-update", "status"]);
    for args in [
        &["--as-update", "commit"][..],
        &["--as-update", "install", &file],
        &["--as-update", "install", "--allow-downgrade", "why", "-"],
        &["--as-update", "job", "--cancel"],
        &["--as-update", "job", "--watch"],
        &["--as-update", "report"],
    ] {
        assert_eq!(robot.refused(args), (4, "not-offered".to_owned()), "{args:?}");
    }
    assert!(robot.state().trial.is_none());
    assert!(!robot.path("run/slotd/job.json").exists());
    assert!(fs::read_dir(robot.path("run")).is_err() || !robot.path("run/slotd/lock").exists());
}
