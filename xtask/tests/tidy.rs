//! The house rules that a program can check.

mod floors;
mod names;
mod style;
#[path = "common/workspace.rs"]
mod workspace;

use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use workspace::{complain, files, root};

fn rust() -> Vec<(Utf8PathBuf, String)> {
    files().into_iter().filter(|(path, _)| path.extension() == Some("rs")).collect()
}

/// Whether a file is the host tool's, whose benchmarks are a crate of their own.
fn is_host_tool(path: &Utf8Path) -> bool {
    ["xtask/src", "bench/src"].iter().any(|tree| path.starts_with(tree))
}

#[test]
fn no_file_is_longer_than_800_lines() {
    let sources = files().into_iter().filter(|(path, _)| {
        !matches!(path.extension(), Some("lock" | "txt" | "json")) && path != "LICENSE"
    });
    complain(
        sources
            .map(|(path, text)| (path, text.lines().count()))
            .filter(|(_, lines)| *lines > 800)
            .map(|(path, lines)| format!("{path}: {lines} lines"))
            .collect(),
    );
}

#[test]
fn every_rust_file_opens_by_saying_what_it_is_for() {
    let opens = |text: &str| {
        text.lines().find(|l| !l.starts_with("#!")).is_some_and(|l| l.starts_with("//!"))
    };
    complain(
        rust()
            .into_iter()
            .filter(|(_, text)| !opens(text))
            .map(|(path, _)| format!("{path}: opens with no //! line"))
            .collect(),
    );
}

#[test]
fn no_board_or_product_stands_in_rust_source() {
    let mut names: Vec<String> = Vec::new();
    for entry in root().join("board").read_dir_utf8().expect("board") {
        names.push(entry.expect("readable").file_name().to_owned());
    }
    names.retain(|name| name != "common");
    for entry in root().join("configs").read_dir_utf8().expect("configs") {
        let name = entry.expect("readable").file_name().to_owned();
        names.extend(name.strip_suffix(".toml").map(str::to_owned));
    }
    assert!(names.len() >= 6, "too few boards and products: {names:?}");
    let mut findings = Vec::new();
    for (path, text) in rust().into_iter().filter(|(p, _)| p.as_str().contains("/src/")) {
        // Tests below the code may name boards of real inputs.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            for name in &names {
                let quoted =
                    line.contains(&format!("\"{name}\"")) || line.contains(&format!("/{name}/"));
                if quoted {
                    findings.push(format!("{path}:{}: names {name}", number + 1));
                }
            }
        }
    }
    complain(findings);
}

/// A crate that is missing in these lists changes what is built, and neither a rebuild nor `-dirty` follows.
#[test]
fn each_crate_is_an_input_of_what_is_built_from_it() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).expect(path);
    let table = |path: &str| read(path).parse::<toml::Table>().expect(path);
    let workspace = table("Cargo.toml");
    let members = workspace["workspace"]["members"].as_array().expect("a list");
    assert!(members.len() >= 5, "{members:?}");
    let mut findings = Vec::new();
    let mut listed = |file: &str, entry: String| {
        if !read(file).contains(&format!("\n    \"{entry}\",\n")) {
            findings.push(format!("{file}: does not list {entry}"));
        }
    };
    for member in members.iter().map(|member| member.as_str().expect("a name")) {
        // No build runs the benchmarks.
        if !["bench", "xtask"].contains(&member) {
            listed("xtask/src/git.rs", member.to_owned());
        }
        for (of, file) in
            [("xtask", "xtask/src/build/program.rs"), ("slotd", "xtask/src/build/agent.rs")]
        {
            let manifest = table(&format!("{of}/Cargo.toml"));
            let linked = manifest["dependencies"].as_table().expect("a table").contains_key(member);
            if member == of || linked {
                listed(file, format!("{member}/Cargo.toml"));
                listed(file, format!("{member}/src"));
            }
        }
    }
    complain(findings);
}

#[test]
fn the_crates_depend_in_one_direction() {
    let mut findings = Vec::new();
    for (path, text) in files() {
        let forbidden: &[&str] = match path.as_str() {
            "bundle/Cargo.toml" => &["xtask", "slotd", "contract", "bootmodel"],
            "contract/Cargo.toml" => &["xtask", "slotd", "bootmodel", "clap", "anyhow"],
            "bootmodel/Cargo.toml" => &["xtask", "slotd", "contract"],
            "xtask/Cargo.toml" => &["slotd", "bench"],
            "slotd/Cargo.toml" => &["xtask"],
            _ => continue,
        };
        for name in forbidden {
            if text.lines().any(|line| line.starts_with(name)) {
                findings.push(format!("{path}: depends on {name}"));
            }
        }
    }
    complain(findings);
}

/// `cargo xtask` selects one crate, `cargo test --workspace` all: what only the others need is
/// compiled again, with everything that depends on it, including this tool.
#[test]
fn the_tool_is_compiled_once_for_itself_and_for_the_tests() {
    let others = ["bench", "bundle", "contract", "slotd", "bootmodel"]
        .map(|name| format!("{name}/Cargo.toml"));
    let mut findings = Vec::new();
    for (path, text) in files().into_iter().filter(|(path, _)| others.contains(&path.to_string())) {
        for line in text.lines().filter(|line| line.contains("features = [")) {
            findings
                .push(format!("{path}: `{line}`: name the features in the workspace's Cargo.toml"));
        }
    }
    // Cargo that inherits a test's CARGO_MANIFEST_DIR compiles some crates again (exec.rs,
    // `of_cargo_run`).
    let bare = concat!("env!(\"CAR", "GO\")");
    for (path, _) in rust().into_iter().filter(|(_, text)| text.contains(bare)) {
        findings.push(format!("{path}: starts cargo without exec::Tool::cargo"));
    }
    complain(findings);
}

#[test]
fn programs_are_run_in_one_place() {
    // Only there a program gets an environment of what it needs, without our secrets.
    let allowed = ["xtask/src/exec.rs"];
    let words = ["Command::new(", "xshell", "execv", "rustix::runtime"];
    let mut findings = Vec::new();
    for (path, text) in rust() {
        let own = is_host_tool(&path) && !allowed.contains(&path.as_str());
        if own && words.iter().any(|word| text.contains(word)) {
            findings.push(format!("{path}: runs a program without exec::Tool"));
        }
    }
    complain(findings);
}

#[test]
fn git_is_called_in_one_place() {
    // Only there its user's settings change nothing.
    let findings = rust().into_iter().filter(|(path, text)| {
        let own = is_host_tool(path) && path != "xtask/src/git.rs";
        own && text.contains("Tool::new(\"git\")")
    });
    complain(findings.map(|(path, _)| format!("{path}: calls git without git.rs")).collect());
}

/// The reader of a robot's message may have only `slipway`.
#[test]
fn the_agent_names_both_programs() {
    let mut findings = Vec::new();
    for (path, text) in rust() {
        if !["slotd/src", "contract/src", "bundle/src"].iter().any(|tree| path.starts_with(tree)) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let printed = line.contains("cargo xtask") && !line.trim_start().starts_with("//");
            if printed && !line.contains("`slipway ") {
                findings.push(format!("{path}:{}: names only `cargo xtask`", number + 1));
            }
        }
    }
    complain(findings);
}

/// The faults that `cargo xtask check --mutants` makes still have their place in the source.
#[test]
fn every_mutant_has_its_place() {
    let mutants = xtask::mutants::read_mutants(&root()).expect("ci/mutants fits the source");
    assert!(mutants.len() >= 60, "only {} mutants", mutants.len());
}

/// What a test calls before it ends early: each says so, or has had the test run elsewhere.
const SAYS_SO: [&str; 8] = [
    " skip(",
    "!is_root(",
    "!all(",
    "= tree(",
    "Loop::new(",
    "left_out(",
    "say(",
    // A copy of the program has run it.
    "1 passed",
];

/// Tests that are the other half of one that starts them.
const HALVES: [&str; 6] = [
    "the_part_on_a_full_disk",
    "in_a_child_that_signs",
    "in_a_child_with_a_password",
    "in_a_copy_that_stores",
    "makes_a_second_checkout",
    "locks_under_the_settings_of_a_machine",
];

#[test]
fn no_test_ends_early_without_a_word() {
    let early = |line: &str| {
        let line = line.trim();
        ["return;", "return Ok(());"].contains(&line) || line.ends_with("else { return };")
    };
    let mut findings = Vec::new();
    let mut checked = 0;
    let tests = rust().into_iter().filter(|(path, _)| path.as_str().contains("/tests/"));
    for (path, text) in tests {
        let lines: Vec<&str> = text.lines().collect();
        for at in (0..lines.len()).filter(|at| early(lines[*at])) {
            let head = lines[..at].iter().rposition(|line| {
                line.trim_start().starts_with("fn ") || line.trim_start().starts_with("pub fn ")
            });
            let Some(head) = head else { continue };
            let mut is_test = lines[..head].iter().rev().take_while(|l| l.starts_with(['#', '/']));
            if !is_test.any(|line| *line == "#[test]")
                || HALVES.iter().any(|half| lines[head].starts_with(&format!("fn {half}()")))
            {
                continue;
            }
            checked += 1;
            let before = &lines[at.saturating_sub(6).max(head)..=at];
            if !before.iter().any(|line| SAYS_SO.iter().any(|word| line.contains(word))) {
                findings.push(format!(
                    "{path}:{}: a test ends early, and passes without a word",
                    at + 1
                ));
            }
        }
    }
    assert!(checked > 10, "only {checked} places found");
    complain(findings);
}

#[test]
fn printing_is_done_in_one_place() {
    // Only there control characters of others are escaped. Tests below the code may print.
    let words = ["println!(", "print!(", "dbg!("];
    let mut findings = Vec::new();
    for (path, text) in rust() {
        if !is_host_tool(&path) || path == "xtask/src/text.rs" {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            let line = line.trim_start();
            if !line.starts_with("//") && words.iter().any(|word| line.contains(word)) {
                findings.push(format!("{path}:{}: prints without text.rs", number + 1));
            }
        }
    }
    complain(findings);
}

/// Reading a variable as text ignores what is not UTF-8, unless it is an error.
#[test]
fn variables_are_read_in_one_place() {
    let mut findings = Vec::new();
    for (path, text) in rust() {
        if !is_host_tool(&path) || path == "xtask/src/variable.rs" {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            if line.contains("env::var(") {
                findings
                    .push(format!("{path}:{}: reads a variable without variable.rs", number + 1));
            }
        }
    }
    complain(findings);
}

/// A result is a value until a verb prints it; progress and warnings go to standard error from anywhere.
#[test]
fn results_are_printed_by_verbs_alone() {
    let words = [concat!("out", "!("), concat!("outln", "!(")];
    let mut findings = Vec::new();
    // The file of `bench` that is its verb.
    let verbs = ["xtask/src/cmd/", "xtask/src/text.rs", "bench/src/main.rs"];
    for (path, text) in rust() {
        if !is_host_tool(&path) || verbs.iter().any(|verb| path.as_str().starts_with(verb)) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let printed = words.iter().any(|word| {
                let before = line.split(word).next().filter(|before| before.len() < line.len());
                before.is_some_and(|before| !before.ends_with(|c: char| c.is_alphanumeric()))
            });
            if printed && !line.trim_start().starts_with("//") {
                findings.push(format!("{path}:{}: prints a result: return it to cmd", number + 1));
            }
        }
    }
    complain(findings);
}

#[test]
fn shell_scripts_are_clean() {
    let scripts: Vec<String> = files()
        .into_iter()
        .filter(|(_, text)| {
            let first = text.lines().next().unwrap_or_default();
            first.starts_with("#!") && (first.ends_with("sh") || first.contains("bash"))
        })
        .map(|(path, _)| path.into_string())
        .collect();
    assert!(!scripts.is_empty(), "no scripts found");
    let output = Command::new("shellcheck")
        .args(&scripts)
        .current_dir(root())
        .output()
        .expect("shellcheck is installed: cargo xtask doctor --install");
    assert!(output.status.success(), "\n{}", String::from_utf8_lossy(&output.stdout));
}
