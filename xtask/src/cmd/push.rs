//! `push`: installs a bundle on robots over SSH.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::build::{BuildOptions, build_component};
use crate::cli::{OutputFormat, PushArgs, SeparateComponent};
use crate::progress::format_duration;
use crate::push::{self, PushOutcome, PushRequest, PushVerdict, describe_outcome};
use crate::tools::{self, ToolPurpose};
use crate::workspace::{dist_dir, resolve_plan};
use crate::{out, outln, text};

/// `cargo xtask push`.
///
/// # Errors
/// When a robot did not commit the bundle's version (with `--no-wait`: did not install it).
pub fn push(options: &PushArgs) -> Result<()> {
    let bundle = match (&options.bundle, options.component) {
        (Some(bundle), _) => bundle.clone(),
        (None, Some(SeparateComponent::Api)) => {
            tools::require_tools(&[ToolPurpose::Push], true)?;
            let build = BuildOptions {
                selection: options.target.selection(),
                offline: options.offline,
                ..BuildOptions::default()
            };
            build_component(&build)?.bundle.path
        }
        (None, None) => {
            let (config, _, plan) = resolve_plan(&options.target.selection())?;
            let bundle = dist_dir(&config.root, &plan).join(format!("{}.bundle", plan.stem()));
            ensure!(
                bundle.is_file(),
                "there is no bundle yet: {bundle}\nhelp: cargo xtask build-image --product {} --board {}",
                plan.product.name,
                plan.board.name
            );
            bundle
        }
    };
    tools::require_tools(&[ToolPurpose::Push], true)?;
    let outcomes = push::push_to_robots(&PushRequest {
        hosts: options.hosts.clone(),
        bundle,
        ssh_options: options.ssh_option.clone(),
        wait: (!options.no_wait).then(|| Duration::from_secs(options.timeout)),
    })?;
    match options.format {
        OutputFormat::Json => outln!("{}", text::to_json(&outcomes)?),
        OutputFormat::Text => out!("{}", format_outcomes(&outcomes)),
    }
    let wanted = if options.no_wait { PushVerdict::Installed } else { PushVerdict::Committed };
    // An API is committed as soon as it is installed: there is nothing to wait for.
    let done = |outcome: &&PushOutcome| [wanted, PushVerdict::Committed].contains(&outcome.verdict);
    let missing = outcomes.len() - outcomes.iter().filter(done).count();
    if missing > 0 {
        let what = if options.no_wait { "installed" } else { "committed" };
        bail!("not {what} on {missing} of {} robots", outcomes.len());
    }
    Ok(())
}

/// The outcomes in human-readable form.
fn format_outcomes(outcomes: &[PushOutcome]) -> String {
    let width = outcomes.iter().map(|outcome| outcome.host.chars().count()).max().unwrap_or(0);
    let line = |outcome: &PushOutcome| {
        let took = format_duration(Duration::from_secs_f64(outcome.seconds));
        let text =
            describe_outcome(outcome).replace('\n', &format!("\n {:width$}  {:<12} ", "", ""));
        format!(" {:width$}  {took:<12} {text}\n", outcome.host)
    };
    outcomes.iter().map(line).collect()
}
