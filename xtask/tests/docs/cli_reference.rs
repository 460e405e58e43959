//! The pages of commands are what clap would tell: generated, and compared in every run.

use std::collections::BTreeSet;
use std::fmt::Write;

use clap::{Arg, Command, CommandFactory};
use xtask::cli::{CommandLine, slipway};

use super::{complain, is_run, page, root, spans};

/// The page of `cargo xtask`, which is generated.
pub(super) const PAGE: &str = "docs/reference/cli.md";

/// The page of `slipway`, which is generated, too.
pub(super) const SLIPWAY: &str = "docs/reference/slipway.md";

const HEAD: &str = "# Commands

Everything that `cargo xtask` accepts, as `cargo xtask help` shows it. This page is generated from the command line's definition
(`SLIPWAY_BLESS=1 cargo test --package xtask --test tests docs::`); the agent's own commands are in [The agent](slotd.md).

Results go to standard output, progress to standard error. A command ends with 0 if it did what was asked for, with 1 if not, and with 2 if
it was mistyped. `cargo xtask completions bash` prints a completion script.
";

const HEAD_OF_SLIPWAY: &str = "# Commands of `slipway`

Everything that `slipway` accepts, the program for [machines without a toolchain](../guides/without-a-toolchain.md). This page is generated
from the command line's definition, as that of [`cargo xtask`](cli.md) is.

Results go to standard output, progress to standard error. A command ends with 0 if it did what was asked for, with 1 if not, and with 2 if
it was mistyped.
";

#[test]
fn the_pages_of_commands_are_what_clap_says() {
    let slipway = slipway::command("0.0.0");
    for (path, generated) in [
        (PAGE, generated(CommandLine::command(), HEAD, "cargo xtask")),
        (SLIPWAY, generated(slipway, HEAD_OF_SLIPWAY, "slipway")),
    ] {
        if std::env::var_os("SLIPWAY_BLESS").is_some() {
            std::fs::write(root().join(path), &generated).expect("written");
        }
        assert!(
            page(path) == generated,
            "{path} differs from the command line's definition\n\
             help: SLIPWAY_BLESS=1 cargo test --package xtask --test tests docs:: writes it; review the difference"
        );
    }
}

/// The page with the table of commands and their tests.
const TESTING: &str = "docs/contributing/testing.md";

#[test]
fn every_command_is_run_by_a_test_or_named_as_not_run() {
    let cli = CommandLine::command();
    let mut expected = BTreeSet::new();
    for verb in cli.get_subcommands() {
        let name = verb.get_name();
        let parts: Vec<&str> = verb.get_subcommands().map(Command::get_name).collect();
        match parts.is_empty() {
            true => expected.insert(name.to_owned()),
            false => parts.iter().all(|part| expected.insert(format!("{name} {part}"))),
        };
    }
    let text = page(TESTING);
    let (_, section) = text.split_once("\n| command | test |\n").expect("the table of commands");
    let mut named = BTreeSet::new();
    let mut findings = Vec::new();
    for row in section.lines().skip(1).take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [command, test] = cells[..] else { panic!("{TESTING}: two cells: {row}") };
        named.insert(command.trim_matches('`').to_owned());
        if test.strip_prefix("not run: ").is_some_and(|reason| !reason.is_empty()) {
            continue;
        }
        let spans: Vec<&str> = spans(test).collect();
        let [file, name] = spans[..] else { panic!("{TESTING}: a file and a test: {row}") };
        let source = std::fs::read_to_string(root().join(file)).unwrap_or_default();
        if !is_run(&source, name) {
            findings.push(format!("{TESTING}: {file} has no test `{name}`"));
        }
    }
    assert_eq!(named, expected, "left: the table of {TESTING}; right: the command line");
    complain(findings);
}

#[test]
fn every_verb_is_on_the_page() {
    let text = page(PAGE);
    let mut checked = 0;
    for verb in CommandLine::command().get_subcommands() {
        let heading = format!("\n## cargo xtask {}\n", verb.get_name());
        assert!(text.contains(&heading), "{PAGE} has no{heading}");
        checked += 1;
    }
    assert!(checked > 15, "only {checked} verbs found");
}

fn generated(mut cli: Command, head: &str, program: &str) -> String {
    cli.build();
    let mut text = head.to_owned();
    write!(text, "\n| command | |\n|---|---|\n").expect("a string takes it");
    for verb in verbs(&cli) {
        let name = verb.get_name();
        let about = verb.get_about().map(|about| plain(&about.to_string())).unwrap_or_default();
        let anchor = format!("{program} {name}").replace(' ', "-");
        writeln!(text, "| [`{name}`](#{anchor}) | {about} |").expect("a string takes it");
    }
    for verb in verbs(&cli) {
        section(&mut text, verb, program, 2);
    }
    text
}

fn verbs(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help")
}

fn section(text: &mut String, command: &Command, path: &str, level: usize) {
    let path = format!("{path} {}", command.get_name());
    let about = command.get_long_about().or_else(|| command.get_about());
    let about = about.map(|about| plain(&about.to_string())).unwrap_or_default();
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    let level_mark = "#".repeat(level);
    write!(text, "\n{level_mark} {}\n\n{about}\n\n```\n{usage}\n```\n", path.trim())
        .expect("a string takes it");
    let shown =
        |arg: &&Arg| !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str());
    let arguments: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    if !arguments.is_empty() {
        text.push('\n');
    }
    for arg in arguments {
        writeln!(text, "- {}", argument(arg)).expect("a string takes it");
    }
    for verb in verbs(command) {
        section(text, verb, &path, level + 1);
    }
}

/// One option or operand: its spelling, what it means, what may be given.
fn argument(arg: &Arg) -> String {
    let takes = arg.get_num_args().is_some_and(|number| number.takes_values());
    let named = arg.get_value_names().unwrap_or_default();
    let value: String = match named {
        _ if !takes => String::new(),
        [] => format!(" <{}>", arg.get_id().as_str().to_uppercase()),
        names => names.iter().map(|name| format!(" <{name}>")).collect(),
    };
    let spelling = match (arg.get_long(), arg.get_short()) {
        (Some(long), Some(short)) => format!("`--{long}{value}`, `-{short}`"),
        (Some(long), None) => format!("`--{long}{value}`"),
        (None, Some(short)) => format!("`-{short}{value}`"),
        (None, None) => format!("`{}`", value.trim()),
    };
    let help = arg.get_long_help().or_else(|| arg.get_help());
    let mut text =
        format!("{spelling}: {}", help.map(|h| plain(&h.to_string())).unwrap_or_default());
    let choices: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|choice| takes && !choice.is_hide_set())
        .map(|choice| match choice.get_help() {
            Some(help) => {
                let help = plain(&help.to_string());
                format!("`{}` ({})", choice.get_name(), help.trim_end_matches('.'))
            }
            None => format!("`{}`", choice.get_name()),
        })
        .collect();
    if !choices.is_empty() {
        write!(text, " Values: {}.", choices.join(", ")).expect("a string takes it");
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if takes && !defaults.is_empty() && !arg.is_hide_default_value_set() {
        write!(text, " Default: `{}`.", defaults.join(" ")).expect("a string takes it");
    }
    text
}

/// A help text as Markdown: on one line, paragraphs apart, with nothing that would be taken for a tag or a table.
fn plain(help: &str) -> String {
    let paragraphs: Vec<String> = help
        .split("\n\n")
        .map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    // Within backticks nothing is a tag.
    let escape = |text: &str| {
        let parts = text.split('`').enumerate();
        let parts = parts.map(|(at, part)| match at % 2 {
            0 => part.replace('<', "\\<").replace('|', "\\|").replace('*', "\\*"),
            _ => part.to_owned(),
        });
        parts.collect::<Vec<_>>().join("`")
    };
    // clap takes the last full stop of a short text away.
    let sentence = |text: &String| {
        let stop = if text.is_empty() || text.ends_with(['.', ':', ']']) { "" } else { "." };
        escape(text) + stop
    };
    paragraphs.iter().map(sentence).collect::<Vec<_>>().join("\n\n")
}
