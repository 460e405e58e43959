//! Calls other programs; a missing program fails the test.
#![allow(dead_code)]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use camino::{Utf8Path, Utf8PathBuf};
use xtask::exec::{self, Tool};

pub fn find(program: &str) -> Utf8PathBuf {
    exec::find_program(program)
        .unwrap_or_else(|| panic!("this test needs {program}: cargo xtask doctor --install"))
}

/// Makes a program, mode 0755. A separate process writes it: if this one did, a child that another
/// test starts meanwhile would have it open for writing, and until that child runs its own program,
/// the kernel refuses to run this one (`ETXTBSY`).
pub fn make_program(path: &Utf8Path, content: impl AsRef<[u8]>) {
    let mut writer = Command::new(find("install"));
    writer.args(["-m", "0755", "/dev/stdin", path.as_str()]).stdin(Stdio::piped());
    let mut child = writer.spawn().expect("install runs");
    child.stdin.take().expect("a pipe").write_all(content.as_ref()).expect("written");
    assert!(child.wait().expect("waited").success(), "{path} was not written");
}

/// A tool with messages in English and times in UTC.
pub fn tool(program: &str) -> Tool {
    Tool::new(find(program)).env("LC_ALL", "C").env("TZ", "UTC")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The standard output of a program that must have succeeded.
pub fn good(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}
