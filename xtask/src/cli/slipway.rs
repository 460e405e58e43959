//! The command line of `slipway`: those verbs of `cargo xtask` that need no workspace, with the same options. What
//! `cargo xtask` takes from the workspace where it is not given must be given here.

use std::convert::Infallible;

use clap::{Arg, Command as ArgParser, CommandFactory, FromArgMatches};

use super::{CommandLine, SeparateComponent};
use crate::program::STANDALONE;

/// The verbs, each with those of its subcommands that it has here; none: the verb has no subcommands.
const VERBS: [(&str, &[&str]); 7] = [
    ("flash", &[]),
    ("verify", &[]),
    ("inspect", &[]),
    ("push", &[]),
    ("release", &["list", "show", "get", "diff"]),
    ("keys", &["list"]),
    ("completions", &[]),
];

/// The command line. `version` is what `--version` prints after the name.
pub fn command(version: &'static str) -> ArgParser {
    let all = CommandLine::command();
    // Each has its place in the list of `cargo xtask` until it gets another one.
    let verbs = VERBS
        .iter()
        .enumerate()
        .map(|(place, (name, parts))| narrow(&all, name, parts).display_order(place));
    ArgParser::new(STANDALONE)
        .about("Flash cards, update robots, and check images, bundles and releases, without a checkout of Slipway")
        .version(version)
        .max_term_width(100)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(verbs)
}

/// An argument of a verb, or of its subcommand, where there is no workspace.
fn without_workspace(verb: &str, part: &str, arg: Arg) -> Arg {
    match (verb, arg.get_id().as_str()) {
        ("flash", "image") => arg
            .value_name("IMAGE")
            .help("A card image (.img, .img.zst, .img.xz)")
            .required_unless_present("list")
            .value_parser(|text: &str| Ok::<_, Infallible>(path(text))),
        ("push", "bundle") => arg.required(true).help("The bundle"),
        ("flash" | "push", "product" | "board") => absent::<String>(arg),
        ("push", "component") => absent::<SeparateComponent>(arg),
        ("push", "offline") => arg.hide(true),
        ("release", "store") => arg
            .required(true)
            .help("The store: a directory, ssh://[USER@]HOST[:PORT]/PATH, s3://BUCKET[/PREFIX], or https://HOST[/PATH]"),
        ("release", "product") => arg.required(true).help("The product"),
        ("release", "channel") if part != "list" => {
            arg.help("The channel; required for `latest` [default: any that has the version]")
        }
        ("verify", "keys") => arg.help(
            "Public keys to trust: a key set (JSON) or a minisign public key [default: the key set that `slipway keys list` shows]",
        ),
        _ => arg,
    }
}

/// Reads the arguments of this process; the verbs of [`command`] only. Ends the process on wrong ones, and for `--help` and
/// `--version`.
pub fn parse(version: &'static str) -> CommandLine {
    let matches = command(version).get_matches();
    CommandLine::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// One verb of `cargo xtask`, with these of its subcommands.
fn narrow(of: &ArgParser, name: &'static str, parts: &[&str]) -> ArgParser {
    let verb = of.find_subcommand(name).expect("a verb of `cargo xtask`").clone();
    let adapted = |verb: ArgParser| {
        let part = verb.get_name().to_owned();
        let verb = verb.mut_args(|arg| without_workspace(name, &part, arg));
        match (name, part.as_str()) {
            ("flash", _) => verb.override_usage(
                "slipway flash [OPTIONS] <IMAGE> [DEVICE]\n       slipway flash --list",
            ),
            ("keys", "list") => verb.about(
                "List the keys of the key set in $SLIPWAY_KEYS, else ~/.config/slipway/keys; secrets are never shown",
            ),
            _ => verb,
        }
    };
    if parts.is_empty() {
        return adapted(verb);
    }
    let part = |part: &&str| adapted(verb.find_subcommand(part).expect("its subcommand").clone());
    let about = match name {
        "release" => "Show and fetch the releases of a store",
        _ => "List the public keys that this machine trusts",
    };
    ArgParser::new(name)
        .about(about)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(parts.iter().map(part))
}

/// An option that a workspace gives its meaning: it stays, since the verb reads it, but has no value.
fn absent<T: Clone + Send + Sync + 'static>(arg: Arg) -> Arg {
    arg.hide(true).value_parser(|_: &str| Err::<T, _>("this option needs a checkout of Slipway"))
}

/// The path of an image. `cargo xtask flash` takes a name without `/` and `.` for a product.
fn path(text: &str) -> String {
    if text.contains(['/', '.']) { text.to_owned() } else { format!("./{text}") }
}
