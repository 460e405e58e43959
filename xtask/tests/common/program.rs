//! Programs of others: a missing one is a failure.
#![allow(dead_code)]

use std::process::Output;

use camino::Utf8PathBuf;
use xtask::exec::{self, Tool};

pub fn find(program: &str) -> Utf8PathBuf {
    exec::find_program(program)
        .unwrap_or_else(|| panic!("this test needs {program}: cargo xtask doctor --install"))
}

/// In no language and in UTC.
pub fn tool(program: &str) -> Tool {
    Tool::new(find(program)).env("LC_ALL", "C").env("TZ", "UTC")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// It has succeeded; what it printed.
pub fn good(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}
