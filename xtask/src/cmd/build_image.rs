//! `build-image`: the card image, its bundle and the report; or a component alone.

use anyhow::{Context, Result};

use crate::build::{self, BuildOptions, BuildSummary, ComponentBundle};
use crate::cli::{BuildImageArgs, OutputFormat};
use crate::progress::format_bytes;
use crate::{outln, report, text};

/// `cargo xtask build-image`.
///
/// # Errors
/// Whatever a stage returns; nothing partial is left under a final name.
pub fn build_image(options: &BuildImageArgs) -> Result<()> {
    let asked = build_options(options);
    if options.component.is_some() {
        return show_component(&build::build_component(&asked)?, options.format);
    }
    match build::build_image(&asked)? {
        Some(finished) => print_report(finished, options.format),
        None => Ok(()),
    }
}

/// What was typed, for the pipeline.
fn build_options(options: &BuildImageArgs) -> BuildOptions {
    // Taken apart, so that an option that goes nowhere is an error of the compiler.
    let BuildImageArgs {
        target,
        until,
        component: _,
        offline,
        locked,
        zst,
        nightly,
        compression,
        no_install,
        tree,
        legal_info,
        yes,
        format: _,
    } = options;
    BuildOptions {
        selection: target.selection(),
        until: *until,
        offline: *offline,
        locked: *locked,
        zst: *zst,
        nightly: *nightly,
        compression: *compression,
        no_install: *no_install,
        buildroot: tree.buildroot.clone(),
        allow_changes: tree.allow_changes,
        overrides: tree.overrides.clone(),
        legal_info: *legal_info,
        yes: *yes,
    }
}

/// Prints the report.
fn print_report(finished: BuildSummary, format: OutputFormat) -> Result<()> {
    let BuildSummary { mut report, page } = finished;
    let mut out = std::io::stdout().lock();
    match format {
        OutputFormat::Json => outln!("{}", text::printable_json(&report.to_json()?)),
        OutputFormat::Text => {
            report.outputs.push(page);
            let style = report::TerminalStyle::for_stream(&out);
            report::render_terminal(&report, &mut out, style).context("printing the report")?;
        }
    }
    Ok(())
}

/// Prints the result.
fn show_component(made: &ComponentBundle, format: OutputFormat) -> Result<()> {
    match format {
        OutputFormat::Json => outln!("{}", text::to_json(made)?),
        OutputFormat::Text => {
            outln!(" bundle   {}  {}", made.bundle.path, format_bytes(made.bundle.size));
            outln!(" next     cargo xtask push HOST --component {}", made.component);
        }
    }
    Ok(())
}
