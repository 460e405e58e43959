//! The update user's interface, from the SSH command to the agent and back: client and server are the real program,
//! and this test acts as sshd and systemd. Commands that are not allowed do not reach the agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use bundle::bootstate::Slot;
use common::rights::is_root;
use common::{Plan, Robot, bundle_of, bundle_of_version, new_system};
use serde_json::Value;

fn slotd(robot: &Robot) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
    command.arg("--root").arg(robot.dir.path()).arg("door");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A robot with the socket: each connection gets a server, as with systemd's `Accept=yes`.
fn robot() -> Robot {
    let robot = Plan::default().make();
    robot.file("etc/passwd", "root:x:0:0:::\nupdate:x:60000:60000::/:/bin/sh\n");
    robot.file("run/slipway/.keep", "");
    let listener = UnixListener::bind(robot.path(slotd::door::SOCKET)).unwrap();
    let root = robot.dir.path().to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
            command.arg("--root").arg(&root).args(["door", "--serve"]);
            let mut child = command.stdin(Stdio::from(OwnedFd::from(stream))).spawn().unwrap();
            std::thread::spawn(move || child.wait());
        }
    });
    robot
}

/// The output of a session in which the user runs `line` and sends `input`.
fn session(robot: &Robot, line: &str, input: &[u8]) -> Output {
    let mut command = slotd(robot);
    command.env("SSH_ORIGINAL_COMMAND", line).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // The server may close without reading it.
    drop(stdin.write_all(input));
    drop(stdin);
    child.wait_with_output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[test]
fn an_update_is_installed_through_the_door() {
    let robot = robot();
    let status = session(&robot, "slotd status --format json", b"");
    assert!(status.status.success(), "{status:?}");
    assert_eq!(json(&status)["version"], "1.0.0");
    let content = new_system(robot.size, 3);
    let bundle = bundle_of(&content);
    let verified = session(&robot, "slotd verify - --format json", &bundle);
    assert!(verified.status.success(), "{verified:?}");
    let installed = session(&robot, "slotd install - --format json", &bundle);
    assert!(installed.status.success(), "{installed:?}");
    assert_eq!(json(&installed)["slot"], "b");
    assert!(String::from_utf8_lossy(&installed.stderr).contains("\"progress\""), "{installed:?}");
    assert!(robot.slot(Slot::B) == content, "slot b has other bytes");
    assert!(robot.state().trial.is_some());
    let log = session(&robot, "slotd log -n 1 --format json", b"");
    assert_eq!(json(&log).as_array().unwrap().len(), 1);
}

#[test]
fn the_agents_refusals_and_exit_codes_come_back() {
    let robot = robot();
    let old = bundle_of_version(&new_system(robot.size, 3), "0.5.0", "0.1.0");
    let refused = session(&robot, "slotd install - --format json", &old);
    assert_eq!(json(&refused)["refused"]["code"], "below-floor");
    assert_eq!(refused.status.code(), Some(3));
    let cut = session(
        &robot,
        "slotd install - --format json",
        &bundle_of(&new_system(robot.size, 3))[..9000],
    );
    assert_eq!(cut.status.code(), Some(5), "{cut:?}");
    assert!(robot.state().trial.is_none());
}

#[test]
fn nothing_else_is_offered() {
    let robot = robot();
    let before = robot.events().len();
    let old = bundle_of_version(&new_system(robot.size, 3), "0.5.0", "0.1.0");
    for line in [
        "",
        "slotd install - --allow-downgrade why",
        "slotd boot-other",
        "slotd roll-back",
        "slotd restore -",
        "slotd backup -",
        "slotd keys",
        "slotd reset",
        "slotd commit",
        "slotd install /etc/passwd",
        "/usr/lib/openssh/sftp-server",
        "slotd status; touch /tmp/x",
    ] {
        let refused = session(&robot, line, &old);
        assert_eq!(json(&refused)["refused"]["code"], "not-offered", "{line}: {refused:?}");
        assert_eq!(refused.status.code(), Some(4), "{line}");
    }
    assert_eq!(robot.events().len(), before, "the agent was asked");
    assert!(robot.state().trial.is_none());
}

/// The server's answer to arbitrary bytes on its socket.
fn raw(robot: &Robot, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(robot.path(slotd::door::SOCKET)).unwrap();
    // The server may have closed already.
    drop(stream.write_all(bytes));
    drop(stream.shutdown(std::net::Shutdown::Write));
    let mut printed = Vec::new();
    drop(stream.read_to_end(&mut printed));
    String::from_utf8_lossy(&printed).into_owned()
}

#[test]
fn a_client_of_somebodys_own_gets_no_further() {
    let robot = robot();
    let long = [b"{\"verb\":\"status\"".as_slice(), &[b' '; 4096], b"}\n"].concat();
    for bytes in [
        b"".as_slice(),
        b"\n",
        b"slotd status\n",
        b"{\"verb\":\"reset\"}\n",
        b"{\"verb\":{\"install\":{\"no-restart\":true,\"allow-downgrade\":\"why\"}}}\n",
        b"{\"verb\":{\"log\":{\"last\":\"1; id\"}}}\n",
        b"{\"verb\":\"status\",\"root\":\"/tmp\"}\n",
        &long,
    ] {
        let printed = raw(&robot, bytes);
        assert!(printed.contains("not-offered"), "{}: {printed}", String::from_utf8_lossy(bytes));
    }
    assert!(raw(&robot, b"{\"verb\":\"status\",\"json\":true}\n").contains("1.0.0"));
}

#[test]
fn another_user_is_refused_also_where_the_socket_lets_him() {
    // Only root can become another user.
    if !is_root("another_user_is_refused_also_where_the_socket_lets_him") {
        return;
    }
    let robot = robot();
    for path in ["", "run", "run/slipway"] {
        std::fs::set_permissions(robot.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(robot.path(slotd::door::SOCKET), PermissionsExt::from_mode(0o777))
        .unwrap();
    // A copy of the program: its build directory may be inaccessible to other users.
    let program = robot.path("slotd");
    // Made by `cp`: while this process had it open for writing, a child that another test starts would, too, and it could not run.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_slotd")).arg(&program).status();
    assert!(copied.unwrap().success());
    for (uid, expected) in [(60000, "1.0.0"), (65534, "not-offered")] {
        let mut command = Command::new(&program);
        command.arg("--root").arg(robot.dir.path()).arg("door").uid(uid).gid(uid);
        command.env("SSH_ORIGINAL_COMMAND", "slotd status --format json").stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains(expected), "{uid}: {output:?}");
    }
}
