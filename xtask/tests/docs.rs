//! The documentation is checked: links lead somewhere, commands are ones that the tool accepts, every page is in the book, and
//! what the source has (verbs, modules, keys, variables) is in the page that claims to list it.

mod cli_reference;

use crate::common::{self, complain, root};

use std::collections::BTreeSet;

use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use clap::error::ErrorKind;
use xtask::cli::CommandLine;

/// A reader who decides whether to use this reads no further.
const README_LINES: usize = 150;

/// Files of the workspace that have this ending, with their text.
fn files(extension: &str) -> Vec<(Utf8PathBuf, String)> {
    let mut found = common::files();
    found.retain(|(path, _)| path.extension() == Some(extension));
    assert!(!found.is_empty(), "no .{extension} file found");
    found
}

fn page(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).expect(path)
}

/// Each line with its number from 1, and whether it is in a fenced block.
fn lines(text: &str) -> impl Iterator<Item = (usize, bool, &str)> {
    text.lines().enumerate().scan(false, |fenced, (index, line)| {
        let fence = line.trim_start().starts_with("```");
        *fenced ^= fence;
        Some((index + 1, *fenced && !fence, line))
    })
}

/// The text between single backquotes.
fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// A heading's anchor, as code hosts make it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().replace(' ', "-")
}

fn anchors(text: &str) -> BTreeSet<String> {
    lines(text)
        .filter(|(_, fenced, line)| !fenced && line.starts_with('#'))
        .map(|(_, _, line)| anchor(line.trim_start_matches('#')))
        .collect()
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut findings = Vec::new();
    let mut checked = 0;
    for (path, text) in files("md") {
        for (number, _, line) in lines(&text).filter(|(_, fenced, _)| !fenced) {
            let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
            for target in targets.filter(|t| !t.contains("://")) {
                checked += 1;
                let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
                let folder = path.parent().expect("a directory");
                let full =
                    root().join(if file.is_empty() { path.clone() } else { folder.join(file) });
                if !full.exists() {
                    findings.push(format!("{path}:{number}: {target} does not exist"));
                } else if !fragment.is_empty()
                    && !anchors(&std::fs::read_to_string(&full).expect("text")).contains(fragment)
                {
                    findings.push(format!("{path}:{number}: {target}: no such heading"));
                }
            }
        }
    }
    assert!(checked > 300, "only {checked} links found");
    complain(findings);
}

#[test]
fn every_line_of_the_threat_model_names_tests_that_are_there() {
    let text = page("SECURITY.md");
    let (_, table) = text.split_once("| attacker |").expect("the table of attackers");
    let mut findings = Vec::new();
    let mut checked = 0;
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    for row in rows {
        let attacker = row.split("**").nth(1).expect("an attacker in bold");
        // `file.rs`: `test`, `test`; `other.rs`: `test`
        let tests = row.trim_end_matches(['|', ' ']).rsplit('|').next().expect("a column of tests");
        let mut source = None;
        let mut named = 0;
        for span in spans(tests) {
            if span.ends_with(".rs") {
                source = std::fs::read_to_string(root().join(span)).ok();
                if source.is_none() {
                    findings.push(format!("SECURITY.md: {attacker}: {span} does not exist"));
                }
                continue;
            }
            named += 1;
            let there = source.as_ref().is_some_and(|text| is_run(text, span));
            if !there {
                findings.push(format!("SECURITY.md: {attacker}: there is no test `{span}`"));
            }
        }
        if named == 0 {
            findings.push(format!("SECURITY.md: {attacker}: no test is named"));
        }
        checked += named;
    }
    assert!(checked > 20, "only {checked} tests named");
    complain(findings);
}

/// Whether a source has a test of this name that runs.
fn is_run(text: &str, name: &str) -> bool {
    let head = format!("fn {name}()");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let Some(at) = lines.iter().position(|line| line.starts_with(&head)) else { return false };
    // Attributes and comments stand right before it.
    let before = lines[..at].iter().rev().take_while(|line| line.starts_with(['#', '/']));
    let attributes: Vec<&&str> = before.filter(|line| line.starts_with('#')).collect();
    attributes.iter().any(|line| **line == "#[test]")
        && !attributes.iter().any(|line| line.starts_with("#[ignore"))
}

#[test]
fn a_test_that_does_not_run_is_none() {
    assert!(is_run("#[test]\nfn a() {\n", "a"));
    assert!(is_run("/// Why.\n#[test]\n#[cfg(unix)]\nfn a() -> Result<()> {\n", "a"));
    assert!(!is_run("fn a() {\n", "a"));
    assert!(!is_run("#[test]\n#[ignore = \"slow\"]\nfn a() {\n", "a"));
    assert!(!is_run("#[test]\n// fn a() {\n", "a"));
    assert!(!is_run("#[test]\nfn ab() {}\n\nfn a() {}\n", "a"));
}

/// The calls of one of our programs that a line shows.
fn calls<'a>(program: &str, fenced: bool, line: &'a str) -> Vec<&'a str> {
    let code: Vec<&str> = if fenced { vec![line] } else { spans(line).collect() };
    let before = format!("{program} ");
    code.into_iter()
        .flat_map(|code| code.split(before.as_str()).skip(1))
        .filter_map(|rest| rest.split(['#', '|', ';', '·', '`', '&', '>']).next())
        .map(str::trim)
        .collect()
}

#[test]
fn every_command_shown_is_one_that_the_tool_accepts() {
    let mut findings = Vec::new();
    let mut checked = 0;
    // The generated page shows how commands are spelt, with `[OPTIONS]` and the like.
    for (path, text) in files("md")
        .into_iter()
        .filter(|(path, _)| path != cli_reference::PAGE && path != cli_reference::SLIPWAY)
    {
        for (number, fenced, line) in lines(&text) {
            // Words such as `<verb>` or `…` stand for something.
            for call in
                calls("cargo xtask", fenced, line).into_iter().filter(|c| !c.contains(['<', '…']))
            {
                checked += 1;
                let words = std::iter::once("cargo xtask").chain(call.split_whitespace());
                if let Err(error) = CommandLine::try_parse_from(words)
                    && !matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion)
                {
                    findings.push(format!("{path}:{number}: cargo xtask {call}\n{error}"));
                }
            }
        }
    }
    assert!(checked > 100, "only {checked} commands found");
    complain(findings);
}

#[test]
fn every_command_of_slipway_shown_is_one_that_it_accepts() {
    let mut findings = Vec::new();
    let mut checked = 0;
    let text = page("docs/guides/without-a-toolchain.md");
    for (number, fenced, line) in lines(&text) {
        for call in calls("slipway", fenced, line).into_iter().filter(|call| !call.is_empty()) {
            checked += 1;
            let words = std::iter::once("slipway").chain(call.split_whitespace());
            if let Err(error) = xtask::cli::slipway::command("0.0.0").try_get_matches_from(words)
                && error.kind() != ErrorKind::DisplayVersion
            {
                findings.push(format!("line {number}: slipway {call}\n{error}"));
            }
        }
    }
    assert!(checked > 8, "only {checked} commands found");
    complain(findings);
}

/// Crates besides `xtask` whose modules are all on the map.
const CRATES: [&str; 5] = ["bench/src", "bundle/src", "contract/src", "slotd/src", "bootmodel/src"];

#[test]
fn every_module_is_on_the_map() {
    let map = page("docs/contributing/architecture.md");
    let named: BTreeSet<&str> = lines(&map).flat_map(|(_, _, line)| spans(line)).collect();
    let findings = files("rs")
        .into_iter()
        .filter_map(|(path, _)| {
            let name = match path.strip_prefix("xtask/src") {
                Ok(inner) => inner,
                Err(_) if CRATES.iter().any(|of| path.starts_with(of)) => &path,
                Err(_) => return None,
            };
            (!named.contains(name.as_str())).then(|| {
                format!("docs/contributing/architecture.md: {name} is not on the code map")
            })
        })
        .collect();
    complain(findings);
    for name in named.iter().filter(|n| n.ends_with(".rs")) {
        let places = ["", "xtask/src/", "xtask/tests/", "bundle/tests/"];
        let known = places.iter().any(|dir| root().join(dir).join(name).is_file());
        assert!(known, "docs/contributing/architecture.md: {name} does not exist");
    }
}

/// Names in `text` that begin with `prefix` and continue with capitals, digits and `_`.
fn variables(text: &str, prefix: &str) -> BTreeSet<String> {
    let name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    text.split(|c| !name(c))
        .filter(|word| word.starts_with(prefix) && word.len() > prefix.len())
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_environment_variable_is_in_the_reference() {
    // Put together, so that this file does not name an unused variable.
    let prefix = ["SLIPWAY", "_"].concat();
    let source: BTreeSet<String> =
        files("rs").iter().flat_map(|(_, text)| variables(text, &prefix)).collect();
    assert!(source.len() >= 8, "few variables found: {source:?}");
    // Those for tests only are where tests are described.
    let pages = ["docs/reference/environment.md", "docs/contributing/testing.md"];
    let told: BTreeSet<String> =
        pages.iter().flat_map(|path| variables(&page(path), &prefix)).collect();
    assert_eq!(source, told, "left: what the source reads; right: what {pages:?} list");
}

#[test]
fn the_readme_fits_on_a_few_screens() {
    let lines = page("README.md").lines().count();
    assert!(
        lines <= README_LINES,
        "README.md has {lines} lines, at most {README_LINES}: a page of docs/ is the place"
    );
}

/// The pages below docs/ that the summary lists, in its order.
fn listed() -> Vec<Utf8PathBuf> {
    let summary = page("docs/SUMMARY.md");
    let targets = summary.lines().filter_map(|line| line.split_once("](")?.1.strip_suffix(')'));
    targets.map(|target| Utf8Path::new("docs").join(target)).collect()
}

#[test]
fn every_page_is_in_the_book_once() {
    let listed = listed();
    let once: BTreeSet<&Utf8PathBuf> = listed.iter().collect();
    assert_eq!(once.len(), listed.len(), "docs/SUMMARY.md lists a page twice");
    let pages: BTreeSet<Utf8PathBuf> = files("md")
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.starts_with("docs") && path != "docs/SUMMARY.md")
        .collect();
    assert!(pages.len() > 50, "only {} pages found", pages.len());
    let missing = pages.iter().filter(|path| !once.contains(path));
    complain(missing.map(|path| format!("{path} is not in docs/SUMMARY.md")).collect());
}

#[test]
fn every_guide_is_reached_from_the_readme() {
    let readme = page("README.md");
    let guides: Vec<Utf8PathBuf> =
        listed().into_iter().filter(|path| path.starts_with("docs/guides")).collect();
    assert!(guides.len() > 15, "only {} guides found", guides.len());
    let missing = guides.iter().filter(|path| !readme.contains(&format!("]({path})")));
    complain(missing.map(|path| format!("README.md has no link to {path}")).collect());
}

#[test]
fn every_page_opens_with_its_title() {
    let mut findings = Vec::new();
    for path in listed() {
        let text = page(path.as_str());
        let titles = lines(&text).filter(|(_, fenced, line)| !fenced && line.starts_with("# "));
        if !text.starts_with("# ") || titles.count() != 1 {
            findings.push(format!("{path}: expected one title, `# …`, on its first line"));
        }
    }
    complain(findings);
}

#[test]
fn every_key_of_the_configuration_is_in_the_reference() {
    let reference = page("docs/reference/configuration.md");
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let told: BTreeSet<&str> = lines(&reference)
        .flat_map(|(_, _, line)| spans(line))
        .flat_map(|span| span.split(|c| !word(c)))
        .collect();
    let takers = ["required", "optional", "or", "list", "table", "tables", "optional_table"];
    let mut findings = Vec::new();
    let mut checked = 0;
    for kind in ["board", "product", "overlay"] {
        let text = page(&format!("xtask/src/config/{kind}.rs"));
        for call in text.split("f.").skip(1) {
            let Some((method, rest)) = call.split_once('(') else { continue };
            let method = method.split("::").next().unwrap_or_default();
            let key = rest.trim_start().strip_prefix('"').and_then(|r| r.split('"').next());
            let Some(key) = key.filter(|_| takers.contains(&method)) else { continue };
            checked += 1;
            if !told.contains(key) {
                findings.push(format!(
                    "docs/reference/configuration.md: the {kind}'s `{key}` is missing"
                ));
            }
        }
    }
    assert!(checked > 80, "only {checked} keys found");
    complain(findings);
}

#[test]
fn every_template_variable_is_in_the_reference() {
    let reference = page("docs/reference/templates.md");
    let source = page("xtask/src/render.rs");
    let (_, body) = source.split_once("fn template_context").expect("the context");
    let (body, _) = body.split_once("\n}\n").expect("its end");
    // One level of indentation below `context! {`: the names that every template has.
    let names: Vec<&str> = body
        .lines()
        .filter_map(|line| line.strip_prefix("        "))
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split_once(" =>").map(|(name, _)| name))
        .collect();
    assert!(names.len() > 10, "few variables found: {names:?}");
    let told: BTreeSet<&str> = lines(&reference)
        .flat_map(|(_, _, line)| spans(line))
        .filter_map(|span| span.split('.').next())
        .collect();
    let missing = names.iter().filter(|name| !told.contains(*name));
    complain(
        missing.map(|name| format!("docs/reference/templates.md: `{name}` is missing")).collect(),
    );
}
