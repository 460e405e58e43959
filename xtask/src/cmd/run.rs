//! `run`: boots a built image in QEMU on this terminal, or runs a product's services on this machine.

use anyhow::{Context, Result, bail, ensure};

use crate::build::{self, BuildOptions, qemu_files};
use crate::cli::{OutputFormat, RunArgs};
use crate::local::{self, HealthySystem, LocalOptions};
use crate::progress::say;
use crate::qemu::{InteractiveStart, run_interactive};
use crate::tools::{self, ToolPurpose};
use crate::workspace::{dist_dir, resolve_plan};
use crate::{out, outln, text};
use bundle::bootstate::{BootState, Slot};

/// `cargo xtask run`.
///
/// # Errors
/// When nothing was built, or the board has no machine in QEMU; with `--local` when the build fails, this
/// machine allows no namespaces, the system does not come up, or the command in it fails.
pub fn run(options: &RunArgs) -> Result<()> {
    if options.local { run_local(options) } else { run_in_qemu(options) }
}

/// On this machine, without QEMU.
fn run_local(options: &RunArgs) -> Result<()> {
    tools::require_tools(&[ToolPurpose::Local], true)?;
    // Checks that can fail early, before the build.
    let rights = local::available_privileges()?;
    let listener = local::listen_on(options.port)?;
    let composed = build::build_for_local(&BuildOptions {
        selection: options.target.selection(),
        offline: options.offline,
        ..BuildOptions::default()
    })?;
    let how = LocalOptions {
        fresh: options.fresh,
        site: options.site.clone(),
        command: options.command.clone(),
    };
    let ready = local::run_system(&composed, &how, rights, listener, |ready| {
        print_system(ready, options.format)
    })?;
    let Some(code) = ready.exit else { return Ok(()) };
    match options.format {
        OutputFormat::Json => outln!("{}", text::to_json(&ready)?),
        OutputFormat::Text => out!("{}", ready.output.as_deref().unwrap_or_default()),
    }
    if code != 0 {
        bail!("{} has ended with {code}", options.command.join(" "));
    }
    Ok(())
}

/// A healthy system that keeps running.
fn print_system(ready: &HealthySystem, format: OutputFormat) -> Result<()> {
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(ready)?);
        return Ok(());
    }
    for answer in &ready.answers {
        say("well", format!("{} inside of the system answers {}", answer.url, answer.status));
    }
    outln!(" ready    {}  ({:.0} s)", ready.address, ready.seconds);
    outln!(" data     {}  (--fresh starts with an empty one)", ready.data);
    outln!(" quit     Ctrl-C");
    Ok(())
}

/// In QEMU.
fn run_in_qemu(options: &RunArgs) -> Result<()> {
    let (config, _, plan) = resolve_plan(&options.target.selection())?;
    let name = &plan.board.name;
    let qemu = plan.board.qemu.as_ref().with_context(|| {
        format!("QEMU has no machine for {name}\nhelp: use a board whose board.toml has [qemu]")
    })?;
    let files =
        qemu_files(&dist_dir(&config.root, &plan), &plan).context("the board has [qemu]")?;
    ensure!(
        files.image.is_file(),
        "there is no image for {name} yet\nhelp: cargo xtask build-image --product {} --board {name}",
        plan.product.name
    );
    tools::require_tools(&[ToolPurpose::Run], true)?;
    let boot_state = match (&options.slot, plan.disk.states.first()) {
        (None, _) => None,
        (Some(slot), Some(sector)) => {
            let active = if slot == "a" { Slot::A } else { Slot::B };
            Some((sector.offset, BootState { active, ..BootState::first() }))
        }
        (Some(_), None) => {
            anyhow::bail!("{name} has no boot state, so --slot cannot select a slot")
        }
    };
    run_interactive(
        &qemu.machine,
        &files,
        &InteractiveStart { boot_state, ssh_port: options.ssh_port },
    )
}
