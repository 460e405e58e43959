//! Mutation tests: deliberate faults in lines that security or durability depends on, chosen
//! manually (`ci/mutants/`), are applied one at a time to a copy of the source, and a test must
//! fail.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::exec::Tool;
use crate::git;
use crate::progress::{format_duration, say};

/// The directory of the files that list the faults.
pub const LIST: &str = "ci/mutants";

/// One deliberate fault.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// Its name.
    pub name: String,
    /// The file to change, relative to the workspace's root.
    pub file: Utf8PathBuf,
    /// The original text, which must occur exactly once.
    pub find: String,
    /// The replacement.
    pub replace: String,
    /// The consequence for a robot.
    pub means: String,
    /// The test that should fail, as arguments of `cargo test -p`: `slotd --test cuts`.
    pub test: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MutantList {
    mutant: Vec<Mutant>,
}

impl Mutant {
    /// Applies the fault to the file's text.
    ///
    /// # Errors
    /// Names the mutant when its text does not occur exactly once in `text`.
    pub fn applied(&self, text: &str) -> Result<String> {
        let found = text.matches(&self.find).count();
        ensure!(
            found == 1,
            "{LIST}: mutant `{}`: its text occurs {found} times in {}, expected once; correct `find`",
            self.name,
            self.file
        );
        Ok(text.replacen(&self.find, &self.replace, 1))
    }
}

/// Reads the lists below `root` and checks each entry against the source: unique names, texts that
/// occur exactly once.
///
/// # Errors
/// When a list is malformed; else names every mutant that does not match the source.
pub fn read_mutants(root: &Utf8Path) -> Result<Vec<Mutant>> {
    let dir = root.join(LIST);
    let listing = dir.read_dir_utf8().with_context(|| format!("reading {dir}"))?;
    let mut files = Vec::new();
    for entry in listing {
        files.push(entry.with_context(|| format!("reading {dir}"))?.into_path());
    }
    files.sort();
    let mut mutants: Vec<Mutant> = Vec::new();
    for path in &files {
        let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        let list: MutantList = toml::from_str(&text).with_context(|| format!("reading {path}"))?;
        mutants.extend(list.mutant);
    }
    let mut wrong = Vec::new();
    for (at, mutant) in mutants.iter().enumerate() {
        if mutants.iter().take(at).any(|other| other.name == mutant.name) {
            wrong.push(format!("{LIST}: two mutants are named `{}`", mutant.name));
        }
        let source = root.join(&mutant.file);
        let text = fs::read_to_string(&source).with_context(|| format!("reading {source}"));
        if let Err(error) = text.and_then(|text| mutant.applied(&text)) {
            wrong.push(format!("{error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(mutants)
}

/// The result of a mutant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MutantOutcome {
    /// The named test failed.
    Caught,
    /// The test passed.
    Survived,
    /// The fault does not compile: the list is wrong.
    DoesNotCompile,
}

/// A mutant with its result.
#[derive(Debug, Clone, Serialize)]
pub struct TestedMutant {
    /// The mutant's name.
    pub name: String,
    /// Its consequence.
    pub means: String,
    /// The result.
    pub fate: MutantOutcome,
    /// Seconds that it took.
    pub seconds: u64,
}

/// Tries the mutants whose names contain `filter`. The copy and its build results are kept in
/// `target/mutants`, so that only changed code is rebuilt. A fault that hangs is only detected by
/// the test's own timeout.
///
/// # Errors
/// When the tests fail without any fault, or nothing can be built.
pub fn run_mutants(root: &Utf8Path, filter: &str) -> Result<Vec<TestedMutant>> {
    let mut mutants = read_mutants(root)?;
    mutants.retain(|mutant| mutant.name.contains(filter));
    ensure!(!mutants.is_empty(), "no mutant has a name that contains `{filter}`");
    let bench = MutantWorkspace {
        tree: root.join("target/mutants/tree"),
        built: root.join("target/mutants"),
    };
    copy_workspace(root, &bench.tree)?;
    // After an interrupted compilation, the compiler was observed to build a program from another
    // text than the file's.
    let state = bench.built.join("debug/incremental");
    if state.exists() {
        fs::remove_dir_all(&state).with_context(|| format!("removing {state}"))?;
    }
    let mut tests: Vec<&str> = mutants.iter().map(|mutant| mutant.test.as_str()).collect();
    tests.sort_unstable();
    tests.dedup();
    bench.without_fault(&tests)?;
    let (started, mut tried) = (Instant::now(), Vec::new());
    for (at, mutant) in mutants.iter().enumerate() {
        let begun = Instant::now();
        let fate = bench.try_one(mutant)?;
        let left = started.elapsed() / (at as u32 + 1) * (mutants.len() - at - 1) as u32;
        say(
            "mutants",
            format!(
                "{} of {}: {}: {}; about {} left",
                at + 1,
                mutants.len(),
                mutant.name,
                fate.word(),
                format_duration(left)
            ),
        );
        let seconds = begun.elapsed().max(Duration::from_secs(1)).as_secs();
        let (name, means) = (mutant.name.clone(), mutant.means.clone());
        tried.push(TestedMutant { name, means, fate, seconds });
    }
    // Otherwise a fault may have remained, and the tests failed because of it.
    bench.without_fault(&tests)?;
    Ok(tried)
}

impl MutantOutcome {
    /// The human-readable form.
    pub fn word(self) -> &'static str {
        match self {
            Self::Caught => "caught",
            Self::Survived => "SURVIVED",
            Self::DoesNotCompile => "DOES NOT COMPILE",
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum TestAnswer {
    Passed,
    Failed,
    NotBuilt,
}

struct MutantWorkspace {
    tree: Utf8PathBuf,
    built: Utf8PathBuf,
}

impl MutantWorkspace {
    fn without_fault(&self, tests: &[&str]) -> Result<()> {
        for (at, test) in tests.iter().enumerate() {
            say("mutants", format!("without a fault ({} of {}): {test}", at + 1, tests.len()));
            if self.run_test(test)? != TestAnswer::Passed {
                bail!("`cargo test -p {test}` fails without any fault: correct that first");
            }
        }
        Ok(())
    }

    fn try_one(&self, mutant: &Mutant) -> Result<MutantOutcome> {
        let path = self.tree.join(&mutant.file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let put = |text: &str| fs::write(&path, text).with_context(|| format!("writing {path}"));
        put(&mutant.applied(&text)?)?;
        let fate = self.fate(mutant);
        put(&text)?;
        fate
    }

    fn fate(&self, mutant: &Mutant) -> Result<MutantOutcome> {
        Ok(match self.run_test(&mutant.test)? {
            TestAnswer::NotBuilt => MutantOutcome::DoesNotCompile,
            TestAnswer::Failed => MutantOutcome::Caught,
            TestAnswer::Passed => MutantOutcome::Survived,
        })
    }

    /// Builds first, to distinguish a fault that does not compile from one that a test detects.
    fn run_test(&self, test: &str) -> Result<TestAnswer> {
        let cargo = |last: &str| {
            let words = ["test", "--quiet", "--package"].into_iter().chain(test.split(' '));
            Tool::cargo()
                .args(words)
                .arg(last)
                .env("CARGO_TARGET_DIR", self.built.as_str())
                .env("RUST_BACKTRACE", "0")
                .current_dir(&self.tree)
        };
        if cargo("--no-run").run().is_err() {
            return Ok(TestAnswer::NotBuilt);
        }
        Ok(if cargo("--no-fail-fast").run().is_ok() {
            TestAnswer::Passed
        } else {
            TestAnswer::Failed
        })
    }
}

/// Copies the files that git tracks below `root` to `tree`. Unchanged files are not written, so
/// that they are not rebuilt.
fn copy_workspace(root: &Utf8Path, tree: &Utf8Path) -> Result<()> {
    let listed = git::git_in(root).args(["ls-files", "-z"]).read()?;
    for name in listed.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (root.join(name), tree.join(name));
        // A link in the repository is copied as a link; a removed file is removed.
        let Ok(about) = fs::symlink_metadata(&from) else {
            if to.is_file() {
                fs::remove_file(&to).with_context(|| format!("removing {to}"))?;
            }
            continue;
        };
        let dir = to.parent().context("a file is in a directory")?;
        fs::create_dir_all(dir).with_context(|| format!("making {dir}"))?;
        if about.is_symlink() {
            if fs::symlink_metadata(&to).is_err() {
                let target = fs::read_link(&from).with_context(|| format!("reading {from}"))?;
                std::os::unix::fs::symlink(target, &to).with_context(|| format!("linking {to}"))?;
            }
            continue;
        }
        let bytes = fs::read(&from).with_context(|| format!("reading {from}"))?;
        if fs::read(&to).ok().as_ref() != Some(&bytes) {
            fs::copy(&from, &to).with_context(|| format!("copying {from}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_does_not_stand_exactly_once_is_named() {
        let mutant = Mutant {
            name: "m".to_owned(),
            file: "a.rs".into(),
            find: "flush()".to_owned(),
            replace: String::new(),
            means: String::new(),
            test: String::new(),
        };
        assert_eq!(mutant.applied("a; flush();").expect("once"), "a; ;");
        for text in ["", "flush(); flush()"] {
            let why = mutant.applied(text).expect_err(text).to_string();
            assert!(why.contains("mutant `m`") && why.contains("a.rs"), "{why}");
        }
    }
}
