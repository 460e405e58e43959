//! Records a test that this machine cannot run, or that only `test --all` runs; `cargo xtask test` lists it.
#![allow(dead_code)]

use std::io::Write;

use xtask::cmd::check::SKIPPED;

/// Says that a test is not run: why, and what would run it.
pub fn skip(test: &str, why: &str, help: &str) {
    println!("skipped {test}: {why}\nhelp: {help}");
    if let Some(path) = std::env::var_os(SKIPPED) {
        let line = format!("{}\n", serde_json::json!({ "test": test, "why": why, "help": help }));
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        // In one call: tests of several threads and programs write.
        let written = file.as_mut().map(|file| file.write_all(line.as_bytes()));
        written.expect("the file is opened").expect("it is written");
    }
}

/// Whether the slow tests were asked for; says that this one is left out, if they were not.
pub fn all(test: &str) -> bool {
    let all = std::env::var_os(xtask::cmd::check::ALL).is_some();
    if !all {
        skip(test, "they are slow", "cargo xtask test --all");
    }
    all
}
