//! CI files against the published schemas of their systems (check-jsonschema has them inside), and that
//! they do nothing that a person could not do with the same commands.

use std::fs;
use std::process::Output;

use crate::support::{Bench, good, python, root};

const WORKFLOW: &str = ".github/workflows/nightly.yml";
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
    assert!(gitlab.contains("ci/nightly") && gitlab.lines().count() < 40);
}
