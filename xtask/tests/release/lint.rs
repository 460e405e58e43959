//! CI files against the published schemas of their systems (check-jsonschema has them inside), and that
//! they do nothing that a person could not do with the same commands.

use crate::common::{good, root};

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Output};

use super::support::{Bench, python};

const WORKFLOW: &str = ".github/workflows/nightly.yml";
const CHECK: &str = ".github/workflows/check.yml";
const DEPENDABOT: &str = ".github/dependabot.yml";
const GITLAB: &str = ".gitlab-ci.yml";

fn check(schema: &str, file: &str) -> Output {
    let mut command = python("lint.requirements.txt");
    let schema = format!("vendor.{schema}");
    let words = ["-m", "check_jsonschema", "--builtin-schema", &schema];
    let words = [
        &words[..],
        &["--data-transform", "gitlab-ci"][..if schema.ends_with("ci") { 2 } else { 0 }],
    ];
    command.args(words.concat()).arg(file).current_dir(root()).output().unwrap()
}

#[test]
fn ci_files_are_what_their_systems_take() {
    let bench = Bench::new();
    for (schema, file, mistake) in [
        ("github-workflows", WORKFLOW, ("    runs-on:", "    run-on:")),
        ("github-workflows", CHECK, ("    runs-on:", "    run-on:")),
        ("dependabot", DEPENDABOT, ("      interval:", "      intervals:")),
        ("gitlab-ci", GITLAB, ("  script:", "  scrypt:")),
    ] {
        good(check(schema, file));
        let text = fs::read_to_string(root().join(file)).unwrap();
        let wrong = text.replacen(mistake.0, mistake.1, 1);
        assert_ne!(text, wrong, "{file} has no `{}`", mistake.0);
        let path = bench.dir.join("wrong.yml");
        fs::write(&path, wrong).unwrap();
        let output = check(schema, path.as_str());
        assert!(!output.status.success(), "{file}: a mistake is not noticed");
    }
}

#[test]
fn ci_only_calls_what_everybody_can_call() {
    let workflow = fs::read_to_string(root().join(WORKFLOW)).unwrap();
    let builders = ["build", "release create", "publish", "release summary", "plan"];
    for verb in builders {
        assert!(workflow.contains(&format!("cargo xtask {verb}")), "no `{verb}` in {WORKFLOW}");
    }
    let script = fs::read_to_string(root().join("ci/nightly")).unwrap();
    for line in script.lines().filter(|line| line.contains("cargo") && !line.starts_with('#')) {
        assert!(line.contains("cargo xtask "), "ci/nightly: {line}");
    }
    let gitlab = fs::read_to_string(root().join(GITLAB)).unwrap();
    assert!(gitlab.contains("ci/nightly") && gitlab.lines().count() < 60);
    // Pull requests and merge requests are checked with the command that CONTRIBUTING.md gives to everyone.
    let check = fs::read_to_string(root().join(CHECK)).unwrap();
    let contributing = fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    for (file, text) in [(CHECK, &check), (GITLAB, &gitlab), ("CONTRIBUTING.md", &contributing)] {
        assert!(text.contains("cargo xtask test --quick"), "no quick tests in {file}");
    }
}

#[test]
fn every_night_offers_what_its_channel_takes_and_nothing_else() {
    let plan = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["plan", "--all"]).args(words).current_dir(root()).output().unwrap()
    };
    let products = |words: &[&str]| -> BTreeSet<String> {
        let listed = good(plan(words));
        listed.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    let nightly = products(&["--channel", "nightly"]);
    assert!(nightly.contains("robot-dev"), "{nightly:?}");
    // As committed no release key is needed for a night, and a release product is none of its.
    assert!(products(&[]).contains("robot") && !nightly.contains("robot"), "{nightly:?}");
    let printed = String::from_utf8(plan(&["--channel", "nightly"]).stderr).unwrap();
    assert!(printed.contains("without robot: ") && printed.contains("releases.toml"), "{printed}");
    let stable = products(&["--channel", "stable"]);
    assert!(stable.contains("robot") && !stable.contains("robot-dev"), "{stable:?}");
    let gitlab = fs::read_to_string(root().join(GITLAB)).unwrap();
    let line = gitlab.lines().find(|line| line.contains("PRODUCT: [")).unwrap();
    let named = line.split(['[', ']']).nth(1).unwrap().split(',');
    let named: BTreeSet<String> = named.map(|name| name.trim().to_owned()).collect();
    assert_eq!(named, nightly, "{GITLAB}");
    let workflow = fs::read_to_string(root().join(WORKFLOW)).unwrap();
    assert!(workflow.contains("plan --all --channel nightly"), "{WORKFLOW}");
    // Before anything is built.
    let script = fs::read_to_string(root().join("ci/nightly")).unwrap();
    let at = |what: &str| script.find(what).unwrap_or_else(|| panic!("no `{what}` in ci/nightly"));
    assert!(at("--channel nightly)") < at("cargo xtask build-image"));
}
