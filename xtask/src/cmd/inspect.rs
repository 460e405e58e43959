//! `inspect`: what is in an image, a bundle or a slot image; and what changed between two.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use bundle::Manifest;
use camino::Utf8Path;
use contract::device_file::{PATH, RawPlaces};
use serde::Serialize;

use crate::cli::{Format, Inspect};
use crate::diff::{Difference, Inventory};
use crate::disk::ext4_read::{needs_replay, read_small};
use crate::disk::layout::SECTOR;
use crate::disk::read::{self, DiskTables, FatListing};
use crate::keys::{Keys, directory};
use crate::progress::bytes;
use crate::start::{self, Starts};
use crate::update;
use crate::{out, outln, text};
use bundle::bootstate::BootState;

/// Byte offset of ext4's magic number: superblock at 1024, field at 56 (ext4 documentation).
const EXT4_MAGIC_AT: u64 = 1080;

/// The largest os-release or device.toml that is read: 64 KiB, a hundred times what ours have.
const MOST_TEXT: u64 = 64 << 10;
/// The most sectors of a boot state; there are two.
const MOST_STATES: usize = 8;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A card image.
    Image,
    /// An update bundle.
    Bundle,
    /// A slot's filesystem.
    SlotImage,
}

/// Finds out what a file is by its content, whatever its name.
///
/// # Errors
/// When it is none of the three.
pub fn subject(path: &Utf8Path) -> Result<Subject> {
    let mut file = File::open(path).with_context(|| format!("opening {path}"))?;
    let mut head = [0; 512];
    let n = file.read(&mut head).with_context(|| format!("reading {path}"))?;
    // A tar's first header names its first member at byte 0 and says "ustar" at 257 (POSIX ustar).
    if n == 512 && head.starts_with(b"manifest.json\0") && head[257..262] == *b"ustar" {
        return Ok(Subject::Bundle);
    }
    let mut magic = [0; 2];
    let seek = file.seek(SeekFrom::Start(EXT4_MAGIC_AT)).and_then(|_| file.read_exact(&mut magic));
    if seek.is_ok() && magic == [0x53, 0xef] && head[510..] != [0x55, 0xaa] {
        return Ok(Subject::SlotImage);
    }
    if n == 512 && head[510..] == [0x55, 0xaa] {
        return Ok(Subject::Image);
    }
    bail!(
        "{path} is neither a card image, a bundle nor a slot image\n\
         help: a compressed image must be unpacked first, for example with zstd -d"
    )
}

/// `cargo xtask inspect`.
///
/// # Errors
/// When the file is none of ours, or damaged.
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

/// A card image.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageView {
    tables: DiskTables,
    boot_states: Vec<StateView>,
    /// Copies of what the robot trusts besides `data`.
    trust: Vec<StateView>,
    volumes: Vec<FatListing>,
    slots: Vec<SlotView>,
    /// How each model starts; none where the image's system does not say for which models it is.
    starts: Option<Starts>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct StateView {
    offset: u64,
    state: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct SlotView {
    partition: u32,
    system: String,
    packages: usize,
    wheels: usize,
    files: usize,
    bytes: u64,
}

fn image(path: &Utf8Path, format: Format) -> Result<()> {
    let tables = read::tables(path)?;
    let (starts, unread) = match start::look(path, None) {
        Ok(starts) => (Some(starts), None),
        Err(reason) => (None, Some(reason)),
    };
    let mut view = ImageView {
        tables,
        boot_states: vec![],
        trust: vec![],
        volumes: vec![],
        slots: vec![],
        starts,
    };
    for partition in &view.tables.partitions {
        match content(path, partition.offset)? {
            Some(Held::Fat) => {
                view.volumes.push(read::fat(path, partition.offset, partition.size)?);
            }
            // A system is never written to, so what was in use has none.
            Some(Held::Ext4) if needs_replay(path, partition.offset)? => {}
            Some(Held::Ext4) => {
                let slot = slot_view(path, partition.offset, partition.number)?;
                // The data partition has no system in it.
                view.slots.extend(slot);
            }
            None => {}
        }
    }
    let (offsets, trust) = raw_offsets(path, &view.tables)?;
    for (offset, sector) in offsets.iter().zip(read::states(path, &offsets)?) {
        let state = BootState::decode(&sector).ok().map(|s| format!("{s:?}"));
        view.boot_states.push(StateView { offset: *offset, state });
    }
    for offset in trust {
        let mut copy = vec![0; bundle::area::COPY];
        let read = File::open(path).and_then(|file| file.read_exact_at(&mut copy, offset));
        read.with_context(|| format!("reading the trust area at {offset} of {path}"))?;
        let state = match bundle::area::Copy::decode(&copy) {
            Ok(copy) => Some(format!("{} bytes, write {}", copy.text.len(), copy.sequence)),
            Err(bundle::area::Invalid::Empty) => None,
            Err(invalid) => Some(invalid.to_string()),
        };
        view.trust.push(StateView { offset, state });
    }
    if format == Format::Json {
        outln!("{}", text::json(&view)?);
    } else {
        print_image(path, &view);
        if let Some(reason) = unread {
            outln!("  how boards start from it cannot be told: {reason:#}");
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
        let shown = state.state.as_deref().unwrap_or("empty or invalid: slot a is started");
        outln!("  boot state at {}: {shown}", state.offset);
    }
    for copy in &view.trust {
        let shown = copy.state.as_deref().unwrap_or("nothing was kept yet");
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

/// A filesystem in an image.
pub(crate) enum Held {
    /// A FAT.
    Fat,
    /// An ext4.
    Ext4,
}

/// What lies at an offset of an image, by its magic numbers.
///
/// # Errors
/// When the image cannot be read there.
pub(crate) fn content(path: &Utf8Path, offset: u64) -> Result<Option<Held>> {
    let mut file = File::open(path).with_context(|| format!("opening {path}"))?;
    let mut head = vec![0; 2048];
    file.seek(SeekFrom::Start(offset)).with_context(|| format!("reading {path}"))?;
    file.read_exact(&mut head).with_context(|| format!("reading {path}"))?;
    Ok(if head.get(1080..1082) == Some(&[0x53, 0xef]) {
        Some(Held::Ext4)
    } else if head.get(510..512) == Some(&[0x55, 0xaa]) {
        Some(Held::Fat)
    } else {
        None
    })
}

/// Where the image's own system says that the boot state lies, and what it trusts.
fn raw_offsets(path: &Utf8Path, tables: &DiskTables) -> Result<(Vec<u64>, Vec<u64>)> {
    for partition in &tables.partitions {
        if let Ok(Some(text)) = read_file(path, partition.offset, &format!("/{PATH}")) {
            let device = RawPlaces::parse(&text)
                .with_context(|| format!("reading the device.toml in {path}"))?;
            let offsets = |sectors: Vec<u64>, what: &str| -> Result<Vec<u64>> {
                ensure!(
                    sectors.len() <= MOST_STATES,
                    "the device.toml in {path} names {} sectors for {what}",
                    sectors.len()
                );
                let offset = |sector: u64| sector.checked_mul(SECTOR);
                let offsets: Option<Vec<u64>> = sectors.into_iter().map(offset).collect();
                offsets.with_context(|| {
                    format!("the device.toml in {path} names a sector for {what} beyond 64 bits")
                })
            };
            return Ok((
                offsets(device.boot_state.sectors, "the boot state")?,
                offsets(device.trust.sectors, "the trust area")?,
            ));
        }
    }
    Ok((Vec::new(), Vec::new()))
}

fn read_file(path: &Utf8Path, offset: u64, name: &str) -> Result<Option<String>> {
    let filesystem = crate::diff::open(path, offset)?;
    if !filesystem.exists(name)? {
        return Ok(None);
    }
    let doing = || format!("in the filesystem at byte {offset} of {path}");
    let content = read_small(&filesystem, name, MOST_TEXT).with_context(doing)?;
    Ok(Some(String::from_utf8(content).with_context(|| format!("{name} {}", doing()))?))
}

fn slot_view(path: &Utf8Path, offset: u64, partition: u32) -> Result<Option<SlotView>> {
    let Some(release) = read_file(path, offset, "/etc/os-release")? else { return Ok(None) };
    let name = release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or("unknown");
    let inventory = Inventory::of_ext4(path, offset)?;
    Ok(Some(SlotView {
        partition,
        system: name.trim_matches('"').to_owned(),
        packages: inventory.packages.len(),
        wheels: inventory.wheels.len(),
        files: inventory.files.len(),
        bytes: inventory.files.values().map(|f| f.size).sum(),
    }))
}

fn slot(path: &Utf8Path, format: Format) -> Result<()> {
    let view = slot_view(path, 0, 0)?;
    let view = view.with_context(|| format!("{path} has no system in it: no /etc/os-release"))?;
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

/// A bundle's manifest; `signed_by` is empty when no known key has signed it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct BundleView {
    signed_by: Vec<bundle::SignedBy>,
    refusal: Option<String>,
    manifest: Manifest,
}

fn bundle(path: &Utf8Path, format: Format) -> Result<()> {
    let open = || File::open(path).with_context(|| format!("opening {path}"));
    let keys = Keys::open(&directory()?)?.set().clone();
    let view = match bundle::Reader::open(bundle::Stream(open()?), &keys) {
        Ok(reader) => BundleView {
            signed_by: reader.signed_by().to_vec(),
            refusal: None,
            manifest: reader.manifest().clone(),
        },
        Err(error) => BundleView {
            signed_by: Vec::new(),
            refusal: Some(error.to_string()),
            manifest: update::unverified(path)?.0,
        },
    };
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
    outln!("  refuses updates below {}", m.minimum_version);
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
    outln!("  cargo xtask verify {path} checks every byte");
    Ok(())
}

/// What is in the system of a card image or a slot image.
///
/// # Errors
/// When there is none, or it cannot be read.
pub(crate) fn inventory(path: &Utf8Path) -> Result<Inventory> {
    match subject(path)? {
        Subject::SlotImage => Inventory::of_ext4(path, 0),
        Subject::Image => {
            let tables = read::tables(path)?;
            for partition in &tables.partitions {
                if let Ok(Some(_)) = read_file(path, partition.offset, "/etc/os-release") {
                    return Inventory::of_ext4(path, partition.offset);
                }
            }
            bail!("{path} has no slot with a system in it")
        }
        Subject::Bundle => {
            bail!("{path} is a bundle\nhelp: compare the images; `inspect` alone shows a bundle")
        }
    }
}

fn diff(old: &Utf8Path, new: &Utf8Path, format: Format) -> Result<()> {
    let difference = Difference::between(&inventory(old)?, &inventory(new)?);
    match format {
        Format::Json => out!("{}", text::printable_json(&difference.to_json()?)),
        Format::Text => difference.render_terminal(&mut std::io::stdout().lock())?,
    }
    Ok(())
}
