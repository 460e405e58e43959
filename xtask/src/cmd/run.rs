//! `run`: boots a built image in QEMU on this terminal.

use anyhow::{Context, Result, ensure};

use crate::build::qemu_files;
use crate::cli::Run;
use crate::cmd::plan::{dist, resolve};
use crate::qemu::{Start, run_interactive};
use crate::tools::{self, Purpose};
use bundle::bootstate::{BootState, Slot};

/// `cargo xtask run`.
///
/// # Errors
/// When nothing was built, or the board has no machine in QEMU.
pub fn run(options: &Run) -> Result<()> {
    let (config, _, plan) = resolve(&options.target)?;
    let name = &plan.board.name;
    let qemu = plan.board.qemu.as_ref().with_context(|| {
        format!("QEMU has no machine for {name}\nhelp: use a board whose board.toml has [qemu]")
    })?;
    let files = qemu_files(&dist(&config.root, &plan), &plan).context("the board has [qemu]")?;
    ensure!(
        files.image.is_file(),
        "there is no image for {name} yet\nhelp: cargo xtask build-image --product {} --board {name}",
        plan.product.name
    );
    tools::require(&[Purpose::Run], true)?;
    let boot_state = match (&options.slot, plan.disk.states.first()) {
        (None, _) => None,
        (Some(slot), Some(sector)) => {
            let active = if slot == "a" { Slot::A } else { Slot::B };
            Some((sector.offset, BootState { active, ..BootState::first() }))
        }
        (Some(_), None) => anyhow::bail!("{name} keeps no boot state: --slot cannot choose"),
    };
    run_interactive(&qemu.machine, &files, &Start { boot_state, ssh_port: options.ssh_port })
}
