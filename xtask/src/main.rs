//! The command line; everything else is in the library.

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use xtask::cli::{Command, CommandLine};
use xtask::{cmd, local, program};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let outcome = match arguments.get(1).map(String::as_str) {
        // Process 1 of a local system is this program, too.
        Some(local::CHILD) => local::init::run(),
        _ => {
            let cli = CommandLine::parse();
            program::check_temporary_directory().and_then(|()| run(&cli))
        }
    };
    program::exit_code(outcome)
}

fn run(cli: &CommandLine) -> anyhow::Result<()> {
    match &cli.command {
        Command::Doctor(options) => cmd::doctor::doctor(options),
        Command::BuildImage(options) => cmd::build_image::build_image(options),
        Command::Inspect(options) => cmd::inspect::inspect(options),
        Command::Verify(options) => cmd::verify::verify(options),
        Command::Run(options) => cmd::run::run(options),
        Command::Flash(options) => cmd::flash::flash(options),
        Command::Push(options) => cmd::push::push(options),
        Command::Release(verb) => cmd::release::release(verb),
        Command::Publish(options) => cmd::publish::publish(options),
        Command::Bench(_) => cmd::bench::bench(),
        Command::Lock(options) => cmd::lock::lock(options),
        Command::Buildroot(verb) => cmd::buildroot::buildroot(verb),
        Command::Keys(verb) => cmd::keys::keys(verb),
        Command::Check(options) => cmd::check::check(options),
        Command::E2e => cmd::check::e2e(),
        Command::Test(options) => cmd::check::test(options),
        Command::Clean(options) => cmd::clean::clean(options),
        Command::Plan(options) => cmd::plan::plan(options),
        Command::Render(options) => cmd::plan::render(options),
        Command::Completions { shell } => {
            cmd::print_completions(*shell, &mut CommandLine::command(), "xtask");
            Ok(())
        }
    }
}
