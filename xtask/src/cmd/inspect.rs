//! `inspect`: shows what is in an image, a bundle or a slot image, or what changed between two.

use anyhow::{Result, ensure};
use camino::Utf8Path;

use crate::cli::{InspectArgs, OutputFormat};
use crate::diff::{Inventory, InventoryDifference};
use crate::inspect::{self, ImageView, OutputFileKind, detect_kind, read_inventory};
use crate::progress::format_bytes;
use crate::{out, outln, program, start, text};

/// `cargo xtask inspect`.
///
/// # Errors
/// When the kind of the file is unknown, or the file is damaged.
pub fn inspect(options: &InspectArgs) -> Result<()> {
    if let (true, Some(new)) = (options.diff, &options.new) {
        return show_diff(&options.file, new, options.format);
    }
    match detect_kind(&options.file)? {
        OutputFileKind::Image => show_image(&options.file, options.format),
        OutputFileKind::Bundle => show_bundle(&options.file, options.format),
        OutputFileKind::SlotImage => show_slot(&options.file, options.format),
    }
}

fn show_image(path: &Utf8Path, format: OutputFormat) -> Result<()> {
    let view = inspect::inspect_image(path)?;
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(&view)?);
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
    outln!("{path}: {}, {} table", format_bytes(t.size), t.table.name());
    outln!("  no     offset          size  type  name");
    for p in &t.partitions {
        let kind = p.kind.get(..8).unwrap_or(&p.kind);
        let name = p.name.as_deref().unwrap_or("");
        outln!(
            "  {:<2} {:>12} {:>13}  {kind:<8}  {name}",
            p.number,
            p.offset,
            format_bytes(p.size)
        );
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
        outln!(
            "  volume {} (FAT{}), {} free",
            volume.label,
            volume.width,
            format_bytes(volume.free)
        );
        for entry in volume.entries.iter().filter(|e| !e.folder) {
            outln!("    {:>12}  {}", format_bytes(entry.size), entry.path);
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
            format_bytes(slot.bytes)
        );
    }
    let Some(starts) = &view.starts else { return };
    for line in start::describe_chains(starts) {
        outln!("  {line}");
    }
    for finding in starts.stops.iter().chain(&starts.degrades) {
        outln!("  - {}", finding.replace('\n', "\n    "));
    }
}

fn show_slot(path: &Utf8Path, format: OutputFormat) -> Result<()> {
    let view = inspect::inspect_slot(path)?;
    let inventory = Inventory::of_ext4(path, 0)?;
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(&inventory)?);
        return Ok(());
    }
    outln!("{path}: {}, {} files, {}", view.system, view.files, format_bytes(view.bytes));
    for (title, list) in [("packages", &inventory.packages), ("wheels", &inventory.wheels)] {
        outln!("  {title}");
        for (name, version) in list {
            outln!("    {name} {version}");
        }
    }
    Ok(())
}

fn show_bundle(path: &Utf8Path, format: OutputFormat) -> Result<()> {
    let view = inspect::inspect_bundle(path)?;
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(&view)?);
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
                format_bytes(payload.size),
                format_bytes(payload.data.size),
                format_bytes(payload.index.size)
            );
        }
    }
    outln!("  run `{} verify {path}` to check every byte", program::name());
    Ok(())
}

fn show_diff(old: &Utf8Path, new: &Utf8Path, format: OutputFormat) -> Result<()> {
    let difference = InventoryDifference::between(&read_inventory(old)?, &read_inventory(new)?);
    match format {
        OutputFormat::Json => out!("{}", text::printable_json(&difference.to_json()?)),
        OutputFormat::Text => {
            let mut rendered = Vec::new();
            difference.render_terminal(&mut rendered)?;
            out!("{}", String::from_utf8_lossy(&rendered));
        }
    }
    Ok(())
}
