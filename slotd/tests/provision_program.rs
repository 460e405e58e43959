//! Provisioning by the real program: its output, file modes with any umask, and kills at any time. A separate test
//! process, because a child that is being started shares the locks of its parent for a moment.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/crash.rs"]
#[allow(dead_code)]
mod crash;
#[path = "common/api_robot.rs"]
mod robot;

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use robot::{Robot, SITE, complete, old_tree};
use serde_json::Value;

#[test]
fn the_tree_is_exact_whatever_the_modes_and_the_mask() {
    let robot = Robot::new();
    robot.resources();
    for (path, mode) in [("nginx.conf", 0o4666), ("scripts/start", 0o600), ("scripts/deep", 0o700)]
    {
        robot.mode(&format!("{SITE}/robotapi/resources/{path}"), mode);
    }
    let mut command = Command::new("sh");
    let script = "umask 077; exec \"$0\" \"$@\"";
    let output =
        command.args(["-c", script, env!("CARGO_BIN_EXE_slotd"), "--format", "json", "--root"]);
    let output = output.arg(robot.dir.path()).arg("provision").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(robot.system(), complete());
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["outcome"], "provisioned");
    assert_eq!(printed["files"], 5);
    assert_eq!(printed["package"], "/usr/lib/python3.11/site-packages/robotapi");
    assert_eq!(robot.leftovers(), [""; 0]);
    assert_eq!(robot.events(), ["provisioned"]);
}

#[test]
fn drift_is_a_refusal_with_its_places() {
    let robot = Robot::new();
    robot.resources();
    robot.run().unwrap();
    let check = |format: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
        command.args(["--format", format, "--root"]).arg(robot.dir.path());
        command.args(["provision", "--check"]).output().unwrap()
    };
    assert!(check("text").status.success());
    robot.file("data/system/added", "");
    let printed = check("json");
    let refused: Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!(
        (printed.status.code(), refused["refused"]["code"].as_str()),
        (Some(4), Some("drift"))
    );
    let printed = String::from_utf8(check("text").stderr).unwrap();
    assert_eq!(
        printed,
        "slotd: /data/system differs from /usr/lib/python3.11/site-packages/robotapi/resources in 1 places\n  \
         added: superfluous [drift]\nhelp: run `slotd provision` to restore the package's resources\n"
    );
}

#[test]
fn the_real_program_killed_at_any_time_leaves_one_whole_tree() {
    let robot = Robot::new();
    robot.resources();
    for number in 0..200 {
        robot.resource(&format!("many/{number}"), &"x".repeat(5000));
    }
    robot.run().unwrap();
    let new = robot.system();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
        command.arg("--root").arg(robot.dir.path()).arg("provision");
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let reset = || {
        fs::remove_dir_all(robot.path("data/system")).unwrap();
        old_tree(&robot)
    };
    reset();
    let began = Instant::now();
    assert!(start().wait().unwrap().success());
    let whole = began.elapsed();
    let (mut olds, mut news, mut left) = (0, 0, 0);
    for number in 0..60u32 {
        let before = reset();
        let mut child = start();
        std::thread::sleep(whole * number / 50);
        child.kill().unwrap();
        child.wait().unwrap();
        let found = robot.system();
        assert!(found == before || found == new, "killed after {number}/50 of {whole:?}");
        if found == before {
            olds += 1
        } else {
            news += 1
        }
        left += robot.leftovers().len();
    }
    println!("{whole:?}: 60 kills, {olds} old trees, {news} new ones, {left} leftovers");
    assert!(olds > 0 && news > 0);
    robot.run().unwrap();
    assert_eq!((robot.system(), robot.leftovers()), (new, Vec::new()));
}

/// On a separate file system in a mount namespace, so that its free space does not depend on the machine.
#[test]
fn a_full_disk_is_told_before_anything_is_written() {
    let robot = Robot::new();
    robot.resources();
    robot.file(&format!("{SITE}/robotapi/resources/large"), &"1".repeat(3 << 20));
    old_tree(&robot);
    let script = "set -e; data=$2/data; mkdir \"$2/old\"; cp -a \"$data/.\" \"$2/old\"
        mount -t tmpfs -o size=2m none \"$data\"; cp -a \"$2/old/.\" \"$data\"
        code=0; \"$1\" --format json --root \"$2\" provision || code=$?
        diff -r --no-dereference \"$2/old/system\" \"$data/system\" >&2
        ls -A \"$data\" | grep '^\\.' >&2 || exit $code; exit 99";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]);
    command.arg(env!("CARGO_BIN_EXE_slotd")).arg(robot.dir.path());
    let output = command.output().expect("this test needs unshare");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert_eq!(printed["refused"]["code"], "no-space", "{output:?}");
    assert!(output.status.code() != Some(99) && output.stderr.is_empty(), "{output:?}");
}
