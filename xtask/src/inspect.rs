//! What is in an image, a bundle or a slot image.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use bundle::BundleManifest;
use camino::Utf8Path;
use contract::device_file::{PATH, RawSectors};
use serde::Serialize;

use crate::artifact::open_file;
use crate::diff::Inventory;
use crate::disk::ext4_read::{needs_replay, read_small};
use crate::disk::layout::SECTOR;
use crate::disk::read::{self, DiskTables, FatListing};
use crate::keys::{KeyDirectory, key_directory};
use crate::start::{self, BootCheck};
use crate::update;
use bundle::bootstate::BootState;

/// Byte offset of ext4's magic number: superblock at 1024, field at 56 (ext4 documentation).
const EXT4_MAGIC_AT: u64 = 1080;

/// The largest os-release or device.toml that is read: 64 KiB, a hundred times the size of
/// Slipway's own.
const MOST_TEXT: u64 = 64 << 10;
/// The maximum number of sectors of a boot state; Slipway's boards have two.
const MOST_STATES: usize = 8;

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputFileKind {
    /// A card image.
    Image,
    /// An update bundle.
    Bundle,
    /// A slot's filesystem.
    SlotImage,
}

/// Detects the kind of a file by its content, whatever its name.
///
/// # Errors
/// When it is not one of the three.
pub fn detect_kind(path: &Utf8Path) -> Result<OutputFileKind> {
    let mut file = open_file(path)?;
    let mut head = [0; 512];
    let n = file.read(&mut head).with_context(|| format!("reading {path}"))?;
    // A tar's first header names its first member at byte 0 and says "ustar" at 257 (POSIX ustar).
    if n == 512 && head.starts_with(b"manifest.json\0") && head[257..262] == *b"ustar" {
        return Ok(OutputFileKind::Bundle);
    }
    let mut magic = [0; 2];
    let seek = file.seek(SeekFrom::Start(EXT4_MAGIC_AT)).and_then(|_| file.read_exact(&mut magic));
    if seek.is_ok() && magic == [0x53, 0xef] && head[510..] != [0x55, 0xaa] {
        return Ok(OutputFileKind::SlotImage);
    }
    if n == 512 && head[510..] == [0x55, 0xaa] {
        return Ok(OutputFileKind::Image);
    }
    bail!(
        "{path} is neither a card image, a bundle nor a slot image\n\
         help: unpack a compressed image first, for example with zstd -d; get a file again that was truncated or \
         changed"
    )
}

/// A card image.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct ImageView {
    pub tables: DiskTables,
    pub boot_states: Vec<StateView>,
    /// Copies of the trust record outside of `data`.
    pub trust: Vec<StateView>,
    pub volumes: Vec<FatListing>,
    pub slots: Vec<SlotView>,
    /// How each model starts; empty where the image's system does not say for which models it is.
    pub starts: Option<BootCheck>,
    /// Why there are none.
    #[serde(skip)]
    pub unread: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct StateView {
    pub offset: u64,
    pub state: Option<String>,
    /// The same in words, for the terminal.
    #[serde(skip)]
    pub words: Option<String>,
}

/// A boot state in words.
fn describe_boot_state(state: &BootState) -> String {
    let BootState { sequence, active, trial, tries } = state;
    let trial = match (trial, tries) {
        (None, _) => "no trial".to_owned(),
        (Some(slot), 0) => format!("trial of slot {slot} used up"),
        (Some(slot), 1) => format!("trial of slot {slot}, 1 start left"),
        (Some(slot), tries) => format!("trial of slot {slot}, {tries} starts left"),
    };
    format!("slot {active} is committed, {trial}; write {sequence}")
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SlotView {
    pub partition: u32,
    pub system: String,
    pub packages: usize,
    pub wheels: usize,
    pub files: usize,
    pub bytes: u64,
}

/// Everything in a card image; damage of its partition table is among the findings of its tables.
///
/// # Errors
/// When it is none of ours, or what is in it cannot be read.
pub(crate) fn inspect_image(path: &Utf8Path) -> Result<ImageView> {
    let tables = read::read_tables(path)?;
    let (starts, unread) = match start::check_card(path, None) {
        Ok(starts) => (Some(starts), None),
        Err(reason) => (None, Some(format!("{reason:#}"))),
    };
    let mut view = ImageView {
        tables,
        boot_states: vec![],
        trust: vec![],
        volumes: vec![],
        slots: vec![],
        starts,
        unread,
    };
    for partition in &view.tables.partitions {
        match detect_filesystem(path, partition.offset)? {
            Some(DetectedFilesystem::Fat) => {
                view.volumes.push(read::list_fat(path, partition.offset, partition.size)?);
            }
            // A root filesystem is never written to, so one that was in use has none.
            Some(DetectedFilesystem::Ext4) if needs_replay(path, partition.offset)? => {}
            Some(DetectedFilesystem::Ext4) => {
                let slot = slot_view(path, partition.offset, partition.number)?;
                // The data partition has no system in it.
                view.slots.extend(slot);
            }
            None => {}
        }
    }
    let (offsets, trust) = raw_offsets(path, &view.tables)?;
    for (offset, sector) in offsets.iter().zip(read::read_boot_states(path, &offsets)?) {
        let decoded = BootState::decode(&sector).ok();
        let words = decoded.as_ref().map(describe_boot_state);
        let state = decoded.map(|state| format!("{state:?}"));
        view.boot_states.push(StateView { offset: *offset, state, words });
    }
    for offset in trust {
        let mut copy = vec![0; bundle::area::COPY];
        let read = open_file(path)?.read_exact_at(&mut copy, offset);
        read.with_context(|| format!("reading the trust area at {offset} of {path}"))?;
        let state = match bundle::area::AreaCopy::decode(&copy) {
            Ok(copy) => Some(format!("{} bytes, write {}", copy.text.len(), copy.sequence)),
            Err(bundle::area::InvalidAreaCopy::Empty) => None,
            Err(invalid) => Some(invalid.to_string()),
        };
        view.trust.push(StateView { offset, state, words: None });
    }
    Ok(view)
}

/// A filesystem in an image.
pub(crate) enum DetectedFilesystem {
    /// A FAT.
    Fat,
    /// An ext4.
    Ext4,
}

/// The kind of filesystem at an offset of an image, by its magic numbers.
///
/// # Errors
/// When the image cannot be read there.
pub(crate) fn detect_filesystem(
    path: &Utf8Path,
    offset: u64,
) -> Result<Option<DetectedFilesystem>> {
    let mut file = open_file(path)?;
    let mut head = vec![0; 2048];
    file.seek(SeekFrom::Start(offset)).with_context(|| format!("reading {path}"))?;
    file.read_exact(&mut head).with_context(|| format!("reading {path}"))?;
    Ok(if head.get(1080..1082) == Some(&[0x53, 0xef]) {
        Some(DetectedFilesystem::Ext4)
    } else if head.get(510..512) == Some(&[0x55, 0xaa]) {
        Some(DetectedFilesystem::Fat)
    } else {
        None
    })
}

/// Where the boot state and the trust record are, according to the image's own system.
fn raw_offsets(path: &Utf8Path, tables: &DiskTables) -> Result<(Vec<u64>, Vec<u64>)> {
    for partition in &tables.partitions {
        if let Ok(Some(text)) = read_file(path, partition.offset, &format!("/{PATH}")) {
            let device = RawSectors::parse(&text)
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
    let filesystem = crate::diff::open_ext4(path, offset)?;
    if !filesystem.exists(name)? {
        return Ok(None);
    }
    let context = || format!("in the filesystem at byte {offset} of {path}");
    let content = read_small(&filesystem, name, MOST_TEXT).with_context(context)?;
    Ok(Some(String::from_utf8(content).with_context(|| format!("{name} {}", context()))?))
}

/// A slot image's system.
///
/// # Errors
/// When it has none, or it cannot be read.
pub(crate) fn inspect_slot(path: &Utf8Path) -> Result<SlotView> {
    let view = slot_view(path, 0, 0)?;
    view.with_context(|| format!("{path} has no system in it: no /etc/os-release"))
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

/// A bundle's manifest; `signed_by` is empty when no known key has signed it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BundleView {
    pub signed_by: Vec<bundle::SignedBy>,
    pub refusal: Option<String>,
    pub manifest: BundleManifest,
}

/// A bundle's manifest, whether or not a known key has signed it.
///
/// # Errors
/// When the file is not a bundle.
pub(crate) fn inspect_bundle(path: &Utf8Path) -> Result<BundleView> {
    let open = || open_file(path);
    let keys = KeyDirectory::open(&key_directory()?)?.set().clone();
    Ok(match bundle::BundleReader::open(bundle::StreamInput(open()?), &keys) {
        Ok(reader) => BundleView {
            signed_by: reader.signed_by().to_vec(),
            refusal: None,
            manifest: reader.manifest().clone(),
        },
        Err(error) => BundleView {
            signed_by: Vec::new(),
            refusal: Some(error.to_string()),
            manifest: update::read_unverified(path)?.0,
        },
    })
}

/// The contents of the system of a card image or a slot image.
///
/// # Errors
/// When there is none, or it cannot be read.
pub(crate) fn read_inventory(path: &Utf8Path) -> Result<Inventory> {
    match detect_kind(path)? {
        OutputFileKind::SlotImage => Inventory::of_ext4(path, 0),
        OutputFileKind::Image => {
            let tables = read::read_tables(path)?;
            for partition in &tables.partitions {
                if let Ok(Some(_)) = read_file(path, partition.offset, "/etc/os-release") {
                    return Inventory::of_ext4(path, partition.offset);
                }
            }
            bail!("{path} has no slot that contains a system")
        }
        OutputFileKind::Bundle => {
            bail!(
                "{path} is a bundle\n\
             help: compare the images; `inspect` without --diff shows a bundle"
            )
        }
    }
}
