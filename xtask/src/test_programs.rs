//! Runs the test programs of the workspace side by side: most of them mostly wait for programs that they start.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use camino::Utf8PathBuf;
use serde::Deserialize;

use crate::exec::{self, Tool};
use crate::parallel;
use crate::progress::{format_duration, list_names, say};

/// How many programs run at the same time. Each runs as many tests in parallel as there are cores.
const SIDE_BY_SIDE: usize = 2;

/// The programs that run for longer than all others together. They start first.
const LONGEST: [&str; 2] = ["xtask --test tests", "xtask --test buildroot_tree"];

/// A compiled test program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestProgram {
    /// What selects it, as arguments of `cargo test --package`: `slotd --test jobs`.
    pub name: String,
    /// The program.
    pub executable: Utf8PathBuf,
    /// The directory of its package, in which it runs.
    pub package: Utf8PathBuf,
}

/// A line of `cargo test --no-run --message-format json` (The Cargo Book, "External tools"), as far as it is about a test program.
#[derive(Deserialize)]
struct CargoMessage {
    reason: String,
    manifest_path: Option<Utf8PathBuf>,
    target: Option<CargoTarget>,
    profile: Option<CargoProfile>,
    executable: Option<Utf8PathBuf>,
}

#[derive(Deserialize)]
struct CargoTarget {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct CargoProfile {
    test: bool,
}

/// Reads cargo's messages: the test programs, those that run longest first.
///
/// # Errors
/// When a line is not a message of cargo.
pub fn parse_messages(messages: &str) -> Result<Vec<TestProgram>> {
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: CargoMessage = serde_json::from_str(line)
            .with_context(|| format!("reading cargo's message `{line}`"))?;
        let (Some(target), Some(executable), Some(manifest)) =
            (message.target, message.executable, message.manifest_path)
        else {
            continue;
        };
        if message.reason != "compiler-artifact" || !message.profile.is_some_and(|p| p.test) {
            continue;
        }
        let package = manifest.parent().context("a manifest without a directory")?.to_owned();
        // Each package of this workspace has the name of its directory.
        let name = package.file_name().unwrap_or_default();
        let name = match target.kind.first().map_or("", String::as_str) {
            "test" => format!("{name} --test {}", target.name),
            "bin" => format!("{name} --bin {}", target.name),
            _ => format!("{name} --lib"),
        };
        programs.push(TestProgram { name, executable, package });
    }
    let rank = |name: &str| LONGEST.iter().position(|long| *long == name).unwrap_or(LONGEST.len());
    programs.sort_by(|a, b| (rank(&a.name), &a.name).cmp(&(rank(&b.name), &b.name)));
    Ok(programs)
}

/// Runs all programs to the end, also if tests fail. `configure` sets the environment of each; `show` receives the whole
/// output of a program when it has ended.
///
/// # Errors
/// Names the programs with a failed test.
pub fn run_programs(
    programs: &[TestProgram],
    configure: impl Fn(Tool) -> Tool + Sync,
    show: impl Fn(&str) + Sync,
) -> Result<()> {
    // How many have ended. Other programs write to the same terminal, so there is no bar: a line for each.
    let ended = Mutex::new(0);
    let errors = parallel::map(programs, SIDE_BY_SIDE, |program| {
        let (started, mut output) = (Instant::now(), String::new());
        let command = Tool::new(&program.executable)
            .with_tests()
            .env("CARGO", exec::cargo_program())
            .env("CARGO_MANIFEST_DIR", &program.package)
            .current_dir(&program.package);
        let outcome = configure(command).run_lines(|line| {
            output.push_str(line);
            output.push('\n');
        });
        let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended += 1;
        let took = format_duration(started.elapsed());
        say("test", format!("{} of {}: {}, {took}", *ended, programs.len(), program.name));
        show(&output);
        Ok(outcome.err())
    })?;
    let mut names = Vec::new();
    for (program, error) in programs.iter().zip(errors) {
        let Some(error) = error else { continue };
        let why = error.root_cause().to_string();
        let why = why.lines().next().unwrap_or_default();
        say("test", format!("cargo test --package {}: {why}", program.name));
        names.push(program.name.as_str());
    }
    ensure!(names.is_empty(), "tests failed in {}", list_names(&names));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_in_cargo_s_messages() {
        let artifact = |package: &str, kind: &str, name: &str, test: bool, file: &str| {
            let executable =
                if file.is_empty() { "null".to_owned() } else { format!("\"{file}\"") };
            format!(
                "{{\"reason\":\"compiler-artifact\",\"package_id\":\"x\",\
                 \"manifest_path\":\"/w/{package}/Cargo.toml\",\
                 \"target\":{{\"kind\":[\"{kind}\"],\"name\":\"{name}\"}},\
                 \"profile\":{{\"test\":{test}}},\"executable\":{executable}}}\n"
            )
        };
        let messages = [
            artifact("bundle", "lib", "bundle", false, ""),
            artifact("slotd", "bin", "slotd", false, "/t/slotd"),
            artifact("slotd", "test", "jobs", true, "/t/jobs-1"),
            artifact("slotd", "bin", "slotd", true, "/t/slotd-2"),
            artifact("bundle", "lib", "bundle", true, "/t/bundle-3"),
            artifact("xtask", "test", "tests", true, "/t/tests-4"),
            "{\"reason\":\"build-finished\",\"success\":true}\n".to_owned(),
        ];
        let programs = parse_messages(&messages.concat()).expect("messages");
        let found: Vec<_> =
            programs.iter().map(|p| (p.name.as_str(), p.executable.as_str())).collect();
        assert_eq!(
            found,
            [
                ("xtask --test tests", "/t/tests-4"),
                ("bundle --lib", "/t/bundle-3"),
                ("slotd --bin slotd", "/t/slotd-2"),
                ("slotd --test jobs", "/t/jobs-1"),
            ]
        );
        assert_eq!(programs[0].package, "/w/xtask");
        parse_messages("no message").expect_err("not JSON");
    }

    #[test]
    fn a_failed_program_is_named_and_stops_no_other() {
        let program = |name: &str, executable: &str| TestProgram {
            name: name.to_owned(),
            executable: executable.into(),
            package: "/".into(),
        };
        let programs = [
            program("a --test fails", "false"),
            program("a --test passes", "pwd"),
            program("a --test missing", "/no/such/program"),
        ];
        let shown = Mutex::new(String::new());
        let show = |output: &str| shown.lock().expect("a lock").push_str(output);
        let error = run_programs(&programs, |tool| tool, show).unwrap_err().to_string();
        assert_eq!(error, "tests failed in a --test fails, a --test missing");
        assert_eq!(*shown.lock().expect("a lock"), "/\n");
    }
}
