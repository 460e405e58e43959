//! `inspect`: shows what is in an image, a bundle or a slot image, or what changed between two.

use anyhow::{Result, ensure};
use camino::Utf8Path;

use crate::cli::{Format, Inspect};
use crate::diff::{Difference, Inventory};
use crate::inspect::{self, ImageView, Subject, inventory, subject};
use crate::progress::bytes;
use crate::{out, outln, program, start, text};

/// `cargo xtask inspect`.
///
/// # Errors
/// When the kind of the file is unknown, or the file is damaged.
pub fn inspect(options: &Inspect) -> Result<()> {
    if let (true, Some(new)) = (options.diff, &options.new) {
        return diff(&options.file, new, options.format);
    }
    match subject(&options.file)? {
        Subject::Image => image(&options.file, options.format),
        Subject::Bundle => bundle(&options.file, options.format),
        Subject::SlotImage => slot(&options.file, options.format),
    }
}

fn image(path: &Utf8Path, format: Format) -> Result<()> {
    let view = inspect::image(path)?;
    if format == Format::Json {
        outln!("{}", text::json(&view)?);
    } else {
        print_image(path, &view);
        if let Some(reason) = &view.unread {
            outln!("  how boards start from it cannot be told: {reason}");
        }
    }
    ensure!(
        view.tables.findings.is_empty(),
        "the partition table of {path} is damaged:\n  - {}",
        view.tables.findings.join("\n  - ")
    );
    Ok(())
}

fn print_image(path: &Utf8Path, view: &ImageView) {
    let t = &view.tables;
    outln!("{path}: {}, {} table", bytes(t.size), t.table.name());
    outln!("  no     offset          size  type  name");
    for p in &t.partitions {
        let kind = p.kind.get(..8).unwrap_or(&p.kind);
        let name = p.name.as_deref().unwrap_or("");
        outln!("  {:<2} {:>12} {:>13}  {kind:<8}  {name}", p.number, p.offset, bytes(p.size));
    }
    for state in &view.boot_states {
        let shown = state.words.as_deref().unwrap_or("empty or invalid: slot a is started");
        outln!("  boot state at {}: {shown}", state.offset);
    }
    for copy in &view.trust {
        let shown = copy.state.as_deref().unwrap_or("empty");
        outln!("  trust at {}: {shown}", copy.offset);
    }
    for volume in &view.volumes {
        outln!("  volume {} (FAT{}), {} free", volume.label, volume.width, bytes(volume.free));
        for entry in volume.entries.iter().filter(|e| !e.folder) {
            outln!("    {:>12}  {}", bytes(entry.size), entry.path);
        }
    }
    for slot in &view.slots {
        outln!(
            "  partition {}: {}, {} packages, {} wheels, {} files, {}",
            slot.partition,
            slot.system,
            slot.packages,
            slot.wheels,
            slot.files,
            bytes(slot.bytes)
        );
    }
    let Some(starts) = &view.starts else { return };
    for line in start::lines(starts) {
        outln!("  {line}");
    }
    for finding in starts.stops.iter().chain(&starts.degrades) {
        outln!("  - {}", finding.replace('\n', "\n    "));
    }
}

fn slot(path: &Utf8Path, format: Format) -> Result<()> {
    let view = inspect::slot(path)?;
    let inventory = Inventory::of_ext4(path, 0)?;
    if format == Format::Json {
        outln!("{}", text::json(&inventory)?);
        return Ok(());
    }
    outln!("{path}: {}, {} files, {}", view.system, view.files, bytes(view.bytes));
    for (title, list) in [("packages", &inventory.packages), ("wheels", &inventory.wheels)] {
        outln!("  {title}");
        for (name, version) in list {
            outln!("    {name} {version}");
        }
    }
    Ok(())
}

fn bundle(path: &Utf8Path, format: Format) -> Result<()> {
    let view = inspect::bundle(path)?;
    if format == Format::Json {
        outln!("{}", text::json(&view)?);
        return Ok(());
    }
    let m = &view.manifest;
    outln!("{path}: {} {} ({}) for {}", m.product, m.version, m.kind, m.boards.join(", "));
    for signer in &view.signed_by {
        outln!("  signed by the {} key {} of epoch {}", signer.kind, signer.id, signer.epoch);
    }
    if let Some(refusal) = &view.refusal {
        outln!("  NOT VERIFIED: {refusal}");
    }
    outln!("  rejects updates below {}", m.minimum_version);
    for component in &m.components {
        outln!("  component {} {}", component.name, component.version);
        for payload in &component.payloads {
            outln!(
                "    {}: {}, stored {}, index {}",
                payload.role,
                bytes(payload.size),
                bytes(payload.data.size),
                bytes(payload.index.size)
            );
        }
    }
    outln!("  run `{} verify {path}` to check every byte", program::name());
    Ok(())
}

fn diff(old: &Utf8Path, new: &Utf8Path, format: Format) -> Result<()> {
    let difference = Difference::between(&inventory(old)?, &inventory(new)?);
    match format {
        Format::Json => out!("{}", text::printable_json(&difference.to_json()?)),
        Format::Text => difference.render_terminal(&mut std::io::stdout().lock())?,
    }
    Ok(())
}
